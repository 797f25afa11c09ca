"""Every task of the registry offers what training and evaluation ask of it."""

import inspect

import numpy as np
import pytest
from conftest import SCENES, tiny_config

from gapjax import config as configs
from gapjax.tasks import TASKS, protocol
from gapjax.training import build
from gapjax.training.evaluator import DeviceCounter


def misses(offered, asked):
  """The names of a protocol that a thing has not, or whose methods it takes no such call of."""
  found = [name for name in asked.__annotations__ if name != '_' and not hasattr(offered, name)]
  for name, method in vars(asked).items():
    if name.startswith('_') or not (inspect.isfunction(method) or hasattr(method, '__func__')):
      continue
    call = inspect.signature(getattr(method, '__func__', method)).parameters.values()
    call = [p for p in call if p.name not in ('self', 'cls')]
    try:
      inspect.signature(getattr(offered, name)).bind(
        *(0 for p in call if p.kind == p.POSITIONAL_OR_KEYWORD),
        **{p.name: 0 for p in call if p.kind == p.KEYWORD_ONLY})
    except (AttributeError, TypeError):
      found.append(name)
  return found


class Uncounted:
  batch_size, rows, num_channels = 4, slice(None), 3


@pytest.mark.parametrize('name', TASKS)
def test_a_task_offers_what_the_protocol_asks(name, data_dir):
  config = tiny_config(**(SCENES if name == 'segmentation' else {'task': name, 'eval.shift': 2,
                                                                 'eval.max_shift': 2}))
  train_set, test_set, task = build.load_data(config, data_dir=data_dir)
  assert misses(task, protocol.Task) == []
  assert misses(task.evaluation(config, test_set, Uncounted()), protocol.Evaluation) == []
  batches = task.host_batches(train_set, batch_size=4, seed=0)
  assert bool(task.resident(train_set)) == (batches is None)  # images there, or scenes from disk
  height, width = task.input_shape(train_set)
  if batches:
    assert batches.at(0)['images'].shape == (4, height, width, 3)
  for _, tile in task.samples(train_set, seed=0).tiles:
    assert tile.shape == (height, width, 3) and tile.dtype == np.uint8


def test_a_counter_takes_what_evaluations_ask():
  """Its attributes are known once it is made; a thing without the methods is told."""
  unmade = object.__new__(DeviceCounter)
  assert set(misses(unmade, protocol.Counter)) == {'batch_size', 'num_channels'}
  assert misses(Uncounted(), protocol.Counter) == ['count', 'predict']


def test_the_config_knows_the_tasks():
  assert tuple(TASKS) == configs.TASKS and set(TASKS) == set(configs.NOT_READ)
