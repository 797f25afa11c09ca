#!/usr/bin/env bash
# The paper's tables on a GPU that is lent for minutes, in at most 8: the second claim with three
# seeds, and three 3x3 cells of the first, at full scale, what tells most first.
#
#   OUT=results/gpu GAPJAX_DATA=FOLDER launch/gpu_second.sh     TINY=1 MINUTES=4 tries it on a CPU
#
# Every line of LANES is a process at a time, and all share the GPU, so that it computes for one
# while another compiles, evaluates or writes. A line is SUITE SEEDS CELLS, then what follows it
# (;). FIELDS are --config.FIELD=VALUE flags; GAPJAX_COMMIT is what records call the commit of a copy
# without its own git. $OUT/second.tgz holds all workdirs but for their checkpoints, anew every half
# a minute; the tables stand at the end. benchmarks/merge_results.py joins workdirs of one suite.

set -uo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
[ -d "$here/gapjax" ] || here=$PWD  # the script was copied elsewhere: run in the project's root
# shellcheck source=launch/common.sh
. "$here/launch/common.sh" || exit 2
take_variables "$@"
cd "$here" || exit 2
MINUTES=${MINUTES:-8}
LANES=${LANES:-'table2 3 augshift/cifar10; table2 3 two_crops/cifar10
table2 3 resnet18/cifar10 blurpool/cifar10; table1 1 permutenet/image/3x3
table1 1 gapnet/location/3x3; table1 3 permutenet/location/3x3'}
work=$(mktemp -d)
end=$((SECONDS + $("$PYTHON" -c "print(int(60 * $MINUTES) - 20)")))  # the last reports and copy
export TQDM_DISABLE=1 JAX_LOG_COMPILES=1
XLA_PYTHON_CLIENT_MEM_FRACTION=$("$PYTHON" -c "print(.9 / $(wc -l <<<"$LANES"))")
export XLA_PYTHON_CLIENT_MEM_FRACTION
[ -n "${TINY:-}" ] && FIELDS="--config.model.width=4 --config.data.train_images=500 --config.num_epochs=1 \
  --config.eval.images=100 --config.batch_size=50"
read -ra fields <<<"${FIELDS:-}"

keep() {
  tar czf "$OUT/second.part" --exclude=checkpoints -C "$work" . &&
    mv "$OUT/second.part" "$OUT/second.tgz"
}

lane() { # LINE
  local part suite seeds cells name
  while IFS= read -rd ';' part; do
    read -r suite seeds cells <<<"$part"
    name=${cells%% *} name=$suite-${name//\//_}
    [ $((end - SECONDS)) -gt 20 ] || return
    "$PYTHON" -m gapjax reproduce "$suite" --scale=full --cells="$cells" --seeds="$seeds" \
      --minutes="$("$PYTHON" -c "print($((end - SECONDS)) / 60)")" --workdir="$work/$name" \
      ${GAPJAX_DATA:+--data_dir="$GAPJAX_DATA"} "${fields[@]}" 2>&1 </dev/null |
      while IFS= read -r line; do
        printf '%(%H:%M:%S)T %s\n' -1 "$line"
      done >"$work/$name.txt"
  done <<<"$1;"
}

pids=()
while IFS= read -r line; do lane "$line" & pids+=($!); done <<<"$LANES"
nvidia-smi --query-gpu=timestamp,name,utilization.gpu,memory.used,clocks.sm --format=csv -l 2 \
  >"$work/gpu.csv" 2>&1 & watch=$!
while sleep 5; kill -0 "${pids[@]}" 2>/dev/null; do
  [ $((SECONDS % 30)) -lt 5 ] && keep
done
kill $watch 2>/dev/null
keep
for log in "$work"/*.txt; do
  grep -v 'Finished\|Compiling\|Persistent\|Not writing\|img/s\|evaluate:' "$log" | tail -n 25
done
