#!/usr/bin/env bash
# Runs gapjax on a Cloud TPU, one host or many, with your gcloud.
#
#   launch/tpu_vm.sh COMMAND --name=NAME --zone=ZONE [flags] [VERB and its flags, as for gapjax]
#
#   create    a TPU VM, or reuse the one of that name; waits until it is there
#   install   this repository's last commit on all its workers
#   run       gapjax on all workers, in the background; started again when it fails
#   logs      follow worker 0's output until the run has ended
#   status    what exists, and how the run goes on each worker
#   stop      the run, its state saved
#   delete    the TPU and its queued resource: what ends the cost
#   all       create, install, run, logs
#
#   --name=NAME, --zone=ZONE    of the TPU; the queued resource has the same name
#   --project=PROJECT           (default: gcloud's)
#   --accelerator-type=TYPE     for create: v5litepod-8, v6e-8, v4-32, v5p-8, ...
#   --version=VERSION           the VM's image (default: by type)
#   --spot                      cheaper, and taken away at any time
#   --queued                    wait in the queue for it, --wait-minutes=N (default 240)
#   --create-flag=FLAG          one more flag for gcloud's create, such as --reserved; repeatable
#   --recreate                  if what exists has failed or was preempted, delete it first
#   --ref=COMMIT                what to install (default HEAD)
#   --source=URL                install from this git repository rather than from here
#   --extras=NAMES              what to install of setup.py's extras (default tpu,gcs)
#   --local-workdir             accept a --workdir on the TPU VM's disk: /FOLDER or ~/FOLDER there
#   --delete-on-failure         if something fails, or Ctrl-C comes, before the run has started,
#                               delete the TPU that this command has created
#   --delete-when-done          all, logs: delete the TPU once the run has ended, well or not
#   --dry-run                   print every command, run none
#
# A preempted run loses what came after its last checkpoint: the same command with --recreate and
# the same --workdir=gs://BUCKET/FOLDER goes on. Several workers need the ssh key in your agent:
# ssh-add ~/.ssh/google_compute_engine

set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname "$0")/common.sh"
# shellcheck source=launch/tpu_vm_flags.sh
. "$(dirname "$0")/tpu_vm_flags.sh"

POLL_SECONDS=${POLL_SECONDS:-30}
ORIGINAL=("$@")

# What at_exit must know: may there be something to pay for, did this call make it, has the run
# begun, has it ended, is there a folder to remove.
COST='' CREATED='' STARTED='' ENDED='' SCRATCH=''

# ---- What exists --------------------------------------------------------------------------------

# gcloud compute tpus ... with the flags of all our commands.
tpus() { gcloud compute tpus "$@" "${WHERE[@]}"; }

# step WHAT COMMAND...: the command, or in a dry run its text.
step() {
  local what=$1
  shift
  if [ -n "$DRY_RUN" ]; then
    echo "# $what"
    if [ "$1" = tpus ]; then quote gcloud compute "$@" "${WHERE[@]}"; else quote "$@"; fi
    return
  fi
  note "$what"
  "$@" || fail "$what: failed with exit code $?"
}

# The state and type of our VM in VM_STATE and VM_TYPE; empty if there is none. `list` and not
# `describe`, whose failure may mean that there is none or that nobody answered.
look_for_vm() {
  VM_STATE='' VM_TYPE=''
  local query=(tpus tpu-vm list "--filter=name~/$NAME\$"
    '--format=value(state,acceleratorType.basename())') found
  if [ -n "$DRY_RUN" ]; then step 'is there a TPU VM of that name?' "${query[@]}"; return; fi
  found=$("${query[@]}") || fail "gcloud did not say whether $NAME exists"
  read -r VM_STATE VM_TYPE <<<"$found" || true
}

# Likewise our queued resource, in QUEUE_STATE. Returns 1 if gcloud did not answer.
look_for_queued() {
  QUEUE_STATE=''
  local query=(tpus queued-resources list "--filter=name~/$NAME\$" '--format=value(state.state)')
  if [ -n "$DRY_RUN" ]; then step 'is there a queued resource of it?' "${query[@]}"; return; fi
  QUEUE_STATE=$("${query[@]}")
}

