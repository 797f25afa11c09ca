"""From JSON on disk to a report a stranger can read: report.md, report.html and PNGs.

A report is a list of sections. Each function in `SECTIONS` looks at the `Source` and returns one
`Section` (text, facts, tables, pictures) or None when it has nothing to say; Markdown and HTML are
both rendered from that list. A new figure of the paper is one more function in `SECTIONS`. Nothing
here depends on the clock: the same JSON gives the same bytes.
"""

import dataclasses
import json
import pathlib
import re

from gapjax import plots, workdirs
from gapjax.errors import UsageError
from gapjax.render import Page, Picture, Section, Table, html_page, markdown, markdown_table

DASH = '\N{EN DASH}'
CELL = re.compile(r'(gapnet|permutenet|permutenet_fixed)/(location|image)/(\d+)x\3')
# config.model.head -> the cell's network
HEADS = {'gap': 'gapnet', 'permuted': 'permutenet', 'linear': 'GAP and a linear layer'}
FRACTION = re.compile('accuracy|consistency|miou|chance')
PAPER = ('Islam, Kowal, Jia, Derpanis, Bruce: Global Pooling, More than Meets the Eye: Position '
         'Information is Encoded Channel-Wise in CNNs. ICCV 2021, arXiv 2108.07884.')
COMPARE = 'so compare the order of the rows with the paper\'s, not the values.'
SCALES = {
  'digits': 'This run uses small handwritten digits in place of CIFAR-10, a narrow network and a '
            f'few hundred steps, {COMPARE}',
  'small': 'This run uses a quarter of the width, 10,000 training and 500 test images shrunk to '
           f'16 x 16, and 10, 6 and 4 epochs with cosine decay, {COMPARE}',
  'tiny': 'This run shows that everything runs; its few steps show nothing else.'}


@dataclasses.dataclass(frozen=True)
class Source:
  """What was found in a workdir. `summary` is set for a single run, `records` for a suite."""
  workdir: pathlib.Path
  records: list = ()
  run: dict = dataclasses.field(default_factory=dict)
  summary: dict | None = None
  cells: list = ()


def _load(workdir):
  def read(name, kind):
    path = workdir / name
    return workdirs.read_json(path, kind) if path.exists() else None
  run, records = read('run.json', dict) or {}, read('results.json', list)
  if records == []:
    raise UsageError(f'{workdir / "results.json"} is empty: no cell has finished yet; run again')
  if records:
    for i, record in enumerate(records):
      for key in ('cell', 'metric', 'mean'):
        if not isinstance(record, dict) or key not in record:
          raise UsageError(f'{workdir / "results.json"} entry {i} has no `{key}`; run again')
    records = sorted(records, key=_place)
    return Source(workdir, records=records, run=run, cells=_cells(records))
  summary = read('summary.json', dict)
  if summary is None:
    raise UsageError(f'{workdir} holds neither results.json nor summary.json; '
                     'give the --workdir of a `gapjax reproduce`, `quickstart` or `train`')
  return Source(workdir, run=run, summary=summary, cells=[_run_cell(workdir, summary)])


def _cells(records):
  """What the pictures need, from the records that carry a detail."""
  cells = {}
  for record in records:
    match, detail = CELL.fullmatch(record['cell']), record.get('detail')
    if match and detail:
      network, target, k = match[1], match[2], int(match[3])
      curve = detail.get('curves') or {}
      cells[record['cell']] = plots.Panel(
        network, target, k, _chance(target, k, detail), detail.get('per_location'),
        curve.get('train_loss') or [], curve.get('eval_accuracy') or [])
  return list(cells.values())


def _chance(target, grid, detail):
  return 1 / grid ** 2 if target == 'location' and grid else detail.get('chance')


