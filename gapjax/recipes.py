"""The recipes that configs/ and reproduce/ share: networks by name, and what they are trained on.

`gapjax train --config=configs/...` and `gapjax reproduce` so train the same thing.
"""

from ml_collections import ConfigDict

from gapjax.config import default, replaced

# ---- A canvas (section 3, table 1) ---------------------------------------------------------------

# What a network is, in config.model.
NETWORKS = {
  'gapnet': dict(head='gap'),
  'permutenet': dict(head='permuted', permutation='batch', permute_at='pooled'),
  'permutenet_fixed': dict(head='permuted', permutation='fixed', permute_at='pooled'),
}


def on_canvas(network: str, base: ConfigDict, *, target: str, grid: int) -> ConfigDict:
  """A network (a key of NETWORKS), target and grid over a base config."""
  return replaced(base, model=NETWORKS[network], canvas=dict(grid=grid, target=target))


def digits() -> ConfigDict:
  """The quickstart's recipe: scikit-learn's digits, a narrow ResNet-10, seconds an epoch."""
  return replaced(
    default(), num_epochs=20, data=dict(name='digits', image_size=16, flip=False),
    model=dict(name='resnet10', width=16), optimizer=dict(lr=2e-3),
    schedule=dict(name='cosine', warmup_epochs=1.0), eval=dict(batch_size=200, every_epochs=4),
    checkpoint=dict(every_epochs=10.0))


# ---- Accuracy and shift consistency (section 4, table 2) -----------------------------------------

BLUR, APS = dict(downsample='blur'), dict(downsample='polyphase', blur_size=1)
LPS = dict(downsample='learned_polyphase', blur_size=1)
CONTROL = dict(weight=0.0, max_shift=4, warm_up=0.0)
SINGLE, TWO, PAIR = dict(crops=1, **CONTROL), dict(crops=2, **CONTROL), dict(crops=2)
# name -> (config.model, config.augshift). `two_crops` is the fair baseline: AugShift sees every
# image twice a step, so part of its gain is not the pairwise term's.
SHIFT_NETWORKS = {
  'resnet18': ({}, SINGLE),
  'unshifted': ({}, dict(SINGLE, max_shift=0)),
  'circular': (dict(padding='circular'), SINGLE),
  'full_padding': (dict(padding='full'), SINGLE),
  'blurpool': (BLUR, SINGLE),
  'blurpool_4': (dict(BLUR, blur_size=4), SINGLE),
  'aps': (APS, SINGLE),
  'lps': (LPS, SINGLE),
  'two_crops': ({}, TWO),
  'augshift': ({}, PAIR),
  'augshift_blurpool': (BLUR, PAIR),
  'augshift_aps': (APS, PAIR),
}
# Their names in tables and pictures (resnet18: the backbone's); what a report's lead says of them.
SHIFT_TITLES = {
  'unshifted': 'Unshifted images', 'circular': 'Circular padding',
  'full_padding': 'Full padding (F-Conv)', 'blurpool': 'BlurPool',
  'blurpool_4': 'BlurPool, 4 taps', 'aps': 'APS', 'lps': 'LPS', 'two_crops': 'Two crops, weight 0',
  'augshift': 'AugShift', 'augshift_blurpool': 'AugShift + BlurPool',
  'augshift_aps': 'AugShift + APS'}
SHIFT_OTHERS = {
  'unshifted': 'the same network trained on images that are flipped, but not shifted',
  'circular': 'the same network with circular padding',
  'full_padding': 'full padding, in which every position of a kernel counts (F-Conv, '
                  'Kayhan and van Gemert 2020)',
  'blurpool': 'BlurPool, which blurs before every stride (Zhang 2019)',
  'blurpool_4': 'BlurPool with four taps in place of three',
  'aps': 'APS, which keeps the strongest of a stride\'s possible grids (Chaman and Dokmanic 2021)',
  'lps': 'LPS, which learns which of them to keep (Rojas-Gomez et al. 2022)'}


def shifted(network: str, base: ConfigDict, **pair) -> ConfigDict:
  """A network (a key of SHIFT_NETWORKS) over a base config; pair: fields of config.augshift.

  With two crops the loss is the sum of two cross entropies. So that a step of SGD is what the
  baseline's would be on both crops' mean, the rate is half of the base's and the decay twice.
  """
  model, augshift = SHIFT_NETWORKS[network]
  c = replaced(base, model=model, augshift={**augshift, **pair})
  if c.augshift.crops == 2 and c.optimizer.name == 'sgd':
    c.optimizer.lr /= 2
    c.optimizer.weight_decay *= 2
  return c


def cifar(dataset: str) -> ConfigDict:
  """ResNet-18 on CIFAR-10 or CIFAR-100 as those train it who want few epochs: large batches, SGD
  with Nesterov momentum, a triangular rate (up over a fifth of the training, then down to 0).

  Its source, Jordan 2024 (94% Airbench, its ResNet-18 baseline), has 94.0% with flips averaged at
  test, reflected borders and cutout besides: here borders are zeros, and none of the others.
  """
  epochs = {'cifar10': 26, 'cifar100': 50}[dataset]
  return replaced(
    default(), task='classification', num_epochs=epochs, batch_size=512, data=dict(name=dataset),
    model=dict(stem='cifar', head='linear'),
    optimizer=dict(name='sgd', lr=0.2, weight_decay=5e-4, nesterov=True),
    schedule=dict(name='poly', power=1.0, warmup_epochs=epochs / 5),
    eval=dict(batch_size=500, every_epochs=5, shift_images=500, map_step=2),
    checkpoint=dict(every_epochs=epochs / 2))


