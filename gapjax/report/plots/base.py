"""The pictures of a report: accuracy per location, learning curves.

Every function writes one PNG and keeps no state: figures are made with matplotlib's object API, so
no display and no pyplot is needed, and the same arguments give the same bytes. Pictures with axes
come in a light and a dark version (`dark=True`) whose backgrounds are the report's page colours.
"""

import contextlib
import dataclasses
import re

import matplotlib.style
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, Normalize, to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from gapjax import paths

DPI = 160
TIMES = '\N{MULTIPLICATION SIGN}'
# Every network's name, in the order of the tables: section 3 of the paper, then section 4.
NETWORKS = {'gapnet': 'GAPNet', 'permutenet': 'PermuteNet',
            'permutenet_fixed': 'PermuteNet, fixed order',
            **{f'resnet{depth}': f'ResNet-{depth}' for depth in (18, 10, 34, 50, 101)},
            **{f'vgg{depth}': f'VGG-{depth}' for depth in (11, 16)},
            'blurpool': 'BlurPool', 'aps': 'APS', 'two_crops': 'Two crops, weight 0',
            'augshift': 'AugShift', 'augshift_blurpool': 'AugShift + BlurPool',
            'augshift_aps': 'AugShift + APS',
            'deeplabv3': 'DeepLabv3', 'deeplabv3plus': 'DeepLabv3+'}
# In a sweep a network's name carries settings: 'augshift,weight=0.3,max_shift=4'.
SETTINGS = {'weight': 'weight', 'max_shift': 'shift', 'warm_up': 'warm-up'}
SETTING = re.compile(r',(\w+)=(\d+(?:\.\d+)?(?:e-?\d+)?)')
TARGETS = {'location': 'Location', 'image': 'Image class'}
# Lightness falls monotonically, so that the map survives colour blindness and a grey printer; its
# dark end stays lighter than the dark page.
ACCURACY_MAP = LinearSegmentedColormap.from_list(
  'accuracy', ['#f6f1e4', '#cfe3d6', '#8cc5c4', '#4797b5', '#23699b', '#1d4f86'])
# Okabe and Ito's palette, and its lighter relatives for the dark page.
LINES = {False: ['#0072b2', '#d55e00', '#009e73', '#cc79a7', '#b58900', '#56b4e9'],
         True: ['#5ab4ec', '#f0883e', '#35c597', '#dd9cc0', '#e3c452', '#a9c7e8']}
DASHES = ['-', '-', (0, (4, 2)), '-.', (0, (6, 2)), (0, (1, 1))]
# A network's colour in LINES (or PAGE) and its dashes. With AugShift a line is solid; a network
# with and without it has one colour.
BROKEN, DOTTED = (0, (4, 1.6)), (0, (1, 1.3))
LOOKS = {'gapnet': (0, '-'), 'permutenet': (1, '-'), 'permutenet_fixed': (2, DASHES[2]),
         **{name: ('soft', BROKEN) for name in NETWORKS if name.startswith(('resnet', 'vgg'))},
         'blurpool': (1, BROKEN), 'aps': (2, BROKEN), 'two_crops': (3, DOTTED),
         'augshift': (0, '-'), 'augshift_blurpool': (1, '-'), 'augshift_aps': (2, '-'),
         'deeplabv3': (0, '-'), 'deeplabv3plus': (1, '-')}
PAGE = {False: {'page': '#ffffff', 'ink': '#1f262d', 'soft': '#616b75', 'rule': '#e4e7e9'},
        True: {'page': '#12161b', 'ink': '#e3e8ec', 'soft': '#98a4af', 'rule': '#2a323a'}}
# As many decimals as the value needs: 87.5%, 90%.
PERCENT = FuncFormatter(lambda value, _: f'{100 * value:.4g}%')


def square(k):
  """'3 x 3', which no line break may part."""
  return f'{k}\N{NO-BREAK SPACE}{TIMES}\N{NO-BREAK SPACE}{k}'


