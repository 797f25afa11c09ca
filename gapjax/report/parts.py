"""What the reports of all claims share: the source, numbers as text, pictures."""

import dataclasses
import pathlib
import re

from gapjax.records.runs import CURVES
from gapjax.report.plots import learning
from gapjax.report.render import Picture, Section

DASH = '\N{EN DASH}'
FRACTION = re.compile('accuracy|consistency|miou|chance')


@dataclasses.dataclass(frozen=True)
class Source:
  """What was found in a workdir: `records` of a suite, or of one run; `run` says where and when.

  A claim's source holds only its own records, and in `cells` what its pictures need.
  """
  workdir: pathlib.Path
  records: list = ()
  run: dict = dataclasses.field(default_factory=dict)
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
  curves = detail.get('curves') or {}
  return {name: curves.get(name) or [] for name in CURVES}


def picture(source, name, records=None):
  """The path of a picture that training left: a run's own, or that of the first of the records
  (all of the source) and of its first seed that has one. None without."""
  folders = dict.fromkeys([source.workdir, *(
    source.workdir / 'cells' / record['cell'] / f'seed{seed}'
    for record in (source.records if records is None else records)
    for seed in record.get('seeds', ()))])
  return next((folder / name for folder in folders if (folder / name).exists()), None)


def several_seeds(source):
  """Whether anything here is a mean over seeds."""
  return any(len(record.get('seeds', ())) > 1 for record in source.records)


def drawn(draw, what, path, *, alt, caption):
  """Draws `what` to `path`."""
  draw(what, path)
  return Picture(path, alt, caption)


def pictured(heading, draw, panels, path, *, text=(), **said):
  """A section of one picture of panels, if there are any; `drawn` says the rest."""
  return Section(heading, text=text,
                 pictures=[drawn(draw, panels, path, **said)] if panels else [])


def by_cell(records):
  """{(suite, cell): {metric: record}}."""
  cells = {}
  for record in records:
    cells.setdefault((suite(record), record['cell']), {})[record['metric']] = record
  return cells


def learned(source, path, *, remark=''):
  """The section of learning curves, drawn to `path`; `remark` ends its caption."""
  panels = [cell for cell in source.cells if any(len(getattr(cell, name)) for name in CURVES)]
  what = ('Training loss, evaluation accuracy and consistency'
          if any(len(cell.eval_consistency) for cell in panels)
          else 'Training loss and evaluation accuracy')
  guessing = ('; the dotted line is guessing'
              if any(cell.chance is not None for cell in panels) else '')
  return pictured(
    'How it learned', learning.curves, panels, path, alt=f'{what} against the training step',
    caption=f'{what}{" of the first seed" if several_seeds(source) else ""}{guessing}.{remark}')
