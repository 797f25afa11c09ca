"""Rewrites results.json files of before records had a schema, and shows that no number changed.

    python benchmarks/convert_results.py [results/table1/results.json ...]

Without arguments all of results/. A file that is of today's schema already is left alone. What was
said by names ('left/N=100' of network 'gapnet/location/3x3', 'augshift,weight=3/cifar10') stands
in fields of its own afterwards: gapjax/records/schema.py. Every number of every record is compared,
read back from the new file, before the old one is replaced. To be deleted with the last old file.
"""

import json
import pathlib
import re
import sys

from gapjax.errors import UsageError
from gapjax.records import runs, schema
from gapjax.reproduce import records as new_records

ROOT = pathlib.Path(__file__).parent.parent
VARIED = re.compile(r'(permute_at|padding)=(\w+)/(\w+)/(?:location/)?\d+x\d+')
RENAMED = {'canvas_size': 'input_size'}  # of a detail
EQUAL = ('suite', 'scale', 'changes', 'metric', 'values', 'seeds', 'mean', 'std', 'n', 'paper',
         'torch', 'chance')


def convert(records: list[dict]) -> list[dict]:
  """Records of today's schema from those of before, in their order.

  Raises UsageError where the seeds of a record are of several commits.
  """
  configs, found = {}, []
  for record in records:
    cell = record.get('network', record['cell'])
    config = configs.setdefault(cell, record.get('config'))
    commits = set(record.get('commits', [None]))
    if len(commits) > 1:
      raise UsageError(f'{cell}: seeds of several commits: {", ".join(map(str, commits))}')
    fields = fields_of(cell, config)
    about = {'schema': schema.SCHEMA,
             **{key: record[key] for key in ('suite', 'scale', 'changes') if key in record},
             'cell': schema.cell_name(fields), **fields}
    if 'network' in record:
      order, _, count = record['cell'].partition('/N=')
      about |= {'order': order, 'N': int(count)}
    rest = {key: value for key, value in record.items()
            if key not in ('cell', 'network', 'commits', *about)}
    if 'detail' in rest:
      rest['detail'] = {RENAMED.get(key, key): value for key, value in rest['detail'].items()}
    found.append({**about, **rest, 'commit': commits.pop(),
                  **({} if 'N' in about else runs.protocol(record['metric'], config)),
                  'config': config})
  return found


def fields_of(name: str, config: dict) -> dict:
  """What a cell's old name says, and its config."""
  asked = ({'target': config['canvas']['target'], 'grid': config['canvas']['grid']}
           if config['task'] == 'canvas' else {})
  if match := VARIED.fullmatch(name):
    field, value, series = match.groups()
    identity = {field: value, **({'network': series} if field == 'padding' else {})}
  else:
    network, *settings = name.partition('/')[0].split(',')
    identity = {'network': network}
    for setting in settings:
      key, _, value = setting.partition('=')
      identity[key] = config['augshift'][key]
      if identity[key] != float(value):
        raise UsageError(f'{name} was trained with augshift.{key}={identity[key]}')
  return {'task': config['task'], **identity, **asked, 'dataset': config['data']['name']}


def compare(before: list[dict], after: list[dict]) -> int:
  """How many numbers are equal; raises AssertionError on the first that is not."""
  def numbers(value):
    if isinstance(value, dict):
      return sum(map(numbers, value.values()))
    return sum(map(numbers, value)) if isinstance(value, list) else isinstance(value, int | float)

  count = 0
  for old, new in zip(before, after, strict=True):
    assert old.get('protocol') in (None, new.get('protocol'))
    pairs = [(old.get(key), new.get(key)) for key in EQUAL]
    pairs += [(value, new['detail'][RENAMED.get(key, key)])
              for key, value in old.get('detail', {}).items()]
    for here, there in pairs:
      assert here == there, (old['cell'], old['metric'], here, there)
      count += numbers(here)
  return count


def main():
  for path in map(pathlib.Path, sys.argv[1:] or sorted(ROOT.glob('results/*/results.json'))):
    before = json.loads(path.read_text())
    if not isinstance(before, list) or any('schema' in record for record in before):
      print(f'{path}: nothing to do')
      continue
    new = path.with_name('results.json.new')
    new_records.write(new, convert(before))
    count = compare(before, schema.read(new))
    new.replace(path)
    print(f'{path}: {len(before)} records, {count:,} numbers, none changed')


if __name__ == '__main__':
  try:
    main()
  except UsageError as error:
    sys.exit(str(error))
