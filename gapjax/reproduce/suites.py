"""What to train: the cells of every table and figure, at every scale.

A cell is one network trained once a seed.
"""

import dataclasses
import fnmatch
import functools
import operator
from collections.abc import Mapping

from ml_collections import ConfigDict

from gapjax import config as configs
from gapjax import recipes
from gapjax.errors import UsageError
from gapjax.records.schema import SETTINGS, VARIED, cell_name

# Fields of the config that a cell's name says, by task: changed, a row of a table would be called
# what it is not.
NAMED = {
  'canvas': {'canvas.grid', 'canvas.target', *(
    f'model.{key}' for model in recipes.NETWORKS.values() for key in model)},
  'classification': {'model.name', 'model.head', *(
    f'{part}.{key}' for network in recipes.SHIFT_NETWORKS.values()
    for part, fields in zip(('model', 'augshift'), network, strict=True) for key in fields)},
  'segmentation': {'model.name'}}


@dataclasses.dataclass(frozen=True)
class Cell:
  """One cell of a table: a network trained once a seed.

  config: what trains it. identity: what tells it from the other cells of its suite, beside what the
  config asks and of which dataset: network, of a sweep its SETTINGS, of an ablation what is VARIED.
  paper: {metric: published fraction}. attack: whether its position channels are ranked and removed
  once it is trained. changes: the fields in which it is not the suite's ('num_epochs=20').
  """
  config: ConfigDict
  identity: Mapping[str, str | float]
  paper: Mapping[str, float] = dataclasses.field(default_factory=dict)
  attack: bool = False
  changes: tuple[str, ...] = ()

  @property
  def fields(self) -> dict:
    """What its records carry of it (records/schema.py)."""
    c = self.config
    asked = {'target': c.canvas.target, 'grid': c.canvas.grid} if c.task == 'canvas' else {}
    return {'task': c.task, **self.identity, **asked, 'dataset': c.data.name}

  @property
  def name(self) -> str:
    return cell_name(self.fields)

  @property
  def named(self) -> set[str]:
    """The fields of its config that its name says."""
    return {'task', 'data.name', *NAMED[self.config.task],
            *(f'model.{key}' for key in VARIED if key in self.identity)}


def chosen(cells, only: str | None) -> list[Cell]:
  """The cells whose names match one of the patterns in `only` ('augshift/* resnet18/cifar10'), in
  the order of the patterns.

  Raises UsageError, listing the names, when a pattern matches none.
  """
  if only is None:
    return cells
  patterns = only.split()
  for pattern in patterns or ['']:
    if not fnmatch.filter([cell.name for cell in cells], pattern):
      raise UsageError(f'--cells: no cell is named `{pattern}`; there are '
                       f'{", ".join(cell.name for cell in cells)}')
  matching = (cell for p in patterns for cell in cells if fnmatch.fnmatch(cell.name, p))
  return list({cell.name: cell for cell in matching}.values())


def by_worth(suites, scale: str, only: str | None) -> list[tuple[str, str]]:
  """Several suites as [(suite, the patterns of `chosen`)], in an order of worth: WORTH, then the
  rest; with `only`, each suite's cells that it names.

  Raises UsageError when a pattern of `only` matches no cell of any.
  """
  names = {suite: [cell.name for cell in SUITES[suite](scale)] for suite in suites}
  if only is None:
    return [*(line for line in WORTH if line[0] in suites), *((suite, '*') for suite in suites)]
  chosen([cell for suite in suites for cell in SUITES[suite](scale)], only)
  return [(suite, ' '.join(some)) for suite in suites
          if (some := [p for p in only.split() if fnmatch.filter(names[suite], p)])]


