"""The picture of an ablation: accuracy for every value of one field."""

import dataclasses
import textwrap

import numpy as np
from matplotlib.lines import Line2D

from gapjax.report.plots import base as plots


@dataclasses.dataclass(frozen=True)
class Column:
  """One value of the field: its name, and {series: (accuracies of the seeds, that of guessing)}."""
  name: str
  series: dict


def dots(columns, path, *, dark=False):
  """Draws a dot a seed and a bar at their mean: one column a value, one colour a series.

  Args:
    columns: `Column`s, left to right; guessing may be None.
    path: where the PNG goes.
    dark: draw for a dark page.

  Raises:
    ValueError: there is no column.
  """
  names = list(dict.fromkeys(name for column in columns for name in column.series))
  if not names:
    raise ValueError('nothing to draw')
  apart = .24
  with plots.drawing(path, size=(7.8, 3.4), dark=dark) as figure:
    axis = figure.subplots()
    for rank, name in enumerate(names):
      color = plots.LINES[dark][rank % 6]
      offset = apart * (rank - (len(names) - 1) / 2)
      guesses = set()
      for x, column in enumerate(columns):
        if name not in column.series:
          continue
        values, chance = column.series[name]
        guesses |= {chance} - {None}
        mean = float(np.mean(values))
        axis.plot([x + offset - .1, x + offset + .1], [mean, mean], color=color, linewidth=2.4,
                  solid_capstyle='butt')
        axis.plot(np.full(len(values), x + offset), values, 'o', color=color, markersize=4.5,
                  markeredgecolor=plots.PAGE[dark]['page'], markeredgewidth=.6)
        axis.annotate(f'{100 * mean:.0f}', (x + offset, max(values)), xytext=(0, 5),
                      textcoords='offset points', ha='center', fontsize=8,
                      color=plots.PAGE[dark]['soft'])
      for chance in guesses:
        axis.axhline(chance, color=color, linewidth=1, linestyle=plots.DOTTED)
    axis.set_xticks(range(len(columns)), [textwrap.fill(column.name, 10) for column in columns])
    axis.set_xlim(-.5, len(columns) - .5)
    axis.set_ylim(0, 1.1)
    axis.set_yticks([0, .25, .5, .75, 1])
    axis.yaxis.set_major_formatter(plots.PERCENT)
    axis.set_ylabel('accuracy')
    axis.grid(axis='y')
    axis.tick_params(length=0)
    plots.legend(figure, [Line2D([], [], color=plots.LINES[dark][rank % 6], marker='o',
                                 linewidth=2.4, label=name) for rank, name in enumerate(names)])
