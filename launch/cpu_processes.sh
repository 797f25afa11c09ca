#!/usr/bin/env bash
# Trains with several processes on this machine's CPU, as several hosts would: for trying it.
#
#   launch/cpu_processes.sh [flags] train [its flags, as for gapjax]
#
#   --processes=N   how many (default 2)
#   --devices=N     that each has (default 1): batch_size must be a multiple of all
#   --port=N        where they meet (default: a free one)
#   --grace=N       seconds that the others have to save when one fails (default 20)
#   --dry-run       print every command, run none
#
# Every line is printed with its process's number. When one process fails the others are stopped,
# and its exit code is this script's. Ctrl-C and SIGTERM reach all of them, and saving may take as
# long as it needs; a second one ends them at once.

set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname "$0")/common.sh"

PROCESSES=2 DEVICES=1 PORT='' GRACE=20
while [ $# -gt 0 ]; do
  case $1 in
    --processes=*) PROCESSES=${1#*=} ;;
    --devices=*) DEVICES=${1#*=} ;;
    --port=*) PORT=${1#*=} ;;
    --grace=*) GRACE=${1#*=} ;;
    --dry-run) DRY_RUN=1 ;;
    -h | --help) help; exit ;;
    -*) unknown_flag "$1" ;;
    *) break ;;
  esac
  shift
done
number --processes "$PROCESSES"
number --devices "$DEVICES"
number --grace "$GRACE"
[ -z "$PORT" ] || number --port "$PORT"
[ "${1:-}" = train ] || bad_input "only \`train\` knows of several processes, not \`${1:-}\`"
shift

GAPJAX=$(find_gapjax '')
if [ -z "$PORT" ]; then
  PORT=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0))
print(s.getsockname()[1])')
fi
FLAGS="${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$DEVICES"

# The command of process $1 in RUN.
command_of() {
  RUN=(env JAX_PLATFORMS=cpu "XLA_FLAGS=$FLAGS" "$GAPJAX" train
    "--distributed=127.0.0.1:$PORT,$PROCESSES,$1" "${@:2}")
}

if [ -n "$DRY_RUN" ]; then
  for ((i = 0; i < PROCESSES; i++)); do
    command_of "$i" "$@"
    quote "${RUN[@]}"
  done
  exit
fi

prefix() {
  local line
  while IFS= read -r line || [ -n "$line" ]; do printf '[%s] %s\n' "$1" "$line"; done
}

# One process with its output numbered, and its exit code. The signals are for gapjax alone: what it
# says while it saves is still to be printed.
numbered() {
  trap : INT TERM
  "${RUN[@]}" 2>&1 </dev/null | { trap '' INT TERM; prefix "$1"; }
}

# Sends a signal to all that still run, once: a second one tells gapjax not to save.
SENT=''
send() {
  [ -z "$SENT" ] || return 0
  SENT=1
  for pid in "${PIDS[@]}"; do kill "-$1" -- "-$pid" 2>/dev/null || true; done
}

# A process group for each, so that a signal reaches gapjax and what it started.
set -m
PIDS=() CODE=0 END=''
trap 'CODE=130; [ -z "$SENT" ] || END=0; send INT' INT  # a second signal: at once
trap '[ -z "$SENT" ] || END=0; send TERM' TERM
trap 'for pid in ${PIDS[@]+"${PIDS[@]}"}; do kill -KILL -- "-$pid" 2>/dev/null || true; done' EXIT
for ((i = 0; i < PROCESSES; i++)); do
  command_of "$i" "$@"
  numbered "$i" &
  PIDS+=($!)
done

RUNNING=("${PIDS[@]}")
while [ ${#RUNNING[@]} -gt 0 ]; do
  STILL=()
  for pid in "${RUNNING[@]}"; do
    if kill -0 "$pid" 2>/dev/null; then STILL+=("$pid"); continue; fi
    code=0
    wait "$pid" 2>/dev/null || code=$?
    if [ "$code" = 0 ]; then continue; fi
    [ "$CODE" != 0 ] || CODE=$code
    END=${END:-$((SECONDS + GRACE))}  # the others may wait for it, and never hear the signal
    if [ -z "$SENT" ]; then
      note "a process ended with exit code $code: stopping the others"
      send TERM
    fi
  done
  RUNNING=(${STILL[@]+"${STILL[@]}"})
  if [ -n "$END" ] && ((SECONDS > END)); then
    # One that waits for another's numbers does not hear the signal.
    for pid in ${RUNNING[@]+"${RUNNING[@]}"}; do kill -KILL -- "-$pid" 2>/dev/null || true; done
  fi
  sleep 0.1
done
exit "$CODE"