def changed(cells, changes, *, only=None) -> list[Cell]:
  """The cells with the fields that flags '--config.FIELD=VALUE' set.

  Raises UsageError on what cannot be, on the seed, on a field that none of the cells that `only`
  chooses reads, that their names say, or in which they differ: that is what the suite compares.
  """
  fields, some = configs.named_fields(changes), chosen(cells, only)
  if 'seed' in fields:
    raise UsageError('--config.seed: a cell is trained with seeds 0 to --seeds - 1; use --seeds')
  named = set().union(*(cell.named for cell in some))
  for name in fields:
    if name in named:
      raise UsageError(f'--config.{name}: the names of the cells say it, so a row would be called '
                       'what it is not; choose cells with --cells, or train one network of your '
                       'own with gapjax train')
  tasks = list(dict.fromkeys(cell.config.task for cell in some))

  def with_changes(cell):
    try:
      config = configs.with_fields(cell.config, changes, tasks=tasks)
    except UsageError:
      if cell.name in {one.name for one in some}:
        raise
      return cell  # it has not been asked for, and cannot have been trained so
    return dataclasses.replace(cell, config=config, changes=tuple(
      change.partition('config.')[2] for change in changes))

  new = [with_changes(cell) for cell in cells]
  for name in fields:
    values = dict.fromkeys(repr(operator.attrgetter(name)(cell.config)) for cell in some)
    if len(values) > 1:
      raise UsageError(f'--config.{name}: the cells differ in it ({", ".join(values)}); '
                       'choose some that do not with --cells')
  return new


def in_bfloat16(suite):
  """A suite whose networks compute in bfloat16 at scale 'full', which is for accelerators."""
  @functools.wraps(suite)
  def cells(scale):
    found = suite(scale)
    for cell in found if scale == 'full' else ():
      cell.config.model.dtype = 'bfloat16'
    return found
  return cells


# ---- Table 1: location and image classification on a canvas (section 3) --------------------------

GRIDS = (3, 5, 7)
# Table 1 of the paper: {(network, target): {grid: fraction}}; 5x5 was not published.
TABLE1 = {
  ('gapnet', 'location'): {3: 1.0, 7: 1.0},
  ('permutenet', 'location'): {3: 0.788, 7: 0.214},
  ('gapnet', 'image'): {3: 0.826, 7: 0.821},
  ('permutenet', 'image'): {3: 0.736, 7: 0.699},
}


def canvas_cell(network: str, target: str, grid: int, base: ConfigDict) -> Cell:
  """A network (a key of recipes.NETWORKS), target and grid over a base config."""
  published = TABLE1.get((network, target), {}).get(grid)
  paper = {} if published is None else {f'{target}_accuracy_best_random': published}
  return Cell(recipes.on_canvas(network, base, target=target, grid=grid), {'network': network},
              paper)


@in_bfloat16
def table1(scale: str) -> list[Cell]:
  """{GAPNet, PermuteNet} x {location, image} x {3x3, 5x5, 7x7} on CIFAR-10 (table 1).

  Scale 'small' is width 16, images shrunk to 16x16, the first 10,000 training and 500 test images,
  and 10, 6 and 4 epochs with cosine decay: it shows the ordering in one to two hours on 2 cores,
  not the paper's numbers. Scale 'narrow' is the paper's recipe, images and steps at width 16;
  GAPNet finds every location after one epoch, and has two.
  """
  narrow = {} if scale == 'full' else dict(model=dict(width=16))
  small = {} if scale != 'small' else dict(
    data=dict(image_size=16, train_images=10_000), schedule=dict(name='cosine'),
    eval=dict(images=500))
  base = configs.replaced(configs.default(), **narrow, **small)
  cells = [canvas_cell(network, target, grid, base)
           for grid in GRIDS for target in configs.TARGETS for network in ('gapnet', 'permutenet')]
  for cell in cells:
    if scale == 'small':
      cell.config.num_epochs = {3: 10, 5: 6, 7: 4}[cell.config.canvas.grid]
    else:  # the exact evaluation of 7x7 is 490,000 canvases
      cell.config.eval.batch_size = 500
    if scale == 'full':  # where an epoch takes seconds
      cell.config.checkpoint.every_epochs = 5.0
    if scale == 'narrow' and cell.name.startswith('gapnet/location/'):
      cell.config.num_epochs = 2
  return cells


# ---- Table 2: accuracy and shift consistency (section 4) -----------------------------------------

