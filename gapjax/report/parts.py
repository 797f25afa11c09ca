"""What the reports of all claims share: the source, numbers as text, pictures in two versions."""

import dataclasses
import pathlib
import re

from gapjax import paths
from gapjax.errors import UsageError
from gapjax.report.plots import base as plots
from gapjax.report.render import Picture, Section
from gapjax.report.schema import SETTINGS

DASH = '\N{EN DASH}'
FRACTION = re.compile('accuracy|consistency|miou|chance')
# A panel's curves: the split and the key of their lines in metrics.jsonl.
CURVES = {'train_loss': ('train', 'loss'), 'eval_accuracy': ('eval', 'accuracy'),
          'eval_consistency': ('eval', 'consistency')}


@dataclasses.dataclass(frozen=True)
class Source:
  """What was found in a workdir. `summary` is set for a single run, `records` for a suite.

  A claim's source holds only its own records, and in `cells` what its pictures need.
  """
  workdir: pathlib.Path
  records: list = ()
  run: dict = dataclasses.field(default_factory=dict)
  summary: dict | None = None
  cells: list = ()


def number(value, metric='accuracy'):
  """Fractions in percent with one decimal, distances with three, the rest with four digits."""
  if value is None:
    return DASH
  if FRACTION.search(metric):
    return f'{100 * value:.1f}'
  return f'{value:.3f}' if 'distance' in metric else f'{value:.4g}'


def ours(record):
  """'99.7 +- 0.1 (3)': mean, sample standard deviation, seeds."""
  if not record or record['mean'] is None:
    return DASH
  metric, std = record['metric'], record.get('std')
  spread = '' if std is None else f' \N{PLUS-MINUS SIGN} {number(std, metric)}'
  return f'{number(record["mean"], metric)}{spread} ({record.get("n", 1)})'


def pytorch(records):
  """What the PyTorch twin got, as `ours` says it, of the first of the records that knows it."""
  record = next((r for r in records if r and r.get('torch') is not None), {})
  torch = record.get('torch')
  if isinstance(torch, dict):
    return ours({**torch, 'metric': record['metric']})
  return number(torch, record.get('metric', 'accuracy'))


def first(records, key):
  """The first of the records' values of `key` that is not None."""
  return next((r[key] for r in records if r and r.get(key) is not None), None)


def suite(record):
  """'table1, small', or 'table1, small, num_epochs=20'."""
  return ', '.join([*(str(record[key]) for key in ('suite', 'scale') if record.get(key)),
                    *record.get('changes', ())])


def detail_curves(detail):
  """A record's curves, as a Panel's fields."""
  said = detail.get('curves') or {}
  return {name: said.get(name) or [] for name in CURVES}


def run_curves(workdir):
  """A single run's curves from metrics.jsonl, as a Panel's fields."""
  found = {name: {} for name in CURVES}
  for point in paths.read_lines(workdir / 'metrics.jsonl'):
    for name, (split, key) in CURVES.items():
      if point.get('split') == split and key in point and 'step' in point:
        found[name][point['step']] = point[key]  # a resumed run repeats steps: its last word counts
  return {name: sorted(points.items()) for name, points in found.items()}


def network_of(record):
  """A record's network as a Panel has it, with the settings of a sweep: 'augshift,weight=0.3'."""
  return ','.join([record['network'], *(f'{key}={record[key]:g}' for key in SETTINGS
                                        if key in record)])


def picture(source, name, records=None):
  """The path of a picture that training left: the single run's, or that of the first of the records
  (all of the source) and of its first seed that has one. None without."""
  folders = [source.workdir] if source.summary is not None else dict.fromkeys(
    source.workdir / 'cells' / record['cell'] / f'seed{seed}'
    for record in (source.records if records is None else records)
    for seed in record.get('seeds', ()))
  return next((folder / name for folder in folders if (folder / name).exists()), None)


def copied(path, folder, name):
  """Copies training's own picture, so that the report's folder stands alone."""
  data = path.read_bytes()
  if not data.startswith(b'\x89PNG\r\n\x1a\n'):
    raise UsageError(f'{path} is not a PNG; delete the file and run again')
  (folder / name).write_bytes(data)
  return folder / name


def both(draw, cells, path, *, alt, caption):
  """Draws the light and the dark version."""
  dark = path.with_stem(f'{path.stem}-dark')
  draw(cells, path)
  draw(cells, dark, dark=True)
  return Picture(path, alt, caption, dark)


def learned(source, path, *, remark=''):
  """The section of learning curves, drawn to `path`; `remark` ends its caption. None without."""
  if not any(len(getattr(cell, name)) for cell in source.cells for name in CURVES):
    return None
  what = ['training loss', 'evaluation accuracy']
  if any(len(cell.eval_consistency) for cell in source.cells):
    what.append('consistency')
  said = f'{", ".join(what[:-1])} and {what[-1]}'.capitalize()
  return Section('How it learned', pictures=[both(
    plots.curves, source.cells, path, alt=f'{said} against the training step',
    caption=f'{said}{" of the first seed" if source.records else ""}; the dotted line is '
    f'guessing.{remark}')])
