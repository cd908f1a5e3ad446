#!/usr/bin/env bash
# Is the engine right on a GPU, and how fast? Exactness tests, then decoding benchmarks, one JSON.
#
#   bash benchmarks/gpu/gpu.sh wheels    # where there is a network: fetches what the machine may lack
#   bash benchmarks/gpu/gpu.sh           # on the machine, in under eight minutes; writes gpu.json
#
# The machine needs Linux, bash, Python 3.11 or later with torch (for its GPU), transformers and
# numba, and neither a network nor an installation: the wheels are unpacked into a folder of their
# own. PYTHON_VERSION (3.12) says for which Python `wheels` fetches.
#
# The steps can be tried without a GPU, with the smallest settings:
#
#   DEVICE=cpu SHAPES=reference BATCHES=1 TOKENS=4 REPEATS=1 TESTS=llama bash benchmarks/gpu/gpu.sh
#
# Layers are replayed as CUDA graphs; in the rows named "kernel by kernel" they are not, so that their
# `ratio_full` is what graphs are worth, upside down. `graphs` counts them: 0 where none could be made.
#
# Each step has a limit and all together have LIMIT_S seconds. A step that runs out of time leaves
# what it has: its rows so far, and in `steps` how it ended (0: done; 124 or 137: out of time).
set -uo pipefail
cd "$(dirname "$0")/../.." || exit 1

DEVICE=${DEVICE:-cuda}
DTYPE=${DTYPE:-bfloat16}
SHAPES=${SHAPES:-"qwen2.5-0.5b llama-3.2-1b"}
BATCHES=${BATCHES:-"1 8 32"}
TOKENS=${TOKENS:-32}
REPEATS=${REPEATS:-3}
TESTS=${TESTS:-}
LIMIT_S=${LIMIT_S:-450}
OUT=${OUT:-gpu.json}
PYTHON=${PYTHON:-python3}
WHEELS=${WHEELS:-wheels}

# What importing the worker and running its tests and benchmarks takes beside torch, transformers
# and numba: signing and Redis (imported, never used here), the command line, the tests' tools.
NAMES=(cryptography cffi pycparser redis
       typer click annotated-doc shellingham pydantic pydantic_core annotated-types typing-inspection
       typing_extensions rich markdown-it-py mdurl pygments
       pytest iniconfig pluggy packaging hypothesis sortedcontainers)

if [ "${1:-}" = wheels ]; then
  pins=()
  for name in "${NAMES[@]}"; do
    pin=$(grep -iE "^${name//[-_]/[-_]}==" constraints.txt) || { echo "no pin of $name"; exit 1; }
    pins+=("$pin")
  done
  exec "$PYTHON" -m pip download --quiet --no-deps --only-binary=:all: \
    --python-version "${PYTHON_VERSION:-3.12}" --implementation cp \
    --platform manylinux_2_34_x86_64 --platform manylinux_2_28_x86_64 \
    --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
    --dest "$WHEELS" "${pins[@]}"
fi

WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
if compgen -G "$WHEELS/*.whl" > /dev/null; then
  "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --target "$WORK/site" \
    "$WHEELS"/*.whl || exit 1
fi
export PYTHONPATH="src:tests:benchmarks:$WORK/site"
export OFFRAMP_TEST_DEVICE=$DEVICE PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
export HF_HUB_OFFLINE=1 XDG_CACHE_HOME="$WORK/cache"

# step NAME SECONDS COMMAND...: runs it within its limit and what is left of the whole.
step() {
  local name=$1 limit=$2 left=$((LIMIT_S - SECONDS)) begun=$SECONDS code
  shift 2
  [ "$limit" -lt "$left" ] || limit=$left
  if [ "$limit" -lt 5 ]; then
    code=124
  else
    echo "== $name (at most $limit s)"
    # An interrupt first, so that pytest still writes down what it found.
    timeout --signal=INT --kill-after=8 "$limit" "$@" 2>&1 | tee "$WORK/$name.log" | tail -n 25
    code=${PIPESTATUS[0]}
  fi
  printf '%s\t%s\t%s\n' "$name" "$code" $((SECONDS - begun)) >> "$WORK/steps.tsv"
}

# The project's own pytest settings name a plugin that the machine need not have.
tests() {
  local name=$1 limit=$2 which=$3
  shift 3
  step "$name" "$limit" "$PYTHON" -m pytest -q -c /dev/null --rootdir . --import-mode=importlib \
    -p no:cacheprovider --junitxml "$WORK/$name.xml" -k "($which)${TESTS:+ and ($TESTS)}" "$@"
}

decode() {
  local name=$1 limit=$2 shape=$3 batch=$4 engines=$5 repeats=$6
  step "$name" "$limit" "$PYTHON" benchmarks/decode.py --device "$DEVICE" --dtypes "$DTYPE" \
    --shapes "$shape" --batches "$batch" --depths 0.25 --tokens "$TOKENS" --repeats "$repeats" \
    --threads 4 --engines "$engines" --json "$WORK/$name.json"
}

AT=tests/worker/decoding
# What is of a GPU alone.
tests tests-device 60 "graphs or device_products" tests/worker/model/test_graphs.py \
  tests/worker/model/test_device_products.py
tests tests-bfloat16 90 bfloat16 "$AT/test_exactness.py" "$AT/test_kv_modes.py"
for shape in $SHAPES; do
  for batch in $BATCHES; do
    decode "decode-$shape-$batch" 45 "$shape" "$batch" "exits,3 probes,kernel by kernel" "$REPEATS"
  done
done
tests tests-float32 60 "not bfloat16" "$AT/test_exactness.py" "$AT/test_kv_modes.py" \
  "$AT/test_waves.py" "$AT/test_verified_sampling.py" "$AT/scheduling/test_schedules.py"
# Last, since compiling takes most of their time, for as many as there is time left.
for batch in $BATCHES; do
  for shape in $SHAPES; do
    decode "static-$shape-$batch" 90 "$shape" "$batch" "HF static" 2
  done
done

"$PYTHON" benchmarks/gpu/gpu_report.py "$WORK" "$DEVICE" "$OUT"