@dataclasses.dataclass(frozen=True)
class Panel:
  """One trained cell as the pictures see it.

  `per_location` is a k x k nested list of accuracies in [0, 1], rows from the top of the canvas,
  None where nothing was counted; `train_loss`, `eval_accuracy` and `eval_consistency` are lists of
  (step, value); `chance` is the accuracy of guessing. A network of a sweep carries its settings:
  'augshift,weight=0.3,max_shift=4'.
  """
  network: str
  target: str
  grid: int | None = None
  chance: float | None = None
  per_location: list | None = None
  train_loss: list = ()
  eval_accuracy: list = ()
  eval_consistency: list = ()

  @property
  def network_name(self):
    return network_name(self.network)

  @property
  def task_name(self):
    """'Location, 3 x 3': what is asked, on which grid."""
    name = TARGETS.get(self.target, self.target)
    return f'{name}, {square(self.grid)}' if self.grid else name


def settings(network):
  """'augshift,weight=0.3,max_shift=4' to {'weight': 0.3, 'max_shift': 4.0}."""
  return {key: float(value) for key, value in SETTING.findall(network)}


def network_name(network):
  """'AugShift, weight 0.3, shift 4': the network's name in words."""
  name = network.split(',')[0]
  return ', '.join([NETWORKS.get(name, name), *(
    f'{SETTINGS.get(key, key)} {value:g}' for key, value in settings(network).items())])


def short_name(network):
  """'weight 0.3, shift 4' of a sweep's network, for pictures; of any other its name."""
  name = network_name(network)
  return name.partition(', ')[2] if settings(network) else name


def order(cell):
  """Sort key of the project's tables and pictures: target, grid, network, then its settings."""
  def place(value, known):
    return (list(known).index(value), '') if value in known else (len(known), str(value))
  return (place(cell.target, TARGETS), cell.grid or 0,
          place(cell.network.split(',')[0], NETWORKS), sorted(settings(cell.network).items()))


def looks(networks, *, dark):
  """{network: its line's colour and dashes}, the same in every picture of a report.

  In a sweep the colour is the weight, from light to strong, and the dashes are the shift.
  """
  unknown = [name for name in networks if name.split(',')[0] not in NETWORKS]
  weights, shifts = (sorted({settings(name)[key] for name in networks if key in settings(name)})
                     for key in ('weight', 'max_shift'))
  def look(name):
    found = settings(name)
    if 'weight' in found:
      color = weight_color(weights.index(found['weight']), len(weights), dark=dark)
      dashes = DASHES[1:][shifts.index(found['max_shift']) % 5] if 'max_shift' in found else '-'
    else:
      place = 3 + unknown.index(name) if name in unknown else 0
      color, dashes = (place % 6, DASHES[place % 6]) if place else LOOKS[name.split(',')[0]]
      color = PAGE[dark][color] if isinstance(color, str) else LINES[dark][color]
    return {'color': color, 'linestyle': dashes}
  return {name: look(name) for name in networks}


def weight_color(rank, count, *, dark):
  """The colour of the rank-th of so many weights: the larger, the further from the page's."""
  share = rank / max(count - 1, 1)
  return to_hex(matplotlib.colormaps['viridis'](.3 + .7 * share if dark else .86 * (1 - share)))


def rows_of(cells):
  """Cells in table order, one list for every (target, grid): one row of panels each."""
  rows = {}
  for cell in sorted(cells, key=order):
    rows.setdefault((cell.target, cell.grid), []).append(cell)
  return list(rows.values())


@contextlib.contextmanager
def drawing(path, *, size, dark=False):
  """Yields an empty figure of `size` inches in the house style and writes it to `path`."""
  colors = PAGE[dark]
  style = {
    'font.family': 'DejaVu Sans', 'font.size': 9, 'text.color': colors['ink'],
    'figure.facecolor': colors['page'], 'axes.facecolor': colors['page'],
    'axes.edgecolor': colors['rule'], 'axes.labelcolor': colors['soft'], 'axes.labelsize': 8.5,
    'axes.titlesize': 9.5, 'axes.titlecolor': colors['ink'], 'axes.titlepad': 8,
    'axes.spines.top': False, 'axes.spines.right': False, 'axes.axisbelow': True,
    'xtick.color': colors['rule'], 'ytick.color': colors['rule'], 'xtick.labelsize': 8,
    'xtick.labelcolor': colors['soft'], 'ytick.labelcolor': colors['soft'], 'ytick.labelsize': 8,
    'grid.color': colors['rule'], 'grid.linewidth': .7, 'legend.frameon': False,
    'legend.fontsize': 9, 'svg.hashsalt': 'gapjax'}
  # 'default' first: a matplotlibrc of the user's must not change a byte.
  with matplotlib.style.context(['default', style]):
    figure = Figure(figsize=size, dpi=DPI, layout='constrained')
    FigureCanvasAgg(figure)
    yield figure
    with paths.opened(path) as file:
      figure.savefig(file, format='png', metadata={'Software': None})


