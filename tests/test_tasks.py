"""Every task of the registry offers what training and evaluation ask of it."""

import typing

import numpy as np
import pytest
from conftest import SCENES, tiny_config

from gapjax import config as configs
from gapjax.tasks import TASKS, protocol
from gapjax.training import build
from gapjax.training.evaluator import DeviceCounter


def offers(thing, asked):
  """Whether it has every name of a protocol; how they are called, training itself tells."""
  return isinstance(thing, typing.runtime_checkable(asked))


class Uncounted:
  batch_size, rows, num_channels = 4, slice(None), 3


@pytest.mark.parametrize('name', TASKS)
def test_a_task_offers_what_the_protocol_asks(name, data_dir):
  config = tiny_config(**(SCENES if name == 'segmentation' else {'task': name, 'eval.shift': 2,
                                                                 'eval.max_shift': 2}))
  train_set, test_set, task = build.load_data(config, data_dir=data_dir)
  assert offers(task, protocol.Task)
  assert offers(task.evaluation(config, test_set, Uncounted()), protocol.Evaluation)
  batches = task.host_batches(train_set, batch_size=4, seed=0)
  assert bool(task.resident(train_set)) == (batches is None)  # images there, or scenes from disk
  height, width = task.input_shape(train_set)
  if batches:
    assert batches.at(0)['images'].shape == (4, height, width, 3)
  for _, tile in task.samples(train_set, seed=0).tiles:
    assert tile.shape == (height, width, 3) and tile.dtype == np.uint8


def test_a_counter_takes_what_evaluations_ask():
  counter = object.__new__(DeviceCounter)
  vars(counter).update(batch_size=4, rows=slice(None), num_channels=3)  # known once it is made
  assert offers(counter, protocol.Counter) and not offers(Uncounted(), protocol.Counter)


def test_the_config_knows_the_tasks():
  assert tuple(TASKS) == configs.TASKS and set(TASKS) == set(configs.NOT_READ)
