"""Damaged checkpoints and data files, as many as asked for.

    python bench/robustness/fuzz.py checkpoints --cases 10000 --workers 2
    python bench/robustness/fuzz.py data --cases 10000 --workers 2
    python bench/robustness/fuzz.py data --case 17

What is tried, and what counts as wrong, is in tests/helpers/fuzz_checkpoints.py and
tests/helpers/fuzz_data.py. Cases run in child processes of bounded memory, so that a crash, a hang and an
allocation without end are wrong cases too. Every way to be wrong is printed once, and one line sums up. Exit
status 1 if anything was wrong.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import child_jobs

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
CHUNK = 100
SECONDS = 40.0  # a case that takes longer hangs
MEMORY = 3 << 30  # bytes a child may take beyond what it begins with


def runner(what: str, folder: Path) -> tuple[Callable[[int], tuple[str, str]], type[Exception]]:
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    if what == "checkpoints":
        from helpers import fuzz_checkpoints

        originals = fuzz_checkpoints.Originals(folder)
        return lambda seed: fuzz_checkpoints.run_case(seed, originals), fuzz_checkpoints.Wrong
    from helpers import fuzz_data

    return lambda seed: fuzz_data.run_case(seed, folder), fuzz_data.Wrong


def run_child(what: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run, wrong = runner(what, Path(folder))
        child_jobs.bound_memory(MEMORY)
        for job in child_jobs.jobs_of_parent():
            for seed in range(job["first"], job["first"] + job["count"]):
                child_jobs.answer(begin=seed)
                try:
                    outcome, _ = run(seed)
                except wrong as error:
                    child_jobs.answer(end="wrong", case=seed, detail=str(error))
                else:
                    child_jobs.answer(end=outcome)


def run_all(args: argparse.Namespace) -> int:
    start = time.perf_counter()
    counts: Counter[str] = Counter()
    failures: list[tuple[Any, str]] = []
    more: list[dict[str, int]] = []  # what a child that crashed has left over

    def jobs() -> Iterator[dict[str, int]]:
        first = args.seed
        last = args.seed + args.cases
        while first < last or more:
            if more:
                yield more.pop()
            else:
                yield {"first": first, "count": min(CHUNK, last - first)}
                first += CHUNK

    def tell(job: dict[str, int], answers: list[dict[str, Any]]) -> None:
        for answer in answers:
            if "crash" in answer:
                counts["wrong"] += 1
                begun = job["first"] if answer["begin"] is None else answer["begin"]
                failures.append((begun, f"crash: {answer['crash']} {answer.get('errors', '')[-300:]}"))
                rest = job["first"] + job["count"] - begun - 1
                if rest > 0:
                    more.append({"first": begun + 1, "count": rest})
            else:
                counts[answer["end"]] += 1
                if answer["end"] == "wrong":
                    failures.append((answer["case"], answer["detail"]))
        done = sum(counts.values())
        print(f"\r{done} cases, {counts['wrong']} wrong", end="", file=sys.stderr, flush=True)

    command = [sys.executable, __file__, args.what, "--child"]
    child_jobs.work(command, jobs(), args.workers, SECONDS, tell)
    print(file=sys.stderr)
    ways: dict[str, list[tuple[Any, str]]] = {}
    for case, detail in failures:
        ways.setdefault(_way(detail), []).append((case, detail))
    for found in sorted(ways.values(), key=len, reverse=True):
        case, detail = found[0]
        print(f"WRONG {len(found)} times, e.g. --case {case}: {detail[:500]}")
    total = sum(counts.values())
    print(
        f"fuzz {args.what}: {total} cases, seeds {args.seed} to {args.seed + args.cases - 1}: "
        + ", ".join(f"{n} {outcome}" for outcome, n in sorted(counts.items()))
        + f"; {len(ways)} ways to be wrong; {time.perf_counter() - start:.0f} s, {args.workers} workers"
    )
    return 1 if failures else 0


def _way(detail: str) -> str:
    """A message without what differs from case to case: mostly the class of the error."""
    found = re.search(r"\b(\w+(?:Error|Exception|Warning))\b.{0,40}", detail)
    text = found[0] if found else detail.split(": ")[-1][:40] if "rows were" not in detail else "rows"
    return re.sub(r"\d+|'[^']*'", "N", text)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("checkpoints", "data"))
    parser.add_argument("--cases", type=int, default=10000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="the first case's; each next case has the next")
    parser.add_argument("--case", type=int, help="the seed of one case, to run alone and with its traceback")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        run_child(args.what)
        return 0
    if args.case is not None:
        with tempfile.TemporaryDirectory() as folder:
            print(*runner(args.what, Path(folder))[0](args.case), sep=": ")
        return 0
    return run_all(args)


if __name__ == "__main__":
    sys.exit(main())
