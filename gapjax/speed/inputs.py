"""What bench times and compile compiles: train.train's own step, and the images that go into it."""

import dataclasses

import numpy as np

from gapjax import models
from gapjax.config import replaced
from gapjax.data import CLASSES, ImageDataset, prepared
from gapjax.speed import flops
from gapjax.tasks import TASKS
from gapjax.training import build, steps, workdirs
from gapjax.training.devices import keep_programs
from gapjax.training.plan import Plan

# Height and width, and as many images as fill one or two epochs of a measurement.
STAND_INS = {'cifar10': (32, 32, 50_000), 'cifar100': (32, 32, 50_000), 'voc2012': (375, 500, 64),
             'cityscapes': (1024, 2048, 16), 'camvid': (360, 480, 64)}


class RandomScenes(list):
  """Stands in for data.Scenes; nothing is read or decoded."""

  def __init__(self, scenes, *, name, class_names):
    super().__init__(scenes)
    self.name, self.class_names = name, class_names

  def size(self, i):
    return self[i]['label'].shape


class Program:
  """The training step of a config on some devices, and what it starts from.

  Attributes:
    config: settled.
    train_set, task, images: see `training_set`.
    flops: of a step, by all devices.
    state, key, feed: what a run starts from.
    count: of the steps of a call, all of them.
    train_steps: build.create_train_steps', not compiled yet.
  """

  def __init__(self, config, devices, data_dir):
    keep_programs(devices.platform)
    self.config = config = workdirs.settled(config, platform=devices.platform)
    self.devices = devices
    self.train_set, self.task, self.images = training_set(config, data_dir)
    # Without marks: a call that ends early at one has made a part of its batches alone.
    plan = dataclasses.replace(Plan.of(config, num_images=len(self.train_set)),
                               eval_steps=frozenset(), save_steps=frozenset())
    model, self.state, rule, _ = build.create_learner(config, self.task, self.train_set, plan,
                                              platform=devices.platform)
    self.flops = step_flops(config, self.task, self.train_set)
    self.count = np.int32(config.steps_per_call)
    self.key = steps.stream(config.seed, steps.TRAIN)
    self.feed = build.create_feed(config, self.task, self.train_set, plan)
    self.train_steps = build.create_train_steps(model, self.task, rule, devices)


def step_flops(config, task, train_set) -> int:
  """Operations of the model in a training step, by all devices; see flops.forward_flops."""
  return flops.TRAINING * config.batch_size * task.crops * flops.forward_flops(
    models.create_network(config.model, num_classes=task.num_classes),
    (*task.input_shape(train_set), 3))


def training_set(config, data_dir):
  """The training set of a config, its task, and what the images are: a name, or random.

  Random images stand in for a dataset of STAND_INS that is not prepared. Raises UsageError as
  build.load_data does.
  """
  name = config.data.name
  if name not in STAND_INS or prepared.newest(prepared.data_root(data_dir) / name) != (None, ''):
    train_set, _, task = build.load_data(replaced(config, eval=dict(images=1)), data_dir=data_dir)
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
  if not TASKS[config.task].dense:
    return ImageDataset(config.data.name, images, draw.integers(0, num_classes, n, np.int32), names)
  labels = draw.integers(0, num_classes, (n, height, width), np.uint8)
  return RandomScenes(
    ({'image': image, 'label': label, 'id': str(i)}
     for i, (image, label) in enumerate(zip(images, labels, strict=True))),
    name=config.data.name, class_names=names)
