"""Every cell of a table or figure: run over seeds, resumable, written as it finishes."""

import dataclasses
import logging
import pathlib
import statistics
import time

from ml_collections import ConfigDict

from gapjax import config as configs
from gapjax import report, workdirs
from gapjax.system import versions
from gapjax.train import train

log = logging.getLogger(__name__)

GRIDS = (3, 5, 7)
TARGETS = ('location', 'image')
# Table 1 of the paper: {(network, target): {grid: fraction}}; 5x5 was not published.
PAPER = {
  ('gapnet', 'location'): {3: 1.0, 7: 1.0},
  ('permutenet', 'location'): {3: 0.788, 7: 0.214},
  ('gapnet', 'image'): {3: 0.826, 7: 0.821},
  ('permutenet', 'image'): {3: 0.736, 7: 0.699},
}
NETWORKS = {
  'gapnet': dict(head='gap'),
  'permutenet': dict(head='permuted', permutation='batch'),
  'permutenet_fixed': dict(head='permuted', permutation='fixed'),
}


@dataclasses.dataclass(frozen=True)
class Cell:
  """One cell of a table: a network trained once a seed.

  name: 'gapnet/location/3x3'. paper: the published fraction under the authors' protocol, or None.
  """
  name: str
  config: ConfigDict
  paper: float | None = None


def canvas_cell(network: str, target: str, grid: int, base: ConfigDict) -> Cell:
  """A network (a key of NETWORKS), target and grid over a base config."""
  config = ConfigDict(base.to_dict())
  config.model.update(NETWORKS[network])
  config.canvas.update(grid=grid, target=target)
  paper = PAPER.get((network, target), {}).get(grid)
  return Cell(f'{network}/{target}/{grid}x{grid}', config, paper)


def digits() -> ConfigDict:
  """The quickstart's recipe: scikit-learn's digits, a narrow ResNet-10, seconds an epoch."""
  c = configs.default()
  c.num_epochs = 24
  c.data.update(name='digits', image_size=16, flip=False)
  c.model.update(name='resnet10', width=16)
  c.optimizer.lr = 2e-3
  c.schedule.update(name='cosine', warmup_epochs=1.0)
  c.eval.update(batch_size=200, every_epochs=4)
  c.checkpoint.update(every_epochs=12.0)
  return c


def quickstart_cells(scale: str) -> list[Cell]:
  """Claim 1 on digits: GAPNet and PermuteNet, location and image, and the fixed control."""
  base = digits()
  if scale == 'tiny':  # for continuous integration: shows that it runs, not what it finds
    base.num_epochs = 2
    base.data.image_size = 8
    base.model.width = 8
    base.eval.update(images=100, every_epochs=1)
  cells = [('gapnet', 'location'), ('permutenet', 'location'), ('permutenet_fixed', 'location'),
           ('gapnet', 'image'), ('permutenet', 'image')]
  return [canvas_cell(network, target, 3, base) for network, target in cells]


def table1_cells(scale: str) -> list[Cell]:
  """{GAPNet, PermuteNet} x {location, image} x {3x3, 5x5, 7x7} on CIFAR-10 (table 1).

  Scale 'small' is width 16, images shrunk to 16x16, the first 10,000 training and 500 test images,
  and 10, 6 and 4 epochs with cosine decay: it shows the ordering in about an hour on 2 cores, not
  the paper's numbers.
  """
  base = configs.default()
  if scale == 'small':
    base.data.update(image_size=16, train_images=10_000)
    base.model.width = 16
    base.schedule.name = 'cosine'
    base.eval.images = 500
  cells = [canvas_cell(network, target, grid, base)
           for grid in GRIDS for target in TARGETS for network in ('gapnet', 'permutenet')]
  for cell in cells:
    if scale == 'small':
      cell.config.num_epochs = {3: 10, 5: 6, 7: 4}[cell.config.canvas.grid]
    else:  # the exact evaluation of 7x7 is 490,000 canvases
      cell.config.eval.batch_size = 500
  return cells


SUITES = {'quickstart': quickstart_cells, 'table1': table1_cells}


