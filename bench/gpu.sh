#!/usr/bin/env bash
# Everything that needs a GPU, in two parts: the kernels (at most 5 minutes) and whole models (at most 4 minutes).
#
#     OUT=FOLDER [ONLY=kernels|models] bench/gpu.sh
#
# It needs a CUDA device, nvcc, and a Python ($PYTHON, python3 by default) that has torch, triton, transformers,
# pytest, pytest-benchmark, hypothesis and ninja; nothing is installed or fetched. pytest-xdist, where it is
# installed, spreads the tests over more cores. Each part is useful alone, and builds what it needs.
#
# The plan below gives each step a limit, and what a step leaves of it goes to the steps after it. A step that fails
# or reaches its limit does not stop the next one. All results are written as they come: FOLDER gets log.txt (a line
# begins with its step's name); failures.md, one table; of the ops whose tests pass kernels.jsonl, kernels.md (times,
# then aims) and roofline.png; of models models.jsonl, models.md (bench/models/gpu_models.py) and traces.tar. The exit
# status is 1 if a step failed.
#
# FASTGATE_GPU_DRY_RUN=1 shows on any machine that the steps run: it does not build, runs the first test of each op
# through Triton's interpreter, times tiny sizes, and has longer limits.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
only=${ONLY:-kernels models}
dry=${FASTGATE_GPU_DRY_RUN:-}
slow=${dry:+6} slow=${slow:-1} # a CPU that others use as well: six times the limits in a dry run
ops=(gated_add_norm attention linear_gelu embed_norm absorbed_attention shift_norm)

# part, step, seconds. The kernels' add up to 300, the models' to 240.
plan() {
  cat <<'TABLE'
kernels  environment  20   versions, the device
kernels  build        75   the compiled kernels, on all cores
kernels  tests        90   every op and dtype, all ops at once; beside them small_calls, which fills Triton's cache
kernels  sanitizer    50   memcheck and racecheck of small cases, at once
kernels  timings      55   of the ops whose tests pass, by priority; and all the time that is left
kernels  tables       10   kernels.md, roofline.png
models   environment  15
models   build        60   nothing to do after the kernels' part
models   graphs       40   CUDA graphs of small batches, synchronisations
models   models       120  beside Hugging Face's, by priority
models   traces       5    one archive
TABLE
}

if [[ -z $dry ]] && ! "$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
  echo "gpu.sh: device: got none, wanted a CUDA device that torch sees; run pytest for what needs none" >&2
  exit 2
fi

out=$(realpath "${OUT:-bench/results}")
mkdir -p "$out"
work=$(mktemp -d -t fastgate-gpu.XXXXXX)
trap 'rm -rf "$work"' EXIT
export PYTHONPATH="$PWD" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
log=$out/log.txt failures=$out/failures.md part_start=0 # the first part's time begins with the script's
failed=()
: >"$log"
printf '| step | exit status | first failures |\n| --- | ---: | --- |\n' >"$failures"

# limit PART STEP: the step's own seconds, or what is left of the part's time up to its end, if that is less.
# Only the timings and the models have a use for all the time that the steps before them have left.
limit() {
  local own sum left
  read -r own sum < <(plan | awk -v part="$1" -v step="$2" '$1 == part {sum += $3; if ($2 == step) print $3, sum}')
  left=$((sum * slow - (SECONDS - part_start)))
  own=$((own * slow))
  if [[ $2 == timings || $2 == models ]] || ((left < own)); then own=$left; fi
  echo "$own"
}

# logged NAME SECONDS COMMAND...: runs it, each line of its output in the log behind its name; its exit status.
# Python is interrupted at the limit, so that pytest still says what failed.
logged() {
  local name=$1 seconds=$2
  shift 2
  ((seconds >= 1)) || { echo "$name: not run, the part's time is over" >>"$log"; return 124; }
  timeout -s INT -k 10 "$seconds" env --default-signal=INT "$@" 2>&1 | sed -u "s/^/$name: /" >>"$log"
  return "${PIPESTATUS[0]}"
}

# ended NAME STATUS START: says how a step ended, and puts a failure into the table.
ended() {
  local name=$1 status=$2 took=$((SECONDS - $3)) last first
  last=$(grep -a "^$name: " "$log" | sed "s/^$name: //" | grep -v '^ *$' | tail -n 1 | cut -c1-160)
  if ((status == 0)); then
    echo "$name: passed in $took s: $last"
    return 0
  fi
  ((status == 124 || status == 137)) && last="reached its limit after $took s: $last"
  first=$(grep -aE "^$name: (FAILED|ERROR) " "$log" | head -n 3 | cut -d' ' -f3 | paste -sd' ')
  first=${first:-$last}
  echo "| $name | $status | ${first//|/ } |" >>"$failures"
  echo "$name: FAILED with status $status after $took s: $first"
  failed+=("$name")
  return 1
}

# step PART NAME COMMAND...: one command of the plan.
step() {
  local part=$1 name=$2 start=$SECONDS seconds status
  shift 2
  seconds=$(limit "$part" "$name")
  logged "$name" "$seconds" "$@"
  status=$?
  ended "$name" "$status" "$start"
}

