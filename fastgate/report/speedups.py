"""Speed-ups over SDPA of the layers a sweep kept: measured once on each processor, stored in a file."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from fastgate.env import environment
from fastgate.errors import DataError, format_error
from fastgate.nn.choices import Pooling
from fastgate.training.disk import write_json
from fastgate.training.sweep_results import Line

Speedups = dict[str, dict[str, float]]  # processor -> `speedup_key` -> speed-up over SDPA
FLOAT32, BFLOAT16 = "float32", "bfloat16"
BATCH, BATCHES = 32, 4  # rows in a batch, and batches, that a speed-up is measured on


def pooling_of(line: Line) -> Pooling:
    """What the pooler of a line's models reads."""
    return "mean" if line["settings"].get("pooling") == "mean" else "first"


def speedup_key(line: Line, dtype: str = FLOAT32) -> str:
    """What a model's speed depends on. The replacements `mean` and `affine` cost next to nothing."""
    key = [line["model"], line["task"], sorted(line["kept"]), line["settings"]["max_length"]]
    key += ["shift"] if line["replacement"] == "shift" else []
    key += [dtype] if dtype != FLOAT32 else []
    return json.dumps(key if pooling_of(line) == "first" else [*key, pooling_of(line)])


def mean_speedup(lines: Sequence[Line], known: dict[str, float], dtype: str = FLOAT32) -> float | None:
    """The mean of the lines' speed-ups on one processor; None where one is not known."""
    timed = [known[key] for key in (speedup_key(line, dtype) for line in lines) if key in known]
    return statistics.mean(timed) if timed and len(timed) == len(lines) else None


def this_processor() -> str:
    """The processor and the number of threads, as results name them."""
    facts = environment()
    return f"{facts['processor']}, {facts['threads']} threads"


def read_speedups(path: Path) -> Speedups:
    """The speed-ups in the file; none if there is no file. Raises DataError for a damaged one."""
    if not path.is_file():
        return {}
    try:
        return {name: dict(known) for name, known in json.loads(path.read_text(encoding="utf-8")).items()}
    except (ValueError, TypeError, AttributeError) as error:
        got, wanted = f"{path} ({str(error)[:80]})", "speed-ups that `fastgate report --measure` wrote"
        raise DataError(
            format_error("report", "speed-ups", got, wanted, "mend the file, or move it away")
        ) from error


def measure_speedups(
    lines: Sequence[Line], path: Path, data_dir: Path | None, console: Console, dtype: str = FLOAT32
) -> Speedups:
    """Speed-ups over SDPA of each choice of layers, measured as `fastgate bench` does, both sides in `dtype`.

    They are stored in `path`, beside those of other processors. What was measured on this one before is not
    measured again.
    """
    from fastgate.benchmark.batches import real_batches
    from fastgate.benchmark.compare import compare, dtype_of
    from fastgate.benchmark.model_variants import load_models
    from fastgate.data.load import load_task

    speedups, precision = read_speedups(path), dtype_of("report", dtype)
    known = speedups.setdefault(this_processor(), {})
    for line in lines:
        key = speedup_key(line, dtype)
        if key in known or line["method"] == "dense":
            continue
        task = load_task(line["task"], data_dir, max_train_rows=1)
        source = line["settings"]["model"]
        ours, reference, tokenizer = load_models(
            source, task, line["kept"], precision, pooling_of(line), line["replacement"]
        )
        batches = real_batches(
            task, tokenizer, max_length=line["settings"]["max_length"], batch_size=BATCH, count=BATCHES,
            order="data",
        )  # fmt: skip
        known[key] = compare(ours, reference, batches, against=["sdpa"]).speedup("sdpa")
        console.print(f"{line['task']} kept {line['kept']}: {known[key]:.2f}x", highlight=False)
        write_json(path, speedups)
    return speedups
