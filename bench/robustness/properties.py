"""fastgate against transformers on random models, calls and changes by users, as many as asked for.

    python bench/robustness/properties.py --cases 10000 --workers 2
    python bench/robustness/properties.py --case '{"family": "Bert", "head": "Model", "layers": 2}'

The check is tests/helpers/random_check.py. Cases run in child processes, so that a crash or a hang is one
failing case. What was done is kept in the file --out: the same command goes on where it was stopped. At the
end every way to fail is printed once with its smallest case, and one line sums up. Exit status 1 if anything
failed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import child_jobs

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
CHUNK = 50
SECONDS = 120.0


def run_child() -> None:
    import transformers
    from helpers import random_cases, random_check, random_minimum
    from hypothesis import HealthCheck, Phase, given, seed, settings

    transformers.logging.set_verbosity_error()
    known: set[Any] = set()

    for job in child_jobs.jobs_of_parent():

        def one(case: random_cases.Case) -> None:
            child_jobs.answer(begin=str(case))
            try:
                child_jobs.answer(end=random_check.check(case))
            except random_check.Difference as error:
                small = random_minimum.with_fewer_changes(case, error.kind)
                way = (error.kind, *sorted({change.kind for change in small.changes}))
                if way not in known:
                    known.add(way)
                    small = random_minimum.minimised(small, error.kind)
                detail = str(error)[:300]
                child_jobs.answer(
                    end="failed", kind=error.kind, case=str(small), first=str(case), detail=detail
                )

        strategy = random_cases.cases(changed=bool(job["chunk"] % 2))
        limits = settings(
            max_examples=CHUNK, database=None, deadline=None, suppress_health_check=list(HealthCheck),
            phases=(Phase.generate,),
        )  # fmt: skip
        seed(job["seed"] * 1_000_003 + job["chunk"])(limits(given(strategy)(one)))()


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def run_all(args: argparse.Namespace) -> int:
    start = time.perf_counter()
    done = [line for line in read(args.out) if line["seed"] == args.seed]
    counts: Counter[str] = Counter()
    failures: list[dict[str, Any]] = []
    seconds = sum(line["seconds"] for line in done)
    for line in done:
        counts.update(line["counts"])
        failures += line["failures"]
    had = {line["chunk"] for line in done}

    def jobs() -> Iterator[Any]:
        chunk = 0
        while sum(counts.values()) < args.cases:
            if chunk not in had:
                yield {"seed": args.seed, "chunk": chunk}
            chunk += 1

    last = time.perf_counter()

    def tell(job: Any, answers: list[dict[str, Any]]) -> None:
        nonlocal last, seconds
        found: Counter[str] = Counter()
        wrong = []
        for answer in answers:
            if "crash" in answer:
                wrong.append(
                    {
                        "kind": "crash: " + answer["crash"],
                        "case": answer["begin"],
                        "detail": answer.get("errors", ""),
                    }
                )
                found["failed"] += 1
            else:
                found[answer["end"].partition(",")[0]] += 1
                if answer["end"] == "failed":
                    wrong.append({key: answer[key] for key in ("kind", "case", "first", "detail")})
        counts.update(found)
        failures.extend(wrong)
        now = time.perf_counter()
        took, last = now - last, now
        seconds += took
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with args.out.open("a") as file:
            line = {**job, "counts": found, "failures": wrong, "seconds": took}
            file.write(json.dumps(line) + "\n")
        print(
            f"\r{sum(counts.values())} cases, {counts['failed']} failed", end="", file=sys.stderr, flush=True
        )

    child_jobs.work([sys.executable, __file__, "--child"], jobs(), args.workers, SECONDS, tell)
    print(file=sys.stderr)
    ways: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for failure in failures:
        kinds = {change["kind"] for change in json.loads(failure["case"] or "{}").get("changes", ())}
        ways.setdefault((failure["kind"], *sorted(kinds)), []).append(failure)
    for way, found in sorted(ways.items(), key=lambda item: -len(item[1])):
        smallest = min(found, key=lambda failure: len(failure["case"] or ""))
        print(f"FAILED {len(found)} times: {', '.join(way)}\n  {smallest['detail']}\n  {smallest['case']}")
    total = sum(counts.values())
    print(
        f"properties: {total} cases, seed {args.seed}: "
        + ", ".join(f"{n} {what}" for what, n in sorted(counts.items()))
        + f"; {len(ways)} ways to fail; {seconds:.0f} s of {args.workers} workers "
        + f"({time.perf_counter() - start:.0f} s in this sitting)"
    )
    return 1 if failures else 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=10000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("properties.jsonl"))
    parser.add_argument("--case", help="one case as JSON; its check alone, with the traceback")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        run_child()
        return 0
    if args.case:
        from helpers import random_cases, random_check

        print(random_check.check(random_cases.Case.of(args.case)))
        return 0
    return run_all(args)


if __name__ == "__main__":
    sys.exit(main())
