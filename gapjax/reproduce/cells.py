"""The cells of every table and figure: which networks, on what, at which scale.

A cell is one network trained once a seed. Recipes that configs/ and the suites share are here, so
that `gapjax train --config=...` and `gapjax reproduce` train the same thing.
"""

import dataclasses
from collections.abc import Mapping

from ml_collections import ConfigDict

from gapjax import config as configs

# ---- Table 1: location and image classification on a canvas (section 3) --------------------------

GRIDS = (3, 5, 7)
# Table 1 of the paper: {(network, target): {grid: fraction}}; 5x5 was not published.
TABLE1 = {
  ('gapnet', 'location'): {3: 1.0, 7: 1.0},
  ('permutenet', 'location'): {3: 0.788, 7: 0.214},
  ('gapnet', 'image'): {3: 0.826, 7: 0.821},
  ('permutenet', 'image'): {3: 0.736, 7: 0.699},
}
NETWORKS = {
  'gapnet': dict(head='gap'),
  'permutenet': dict(head='permuted', permutation='batch'),
  'permutenet_fixed': dict(head='permuted', permutation='fixed'),
}


@dataclasses.dataclass(frozen=True)
class Cell:
  """One cell of a table: a network trained once a seed.

  name: 'gapnet/location/3x3' or 'augshift/cifar10'. paper: {metric: published fraction}. attack:
  whether its position channels are ranked and removed once it is trained. changes: the fields in
  which it is not the suite's ('num_epochs=20').
  """
  name: str
  config: ConfigDict
  paper: Mapping[str, float] = dataclasses.field(default_factory=dict)
  attack: bool = False
  changes: tuple[str, ...] = ()


def attacked(cell: Cell) -> Cell:
  """The cell, its position channels ranked and removed too."""
  return dataclasses.replace(cell, attack=True)


def canvas_cell(network: str, target: str, grid: int, base: ConfigDict) -> Cell:
  """A network (a key of NETWORKS), target and grid over a base config."""
  config = ConfigDict(base.to_dict())
  config.model.update(NETWORKS[network])
  config.canvas.update(grid=grid, target=target)
  published = TABLE1.get((network, target), {}).get(grid)
  paper = {} if published is None else {f'{target}_accuracy_best_random': published}
  return Cell(f'{network}/{target}/{grid}x{grid}', config, paper)


def table1(scale: str) -> list[Cell]:
  """{GAPNet, PermuteNet} x {location, image} x {3x3, 5x5, 7x7} on CIFAR-10 (table 1).

  Scale 'small' is width 16, images shrunk to 16x16, the first 10,000 training and 500 test images,
  and 10, 6 and 4 epochs with cosine decay: it shows the ordering in one to two hours on 2 cores,
  not the paper's numbers. Scale 'narrow' is the paper's recipe, images and steps at width 16;
  GAPNet finds every location after one epoch, and has two.
  """
  base = configs.default()
  if scale != 'full':
    base.model.width = 16
  if scale == 'small':
    base.data.update(image_size=16, train_images=10_000)
    base.schedule.name = 'cosine'
    base.eval.images = 500
  cells = [canvas_cell(network, target, grid, base)
           for grid in GRIDS for target in configs.TARGETS for network in ('gapnet', 'permutenet')]
  for cell in cells:
    if scale == 'small':
      cell.config.num_epochs = {3: 10, 5: 6, 7: 4}[cell.config.canvas.grid]
    else:  # the exact evaluation of 7x7 is 490,000 canvases
      cell.config.eval.batch_size = 500
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
BLUR, APS = dict(downsample='blur'), dict(downsample='polyphase', blur_size=1)
CONTROL = dict(weight=0.0, max_shift=4, warm_up=0.0)
SINGLE, TWO, PAIR = dict(crops=1, **CONTROL), dict(crops=2, **CONTROL), dict(crops=2)
# name -> (config.model, config.augshift). `two_crops` is the fair baseline: AugShift sees every
# image twice a step, so part of its gain is not the pairwise term's.
SHIFT_NETWORKS = {
  'resnet18': ({}, SINGLE),
  'blurpool': (BLUR, SINGLE),
  'aps': (APS, SINGLE),
  'two_crops': ({}, TWO),
  'augshift': ({}, PAIR),
  'augshift_blurpool': (BLUR, PAIR),
  'augshift_aps': (APS, PAIR),
}


