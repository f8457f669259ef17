"""kill -9 at random points of `save`, of a self-pruning training and of a sweep: nothing lost, nothing twice.

    python bench/robustness/kill.py save --points 100
    python bench/robustness/kill.py train --points 100
    python bench/robustness/kill.py sweep --points 100 --workers 2

Half of the points are random times over the length of the operation, half are calls that change files, before
or after the call. What counts as lost is in tests/helpers, in kill_saves.py, kill_trainings.py and
kill_sweeps.py. One line sums up. Exit status 1 if anything was lost.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))


def work(what: str, folder: Path, worker: int, workers: int, points: int, seed: int) -> None:
    """Every so many-th point, in one process; a line of JSON to the standard output for each."""
    import transformers
    from helpers import kill_saves, kill_sweeps, kill_trainings, killed_processes

    transformers.logging.set_verbosity_error()
    place = folder / str(worker)
    place.mkdir()
    kinds: dict[str, Any] = {
        "save": kill_saves.Saves,
        "train": kill_trainings.Trainings,
        "sweep": kill_sweeps.Sweeps,
    }
    kind = kinds[what](place)
    print(json.dumps({"seconds": kind.seconds, "calls": kind.calls}), flush=True)
    chosen = list(enumerate(killed_processes.points(points, kind.seconds, kind.calls, seed)))[worker::workers]
    for number, point in chosen:
        try:
            said = {"found": kind.try_point(number, point)}
        except killed_processes.Lost as error:
            said = {"found": "LOST", "detail": f"at point {number} ({point}): {error}"}
        print(json.dumps(said), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("save", "train", "sweep"))
    parser.add_argument("--points", type=int, default=100)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)  # its number, and the folder of all
    args = parser.parse_args()
    if args.worker:
        work(args.what, Path(args.worker[1]), int(args.worker[0]), args.workers, args.points, args.seed)
        return 0
    start = time.perf_counter()
    counts: Counter[str] = Counter()
    failures: list[str] = []
    measured: dict[str, float] = {"seconds": 0.0, "calls": 0}
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "PYTHONWARNINGS": "ignore", "MPLBACKEND": "Agg",
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        again = [sys.executable, __file__, args.what, "--points", str(args.points), "--seed", str(args.seed)]
        again += ["--workers", str(args.workers), "--worker"]
        started = [
            subprocess.Popen([*again, str(i), folder], stdout=subprocess.PIPE, text=True, env=environment)
            for i in range(args.workers)
        ]

        def read(process: subprocess.Popen[str]) -> None:
            for line in process.stdout:  # type: ignore[union-attr]
                if not line.startswith("{"):
                    continue
                said = json.loads(line)
                if "found" in said:
                    counts[said["found"]] += 1
                    failures.extend([said["detail"]] if "detail" in said else [])
                    print(
                        f"\r{sum(counts.values())} points, {len(failures)} lost",
                        end="",
                        file=sys.stderr,
                        flush=True,
                    )
                else:
                    measured.update(said)
            if process.wait():
                failures.append(f"a worker failed with exit status {process.returncode}")

        threads = [threading.Thread(target=read, args=(process,)) for process in started]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    print(file=sys.stderr)
    for failure in failures:
        print(f"LOST {failure}")
    print(
        f"kill {args.what}: {sum(counts.values())} points, seed {args.seed}, "
        + f"over {measured['seconds']:.2f} s and "
        + f"{measured['calls']} calls: "
        + ", ".join(f"{n} {what}" for what, n in sorted(counts.items()))
        + f"; {time.perf_counter() - start:.0f} s, {args.workers} workers"
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
