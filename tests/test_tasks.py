"""Every task of the registry offers what training and evaluation ask of it."""

import inspect

import numpy as np
import pytest
from conftest import SCENES, same, tiny_config

from gapjax import config as configs
from gapjax import data
from gapjax.models import IMAGENET
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


def loaded(name, data_dir, **changes):
  config = tiny_config(**{**(SCENES if name == 'segmentation' else {'task': name}), **changes})
  return config, *build.load_data(config, data_dir=data_dir)


@pytest.mark.parametrize('name', TASKS)
def test_the_best_evaluation_is_the_most_accurate(name, data_dir):
  config, _, test_set, task = loaded(name, data_dir, **{'eval.shift': 2, 'eval.max_shift': 2})
  metric = 'miou' if name == 'segmentation' else 'accuracy'
  lines = [{'step': step, metric: value} for step, value in ((1, .2), (2, .9), (3, .4))]
  final = {'accuracy': .4, 'miou': .4, 'loss': 1., 'per_location': None, 'shifts': {},
           'per_class': [.4] * len(test_set.class_names)}
  best = dict(task.evaluation(config, test_set, Uncounted()).summary(final, lines)['best'])
  assert best.pop('step') == 2 and [*best.values()] == [.9]


@pytest.mark.parametrize('name', TASKS)
def test_splits_are_those_of_the_config(name, data_dir):
  _, train_set, test_set, task = loaded(name, data_dir, **{
    'data.train_split': 'test', 'data.eval_split': 'train', 'data.train_images': 20,
    'eval.images': 10, 'eval.shift': 2, 'eval.max_shift': 2, 'batch_size': 8})
  for found, split in ((train_set, 'test'), (test_set, 'train')):
    whole = task.load_split(found.name, split=split, data_dir=data_dir, image_size=None)
    other = task.load_split(found.name, split='train' if split == 'test' else 'test',
                            data_dir=data_dir, image_size=None)
    first, same, not_same = (
      x[0]['image'] if name == 'segmentation' else x.images[0] for x in (found, whole, other))
    np.testing.assert_array_equal(first, same)
    assert not np.array_equal(first, not_same)


def test_fields_reach_the_task(data_dir):
  """Those whose defaults are a task's own defaults, too, or another field's."""
  *_, task = loaded('classification', data_dir, **{
    'augshift.crops': 2, 'augshift.max_shift': 1, 'augshift.stacked': False, 'augshift.weight': 2.,
    'eval.shift': 2, 'eval.max_shift': 3, 'eval.map_step': 3, 'data.flip': False})
  assert (task.crops, task.max_shift, task.stacked, task.weight) == (2, 1, False, 2.)
  assert task.map_offsets == (-3, 0, 3) and not task.flip
  *_, task = loaded('canvas', data_dir, **{
    'canvas.fill': 'black', 'canvas.grid': 3, 'canvas.target': 'image', 'data.flip': False})
  assert (task.fill, task.grid, task.target, task.flip) == ('black', 3, 'image', False)
  assert all(loaded(name, data_dir, **{'eval.shift': 2, 'eval.max_shift': 3, 'data.flip': True}
                    )[-1].flip for name in ('canvas', 'classification'))
  _, train_set, _, task = loaded('segmentation', data_dir, **{
    'segmentation.loss': 'focal', 'segmentation.gamma': 1.5, 'segmentation.scale': (.3, .5),
    'segmentation.flip': False})
  assert (task.loss_name, task.gamma, task.scale, task.flip) == ('focal', 1.5, (.3, .5), False)
  assert same(task.host_batches(train_set, batch_size=4, seed=3).at(5), data.training_batches(
    train_set, batch_size=4, seed=3, crop_size=(24, 32), scale=(.3, .5), flip=False,
    fill=np.rint(255 * np.array(IMAGENET[0]))).at(5))