# {(network, dataset): (top-1, consistency)}; the paper has no others.
TABLE2 = {
  ('resnet18', 'cifar10'): (.931, .908), ('resnet18', 'cifar100'): (.726, .701),
  ('blurpool', 'cifar10'): (.925, .925), ('blurpool', 'cifar100'): (.724, .782),
  ('augshift', 'cifar10'): (.921, .948), ('augshift', 'cifar100'): (.726, .856),
}
CIFAR = {'small': recipes.small_cifar, 'narrow': recipes.narrow_cifar, 'full': recipes.cifar}


def shift_cell(network: str, base: ConfigDict, **pair) -> Cell:
  """A network (a key of recipes.SHIFT_NETWORKS) over a base config; pair: SETTINGS of a sweep."""
  config = recipes.shifted(network, base, **pair)
  # The paper's numbers are for test images, and its weight and shifts are not known.
  published = (TABLE2.get((network, config.data.name)) if not pair and not config.data.held_out
               else None)
  paper = dict(zip(('image_accuracy', 'consistency'), published or (), strict=False))
  # The same network by its own name, when it is not the paper's.
  name = config.model.name if network == 'resnet18' else network
  return Cell(config, {'network': name, **pair}, paper)


@in_bfloat16
def table2(scale: str) -> list[Cell]:
  """SHIFT_NETWORKS x {CIFAR-10, CIFAR-100} (table 2); the recipe of each scale: CIFAR."""
  base = CIFAR[scale]
  return [shift_cell(network, base(dataset))
          for dataset in ('cifar10', 'cifar100') for network in recipes.SHIFT_NETWORKS]


@in_bfloat16
def augshift_sweep(scale: str) -> list[Cell]:
  """AugShift on CIFAR-10 for several weights and maximum shifts, beside the baseline.

  From it come the defaults of config.augshift (of the settings that lose at most one point of
  accuracy, the most consistent), so it is measured on training images that were left out, never on
  test images; headline metrics only.
  """
  base = configs.replaced(CIFAR[scale]('cifar10'), eval=dict(images=0, max_shift=0),
                          data=dict(held_out=4_000 if scale == 'small' else 5_000))
  settings = [(3.0, 4, 0.0), (1.0, 4, 0.0), (1.0, 8, 0.0), (3.0, 8, 0.0), (10.0, 4, 0.0),
              (5.0, 4, 0.0), (10.0, 4, 0.5), (0.0, 4, 0.0)]
  return [shift_cell('resnet18', base), *(
    shift_cell('augshift', base, **dict(zip(SETTINGS, values, strict=True)))
    for values in settings)]


# ---- Position channels: segmentation to attack (section 5) ---------------------------------------


@in_bfloat16
def attack(scale: str) -> list[Cell]:
  """DeepLabv3 on CamVid, and table 1's networks on 3x3: trained, ranked and attacked.

  Beside GAPNet, whose channels each have their place, PermuteNet is the control. Scale 'pretrained'
  is DeepLabv3+ alone, from a network that ImageNet trained, at half the size: for CPUs.
  """
  if scale == 'pretrained':
    return [Cell(recipes.camvid(scale), {'network': 'deeplabv3plus'}, attack=True)]
  canvas = [dataclasses.replace(cell, attack=True) for cell in table1(scale)
            if cell.config.canvas.grid == 3]
  for cell in canvas:
    cell.config.neurons.images = 2_000
  return [Cell(recipes.camvid(scale), {'network': 'deeplabv3'}, attack=True), *canvas]


# ---- Quickstart: the whole paper on scikit-learn's digits ----------------------------------------


