"""What `gapjax bench` trains on: the config's dataset, or random images of the same size."""

import dataclasses

import numpy as np

from gapjax.data import CLASSES, ImageDataset, prepared
from gapjax.training import build

# Height and width, and as many images as fill one or two epochs of a measurement.
STAND_INS = {'cifar10': (32, 32, 50_000), 'cifar100': (32, 32, 50_000), 'voc2012': (375, 500, 64),
             'cityscapes': (1024, 2048, 16), 'camvid': (360, 480, 64)}


@dataclasses.dataclass(frozen=True, eq=False)
class RandomScenes:
  """Stands in for data.Scenes; nothing is read or decoded."""
  name: str
  class_names: tuple[str, ...]
  scenes: list[dict]

  def __len__(self):
    return len(self.scenes)

  def __getitem__(self, i):
    return self.scenes[i]


def load(config, data_dir):
  """The training set of a config, its task, and what the images are: a name, or random.

  Raises UsageError as build.load_data does, but for a dataset of STAND_INS that is not there.
  """
  name = config.data.name
  if name not in STAND_INS or prepared.newest(prepared.data_root(data_dir) / name) != (None, ''):
    config = config.copy_and_resolve_references()
    config.eval.images = 1  # nothing is evaluated
    train_set, _, task = build.load_data(config, data_dir=data_dir)
    return train_set, task, name
  train_set = _random(config)
  return train_set, build.create_task(config, train_set), (
    f'random images of the size of {name}, which is not prepared')


def _random(config):
  num_classes, (height, width, n) = CLASSES[config.data.name], STAND_INS[config.data.name]
  if config.data.image_size:  # of the shorter side
    factor = config.data.image_size / min(height, width)
    height, width = round(height * factor), round(width * factor)
  n = config.data.train_images or n
  draw, names = np.random.default_rng(0), tuple(map(str, range(num_classes)))
  images = draw.integers(0, 256, (n, height, width, 3), np.uint8)
  if config.task != 'segmentation':
    return ImageDataset(config.data.name, images, draw.integers(0, num_classes, n, np.int32), names)
  labels = draw.integers(0, num_classes, (n, height, width), np.uint8)
  return RandomScenes(config.data.name, names, [
    {'image': image, 'label': label, 'id': str(i)}
    for i, (image, label) in enumerate(zip(images, labels, strict=True))])
