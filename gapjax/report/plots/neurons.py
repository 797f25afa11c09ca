"""The pictures of section 5: what position channels do, and what removing them costs.

Every function writes one PNG, and the same arguments give the same bytes.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from gapjax.errors import UsageError
from gapjax.neurons.sweeps import Sweep
from gapjax.neurons.yardstick import Yardstick
from gapjax.report.plots import base as plots

# An order's colour and its dashes; the baseline is grey. Others take what is left.
LOOKS = {'overall': (plots.LINES[1], '-'), 'left': (plots.LINES[0], '-'),
         'right': (plots.LINES[2], '-'), 'top': (plots.LINES[3], '-'),
         'bottom': (plots.LINES[4], '-'), 'left_centred': (plots.LINES[0], plots.DOTTED),
         'right_centred': (plots.LINES[2], plots.DOTTED), 'random': (plots.SOFT, plots.BROKEN)}
METRICS = {'miou': 'mIoU, all pixels', 'miou_left': 'mIoU, left half',
           'miou_right': 'mIoU, right half', 'miou_top': 'mIoU, top half',
           'miou_bottom': 'mIoU, bottom half', 'miou_center': 'mIoU, centre',
           'location_accuracy': 'location accuracy', 'image_accuracy': 'image accuracy'}


def _looks(names):
  """{order: its line's colour and dashes}."""
  others = [name for name in names if name not in LOOKS]
  free = {name: (plots.LINES[(5 + i) % 6], plots.DASHES[2]) for i, name in enumerate(others)}
  return {name: dict(zip(('color', 'linestyle'), {**LOOKS, **free}[name], strict=True))
          for name in names}


def metric_name(metric: str) -> str:
  """'mIoU, left half': a metric in words; of a rectangle its numbers, 'mIoU, 0,0,0.5,1'."""
  return METRICS.get(metric, metric.replace('miou_', 'mIoU, '))


def curves(sweep: Sweep, path, *, chance: Mapping[str, float] | None = None):
  """Draws every metric against the number of removed channels: a panel a metric, a line an order.

  An order with several repeats is drawn as their mean in a band from the lowest to the highest. The
  y axis begins at 0 and is the same for all panels.

  Args:
    sweep: a `sweeps.Sweep`.
    path: where the PNG goes.
    chance: what guessing gets, {metric: fraction}: a dotted line.

  Raises:
    UsageError: the sweep has no metric.
  """
  if not sweep.metrics:
    raise UsageError('the sweep has no metric to draw; sweep at least one region')
  names = dict.fromkeys(name for by_order in sweep.metrics.values() for name in by_order)
  look = _looks(names)
  columns = min(len(sweep.metrics), 2)
  rows = -(-len(sweep.metrics) // columns)
  handles = plots.handles_of(look, order_name)
  if chance:
    handles.append(Line2D([], [], label='chance', **plots.CHANCE))
  size = (7.8, 2.6 * rows + plots.legend_height(handles))  # the legend's width
  with plots.drawing(path, size=size, handles=handles, w_pad=.06, h_pad=.07,
                     wspace=.03) as figure:
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for axis in axes.ravel()[len(sweep.metrics):]:
      axis.set_axis_off()
    for axis, (metric, by_order) in zip(axes.ravel(), sweep.metrics.items(), strict=False):
      for name, values in by_order.items():
        _curve(axis, sweep.counts, values, look[name])
      if metric in (chance or {}):
        axis.axhline(chance[metric], **plots.CHANCE)
      axis.set(title=metric_name(metric), xlabel='channels removed', xmargin=.02)
      axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
      axis.yaxis.set_major_formatter(plots.PERCENT)
      axis.tick_params(labelbottom=True)
    axes[0, 0].set_ylim(bottom=0)


def _curve(axis, counts, values, look):
  known = np.isfinite(values)
  if len(values) > 1:
    axis.fill_between(counts, np.where(known, values, np.inf).min(0),
                      np.where(known, values, -np.inf).max(0), where=known.any(0),
                      color=look['color'], alpha=.18, linewidth=0)
  mean = np.where(known, values, 0).sum(0) / np.where(known.any(0), known.sum(0), np.nan)
  axis.plot(counts, mean, linewidth=1.6, **look)


def order_name(name):
  """'left channels, centred' for 'left_centred'."""
  side = name.removesuffix('_centred')
  return ('position channels, overall' if name == 'overall' else
          f'{side} channels{", centred" if side != name else ""}')


def activations(groups: Mapping[str, np.ndarray], path, *, channels: Mapping[str, Sequence[int]],
                top: int = 12):
  """Draws the mean activation of each order's top channels, with the object here against there.

  A panel an order, a row a channel; a dot for every group of images, its bar the standard error. A
  left channel is high with the object left and low with it right.

  Args:
    groups: {'left': (n, c), 'right': (m, c)}: z of every image of the group, as
      `rank.mean_activations` gives it, by where the object stands.
    path: where the PNG goes.
    channels: {'left': channels, 'right': channels}: the orders, first channel first.
    top: how many channels of each.

  Raises:
    UsageError: there is no group or order, a group has no image, or a channel is none of it.
  """
  groups = {name: np.asarray(z, float) for name, z in groups.items()}
  chosen = {name: np.asarray(order)[:top] for name, order in channels.items()}
  if not groups or not chosen or not all(map(len, [*groups.values(), *chosen.values()])):
    raise UsageError('there is nothing to draw: every group needs an image, every order a channel')
  highest, known = max(c.max() for c in chosen.values()), min(z.shape[1] for z in groups.values())
  if highest >= known:
    raise UsageError(f'channel {highest} is none of the {known} that the activations have; '
                     'take both from the same network')
  look = _looks(groups)
  handles = [Line2D([], [], marker='o', linestyle='', color=style['color'], label=f'object {name}')
             for name, style in look.items()]
  height = .24 * max(map(len, chosen.values())) + .8 + plots.legend_height(handles)
  with plots.drawing(path, size=(3.9 * len(chosen), height), handles=handles) as figure:
    axes = figure.subplots(1, len(chosen), squeeze=False, sharex=True)[0]
    for axis, (name, order) in zip(axes, chosen.items(), strict=True):
      rows = np.arange(len(order))
      means = {group: z[:, order].mean(0) for group, z in groups.items()}
      axis.hlines(rows, np.min(list(means.values()), 0), np.max(list(means.values()), 0),
                  color=plots.RULE, linewidth=3)
      for group, z in groups.items():
        error = z[:, order].std(0, ddof=1) / np.sqrt(len(z)) if len(z) > 1 else 0 * rows
        axis.errorbar(means[group], rows, xerr=error, fmt='o', markersize=4.5, elinewidth=1,
                      color=look[group]['color'])
      axis.set_yticks(rows, order.tolist())
      axis.invert_yaxis()
      axis.set(title=f'top {order_name(name)}', xlabel='mean activation')
      axis.grid(False, axis='y')
      axis.grid(True, axis='x')
    axes[0].set_ylabel('channel')


def yardsticks(found: Mapping[str, Yardstick], path):
  """Draws the scores of every order, from the largest to the smallest, in their 95% intervals.

  A panel an order. In those of signed scores the grey area is what chance lets pass, and the scores
  beyond it are dots; overall a line says what a shift by one pixel changes in each channel.

  Args:
    found: {order: Yardstick}.
    path: where the PNG goes.

  Raises:
    UsageError: there is no order.
  """
  if not found:
    raise UsageError('there is no ranking to draw; rank by two images or more')
  look = _looks(found)
  handles = [Line2D([], [], color=plots.INK, linewidth=1.2, label='score, 95% interval')]
  if any(one.threshold is not None for one in found.values()):
    handles += [Patch(color=plots.RULE, label='chance'),
                Line2D([], [], marker='o', markersize=3.5, linestyle='', color=plots.INK,
                       label='beyond chance')]
  if any(one.shift is not None for one in found.values()):
    handles.append(Line2D([], [], color=plots.SOFT, linewidth=1, label='shift by one pixel'))
  columns = min(len(found), 2)
  rows = -(-len(found) // columns)
  with plots.drawing(path, size=(7.8, 2.4 * rows + plots.legend_height(handles)), handles=handles,
                     w_pad=.06, h_pad=.07, wspace=.03) as figure:
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes[len(found):]:
      axis.set_axis_off()
    for axis, (name, one) in zip(axes, found.items(), strict=False):
      order, color = np.argsort(-one.mean, kind='stable'), look[name]['color']
      at, mean, half = np.arange(1, len(order) + 1), one.mean[order], one.half[order]
      if one.threshold is not None:
        limit = one.threshold[order]
        axis.fill_between(at, -limit, limit, color=plots.RULE, linewidth=0)
        beyond = one.exceeding[order] != 0
        axis.plot(at[beyond], mean[beyond], 'o', markersize=2.6, color=color)
      if one.shift is not None:
        axis.plot(at, one.shift[order], color=plots.SOFT, linewidth=1)
      axis.fill_between(at, mean - half, mean + half, color=color, alpha=.3, linewidth=0)
      axis.plot(at, mean, color=color, linewidth=1.2)
      axis.set(title=order_name(name), xlabel='channels, by score', xmargin=.02,
               ylabel="mean |z - z'|" if one.threshold is None else "mean z - z'")
      axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
      if one.threshold is None:
        axis.set_ylim(bottom=0)


def save(workdir, ranking, sweep: Sweep | None = None, chance=None) -> None:
  """What `gapjax rank` and `gapjax attack` leave to look at: `yardstick.png` and `activations.png`,
  unless the ranking was given, and `attack.png`. The arguments are what rank_run and attack_run
  return."""
  if ranking.yardsticks:
    yardsticks(ranking.yardsticks, workdir / 'yardstick.png')
  if ranking.activations:
    names = [name for name in ranking.orders if name.partition('_')[0] in ranking.activations]
    activations(ranking.activations, workdir / 'activations.png', channels={
      name: ranking.orders[name] for name in sorted(names, key=lambda name: '_' in name)})
  if sweep:
    curves(sweep, workdir / 'attack.png', chance=chance)
