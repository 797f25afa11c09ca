"""From JSON on disk to a report a stranger can read: report.md, report.html and PNGs.

A report is a list of sections. Each function in `SECTIONS` looks at the `Source` and returns one
`Section` (text, facts, tables, pictures) or None when it has nothing to say; Markdown and HTML are
both rendered from that list. A new figure of the paper is one more function in `SECTIONS`. Nothing
here depends on the clock: the same JSON gives the same bytes.
"""

import base64
import dataclasses
import html
import json
import math
import pathlib
import re
import struct

from gapjax import plots
from gapjax.errors import UsageError

DASH = '\N{EN DASH}'
CELL = re.compile(r'(gapnet|permutenet|permutenet_fixed)/(location|image)/(\d+)x\3')
FRACTION = re.compile('accuracy|consistency|miou|chance')
PAPER = ('Islam, Kowal, Jia, Derpanis, Bruce: Global Pooling, More than Meets the Eye: Position '
         'Information is Encoded Channel-Wise in CNNs. ICCV 2021, arXiv 2108.07884')
SCALES = {'digits': 'small handwritten digits in place of CIFAR-10, and a narrow network',
          'small': 'a narrower network and a shorter schedule than the paper'}


@dataclasses.dataclass(frozen=True)
class Table:
  """Cells are plain strings; the first `text` columns are text, the others numbers.

  `breaks` names the rows that start a new block; `strong` the columns that hold our own numbers.
  """
  head: list
  rows: list
  text: int = 1
  caption: str = ''
  breaks: frozenset = frozenset()
  strong: frozenset = frozenset()


@dataclasses.dataclass(frozen=True)
class Picture:
  """A PNG in the report's folder, and its version for a dark page if it has one."""
  path: pathlib.Path
  alt: str
  caption: str
  dark: pathlib.Path | None = None


@dataclasses.dataclass(frozen=True)
class Section:
  """What one section holds, in this order; `facts` are (number, what it is) in large type."""
  heading: str
  text: list = ()
  facts: list = ()
  code: str = ''
  tables: list = ()
  pictures: list = ()
  bullets: list = ()


@dataclasses.dataclass(frozen=True)
class Source:
  """What was found in a workdir. `summary` is set for a single run, `records` for a suite."""
  workdir: pathlib.Path
  records: list = ()
  run: dict = dataclasses.field(default_factory=dict)
  summary: dict | None = None
  cells: list = ()


# --- reading ---------------------------------------------------------------------------------


def _parse(text, path, line=1):
  try:
    return json.loads(text)
  except json.JSONDecodeError as error:
    raise UsageError(f'{path} line {line + error.lineno - 1} is not JSON ({error.msg}); '
                     'delete the file and run again') from None


def _read(path, kind):
  """The JSON in `path`, which must be of type `kind`."""
  try:
    value = _parse(path.read_text(encoding='utf-8'), path)
  except UnicodeDecodeError:
    raise UsageError(f'{path} is not UTF-8 text; delete the file and run again') from None
  if not isinstance(value, kind):
    raise UsageError(f'{path} line 1 should hold a JSON {"list" if kind is list else "object"}; '
                     'delete the file and run again')
  return value


def _load(workdir):
  run = _read(workdir / 'run.json', dict) if (workdir / 'run.json').exists() else {}
  if (workdir / 'results.json').exists():
    records = _read(workdir / 'results.json', list)
    for i, record in enumerate(records):
      for key in ('cell', 'metric', 'mean'):
        if not isinstance(record, dict) or key not in record:
          raise UsageError(f'{workdir / "results.json"} entry {i} has no `{key}`; '
                           'delete the entry and run again')
    return Source(workdir, records=records, run=run, cells=_cells(records))
  if (workdir / 'summary.json').exists():
    summary = _read(workdir / 'summary.json', dict)
    return Source(workdir, run=run, summary=summary, cells=[_run_cell(workdir, summary)])
  raise UsageError(f'{workdir} holds neither results.json nor summary.json; '
                   'give the --workdir of a `gapjax reproduce`, `quickstart` or `train`')


