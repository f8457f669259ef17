#!/usr/bin/env bash
# The C++ kernels under sanitizers: tests/sanitize.sh [address] [thread]; both without an argument.
#
#   address  AddressSanitizer and UndefinedBehaviorSanitizer, on tests of every op, forward and backward.
#   thread   ThreadSanitizer, on gemms, attention and frozen models in several threads.
#
# A copy of the package is built with each and tested, and nothing here is changed. Kernels are compiled for
# several levels of x86-64 and run at the one that this machine takes; fp32_gemm.cpp, whose tiles differ between
# levels, is run at each that it has, by gemm_driver.cpp. torch itself is not instrumented. Its thread pool
# would hide from ThreadSanitizer what one thread waits for, so sanitize_threads.cpp stands for it there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

work=$(mktemp -d -t fastgate-sanitize.XXXXXX)
trap 'rm -rf "$work"' EXIT
CXX=${CXX:-g++}
PYTHON=${PYTHON:-python}
export OMP_NUM_THREADS=2 TOKENIZERS_PARALLELISM=false PYTHONDONTWRITEBYTECODE=1
export ASAN_OPTIONS=detect_leaks=0:halt_on_error=1:allocator_may_return_null=1
export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
export TSAN_OPTIONS=halt_on_error=1:report_signal_unsafe=0:ignore_noninstrumented_modules=1

library() { "$CXX" -print-file-name="$1"; }

copy() { # a copy of what is built and tested, for one kind of sanitizer
  mkdir "$work/$1"
  cp -r csrc kernels tests setup.py pyproject.toml README.md LICENSE "$work/$1"
  cp -rL fastgate "$work/$1"
  rm -f "$work/$1"/fastgate/*.so
}

build() { # kind, flags, libraries
  (cd "$work/$1" && FASTGATE_BUILD=cpu CXX=$CXX CXXFLAGS="-O1 -g1 $2" LDFLAGS="$2 $3" \
    "$PYTHON" setup.py -q build_ext --inplace) >"$work/$1.log" 2>&1 || { tail -50 "$work/$1.log"; exit 1; }
}

run_tests() { # kind, libraries to load first, arguments of pytest
  local folder=$work/$1 first=$2
  shift 2
  (cd "$folder" && PYTHONPATH=$folder LD_PRELOAD=$first "$PYTHON" -m pytest -q -x -p no:cacheprovider \
    --capture=sys \
    --basetemp "$folder/tmp" "$@")
}

# Without the widest rows of precision tests, which test_any_shape of embed_norm draws too: unoptimised code adds a
# row in another order.
address() {
  local flags="-fsanitize=address,undefined -fno-sanitize-recover=undefined"
  copy address
  # shellcheck disable=SC2086
  "$CXX" -std=c++17 -O1 -g1 -fopenmp-simd $flags -I csrc tests/ops/gemm_driver.cpp -o "$work/gemm_driver"
  "$work/gemm_driver"
  build address "$flags" ""
  run_tests address "$(library libasan.so) $(library libubsan.so) $(library libstdc++.so)" \
    tests/ops/test_compiled_checks.py tests/ops/test_fused_layers.py tests/ops/test_gated_add_norm.py \
    tests/ops/test_attention.py tests/ops/test_absorbed_attention.py tests/ops/test_embed_norm.py tests/ops/test_shift_norm.py \
    tests/ops/test_linear.py -k "not compil and not 8192 and not (any_shape and test_embed_norm) or compiled_checks"
}

thread() {
  copy thread
  cp tests/helpers/sanitize_threads.cpp "$work/thread/csrc/cpu/"
  build thread "-fsanitize=thread" ""
  run_tests thread "$(library libtsan.so) $(library libstdc++.so)" tests/runtime/test_threads.py
}

for kind in "${@:-address thread}"; do
  for one in $kind; do
    printf '\n== %s sanitizer\n' "$one"
    "$one"
  done
done
