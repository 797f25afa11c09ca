#!/usr/bin/env bash
# What a GPU that is lent for minutes should tell first, in at most 5: how far gapjax and PyTorch
# differ, the tests that need a GPU, and how fast the two are in turns. On an H200 the last took 171 s,
# 91 of them to compile gapjax's step.
#
#   OUT=results/gpu launch/gpu_first.sh          JAX_PLATFORMS=cpu TINY=1 MINUTES=2 tries the script
#
# GAPJAX_DATA=FOLDER is where datasets are; GAPJAX=PATH is the gapjax whose Python runs.
#
# Everything comes to $OUT/first.tgz after every step. Nothing that fails stops what follows, and
# what would not end in time is cut off; the short table at the end says which.

set -uo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
[ -d "$here/gapjax" ] || here=$PWD  # the script was copied elsewhere: run in the project's root
# shellcheck source=launch/common.sh
. "$here/launch/common.sh" || exit 2
take_variables "$@"
cd "$here" || exit 2
MINUTES=${MINUTES:-5}
work=$(mktemp -d) begin=$SECONDS
limit=$("$PYTHON" -c "print(int(60 * $MINUTES) - 5)")
export XLA_PYTHON_CLIENT_PREALLOCATE=false TQDM_DISABLE=1  # several processes share the GPU
tiny=() rounds=3 steps=512
[ -n "${TINY:-}" ] && tiny=(--config.model.width=4 --config.batch_size=8) rounds=1 steps=2

keep() { # three steps keep at once: each writes a file of its own
  local part=$OUT/first.tgz.$BASHPID
  tar czf "$part" -C "$work" . && mv "$part" "$OUT/first.tgz"
}

step() { # SPARE, NAME, COMMAND ...: its output goes to NAME.txt, a line on how it ended to NAME.end
  local name=$2 left=$((limit - (SECONDS - begin) - $1)) start=$SECONDS code
  shift 2
  timeout --kill-after=5 "$((left > 0 ? left : 1))" "$@" >"$work/$name.txt" 2>&1
  code=$?
  [ "$code" = 124 ] && code="cut off"
  echo "$name: exit $code, $((SECONDS - start)) s: $(tail -n 1 "$work/$name.txt" | cut -c 1-100)" \
    >"$work/$name.end"
  keep
}

"$PYTHON" -c 'import jax, torch; print(jax.__version__, jax.devices(), torch.__version__)' \
  >"$work/device.txt" 2>&1
nvidia-smi >>"$work/device.txt" 2>&1

spare=$((limit * 6 / 10)) # is left for the last step
# Next to one another. The twin computes on one core: a quarter of the width keeps it to seconds.
for network in gapnet permutenet; do
  step "$spare" "parity_$network" "$PYTHON" -m gapjax convert --check \
    --output="$work/parity_$network.json" --config="configs/${network}_cifar10.py" \
    --config.model.width=16 &
done
step "$spare" tests "$PYTHON" -m pytest -q -o addopts= -n 3 -p no:cacheprovider -p no:benchmark \
  -m gpu tests/gpu &
wait

# Alone, since it is timed.
step 0 bench "$PYTHON" -m gapjax bench --against=torch --torch=compiled --rounds="$rounds" \
  --steps="$steps" --config=configs/gapnet_cifar10.py --config.model.dtype=bfloat16 "${tiny[@]}" \
  ${GAPJAX_DATA:+--data_dir="$GAPJAX_DATA"} --output="$work/bench.json"
cat "$work"/*.end