def _cells(records):
  """What the pictures need, from the records that carry a detail."""
  cells = {}
  for record in records:
    match, detail = CELL.fullmatch(record['cell']), record.get('detail') or {}
    if match and detail:
      network, target, grid = match.groups()
      curve = detail.get('curves') or {}
      cells[record['cell']] = plots.Cell(
        network, target, int(grid), _chance(target, int(grid), detail), detail.get('per_location'),
        curve.get('train_loss') or [], curve.get('eval_accuracy') or [])
  return sorted(cells.values(), key=plots.order)


def _chance(target, grid, detail):
  return 1 / grid ** 2 if target == 'location' else detail.get('chance')


def _run_cell(workdir, summary):
  """A single run as a cell; its curves come from metrics.jsonl."""
  config = summary.get('config') or {}
  path, curve = workdir / 'metrics.jsonl', {'train': [], 'eval': []}
  lines = path.read_text(encoding='utf-8').split('\n') if path.exists() else []
  for number, line in enumerate(lines, 1):
    if line.strip():
      point = _parse(line, path, number)
      key = 'loss' if point.get('split') == 'train' else 'accuracy'
      if key in point and 'step' in point:
        curve.get(point.get('split'), []).append((point['step'], point[key]))
  model = config.get('model') or {}
  per_location = summary.get('per_location')
  grid = len(per_location) if per_location else config.get('grid')
  target = str(config.get('target', 'accuracy'))
  chance = _chance(target, grid, summary) if grid else summary.get('chance')
  network = str(config.get('network') or model.get('head') or model.get('name') or 'network')
  return plots.Cell(network, target, grid, chance, per_location, curve['train'], curve['eval'])


# --- numbers ---------------------------------------------------------------------------------


def _number(value, metric='accuracy'):
  """Fractions in percent with one decimal, anything else with four digits."""
  if value is None:
    return DASH
  return f'{100 * value:.1f}' if FRACTION.search(metric) else f'{value:.4g}'


def _ours(record):
  """'99.7 +- 0.1 (3)': mean, sample standard deviation, seeds."""
  if not record or record['mean'] is None:
    return DASH
  metric, std = record['metric'], record.get('std')
  spread = '' if std is None else f' \N{PLUS-MINUS SIGN} {_number(std, metric)}'
  return f'{_number(record["mean"], metric)}{spread} ({record.get("n", 1)})'


def _first(records, key):
  return next((r[key] for r in records if r and r.get(key) is not None), None)


def _suite(record):
  return ', '.join(str(record[key]) for key in ('suite', 'scale') if record.get(key))


def _result_tables(records):
  """The tables of a suite: the canvas cells in one, whatever else there is in a plain one."""
  canvas, other = {}, []
  for record in records:
    if CELL.fullmatch(record['cell']):
      canvas.setdefault((_suite(record), record['cell']), {})[record['metric']] = record
    else:
      other.append(record)
  tables = [_canvas_table(canvas)] if canvas else []
  return [*tables, _plain_table(other)] if other else tables


def _canvas_table(cells):
  """cells: {(suite, cell): {metric: record}}; the paper's number stands next to its protocol."""
  torch = any(r.get('torch') is not None for found in cells.values() for r in found.values())
  several = len({suite for suite, _ in cells}) > 1
  lines = []
  for (suite, name), found in cells.items():
    network, target, grid = CELL.fullmatch(name).groups()
    exact = found.get(f'{target}_accuracy')
    best = found.get(f'{target}_accuracy_best_random')
    detail = next((r['detail'] for r in (exact, best) if r and r.get('detail')), {})
    row = [*([suite] if several else []), plots.NETWORKS[network], target,
           f'{grid}{plots.TIMES}{grid}', _number(_first((best, exact), 'paper')),
           *([_number(_first((best, exact), 'torch'))] if torch else []),
           _ours(best), _ours(exact), _number(_chance(target, int(grid), detail))]
    key = plots.order(plots.Cell(network, target, int(grid)))
    lines.append(((suite, *key), row))
  lines.sort(key=lambda line: line[0])
  breaks = {i for i in range(1, len(lines)) if lines[i][0][:-1] != lines[i - 1][0][:-1]}
  head = [*(['suite'] if several else []), 'network', 'target', 'grid', 'paper',
          *(['PyTorch'] if torch else []), 'best epoch, random placement',
          'every location, final weights', 'chance']
  return Table(
    head, [row for _, row in lines], text=3 + several, breaks=frozenset(breaks),
    strong=frozenset({len(head) - 3, len(head) - 2}),
    caption='In percent. gapjax: mean \N{PLUS-MINUS SIGN} sample standard deviation (seeds). The '
    'paper quotes the best epoch under random placement; the stricter column places every test '
    'image at every location with the final weights.')


