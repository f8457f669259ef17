#!/usr/bin/env bash
# The speed figures of the README: BERT-base sizes on real SST-2 batches of 32, against Hugging Face's SDPA on the
# same batches in the same run, one JSON line a run. Wants an otherwise idle machine.
#
#     bench/speed.sh DATA_DIR > bench/results/speed_cpu.jsonl
#     python bench/speed_table.py bench/results/speed_cpu.jsonl
set -euo pipefail
data=$1
run() { fastgate bench --model bert-base --task sst2 --data-dir "$data" --against sdpa --threads 2 --json "$@"; }
run
run --keep 0,4,8
run --keep 0,1
run --order length