def quickstart(scale: str) -> list[Cell]:
  """On digits, no step more than the claims need. Claim 1: GAPNet, PermuteNet and the fixed control
  name the place, in equal steps, four times as many as GAPNet and the control take to find every
  place. Claim 2: the baseline, and two crops without and with the pairwise loss. Claim 3: a
  segmentation network whose position channels are removed.
  """
  canvas = configs.replaced(recipes.digits(), num_epochs=4, data=dict(image_size=8),
                            eval=dict(every_epochs=1), checkpoint=dict(every_epochs=4.0))
  moved, scenes = recipes.digits_moved(), recipes.digit_scenes()
  if scale == 'tiny':  # for continuous integration: shows that it runs, not what it finds
    digits = dict(num_epochs=2, data=dict(image_size=8), model=dict(width=8))
    canvas = configs.replaced(canvas, **digits, eval=dict(images=100, every_epochs=1))
    moved = configs.replaced(moved, **digits, eval=dict(images=100, every_epochs=1, pairs=2,
                                                        max_shift=4, shift_images=20))
    scenes = configs.replaced(scenes, num_epochs=1, data=dict(train_images=40),
                              model=dict(width=4), eval=dict(images=20),
                              neurons=dict(images=20, counts=3, random_orders=2))
  return [*(canvas_cell(network, 'location', 3, canvas) for network in recipes.NETWORKS),
          Cell(scenes, {'network': 'deeplabv3'}, attack=True),
          *(shift_cell(network, moved) for network in ('resnet18', 'two_crops', 'augshift'))]


# ---- Without published numbers: where permuting hurts, and what padding gives away ---------------


# Where the channels are permuted, each network GAP and one linear layer: never, in one order fixed
# for the run, or anew at every forward pass, from the pooled channels towards the image.
PERMUTED = {
  'never': dict(head='linear'), 'fixed': recipes.NETWORKS['permutenet_fixed'],
  'pooled': recipes.NETWORKS['permutenet'],
  **{f'stage{s}': dict(recipes.NETWORKS['permutenet'], permute_at=f'stage{s}')
     for s in (4, 3, 2, 1)}}


@in_bfloat16
def ablations(scale: str) -> list[Cell]:
  """One thing varied at a time, on the 3x3 canvas: where channels are permuted, for location and
  image; and how convolutions pad, for GAPNet's and PermuteNet's location ('none' shrinks the maps
  of these canvases to nothing). PermuteNet's location with zero padding is in both, trained twice.
  And PermuteNet for five times as many epochs, since it learns slowly, and with four times as many
  channels (small: the paper's 512). Small: on digits, as in the quickstart.
  """
  base = recipes.digits() if scale == 'small' else configs.default()

  def cell(target, model, **identity):
    config = recipes.on_canvas('gapnet', base, target=target, grid=3)
    return Cell(configs.replaced(config, model=model), identity)

  longer, wider = ([cell(target, PERMUTED['pooled'], permute_at=f'pooled_{what}')
                    for target in configs.TARGETS] for what in ('5x', 'wide'))
  for c in (cell.config for cell in longer):
    c.num_epochs *= 5
    c.eval.every_epochs = c.num_epochs // 10
  for c in (cell.config for cell in wider):
    c.model.width *= 4
  return [
    *(cell(target, model, permute_at=where)
      for where, model in PERMUTED.items() for target in configs.TARGETS), *longer, *wider,
    *(cell('location', dict(recipes.NETWORKS[network], padding=padding), padding=padding,
           network=network)
      for padding in ('zero', 'partial', 'replicate', 'reflect', 'circular')
      for network in ('gapnet', 'permutenet'))]


SUITES = {'quickstart': quickstart, 'table1': table1, 'table2': table2,
          'augshift_sweep': augshift_sweep, 'attack': attack, 'ablations': ablations}
# What tells most of the paper, first: of several suites, all cells of a line before the next one's.
WORTH = (('table1', 'permutenet/location/3x3 */image/3x3 gapnet/location/3x3'),
         ('table2', 'resnet18/cifar10 augshift/cifar10 blurpool/cifar10 two_crops/cifar10'),
         ('table1', '*/location/7x7'), ('attack', 'deeplabv3/camvid'))
SCALES = {
  **dict.fromkeys(SUITES, ('small', 'full')), 'quickstart': ('digits', 'tiny'),
  'attack': ('small', 'pretrained', 'full'),
  **dict.fromkeys(('table1', 'table2', 'augshift_sweep'), ('small', 'narrow', 'full'))}
