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


def dots(columns, path):
  """Draws a dot a seed and a bar at their mean: one column a value, one colour a series.

  Args:
    columns: `Column`s, left to right; guessing may be None.
    path: where the PNG goes.
  """
  names = list(dict.fromkeys(name for column in columns for name in column.series))
  colors, guesses = dict(zip(names, plots.LINES, strict=False)), {}
  handles = [Line2D([], [], color=color, marker='o', linewidth=2.4, label=name)
             for name, color in colors.items()]
  with plots.drawing(path, size=(7.8, 3.4), handles=handles) as figure:
    axis = figure.subplots()
    for at, column in enumerate(columns):
      for name, (values, chance) in column.series.items():
        x, color = at + .24 * (names.index(name) - (len(names) - 1) / 2), colors[name]
        mean = float(np.mean(values))
        axis.plot([x - .1, x + .1], [mean, mean], color=color, linewidth=2.4,
                  solid_capstyle='butt')
        axis.plot(np.full(len(values), x), values, 'o', color=color, markersize=4.5,
                  markeredgecolor=plots.CARD, markeredgewidth=.6)
        axis.annotate(f'{100 * mean:.0f}', (x, max(values)), xytext=(0, 5),
                      textcoords='offset points', ha='center', fontsize=8, color=plots.SOFT)
        guesses[name, chance] = color
    for (_, chance), color in guesses.items():
      if chance is not None:
        axis.axhline(chance, color=color, linewidth=1, linestyle=plots.DOTTED)
    axis.set_xticks(range(len(columns)), [textwrap.fill(column.name, 10) for column in columns])
    axis.set(xlim=(-.5, len(columns) - .5), ylim=(0, 1.1), yticks=[0, .25, .5, .75, 1],
             ylabel='accuracy')
    axis.yaxis.set_major_formatter(plots.PERCENT)
