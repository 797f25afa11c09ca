#!/usr/bin/env bash
# What a GPU that is lent for minutes should tell first, in at most 3.5 minutes: the tests that need
# a GPU, how far gapjax and PyTorch differ on it, and how fast they are in turns.
#
#   OUT=results/gpu launch/gpu_first.sh          JAX_PLATFORMS=cpu, with MINUTES=1, tries the script
#
# Everything is written to $OUT as it comes. Nothing that fails stops what follows, and what would
# not end in time is cut off; the short table at the end says which.

set -uo pipefail
OUT=${OUT:?a folder for what is measured} MINUTES=${MINUTES:-3.5}
mkdir -p "$OUT"
here=$(cd "$(dirname "$0")/.." && pwd)
[ -d "$here/gapjax" ] || here=$PWD  # the script was copied elsewhere: run in the project's root
cd "$here" || exit 2
end=$(python3 -c "import time; print(time.time() + 60 * $MINUTES - 5)")
table=()

step() { # SHARE of what is left, NAME, COMMAND ...: its output goes to $OUT/NAME.txt
  local share=$1 name=$2 limit begin=$SECONDS code
  shift 2
  limit=$(python3 -c "import time; print(max(1, int($share * ($end - time.time()))))")
  timeout --kill-after=5 "$limit" "$@" >"$OUT/$name.txt" 2>&1
  code=$?
  [ "$code" = 124 ] && code="cut off after $limit s"
  table+=("$name: exit $code, $((SECONDS - begin)) s: $(tail -n 1 "$OUT/$name.txt" | cut -c 1-100)")
}

python3 -c 'import jax; print(jax.__version__, jax.devices())' >"$OUT/device.txt" 2>&1
nvidia-smi >>"$OUT/device.txt" 2>&1
step 0.5 parity python3 -m gapjax convert --check --output="$OUT/parity.json" \
  --config=configs/gapnet_cifar10.py
step 0.5 parity_permuted python3 -m gapjax convert --check --output="$OUT/parity_permuted.json" \
  --config=configs/permutenet_cifar10.py
step 0.6 bench python3 -m gapjax bench --against=torch --torch=compiled --rounds=3 \
  ${GAPJAX_DATA:+--data_dir="$GAPJAX_DATA"} --output="$OUT/bench.json"
step 1 tests python3 -m pytest -q -o addopts= -p no:cacheprovider -m gpu tests/gpu
printf '%s\n' "${table[@]}"