# ---- create -------------------------------------------------------------------------------------

create() {
  look_for_vm
  if [ "$VM_STATE" = READY ]; then
    COST=1
    [ "$VM_TYPE" = "$TYPE" ] || fail "$NAME exists and is a $VM_TYPE, not a $TYPE: delete it" \
      "first, or give another --name"
    note "$NAME exists and is ready: reusing it"
    return
  fi
  look_for_queued || fail "gcloud did not say whether $NAME is in the queue"
  make_room
  # From here on something may exist, even if gcloud says that it failed.
  COST=1
  if [ -z "$QUEUED" ]; then
    CREATED=1
    step "creating $NAME, a $TYPE" tpus tpu-vm create "$NAME" "--accelerator-type=$TYPE" \
      "--version=$VERSION" ${SPOT:+--spot} ${CREATE_FLAGS[@]+"${CREATE_FLAGS[@]}"}
    return
  fi
  if [ -z "$QUEUE_STATE" ]; then
    CREATED=1
    # It expires so long after it was made, also if this script ends before.
    step "asking for $NAME, a $TYPE" tpus queued-resources create "$NAME" "--node-id=$NAME" \
      "--accelerator-type=$TYPE" "--runtime-version=$VERSION" ${SPOT:+--spot} \
      "--valid-until-duration=${WAIT_MINUTES}m" ${CREATE_FLAGS[@]+"${CREATE_FLAGS[@]}"}
  fi
  wait_in_queue
}

# Leaves either nothing of that name, or a queued resource that may still become active.
make_room() {
  [ -n "$VM_STATE$QUEUE_STATE" ] || return 0
  COST=1
  case "$VM_STATE:$QUEUE_STATE" in
    :ACTIVE | :CREATING | :ACCEPTED | :PROVISIONING | :WAITING_FOR_RESOURCES | CREATING:?*)
      [ -n "$QUEUED" ] || fail "a queued resource $NAME exists ($QUEUE_STATE): give --queued too" \
        "to wait for it, or delete it" ;;
    *:FAILED | *:SUSPEND* | PREEMPTED:* | TERMINATED:*)
      [ -n "$RECREATE" ] || fail "$NAME exists and is of no use any more (VM ${VM_STATE:-gone}," \
        "queued resource ${QUEUE_STATE:-none}): delete it, or give --recreate"
      delete_tpu
      QUEUE_STATE='' ;;
    *) fail "$NAME exists and is ${VM_STATE:-$QUEUE_STATE}: wait until it is not, or delete it" ;;
  esac
}

wait_in_queue() {
  local end=$((SECONDS + WAIT_MINUTES * 60)) shown='' unanswered=0
  if [ -n "$DRY_RUN" ]; then
    echo "# every $POLL_SECONDS s, until it is ACTIVE:"
    look_for_queued
    return
  fi
  while :; do
    # Over hours gcloud may fail to answer now and then.
    if look_for_queued; then unanswered=0; else unanswered=$((unanswered + 1)); fi
    ((unanswered < 3)) || fail "gcloud does not say how the request for $NAME stands"
    if ((unanswered == 0)); then
      case $QUEUE_STATE in
        ACTIVE) note "$NAME is there"; return ;;
        '' | FAILED | SUSPEND* | DELETING)
          fail "the request for $NAME came to nothing: it is ${QUEUE_STATE:-gone}. Why, says" \
            "gcloud compute tpus queued-resources describe $NAME $(quote "${WHERE[@]}")" ;;
      esac
      [ "$QUEUE_STATE" = "$shown" ] || note "$NAME: $QUEUE_STATE"
      shown=$QUEUE_STATE
    fi
    ((SECONDS < end)) || fail "$NAME is still $QUEUE_STATE after $WAIT_MINUTES minutes"
    sleep "$POLL_SECONDS"
  done
}

# ---- install, run, logs, status, stop -----------------------------------------------------------