def shift_cell(network: str, base: ConfigDict, **pair) -> Cell:
  """A network (a key of SHIFT_NETWORKS) over a base config; pair: fields of config.augshift.

  With two crops the loss is the sum of two cross entropies. So that a step of SGD is what the
  baseline's would be on both crops' mean, the rate is half of the base's and the decay twice.
  """
  config = ConfigDict(base.to_dict())
  model, augshift = SHIFT_NETWORKS[network]
  config.model.update(model)
  config.augshift.update({**augshift, **pair})
  if config.augshift.crops == 2 and config.optimizer.name == 'sgd':
    config.optimizer.lr /= 2
    config.optimizer.weight_decay *= 2
  dataset = config.data.name
  # The same network by its own name, when it is not the paper's.
  name = config.model.name if network == 'resnet18' else network
  setting = ','.join([name, *(f'{key}={value:g}' for key, value in pair.items())])
  # The paper's numbers are for test images, and its weight and shifts are not known.
  published = TABLE2.get((network, dataset)) if not pair and not config.data.held_out else None
  paper = dict(zip(('image_accuracy', 'consistency'), published or (), strict=False))
  return Cell(f'{setting}/{dataset}', config, paper)


def cifar(dataset: str) -> ConfigDict:
  """ResNet-18's standard recipe on CIFAR-10 or CIFAR-100: SGD, cosine, random shifts and flips."""
  c = configs.default()
  c.task = 'classification'
  c.data.name = dataset
  c.num_epochs = 60
  c.batch_size = 128
  c.model.update(stem='cifar', head='linear')
  c.optimizer.update(name='sgd', lr=0.1, weight_decay=5e-4)
  c.schedule.update(name='cosine', warmup_epochs=2.0)
  c.eval.update(batch_size=500, every_epochs=5, shift_images=500, map_step=2)
  c.checkpoint.every_epochs = 5.0
  return c


def narrow_cifar(dataset: str) -> ConfigDict:
  """Width 16, all 50,000 images, 15 epochs: about an hour on 2 CPU cores.

  Large batches and a triangular rate (up over a fifth of the training, then down to 0), as those
  who train CIFAR-10 in few epochs have it.
  """
  c = cifar(dataset)
  c.num_epochs = 15
  c.batch_size = 250
  c.model.width = 16
  c.optimizer.update(lr=0.2, nesterov=True)
  c.schedule.update(name='poly', power=1.0, warmup_epochs=3.0)
  c.eval.every_epochs = 3
  c.checkpoint.every_epochs = 1.0
  return c


def small_cifar(dataset: str) -> ConfigDict:
  """Width 12, the first 10,000 images, 5 epochs: minutes on 2 CPU cores.

  Adam, because in so few steps it gets further than SGD: after 3 epochs the baseline had 54.6%
  against 50.6% (batch 64) and 49.9% (batch 32) right.
  """
  c = cifar(dataset)
  c.num_epochs = 5
  c.batch_size = 32
  c.data.train_images = 10_000
  c.model.width = 12
  c.optimizer.update(name='adam', lr=2e-3, b1=0.9, weight_decay=0.0)
  c.schedule.warmup_epochs = 0.5
  c.eval.update(batch_size=250, images=4_000, every_epochs=3, shift_images=400, map_step=2)
  c.checkpoint.every_epochs = 2.5
  return c


# By scale.
CIFAR = {'small': small_cifar, 'narrow': narrow_cifar, 'full': cifar}


def table2(scale: str) -> list[Cell]:
  """SHIFT_NETWORKS x {CIFAR-10, CIFAR-100} (table 2)."""
  base = CIFAR[scale]
  return [shift_cell(network, base(dataset))
          for dataset in ('cifar10', 'cifar100') for network in SHIFT_NETWORKS]


