"""Packs what bench/gpu_tasks.sh needs into one folder of some 50 MB: task rows, and a model in bfloat16.

    python bench/sweeps/carry_tasks.py DATA_DIR FOLDER [--model M] [--rows N]

For a machine without access to a hub. FOLDER gets data/TASK/SPLIT.jsonl.gz, at most N rows of each split,
drawn with seed 0, and model/. Training reads the weights back into float32; bfloat16 costs them their last
bits.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
from pathlib import Path

import torch
from transformers import AutoModel

from fastgate.data.catalog import CATALOG
from fastgate.training import load_tokenizer
from fastgate.training.model import demo_model_path


def trim(source: Path, target: Path, rows: int) -> int:
    """Copies at most `rows` lines, in their order; returns how many."""
    with gzip.open(source, "rt", encoding="utf-8") as file:
        lines = [line for line in file if line.strip()]
    if len(lines) > rows:
        chosen = sorted(random.Random(0).sample(range(len(lines)), rows))
        lines = [lines[i] for i in chosen]
    target.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(target, "wt", encoding="utf-8") as file:
        file.writelines(lines)
    return len(lines)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("data_dir", type=Path)
    p.add_argument("folder", type=Path)
    p.add_argument("--model", default=None, help="default: the demo extra's MiniLM")
    p.add_argument(
        "--rows", type=int, default=None, help="of a split; default: 20,000, IMDB's long ones 5,000"
    )
    args = p.parse_args()
    counts: dict[str, dict[str, int]] = {}
    for task in CATALOG:
        most = args.rows or (5_000 if task == "imdb" else 20_000)
        for source in sorted((args.data_dir / task).glob("*.jsonl.gz")):
            kept = trim(source, args.folder / "data" / task / source.name, most)
            counts.setdefault(task, {})[source.name.partition(".")[0]] = kept
    name = args.model or demo_model_path()
    AutoModel.from_pretrained(name, dtype=torch.bfloat16).save_pretrained(args.folder / "model")
    load_tokenizer(name).save_pretrained(args.folder / "model")
    size = sum(path.stat().st_size for path in args.folder.rglob("*") if path.is_file())
    print(json.dumps({"rows": counts, "megabytes": round(size / 1e6, 1)}))


if __name__ == "__main__":
    main()