# together SECONDS NAME...: the commands in the files $work/NAME at once, then how each ended.
together() {
  local seconds=$1 name start=$SECONDS
  shift
  declare -A jobs=()
  for name in "$@"; do
    logged "$name" "$seconds" bash "$work/$name" &
    jobs[$name]=$!
  done
  for name in "$@"; do
    wait "${jobs[$name]}"
    ended "$name" $? "$start"
  done
}

# command_file NAME COMMAND...: writes the command for `together`.
command_file() {
  local name=$1
  shift
  printf 'exec '  >"$work/$name"
  printf '%q ' "$@" >>"$work/$name"
}

prepare() {
  local show='command -v nvidia-smi >/dev/null && nvidia-smi; "$0" -m fastgate.env'
  step "$1" environment bash -c "$show" "$python"
  if [[ -n $dry ]]; then
    echo "build: not run, a dry run"
  else
    step "$1" build env FASTGATE_BUILD=cuda "$python" setup.py build_ext --inplace
  fi
}

# The tests of all ops at once. Sets `passed`, the ops whose tests pass.
test_ops() {
  local op names=() files workers=()
  "$python" -c 'import xdist' 2>/dev/null && workers=(-n "$((($(nproc) + 5) / 6))")
  for op in "${ops[@]}"; do
    files=("tests/ops/test_triton_$op.py")
    [[ $op == gated_add_norm ]] && files+=(tests/ops/test_cuda_build.py)
    command_file "test_$op" "$python" -m pytest -q -m gpu "${workers[@]}" -p no:cacheprovider "${files[@]}"
    names+=("test_$op")
  done
  command_file small_calls "$python" bench/kernels/small_calls.py
  together "$(limit kernels tests)" "${names[@]}" small_calls
  passed=()
  for op in "${ops[@]}"; do [[ " ${failed[*]} " == *" test_$op "* ]] || passed+=("$op"); done
}

# In a dry run: the first test of each op, in Triton's interpreter.
test_ops_in_the_interpreter() {
  local first
  passed=("${ops[@]}")
  TRITON_INTERPRET=1 "$python" -m pytest -q --collect-only tests/ops/test_triton_*.py 2>>"$log" | grep :: >"$work/ids"
  mapfile -t first < <(awk -F:: '!seen[$1]++' "$work/ids")
  step kernels tests env TRITON_INTERPRET=1 "$python" -m pytest -q -p no:cacheprovider "${first[@]}"
  command_file small_calls "$python" bench/kernels/small_calls.py
  together "$(limit kernels tests)" small_calls
}

# Small cases under compute-sanitizer, without torch's allocator, whose large blocks hide what is out of bounds.
sanitize() {
  if ! command -v compute-sanitizer >/dev/null; then
    echo "memcheck, racecheck: not run, compute-sanitizer is not installed"
    return
  fi
  local tool
  for tool in memcheck racecheck; do
    command_file "$tool" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 \
      "$python" bench/kernels/small_calls.py
  done
  together "$(limit kernels sanitizer)" memcheck racecheck
}

kernel_tables() {
  "$python" bench/kernels/roofline.py "$out/kernels.jsonl" "$out/roofline.png"
  local part
  for part in table aims; do "$python" bench/kernels/kernel_table.py $part "$out/kernels.jsonl"; echo; done |
    tee "$out/kernels.md"
}

kernels() {
  local seconds options op files=()
  prepare kernels
  if [[ -n $dry ]]; then test_ops_in_the_interpreter; else test_ops; fi
  sanitize
  for op in "${passed[@]}"; do files+=("bench/kernels/bench_$op.py"); done
  if ((${#files[@]})); then
    seconds=$(limit kernels timings)
    options=(--lines "$out/kernels.jsonl" --seconds $((seconds > 15 ? seconds - 10 : 5)))
    [[ -z $dry ]] || options+=(--quick)
    step kernels timings "$python" -m pytest -q -p no:cacheprovider "${options[@]}" "${files[@]}"
  fi
  [[ -s $out/kernels.jsonl ]] && kernel_tables
}

models() {
  local seconds options
  prepare models
  step models graphs "$python" -m pytest -q -m gpu -p no:cacheprovider tests/runtime/test_cuda_graphs_on_gpu.py \
    tests/runtime/test_syncs.py
  seconds=$(limit models models)
  options=(--out "$out" --traces "$work/traces" --seconds $((seconds > 30 ? seconds - 25 : 5)))
  [[ -z $dry ]] || options+=(--quick)
  step models models "$python" bench/models/gpu_models.py "${options[@]}"
  [[ -s $out/models.md ]] && cat "$out/models.md"
  [[ -d $work/traces ]] && step models traces tar -cf "$out/traces.tar" -C "$work" traces
}

passed=()
[[ $only == *kernels* ]] && kernels
[[ $only == *kernels* ]] && part_start=$SECONDS
[[ $only == *models* ]] && models
((${#failed[@]})) && cat "$failures"
echo "${#failed[@]} steps failed: ${failed[*]:-none}; $SECONDS s in all"
((${#failed[@]} == 0))
