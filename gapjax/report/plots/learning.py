"""The picture of how networks learned: loss, accuracy and consistency over the steps."""

import numpy as np
from matplotlib.lines import Line2D

from gapjax.report.plots import base as plots


def curves(cells, path):
  """Draws training loss, evaluation accuracy and, where there is one, consistency over the steps.

  One row of panels for every target and grid, one line a cell, chance dotted. A loss of more than
  60 points is drawn faint, with its running mean on top; its axis is logarithmic when the values of
  the row span more than a factor of 20.

  Args:
    cells: `Panel`s.
    path: where the PNG goes.
  """
  rows = plots.rows_of(cells)
  look = plots.looks([cell for row in rows for cell in row])
  titles = ['training loss', 'evaluation accuracy',
            *(['consistency'] if any(len(cell.eval_consistency) for cell in cells) else [])]
  handles = plots.handles_of(look)
  if any(cell.chance is not None for cell in cells):
    handles.append(Line2D([], [], label='chance', **plots.CHANCE))
  size = (7.8, 2.55 * len(rows) + plots.legend_height(handles))
  with plots.drawing(path, size=size, handles=handles, w_pad=.08, h_pad=.09) as figure:
    axes = figure.subplots(len(rows), len(titles), squeeze=False)
    for panels, row in zip(axes, rows, strict=True):
      _losses(panels[0], row, look)
      _fractions(panels[1], row, 'eval_accuracy', look)
      for chance in {cell.chance for cell in row} - {None}:
        panels[1].axhline(chance, **plots.CHANCE)
      for axis in panels[2:]:  # no value of it is a natural zero
        _fractions(axis, row, 'eval_consistency', look, fitted=True)
      for axis, title in zip(panels, titles, strict=True):
        axis.set(title=f'{row[0].task_name}: {title}', xmargin=.02)
    for axis in axes[-1]:
      axis.set_xlabel('step')


def _losses(axis, row, look):
  losses = [np.zeros(0)]
  for cell in row:
    steps, values = _series(cell.train_loss)
    if many := len(values) > 60:
      axis.plot(steps, values, color=look[cell.short_name]['color'], linewidth=.6, alpha=.25)
    axis.plot(steps, _smooth(values) if many else values, linewidth=1.5, **look[cell.short_name])
    losses.append(values[values > 0])  # False for nan
  positive = np.concatenate(losses)
  if len(positive) and positive.max() > 20 * positive.min():
    axis.set_yscale('log', nonpositive='mask')
  else:
    axis.set_ylim(bottom=0)


def _fractions(axis, row, name, look, *, fitted=False):
  """One curve of every cell, in percent, from 0 or, if `fitted`, from the ten below the lowest."""
  lowest = 1
  for cell in row:
    steps, values = _series(getattr(cell, name))
    lowest = np.nanmin(values, initial=lowest)
    axis.plot(steps, values, linewidth=1.5, marker='o' if len(values) < 2 else '',
              **look[cell.short_name])
  low = max(0, np.ceil(10 * lowest - 1) / 10) if fitted else 0
  axis.set_ylim(low, 1 + .04 * (1 - low))
  if not fitted:
    axis.set_yticks([0, .25, .5, .75, 1])
  axis.yaxis.set_major_formatter(plots.PERCENT)


def _smooth(values):
  """Running mean over about a twenty-fifth of the points, shorter at both ends."""
  window = np.ones(max(len(values) // 25, 1))
  return (np.convolve(values, window, 'same')
          / np.convolve(np.ones(len(values)), window, 'same'))


def _series(points):
  """(step, value) pairs to two arrays; a diverged loss leaves a gap, not a broken axis."""
  steps, values = np.asarray(points, float).reshape(-1, 2).T  # None turns into nan
  return steps, np.where(np.isfinite(values), values, np.nan)