def location_heatmaps(cells, path, *, dark=False):
  """Draws accuracy per location, a k x k map for every cell that has `per_location`.

  One row of maps for every target and grid, the networks side by side, one colour scale from 0 to 1
  for all; the value stands in every square, in percent, up to 7 x 7.

  Args:
    cells: `Panel`s.
    path: where the PNG goes.
    dark: draw for a dark page.

  Raises:
    ValueError: no cell has `per_location`.
  """
  rows = rows_of([cell for cell in cells if cell.per_location is not None])
  if not rows:
    raise ValueError('no cell has per_location')
  columns = max(map(len, rows))
  size = (2.6 * columns if columns > 1 else 3.3, (2.95 if columns > 1 else 3.5) * len(rows) + .5)
  with drawing(path, size=size, dark=dark) as figure:
    figure.get_layout_engine().set(w_pad=.02, h_pad=.05, hspace=.09, wspace=.03)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for axis in axes.ravel():
      axis.set_axis_off()
    for row, cells_ in zip(axes, rows, strict=True):
      for axis, cell in zip(row, cells_, strict=False):
        picture = _heatmap(axis, cell, page=PAGE[dark]['page'])
        if cell is cells_[0]:
          axis.text(0, 1.16, cell.task_name, transform=axis.transAxes, weight='bold', size=10)
    bar = figure.colorbar(picture, ax=axes, location='bottom', shrink=.5, aspect=45, pad=.02,
                          ticks=[0, .25, .5, .75, 1], format=PERCENT)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)


def _heatmap(axis, cell, *, page):
  """Fills `axis` with one cell's map and returns the picture for the colour bar."""
  values = np.asarray(cell.per_location, float)  # (k, k); None turns into nan
  k = len(values)
  picture = axis.imshow(values, cmap=ACCURACY_MAP, norm=Normalize(0, 1))
  for i in range(1, k):
    axis.axhline(i - .5, color=page, linewidth=2.5 if k <= 5 else 1.2)
    axis.axvline(i - .5, color=page, linewidth=2.5 if k <= 5 else 1.2)
  counted = values[np.isfinite(values)]
  mean = f'{100 * counted.mean():.1f}%' if len(counted) else ''
  axis.set_title(f'{cell.network_name}  {mean}', loc='left', fontsize=9, pad=5)
  if k <= 7:
    for (y, x), value in np.ndenumerate(values):
      if np.isnan(value):
        continue
      axis.text(x, y, f'{100 * value:.{1 if k <= 5 else 0}f}', ha='center', va='center',
                fontsize=10 if k <= 3 else 8.5 if k <= 5 else 7,
                color='white' if value > .66 else '#1f262d')
  return picture


