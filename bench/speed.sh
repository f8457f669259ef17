#!/usr/bin/env bash
# The speed figures of the README: BERT-base sizes on real SST-2 batches of 32, against Hugging Face, one JSON line a run.
#
#     bench/speed.sh DATA_DIR > bench/results/speed_cpu.jsonl
set -euo pipefail
run() { fastgate bench --model bert-base --task sst2 --data-dir "$data" --threads 2 --json "$@"; }
data=$1
run
run --keep 0,4,8
run --keep 0,1
run --order length