def _plain_table(records):
  torch = any(r.get('torch') is not None for r in records)
  several = len({_suite(r) for r in records}) > 1
  head = [*(['suite'] if several else []), 'cell', 'metric', 'paper',
          *(['PyTorch'] if torch else []), 'gapjax']
  rows = [[*([_suite(r)] if several else []), r['cell'], r['metric'],
           _number(r.get('paper'), r['metric']),
           *([_number(r.get('torch'), r['metric'])] if torch else []), _ours(r)] for r in records]
  return Table(head, rows, text=2 + several, strong=frozenset({len(head) - 1}),
               caption='Accuracy, consistency and mIoU in percent. gapjax: mean '
               '\N{PLUS-MINUS SIGN} sample standard deviation (seeds).')


def table(records):
  """The results as Markdown, for a report, a terminal or a README.

  Args:
    records: a suite's results.json: dicts with `cell`, `metric`, `mean`, and if known `paper`,
      `torch`, `std`, `n`, `suite`, `scale`, `detail`; fractions in [0, 1].

  Returns:
    One Markdown table, percent with one decimal; the canvas cells (the paper's section 3) one row
    a cell with both protocols, other suites one row a record in a table of their own.
  """
  return '\n\n'.join(_markdown_table(part) for part in _result_tables(records))


# --- sections: Source, folder for pictures -> Section or None --------------------------------


def _results(source, folder):
  del folder  # no pictures
  if not source.records:
    return None
  exact, facts = {}, []
  for record in source.records:
    match = CELL.fullmatch(record['cell'])
    if match and record['metric'] == 'location_accuracy' and record['mean'] is not None:
      exact[int(match[3]), match[1]] = record['mean']
  for k in sorted({k for k, _ in exact}):
    grid = f'{k} {plots.TIMES} {k} grid'
    for network in ('gapnet', 'permutenet'):
      if (k, network) in exact:
        facts.append((f'{_number(exact[k, network])}%',
                      f'location found by {plots.NETWORKS[network]}, {grid}'))
    facts.append((f'{100 / k ** 2:.1f}%', f'guessing, {grid}'))
  scales = {r.get('scale') for r in source.records} & set(SCALES)
  text = [f'This run uses {SCALES[scale]}, so compare the order of the rows with the '
          "paper's, not the digits." for scale in sorted(scales)]
  return Section('Results', text=text, facts=facts, tables=_result_tables(source.records))


def _run_results(source, folder):
  del folder
  if source.summary is None:
    return None
  final, best = (source.summary.get(key) or {} for key in ('final', 'best'))
  # Both are {metric: number}; `best` may also say at which step, which is no result.
  names = [name for name in dict.fromkeys([*final, *best])
           if any(isinstance(part.get(name), int | float) for part in (final, best))]
  rows = [[name, *(_number(part.get(name), name) for part in (final, best))] for name in names]
  return Section('Results', tables=[Table(['metric', 'final', 'best'], rows, strong=frozenset({1}),
                                          caption='Accuracies in percent.')])


def _samples(source, folder):
  """Training's own pictures, copied so that the folder stands alone."""
  found = [p for p in (source.workdir / 'samples').glob('*x*.png')
           if re.fullmatch(r'(\d+)x\1', p.stem)]
  found = sorted(found, key=lambda p: int(p.stem.split('x')[0]))
  found += [p for p in [source.workdir / 'canvas.png'] if source.summary and p.exists()]
  pictures = []
  for path in found:
    data = path.read_bytes()
    if not data.startswith(b'\x89PNG\r\n\x1a\n'):
      raise UsageError(f'{path} is not a PNG; delete the file and run again')
    copy = folder / f'canvas_{path.stem}.png' if path.stem != 'canvas' else folder / 'canvas.png'
    copy.write_bytes(data)
    grid = path.stem.replace('x', f' {plots.TIMES} ') if 'x' in path.stem else ''
    name = f'Samples on the {grid} canvas' if grid else 'Samples of the canvas'
    pictures.append(Picture(copy, name, f'{name}. Thin lines mark the locations.'))
  return Section('What the network sees', text=[
    'Each image stands at one random place on an otherwise empty canvas. The location networks '
    'must name the place, the image networks what stands there.'],
                 pictures=pictures) if pictures else None