def _smooth(values):
  """Running mean over about a twenty-fifth of the points, shorter at both ends."""
  window = np.ones(max(len(values) // 25, 1))
  return (np.convolve(values, window, 'same')
          / np.convolve(np.ones(len(values)), window, 'same'))


def _series(points):
  """(step, value) pairs to two arrays; a diverged loss leaves a gap, not a broken axis."""
  steps, values = np.asarray(points, float).T  # None turns into nan
  return steps, np.where(np.isfinite(values), values, np.nan)


def curves(cells, path, *, dark=False):
  """Draws training loss, evaluation accuracy and, where there is one, consistency over the steps.

  One row of panels for every target and grid, one line a cell, chance dotted. A loss of more than
  60 points is drawn faint, with its running mean on top; its axis is logarithmic when the values of
  the row span more than a factor of 20.

  Args:
    cells: `Panel`s; those without a curve are left out.
    path: where the PNG goes.
    dark: draw for a dark page.

  Raises:
    ValueError: no cell has a curve.
  """
  rows = rows_of([cell for cell in cells if len(cell.train_loss) or len(cell.eval_accuracy)
                  or len(cell.eval_consistency)])
  if not rows:
    raise ValueError('no cell has a curve')
  look = looks([cell.network for row in rows for cell in row], dark=dark)
  soft = PAGE[dark]['soft']
  columns = 3 if any(len(cell.eval_consistency) for row in rows for cell in row) else 2
  handles = handles_of(look)
  if any(cell.chance is not None for row in rows for cell in row):
    handles.append(Line2D([], [], color=soft, linestyle=':', linewidth=1.2, label='chance'))
  with drawing(path, size=(7.8, 2.55 * len(rows) + legend_height(handles)), dark=dark) as figure:
    figure.get_layout_engine().set(w_pad=.08, h_pad=.09)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for panels, row in zip(axes, rows, strict=True):
      _loss_panel(panels[0], row, look)
      _fraction_panel(panels[1], row, 'eval_accuracy', look)
      for chance in sorted({cell.chance for cell in row if cell.chance is not None}):
        panels[1].axhline(chance, color=soft, linestyle=':', linewidth=1.2)
      if columns > 2:  # no value of it is a natural zero
        _fraction_panel(panels[2], row, 'eval_consistency', look, fitted=True)
      for axis, what in zip(panels, ('training loss', 'evaluation accuracy', 'consistency'),
                            strict=False):
        axis.set_title(f'{row[0].task_name}: {what}', loc='left')
    for axis in axes[-1]:
      axis.set_xlabel('step')
    legend(figure, handles)


def handles_of(look):
  """The legend's sample lines for `looks`."""
  return [Line2D([], [], linewidth=1.8, label=short_name(name), **style)
          for name, style in look.items()]


def _legend_columns(handles):
  """As many as 7.8 inches hold, of which a letter takes about .067 and a sample line .62."""
  widths = [.62 + .067 * len(handle.get_label()) for handle in handles]
  return next((n for n in range(len(handles), 1, -1)
               if sum(map(max, np.array_split(widths, n))) < 7.8), 1)


def legend(figure, handles):
  """A legend above all panels, in as many rows as its names need."""
  figure.legend(handles=handles, loc='outside upper left', ncols=_legend_columns(handles),
                handlelength=2.2)


def legend_height(handles):
  """Inches that `legend` takes."""
  return .15 + .2 * -(-len(handles) // _legend_columns(handles))


def _loss_panel(axis, row, look):
  lows, highs = [], []
  for cell in row:
    if not len(cell.train_loss):
      continue
    steps, values = _series(cell.train_loss)
    many = len(values) > 60
    if many:
      axis.plot(steps, values, color=look[cell.network]['color'], linewidth=.6, alpha=.25)
    axis.plot(steps, _smooth(values) if many else values, linewidth=_width(row),
              **look[cell.network])
    positive = values[values > 0]  # False for nan
    if len(positive):
      lows.append(positive.min())
      highs.append(positive.max())
  if lows and max(highs) > 20 * min(lows):
    axis.set_yscale('log', nonpositive='mask')
  else:
    axis.set_ylim(bottom=0)
  axis.grid(axis='y')
  axis.tick_params(which='both', length=0)
  axis.margins(x=.02)


def _fraction_panel(axis, row, name, look, *, fitted=False):
  """One curve of every cell, in percent, from 0 or, if `fitted`, from the ten below the lowest."""
  lowest = 1
  for cell in row:
    if len(getattr(cell, name)):
      steps, values = _series(getattr(cell, name))
      lowest = min(lowest, np.nanmin(values, initial=1))
      axis.plot(steps, values, linewidth=_width(row), marker='o' if len(values) < 2 else '',
                **look[cell.network])
  low = max(0, np.ceil(10 * lowest - 1) / 10) if fitted else 0
  axis.set_ylim(low, 1 + .04 * (1 - low))
  if not fitted:
    axis.set_yticks([0, .25, .5, .75, 1])
  axis.yaxis.set_major_formatter(PERCENT)
  axis.grid(axis='y')
  axis.tick_params(length=0)
  axis.margins(x=.02)


def _width(row):
  return 1.8 if len(row) < 5 else 1.4
