"""From a config to its parts: datasets, task, network, optimiser, state."""

import functools

import jax
import numpy as np

from gapjax import data, models
from gapjax.errors import UsageError
from gapjax.tasks.augshift import AugShiftTask, check_shift
from gapjax.tasks.canvas import CanvasTask
from gapjax.tasks.images import IMAGENET
from gapjax.tasks.segmentation import SegmentationTask
from gapjax.training import optimizer, steps
from gapjax.training.devices import AXIS
from gapjax.training.evaluators import CanvasEvaluator, ShiftEvaluator
from gapjax.training.feeds import ImageFeed, SceneFeed
from gapjax.training.scene_evaluator import SceneEvaluator
from gapjax.weights import files as weights


def load(config, *, data_dir):
  """The training set, what is evaluated, and the task that a config names."""
  c = config.data
  loader = data.load_scenes if config.task == 'segmentation' else data.load
  read = functools.partial(loader, c.name, data_dir=data_dir, image_size=c.image_size or None)
  if c.held_out:
    both = read(split=c.train_split, limit=c.train_images and c.train_images + c.held_out)
    n = len(both) - c.held_out
    if n < max(c.train_images, 1):
      raise UsageError(f'data.held_out={c.held_out} leaves {max(n, 0)} of the {len(both)} '
                       f'training images of {c.name} that are read; make it or data.train_images '
                       'smaller')
    train_set, test_set = both.part(0, n), both.part(n, n + (config.eval.images or c.held_out))
  else:
    train_set = read(split=c.train_split, limit=c.train_images or None)
    test_set = read(split=c.eval_split, limit=config.eval.images or None)
  return train_set, test_set, create_task(config, train_set)


def create_task(config, train_set) -> CanvasTask | AugShiftTask | SegmentationTask:
  """The task of a config on a dataset."""
  dtype = image_dtype(config)
  if config.task == 'segmentation':
    c, (mean, std) = config.segmentation, IMAGENET
    return SegmentationTask(mean=np.array(mean), std=np.array(std), dtype=dtype,
                            num_classes=len(train_set.class_names), loss_name=c.loss,
                            gamma=c.gamma, axis_name=AXIS)
  height, width = train_set.images.shape[1:3]
  if config.task == 'canvas' and height != width:
    raise UsageError(f'the images of {train_set.name} are {height}x{width}, and a canvas is made '
                     'of squares; set data.image_size')
  mean, std = data.normalisation(train_set.name, train_set.images)
  common = dict(mean=mean, std=std, flip=config.data.flip, dtype=dtype)
  if config.task == 'canvas':
    return CanvasTask(grid=config.canvas.grid, target=config.canvas.target,
                      fill=config.canvas.fill, num_image_classes=len(train_set.class_names),
                      **common)
  for name, shift in (('augshift.max_shift', config.augshift.max_shift),
                      ('eval.shift', config.eval.shift), ('eval.max_shift', config.eval.max_shift)):
    check_shift(f'{name}={shift}: a shift', shift, height, width)
  c, reach = config.augshift, config.eval.max_shift // config.eval.map_step
  return AugShiftTask(
    num_classes=len(train_set.class_names), crops=c.crops, max_shift=c.max_shift,
    weight=c.weight, stacked=c.stacked,
    warm_up_steps=round(c.warm_up * config.num_epochs * len(train_set) / config.batch_size),
    map_offsets=tuple(config.eval.map_step * i for i in range(-reach, reach + 1)), **common)


def image_dtype(config):
  """What images are computed in. Raises UsageError where JAX is not set to have it."""
  if config.model.dtype != 'float64':
    return np.float32
  if not jax.config.jax_enable_x64:
    raise UsageError('model.dtype float64 needs the environment variable JAX_ENABLE_X64=1')
  return np.float64


def create_evaluator(config, model, task, test_set, devices):
  """The evaluator that goes with a config's task."""
  evaluator = {'canvas': CanvasEvaluator, 'classification': ShiftEvaluator,
               'segmentation': SceneEvaluator}[config.task]
  return evaluator(config, model, task, test_set, devices)


def create_feed(config, task, train_set, plan) -> ImageFeed | SceneFeed:
  """What gives a run its batches."""
  if config.task == 'segmentation':
    return SceneFeed(config, train_set, plan)
  return ImageFeed(config, task, train_set, plan)


def input_shape(config, task, train_set) -> tuple[int, int]:
  """Height and width of what the network is trained on."""
  if config.task == 'segmentation':
    return tuple(config.segmentation.crop)
  return tuple(side * task.grid for side in train_set.images.shape[1:3])


def create(config, task, train_set, plan, *, platform=None):
  """The network, its initial state, the optimiser and its schedule; platform: as models.create's.
  """
  model = models.create(config.model, num_classes=task.num_classes,
                        device_axis=AXIS, platform=platform,
                        axis_name=AXIS if config.sync_batch_norm else None)
  schedule = optimizer.create_schedule(config, steps_per_epoch=plan.steps_per_epoch,
                                       total_steps=plan.total_steps)
  rule = optimizer.create(config, schedule)
  state = steps.create_state(model, rule, seed=config.seed, dtype=task.dtype,
                             image_shape=(*input_shape(config, task, train_set), 3))
  return model, state, rule, schedule


def create_train_steps(model, task, rule, devices):
  """The program that trains, bench times and compile compiles: `steps.many` training steps in one
  call, (state, key, data, batch, count) -> (state, metrics), the batch (steps, b, ...) split over
  devices, the state donated.
  """
  return devices.pmap(steps.many(steps.make_train_step(model, task, rule, axis_name=AXIS)),
                      split=(False, False, False, True, False), donate=0)


def pretrained(config, state):
  """The state that a new run starts from: `state`, with the backbone of model.pretrained, if any.

  Apart from `create`, so that a checkpoint needs that file no more. The optimiser's state stays: it
  starts from zeros, whatever the parameters are.
  """
  path, collections = config.model.pretrained, ('params', 'batch_stats')
  if not path:
    return state
  found = weights.load_backbone({name: getattr(state, name)['backbone'] for name in collections},
                                path, variant=config.model.backbone)
  return state.replace(**{name: {**getattr(state, name), 'backbone': found[name]}
                          for name in collections})