def _run_cell(workdir, summary):
  """A single run as a cell; its curves come from metrics.jsonl."""
  curve = {'train': {}, 'eval': {}}
  for point in workdirs.read_lines(workdir / 'metrics.jsonl'):
    key = 'loss' if point.get('split') == 'train' else 'accuracy'
    if key in point and 'step' in point:  # a resumed run repeats steps: its last word counts
      curve.setdefault(point.get('split'), {})[point['step']] = point[key]
  model, canvas = ((summary.get('config') or {}).get(key) or {} for key in ('model', 'canvas'))
  per_location = summary.get('per_location')
  grid = canvas.get('grid') or (len(per_location) if per_location else None)
  target = str(canvas.get('target', 'accuracy'))
  head = HEADS.get(model.get('head'), str(model.get('name', 'network')))
  if head == 'permutenet' and model.get('permutation') == 'fixed':
    head = 'permutenet_fixed'
  chance = _chance(target, grid, summary.get('sizes', {}))
  return plots.Panel(head, target, grid, chance, per_location,
                    sorted(curve['train'].items()), sorted(curve['eval'].items()))


# --- numbers and tables ----------------------------------------------------------------------


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


def _place(record):
  """Sort key: the canvas cells in the paper's order, then everything else as it came."""
  match = CELL.fullmatch(record['cell'])
  cell = match and plots.Panel(match[1], match[2], int(match[3]))
  return (0, _suite(record), *plots.order(cell)) if match else (1,)


def _result_tables(records):
  """The tables of a suite: the canvas cells in one, whatever else there is in a plain one."""
  canvas, other = {}, []
  for record in sorted(records, key=_place):
    if CELL.fullmatch(record['cell']):
      canvas.setdefault((_suite(record), record['cell']), {})[record['metric']] = record
    else:
      other.append(record)
  return [draw(some) for draw, some in ((_canvas_table, canvas), (_plain_table, other)) if some]


def _canvas_table(cells):
  """cells: {(suite, cell): {metric: record}}; the paper's number stands next to its protocol."""
  torch = any(r.get('torch') is not None for found in cells.values() for r in found.values())
  several = len({suite for suite, _ in cells}) > 1
  blocks, rows = [], []
  for (suite, name), found in cells.items():
    network, target, k = CELL.fullmatch(name).groups()
    exact, best = (found.get(f'{target}_accuracy{which}') for which in ('', '_best_random'))
    chance = _chance(target, int(k), _first((exact, best), 'detail') or {})
    paper, pytorch = (_number(_first((best, exact), key)) for key in ('paper', 'torch'))
    blocks.append((suite, target, k))
    rows.append([*([suite] if several else []), plots.NETWORKS[network], target,
                 f'{k}{plots.TIMES}{k}', paper, *([pytorch] if torch else []),
                 _ours(best), _ours(exact), _number(chance)])
  breaks = frozenset(i for i in range(1, len(rows)) if blocks[i] != blocks[i - 1])
  head = [*(['suite'] if several else []), 'network', 'target', 'grid', 'paper',
          *(['PyTorch'] if torch else []), 'gapjax: best epoch, random placement',
          'gapjax: every location, final weights', 'chance']
  return Table(
    head, rows, text=3 + several, breaks=breaks, strong=frozenset({len(head) - 3, len(head) - 2}),
    caption='In percent. gapjax: mean \N{PLUS-MINUS SIGN} sample standard deviation (seeds). The '
    'paper quotes the best epoch under random placement; the stricter column places every test '
    'image at every location with the final weights.')


def _plain_table(records):
  torch = any(r.get('torch') is not None for r in records)
  several = len({_suite(r) for r in records}) > 1
  rows = []
  for r in records:
    paper, pytorch = (_number(r.get(key), r['metric']) for key in ('paper', 'torch'))
    rows.append([*([_suite(r)] if several else []), r['cell'], r['metric'], paper,
                 *([pytorch] if torch else []), _ours(r)])
  head = [*(['suite'] if several else []), 'cell', 'metric', 'paper',
          *(['PyTorch'] if torch else []), 'gapjax']
  return Table(head, rows, text=2 + several, strong=frozenset({len(head) - 1}),
               caption='Accuracy, consistency and mIoU in percent. gapjax: mean '
               '\N{PLUS-MINUS SIGN} sample standard deviation (seeds).')


