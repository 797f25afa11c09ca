# shellcheck shell=bash
# What the launch scripts share: how they speak, quote and find gapjax. Sourced, never run.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
SCRIPT=$(basename "$0")
# shellcheck disable=SC2034  # the scripts set and use it
DRY_RUN=''

note() { echo "$SCRIPT: $*" >&2; }
fail() { note "$*"; exit 1; }
bad_input() { note "$*"; exit 2; }

# The comment at the top of the script that runs.
help() { sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; }

# For a flag that the script does not have.
unknown_flag() {
  case "$1" in
    --config | --config[.=]* | --workdir* | --data_dir*)
      bad_input "\`$1\` is gapjax's: give its verb first, as in \`train $1\`" ;;
    *) bad_input "unknown flag \`$1\`: flags are written --flag or --flag=VALUE ($SCRIPT --help)" ;;
  esac
}

# number FLAG VALUE: refuses what is not a number above 0.
number() {
  [[ "$2" =~ ^[1-9][0-9]{0,6}$ ]] || bad_input "$1 must be a number above 0, not \`$2\`"
}

# Its arguments as a shell reads them back, on one line: single quotes only where they are needed,
# so that a command is still legible once it is an argument of another (ssh --command='...').
quote() {
  local word line=
  for word in "$@"; do
    if [ -z "$word" ] || [[ "$word" =~ [^A-Za-z0-9_./:=@,+%~-] ]]; then
      word="'$(printf '%s' "$word" | sed "s/'/'\\\\''/g")'"
    fi
    line="$line${line:+ }$word"
  done
  printf '%s\n' "$line"
}

# The gapjax to run: $GAPJAX, that of the active environment, or the repository's own.
find_gapjax() {
  local found=${GAPJAX:-$(command -v gapjax || true)}
  found=${found:-$ROOT/.venv/bin/gapjax}
  command -v "$found" >/dev/null || fail "gapjax is not installed here: python3 -m venv" \
    ".venv && .venv/bin/pip install '.$1' (or say where it is: GAPJAX=PATH $SCRIPT ...)"
  printf '%s\n' "$found"
}

# The Python that this gapjax runs with: its neighbour. Its path is absolute.
python_of() {
  local found
  found=$(cd "$(dirname "$(command -v "$1")")" && pwd)/python
  [ -x "$found" ] || found=python3
  printf '%s\n' "$found"
}

# What a script that takes variables in place of flags does first, given its arguments. Sets OUT and
# GAPJAX_DATA, absolute since it goes on in another folder, and PYTHON: python3 where gapjax is not
# installed, but the project is there.
# shellcheck disable=SC2034  # the scripts use it
take_variables() {
  case ${1:-} in
    '') ;;
    -h | --help) help; exit ;;
    *) bad_input "takes variables and no \`$1\` ($SCRIPT --help)" ;;
  esac
  [ -n "${OUT:-}" ] || bad_input "OUT=FOLDER is needed, for what is measured ($SCRIPT --help)"
  mkdir -p "$OUT" || exit 2
  OUT=$(realpath "$OUT") GAPJAX_DATA=${GAPJAX_DATA:+$(realpath -m "$GAPJAX_DATA")}
  PYTHON=python3
  if [ -n "${GAPJAX:-}" ] || find_gapjax '' >/dev/null 2>&1; then
    GAPJAX=$(find_gapjax '') || exit 2
    PYTHON=$(python_of "$GAPJAX")
  fi
}
