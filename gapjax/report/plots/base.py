"""What all pictures share: names, order, colours, legends, and how a figure is made and saved.

Every picture is one PNG on a white card of its own, readable on a light and a dark page. Figures
keep no state: they are made with matplotlib's object API, so no display and no pyplot is needed,
and the same arguments give the same bytes.
"""

import contextlib
import dataclasses

import matplotlib.style
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter
from PIL import Image

from gapjax import paths, recipes

DPI = 160
TIMES = '\N{MULTIPLICATION SIGN}'
# Every network's name, in the order of the tables: section 3 of the paper, then section 4.
NETWORKS = {'gapnet': 'GAPNet', 'permutenet': 'PermuteNet',
            'permutenet_fixed': 'PermuteNet, fixed order',
            **{f'resnet{depth}': f'ResNet-{depth}' for depth in (18, 10, 34, 50, 101)},
            **{f'vgg{depth}': f'VGG-{depth}' for depth in (11, 16)},
            **recipes.SHIFT_TITLES,
            'deeplabv3': 'DeepLabv3', 'deeplabv3plus': 'DeepLabv3+'}
# The settings of a sweep, in words.
SETTINGS = {'weight': 'weight', 'max_shift': 'shift', 'warm_up': 'warm-up'}
TARGETS = {'location': 'Location', 'image': 'Image class'}
# Lightness falls monotonically, so that the map survives colour blindness and a grey printer.
ACCURACY_MAP = LinearSegmentedColormap.from_list(
  'accuracy', ['#f6f1e4', '#cfe3d6', '#8cc5c4', '#4797b5', '#23699b', '#1d4f86'])
# Okabe and Ito's palette.
LINES = ['#0072b2', '#d55e00', '#009e73', '#cc79a7', '#b58900', '#56b4e9']
CARD, INK, SOFT, RULE = '#ffffff', '#1f262d', '#616b75', '#e4e7e9'
DASHES = ['-', '-', (0, (4, 2)), '-.', (0, (6, 2)), (0, (1, 1))]
# A network's colour and its dashes. With AugShift a line is solid; a network with and without it
# has one colour.
BROKEN, DOTTED = (0, (4, 1.6)), (0, (1, 1.3))
LOOKS = {'gapnet': (LINES[0], '-'), 'permutenet': (LINES[1], '-'),
         'permutenet_fixed': (LINES[2], DASHES[2]),
         **{name: (SOFT, BROKEN) for name in NETWORKS if name.startswith(('resnet', 'vgg'))},
         'unshifted': (SOFT, DOTTED), 'circular': (LINES[4], BROKEN),
         'full_padding': (LINES[5], BROKEN), 'blurpool': (LINES[1], BROKEN),
         'blurpool_4': (LINES[1], DOTTED), 'aps': (LINES[2], BROKEN), 'lps': (LINES[2], DOTTED),
         'two_crops': (LINES[3], DOTTED), 'augshift': (LINES[0], '-'),
         'augshift_blurpool': (LINES[1], '-'), 'augshift_aps': (LINES[2], '-'),
         'deeplabv3': (LINES[0], '-'), 'deeplabv3plus': (LINES[1], '-')}
FREE = [(colour, dash) for dash in (DOTTED, BROKEN, DASHES[3]) for colour in LINES
        if (colour, dash) not in LOOKS.values()]
LOOKS |= dict(zip((name for name in NETWORKS if name not in LOOKS), FREE, strict=False))
CHANCE = {'color': SOFT, 'linestyle': ':', 'linewidth': 1.2}
# As many decimals as the value needs: 87.5%, 90%.
PERCENT = FuncFormatter(lambda value, _: f'{100 * value:.4g}%')
STYLE = {
  'font.family': 'DejaVu Sans', 'font.size': 9, 'text.color': INK,
  'figure.facecolor': CARD, 'axes.facecolor': CARD,
  'axes.edgecolor': RULE, 'axes.labelcolor': SOFT, 'axes.labelsize': 8.5,
  'axes.titlesize': 9.5, 'axes.titlecolor': INK, 'axes.titlepad': 8, 'axes.titlelocation': 'left',
  'axes.spines.top': False, 'axes.spines.right': False, 'axes.axisbelow': True,
  'axes.grid': True, 'axes.grid.axis': 'y', 'grid.color': RULE, 'grid.linewidth': .7,
  **{f'{axis}tick.{name}': value for axis in 'xy' for name, value in {
    'color': RULE, 'labelcolor': SOFT, 'labelsize': 8, 'major.size': 0, 'minor.size': 0}.items()},
  'legend.frameon': False, 'legend.fontsize': 9}


def square(k):
  """'3 x 3', which no line break may part."""
  return f'{k}\N{NO-BREAK SPACE}{TIMES}\N{NO-BREAK SPACE}{k}'


