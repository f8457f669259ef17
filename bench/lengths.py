"""Real length distributions for the kernel timings: token counts of SST-2 and IMDB rows, in the data's order.

    python bench/lengths.py DATA_DIR > bench/lengths.json

counts the tokens of the first 1024 SST-2 and the first 128 IMDB evaluation rows, by the demo model's
tokenizer, cut at 512; `mix(name)` reads them from the committed file.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

TABLE = Path(__file__).parent / "lengths.json"
ROWS = {"sst2": 1024, "imdb": 128}
MAX_LENGTH = 512


def mix(name: str) -> tuple[int, ...]:
    return tuple(json.loads(TABLE.read_text())[name])


def count(data_dir: str) -> dict[str, list[int]]:
    from fastgate.data import load_task
    from fastgate.training import load_tokenizer
    from fastgate.training.model import demo_model_path

    tokenizer = load_tokenizer(demo_model_path())
    found = {}
    for name, rows in ROWS.items():
        texts = load_task(name, Path(data_dir)).evaluation["text"]
        chosen = [texts[i] for i in range(min(rows, len(texts)))]
        ids = tokenizer(chosen, truncation=True, max_length=MAX_LENGTH)["input_ids"]
        found[name] = [len(row) for row in ids]
    return found


if __name__ == "__main__":
    tables = [f"{json.dumps(name)}: {json.dumps(lengths)}" for name, lengths in count(sys.argv[1]).items()]
    print("{\n" + ",\n".join(tables) + "\n}")
