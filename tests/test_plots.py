"""Pictures: pixels against what was drawn."""

import numpy as np
import pytest
from conftest import python
from pixels import pixels, where

from gapjax.report.plots import base as plots
from gapjax.report.plots import learning, locations


def drawn(path, value):
  """Where a heatmap has the colour of a value, without its colour bar."""
  picture = pixels(path)
  return where(picture[:int(.93 * len(picture))], plots.ACCURACY_MAP(value, bytes=True)[:3], 2)


def test_heatmap_colours_stand_at_their_locations(tmp_path):
  values = np.zeros((2, 2))
  values[0, 1] = 1  # top right
  cell = plots.Panel('gapnet', 'location', 2, .25, values.tolist())
  locations.heatmaps([cell], tmp_path / 'x.png')
  full, empty = (drawn(tmp_path / 'x.png', value) for value in (1., 0.))
  assert len(full) > 5000
  assert 2.6 < len(empty) / len(full) < 3.4  # three squares against one
  middle = (empty.min(0) + empty.max(0)) / 2
  assert full[:, 0].max() < middle[0] < empty[:, 0].max()
  assert full[:, 1].min() > middle[1]


def test_heatmap_scale_is_shared_and_missing_counts_stay_blank(tmp_path):
  """0.5 as a map's largest value is still drawn as 0.5: the scale does not stretch to the data."""
  for name, values in (('a', [[.5, .5], [.25, None]]), ('b', [[None, None], [None, None]])):
    locations.heatmaps([plots.Panel('gapnet', 'image', 2, .1, values)], tmp_path / name)
  assert len(drawn(tmp_path / 'a', .5)) > 10000 and not len(drawn(tmp_path / 'b', .5))


def test_accuracy_map_lightness_falls_monotonically():
  lightness = plots.ACCURACY_MAP(np.linspace(0, 1, 64))[:, :3] @ [.2126, .7152, .0722]
  assert (np.diff(lightness) < 0).all()


def test_curves_draw_the_better_network_higher(tmp_path):
  cells = [plots.Panel(name, 'location', 3, 1 / 9, None, [], [(0, .11), (50, at), (100, at)])
           for name, at in (('gapnet', .9), ('permutenet', .3))]
  learning.curves(cells, tmp_path / 'x.png')
  picture = pixels(tmp_path / 'x.png')
  right = picture[:, int(.8 * picture.shape[1]):]
  better, worse = (where(right, color)[:, 0] for color in plots.LINES[:2])
  assert len(better) and len(worse)
  assert better.max() < worse.min()  # rows count downwards


def test_curves_survive_a_diverged_loss(tmp_path):
  points = [(s, 2. * .9 ** s) for s in range(90)] + [(90, float('inf')), (91, None), (92, 0.)]
  learning.curves([plots.Panel('gapnet', 'image', 3, None, None, points, [(5, float('nan'))]),
                plots.Panel('permutenet', 'image', 3, None, None, [(0, float('nan'))])],
               tmp_path / 'x.png')
  assert len(where(pixels(tmp_path / 'x.png'), plots.LINES[0])) > 200


def test_drawing_leaves_no_global_state(tmp_path):
  # Reading `backend` is what would load pyplot.
  code = (
    'import sys, matplotlib\n'
    'def state():\n'
    '  return {k: matplotlib.rcParams[k] for k in matplotlib.rcParams if k != "backend"}\n'
    'before = state()\n'
    'from gapjax.report.plots import base as plots, learning\n'
    'learning.curves([plots.Panel("gapnet", "image", 3, None, None, [(0, 1.)])], sys.argv[1])\n'
    'assert "matplotlib.pyplot" not in sys.modules\n'
    'assert state() == before')
  python(code, tmp_path / 'x.png')


@pytest.mark.parametrize('width', [4.2, 5.2, 7.8])
def test_a_legend_stays_in_its_picture(tmp_path, width):
  names = ('ResNet-18', 'Unshifted images', 'BlurPool', 'Two crops, weight 0', 'AugShift')
  handles = plots.handles_of({name: {} for name in names})
  with plots.drawing(tmp_path / 'x.png', size=(width, 3), handles=handles) as figure:
    figure.subplots()
  assert figure.legends[0].get_window_extent().x1 <= figure.bbox.x1