def augshift_sweep(scale: str) -> list[Cell]:
  """AugShift on CIFAR-10 for several weights and maximum shifts, beside the baseline.

  From it come the defaults of config.augshift (of the settings that lose at most one point of
  accuracy, the most consistent), so it is measured on training images that were left out, never on
  test images; headline metrics only.
  """
  base = CIFAR[scale]('cifar10')
  base.data.held_out = 4_000 if scale == 'small' else 5_000
  base.eval.update(images=0, max_shift=0)
  settings = [(3.0, 4, 0.0), (1.0, 4, 0.0), (1.0, 8, 0.0), (3.0, 8, 0.0), (10.0, 4, 0.0),
              (5.0, 4, 0.0), (10.0, 4, 0.5), (0.0, 4, 0.0)]
  return [shift_cell('resnet18', base), *(
    shift_cell('augshift', base, weight=weight, max_shift=shift, warm_up=warm_up)
    for weight, shift, warm_up in settings)]


# ---- Position channels: segmentation to attack (section 5) ---------------------------------------


def deeplab(dataset: str) -> ConfigDict:
  """DeepLabv3-ResNet-50 as the authors train it: SGD, the backbone at a tenth of the rate, poly."""
  c = configs.default()
  c.task = 'segmentation'
  c.data.update(name=dataset, eval_split='val')
  c.batch_size = 16
  c.model.update(name='deeplabv3', stem='imagenet')
  c.optimizer.update(name='sgd', lr=0.1, weight_decay=1e-4, backbone_factor=0.1)
  c.schedule.name = 'poly'
  c.eval.update(batch_size=4, every_epochs=5)
  c.checkpoint.every_epochs = 5.0
  return c


def camvid(scale: str = 'full') -> ConfigDict:
  """CamVid from scratch: 367 street scenes of 480x360. Small: at half the size and width, with
  ResNet-18 and Adam, which gets further in so few steps."""
  c = deeplab('camvid')
  c.data.eval_split = 'test'
  c.num_epochs, c.batch_size = 200, 8
  c.segmentation.update(crop=(352, 480), scale=(0.75, 1.5))
  c.model.backbone_momentum = 0.1  # the statistics start from nothing, too
  c.optimizer.update(lr=0.02, backbone_factor=1.0)
  c.eval.every_epochs, c.checkpoint.every_epochs = 20, 20.0
  c.neurons.classes = ('pedestrian', 'car', 'bicyclist')
  if scale == 'small':
    c.num_epochs = 60
    c.data.image_size = 180
    c.segmentation.crop = (176, 240)
    c.model.update(backbone='resnet18', width=32)
    c.optimizer.update(name='adam', lr=2e-3, b1=0.9)
  return c


def attack(scale: str) -> list[Cell]:
  """DeepLabv3 on CamVid, and table 1's networks on 3x3: trained, ranked and attacked.

  Beside GAPNet, whose channels each have their place, PermuteNet is the control.
  """
  canvas = [attacked(cell) for cell in table1(scale) if cell.config.canvas.grid == 3]
  for cell in canvas:
    cell.config.neurons.images = 2_000
  return [Cell('deeplabv3/camvid', camvid(scale), attack=True), *canvas]


# ---- Quickstart: the whole paper on scikit-learn's digits ----------------------------------------


def digits() -> ConfigDict:
  """The quickstart's recipe: scikit-learn's digits, a narrow ResNet-10, seconds an epoch."""
  c = configs.default()
  c.num_epochs = 20
  c.data.update(name='digits', image_size=16, flip=False)
  c.model.update(name='resnet10', width=16)
  c.optimizer.lr = 2e-3
  c.schedule.update(name='cosine', warmup_epochs=1.0)
  c.eval.update(batch_size=200, every_epochs=4)
  c.checkpoint.update(every_epochs=10.0)
  return c


def digits_moved() -> ConfigDict:
  """The quickstart's recipe for shift consistency: digits moved by up to a quarter."""
  c = digits()
  c.task = 'classification'
  c.num_epochs = 12
  c.model.head = 'linear'
  c.eval.update(every_epochs=6, map_step=2, shift_images=200)
  c.checkpoint.every_epochs = 6.0
  return c


def digit_scenes() -> ConfigDict:
  """The quickstart's recipe for segmentation: digits scattered over a scene."""
  c = deeplab('digit_scenes')
  c.data.eval_split = 'test'
  c.num_epochs, c.batch_size = 10, 8
  c.segmentation.update(crop=(64, 96), scale=(0.9, 1.1), flip=False)
  c.model.update(backbone='resnet10', width=16, stem='canvas', output_stride=8,
                 backbone_momentum=0.1)
  c.optimizer.update(name='adam', lr=3e-3, b1=0.9, weight_decay=0.0, backbone_factor=1.0)
  c.eval.update(batch_size=20, every_epochs=5)
  c.checkpoint.every_epochs = 5.0
  c.neurons.update(classes=tuple(map(str, range(10))), purity=0.75, counts=8)
  return c


