# shellcheck shell=bash
# The command line of tpu_vm.sh: its flags, and what can be wrong with them. Sourced, never run.
# shellcheck disable=SC2034  # what is set here is used there

NAME='' ZONE='' PROJECT='' TYPE='' VERSION='' SPOT='' QUEUED='' WAIT_MINUTES=240 RECREATE=''
REF=HEAD SOURCE='' EXTRAS=tpu,gcs LOCAL_WORKDIR='' DELETE_ON_FAILURE='' DELETE_WHEN_DONE=''
CREATE_FLAGS=()

parse() {
  while [ $# -gt 0 ]; do
    case $1 in
      --name=*) NAME=${1#*=} ;;
      --zone=*) ZONE=${1#*=} ;;
      --project=*) PROJECT=${1#*=} ;;
      --accelerator-type=*) TYPE=${1#*=} ;;
      --version=*) VERSION=${1#*=} ;;
      --spot) SPOT=1 ;;
      --queued) QUEUED=1 ;;
      --wait-minutes=*) WAIT_MINUTES=${1#*=} ;;
      --create-flag=*) CREATE_FLAGS+=("${1#*=}") ;;
      --recreate) RECREATE=1 ;;
      --ref=*) REF=${1#*=} ;;
      --source=*) SOURCE=${1#*=} ;;
      --extras=*) EXTRAS=${1#*=} ;;
      --local-workdir) LOCAL_WORKDIR=1 ;;
      --delete-on-failure) DELETE_ON_FAILURE=1 ;;
      --delete-when-done) DELETE_WHEN_DONE=1 ;;
      --dry-run) DRY_RUN=1 ;;
      -h | --help) help; exit ;;
      -*) unknown_flag "$1" ;;
      *) break ;;
    esac
    shift
  done
  GAPJAX_ARGS=("$@")
  VERB=${1:-}
}

default_version() {
  case $TYPE in
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    v2-* | v3-* | v4-*) echo tpu-ubuntu2204-base ;;
    *) bad_input "no default image is known for \`$TYPE\`: give --version=VERSION" ;;
  esac
}

# Types with one worker.
one_host() {
  case $1 in v5litepod-[148] | v6e-[148] | v[234]-8 | v5p-8) ;; *) return 1 ;; esac
}

# Everything that can be wrong is said before anything costs money.
check_flags() {
  [[ "$NAME" =~ ^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$ ]] ||
    bad_input "--name=NAME is needed: small letters, digits and dashes, not \`$NAME\`"
  [ -n "$ZONE" ] || bad_input "--zone=ZONE is needed, such as us-central1-a"
  number --wait-minutes "$WAIT_MINUTES"
  case $COMMAND in
    create | all)
      [ -n "$TYPE" ] || bad_input "--accelerator-type=TYPE is needed, such as v5litepod-8"
      VERSION=${VERSION:-$(default_version)} ;;
  esac
  case $COMMAND in
    install | all)
      [[ "$EXTRAS" =~ ^[a-z0-9_,-]+$ ]] || bad_input "--extras=\`$EXTRAS\`: names and commas"
      [ -n "$SOURCE" ] || check_source ;;
  esac
  case $COMMAND in
    run | all) check_gapjax_arguments ;;
    *) [ -z "$VERB" ] || bad_input "$COMMAND takes no \`$VERB\`: run and all do" ;;
  esac
  case $COMMAND:$DELETE_WHEN_DONE in
    all:1 | logs:1 | *:) ;;
    *) bad_input "--delete-when-done is for all and logs, which wait for the run's end, not for" \
      "$COMMAND" ;;
  esac
}

check_source() {
  git rev-parse --quiet --verify "$REF^{commit}" >/dev/null 2>&1 || bad_input "no commit \`$REF\`" \
    "in $ROOT: give --ref=COMMIT, or --source=URL of a git repository"
}

check_gapjax_arguments() {
  [ -n "$VERB" ] || bad_input "$COMMAND what? e.g. train --config=FILE --workdir=gs://BUCKET/FOLDER"
  [ "$COMMAND" != all ] || check_verb "$TYPE"
  local word before='' workdir='' output='' data_dir='' config='' path
  for word in "${GAPJAX_ARGS[@]:1}" ''; do
    case $before in --workdir | --output | --data_dir | --config) word=$before=$word ;; esac
    case $word in --workdir=*) workdir=${word#*=} ;; --output=*) output=${word#*=} ;; esac
    case $word in --data_dir=*) data_dir=${word#*=} ;; --config=*) config=${word#*=} ;; esac
    before=$word
  done
  case "$workdir:$LOCAL_WORKDIR" in
    gs://* | ?*:1) ;;
    :*) case $VERB in
      train | reproduce | quickstart) bad_input "give --workdir=gs://BUCKET/FOLDER" ;;
    esac ;;
    *) bad_input "--workdir=$workdir is on the TPU VM's disk: lost with it, and not shared by" \
      "several workers. Give gs://BUCKET/FOLDER, or --local-workdir" ;;
  esac
  # gapjax runs in the folder that `install` removes.
  for path in "$workdir" "$output" "$data_dir"; do
    case $path in
      '' | gs://* | /* | \~/*) ;;
      *) bad_input "$path would lie in gapjax-src, which the next install removes: give a path" \
        "that begins with / or ~/" ;;
    esac
  done
  if [ -n "$DELETE_WHEN_DONE" ]; then
    [ -z "$output" ] || bad_input "--delete-when-done would delete $output too"
    case "$VERB:$workdir" in
      prepare: | bench: | *:gs://*) ;; # bench prints what it found
      *) bad_input "--delete-when-done would delete ${workdir:-what $VERB writes} too: leave it" \
        "out, or give --workdir=gs://BUCKET/FOLDER" ;;
    esac
  fi
  if [ -n "$config" ] && [ -z "$SOURCE" ] && [ "$COMMAND" = all ]; then
    config=${config%%:*}
    git cat-file -e "$REF:$config" 2>/dev/null ||
      { [[ "$config" =~ ^(configs/)?([^/]+)$ ]] && # the name of one that comes with gapjax
        git cat-file -e "$REF:configs/${BASH_REMATCH[2]%.py}.py" 2>/dev/null; } ||
      bad_input "no config file \`$config\` in $REF of $ROOT, which is what is installed"
  fi
}

# Several workers can train together, and prepare each its own data; the rest is for one.
check_verb() {
  case $VERB in train | prepare) return 0 ;; esac
  one_host "$1" || bad_input "gapjax $VERB needs a type with one worker, such as v5litepod-8;" \
    "$1 is for train"
}