@dataclasses.dataclass(frozen=True)
class Panel:
  """One trained cell as the pictures see it.

  `per_location` is a k x k nested list of accuracies in [0, 1], rows from the top of the canvas,
  None where nothing was counted; `train_loss`, `eval_accuracy` and `eval_consistency` are lists of
  (step, value); `chance` is the accuracy of guessing; `settings` are those of a network of a sweep:
  {'weight': 0.3, 'max_shift': 4}.
  """
  network: str
  target: str
  grid: int | None = None
  chance: float | None = None
  per_location: list | None = None
  train_loss: list = ()
  eval_accuracy: list = ()
  eval_consistency: list = ()
  settings: dict = dataclasses.field(default_factory=dict)

  @property
  def network_name(self):
    """'AugShift, weight 0.3, shift 4': the network in words."""
    return ', '.join([network_name(self.network), *self._words])

  @property
  def short_name(self):
    """'weight 0.3, shift 4' of a sweep's network, for pictures; of any other its name."""
    return ', '.join(self._words) or self.network_name

  @property
  def _words(self):
    return [f'{SETTINGS[key]} {value:g}' for key, value in self.settings.items()]

  @property
  def task_name(self):
    """'Location, 3 x 3': what is asked, on which grid."""
    name = TARGETS.get(self.target, self.target)
    return f'{name}, {square(self.grid)}' if self.grid else name


def network_name(network):
  """'AugShift': the network in words."""
  return NETWORKS.get(network, network)


def order(cell):
  """Sort key of the project's tables and pictures: target, grid, network, then its settings."""
  def place(value, known):
    return (list(known).index(value), '') if value in known else (len(known), str(value))
  return (place(cell.target, TARGETS), cell.grid or 0, place(cell.network, NETWORKS),
          sorted(cell.settings.items()))


def looks(cells):
  """{short name: its line's colour and dashes}, the same in every picture of a report.

  In a sweep the colour is the weight, from light to strong, and the dashes are the shift.
  """
  unknown = [cell.network for cell in cells if cell.network not in NETWORKS]
  weights, shifts = (sorted({cell.settings[key] for cell in cells if key in cell.settings})
                     for key in ('weight', 'max_shift'))
  def look(name, settings):
    if 'weight' in settings:
      shift = settings.get('max_shift')
      dashes = '-' if shift is None else DASHES[1:][shifts.index(shift) % 5]
      return weight_color(weights.index(settings['weight']), len(weights)), dashes
    place = 3 + unknown.index(name) if name in unknown else 0
    return (LINES[place % 6], DASHES[place % 6]) if place else LOOKS[name]
  return {cell.short_name: dict(zip(('color', 'linestyle'), look(cell.network, cell.settings),
                                    strict=True)) for cell in cells}


def weight_color(rank, count):
  """The colour of the rank-th of so many weights: the larger, the darker."""
  return to_hex(matplotlib.colormaps['viridis'](.86 * (1 - rank / max(count - 1, 1))))


def rows_of(cells):
  """Cells in table order, one list for every (target, grid): one row of panels each."""
  rows = {}
  for cell in sorted(cells, key=order):
    rows.setdefault((cell.target, cell.grid), []).append(cell)
  return list(rows.values())


@contextlib.contextmanager
def drawing(path, *, size, handles=(), **pads):
  """Yields an empty figure of `size` inches in the house style and writes it to `path`.

  Args:
    path: where the PNG goes.
    size: width and height, of which a legend takes `legend_height`.
    handles: of the legend above all panels, in as many rows as its names need; none without.
    pads: between panels, as matplotlib's constrained layout has them.

  The PNG has 256 colours, which is as many as lines and maps need, and a third of the bytes.
  """
  # 'default' first: a matplotlibrc of the user's must not change a byte.
  with matplotlib.style.context(['default', STYLE]):
    figure = Figure(figsize=size, dpi=DPI, layout='constrained')
    canvas = FigureCanvasAgg(figure)
    figure.get_layout_engine().set(**pads)
    yield figure
    if handles:
      figure.legend(handles=handles, loc='outside upper left', handlelength=2.2,
                    ncols=_legend_columns(handles, size[0]))
    canvas.draw()
  image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert('RGB')
  with paths.opened(path) as file:
    image.quantize(256, dither=Image.Dither.NONE).save(file, 'png', optimize=True)


def handles_of(look, name_of=str):
  """The legend's sample lines for `looks`."""
  return [Line2D([], [], linewidth=1.8, label=name_of(name), **style)
          for name, style in look.items()]


def _legend_columns(handles, width):
  """As many as so many inches hold, 7.8 at most; a letter takes about .067, a sample line .62."""
  widths = [.62 + .067 * len(handle.get_label()) for handle in handles]
  return next((n for n in range(len(handles), 1, -1)
               if sum(map(max, np.array_split(widths, n))) < min(width, 7.8)), 1)


def legend_height(handles, width=7.8):
  """Inches that a legend takes above a picture of so many."""
  return .15 + .2 * -(-len(handles) // _legend_columns(handles, width))

