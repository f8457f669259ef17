#!/usr/bin/env bash
# Scores of tasks on a machine that reaches no hub: what bench/carry_tasks.py packed into CARRIED is fine-tuned,
# self-pruned and scored, one JSON line a run in FOLDER/tasks.jsonl (`fastgate finetune`'s result.json).
#
#     OUT=FOLDER bench/gpu_tasks.sh CARRIED [TASK ...]
#
# SPARSITIES ("0.67 0.83") and OPTIONS ("--epochs 2 --prune-epochs 2 --lr 1e-4") may be set. A run whose line is
# there already is left out, so a call that was cut off goes on where it was. Needs a Python ($PYTHON, python3 by
# default) with fastgate's dependencies; it runs on the GPU if torch sees one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
carried=$(realpath "${1:?gpu_tasks.sh: CARRIED: got nothing, wanted the folder that bench/carry_tasks.py packed}")
out=$(realpath "${OUT:-bench/results}")
shift
read -ra options <<<"${OPTIONS:---epochs 2 --prune-epochs 2 --lr 1e-4}"
export PYTHONPATH="${PYTHONPATH:-$PWD}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

tasks=("$@")
((${#tasks[@]})) || mapfile -t tasks < <(ls "$carried/data")
for task in "${tasks[@]}"; do
  for sparsity in ${SPARSITIES:-0.67 0.83}; do
    if "$python" bench/task_lines.py done "$out/tasks.jsonl" "$task" "$sparsity"; then
      echo "$task $sparsity: done before"
      continue
    fi
    "$python" -m fastgate.cli finetune --model "$carried/model" --task "$task" --data-dir "$carried/data" \
      --target-sparsity "$sparsity" --out "$work/$task-$sparsity" "${options[@]}"
    "$python" bench/task_lines.py add "$out/tasks.jsonl" "$work/$task-$sparsity/result.json"
    rm -r "$work/$task-$sparsity"
  done
done