def table(records):
  """The results as Markdown, in percent, for a report, a terminal or a README.

  The canvas cells (the paper's section 3) take one row a cell with both protocols; other suites
  one row a record, in a table of their own. `records`: a suite's results.json, dicts with `cell`,
  `metric`, `mean`, and if known `paper`, `torch`, `std`, `n`, `suite`, `scale`, `detail`.
  """
  return '\n\n'.join(markdown_table(part) for part in _result_tables(records))


# --- sections: (Source, folder for pictures) -> Section or None -------------------------------


def _results(source, _):
  if not source.records:
    return None
  exact, facts = {}, []
  for record in source.records:
    match = CELL.fullmatch(record['cell'])
    if match and record['metric'] == 'location_accuracy' and record['mean'] is not None:
      exact[int(match[3]), match[1]] = record['mean']
  for k in sorted({k for k, _ in exact}):
    for network in ('gapnet', 'permutenet'):
      if (k, network) in exact:
        facts.append((f'{_number(exact[k, network])}%',
                      f'location accuracy of {plots.NETWORKS[network]}, {plots.square(k)}'))
    facts.append((f'{100 / k ** 2:.1f}%', f'location accuracy of guessing, {plots.square(k)}'))
  return Section('Results', text=scale_notes(source.records), facts=facts,
                 tables=_result_tables(source.records))


def scale_notes(records):
  """A sentence for every scale among the records that is not the paper's own."""
  return [sentence for scale, sentence in SCALES.items()
          if any(r.get('scale') == scale for r in records)]


def _run_results(source, _):
  if source.summary is None:
    return None
  rows = [[metric, _number(value, metric)] for part in ('final', 'best')
          for metric, value in (source.summary.get(part) or {}).items()
          if metric != 'step' and isinstance(value, int | float)]
  return Section('Results', tables=[Table(['metric', 'value'], rows, strong=frozenset({1}),
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
    k = path.stem.partition('x')[0]  # 'canvas' for a single run's
    copy = folder / (path.name if k == 'canvas' else f'canvas_{path.name}')
    copy.write_bytes(data)
    name = 'Samples of the canvas' if k == 'canvas' else f'Samples of the {plots.square(k)} canvas'
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
    caption='Accuracy in percent of every test image at every location'
    f'{", mean over seeds" if source.records else ""}; beside each name the mean.')])


def _curves(source, folder):
  if not any(len(c.train_loss) or len(c.eval_accuracy) for c in source.cells):
    return None
  return Section('How it learned', pictures=[_both(
    plots.curves, source.cells, folder / 'curves.png',
    alt='Training loss and evaluation accuracy against the training step',
    caption='Training loss and evaluation accuracy'
    f'{" of the first seed" if source.records else ""}; the dotted line is guessing.')])


def _seconds(value):
  minutes, seconds = divmod(round(value), 60)
  if minutes >= 60:
    return f'{minutes // 60} h {minutes % 60} min'
  return f'{minutes} min {seconds} s' if minutes else f'{value:.1f} s'


# What a record's detail says about training, its label, and how to print it.
DETAIL = [('model', 'model', str), ('parameters', 'parameters', '{:,}'.format),
          ('train_images', 'training images', '{:,}'.format),
          ('test_images', 'test images', '{:,}'.format), ('canvas_size', 'canvas, pixels', str),
          ('epochs', 'epochs', str), ('steps', 'steps', '{:,}'.format),
          ('batch_size', 'batch', str), ('seeds', 'seeds', lambda v: ', '.join(map(str, v))),
          ('wall_seconds', 'time a seed', lambda v: _seconds(sum(v) / len(v)) if v else DASH),
          ('images_per_second', 'images/s', '{:,.0f}'.format)]