def run(suite: str, *, scale: str, seeds: int, workdir, data_dir=None, command: str,
        published=None, progress: bool = True) -> pathlib.Path:
  """Trains what no results.json holds yet, cell by cell, then builds the report.

  Args:
    suite: a key of SUITES.
    scale: which of its scales.
    seeds: trains with seeds 0 to seeds - 1.
    workdir: cells are trained in `workdir/cells/CELL/seedN`; `workdir/results.json` is written
      after each.
    data_dir: where datasets are; None is TFDS' default.
    command: what the report says made it.
    published: another results.json whose cells count as trained, if it exists.
    progress: whether to show progress bars.

  Returns:
    The path of report.html.
  """
  workdir, start = pathlib.Path(workdir), time.perf_counter()
  cells = SUITES[suite](scale)
  records = known_records([workdir / 'results.json', *([published] if published else [])], cells)
  workdir.mkdir(parents=True, exist_ok=True)
  previous = workdirs.read_json(workdir / 'run.json') if (workdir / 'run.json').exists() else {}
  # Seeds outside, so that every cell has a value before any has a second one.
  for seed in range(seeds):
    for number, cell in enumerate(cells, 1):
      if any(holds(record, cell) and seed in record['seeds'] for record in records):
        continue
      log.warning('%s seed %d (cell %d of %d)', cell.name, seed, number, len(cells))
      config = ConfigDict(cell.config.to_dict())
      config.seed = seed
      folder = workdir / 'cells' / cell.name / f'seed{seed}'
      summary = train(config, workdir=folder, data_dir=data_dir, progress=progress)
      records = add(records, suite, scale, cell, seed, summary,
                    workdirs.read_lines(folder / 'metrics.jsonl'))
      keep_samples(folder / 'canvas.png', workdir / 'samples', cell.config.canvas.grid)
      workdirs.write_json(workdir / 'results.json', records)
      workdirs.write_json(workdir / 'run.json', {
        'command': command, 'device': summary['device'], 'versions': versions(),
        'wall_seconds': previous.get('wall_seconds', 0.0) + time.perf_counter() - start})
  workdirs.write_json(workdir / 'results.json', records)
  return report.build(workdir)


def known_records(paths, cells) -> list[dict]:
  """Records of these cells in several results.json files; an earlier file has precedence."""
  records = []
  for path in map(pathlib.Path, paths):
    known = workdirs.read_json(path, list) if path.exists() else []
    new = [r for r in known if any(holds(r, cell) for cell in cells) and
           not any((r['cell'], r['metric']) == (o['cell'], o['metric']) for o in records)]
    for name in dict.fromkeys(record['cell'] for record in new):
      log.warning('%s is known from %s', name, path)
    records += new
  return records


def holds(record, cell) -> bool:
  """Whether a record is of this cell, trained with this config (but for the seed)."""
  return record.get('cell') == cell.name and 'config' in record and not [
    field for field in configs.difference(cell.config, record['config'])
    if not field.startswith('seed ')]


def add(records, suite, scale, cell, seed, summary, lines) -> list[dict]:
  """The records with one more seed of a cell, from its summary and metrics."""
  target = cell.config.canvas.target
  values = {f'{target}_accuracy': summary['final'][f'{target}_accuracy'],
            f'{target}_accuracy_best_random': summary['best'][f'{target}_accuracy_best_random']}
  records = list(records)
  for metric, value in values.items():
    old = next((r for r in records if r['metric'] == metric and holds(r, cell)), None)
    record = {
      'suite': suite, 'scale': scale, 'cell': cell.name, 'metric': metric,
      'paper': cell.paper if metric.endswith('_best_random') else None, 'torch': None,
      'values': [*(old['values'] if old else []), value],
      'seeds': [*(old['seeds'] if old else []), seed]}
    numbers = record['values']
    record |= {'mean': statistics.fmean(numbers), 'n': len(numbers),
               'std': statistics.stdev(numbers) if len(numbers) > 1 else None,
               'config': configs.as_json(cell.config)}
    if not metric.endswith('_best_random'):
      record['detail'] = detail(old['detail'] if old else None, summary, lines)
    if old:
      records[records.index(old)] = record
    else:
      records.append(record)
  return records


def detail(old, summary, lines) -> dict:
  """What the report's pictures and footnotes need; curves are of the first seed."""
  config = ConfigDict(summary['config'])
  if old:
    n = len(old['wall_seconds'])
    mean = [[(a * n + b) / (n + 1) for a, b in zip(row, new, strict=True)]
            for row, new in zip(old['per_location'], summary['per_location'], strict=True)]
    return {**old, 'per_location': mean,
            'wall_seconds': [*old['wall_seconds'], summary['wall_seconds']]}
  return {
    'per_location': summary['per_location'],
    'curves': {
      'train_loss': [[l['step'], l['loss']] for l in lines if l['split'] == 'train'],
      'eval_accuracy': [[l['step'], l['accuracy']] for l in lines if l['split'] == 'eval']},
    'wall_seconds': [summary['wall_seconds']],
    'images_per_second': summary['images_per_second'], 'epochs': config.num_epochs,
    'steps': summary['step'], 'batch_size': config.batch_size,
    'model': f'{config.model.name} width {config.model.width}',
    **summary['sizes']}


def keep_samples(picture, folder, grid) -> None:
  """Copies the canvas samples of the first run of each grid to folder/KxK.png."""
  target = folder / f'{grid}x{grid}.png'
  if not target.exists():
    folder.mkdir(parents=True, exist_ok=True)
    workdirs.write_bytes(target, picture.read_bytes())
