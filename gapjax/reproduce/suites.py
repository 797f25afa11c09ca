"""Every cell of a table or figure: run over seeds, resumable, written as it finishes."""

import dataclasses
import datetime
import fnmatch
import logging
import operator
import statistics
import time

from ml_collections import ConfigDict

from gapjax import config as configs
from gapjax import paths
from gapjax.errors import UsageError, check_choice
from gapjax.neurons.run import attack_run
from gapjax.report import page as report
from gapjax.report.plots import neurons as pictures
from gapjax.reproduce.cells import SCALES, SUITES, Cell
from gapjax.tasks import TASKS
from gapjax.training import workdirs
from gapjax.training.system import versions
from gapjax.training.train import train
from gapjax.weights.files import require_torch

log = logging.getLogger(__name__)

# What a detail averages over seeds; its other fields are of the first.
AVERAGED = ('per_location', 'shifts', 'per_class')
# Fields that the names of cells say: changed, a row of the table would be called what it is not.
NAMED = {'task', 'data.name', 'canvas.grid', 'canvas.target'}
# What the report shows of a run, beside its samples.
PICTURES = ('predictions.png', 'activations.png', 'attack_scenes.png')


def run(suite: str, *, scale: str, seeds: int, workdir, data_dir=None, command: str,
        only: str | None = None, changes=(), published=None, with_torch: bool = False,
        progress: bool = True):
  """Trains what no results.json holds yet, cell by cell, then builds the report.

  Args:
    suite: a key of SUITES.
    scale: one of its SCALES.
    seeds: trains with seeds 0 to seeds - 1.
    workdir: cells are trained in `workdir/cells/CELL/seedN`; `workdir/results.json` is written
      after each.
    data_dir: where datasets are; None is TFDS' default.
    command: what the report says made it, below the earlier commands of this workdir.
    only: trains only the cells whose names match one of these patterns, parted by spaces.
    changes: flags '--config.FIELD=VALUE' that set a field of every cell.
    published: another results.json whose cells count as trained, if it exists; what made them is
      told by the run.json beside it.
    with_torch: trains the PyTorch twin of every cell too, in `workdir/cells/CELL/seedN/torch`.
    progress: whether to show progress bars.

  Returns:
    The path of report.html.
  """
  workdir = paths.of(workdir)
  check_choice(scale, SCALES[suite], what=f'scale of {suite}')
  every = changed(SUITES[suite](scale), changes, only=only)
  cells = chosen(every, only)
  if with_torch and paths.is_remote(workdir):
    raise UsageError(f'--with_torch trains in a local folder only, not in {workdir}; leave it out, '
                     'or give another --workdir')
  train_twin = twin_of() if with_torch else None
  for c in (cell.config for cell in cells):  # before hours of training, not after
    TASKS[c.task].check_data(c, data_dir=data_dir)
  with workdirs.lock(workdir):  # results.json is read once, and written after every cell
    own = workdir / 'results.json'
    check_records(own, every)
    records = known_records([own, *([published] if published else [])], every)
    if len(records) > len(read_records(own)):
      borrow(paths.of(published).parent, workdir)
    _train(cells, records, suite=suite, scale=scale, seeds=seeds, workdir=workdir,
           data_dir=data_dir, command=command, train_twin=train_twin, progress=progress)
    return report.build(workdir)


def borrow(source, workdir) -> None:
  """What tells how the cells of another suite's folder were made: its run.json, if workdir has none
  yet, and the pictures that workdir has not."""
  paths.make(workdir / 'samples')
  folder = source / 'samples'
  for name in ('run.json', *(f'samples/{path.name}' for path in (
      sorted(folder.iterdir()) if folder.is_dir() else ()))):
    if (source / name).exists() and not (workdir / name).exists():
      paths.write_bytes(workdir / name, (source / name).read_bytes())


