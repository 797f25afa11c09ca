"""The pictures of the paper's section 4: consistency, accuracy under shifts, AugShift's sweep.

Every function writes one PNG, and the same arguments give the same bytes.
"""

import dataclasses
import itertools

import numpy as np
from matplotlib.colors import Normalize
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from gapjax.report.plots import base as plots

# What a protocol does to an image, for s pixels.
PROTOCOLS = {'pad': 'shifted, zero filled', 'crop': 'enlarged by 2s, cropped',
             'circular': 'rolled'}
MAPS_IN_A_ROW = 4
MARKERS = 'osD^vPX'


@dataclasses.dataclass(frozen=True)
class ShiftPanel(plots.Panel):
  """A classifier as the pictures see it; `target` is its dataset, fractions are in [0, 1].

  `protocols`: {'pad': consistencies for s = 1, 2, ...}; `accuracy_map` has a row for every dy and a
  column for every dx of `offsets` (pixels, down and right).
  """
  accuracy: float | None = None
  consistency: float | None = None
  protocols: dict = dataclasses.field(default_factory=dict)
  offsets: list | None = None
  accuracy_map: list | None = None

  @property
  def learned(self) -> list[tuple[float, float]]:
    """(accuracy, consistency) of every evaluation that has both, in the order of the steps."""
    accuracy, consistent = dict(self.eval_accuracy), dict(self.eval_consistency)
    return [(accuracy[step], consistent[step])
            for step in sorted(accuracy.keys() & consistent.keys())]


def consistency_at(cell, accuracy: float) -> float | None:
  """The consistency of a `ShiftPanel` where it last passed an accuracy while it learned, linear
  between evaluations; None where it never did."""
  for (a, before), (b, after) in reversed([*itertools.pairwise(cell.learned)]):
    if min(a, b) <= accuracy <= max(a, b):
      return after if a == b else before + (after - before) * (accuracy - a) / (b - a)
  return None


def consistency_curves(cells, path):
  """Draws consistency against s: a row of panels a dataset, a column a protocol, a line a network.

  The y axis is shared by a row, ends at 100 percent and begins a little below the lowest value.

  Args:
    cells: `ShiftPanel`s with `protocols`.
    path: where the PNG goes.
  """
  rows = plots.rows_of(cells)
  protocols = dict.fromkeys(name for cell in cells for name in cell.protocols)
  names = sorted(protocols, key=[*PROTOCOLS, *protocols].index)
  look = plots.looks([cell for row in rows for cell in row])
  handles = plots.handles_of(look)
  width = 7.8 if len(names) > 1 else 4.2
  size = (width, 2.75 * len(rows) + plots.legend_height(handles, width))
  with plots.drawing(path, size=size, handles=handles, w_pad=.06, h_pad=.07,
                     wspace=.03) as figure:
    axes = figure.subplots(len(rows), len(names), squeeze=False, sharex=True, sharey='row')
    for panels, row in zip(axes, rows, strict=True):
      for axis, name in zip(panels, names, strict=True):
        _consistency_panel(axis, row, name, look)
      low = min(min(v) for cell in row for v in cell.protocols.values() if len(v))
      panels[0].set(ylabel='same top-1 class', ylim=(
        max(0, low - .08 * (1 - low)) if low < 1 else .9, 1 + .03 * (1 - low)))
      panels[0].text(0, 1.17, row[0].task_name, transform=panels[0].transAxes, weight='bold',
                     size=10)
    for axis in axes[-1]:
      axis.set_xlabel('s, pixels')


def _consistency_panel(axis, row, protocol, look):
  for cell in row:
    values = cell.protocols.get(protocol) or []
    axis.plot(range(1, len(values) + 1), values, linewidth=1.6, marker='o', markersize=2.8,
              **look[cell.short_name])
  axis.set_title(f'{protocol}: {PROTOCOLS[protocol]}' if protocol in PROTOCOLS else protocol,
                 fontsize=8.5)
  axis.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
  axis.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
  axis.yaxis.set_major_formatter(plots.PERCENT)


