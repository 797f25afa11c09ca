"""From a config to its parts: datasets, task, network, optimiser, state."""

import functools

import jax
import numpy as np

from gapjax import data, models, optimizer, steps
from gapjax.errors import UsageError
from gapjax.parallel import AXIS
from gapjax.tasks.canvas import CanvasTask


def load(config, *, data_dir):
  """The training set, the test set and the task that a config names."""
  c = config.data
  read = functools.partial(data.load, c.name, data_dir=data_dir, image_size=c.image_size or None)
  train_set = read(split='train', limit=c.train_images or None)
  test_set = read(split='test', limit=config.eval.images or None)
  return train_set, test_set, create_task(config, train_set)


def create_task(config, train_set) -> CanvasTask:
  """The canvas task of a config on a dataset."""
  height, width = train_set.images.shape[1:3]
  if height != width:
    raise UsageError(f'the images of {train_set.name} are {height}x{width}, and a canvas is made '
                     'of squares; set data.image_size')
  mean, std = data.normalisation(train_set.name, train_set.images)
  dtype = np.float64 if config.model.dtype == 'float64' else np.float32
  if dtype == np.float64 and not jax.config.jax_enable_x64:
    raise UsageError('model.dtype float64 needs the environment variable JAX_ENABLE_X64=1')
  return CanvasTask(
    grid=config.canvas.grid, target=config.canvas.target, fill=config.canvas.fill, mean=mean,
    std=std, num_image_classes=len(train_set.class_names), flip=config.data.flip, dtype=dtype)


def create(config, task, train_set, plan):
  """The network, its initial state, the optimiser and its schedule."""
  size = train_set.images.shape[1] * task.grid
  model = models.create(config.model, num_classes=task.num_classes,
                        axis_name=AXIS if config.sync_batch_norm else None)
  schedule = optimizer.create_schedule(config, steps_per_epoch=plan.steps_per_epoch,
                                       total_steps=plan.total_steps)
  rule = optimizer.create(config, schedule)
  state = steps.create_state(model, rule, seed=config.seed, image_shape=(size, size, 3),
                             dtype=task.dtype)
  return model, state, rule, schedule