def _train(cells, records, *, suite, scale, seeds, workdir, data_dir, command, train_twin,
           progress):
  """Trains what `records` do not hold, and writes them and run.json after each."""
  start = time.perf_counter()
  previous = paths.read_json(workdir / 'run.json') if (workdir / 'run.json').exists() else {}
  # Seeds outside, so that every cell has a value before any has a second one.
  for seed in range(seeds):
    for number, cell in enumerate(cells, 1):
      known = [r for r in records if holds(r, cell) and seed in r['seeds']]
      trained = any('network' not in record for record in known)
      attacked = not cell.attack or any('network' in record for record in known)
      twinned = not train_twin or any(
        seed in torch_seeds(record) for record in records if holds(record, cell))
      if trained and attacked and twinned:
        continue
      log.warning('%s seed %d (cell %d of %d)', cell.name, seed, number, len(cells))
      config = ConfigDict(cell.config.to_dict())
      config.seed = seed
      folder = workdir / 'cells' / cell.name / f'seed{seed}'
      if not (trained and attacked):
        summary = train(config, workdir=folder, data_dir=data_dir, progress=progress)
        if not trained:
          records = add(records, suite, scale, cell, seed, summary,
                        paths.read_lines(folder / 'metrics.jsonl'))
        if not attacked:
          attacked = attack_run(folder, data_dir=data_dir)
          pictures.save(folder, *attacked)
          records = add_attack(records, suite, scale, cell, seed, attacked.sweep,
                               chance=guessing(summary))
        keep_samples(folder, workdir / 'samples', cell.config)
        write_records(workdir / 'results.json', records)
      if not twinned:
        summary = train_twin(config, workdir=folder / 'torch', data_dir=data_dir,
                             progress=progress)
        records = add_torch(records, cell, seed, summary)
        write_records(workdir / 'results.json', records)
      today = datetime.date.today().isoformat()
      paths.write_json(workdir / 'run.json', {
        'began': previous.get('began', today), 'ended': today,
        'command': '\n'.join(dict.fromkeys([*previous.get('command', '').splitlines(), command])),
        'device': '; '.join(dict.fromkeys(filter(None, [
          *previous.get('device', '').split('; '), summary['device']]))),
        'versions': {**previous.get('versions', {}), **summary.get('versions', versions())},
        'wall_seconds': previous.get('wall_seconds', 0.0) + time.perf_counter() - start})
  write_records(workdir / 'results.json', records)


def chosen(cells, only: str | None) -> list[Cell]:
  """The cells whose names match one of the patterns in `only` ('augshift/* resnet18/cifar10').

  Raises UsageError, listing the names, when a pattern matches none.
  """
  if only is None:
    return cells
  patterns = only.split()
  for pattern in patterns or ['']:
    if not fnmatch.filter([cell.name for cell in cells], pattern):
      raise UsageError(f'--cells: no cell is named `{pattern}`; there are '
                       f'{", ".join(cell.name for cell in cells)}')
  return [cell for cell in cells if any(fnmatch.fnmatch(cell.name, p) for p in patterns)]


def changed(cells, changes, *, only=None) -> list[Cell]:
  """The cells with the fields that flags '--config.FIELD=VALUE' set.

  Raises UsageError on what cannot be, on the seed, and on a field in which those of the cells that
  `only` chooses differ: that is what the suite compares.
  """
  fields = configs.named_fields(changes)
  if 'seed' in fields:
    raise UsageError('--config.seed: a cell is trained with seeds 0 to --seeds - 1; use --seeds')
  for name in NAMED.intersection(fields):
    raise UsageError(f'--config.{name}: the names of the cells say it; choose some with --cells')
  found = [dataclasses.replace(
    cell, config=configs.with_fields(cell.config, changes),
    changes=tuple(change.partition('config.')[2] for change in changes)) for cell in cells]
  for name in fields:
    values = dict.fromkeys(repr(operator.attrgetter(name)(cell.config))
                           for cell in chosen(cells, only))
    if len(values) > 1:
      raise UsageError(f'--config.{name}: the cells differ in it ({", ".join(values)}); '
                       'choose some that do not with --cells')
  return found


