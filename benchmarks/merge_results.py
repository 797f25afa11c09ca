"""Joins workdirs of one suite that were trained side by side, such as launch/gpu_second.sh's.

    python benchmarks/merge_results.py OUT WORKDIR ...

OUT/results.json then has the cells of all, in this order, and those that it had; OUT/run.json their
commands, machines and the sum of their times. samples.png of the first seeds are copied. Exit code
2 where two hold one cell, or are of two suites, scales or changes to them. `gapjax report
--workdir=OUT` draws them.
"""

import functools
import itertools
import pathlib
import shutil
import sys

from gapjax import paths
from gapjax.errors import UsageError
from gapjax.records import schema
from gapjax.reproduce.records import joined, write


def merged(parts: list[list[dict]]) -> list[dict]:
  """The records of several results.json. Raises UsageError unless they are of one suite and scale,
  with the same changes, and of different cells."""
  kinds = {(r['suite'], r['scale'], *r.get('changes', ())) for part in parts for r in part}
  seen = set()
  if len(kinds) > 1:
    raise UsageError(f'these are of several suites, scales or changes: {sorted(kinds)}')
  for part in parts:
    cells = {record['cell'] for record in part}
    if twice := seen & cells:
      raise UsageError(f'{", ".join(sorted(twice))} is in two of them; leave one out')
    seen |= cells
  return [record for part in parts for record in part]


def main(out, *workdirs):
  out = pathlib.Path(out)
  folders = [*([out] if (out / 'results.json').exists() else []), *map(pathlib.Path, workdirs)]
  for folder in folders:
    for name in ('results.json', 'run.json'):
      if not (folder / name).exists():
        raise UsageError(f'{folder} holds no {name}; give workdirs of gapjax reproduce')
  records = merged([schema.read(folder / 'results.json') for folder in folders])
  runs = [paths.read_json(folder / 'run.json') for folder in folders]
  for cell, folder in itertools.product({record['cell'] for record in records}, folders):
    of_cell = pathlib.Path('cells', cell, 'seed0', 'samples.png')
    if folder != out and (folder / of_cell).exists():  # not of a cell that was cut off
      (out / of_cell).parent.mkdir(parents=True, exist_ok=True)
      shutil.copyfile(folder / of_cell, out / of_cell)
  out.mkdir(parents=True, exist_ok=True)
  write(out / 'results.json', records)
  paths.write_json(out / 'run.json', functools.reduce(joined, runs, {}))


if __name__ == '__main__':
  if len(sys.argv) < 3:
    sys.exit(__doc__)
  try:
    main(*sys.argv[1:])
  except UsageError as error:
    print(f'merge_results: {error}', file=sys.stderr)
    sys.exit(2)
