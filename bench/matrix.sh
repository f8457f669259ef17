#!/usr/bin/env bash
# The quick test suite with the oldest and newest supported transformers and torch.
#
#     bench/matrix.sh [TORCH/TRANSFORMERS ...]
#
# A combination is a pair of versions, such as 2.13.0/5.23.0; without arguments the list below runs. Each one gets a
# fresh virtual environment in a temporary folder, which is deleted after its tests, so one torch lies on the disk at a
# time. fastgate is imported from this checkout, which must be built: one compiled library serves every torch from 2.11.
# The table goes to bench/results/matrix.md (another file: OUT=FILE). A row there is replaced when its combination runs
# again. The version bounds in pyproject.toml are what this table proves.
#
# TESTS: arguments of pytest (default: -m "not slow").  PYTHON: the interpreter (3.11 or newer).
# INSTALL_LIMIT, TEST_LIMIT: seconds for one installation (900) and one test run (1800).
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
combinations=("$@")
((${#combinations[@]})) || combinations=(2.11.0/5.23.0 2.11.0/5.24.0 2.13.0/5.23.0 2.13.0/5.24.0)
declare -a tests=(-m "not slow")
if [[ -n ${TESTS:-} ]]; then read -ra tests <<<"$TESTS"; fi
out=${OUT:-bench/results/matrix.md}
work=$(mktemp -d -t fastgate-matrix.XXXXXX)
trap 'rm -rf "$work"' EXIT
failed=0

# What fastgate and its tests need, without torch and transformers, whose versions the combination sets.
needs() {
  "$1" - <<'PY'
import tomllib

project = tomllib.load(open("pyproject.toml", "rb"))["project"]


def needs(packages):
    for package in packages:
        if package.startswith("fastgate["):  # an extra that includes another
            needs(project["optional-dependencies"][package[len("fastgate["):-1]])
        elif not package.startswith(("torch>", "transformers>")):
            print(package)


needs(project["dependencies"] + project["optional-dependencies"]["test"])
PY
}

# The pins of constraints.txt, without those that follow the versions of torch and transformers.
pins() {
  grep -viE '^(torch|triton|setuptools|transformers|tokenizers|huggingface_hub|accelerate|datasets|peft|sentence-transformers)==' \
    constraints.txt
}

one() {
  local torch=$1 transformers=$2 venv=$work/venv log=$work/log status outcome note=""
  rm -rf "$venv"
  "${PYTHON:-python3}" -m venv "$venv" || return 1
  needs "$venv/bin/python" >"$work/needs"
  pins >"$work/pins"
  timeout "${INSTALL_LIMIT:-900}" "$venv/bin/python" -m pip install -q -c "$work/pins" \
    "torch==$torch" "transformers==$transformers" pytest-timeout -r "$work/needs" >"$log" 2>&1
  status=$?
  if ((status)); then
    outcome="not installed (status $status)"
    note=$(grep -m1 -iE 'error|conflict' "$log" || tail -n 1 "$log")
  else
    PYTHONPATH=$PWD PATH=$venv/bin:$PATH timeout "${TEST_LIMIT:-1800}" "$venv/bin/python" -m pytest -q \
      -p no:cacheprovider "${tests[@]}" >"$log" 2>&1
    status=$?
    outcome=$(grep -E '^(=+ )?[0-9]+ (passed|failed|skipped|error)|no tests ran' "$log" | tail -n 1 | tr -d '=')
    ((status == 124)) && outcome="stopped after ${TEST_LIMIT:-1800} s"
    note=$(grep -E '^(FAILED|ERROR) ' "$log" | cut -d' ' -f2 | head -n 5 | paste -sd' ')
    grep -E '^(FAILED|ERROR) ' "$log"
  fi
  ((status)) && failed=1 && cp "$log" "${KEEP_LOGS:-$work}/matrix-$torch-$transformers.log" 2>/dev/null
  local versions
  versions=$("$venv/bin/python" -c '
import importlib.metadata as m
for name in ("torch", "transformers", "accelerate", "sentence-transformers"):
    try: print(m.version(name), end=" | ")
    except m.PackageNotFoundError: print("", end=" | ")
import platform; print(platform.python_version(), end=" |")' 2>/dev/null)
  row "| $torch/$transformers | $versions ${outcome:-status $status} | ${note//|/ } |"
  rm -rf "$venv"
}

# Puts the row into the table, in place of an older one of the same combination.
row() {
  local head='| combination | torch | transformers | accelerate | sentence-transformers | Python | tests | first failures |'
  {
    printf '# Versions the quick tests were run with\n\nWritten by bench/matrix.sh.\n\n'
    printf '%s\n| --- | --- | --- | --- | --- | --- | --- | --- |\n' "$head"
    { grep -E '^\| [0-9]' "$out" 2>/dev/null | grep -vF "| ${1:2:$(expr index "${1:2}" ' ')}|"; echo "$1"; } | sort -V
  } >"$work/table"
  mkdir -p "$(dirname "$out")"
  cp "$work/table" "$out"
  echo "$1"
}

for combination in "${combinations[@]}"; do
  echo "== torch ${combination%/*}, transformers ${combination#*/}"
  one "${combination%/*}" "${combination#*/}" || failed=1
done
cat "$out"
exit "$failed"