def quickstart(scale: str) -> list[Cell]:
  """On digits. Claim 1: GAPNet and PermuteNet, location and image, and the fixed control.
  Claim 2: the baseline, BlurPool, two crops without and with the pairwise loss. Claim 3: a
  segmentation network whose position channels are removed, and both GAPNets of claim 1.
  """
  canvas, moved, scenes = digits(), digits_moved(), digit_scenes()
  shifted = ['resnet18', 'blurpool', 'two_crops', 'augshift']
  if scale == 'tiny':  # for continuous integration: shows that it runs, not what it finds
    for base in (canvas, moved):
      base.num_epochs = 2
      base.data.image_size = 8
      base.model.width = 8
      base.eval.update(images=100, every_epochs=1)
    moved.eval.update(max_shift=4, shift_images=20)
    scenes.num_epochs = 1
    scenes.data.train_images, scenes.model.width = 40, 4
    scenes.eval.images = scenes.neurons.images = 20
    for base in (canvas, scenes):
      base.neurons.update(counts=3, random_orders=2)
    shifted = ['resnet18', 'augshift']
  cells = [('gapnet', 'location'), ('permutenet', 'location'), ('permutenet_fixed', 'location'),
           ('gapnet', 'image'), ('permutenet', 'image')]
  first = [canvas_cell(network, target, 3, canvas) for network, target in cells]
  return [*(attacked(cell) if cell.name.startswith('gapnet/') else cell for cell in first),
          *(shift_cell(network, moved) for network in shifted),
          Cell('deeplabv3/digit_scenes', scenes, attack=True)]


# ---- Without published numbers: where permuting hurts, and what padding gives away ---------------


# Where the channels are permuted, each network GAP and one linear layer: never, in one order fixed
# for the run, or anew at every forward pass, from the pooled channels towards the image.
PERMUTED = {
  'never': dict(head='linear'), 'fixed': NETWORKS['permutenet_fixed'],
  'pooled': NETWORKS['permutenet'],
  **{f'stage{s}': dict(NETWORKS['permutenet'], permute_at=f'stage{s}') for s in (4, 3, 2, 1)}}


def ablations(scale: str) -> list[Cell]:
  """One thing varied at a time, on the 3x3 canvas: where channels are permuted, for location and
  image; and how convolutions pad, for GAPNet's and PermuteNet's location ('none' shrinks the maps
  of these canvases to nothing). PermuteNet's location with zero padding is in both, trained twice.
  And PermuteNet for five times as many epochs, since it learns slowly, and with four times as many
  channels (small: the paper's 512). Small: on digits, as in the quickstart.
  """
  base = digits() if scale == 'small' else configs.default()

  def cell(name, target, model):
    found = canvas_cell('gapnet', target, 3, base)
    found.config.model.update(model)
    return Cell(f'{name}/3x3', found.config)

  longer, wider = ([cell(f'permute_at=pooled_{what}/{target}', target, PERMUTED['pooled'])
                    for target in configs.TARGETS] for what in ('5x', 'wide'))
  for c in (cell.config for cell in longer):
    c.num_epochs *= 5
    c.eval.every_epochs = c.num_epochs // 10
  for c in (cell.config for cell in wider):
    c.model.width *= 4
  return [
    *(cell(f'permute_at={where}/{target}', target, model)
      for where, model in PERMUTED.items() for target in configs.TARGETS), *longer, *wider,
    *(cell(f'padding={padding}/{network}', 'location', dict(NETWORKS[network], padding=padding))
      for padding in ('zero', 'partial', 'replicate', 'reflect', 'circular')
      for network in ('gapnet', 'permutenet'))]


SUITES = {'quickstart': quickstart, 'table1': table1, 'table2': table2,
          'augshift_sweep': augshift_sweep, 'attack': attack, 'ablations': ablations}
SCALES = {
  **dict.fromkeys(SUITES, ('small', 'full')), 'quickstart': ('digits', 'tiny'),
  **dict.fromkeys(('table1', 'table2', 'augshift_sweep'), ('small', 'narrow', 'full'))}
