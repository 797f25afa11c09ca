"""Every config in configs/ builds and takes a step, on small stand-ins for its size alone."""

import math
import re

import jax
import numpy as np
import pytest
from conftest import ROOT
from test_devices import steps_of

from gapjax import config
from gapjax.data import ImageDataset
from gapjax.training import build
from gapjax.training.devices import Devices

draw = np.random.default_rng(0)
CLASSES = {'cifar10': 10, 'cifar100': 100, 'digits': 10}
QUICK = ('digits', 'gapnet_cifar10', 'augshift_cifar10')
SMALL = ['--config.model.width=4', '--config.batch_size=8']
SMALL_SCENES = ['--config.segmentation.crop=(17,17)', '--config.model.backbone=resnet10']


def images(name, n=64, size=12):
  return ImageDataset(name, draw.integers(0, 256, (n, size, size, 3)).astype(np.uint8),
                      np.arange(n, dtype=np.int32) % CLASSES[name],
                      tuple(map(str, range(CLASSES[name]))))


class Scenes(list):
  """Random scenes of three classes."""
  class_names, palette = tuple('abc'), np.eye(3, dtype=np.uint8)

  def __init__(self, n=64, size=(20, 24)):
    super().__init__({'image': draw.integers(0, 256, (*size, 3)).astype(np.uint8), 'id': str(i),
                      'label': draw.integers(0, 3, size).astype(np.uint8)} for i in range(n))


@pytest.mark.parametrize('path', [
  pytest.param(path, id=path.stem, marks=[] if path.stem in QUICK else [pytest.mark.slow])
  for path in sorted((ROOT / 'configs').glob('*.py'))])
def test_config_takes_a_step(path):
  scenes = path.stem.startswith('deeplab')
  c = config.from_flags([f'--config={path}', *SMALL, *(SMALL_SCENES if scenes else [])])
  train_set = Scenes() if scenes else images(c.data.name)
  task = build.create_task(c, train_set)
  before, state, metrics, batch = steps_of(  # a warm-up's first step has rate 0
    c, train_set, task, devices=1, count=2)
  loss = metrics['batch']['loss']
  assert np.isfinite(loss.total).all()
  assert int(loss.count[0]) == (8 if not scenes else 8 * 17 * 17 - int(
    (batch['labels'] == 255).sum()))
  after = Devices.to_host(state.params)
  assert not jax.tree.all(jax.tree.map(np.array_equal, before, after))


# The publishers' counts of training images.
IMAGES = {'cifar10': 50_000, 'cifar100': 50_000, 'digits': 1_397, 'camvid': 367,
          'cityscapes': 2_975, 'voc2012': 1_464, 'voc2012/train_aug': 10_582}


@pytest.mark.parametrize('path', sorted((ROOT / 'configs').glob('*.py')), ids=lambda p: p.stem)
def test_config_says_how_to_run_it_and_what_it_takes(path):
  """The command of each variant; epochs * images / batch, in the text's steps; what to expect."""
  text = path.read_text().split('"""')[1]
  commands = re.findall(r'gapjax train --config=configs/(\S+)', text)
  assert commands[0] == path.name and '\nTime: ' in text and '\nMeasured: ' in text
  for command in commands:
    c = config.from_flags([f'--config={path.parent / command}'])
    split = c.data.train_split
    images = IMAGES[c.data.name if split == 'train' else f'{c.data.name}/{split}']
    assert f'{math.ceil(c.num_epochs * images / c.batch_size):,}' in text.split('Steps: ')[1]


def test_canvases_are_made_of_square_images():
  wide = ImageDataset('digits', np.zeros((2, 4, 6, 3), np.uint8), np.zeros(2, np.int32), ('0',))
  with pytest.raises(config.UsageError, match=r'4x6.*data\.image_size'):
    build.create_task(config.default(), wide)


def test_float64_needs_x64():
  c = config.default()
  c.model.dtype = 'float64'
  with pytest.raises(config.UsageError, match='JAX_ENABLE_X64=1'):
    build.create_task(c, images('cifar10'))