def read_records(path) -> list[dict]:
  """The records of a results.json, each with its cell's config; none where there is no file."""
  records, found = paths.read_json(path, list) if path.exists() else [], {}
  for record in records:
    if 'config' in record:
      found.setdefault(trained_cell(record), {'config': record['config']})
  return [{**found.get(trained_cell(record), {}), **record} for record in records]


def write_records(path, records) -> None:
  """Writes results.json, with a cell's config in its first record alone."""
  seen, written = set(), []
  for record in records:
    again = trained_cell(record) in seen
    written.append({key: v for key, v in record.items() if not (again and key == 'config')})
    seen.add(trained_cell(record))
  paths.write_json(path, written)


def trained_cell(record) -> str:
  """The name of the cell that a record is of, also one of its attack."""
  return record.get('network', record.get('cell'))


def check_records(path, cells) -> None:
  """Raises UsageError when results.json holds anything but these cells: it would be lost."""
  for record in read_records(path):
    if not any(holds(record, cell) for cell in cells):
      raise UsageError(f'{path} holds {record.get("cell")} of another suite, scale or config; '
                       'use another --workdir')


def known_records(files, cells) -> list[dict]:
  """Records of these cells in several results.json files; an earlier file has precedence."""
  records = []
  for path in map(paths.of, files):
    there = {(trained_cell(r), r['cell'], r['metric']) for r in records}
    new = [r for r in read_records(path) if any(holds(r, cell) for cell in cells)
           and (trained_cell(r), r['cell'], r['metric']) not in there]
    for name in dict.fromkeys(map(trained_cell, new)):
      log.warning('%s is known from %s', name, path)
    records += new
  return records


def holds(record, cell) -> bool:
  """Whether a record is of this cell, trained with this config (but for the seed)."""
  return trained_cell(record) == cell.name and 'config' in record and not [
    field for field in configs.difference(cell.config, record['config'])
    if not field.startswith('seed ')]


def add(records, suite, scale, cell, seed, summary, lines) -> list[dict]:
  """The records with one more seed of a cell, from its summary and metrics."""
  records = list(records)
  for number, (metric, value) in enumerate(measured(summary).items()):
    old = next((r for r in records if (r['cell'], r['metric']) == (cell.name, metric)), None)
    numbers = [*(old['values'] if old else []), value]
    record = {
      'suite': suite, 'scale': scale, **said(cell), 'cell': cell.name, 'metric': metric,
      'paper': cell.paper.get(metric), 'torch': old.get('torch') if old else None,
      'values': numbers, 'seeds': [*(old['seeds'] if old else []), seed], **spread(numbers),
      'commits': [*(old.get('commits', []) if old else []), summary.get('commit')],
      'config': configs.as_json(cell.config)}
    if metric == 'consistency':
      record['protocol'] = summary['shifts']['protocol']
    if number == 0:
      record['detail'] = detail(old['detail'] if old else None, summary, lines)
    if old:
      records[records.index(old)] = record
    else:
      records.append(record)
  return records


def said(cell) -> dict:
  """What a record says of changes to its cell, if there are any."""
  return {'changes': list(cell.changes)} if cell.changes else {}


def measured(summary) -> dict[str, float]:
  """The metrics of a run, by their names in results.json."""
  return {name: value for part in ('final', 'best') for name, value in summary[part].items()
          if name not in ('loss', 'step')}


def spread(values) -> dict:
  """Mean, number and sample standard deviation (None of one) of the values of seeds."""
  return {'mean': statistics.fmean(values), 'n': len(values),
          'std': statistics.stdev(values) if len(values) > 1 else None}


def twin_of():
  """What trains a cell's PyTorch twin. Raises UsageError where PyTorch is not installed."""
  require_torch('--with_torch', 'leave it out')
  from gapjax.pytorch.train import train
  return train


def torch_seeds(record) -> list[int]:
  """The seeds with which the PyTorch twin of a record's cell is trained."""
  return (record.get('torch') or {}).get('seeds', [])


