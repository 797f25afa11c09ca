"""Pictures of an attack: pixels against what was drawn."""

import numpy as np
import pytest
from PIL import Image

from gapjax.errors import UsageError
from gapjax.neurons import sweeps
from gapjax.report.plots import base as plots
from gapjax.report.plots import neurons as pictures


def rows_of(path, color):
  """Rows of the pixels that have a colour '#rrggbb'."""
  wanted = [int(color[i:i + 2], 16) for i in (1, 3, 5)]
  picture = np.asarray(Image.open(path).convert('RGB')).astype(int)
  return np.nonzero((np.abs(picture - wanted) < 8).all(-1))[0]


def test_curves_are_drawn_where_the_values_are(tmp_path):
  high, low = np.full((1, 3), .9), np.full((1, 3), .2)
  sweep = sweeps.Sweep((0, 10, 20), {'miou_0,0,1,0.3': {
    'left': high, 'right': low, 'other': (high + low) / 2, 'random': np.array([[.4] * 3,
                                                                             [.8] * 3])}})
  for name in 'ab':
    pictures.curves(sweep, tmp_path / f'{name}.png')
  assert (tmp_path / 'a.png').read_bytes() == (tmp_path / 'b.png').read_bytes()
  # The mode skips the legend's short lines. Rows count from the top; values are .9, .2 and .6.
  at = {name: np.bincount(rows_of(tmp_path / 'a.png', color)).argmax() for name, color in (
    ('left', plots.LINES[0]), ('right', plots.LINES[2]),
    ('random', plots.SOFT))}
  share = (at['random'] - at['left']) / (at['right'] - at['left'])
  assert at['left'] < at['random'] < at['right']
  assert share == pytest.approx(.3 / .7, abs=.02)


def test_a_sweep_without_a_metric_is_refused(tmp_path):
  with pytest.raises(UsageError, match='no metric'):
    pictures.curves(sweeps.Sweep((0, 1), {}), tmp_path / 'a.png')
