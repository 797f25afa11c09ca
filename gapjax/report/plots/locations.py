"""The picture of section 3: accuracy at every location of the canvas."""

import numpy as np
from matplotlib.colors import Normalize

from gapjax.report.plots import base as plots


def heatmaps(cells, path):
  """Draws accuracy per location, a k x k map for every cell.

  One row of maps for every target and grid, the networks side by side, one colour scale from 0 to 1
  for all; the value stands in every square, in percent, up to 7 x 7.

  Args:
    cells: `Panel`s with `per_location`.
    path: where the PNG goes.
  """
  rows = plots.rows_of(cells)
  columns = max(map(len, rows))
  size = (2.6 * columns if columns > 1 else 3.3, (2.95 if columns > 1 else 3.5) * len(rows) + .5)
  with plots.drawing(path, size=size, w_pad=.02, h_pad=.05, hspace=.09, wspace=.03) as figure:
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for axis in axes.ravel():
      axis.set_axis_off()
    for row, cells_ in zip(axes, rows, strict=True):
      row[0].text(0, 1.16, cells_[0].task_name, transform=row[0].transAxes, weight='bold', size=10)
      for axis, cell in zip(row, cells_, strict=False):
        picture = _heatmap(axis, cell)
    bar = figure.colorbar(picture, ax=axes, location='bottom', shrink=.5, aspect=45, pad=.02,
                          ticks=[0, .25, .5, .75, 1], format=plots.PERCENT)
    bar.outline.set_visible(False)


def _heatmap(axis, cell):
  """Fills `axis` with one cell's map and returns the picture for the colour bar."""
  values = np.ma.masked_invalid(np.asarray(cell.per_location, float))  # (k, k), None is missing
  k = len(values)
  picture = axis.imshow(values, cmap=plots.ACCURACY_MAP, norm=Normalize(0, 1))
  for i in range(1, k):
    for line in (axis.axhline, axis.axvline):
      line(i - .5, color=plots.CARD, linewidth=2.5 if k <= 5 else 1.2)
  mean = f'{100 * values.mean():.1f}%' if values.count() else ''
  axis.set_title(f'{cell.network_name}  {mean}', fontsize=9, pad=5)
  for (y, x), value in np.ma.ndenumerate(values):
    if k <= 7:
      axis.text(x, y, f'{100 * value:.{1 if k <= 5 else 0}f}', ha='center', va='center',
                fontsize=10 if k <= 3 else 8.5 if k <= 5 else 7,
                color=plots.CARD if value > .66 else plots.INK)
  return picture
