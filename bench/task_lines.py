"""Results of `fastgate finetune` as JSON lines, a line a run.

python bench/task_lines.py done LINES TASK SPARSITY     exit status 0 if such a run's line is there
python bench/task_lines.py add LINES RESULT             appends RESULT, a result.json, without its paths
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def is_done(lines: Path, task: str, sparsity: float) -> bool:
    if not lines.exists():
        return False
    runs = (json.loads(line)["settings"] for line in lines.read_text().splitlines())
    return any(run["task"] == task and run["sparsity"] == sparsity for run in runs)


def add(lines: Path, result: Path) -> None:
    found = json.loads(result.read_text())
    settings = found["settings"]
    settings["model"] = Path(settings["model"]).name
    settings["data"].pop("data_dir", None)
    with lines.open("a") as file:
        file.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    verb, path, *rest = sys.argv[1:]
    if verb == "done":
        sys.exit(not is_done(Path(path), rest[0], float(rest[1])))
    add(Path(path), Path(rest[0]))
