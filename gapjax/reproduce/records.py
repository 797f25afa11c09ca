"""The records of results.json: one more seed of a cell, of its attack, of its PyTorch twin.

What a record holds: gapjax/records/schema.py. Only equal records are averaged: a row is one cell,
trained with one config by the code of one commit.
"""

from gapjax import config as configs
from gapjax import paths
from gapjax.errors import UsageError
from gapjax.records import runs
from gapjax.records.schema import SCHEMA, read, spread
from gapjax.tasks import TASKS


def write(path, records) -> None:
  """Writes results.json, with a cell's config in its first record alone."""
  seen, written = set(), []
  for record in records:
    written.append({key: value for key, value in record.items()
                    if key != 'config' or record['cell'] not in seen})
    seen.add(record['cell'])
  paths.write_json(path, written)


def joined(earlier: dict, later: dict) -> dict:
  """run.json of two trainings of one suite, the first of which may be {}. What differs between them
  is listed: '0.10.2, 0.11.2'."""
  def both(one, other, mark):
    return mark.join(dict.fromkeys(filter(None, [*one.split(mark), *other.split(mark)])))

  versions = [run.get('versions', {}) for run in (earlier, later)]
  return {
    'began': min(run['began'] for run in (earlier, later) if 'began' in run),
    'ended': max(run['ended'] for run in (earlier, later) if 'ended' in run),
    **{key: both(earlier.get(key, ''), later[key], mark)
       for key, mark in (('command', '\n'), ('device', '; '))},
    'versions': {name: both(*(some.get(name, '') for some in versions), ', ')
                 for name in {**versions[0], **versions[1]}},
    'wall_seconds': earlier.get('wall_seconds', 0.0) + later['wall_seconds']}


def read_own(path, cells) -> list[dict]:
  """The records of a workdir's results.json.

  Raises UsageError when it holds anything but these cells, which would be lost.
  """
  records = read(path)
  for record in records:
    if not any(holds(record, cell) for cell in cells):
      raise UsageError(f'{path} holds {record["cell"]} of another suite, scale or config; '
                       'use another --workdir')
  return records


def holds(record, cell) -> bool:
  """Whether a record is of this cell, trained with this config (but for the seed)."""
  return record['cell'] == cell.name and 'config' in record and not [
    field for field in configs.difference(cell.config, record['config'])
    if not field.startswith('seed ')]


def check_commit(commits, commit, *, name: str) -> None:
  """Raises UsageError unless one more seed, of `commit`, is of the code of the others."""
  for other in set(commits) - {commit}:
    raise UsageError(f'{name} was trained by commit {other or "unknown"}, and another seed is of '
                     f'{commit or "an unknown one"}: seeds of two commits are not averaged; take '
                     'the code of the first, or another --workdir')


def add(records, cell, *, seed: int, summary, lines, suite: str, scale: str) -> list[dict]:
  """The records with one more seed of a cell, from its run's summary and lines of metrics."""
  for record in runs.records(summary, lines, seed=seed):
    records = _merged(records, {**_about(cell, summary, suite=suite, scale=scale),
                                'paper': cell.paper.get(record['metric']), **record})
  return records


def add_attack(records, cell, *, seed: int, summary, sweep, suite: str, scale: str) -> list[dict]:
  """The records with what one seed's attack left of a cell. Random orders have several values a
  seed. Of a classifier they say what guessing gets."""
  chance = {} if TASKS[cell.config.task].dense else {'chance': summary['sizes']['chance']}
  for new in sweep.records():
    records = _merged(records, {
      **_about(cell, summary, suite=suite, scale=scale), 'order': new['order'], 'N': new['N'],
      'metric': new['metric'], 'paper': None, 'values': new['values'], 'seeds': [seed], **chance})
  return records


def add_torch(records, cell, *, seed: int, summary) -> list[dict]:
  """The records with one more seed of a cell's PyTorch twin."""
  values, joined = runs.metrics_of(summary), []
  for record in records:
    if record['cell'] == cell.name and 'N' not in record and record['metric'] in values:
      old, commit = record.get('torch') or {}, summary.get('commit')
      check_commit([old.get('commit')] if old else [], commit,  # of an old twin not written down
                   name=f'the PyTorch twin of {cell.name}')
      numbers = [*old.get('values', []), values[record['metric']]]
      record = {**record, 'torch': {'values': numbers, 'seeds': [*torch_seeds(record), seed],
                                    **spread(numbers), 'commit': commit}}
    joined.append(record)
  return joined


def torch_seeds(record) -> list[int]:
  """The seeds with which the PyTorch twin of a record's cell is trained."""
  return (record.get('torch') or {}).get('seeds', [])


def _about(cell, summary, *, suite, scale):
  """What all records of a seed say of its cell."""
  return {'schema': SCHEMA, 'suite': suite, 'scale': scale,
          **({'changes': list(cell.changes)} if cell.changes else {}),
          'cell': cell.name, **cell.fields, 'commit': summary.get('commit'), 'torch': None,
          'config': configs.as_json(cell.config)}


def _merged(records, new):
  """The records with `new`, a record of one seed, in that of the same row or as the last."""
  def row(record):
    return [record.get(key) for key in ('cell', 'metric', 'order', 'N')]

  old = next((record for record in records if row(record) == row(new)), None)
  if old is None:
    return [*records, {**new, **spread(new['values'])}]
  check_commit([old['commit']], new['commit'], name=new['cell'])
  values = [*old['values'], *new['values']]
  record = {**old, 'values': values, 'seeds': [*old['seeds'], *new['seeds']], **spread(values)}
  if 'detail' in old:
    record['detail'] = _joined(old['detail'], new['detail'])
  return [record if other is old else other for other in records]


def _joined(old, new):
  """The detail of several seeds and that of one more; curves and speed are of the first."""
  n = len(old['wall_seconds'])
  return {**old, **{name: mean(old[name], new[name], n) for name in runs.AVERAGED if name in old},
          'wall_seconds': [*old['wall_seconds'], *new['wall_seconds']]}


def mean(old, new, n: int):
  """The mean over n + 1 seeds of nested numbers, from that over n and the next, None unless all are
  known; all else stays."""
  if isinstance(old, dict):
    return {key: mean(value, new[key], n) for key, value in old.items()}
  if isinstance(old, list):
    return [mean(a, b, n) for a, b in zip(old, new, strict=True)]
  if not isinstance(old, float):
    return old
  return None if new is None else (old * n + new) / (n + 1)
