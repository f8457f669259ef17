#!/usr/bin/env bash
# Everything that wants a GPU: builds, tests, sanitizes, times the kernels, then whole models. A call takes ten
# minutes at most; ONLY=kernels and ONLY=models make two calls of it.
#
#     OUT=FOLDER [ONLY=kernels|models] bench/gpu.sh
#
# It needs a CUDA device, nvcc, and a Python ($PYTHON, python3 by default) that has torch, triton, transformers,
# pytest, pytest-benchmark, pytest-xdist, hypothesis and ninja; nothing is installed or fetched. In FOLDER it
# leaves the log of each step and, of the ops whose tests pass, kernels.jsonl, kernels.md (times, then aims) and
# roofline.png; of models models.jsonl, models.md and profiler traces (bench/models/gpu_models.py). The exit status is 1
# if a test, a check or a timing failed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
out=$(realpath "${OUT:-bench/results}")
only=${ONLY:-kernels models}
limit=580
export PYTHONPATH="$PWD" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
red=()

if ! "$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
  echo "gpu.sh: device: got none, wanted a CUDA device that torch sees; run pytest for what needs none" >&2
  exit 2
fi

# step NAME SECONDS COMMAND...: run it for at most so long, its output in FOLDER/NAME.log, and say how it ended.
step() {
  local name=$1 most=$2 start=$SECONDS left=$((limit - SECONDS))
  shift 2
  if ((left < 10)); then
    echo "$name: not run, the time is up"
    red+=("$name")
    return 1
  fi
  if timeout $((most < left ? most : left)) "$@" >"$out/$name.log" 2>&1; then
    echo "$name: passed in $((SECONDS - start)) s: $(tail -n 1 "$out/$name.log")"
  else
    echo "$name: FAILED after $((SECONDS - start)) s:"
    tail -n 25 "$out/$name.log"
    red+=("$name")
    return 1
  fi
}

step environment 60 bash -c "nvidia-smi; '$python' -m fastgate.env"
step build 200 env FASTGATE_BUILD=cuda "$python" setup.py build_ext --inplace

kernels() {
  # An op's kernels are timed only if its tests pass.
  timings=()
  for op in gated_add_norm attention linear_gelu embed_norm absorbed_attention shift_norm; do
    files=("tests/test_triton_$op.py")
    [[ $op == gated_add_norm ]] && files+=(tests/ops/test_cuda_build.py)
    step "test_$op" 150 "$python" -m pytest -q -m gpu -n 8 -p no:cacheprovider "${files[@]}" &&
      timings+=("bench/kernels/bench_$op.py")
  done

  # Small cases under compute-sanitizer, without torch's allocator, whose large blocks hide what is out of bounds.
  if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
      step "$tool" 100 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 \
        "$python" bench/kernels/small_calls.py
    done
  else
    echo "compute-sanitizer: not installed, memcheck and racecheck not run"
  fi

  if ((${#timings[@]})); then
    step timings 400 "$python" -m pytest -q -p no:cacheprovider --benchmark-json="$out/kernels.json" "${timings[@]}"
  fi
  if [[ -s $out/kernels.json ]]; then
    "$python" bench/kernels/kernel_table.py lines "$out/kernels.json" >"$out/kernels.jsonl"
    rm "$out/kernels.json"
    "$python" bench/kernels/roofline.py "$out/kernels.jsonl" "$out/roofline.png"
    for part in table aims; do "$python" bench/kernels/kernel_table.py $part "$out/kernels.jsonl"; echo; done |
      tee "$out/kernels.md"
  fi
}

# The graphs of small batches first, then whole models beside Hugging Face's.
models() {
  step test_models 200 "$python" -m pytest -q -m gpu -n 8 -p no:cacheprovider tests/runtime/test_cuda_graphs_on_gpu.py \
    tests/runtime/test_syncs.py
  step models 400 "$python" bench/models/gpu_models.py --out "$out" && cat "$out/models.md"
}

[[ $only == *kernels* ]] && kernels
[[ $only == *models* ]] && models
echo "${#red[@]} steps failed: ${red[*]:-none}; $SECONDS s in all"
((${#red[@]} == 0))
