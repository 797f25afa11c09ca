#!/usr/bin/env bash
# Keeps a command running in the background: started again when it fails, its output in a log.
#
#   launch/restart.sh start FOLDER COMMAND...   start it
#   launch/restart.sh logs FOLDER               follow its output until it has ended
#   launch/restart.sh status FOLDER             is it running, or how did it end; its last lines
#   launch/restart.sh stop FOLDER               SIGTERM (gapjax saves its state), then wait
#   launch/restart.sh running FOLDER            exit code 0 if it is running, else 1
#
# FOLDER holds `log`, `pid` and, once it has ended, `exit_code`. Exit codes 0 (done, or stopped and
# saved), 2 and 3 (bad input, diverged: the same again would fail the same way) and 130 (Ctrl-C) are
# final. After any other the command starts again: 20 times in a row at most, after 10 s, then 20,
# ... up to 5 minutes; a run that lasted 10 minutes begins the count anew. RESTARTS=N and WAIT=SECONDS, in the
# environment, change that. `logs` exits with 0 if the command ended with 0, else with 90.

set -euo pipefail

RESTARTS=${RESTARTS:-20}
WAIT=${WAIT:-10}
STOP_SECONDS=${STOP_SECONDS:-120}  # what saving may take before SIGKILL
LONGEST_WAIT=300
LONG_RUN=600

complain() { echo "restart.sh: $1" >&2; exit "$2"; }

# Whether it is; its number in PID. After a reboot the one in `pid` may be another process's.
is_running() {
  PID=$(cat "$FOLDER/pid" 2>/dev/null) &&
    [[ "$(tr '\0' ' ' 2>/dev/null <"/proc/$PID/cmdline")" == *'restart.sh loop '* ]]
}

how_it_ended() {
  if [ -e "$FOLDER/exit_code" ]; then cat "$FOLDER/exit_code"; else echo unknown; fi
}

# One SIGTERM only: a second one tells gapjax not to save.
forward() {
  if [ -n "$child" ] && [ -z "$sent" ]; then
    sent=1
    kill -TERM "$child" 2>/dev/null || true
  fi
}

# Runs a command; its exit code in `code`. A trapped signal ends `wait` early, with a code of its
# own; the command's comes with the next `wait`.
attend() {
  child='' sent=''
  "$@" &
  child=$!
  [ -z "$stopping" ] || forward
  while :; do
    signalled='' code=0
    wait "$child" || code=$?
    if [ -z "$signalled" ] || ((code <= 128)); then break; fi
  done
  child=''
}

say() { echo "--- $(date '+%F %T') $*"; }

loop() {
  local count=0 pause=$WAIT started outcome
  child='' sent='' stopping='' signalled='' code=0
  trap 'stopping=1 signalled=1; forward' TERM
  trap 'rm -f "$FOLDER/pid"' EXIT
  echo $$ >"$FOLDER/pid"
  while [ -z "$stopping" ]; do
    say "$*"
    started=$SECONDS
    attend "$@"
    outcome=$code
    case $outcome in 0 | 2 | 3 | 130) break ;; esac
    if ((SECONDS - started >= LONG_RUN)); then count=0 pause=$WAIT; fi
    count=$((count + 1))
    if ((count > RESTARTS)); then say "failed $count times in a row: giving up"; break; fi
    say "failed with exit code $outcome; again in $pause s ($count of $RESTARTS)"
    [ -n "$stopping" ] || attend sleep "$pause"
    pause=$((pause * 2 < LONGEST_WAIT ? pause * 2 : LONGEST_WAIT))
  done
  say "${stopping:+stopped; }ended with exit code ${outcome:-0}"
  echo "${outcome:-0}" >"$FOLDER/exit_code"
}

start() {
  ! is_running || complain "a run is going on in $FOLDER: stop it first" 1
  mkdir -p "$FOLDER"
  rm -f "$FOLDER/pid" "$FOLDER/exit_code"
  [ ! -e "$FOLDER/log" ] || mv "$FOLDER/log" "$FOLDER/log.previous"
  # A session of its own: the end of the ssh connection that started it is not the end of the run.
  RESTARTS=$RESTARTS WAIT=$WAIT setsid nohup bash "$0" loop "$FOLDER" "$@" \
    >"$FOLDER/log" 2>&1 </dev/null &
  local waited=0
  until [ -s "$FOLDER/pid" ] || [ -e "$FOLDER/exit_code" ]; do
    ((waited++ < 100)) || complain "nothing started: $FOLDER/log" 1
    sleep 0.1
  done
  echo "started; its output goes to $FOLDER/log"
}

logs() {
  [ -e "$FOLDER/log" ] || complain "no run was started in $FOLDER" 1
  if is_running; then
    tail -n +1 -s 0.2 -F --pid="$PID" "$FOLDER/log"
  else
    cat "$FOLDER/log"
  fi
  [ "$(how_it_ended)" = 0 ] || exit 90
}

status() {
  if is_running; then
    echo running
  elif [ -e "$FOLDER/log" ]; then
    echo "ended with exit code $(how_it_ended)"
  else
    echo 'not started'
    return
  fi
  # A bar of progress is one line, as long as the run.
  tail -c 4000 "$FOLDER/log" | tr '\r' '\n' | tail -n 3
}

stop() {
  if ! is_running; then echo 'nothing is running'; return; fi
  local waited=0
  kill -TERM "$PID"
  while kill -0 "$PID" 2>/dev/null; do
    if ((waited++ >= STOP_SECONDS * 5)); then
      kill -KILL -- "-$PID" # the whole session
      complain "it did not stop in $STOP_SECONDS s and was killed; its last checkpoint stands" 1
    fi
    sleep 0.2
  done
  echo stopped
}

COMMAND=${1:-}
case $COMMAND in
  -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; exit ;;
  start | loop | logs | status | stop | running) ;;
  *) complain "unknown command \`$COMMAND\` (restart.sh --help)" 2 ;;
esac
FOLDER=${2:-}
[ -n "$FOLDER" ] || complain "$COMMAND needs a folder (restart.sh --help)" 2
shift 2
case $COMMAND in
  start) [ $# -gt 0 ] || complain "start needs a command (restart.sh --help)" 2; start "$@" ;;
  running) is_running ;;
  *) "$COMMAND" "$@" ;;
esac
