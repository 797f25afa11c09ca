"""From a config to its parts: datasets, task, network, optimiser, state."""

import contextlib

import jax
import numpy as np

from gapjax import models
from gapjax.errors import UsageError
from gapjax.tasks import TASKS
from gapjax.tasks.protocol import Evaluation, Task
from gapjax.tasks.segmentation import check_sizes
from gapjax.training import optimizer, steps
from gapjax.training.devices import AXIS
from gapjax.training.evaluator import DeviceCounter
from gapjax.training.feeds import HostFeed, IndexFeed
from gapjax.weights import files as weights
from gapjax.weights import pretrained as packages

_kept = []  # one dict, while datasets are kept


@contextlib.contextmanager
def datasets_kept():
  """While entered, `load_data` reads every dataset once: seconds a cell of a suite."""
  _kept.append({})
  try:
    yield
  finally:
    _kept.pop()


def load_data(config, *, data_dir):
  """The training set, what is evaluated, and the task that a config names.

  Raises UsageError where they cannot be read, or data.held_out leaves too few training images.
  """
  c, kept = config.data, _kept[-1] if _kept else {}

  def read(**part):
    where = dict(data_dir=data_dir, image_size=c.image_size or None, **part)
    key = config.task, c.name, *where.values()
    if key not in kept:
      kept[key] = TASKS[config.task].load_split(c.name, **where)
    return kept[key]

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


def identities(train_set, test_set) -> dict[str, dict]:
  """What a run is trained and evaluated on, as workdirs.check_data takes it."""
  return {'trained': train_set.identity(), 'evaluated': test_set.identity()}


def create_task(config, train_set) -> Task:
  """The task of a config on a dataset."""
  return TASKS[config.task].of(config, train_set, dtype=image_dtype(config), axis_name=AXIS)


def image_dtype(config):
  """What images are computed in. Raises UsageError where JAX is not set to have it."""
  if config.model.dtype != 'float64':
    return np.float32
  if not jax.config.jax_enable_x64:
    raise UsageError('model.dtype float64 needs the environment variable JAX_ENABLE_X64=1')
  return np.float64


def create_evaluation(config, model, task, test_set, devices, *,
                      check_stop=lambda: None) -> Evaluation:
  """How a run is evaluated on its devices; check_stop: see DeviceCounter.

  Raises UsageError, before an epoch of training, where the network does not take the evaluated
  scenes.
  """
  if task.dense and config.model.downsample == 'polyphase':
    check_sizes(model, test_set, padded=config.eval.padded, way='model.downsample=blur')
  elif task.dense and config.model.padding in ('reflect', 'circular'):
    check_sizes(model, test_set, padded=config.eval.padded,
                way='model.padding=zero, or eval.padded=True where some scenes are large enough')
  return task.evaluation(config, test_set, DeviceCounter(
    config, model, task, test_set, devices, check_stop=check_stop))


def create_feed(config, task, train_set, plan) -> IndexFeed | HostFeed:
  """What gives a run its batches."""
  data = task.resident(train_set)
  source = task.host_batches(train_set, batch_size=config.batch_size, seed=config.seed,
                             num_hosts=jax.process_count(), host=jax.process_index())
  return IndexFeed(plan, data) if source is None else HostFeed(plan, data, source)


def create_learner(config, task, train_set, plan, *, platform=None):
  """The network, its initial state, the optimiser, its schedule; platform: see create_network."""
  model = models.create_network(config.model, num_classes=task.num_classes,
                        total_steps=plan.total_steps, platform=platform,
                        axis_name=AXIS if config.sync_batch_norm else None)
  schedule = optimizer.create_schedule(config, steps_per_epoch=plan.steps_per_epoch,
                                       total_steps=plan.total_steps)
  rule = optimizer.create_optimizer(config, schedule)
  state = steps.create_state(model, rule, seed=config.seed, dtype=task.dtype,
                             image_shape=(*task.input_shape(train_set), 3))
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

  Apart from `create_learner`, so that a checkpoint needs that file no more. The optimiser's state
  stays: it starts from zeros, whatever the parameters are.

  Raises UsageError as packages.located and weights.load_backbone do.
  """
  path, collections = config.model.pretrained, ('params', 'batch_stats')
  if not path:
    return state
  backbone = weights.load_backbone({name: getattr(state, name)['backbone'] for name in collections},
                                packages.located(path), variant=config.model.backbone,
                                stem=config.model.stem)
  return state.replace(**{name: {**getattr(state, name), 'backbone': backbone[name]}
                          for name in collections})
