"""The report of the ablations: every number where it belongs, against the records."""

import json

import numpy as np
import pytest
from pixels import pixels, where

from gapjax import config
from gapjax.report import ablations as report_ablations
from gapjax.report import page as report
from gapjax.report.plots import ablations as plots_ablations
from gapjax.report.plots import base as plots
from gapjax.reproduce import suites


def _records(seeds=3):
  """The suite's records, in the wrong order; values are percents without fractions."""
  draw, records = np.random.default_rng(0), []
  for cell in reversed(suites.ablations('small')):
    target = cell.config.canvas.target
    for metric in (f'{target}_accuracy', f'{target}_accuracy_best_random'):
      values = (draw.integers(20, 100, seeds) / 100).tolist()
      records.append({
        'schema': 2, 'suite': 'ablations', 'scale': 'small', 'cell': cell.name, **cell.fields,
        'metric': metric,
        'values': values, 'seeds': list(range(seeds)), 'mean': float(np.mean(values)),
        'std': float(np.std(values, ddof=1)), 'n': seeds})
      if not metric.endswith('random'):
        records[-1]['detail'] = {'chance': 1 / 9 if target == 'location' else .1}
  return records


def test_every_cell_varies_one_thing():
  """Against its neighbours: a field of the model, beside the target, the head and the order."""
  cells = {cell.name: cell for cell in suites.ablations('small')}
  found = {name: cell.config for name, cell in cells.items()}
  assert len(found) == 9 * 2 + 5 * 2
  for name, c in found.items():
    config.validate(c)
    field, = cells[name].fields.keys() & report_ablations.FIELDS.keys()
    _, values, series, names = report_ablations.FIELDS[field]
    value = cells[name].fields[field]
    assert value in values and cells[name].fields[series] in names  # the report has names for them
    base = found['permute_at=never/location/3x3' if field == 'permute_at' else
                 f'padding=zero/{cells[name].fields["network"]}/location/3x3']
    differ = {line.split(' ')[0].rstrip(':') for line in config.difference(c, config.as_json(base))}
    more = {'pooled_5x': {'num_epochs', 'eval.every_epochs'},
            'pooled_wide': {'model.width'}}.get(value, set())
    assert more <= differ <= more | {
      'canvas.target', 'model.head', 'model.permutation', f'model.{field}'}, name
  stages = {c.model.permute_at for name, c in found.items() if name.startswith('permute_at=stage')}
  assert stages == {'stage1', 'stage2', 'stage3', 'stage4'}


def test_a_page_of_one_cell(tmp_path):
  cell = 'padding=circular/gapnet/location/3x3'
  records = [record for record in _records() if record['cell'] == cell]
  (tmp_path / 'results.json').write_text(json.dumps(records))
  assert f'{100 * records[0]["mean"]:.1f}' in report.build(tmp_path).read_text()


def test_tables_hold_the_means_of_every_location(tmp_path):
  records = _records()
  (tmp_path / 'results.json').write_text(json.dumps(records))
  page = report.build(tmp_path).with_name('README.md').read_text()
  lines = [line.strip('|').split('|') for line in page.splitlines() if line.startswith('| ')]
  found = {cells_[0].strip(): [cell.strip() for cell in cells_[1:]] for cells_ in lines}
  for record in records:
    field, = record.keys() & report_ablations.FIELDS.keys()
    _, values, series, names = report_ablations.FIELDS[field]
    said = found[values[record[field]]][list(names).index(record[series])]
    expected = (f'{100 * np.mean(record["values"]):.1f} \N{PLUS-MINUS SIGN} '
                f'{100 * np.std(record["values"], ddof=1):.1f} (3)')
    assert (said == expected) == (not record['metric'].endswith('random'))
  order = [list(found).index(name) for name in ('never', 'pooled', 'before stage 1', 'zero')]
  assert order == sorted(order)
  assert 'Location 11.1, Image class 10.0' in page and 'GAPNet 11.1, PermuteNet 11.1' in page
  assert page.count('.png') == 2
  assert all(table in page for table in report.table(records).split('\n\n'))


def test_cells_that_are_not_trained_yet_are_dashes():
  records = [r for r in _records() if r['cell'] in ('permute_at=never/image/3x3',
                                                    'padding=circular/gapnet/location/3x3')]
  places, paddings = report.table(records).split('\n\n')
  assert places.splitlines()[-1].split('|')[2].strip() == '\N{EN DASH}'
  assert paddings.splitlines()[-1].split('|')[3].strip() == '\N{EN DASH}'


def test_dots_stand_at_their_values(tmp_path):
  """Rows of the picture where the series' colour is: the higher accuracy stands higher."""
  columns = [plots_ablations.Column('low', {'A': ([.2, .3], .1)}),
             plots_ablations.Column('high', {'A': ([.9, .8], .1)})]
  plots_ablations.dots(columns, tmp_path / 'a.png')
  picture = pixels(tmp_path / 'a.png')[100:]  # below the legend
  rows, places = where(picture, plots.LINES[0], 8).T
  middle = picture.shape[1] // 2
  guess = np.median(rows[np.abs(rows - np.bincount(rows).argmax()) < 2])
  low, high = (rows[side & (rows < guess - 3)] for side in (places < middle, places > middle))
  per_percent = (guess - np.median(low)) / 15  # their mean is 25, guessing is 10
  assert np.median(high) == pytest.approx(guess - 75 * per_percent, abs=6)
