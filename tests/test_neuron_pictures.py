"""Pictures of an attack: pixels against what was drawn."""

import numpy as np
import pytest
from PIL import Image
from test_attack import one_line

from gapjax.errors import UsageError
from gapjax.neurons import attack
from gapjax.report.plots import base as plots
from gapjax.report.plots import neurons as pictures


def rows_of(path, color):
  """Rows of the pixels that have a colour '#rrggbb'."""
  wanted = [int(color[i:i + 2], 16) for i in (1, 3, 5)]
  picture = np.asarray(Image.open(path).convert('RGB')).astype(int)
  return np.nonzero((np.abs(picture - wanted) < 8).all(-1))[0]


def test_curves_are_drawn_where_the_values_are(tmp_path):
  high, low = np.full((1, 3), .9), np.full((1, 3), .2)
  sweep = attack.Sweep((0, 10, 20), {'miou_0,0,1,0.3': {
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


def test_predictions_stand_side_by_side_in_their_colours(tmp_path):
  colors = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1]])
  row = {'image': np.zeros((4, 8, 3)), 'truth': np.full((4, 8), 255),
         'before': np.zeros((4, 8), int), 'without left channels': np.full((4, 8), 2)}
  for name in 'ab':
    pictures.side_by_side([row, row], tmp_path / f'{name}.png', num_classes=3, colors=colors,
                          names=['road', 'sky', 'person'])
  assert (tmp_path / 'a.png').read_bytes() == (tmp_path / 'b.png').read_bytes()
  picture = np.asarray(Image.open(tmp_path / 'a.png').convert('RGB')).astype(int)
  height, width, _ = picture.shape
  middle = picture[[int(height * .45), int(height * .85)]][:, [int(width * s) for s in (
    .125, .375, .625, .875)]]
  void = list(bytes.fromhex(plots.RULE[1:]))
  np.testing.assert_array_equal(middle, [[[0] * 3, void, [255, 0, 0], [0, 0, 255]]] * 2)
  assert not (picture == [0, 255, 0]).all(-1).any()  # a class that never occurs is in no legend
  assert len(np.unique(pictures.palette(30), axis=0)) == 30


@pytest.mark.parametrize('rows', [
  [], [{'image': 0}], [{'image': 0, 'truth': 0, 'a': 0}, {'image': 0, 'truth': 0, 'b': 0}]])
def test_rows_that_do_not_fit_are_refused(tmp_path, rows):
  with pytest.raises(UsageError, match='every row') as error:
    pictures.side_by_side(rows, tmp_path / 'a.png', num_classes=3)
  assert one_line(error)
  with pytest.raises(UsageError, match='no metric'):
    pictures.curves(attack.Sweep((0, 1), {}), tmp_path / 'a.png')