# on WORKER COMMAND: the gcloud command for a shell command on one worker, or on all of them.
on() { ON=(tpus tpu-vm ssh "$NAME" "--worker=$1" "--command=$2"); }

RESTART='bash gapjax-src/launch/restart.sh'

install() {
  local fetch archive=gapjax-src.tar.gz
  on all "if [ -e gapjax-src ] && $RESTART running gapjax-run
then echo 'a run is going on here: stop it first' >&2; exit 1
fi"
  step 'looking whether a run is going on' "${ON[@]}"
  if [ -n "$SOURCE" ]; then
    fetch="git clone --quiet $(quote "$SOURCE") gapjax-src
git -C gapjax-src checkout --quiet $(quote "$REF")"
  else
    [ -z "$(git status --porcelain --untracked-files=no)" ] ||
      note "what is not committed is not installed"
    if [ -z "$DRY_RUN" ]; then
      SCRATCH=$(mktemp -d)
      archive=$SCRATCH/$archive
    fi
    step "packing $REF" git archive --format=tar.gz "--output=$archive" "$REF"
    step 'copying it to all workers' \
      tpus tpu-vm scp "$archive" "$NAME:gapjax-src.tar.gz" --worker=all
    fetch='mkdir gapjax-src
tar -xzf gapjax-src.tar.gz -C gapjax-src'
  fi
  # uv brings its own Python: Ubuntu 22.04's is older than jax wants.
  on all "set -eo pipefail
rm -rf gapjax-src gapjax-venv
$fetch
[ -x ~/.local/bin/uv ] || curl -LsSf https://astral.sh/uv/install.sh | sh
~/.local/bin/uv venv --quiet --python 3.12 gapjax-venv
~/.local/bin/uv pip install --quiet --python gapjax-venv './gapjax-src[$EXTRAS]'
gapjax-venv/bin/python -c 'import libtpu, jax, gapjax.cli'"
  step 'installing it on all workers' "${ON[@]}"
}

run() {
  look_for_vm
  if [ -z "$DRY_RUN" ]; then
    [ "$VM_STATE" = READY ] || fail "$NAME is ${VM_STATE:-gone}, not READY"
    check_verb "$VM_TYPE"
  fi
  local arguments=("${GAPJAX_ARGS[@]}")
  # Every worker runs the same; jax finds the others by itself.
  [ "$VERB" != train ] || arguments=(train --distributed "${GAPJAX_ARGS[@]:1}")
  on all "cd gapjax-src
bash launch/restart.sh start ~/gapjax-run ~/gapjax-venv/bin/gapjax $(quote "${arguments[@]}")"
  step "starting gapjax $VERB on all workers" "${ON[@]}"
  STARTED=1
}

logs() {
  local code=0
  on 0 "$RESTART logs gapjax-run"
  if [ -n "$DRY_RUN" ]; then step 'following its output' "${ON[@]}"; return; fi
  note 'following its output; Ctrl-C ends that, not the run'
  "${ON[@]}" || code=$?
  if [ "$code" = 0 ]; then # every worker's, not the first one's alone
    on all "$RESTART logs gapjax-run >/dev/null"
    "${ON[@]}" || code=$?
  fi
  case $code in
    0) note 'the run has ended well, or was stopped and saved'; ENDED=1; return ;;
    90) ENDED=1; fail 'the run has ended, and not well' ;;
  esac
  look_for_vm
  [ "$VM_STATE" = READY ] || fail "$NAME is ${VM_STATE:-gone}. If it was preempted: what is in" \
    "the workdir on gs:// is safe, and this goes on from there: $(go_on)"
  fail "lost sight of the run (exit code $code). It goes on; see it again with" \
    "launch/$SCRIPT logs $(quote "${SELF[@]}")"
}

# The command that starts a preempted run again.
go_on() {
  if [ "$COMMAND" = all ]; then
    quote "launch/$SCRIPT" all --recreate "${ORIGINAL[@]:1}"
  else
    echo "launch/$SCRIPT all --recreate, with the flags and the verb that it was created with (its" \
      "disk, with the data, is gone too), then the same run"
  fi
}