def add_torch(records, cell, seed, summary) -> list[dict]:
  """The records with one more seed of a cell's PyTorch twin: 'torch' holds 'values', 'seeds',
  'mean', 'n' and 'std', as the record does of gapjax's runs."""
  values, found = measured(summary), []
  for record in records:
    if record['cell'] == cell.name and record['metric'] in values:
      numbers = [*(record.get('torch') or {}).get('values', []), values[record['metric']]]
      record = {**record, 'torch': {
        'values': numbers, 'seeds': [*torch_seeds(record), seed], **spread(numbers)}}
    found.append(record)
  return found


def add_attack(records, suite, scale, cell, seed, sweep, *, chance=None) -> list[dict]:
  """The records with what one seed's attack left of a cell: cells such as 'left/N=100', whose
  'network' is the cell's name. Random orders have several values a seed. chance: of a classifier,
  what guessing gets."""
  records = list(records)
  for new in sweep.records():
    old = next((r for r in records if r.get('network') == cell.name
                and (r['cell'], r['metric']) == (new['cell'], new['metric'])), None)
    values = [*(old['values'] if old else []), *new['values']]
    known = [value for value in values if value is not None]
    record = {
      'suite': suite, 'scale': scale, **said(cell), 'network': cell.name, 'cell': new['cell'],
      'metric': new['metric'], 'paper': None, 'torch': None, 'values': values,
      'seeds': [*(old['seeds'] if old else []), seed], 'n': len(known),
      'mean': statistics.fmean(known) if known else None,
      'std': statistics.stdev(known) if len(known) > 1 else None,
      **({} if chance is None else {'chance': chance}), 'config': configs.as_json(cell.config)}
    if old:
      records[records.index(old)] = record
    else:
      records.append(record)
  return records


def guessing(summary):
  """A classifier's accuracy by guessing; None of a network that marks pixels."""
  return None if summary['config']['task'] == 'segmentation' else summary['sizes']['chance']


def detail(old, summary, lines) -> dict:
  """What the report's pictures and footnotes need; curves are of the first seed."""
  if old:
    n = len(old['wall_seconds'])
    return {**old, **{name: mean(old[name], summary[name], n) for name in AVERAGED if name in old},
            'wall_seconds': [*old['wall_seconds'], summary['wall_seconds']]}
  config = ConfigDict(summary['config'])
  evaluations = [line for line in lines if line['split'] == 'eval']
  curves = {
    'train_loss': [[line['step'], line['loss']] for line in lines if line['split'] == 'train'],
    **{f'eval_{name}': [[line['step'], line[name]] for line in evaluations]
       for name in ('accuracy', 'consistency') if name in evaluations[0]}}
  return {
    **{name: summary[name] for name in AVERAGED if name in summary}, 'curves': curves,
    'wall_seconds': [summary['wall_seconds']],
    'images_per_second': summary['images_per_second'], 'epochs': config.num_epochs,
    'steps': summary['step'], 'batch_size': config.batch_size,
    'model': ' '.join([config.model.name, *(
      [config.model.backbone] if config.task == 'segmentation' else []),
      f'width {config.model.width}']), **summary['sizes']}


def mean(old, new, n: int):
  """The mean over n + 1 seeds of nested numbers, from that over n and the next; all else stays."""
  if isinstance(old, dict):
    return {key: mean(value, new[key], n) for key, value in old.items()}
  if isinstance(old, list):
    return [mean(a, b, n) for a, b in zip(old, new, strict=True)]
  return (old * n + new) / (n + 1) if isinstance(old, float) else old


def keep_samples(run, folder, config) -> None:
  """Copies a run's pictures to folder: samples of the first run of each grid as KxK.png, of crops
  as 1x1.png; predictions of a segmentation network under their own names.

  Pairs of crops show more than single ones, and take their place.
  """
  paths.make(folder)
  if config.task == 'segmentation':
    for name in PICTURES:
      if (run / name).exists():
        paths.write_bytes(folder / name, (run / name).read_bytes())
    return
  pairs = config.task == 'classification' and config.augshift.crops == 2
  grid = config.canvas.grid if config.task == 'canvas' else 1
  target = folder / f'{grid}x{grid}.png'
  if not target.exists() or pairs:
    paths.write_bytes(target, (run / 'samples.png').read_bytes())
