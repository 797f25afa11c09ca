#!/usr/bin/env bash
# Runs gapjax on this machine's NVIDIA GPUs, once the driver and jax see each other.
#
#   launch/gpu_local.sh [flags] VERB [its flags, as for gapjax]
#
#   --preallocate[=SHARE]   let jax take that share of each GPU's memory at once (default 0.75);
#                           without it jax takes memory as it needs it, so that others can run too
#   --dry-run               print every command, run none
#
# CUDA_VISIBLE_DEVICES=0,1 says which GPUs. Training uses all that jax sees.

set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname "$0")/common.sh"

# The oldest driver that the CUDA of jax's wheels runs with (docs.jax.dev, Installation).
oldest_driver() { case $1 in 13) echo 580 ;; *) echo 525 ;; esac; }

FIND_CUDA='import importlib.metadata as m
print(next((v for v in ("13", "12") if any(m.distributions(name=f"jax-cuda{v}-plugin"))), ""))'
COUNT_GPUS='import jax
print(len(jax.devices("gpu")))'

SHARE=''
while [ $# -gt 0 ]; do
  case $1 in
    --preallocate) SHARE=0.75 ;;
    --preallocate=*)
      SHARE=${1#*=}
      [[ "$SHARE" =~ ^(0?\.[0-9]*[1-9][0-9]*|1(\.0*)?)$ ]] ||
        bad_input "--preallocate takes a share above 0 and up to 1, not \`$SHARE\`" ;;
    --dry-run) DRY_RUN=1 ;;
    -h | --help) help; exit ;;
    -*) unknown_flag "$1" ;;
    *) break ;;
  esac
  shift
done
[ $# -gt 0 ] || bad_input "run what? e.g. train --config=FILE --workdir=FOLDER ($SCRIPT --help)"

GAPJAX=$(find_gapjax '[cuda]')
PYTHON=$(python_of "$GAPJAX")
QUERY=(nvidia-smi --query-gpu=driver_version '--format=csv,noheader')

if [ -n "$SHARE" ]; then
  MEMORY=(XLA_PYTHON_CLIENT_PREALLOCATE=true "XLA_PYTHON_CLIENT_MEM_FRACTION=$SHARE")
else
  MEMORY=("XLA_PYTHON_CLIENT_PREALLOCATE=${XLA_PYTHON_CLIENT_PREALLOCATE:-false}")
fi
export "${MEMORY[@]}"

if [ -n "$DRY_RUN" ]; then
  quote "${QUERY[@]}"
  quote "$PYTHON" -c "$FIND_CUDA"
  quote "$PYTHON" -c "$COUNT_GPUS"
  quote env "${MEMORY[@]}" "$GAPJAX" "$@"
  exit
fi

command -v nvidia-smi >/dev/null ||
  fail "no nvidia-smi here: install NVIDIA's driver, or use the CPU with \`gapjax $1\`"
DRIVERS=$("${QUERY[@]}") || fail "nvidia-smi finds no GPU that works: $DRIVERS"
DRIVER=${DRIVERS%%$'\n'*}
GPUS=$(grep -c . <<<"$DRIVERS") || true
if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
  GPUS=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -vc '^-1$\|^$') || true
fi
((GPUS > 0)) || fail "no GPU: nvidia-smi lists none, or CUDA_VISIBLE_DEVICES hides them all"

if ((${DRIVER%%.*} >= $(oldest_driver 13))); then FITTING=cuda13; else FITTING=cuda12; fi
CUDA=$("$PYTHON" -c "$FIND_CUDA") || fail "$PYTHON does not run"
[ -n "$CUDA" ] || fail "jax has no CUDA here: $PYTHON -m pip install 'jax[$FITTING]'"
OR=''
[ "cuda$CUDA" = "$FITTING" ] || OR=", or $PYTHON -m pip uninstall jax-cuda$CUDA-plugin \
jax-cuda$CUDA-pjrt && $PYTHON -m pip install 'jax[$FITTING]'"
((${DRIVER%%.*} >= $(oldest_driver "$CUDA"))) || fail "jax's CUDA $CUDA needs a driver of version" \
  "$(oldest_driver "$CUDA") at least, and this one is $DRIVER: update it$OR"
REASON='an LD_LIBRARY_PATH with another CUDA is a common reason'
case ${JAX_PLATFORMS:-cuda} in
  *cuda* | *gpu*) ;;
  *) REASON="JAX_PLATFORMS=$JAX_PLATFORMS hides it: unset JAX_PLATFORMS" ;;
esac
SEEN=$("$PYTHON" -c "$COUNT_GPUS") ||
  fail "jax sees no GPU, though the driver $DRIVER does; $REASON"
((SEEN == GPUS)) || fail "jax sees $SEEN GPUs, the driver $GPUS: say which with" \
  "CUDA_VISIBLE_DEVICES"
note "$SEEN GPUs, driver $DRIVER, CUDA $CUDA, $(quote "${MEMORY[@]}")"

exec "$GAPJAX" "$@"