def narrow_cifar(dataset: str) -> ConfigDict:
  """Width 16, all 50,000 images, 20 epochs: 1.5 to 5 hours on 1 or 2 CPU cores.

  With 15 epochs one seed of the baseline had 88.3%.
  """
  return replaced(
    cifar(dataset), num_epochs=20, batch_size=250, model=dict(width=16),
    schedule=dict(warmup_epochs=4.0), eval=dict(every_epochs=4), checkpoint=dict(every_epochs=1.0))


def small_cifar(dataset: str) -> ConfigDict:
  """Width 12, the first 10,000 images, 5 epochs: minutes on 2 CPU cores.

  Adam, because in so few steps it gets further than SGD: after 3 epochs the baseline had 54.6%
  against 50.6% (batch 64) and 49.9% (batch 32) right.
  """
  return replaced(
    cifar(dataset), num_epochs=5, batch_size=32, data=dict(train_images=10_000),
    model=dict(width=12),
    optimizer=dict(name='adam', lr=2e-3, b1=0.9, weight_decay=0.0, nesterov=False),
    schedule=dict(name='cosine', power=0.9, warmup_epochs=0.5),
    eval=dict(batch_size=250, images=4_000, every_epochs=3, shift_images=400, map_step=2),
    checkpoint=dict(every_epochs=2.5))


def digits_moved() -> ConfigDict:
  """The quickstart's recipe for shift consistency: digits moved by up to a quarter."""
  return replaced(
    digits(), task='classification', num_epochs=6, model=dict(head='linear'),
    augshift=dict(weight=3.0), checkpoint=dict(every_epochs=6.0),
    eval=dict(every_epochs=2, pairs=10, map_step=2, shift_images=200))


# ---- Segmentation, to be attacked (section 5) ----------------------------------------------------


def deeplab(dataset: str) -> ConfigDict:
  """DeepLabv3-ResNet-50 by the authors' schedule: SGD, the backbone at a tenth of the rate, poly.

  Layers start as PyTorch's default has it (theirs: Kaiming's), and colours are not jittered (theirs
  are, on Cityscapes).
  """
  return replaced(
    default(), task='segmentation', batch_size=16, data=dict(name=dataset, eval_split='val'),
    model=dict(name='deeplabv3', stem='imagenet'),
    optimizer=dict(name='sgd', lr=0.1, weight_decay=1e-4, backbone_factor=0.1),
    schedule=dict(name='poly'), eval=dict(batch_size=4, every_epochs=5),
    checkpoint=dict(every_epochs=5.0))


def camvid(scale: str = 'full') -> ConfigDict:
  """CamVid, 367 street scenes of 480x360. Full: from scratch. Small: at half the size and width,
  with ResNet-18 and Adam, which gets further in so few steps. Pretrained: at half the size,
  DeepLabv3+ from EfficientNet-Lite0's ImageNet weights, whose rate is 0.6 of the head's.

  Of the latter, mIoU on val after 3 of 6 epochs: 42.6% with a factor of 0.2, 44.3 with 0.6, 44.1
  with 0.6 and focal loss.
  """
  full = replaced(
    deeplab('camvid'), num_epochs=200, batch_size=8, data=dict(eval_split='test'),
    segmentation=dict(crop=(352, 480), scale=(0.75, 1.5)),
    model=dict(backbone_momentum=0.1),  # the statistics start from nothing, too
    optimizer=dict(lr=0.02, backbone_factor=1.0), eval=dict(every_epochs=20),
    checkpoint=dict(every_epochs=20.0), neurons=dict(classes=('pedestrian', 'car', 'bicyclist')))
  half = dict(data=dict(image_size=180), segmentation=dict(crop=(176, 240)))
  return replaced(full, **{
    'full': {},
    'small': dict(half, num_epochs=60, model=dict(backbone='resnet18', width=32),
                  optimizer=dict(name='adam', lr=2e-3, b1=0.9)),
    'pretrained': dict(
      half, num_epochs=25, eval=dict(every_epochs=10), checkpoint=dict(every_epochs=1.0),
      model=dict(name='deeplabv3plus', backbone='efficientnet_lite0', separable=True,
                 pretrained='efficientnet_lite0', backbone_momentum=0.01),
      optimizer=dict(name='adam', lr=1e-3, b1=0.9, backbone_factor=0.6))}[scale])


def digit_scenes() -> ConfigDict:
  """The quickstart's recipe for segmentation: digits scattered over a scene."""
  return replaced(
    deeplab('digit_scenes'), num_epochs=10, batch_size=8, data=dict(eval_split='test'),
    segmentation=dict(crop=(64, 96), scale=(0.9, 1.1), flip=False),
    model=dict(backbone='resnet10', width=16, stem='canvas', output_stride=8,
               backbone_momentum=0.1),
    optimizer=dict(name='adam', lr=3e-3, b1=0.9, weight_decay=0.0, backbone_factor=1.0),
    eval=dict(batch_size=20, every_epochs=5), checkpoint=dict(every_epochs=5.0),
    neurons=dict(classes=tuple(map(str, range(10))), purity=0.75, counts=8))