def _how(source, _):
  """What is the same everywhere goes into one list, what differs into a row a cell."""
  about = source.summary or source.run
  rows = []
  for key, name, show in (
      ('device', 'device', str), ('step', 'steps', '{:,}'.format),
      ('wall_seconds', 'duration', _seconds), ('images_per_second', 'images/s', '{:,.0f}'.format),
      ('versions', 'versions', lambda v: ', '.join(f'{k} {n}' for k, n in v.items()))):
    if about.get(key):
      rows.append([name, show(about[key])])
  trained = [{**r['detail'], 'seeds': r.get('seeds'), 'cell': r['cell']}
             for r in source.records if r.get('detail')]
  differ = []
  for key, name, show in DETAIL:
    said = [show(t[key]) if t.get(key) is not None else DASH for t in trained]
    if len(set(said)) == 1 and said[0] != DASH:
      rows.append([name, said[0]])
    elif len(set(said)) > 1:
      differ.append((name, said))
  tables = [Table(['', ''], rows, text=2)] if rows else []
  if differ:
    names, columns = zip(*differ, strict=True)
    lines = zip((t['cell'] for t in trained), *columns, strict=True)
    tables.append(Table(['cell', *names], list(lines)))
  if source.summary:
    tables.append(Table(['config field', 'value'], _flat(source.summary.get('config') or {}),
                        text=2))
  command, notes = str(source.run.get('command', '')), source.run.get('notes') or []
  return Section('How it was made', code=command, tables=tables,
                 bullets=list(map(str, notes))) if command or tables or notes else None


def _flat(config, prefix=''):
  """[['optimizer.lr', '0.001'], ...]: the names that --config.optimizer.lr= takes."""
  return [row for key, value in config.items() for row in (
    _flat(value, f'{prefix}{key}.') if isinstance(value, dict)
    else [[f'{prefix}{key}', json.dumps(value, ensure_ascii=False)]])]


SECTIONS = [_results, _run_results, _samples, _heatmaps, _curves, _how]


def _page(source, sections):
  """Title and claim; the canvas cells are told as the paper's first claim."""
  networks = {match[1] for r in source.records if (match := CELL.fullmatch(r['cell']))}
  suites = ', '.join(dict.fromkeys(_suite(r) for r in source.records if _suite(r)))
  if networks:
    lead = (
      'Global average pooling is believed to erase where things are. The paper claims the '
      'opposite: position survives, written in the order of the channels. The test pastes a small '
      f'image at one of {plots.square("k")} places on an empty canvas and asks a network for the '
      'place. GAPNet pools and answers. PermuteNet gets the pooled channels in a new random order '
      'at every forward pass, so that nothing but their order is lost. If the claim holds, GAPNet '
      'finds nearly every place and PermuteNet falls towards guessing. Naming the image falls too, '
      'since shuffled channels leave the classifier little more than their mean; in the paper, '
      'with 512 channels and 20,000 steps, it falls by less.')
    if 'permutenet_fixed' in networks:
      lead += (' As a control, a third network shuffles in one order fixed for the whole run, '
               'which its linear layer can learn to undo.')
    title = 'Does global average pooling forget where things are?'
  elif source.records:
    title = 'Results beside the paper'
    lead = 'Every cell of the suite, the published number beside what gapjax measures.'
  else:
    cell, suites = source.cells[0], 'a single run'
    title = f'{cell.network_name}: {cell.task_name.lower()}'
    lead = ('One training run: what it reached, where on the canvas it succeeds, how it learned, '
            'and the configuration it used.')
  subtitle = f'gapjax: {suites or "results"}. Islam et al., ICCV 2021, reproduced in JAX.'
  return Page(title, subtitle, lead, sections, PAPER)


def build(workdir):
  """Writes report.md, report.html and PNGs to workdir/report; returns the path of report.html.

  `workdir` holds results.json (a suite; with run.json and samples/KxK.png if they exist) or
  summary.json (a run; with metrics.jsonl and canvas.png if they exist). Raises UsageError when
  neither is there or one of the files is broken.
  """
  source = _load(pathlib.Path(workdir))
  folder = source.workdir / 'report'
  folder.mkdir(exist_ok=True)
  sections = [section for make in SECTIONS if (section := make(source, folder))]
  page = _page(source, sections)
  # Bytes, not text: Windows would turn the line ends around.
  (folder / 'report.md').write_bytes(markdown(page).encode())
  (folder / 'report.html').write_bytes(html_page(page).encode())
  return folder / 'report.html'
