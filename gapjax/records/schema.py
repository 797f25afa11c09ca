"""What a record of results.json holds: reproduce/ writes them, report/ reads them.

A record is one metric of one cell, over seeds:

  schema: SCHEMA.
  suite, scale: what it is of. changes: 'num_epochs=20', ...: fields set on the command line.
  cell: the cell's name, for people and folders. What it says stands in fields of its own, as far as
    they apply: task, network, dataset, target, grid; weight, max_shift, warm_up (SETTINGS, of a
    sweep); permute_at, padding (VARIED, of an ablation).
  order, N: of an attack, what was removed and how many channels; N = 0 is order 'clean'.
  metric, values, seeds, mean, std, n: fractions, one value a seed, or several where a seed has
    several random orders; std is the sample's, None of one; n counts the values that are known.
  commit: of the code that trained all these seeds; None where it is not known; 'A, B' where B went
    on with what A began.
  paper, torch: the published fraction; the PyTorch twin's values, seeds, mean, std, n, commit.
  protocol: how a consistency was measured. chance: what guessing gets, of an attacked classifier.
  detail: curves and sizes, in a cell's first record.
  config: what trained the cell; on disk in its first record alone.
"""

import statistics
from collections.abc import Mapping

from gapjax import paths
from gapjax.errors import UsageError

SCHEMA = 2
SETTINGS = ('weight', 'max_shift', 'warm_up')
VARIED = ('permute_at', 'padding')
# What every record has, and what else a report reads of any, by their types.
NUMBER = (float, int, type(None))
ALWAYS = {'cell': str, 'metric': str, 'mean': NUMBER}
READ = {'values': list, 'seeds': list, 'n': int, 'std': NUMBER, 'paper': NUMBER,
        'config': dict, 'torch': (dict, type(None)), 'detail': (dict, type(None))}


def read(path) -> list[dict]:
  """The records of a results.json, each with its cell's config; none where there is no file.

  Raises UsageError where it holds anything but records of SCHEMA.
  """
  records, configs = paths.read_json(path, list) if path.exists() else [], {}
  for i, record in enumerate(records):
    if not isinstance(record, dict) or record.get('schema') != SCHEMA:
      raise UsageError(f'{path} entry {i} is no record of schema {SCHEMA}; move the file '
                       'away and run again')
    paths.check_fields(record, {**ALWAYS, **{key: kind for key, kind in READ.items()
                                             if key in record}}, f'{path} entry {i}')
    if 'config' in record:
      configs.setdefault(record['cell'], {'config': record['config']})
  return [{**configs.get(record['cell'], {}), **record} for record in records]


def cell_name(fields: Mapping) -> str:
  """'gapnet/location/3x3', 'augshift,weight=3/cifar10', 'permute_at=stage2/location/3x3'."""
  parts = [f'{key}={fields[key]}' for key in VARIED if key in fields]
  if 'network' in fields:
    parts.append(','.join([fields['network'], *(
      f'{key}={fields[key]:g}' for key in SETTINGS if key in fields)]))
  parts += ([fields['target'], '{0}x{0}'.format(fields['grid'])] if 'grid' in fields
            else [fields['dataset']])
  return '/'.join(parts)


def spread(values) -> dict:
  """Mean, number and sample standard deviation (None of one) of the values that are known."""
  known = [value for value in values if value is not None]
  return {'mean': statistics.fmean(known) if known else None, 'n': len(known),
          'std': statistics.stdev(known) if len(known) > 1 else None}


def is_plain(record, task: str) -> bool:
  """Whether it is of a network of this task as it was trained, no ablation and nothing removed."""
  return record.get('task') == task and 'N' not in record and not any(
    key in record for key in VARIED)
