"""How many times as fast as SDPA a sweep's choices run: measured once on each processor, kept in a file."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from fastgate.env import environment
from fastgate.errors import DataError, format_error
from fastgate.training.sweep_results import Line

Speeds = dict[str, dict[str, float]]  # of each processor, by `speed_key`
FLOAT32, BFLOAT16 = "float32", "bfloat16"
BATCH, BATCHES = 32, 4  # rows in a batch, and batches, that a speed-up is measured on


def pooling_of(line: Line) -> str:
    return str(line["settings"].get("pooling", "first"))


def speed_key(line: Line, dtype: str = FLOAT32) -> str:
    """What a model's speed depends on. Vectors on single rows (`mean`, `affine`) cost next to nothing."""
    key = [line["model"], line["task"], sorted(line["kept"]), line["settings"]["max_length"]]
    key += ["shift"] if line["replacement"] == "shift" else []
    key += [dtype] if dtype != FLOAT32 else []
    return json.dumps(key if pooling_of(line) == "first" else [*key, pooling_of(line)])


def mean_speed(lines: Sequence[Line], known: dict[str, float], dtype: str = FLOAT32) -> float | None:
    """The mean of the lines' speed-ups on one processor; None where one is not known."""
    timed = [known.get(speed_key(line, dtype)) for line in lines]
    return None if None in timed or not timed else statistics.mean(timed)  # type: ignore[type-var]


def this_processor() -> str:
    """The processor and the number of threads, as results name them."""
    here = environment()
    return f"{here['processor']}, {here['threads']} threads"


def read_speeds(path: Path) -> Speeds:
    """Those in the file, none without one. Raises DataError for a damaged file."""
    if not path.is_file():
        return {}
    try:
        return {name: dict(known) for name, known in json.loads(path.read_text(encoding="utf-8")).items()}
    except (ValueError, TypeError, AttributeError) as error:
        got, wanted = f"{path} ({str(error)[:80]})", "speeds that `fastgate report --measure` wrote"
        raise DataError(
            format_error("report", "speeds", got, wanted, "mend the file, or move it away")
        ) from error


def measured(
    lines: Sequence[Line], path: Path, data_dir: Path | None, console: Console, dtype: str = FLOAT32
) -> Speeds:
    """Speed-ups over SDPA of each choice of layers, both in `dtype`, by `fastgate bench`, kept in `path` with
    those of other processors; what was measured on this one is not measured again."""
    from fastgate.benchmark.batches import real_batches
    from fastgate.benchmark.compare import compare, dtype_of
    from fastgate.benchmark.model_variants import contenders
    from fastgate.data.load import load_task

    speeds, precision = read_speeds(path), dtype_of("report", dtype)
    known = speeds.setdefault(this_processor(), {})
    for line in lines:
        key = speed_key(line, dtype)
        if key in known or line["method"] == "dense":
            continue
        task = load_task(line["task"], data_dir, max_train_rows=1)
        source = line["settings"]["model"]
        ours, reference, tokenizer = contenders(
            source, task, line["kept"], precision, pooling_of(line), line["replacement"]
        )
        batches = real_batches(
            task, tokenizer, max_length=line["settings"]["max_length"], batch_size=BATCH, count=BATCHES,
            order="data",
        )  # fmt: skip
        known[key] = compare(ours, reference, batches, against=["sdpa"]).ratio("sdpa")
        console.print(f"{line['task']} kept {line['kept']}: {known[key]:.2f}x", highlight=False)
        aside = path.with_name(f".{path.name}.writing")
        aside.write_text(json.dumps(speeds, indent=1) + "\n", encoding="utf-8")
        aside.replace(path)
    return speeds
