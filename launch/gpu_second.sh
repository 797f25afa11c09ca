#!/usr/bin/env bash
# The paper's tables on a GPU that is lent for minutes, in at most 8: the 3x3 canvas of table 1 and
# CIFAR-10 of table 2 at full scale, the cells that tell most first. The two suites share the GPU,
# so that it computes for one while the other compiles, evaluates or writes.
#
#   OUT=results/gpu GAPJAX_DATA=FOLDER launch/gpu_second.sh     TINY=1 MINUTES=2 tries it on a CPU
#
# TABLE1 and TABLE2 are other cells, SEEDS more seeds, FIELDS other --config.FIELD=VALUE flags;
# GAPJAX_COMMIT is what records call the commit of a copy without its own git. $OUT/SUITE.tgz holds a
# suite's workdir but for its checkpoints, anew every half a minute; the tables stand at the end.

set -uo pipefail
OUT=${OUT:?a folder for what is measured} MINUTES=${MINUTES:-8}
TABLE1=${TABLE1-permutenet/location/3x3 permutenet/image/3x3 gapnet/image/3x3 gapnet/location/3x3}
TABLE2=${TABLE2-resnet18/cifar10 augshift/cifar10 blurpool/cifar10 two_crops/cifar10}
mkdir -p "$OUT"
here=$(cd "$(dirname "$0")/.." && pwd)
[ -d "$here/gapjax" ] || here=$PWD  # the script was copied elsewhere: run in the project's root
cd "$here" || exit 2
work=$(mktemp -d)
minutes=$(python3 -c "print($MINUTES - 0.6)")  # what loading, the reports and the last copy take
export XLA_PYTHON_CLIENT_MEM_FRACTION=.42 TQDM_DISABLE=1 JAX_LOG_COMPILES=1
[ -n "${TINY:-}" ] && FIELDS="--config.model.width=4 --config.data.train_images=500 --config.num_epochs=1 \
  --config.eval.images=100 --config.batch_size=50"
read -ra fields <<<"${FIELDS:-}"

keep() { # SUITE
  tar czf "$OUT/$1.part" --exclude=checkpoints -C "$work" "$1" "$1.txt" &&
    mv "$OUT/$1.part" "$OUT/$1.tgz"
}

suite() { # NAME, CELLS
  [ -n "$2" ] || return
  python3 -m gapjax reproduce "$1" --scale=full --cells="$2" --seeds="${SEEDS:-1}" \
    --minutes="$minutes" --workdir="$work/$1" ${GAPJAX_DATA:+--data_dir="$GAPJAX_DATA"} \
    "${fields[@]}" 2>&1 | while IFS= read -r line; do
      printf '%(%H:%M:%S)T %s\n' -1 "$line"
    done >"$work/$1.txt"
  keep "$1"
}

suite table1 "$TABLE1" & first=$!
suite table2 "$TABLE2" & second=$!
nvidia-smi --query-gpu=timestamp,name,utilization.gpu,memory.used,clocks.sm --format=csv -l 2 \
  >"$OUT/gpu.csv" 2>&1 & watch=$!
while kill -0 $first 2>/dev/null || kill -0 $second 2>/dev/null; do
  sleep 5
  [ $((SECONDS % 30)) -lt 5 ] && for name in table1 table2; do
    [ -d "$work/$name" ] && keep $name
  done
done
kill $watch 2>/dev/null
for name in table1 table2; do
  [ -f "$work/$name.txt" ] && grep -v 'Finished\|Compiling\|Persistent\|Not writing\|img/s\|evaluate:' "$work/$name.txt" | tail -n 25
done