def accuracy_maps(cells, path):
  """Draws accuracy against (dx, dy), one map a network, four side by side.

  All maps of a dataset share one colour scale, which spans its values and no more, and one bar.

  Args:
    cells: `ShiftPanel`s with `accuracy_map`.
    path: where the PNG goes.
  """
  groups = plots.rows_of(cells)
  heights = [-(-len(group) // MAPS_IN_A_ROW) for group in groups]
  columns = min(MAPS_IN_A_ROW, max(map(len, groups)))
  size = (1.78 * columns + .7 if columns > 1 else 3.3,
          (2.12 if columns > 1 else 2.75) * sum(heights) + .5 * len(groups))
  with plots.drawing(path, size=size, w_pad=.03, h_pad=.06, wspace=.04, hspace=.04) as figure:
    parts = figure.subfigures(len(groups), 1, squeeze=False, height_ratios=heights)[:, 0]
    for part, group, height in zip(parts, groups, heights, strict=True):
      _group_of_maps(part, group, part.subplots(height, columns, squeeze=False))


def _group_of_maps(figure, group, axes):
  """Fills axes (rows, columns) with the maps of one dataset, and adds their colour bar."""
  values = np.array([cell.accuracy_map for cell in group], float)  # (n, dy, dx)
  norm = Normalize(low := np.nanmin(values), max(np.nanmax(values), low + .01))
  columns, last_row = axes.shape[1], axes.size - axes.shape[1]
  for axis in axes.ravel()[len(group):]:
    axis.set_axis_off()
  for i, (axis, cell, accuracy) in enumerate(zip(axes.ravel(), group, values, strict=False)):
    first, *_, last = cell.offsets
    half = (cell.offsets[1] - first) / 2
    picture = axis.imshow(accuracy, cmap=plots.ACCURACY_MAP, norm=norm, interpolation='nearest',
                          extent=(first - half, last + half, last + half, first - half))
    ticks = [first, 0, last] if first < 0 < last else [first, last]
    axis.set(xticks=ticks, yticks=ticks, ylabel='' if i % columns else 'dy, pixels down',
             xlabel='dx, pixels right' if i >= last_row else '')
    axis.set_title(cell.short_name, fontsize=8.5, pad=5)
    axis.tick_params(labelleft=not i % columns)
    axis.spines[:].set_visible(False)
    axis.grid(False)
  # The empty line keeps the maps' names away.
  figure.suptitle(f'{group[0].task_name}\n', x=.045 if columns > 1 else .13, ha='left',
                  weight='bold', fontsize=10, linespacing=.5)
  bar = figure.colorbar(picture, ax=axes, location='right', aspect=22 * len(axes), pad=.02,
                        shrink=.85, format=plots.PERCENT)
  bar.outline.set_visible(False)


def sweep(cells, path):
  """Draws consistency (up) against accuracy (right): one point a setting, one panel a dataset.

  Colour and the number above a point are its weight, the marker is its max_shift; points of one
  max_shift and warm-up are joined in order of weight. Networks without settings are marked with a
  cross and their names.

  Args:
    cells: `ShiftPanel`s with `accuracy` and `consistency`.
    path: where the PNG goes.
  """
  groups = plots.rows_of(cells)
  shifts = sorted({cell.settings.get('max_shift', 0) for cell in cells if cell.settings})
  markers = dict(zip(shifts, MARKERS, strict=False))
  look = plots.looks([cell for group in groups for cell in group])
  handles = [Line2D([], [], color=plots.SOFT, marker=marker, markersize=6.5, linewidth=1.2,
                    label=f'shifts up to {shift:g} pixels') for shift, marker in markers.items()]
  with plots.drawing(path, size=(7.8 if len(groups) > 1 else 6.2, 4.3), handles=handles,
                     w_pad=.08, h_pad=.08) as figure:
    axes = figure.subplots(1, len(groups), squeeze=False)[0]
    for axis, group in zip(axes, groups, strict=True):
      _sweep_panel(axis, group, markers, look)


def _sweep_panel(axis, group, markers, look):
  lines = {}
  for cell in group:
    setting, at = cell.settings, (cell.accuracy, cell.consistency)
    axis.plot(*at, markers[setting.get('max_shift', 0)] if setting else 'X',
              color=look[cell.short_name]['color'] if setting else plots.INK, zorder=3,
              markeredgecolor=plots.CARD, markersize=8 if setting else 10, markeredgewidth=.9)
    name = cell.short_name
    if 'weight' in setting:
      lines.setdefault((setting.get('max_shift'), setting.get('warm_up')), []).append(
        (setting['weight'], *at))
      name = f'{setting["weight"]:g}' + (', warm-up' if setting.get('warm_up') else '')
    axis.annotate(name, at, (0, 6), textcoords='offset points', ha='center', fontsize=8, zorder=4)
  for points in lines.values():
    _, *at = zip(*sorted(points), strict=True)
    axis.plot(*at, color=plots.SOFT, linewidth=1, alpha=.6, zorder=1)
  _against_accuracy(axis, group)


def at_accuracy(cells, path):
  """Draws consistency (up) against accuracy (right) as networks learn: one panel a dataset, one
  line a network through its evaluations, of which the last has a dot.

  Args:
    cells: `ShiftPanel`s with two points or more that they `learned`.
    path: where the PNG goes.
  """
  groups = plots.rows_of(cells)
  look = plots.looks([cell for group in groups for cell in group])
  handles = plots.handles_of(look)
  width = 7.8 if len(groups) > 1 else 5.2
  size = (width, 3.5 + plots.legend_height(handles, width))
  with plots.drawing(path, size=size, handles=handles, w_pad=.08, h_pad=.08) as figure:
    axes = figure.subplots(1, len(groups), squeeze=False)[0]
    for axis, group in zip(axes, groups, strict=True):
      for cell in group:
        line, = axis.plot(*zip(*cell.learned, strict=True), linewidth=1.5, marker='.', markersize=5,
                          **look[cell.short_name])
        axis.plot(*cell.learned[-1], 'o', color=line.get_color(), markersize=7)
      _against_accuracy(axis, group)


def _against_accuracy(axis, group):
  """Names both axes of a panel on consistency against accuracy, in percent."""
  axis.set_title(group[0].task_name, weight='bold', fontsize=10)
  axis.set(xlabel='top-1 accuracy', ylabel='consistency')
  for side in (axis.xaxis, axis.yaxis):
    side.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    side.set_major_formatter(plots.PERCENT)
  axis.grid(True, axis='both')
  axis.margins(x=.12, y=.12)
