"""Timings on the CPU: fastgate with every choice of kept layers, and each baseline, a line a scenario.

    python bench/models/scenarios.py --data-dir D [--out FILE] [--threads 2] [--only TEXT] [--minutes M]
                                     [--list]

A scenario is one model size, precision, task, order of the rows and batch size. All models take turns on the
same batches: the baselines, fastgate unpruned and pruned, and the matmul lower bound of each. Scenarios of
one size, precision and kind of head that follow one another share a process: a baseline is exported or
compiled once for them. The most important scenarios come first. A scenario whose line with the same settings
is in FILE already is left out, so a sweep that was cut off goes on where it was. BERT-large in float32 takes
22 GB of memory.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fastgate.benchmark import baselines, compare, model_variants
from fastgate.benchmark.batches import choose_batches, evaluation_rows
from fastgate.data.load import load_task
from fastgate.env import environment
from fastgate.errors import FastgateError

OUT = Path(__file__).parents[1] / "results" / "scenarios_cpu.jsonl"
KINDS = {"sst2": "text", "imdb": "text", "wnut17": "tokens"}
MAX_LENGTH = {"sst2": 128, "imdb": 512, "wnut17": 128}
BATCHES = {1: 8, 8: 4, 32: 3, 128: 1}  # how many of a size
LONG_BATCHES = {1: 4, 8: 2, 32: 1}  # and of documents
BASELINES = ("sdpa", "eager", "compile", "onnxruntime", "openvino")
SHARES = (0.5, 0.67, 0.83)  # of the attention sublayers that are pruned


@dataclass(frozen=True)
class Scenario:
    model: str
    dtype: str
    task: str
    order: str
    batch_size: int

    @property
    def group(self) -> str:
        """Runs of one group share the models, hence a process."""
        return f"{self.model} {self.dtype} {KINDS[self.task]}"

    @property
    def whole(self) -> bool:
        """Whether every choice of kept layers is timed; elsewhere three are, and eager attention is not."""
        return self.task != "imdb" and (self.order, self.batch_size) == ("data", 32)

    @property
    def against(self) -> tuple[str, ...]:
        """Eager attention is behind SDPA or level with it: not worth its minutes everywhere."""
        return tuple(name for name in BASELINES if self.whole or name != "eager")

    @property
    def choices(self) -> list[str]:
        """Names of the choices of kept layers."""
        names = list(choices(self.model))
        spread = "75% spread" if "75% spread" in names else "67% spread"
        return names if self.whole else ["all", spread, "83% low"]

    def settings(self, threads: int) -> dict[str, Any]:
        return {
            **asdict(self),
            "batches": (LONG_BATCHES if self.task == "imdb" else BATCHES)[self.batch_size],
            "max_length": MAX_LENGTH[self.task],
            "threads": threads,
        }


def planned_runs() -> list[Scenario]:
    """All runs, the most important first.

    Left out: batches of one sorted by length, where nothing is padded either way; IMDB in batches of 128, and
    of 32 but for BERT-base: minutes a batch.
    """
    sst2 = [("sst2", "data", 32), ("sst2", "length", 32), ("sst2", "data", 1), ("sst2", "data", 8)]
    sst2 += [("sst2", "data", 128), ("sst2", "length", 8), ("sst2", "length", 128)]
    imdb = [("imdb", "data", 8), ("imdb", "data", 1), ("imdb", "length", 8), ("imdb", "data", 32)]
    wnut17 = [("wnut17", "data", 32), ("wnut17", "length", 32), ("wnut17", "data", 1), ("wnut17", "data", 8)]
    wnut17 += [("wnut17", "length", 8), ("wnut17", "data", 128)]
    planned = [
        ("bert-base", "float32", sst2[:4]),
        ("bert-base", "float32", wnut17[:1]),
        ("minilm", "float32", [*sst2[:5], *imdb[:2]]),
        ("bert-base", "bfloat16", sst2[:4]),
        ("minilm", "float32", wnut17[:4]),
        ("bert-base", "float32", [*sst2[4:], *imdb[:2]]),
        ("bert-base", "bfloat16", wnut17[:1]),
        ("minilm", "bfloat16", [*sst2[:5], *imdb[:2]]),
        ("bert-large", "float32", [*sst2[:4], *imdb[:1]]),
        ("bert-base", "float32", wnut17[1:]),
        ("bert-large", "bfloat16", [*sst2[:4], *imdb[:1]]),
        ("minilm", "bfloat16", wnut17[:4]),
        ("bert-base", "bfloat16", [*sst2[4:], *imdb, *wnut17[1:]]),
        ("bert-base", "float32", imdb[2:]),
        ("bert-large", "float32", wnut17[:2]),
    ]
    return [Scenario(model, dtype, *rest) for model, dtype, chosen in planned for rest in chosen]


def choices(model: str) -> dict[str, tuple[str, list[int] | None]]:
    """Name -> (where the kept layers lie, which they are; None for all), each set of layers once.

    At the largest size only as many as fit in memory beside the baselines.
    """
    layers = model_variants.layers_of(model)
    chosen: dict[str, tuple[str, list[int] | None]] = {"all": ("all", None)}
    for share in SHARES:
        count = round(layers * (1 - share))
        for place in ("low", "spread", "high"):
            kept = placed(layers, count, place)
            if kept not in [other for _, other in chosen.values()]:
                chosen[f"{share:.0%} {place}"] = (place, kept)
    if layers == 12:
        chosen["75% spread"] = ("spread", placed(12, 3, "spread"))
    if layers == 24:
        return {name: chosen[name] for name in ("all", "67% spread", "83% low")}
    return chosen


def placed(layers: int, count: int, place: str) -> list[int]:
    """`count` of `layers` layers: the lowest, evenly spread from the lowest on, or the highest."""
    if place == "spread":
        return [i * layers // count for i in range(count)]
    return list(range(count)) if place == "low" else list(range(layers - count, layers))


def done(path: Path) -> list[dict[str, Any]]:
    """The settings of the runs in a result file, without the environment."""
    lines = path.read_text().splitlines() if path.is_file() else []
    timed = [json.loads(line)["settings"] for line in lines]
    return [{k: v for k, v in settings.items() if k != "environment"} for settings in timed]


def line(
    settings: dict[str, Any],
    names: dict[str, tuple[str, list[int] | None]],
    comparisons: list[compare.Comparison],
) -> dict[str, Any]:
    """A run as plain data: the baselines once, then fastgate and its lower bound for each choice."""
    plain = [one.to_dict() for one in comparisons]
    first = plain[0]
    return {
        "settings": {**settings, "environment": environment()},
        **{key: first[key] for key in ("rows", "tokens", "filled", "absent")},
        "baselines": {
            name: {"form": form, **first["models"][name]} for name, form in first["baselines"].items()
        },
        "fastgate": [
            {
                "name": name,
                "place": place,
                **{key: one[key] for key in ("kept", "max_difference", "speedup", "lower_bound_share")},
                **one["models"]["fastgate"],
                "lower_bound": one["models"][compare.LOWER_BOUND],
            }
            for (name, (place, _)), one in zip(names.items(), plain, strict=True)
        ],
    }


def run_group(chosen: list[Scenario], data_dir: Path, out: Path, threads: int, deadline: float) -> bool:
    """Do these runs of one group, each line written when it is there; whether all outputs were equal."""
    torch.set_num_threads(threads)
    first, right = chosen[0], True
    task = load_task(first.task, data_dir, max_train_rows=1)
    reference, tokenizer = model_variants.dense(first.model, task, model_variants.DTYPES[first.dtype])
    names = choices(first.model)
    needed = {name for run in chosen for name in run.choices}
    models = {
        name: model_variants.pruned(reference, kept) for name, (_, kept) in names.items() if name in needed
    }
    rows: dict[str, Any] = {}
    built: dict[str, baselines.Baseline] = {}
    absent: dict[str, str] | None = None
    for run in chosen:
        if time.time() > deadline:
            break
        if run.task not in rows:
            task = load_task(run.task, data_dir, max_train_rows=1)
            rows[run.task] = evaluation_rows(task, tokenizer, MAX_LENGTH[run.task])
        settings = run.settings(threads)
        batches = choose_batches(
            rows[run.task], tokenizer, batch_size=run.batch_size, count=settings["batches"], order=run.order
        )
        if absent is None:
            built, absent = baselines.build_baselines(BASELINES, reference, batches[0])
            missing = "; ".join(f"{name} is not timed: {why}" for name, why in absent.items())
            print(f"{run.group}: {missing or 'every baseline runs'}", flush=True)
        release_memory()
        start = time.perf_counter()
        try:
            comparisons = compare.compare_all(
                {name: models[name] for name in run.choices},
                reference,
                batches,
                {name: baseline for name, baseline in built.items() if name in run.against},
                absent,
                progress=release_memory,
            )
        except FastgateError as error:
            print(f"{run}: {error}", file=sys.stderr, flush=True)
            right = False
            continue
        with out.open("a") as file:
            file.write(
                json.dumps(line(settings, {name: names[name] for name in run.choices}, comparisons)) + "\n"
            )
        best = min(comparisons[0].baselines, key=comparisons[0].speedup)
        timed = f"{comparisons[0].speedup(best):.2f}x {best}, {time.perf_counter() - start:.0f} s"
        print(f"{run.group}: {run.task}, {run.order} order, batches of {run.batch_size}: {timed}", flush=True)
    return right


def release_memory() -> None:
    """Hand freed memory to the system: exporting a large model frees gigabytes that glibc would keep."""
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data-dir", type=Path, required=True)
    p.add_argument("--out", type=Path, default=OUT)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--only", default="", help="runs whose line in --list has these words")
    p.add_argument("--minutes", type=float, default=1e6, help="start no run after so many")
    p.add_argument("--list", action="store_true", help="print the runs that are left, and do none")
    p.add_argument("--group", help=argparse.SUPPRESS)  # in a child: do the next runs of this one
    args = p.parse_args()
    if torch.cuda.is_available():
        p.error("device: got a GPU, wanted the CPU alone; set CUDA_VISIBLE_DEVICES to nothing")
    deadline, right = time.time() + 60 * args.minutes, True
    timed = done(args.out)
    left = [run for run in planned_runs() if run.settings(args.threads) not in timed]
    titles = {run: f"{run.group} {run.task} {run.order} {run.batch_size}" for run in left}
    left = [run for run in left if f" {args.only} " in f" {titles[run]} " or not args.only]
    if args.list:
        for run in left:
            print(titles[run])
        return 0
    turns = [(group, list(together)) for group, together in itertools.groupby(left, lambda run: run.group)]
    if args.group is not None:
        chosen = next(together for group, together in turns if group == args.group)
        return not run_group(chosen, args.data_dir, args.out, args.threads, deadline)
    for group, _ in turns:
        if time.time() < deadline:
            command = [sys.executable, __file__, "--group", group, "--data-dir", args.data_dir]
            command += ["--out", args.out, "--threads", args.threads, "--only", args.only]
            command += ["--minutes", (deadline - time.time()) / 60]
            right &= subprocess.run([str(part) for part in command]).returncode == 0
    return not right


if __name__ == "__main__":
    sys.exit(main())