def _both(draw, cells, path, *, alt, caption):
  """Draws the light and the dark version."""
  dark = path.with_stem(f'{path.stem}-dark')
  draw(cells, path)
  draw(cells, dark, dark=True)
  return Picture(path, alt, caption, dark)


def _heatmaps(source, folder):
  if all(cell.per_location is None for cell in source.cells):
    return None
  return Section('Where it succeeds', pictures=[_both(
    plots.location_heatmaps, source.cells, folder / 'locations.png',
    alt='Accuracy at every location of the canvas, one map a network',
    caption='Accuracy in percent at every location, every test image at every place, mean over '
    'seeds; beside each name the mean over locations.')])


def _curves(source, folder):
  if not any(len(c.train_loss) or len(c.eval_accuracy) for c in source.cells):
    return None
  who = 'first seed' if source.records else 'this run'
  return Section('How it learned', pictures=[_both(
    plots.curves, source.cells, folder / 'curves.png',
    alt='Training loss and evaluation accuracy against the training step',
    caption=f'Training loss and evaluation accuracy, {who}; the dotted line is guessing.')])


def _seconds(value):
  minutes = round(value) // 60
  if minutes >= 60:
    return f'{minutes // 60} h {minutes % 60} min'
  return f'{minutes} min {round(value) % 60} s' if minutes else f'{value:.1f} s'


def _mean_seconds(value):
  values = value if isinstance(value, list) else [value]
  return _seconds(sum(values) / len(values)) if values else DASH


# What a record's detail says about training, its label, and how to print it.
DETAIL = [('model', 'model', str), ('parameters', 'parameters', '{:,}'.format),
          ('train_images', 'training images', '{:,}'.format),
          ('test_images', 'test images', '{:,}'.format), ('canvas_size', 'canvas, pixels', str),
          ('epochs', 'epochs', str), ('steps', 'steps', '{:,}'.format),
          ('batch_size', 'batch', str), ('seeds', 'seeds', lambda v: ', '.join(map(str, v))),
          ('wall_seconds', 'time a seed', _mean_seconds),
          ('images_per_second', 'images/s', '{:,.0f}'.format), ('config_hash', 'config', str)]


def _how(source, folder):
  """What is the same everywhere goes into one list, what differs into a row a cell."""
  del folder
  about = source.summary or source.run
  rows = [[name, str(about[key])] for key, name in (('device', 'device'), ('step', 'steps'))
          if about.get(key) is not None]
  rows += [['duration', _seconds(about['wall_seconds'])]] if about.get('wall_seconds') else []
  if about.get('images_per_second'):
    rows.append(['images/s', f'{about["images_per_second"]:,.0f}'])
  if about.get('versions'):
    rows.append(['versions', ', '.join(f'{k} {v}' for k, v in about['versions'].items())])
  trained = [{**r['detail'], **{k: r[k] for k in ('seeds', 'config_hash') if k in r},
              'cell': r['cell']} for r in source.records if r.get('detail')]
  differ = []
  for key, name, show in DETAIL:
    said = [show(t[key]) if t.get(key) is not None else DASH for t in trained]
    if len(set(said)) == 1 and said[0] != DASH:
      rows.append([name, said[0]])
    elif len(set(said)) > 1:
      differ.append((name, said))
  tables = [Table(['', ''], rows, text=2)] if rows else []
  if differ:
    lines = [[t['cell'], *(said[i] for _, said in differ)] for i, t in enumerate(trained)]
    tables.append(Table(['cell', *(name for name, _ in differ)], lines))
  if source.summary:
    tables.append(Table(['config field', 'value'], _flat(source.summary.get('config') or {}),
                        text=2))
  return Section('How it was made', code=str(source.run.get('command', '')), tables=tables,
                 bullets=[str(note) for note in source.run.get('notes') or []])


def _flat(config, prefix=''):
  """[['optimizer.lr', '0.001'], ...]: the names that --config.optimizer.lr= takes."""
  rows = []
  for key, value in config.items():
    rows += (_flat(value, f'{prefix}{key}.') if isinstance(value, dict)
             else [[f'{prefix}{key}', json.dumps(value, ensure_ascii=False)]])
  return rows