status() {
  look_for_queued || fail 'gcloud did not answer'
  look_for_vm
  COST=$VM_STATE$QUEUE_STATE
  [ -n "$DRY_RUN" ] ||
    echo "$NAME: VM ${VM_STATE:-none} $VM_TYPE, queued resource ${QUEUE_STATE:-none}"
  if [ -n "$DRY_RUN" ] || [ "$VM_STATE" = READY ]; then
    on all "if [ -e gapjax-src ]; then $RESTART status gapjax-run; else echo 'not installed'; fi"
    step 'asking each worker how the run goes' "${ON[@]}"
  fi
}

stop() {
  on all "$RESTART stop gapjax-run"
  step 'stopping the run; it saves its state' "${ON[@]}"
}

# ---- delete -------------------------------------------------------------------------------------

delete_tpu() {
  look_for_queued || fail "gcloud did not say whether $NAME is in the queue"
  # --force: with its VM, else it is refused while that exists.
  if [ -n "$QUEUE_STATE$DRY_RUN" ]; then
    step "deleting the queued resource $NAME and its VM" \
      tpus queued-resources delete "$NAME" --force
  fi
  look_for_vm
  if [ -n "$VM_STATE$DRY_RUN" ]; then
    step "deleting the TPU VM $NAME" tpus tpu-vm delete "$NAME"
  fi
  [ -n "$QUEUE_STATE$VM_STATE$DRY_RUN" ] || note "nothing named $NAME is in $ZONE"
}

tell_cost() {
  local raw=(gcloud compute tpus tpu-vm delete "$NAME")
  [ -z "$QUEUED" ] || raw=(gcloud compute tpus queued-resources delete "$NAME" --force)
  note "$NAME in $ZONE costs money for as long as it exists. This deletes it:"
  echo "  launch/$SCRIPT delete $(quote "${SELF[@]}")" >&2
  echo "or, without this script," >&2
  echo "  $(quote "${raw[@]}" "${WHERE[@]}")" >&2
}

# Whatever happened, nobody leaves without knowing what goes on costing money.
at_exit() {
  local code=$?
  trap - EXIT
  trap '' INT TERM HUP
  [ -z "$SCRATCH" ] || rm -rf "$SCRATCH"
  if [ -n "$COST" ] && [ -z "$DRY_RUN" ]; then
    if [ "$code" != 0 ] && [ -n "$DELETE_ON_FAILURE" ] && [ -n "$CREATED" ] && [ -z "$STARTED" ] ||
      { [ -n "$DELETE_WHEN_DONE" ] && [ -n "$ENDED" ]; }; then
      if (delete_tpu); then COST=''; else note "$NAME is NOT deleted"; fi
    fi
    [ -z "$COST" ] || tell_cost
  fi
  exit "$code"
}

# ---- Main ----------------------------------------------------------------------------------------

main() {
  COMMAND=${1:-}
  case $COMMAND in
    create | install | run | logs | status | stop | delete | all) ;;
    -h | --help) help; exit ;;
    *) bad_input "unknown command \`$COMMAND\` ($SCRIPT --help)" ;;
  esac
  shift
  parse "$@"
  cd "$ROOT"
  check_flags
  WHERE=("--zone=$ZONE" ${PROJECT:+"--project=$PROJECT"} --quiet)
  SELF=("--name=$NAME" "--zone=$ZONE" ${PROJECT:+"--project=$PROJECT"})
  [ -n "$DRY_RUN" ] || command -v gcloud >/dev/null ||
    fail 'gcloud is not installed: https://cloud.google.com/sdk/docs/install'
  case $COMMAND in create | status | all) ;; *) COST=1 ;; esac
  trap at_exit EXIT
  trap 'exit 130' INT
  trap 'exit 143' TERM
  trap 'exit 129' HUP
  case $COMMAND in
    all)
      create
      install
      run
      logs ;;
    delete)
      delete_tpu
      COST='' ;;
    *) "$COMMAND" ;;
  esac
}

main "$@"
