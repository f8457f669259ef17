#!/usr/bin/env bash
# Scores of tasks on a machine without access to a hub: a sweep of what bench/sweeps/carry_tasks.py packed into CARRIED.
#
#     OUT=FOLDER bench/gpu_tasks.sh CARRIED [RECIPE]
#
# Leaves a JSON line a run in FOLDER/tasks.jsonl and `fastgate report`'s tables and plots in FOLDER/report. RECIPE is
# bench/sweeps/tasks_gpu.yaml if none is named. A run whose line is there already is left out, so a call that was cut off
# goes on where it was. Needs a Python ($PYTHON, python3 by default) with fastgate's dependencies; it runs on the GPU
# if torch sees one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
carried=$(realpath "${1:?gpu_tasks.sh: CARRIED: got nothing, wanted the folder that bench/sweeps/carry_tasks.py packed}")
recipe=$(realpath "${2:-bench/sweeps/tasks_gpu.yaml}")
out=$(realpath "${OUT:-bench/results}")
export PYTHONPATH="${PYTHONPATH:-$PWD}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$python" -m fastgate.cli.main sweep "$recipe" --model "$carried/model" --data-dir "$carried/data" \
  --out "$out/tasks.jsonl" --work "$work"
"$python" -m fastgate.cli.main report "$out/tasks.jsonl" --out "$out/report"
