"""The report of two questions without published numbers: where permuting hurts, what padding gives.

Its cells differ in one thing: permute_at, the rows of a table with a column a target, or padding
(of networks asked for the location), with a column a network.
"""

import dataclasses

from gapjax.records.schema import VARIED
from gapjax.report.parts import DASH, number, ours, pictured, suite
from gapjax.report.plots import ablations as plots_ablations
from gapjax.report.plots import base as plots
from gapjax.report.render import Section, Table

# A varied field: its head in the table and in pictures, its values' names in order, the field whose
# values are the series, and their names.
FIELDS = {
  'permute_at': ('channels permuted', {
    'never': 'never', 'fixed': 'pooled, one order', 'pooled': 'pooled',
    'pooled_5x': f'pooled, 5{plots.TIMES} steps', 'pooled_wide': f'pooled, 4{plots.TIMES} width',
    'stage4': 'before stage 4', 'stage3': 'before stage 3', 'stage2': 'before stage 2',
    'stage1': 'before stage 1'},
    'target', plots.TARGETS),
  'padding': ('padding', {name: name for name in (
    'zero', 'partial', 'replicate', 'reflect', 'circular')},
    'network', {name: plots.NETWORKS[name] for name in ('gapnet', 'permutenet')})}
HEADING = 'Where permuting hurts, and what padding gives away'


@dataclasses.dataclass(frozen=True)
class Row:
  """The cells of one value of a field, {series: record}."""
  field: str
  value: str
  records: dict

  @property
  def name(self):
    return FIELDS[self.field][1].get(self.value, self.value)


def match(record):
  """The field that is varied in a record's cell; None where none is."""
  return next((field for field in VARIED if field in record), None)


def place(record):
  """Sort key: fields, their values, series, each in order."""
  field, value, series = _place(record)
  _, values, _, names = FIELDS[field]
  known = (list(every).index(one) if one in every else len(every)
           for one, every in ((field, FIELDS), (value, values), (series, names)))
  return suite(record), *known, value, series


def _place(record):
  """Its varied field, that field's value, and the series."""
  field = match(record)
  return field, record[field], record[FIELDS[field][2]]


def cells(source):
  """The rows, of the accuracies at every location."""
  return rows_of(source.records)


def rows_of(records):
  rows = {}
  for record in sorted(records, key=place):
    field, value, series = _place(record)
    if record['metric'] in ('location_accuracy', 'image_accuracy'):
      rows.setdefault((field, value), {})[series] = record
  return [Row(*key, some) for key, some in rows.items()]


def title(_):
  return 'Where the order of the channels counts, and what the border gives'


def lead(_):
  """What is varied, in paragraphs."""
  return ['Two things that can be varied, and for which no numbers were published. PermuteNet '
          'permutes the channels after global average pooling; their order can be lost earlier as '
          'well, before any stage of the network. And a convolution learns where it is from the '
          'border of the image, which padding makes: each way of padding gives it away '
          'differently, and circular padding, whose canvas has no border, should not at all.']


def tables(records):
  """A table a field, a row a value."""
  rows = rows_of(records)
  return [_table(field, some) for field in FIELDS
          if (some := [row for row in rows if row.field == field])]


def _table(field, rows):
  head, _, _, names = FIELDS[field]
  chances = [(names[series], number(chance)) for row in rows
             for series, record in row.records.items()
             if (chance := (record.get('detail') or {}).get('chance'))]
  guessing = ', '.join(f'{name} {chance}' for name, chance in dict.fromkeys(chances))
  return Table(
    [head, *names.values()],
    [[row.name, *(ours(row.records.get(series)) for series in names)] for row in rows],
    caption='Accuracy in percent, of every test image at every location, with the final weights: '
    f'mean \N{PLUS-MINUS SIGN} sample standard deviation (seeds). Guessing: {guessing or DASH}.')


# --- sections: (Source, folder for pictures) -> Section ---------------------------------------


def results(source, _):
  """The tables of a suite."""
  return Section('Results', tables=tables(source.records))


def _picture(field, heading, text):
  def section(source, folder):
    rows = [row for row in source.cells if row.field == field]
    return pictured(
      heading, plots_ablations.dots, [_column(row) for row in rows], folder / f'{field}.png',
      text=[text], alt=f'Accuracy for every value of {field}, a dot a seed',
      caption='A dot is a seed, a bar their mean, a dotted line guessing.')
  return section


def _column(row):
  names = FIELDS[row.field][3]
  return plots_ablations.Column(row.name, {
    name: (row.records[series]['values'], (row.records[series].get('detail') or {}).get('chance'))
    for series, name in names.items() if series in row.records})


SECTIONS = [
  _picture('permute_at', 'Where permuting hurts', (
    'The same network, GAP and one linear layer, with its channels in a new random order at every '
    'forward pass: after pooling, or before one of its stages. Never, and in one order fixed for '
    'the run, are the controls; and the network that permutes after pooling was trained for five '
    'times as many epochs, and four times as wide, too.')),
  _picture('padding', 'What padding gives away', (
    'How well the location is found where every convolution pads in another way.'))]
