"""Every config in configs/ builds and takes a step, on small stand-ins for its size alone."""

import itertools

import jax
import numpy as np
import pytest
from conftest import ROOT

from gapjax import config
from gapjax.data import ImageDataset
from gapjax.training import build, steps, workdirs
from gapjax.training.devices import AXIS, Devices
from gapjax.training.plan import Plan

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
  devices = Devices(jax.local_devices()[:1])
  plan = Plan.of(workdirs.settle('new', c, platform='cpu'), num_images=64)
  task = build.create_task(c, train_set)
  model, state, rule, _ = build.create_learner(c, task, train_set, plan)
  before = Devices.to_host(state.params)
  step = devices.pmap(steps.many(steps.make_train_step(model, task, rule, axis_name=AXIS)),
                      split=(False, False, False, True), donate=0)
  feed = build.create_feed(c, task, train_set, plan)
  data = devices.replicate(feed.data)
  key, state = devices.replicate((steps.stream(0, steps.TRAIN), state))
  for batch in itertools.islice(feed.batches(0), 2):  # a warm-up's first step has rate 0
    state, metrics = step(state, key, data, devices.split(batch, axis=1))
  loss = metrics['batch'].loss
  assert np.isfinite(loss.total).all()
  assert int(loss.count[0]) == (8 if not scenes else 8 * 17 * 17 - int(
    (batch['labels'] == 255).sum()))
  after = Devices.to_host(state.params)
  assert not jax.tree.all(jax.tree.map(np.array_equal, before, after))


@pytest.mark.parametrize('path', sorted((ROOT / 'configs').glob('*.py')), ids=lambda p: p.stem)
def test_config_says_how_to_run_it(path):
  text = path.read_text()
  assert f'--config=configs/{path.name}' in text.split('"""')[1]


def test_canvases_are_made_of_square_images():
  wide = ImageDataset('digits', np.zeros((2, 4, 6, 3), np.uint8), np.zeros(2, np.int32), ('0',))
  with pytest.raises(config.UsageError, match=r'4x6.*data\.image_size'):
    build.create_task(config.default(), wide)


def test_float64_needs_x64():
  c = config.default()
  c.model.dtype = 'float64'
  with pytest.raises(config.UsageError, match='JAX_ENABLE_X64=1'):
    build.create_task(c, images('cifar10'))
