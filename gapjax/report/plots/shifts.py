"""The pictures of the paper's section 4: consistency, accuracy under shifts, AugShift's sweep.

As in plots.py every function writes one PNG, light or dark, and the same arguments give the same
bytes.
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


def consistency_curves(cells, path, *, dark=False):
  """Draws consistency against s: a row of panels a dataset, a column a protocol, a line a network.

  The y axis is shared by a row, ends at 100 percent and begins a little below the lowest value.

  Args:
    cells: `ShiftPanel`s; those without `protocols` are left out.
    path: where the PNG goes.
    dark: draw for a dark page.

  Raises:
    ValueError: no cell has a curve.
  """
  rows = plots.rows_of([cell for cell in cells if any(map(len, cell.protocols.values()))])
  if not rows:
    raise ValueError('no cell has protocols')
  found = dict.fromkeys(name for row in rows for cell in row for name in cell.protocols)
  names = sorted(found, key=[*PROTOCOLS, *found].index)
  look = plots.looks([cell.network for row in rows for cell in row], dark=dark)
  handles = plots.handles_of(look)
  size = (7.8 if len(names) > 1 else 4.2, 2.75 * len(rows) + plots.legend_height(handles))
  with plots.drawing(path, size=size, dark=dark) as figure:
    figure.get_layout_engine().set(w_pad=.06, h_pad=.07, wspace=.03)
    axes = figure.subplots(len(rows), len(names), squeeze=False, sharex=True, sharey='row')
    for panels, row in zip(axes, rows, strict=True):
      for axis, name in zip(panels, names, strict=True):
        _consistency_panel(axis, row, name, look)
      low = min(min(v) for cell in row for v in cell.protocols.values() if len(v))
      panels[0].set_ylim(max(0, low - .08 * (1 - low)) if low < 1 else .9, 1 + .03 * (1 - low))
      panels[0].set_ylabel('same top-1 class')
      panels[0].text(0, 1.17, row[0].task_name, transform=panels[0].transAxes, weight='bold',
                     size=10)
    for axis in axes[-1]:
      axis.set_xlabel('s, pixels')
    plots.legend(figure, handles)


def _consistency_panel(axis, row, protocol, look):
  for cell in row:
    values = np.asarray(cell.protocols.get(protocol) or [], float)
    axis.plot(np.arange(1, len(values) + 1), values, linewidth=1.6, marker='o', markersize=2.8,
              **look[cell.network])
  axis.set_title(f'{protocol}: {PROTOCOLS[protocol]}' if protocol in PROTOCOLS else protocol,
                 loc='left', fontsize=8.5)
  axis.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
  axis.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
  axis.yaxis.set_major_formatter(plots.PERCENT)
  axis.grid(axis='y')
  axis.tick_params(length=0)
  axis.margins(x=.05)


def accuracy_maps(cells, path, *, dark=False):
  """Draws accuracy against (dx, dy), one map a network, four side by side.

  All maps of a dataset share one colour scale, which spans its values and no more, and one bar.

  Args:
    cells: `ShiftPanel`s; those without `accuracy_map` are left out.
    path: where the PNG goes.
    dark: draw for a dark page.

  Raises:
    ValueError: no cell has a map.
  """
  groups = plots.rows_of([cell for cell in cells if cell.accuracy_map is not None])
  if not groups:
    raise ValueError('no cell has an accuracy_map')
  heights = [-(-len(group) // MAPS_IN_A_ROW) for group in groups]
  columns = min(MAPS_IN_A_ROW, max(map(len, groups)))
  size = (1.78 * columns + .7 if columns > 1 else 3.3,
          (2.12 if columns > 1 else 2.75) * sum(heights) + .5 * len(groups))
  with plots.drawing(path, size=size, dark=dark) as figure:
    figure.get_layout_engine().set(w_pad=.03, h_pad=.06, wspace=.04, hspace=.04)
    parts = figure.subfigures(len(groups), 1, squeeze=False, height_ratios=heights)[:, 0]
    for part, group, height in zip(parts, groups, heights, strict=True):
      _group_of_maps(part, group, part.subplots(height, columns, squeeze=False))


def _group_of_maps(figure, group, axes):
  """Fills axes (rows, columns) with the maps of one dataset, and adds their colour bar."""
  values = [np.asarray(cell.accuracy_map, float) for cell in group]
  low, high = min(map(np.nanmin, values)), max(map(np.nanmax, values))
  norm = Normalize(low, high if high > low else low + .01)
  columns, last_row = axes.shape[1], axes.size - axes.shape[1]
  for axis in axes.ravel():
    axis.set_axis_off()
  for i, (axis, cell, accuracy) in enumerate(zip(axes.ravel(), group, values, strict=False)):
    axis.set_axis_on()
    offsets = np.asarray(cell.offsets, float)
    half = (offsets[1] - offsets[0]) / 2 if len(offsets) > 1 else .5
    first, last = offsets[0] - half, offsets[-1] + half
    picture = axis.imshow(accuracy, cmap=plots.ACCURACY_MAP, norm=norm, interpolation='nearest',
                          extent=(first, last, last, first))
    axis.set_title(plots.short_name(cell.network), loc='left', fontsize=8.5, pad=5)
    ticks = [offsets[0], 0, offsets[-1]] if offsets[0] < 0 < offsets[-1] else offsets[[0, -1]]
    axis.set_xticks(ticks)
    axis.set_yticks(ticks)
    axis.tick_params(length=0, labelleft=i % columns == 0)
    axis.xaxis.set_major_formatter('{x:.0f}')
    axis.yaxis.set_major_formatter('{x:.0f}')
    for spine in axis.spines.values():
      spine.set_visible(False)
    if i % columns == 0:
      axis.set_ylabel('dy, pixels down')
    if i >= last_row:
      axis.set_xlabel('dx, pixels right')
  # The empty line keeps the maps' names away.
  figure.suptitle(f'{group[0].task_name}\n', x=.045 if columns > 1 else .13, ha='left',
                  weight='bold', fontsize=10, linespacing=.5)
  bar = figure.colorbar(picture, ax=axes, location='right', aspect=22 * len(axes), pad=.02,
                        shrink=.85, format=plots.PERCENT)
  bar.outline.set_visible(False)
  bar.ax.tick_params(length=0)


def sweep(cells, path, *, dark=False):
  """Draws consistency (up) against accuracy (right): one point a setting, one panel a dataset.

  Colour and the number beside a point are its weight, the marker is its max_shift; points of one
  max_shift and warm-up are joined in order of weight. Networks without settings are marked with a
  cross and their names.

  Args:
    cells: `ShiftPanel`s; those without `accuracy` or `consistency` are left out.
    path: where the PNG goes.
    dark: draw for a dark page.

  Raises:
    ValueError: no cell has both.
  """
  groups = plots.rows_of([cell for cell in cells
                          if cell.accuracy is not None and cell.consistency is not None])
  if not groups:
    raise ValueError('no cell has an accuracy and a consistency')
  found = [plots.settings(cell.network) for group in groups for cell in group]
  shifts = sorted({setting.get('max_shift', 0) for setting in found if setting})
  look = plots.looks([cell.network for group in groups for cell in group], dark=dark)
  soft = plots.PAGE[dark]['soft']
  handles = [Line2D([], [], color=soft, marker=MARKERS[i % 7], markersize=6.5, linewidth=1.2,
                    label=f'shifts up to {shift:g} pixels') for i, shift in enumerate(shifts)]
  size = (7.8 if len(groups) > 1 else 6.2, 4.3)
  with plots.drawing(path, size=size, dark=dark) as figure:
    figure.get_layout_engine().set(w_pad=.08, h_pad=.08)
    axes = figure.subplots(1, len(groups), squeeze=False)[0]
    for axis, group in zip(axes, groups, strict=True):
      _sweep_panel(axis, group, shifts, look, dark=dark)
    if handles:
      plots.legend(figure, handles)
    figure.draw_without_rendering()  # only then is it known where in the picture a point stands
    for axis, group in zip(axes, groups, strict=True):
      _label(figure, axis, group)


def _sweep_panel(axis, group, shifts, look, *, dark):
  page, soft = plots.PAGE[dark]['page'], plots.PAGE[dark]['soft']
  for points in _joined(group):
    axis.plot(*np.transpose(points), color=soft, linewidth=1, alpha=.6, zorder=1)
  for cell in group:
    setting = plots.settings(cell.network)
    marker = MARKERS[shifts.index(setting.get('max_shift', 0)) % 7] if setting else 'X'
    color = look[cell.network]['color'] if setting else plots.PAGE[dark]['ink']
    axis.plot(cell.accuracy, cell.consistency, marker, color=color, markeredgecolor=page,
              markersize=8 if setting else 10, markeredgewidth=.9, zorder=3)
  axis.set_title(group[0].task_name, loc='left', weight='bold', fontsize=10)
  axis.set_xlabel('top-1 accuracy')
  axis.set_ylabel('consistency')
  for side in (axis.xaxis, axis.yaxis):
    side.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    side.set_major_formatter(plots.PERCENT)
  axis.grid()
  axis.tick_params(length=0)
  axis.margins(x=.12, y=.12)


def _joined(group):
  """Lists of (accuracy, consistency), one for every max_shift and warm-up, in order of weight."""
  lines = {}
  for cell in group:
    setting = plots.settings(cell.network)
    if 'weight' in setting:
      lines.setdefault((setting.get('max_shift'), setting.get('warm_up')), []).append(
        (setting['weight'], cell.accuracy, cell.consistency))
  return [[point for _, *point in sorted(points)] for points in lines.values()]


def _label(figure, axis, group):
  """Writes beside every point what it is, where there is room."""
  to_pixels, scale = axis.transData.transform, figure.dpi / 72
  points = to_pixels([(cell.accuracy, cell.consistency) for cell in group])
  notes = [axis.annotate(_label_text(cell), (cell.accuracy, cell.consistency), (0, 0),
                         textcoords='offset pixels', ha='center', va='center', fontsize=8, zorder=4)
           for cell in group]
  sizes = [note.get_window_extent().size for note in notes]
  along = np.linspace(0, 1, 60)[:, None]
  lines = [a + along * (b - a) for line in map(to_pixels, _joined(group))
           for a, b in itertools.pairwise(line)]
  centres = place_labels(points, sizes, lines=np.concatenate([np.zeros((0, 2)), *lines]),
                         bounds=axis.get_window_extent().extents, radius=5 * scale)
  for note, point, centre in zip(notes, points, centres, strict=True):
    note.set_position(tuple(centre - point))
    note.set_in_layout(False)  # a label must not move what it was placed by


def _label_text(cell):
  setting = plots.settings(cell.network)
  if 'weight' not in setting:
    return plots.short_name(cell.network)
  return f'{setting["weight"]:g}' + (', warm-up' if setting.get('warm_up') else '')


def place_labels(points, sizes, *, lines, bounds, radius):
  """Where labels go so that they cover neither each other nor points, lines or the frame.

  Greedy, the widest label first: of 32 places around its point, each takes the one that covers
  least, and of equals the nearest.

  Args:
    points: (n, 2) in pixels, what the labels belong to.
    sizes: (n, 2), width and height of the labels in pixels.
    lines: (m, 2), points along the lines that should stay visible.
    bounds: left, bottom, right, top in pixels.
    radius: of a point's marker, pixels.

  Returns:
    (n, 2): the labels' centres.
  """
  points, sizes, bounds = (np.asarray(x, float) for x in (points, sizes, bounds))
  centres, placed = np.full_like(points, np.inf), []
  marks = np.hstack([points - radius, points + radius])
  for i in sorted(range(len(points)), key=lambda i: (-sizes[i, 0], i)):
    half, costs = sizes[i] / 2 + 1, {}
    for gap in (1.2, 2.2, 3.6, 5.5):
      for angle in np.arange(8) * np.pi / 4:
        direction = np.round([np.cos(angle), np.sin(angle)], 3)
        centre = points[i] + direction * gap * radius + np.sign(direction) * half
        box = np.hstack([centre - half, centre + half])
        inside = ((lines > box[:2]) & (lines < box[2:])).all(1).sum()
        outside = np.maximum(bounds[:2] - box[:2], 0).sum() + np.maximum(
          box[2:] - bounds[2:], 0).sum()
        cost = (5 * _overlap(box, placed) + 2 * _overlap(box, marks) + 4 * inside + 1e4 * outside
                + 6 * gap)
        costs.setdefault(round(float(cost), 3), centre)
    centres[i] = costs[min(costs)]
    placed.append(np.hstack([centres[i] - half, centres[i] + half]))
  return centres


def _overlap(box, others):
  """The area that a box (left, bottom, right, top) shares with others (n, 4)."""
  if not len(others):
    return 0.0
  others = np.asarray(others)
  sides = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
  return np.maximum(sides, 0).prod(1).sum()
