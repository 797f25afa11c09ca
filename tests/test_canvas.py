"""Placement by hand, what a training batch is made of, and the plan of which image goes when."""

import collections
import itertools

import jax
import numpy as np
import pytest
from conftest import tiny_config

from gapjax.tasks.canvas import (
  CanvasTask,
  accuracies,
  every_location,
  paste,
  random_locations,
)
from gapjax.training.feeds import HostFeed
from gapjax.training.plan import Plan
from gapjax.training.workdirs import settled

draw = np.random.default_rng(0)
MEAN, STD = np.array([0.5, 0.4, 0.3], np.float32), np.array([0.2, 0.25, 0.5], np.float32)


def make_task(**changes):
  return CanvasTask(**{**dict(grid=3, target='location', fill='zero', mean=MEAN, std=STD,
                              num_image_classes=10), **changes})


@pytest.mark.parametrize('grid', [1, 2, 3, 7])
def test_placement_by_hand(grid):
  s, k = 4, grid
  locations = np.arange(k * k)
  patches = draw.normal(size=(k * k, s, s, 3)).astype(np.float32)
  canvases = np.asarray(paste(patches, locations, grid=k, fill=np.float32([7, 8, 9])))
  assert canvases.shape == (k * k, k * s, k * s, 3)
  for n, location in enumerate(locations):
    expected = np.tile(np.float32([7, 8, 9]), (k * s, k * s, 1))
    row, column = divmod(int(location), k)  # location = row * k + column
    expected[row * s:(row + 1) * s, column * s:(column + 1) * s] = patches[n]
    np.testing.assert_array_equal(canvases[n], expected)


@pytest.mark.parametrize(('fill', 'around'), [('zero', np.zeros(3)), ('black', -MEAN / STD)])
def test_fill_is_zero_after_normalising_or_black_before(fill, around):
  images = draw.integers(0, 256, (2, 5, 5, 3)).astype(np.uint8)
  canvases = np.asarray(make_task(fill=fill, grid=2).canvases(images, np.array([0, 3])))
  np.testing.assert_allclose(canvases[0, :5, :5], (images[0] / 255 - MEAN) / STD, atol=1e-5)
  np.testing.assert_allclose(canvases[1, 5:, 5:], (images[1] / 255 - MEAN) / STD, atol=1e-5)
  np.testing.assert_allclose(canvases[0, 5:], np.broadcast_to(around, (5, 10, 3)), atol=1e-6)


@pytest.mark.parametrize(('target', 'flip'), [('location', True), ('image', False)])
def test_training_batch(target, flip):
  """Uniform locations, flips half of the time when asked for, targets that fit the canvas."""
  n, b, s = 10, 900, 4
  images = draw.integers(1, 256, (n, s, s, 3)).astype(np.uint8)
  data = {'images': images, 'labels': np.arange(n)[::-1].copy()}
  task = make_task(target=target, flip=flip, mean=np.zeros(3), std=np.ones(3))
  indices = draw.integers(0, n, b)
  keys = jax.random.split(jax.random.key(1), b)
  batch = jax.jit(task.train_batch)(keys, data, indices)
  canvases, targets = np.asarray(batch['canvases']), np.asarray(batch['targets'])

  flips, seen = 0, collections.Counter()
  for canvas, index, label in zip(canvases, indices, targets, strict=True):
    cells = canvas.reshape(3, s, 3, s, 3).transpose(0, 2, 1, 3, 4).reshape(9, s, s, 3)
    [location] = np.flatnonzero(cells.any((1, 2, 3)))
    patch, image = cells[location] * 255, images[index]
    mirrored = np.allclose(patch, image[:, ::-1], atol=1e-3)
    assert mirrored or np.allclose(patch, image, atol=1e-3)
    flips += mirrored
    seen[location] += 1
    assert label == (location if target == 'location' else data['labels'][index])
  assert sorted(seen) == list(range(9)) and min(seen.values()) > 60  # 100 expected
  assert (380 < flips < 520) if flip else flips == 0


@pytest.mark.parametrize('target', ['location', 'image'])
def test_counts_by_location_leave_out_the_filling(target):
  """Labels of images are neither their numbers nor their places."""
  task = make_task(grid=2, target=target)
  logits = np.float32([[9, 0, 0, 0], [0, 9, 0, 0], [0, 9, 0, 0], [0, 0, 0, 9]])
  batch = {'location': np.array([0, 2, 1, 3]), 'mask': np.array([True, True, True, False]),
           'index': np.array([3, 0, 4, 1])}
  data = {'labels': np.array([2, 3, 0, 0, 1])} if target == 'image' else {}
  counts = task.eval_counts(logits, {}, data, {}, batch)
  result = accuracies(jax.tree.map(lambda *x: sum(x), counts, counts))
  assert result['per_location'] == [[1.0, 1.0], [0.0, None]]
  assert result['accuracy'] == 2 / 3 and result['canvases'] == 6
  losses = np.log(np.exp(logits.astype(np.float64)).sum(1)) - logits[range(4), [0, 2, 1, 3]]
  np.testing.assert_allclose(result['loss'], losses[:3].mean(), rtol=1e-6)


@pytest.mark.parametrize(('batch_size', 'per_call'), [(7, 1), (7, 3), (64, 1)])
def test_plan_takes_every_image_once_a_pass(batch_size, per_call):
  config = tiny_config(batch_size=batch_size, num_epochs=3, steps_per_call=per_call)
  plan = Plan.of(config, num_images=50)
  calls = itertools.takewhile(lambda call: call.start < plan.total_steps, plan.calls(0))
  order = np.concatenate([plan.batch_indices(c.start, len(c)).ravel() for c in calls])
  assert len(order) >= 150
  passes = order[:150].reshape(3, 50)
  for one in passes:
    assert sorted(one) == list(range(50))
  assert not np.array_equal(passes[0], passes[1])
  other = Plan.of(tiny_config(batch_size=batch_size, seed=1, steps_per_call=1), num_images=50)
  assert not np.array_equal(other.batch_indices(0).ravel()[:50], order[:other.batch_size][:50])


def test_plan_is_the_same_however_many_steps_a_call_takes():
  """On a GPU what it is on a CPU; the lines of metrics alone fall on whole calls."""
  config = tiny_config(**{'batch_size': 48, 'num_epochs': 4, 'log_every': 50,
                          'eval.every_epochs': 2, 'checkpoint.every_epochs': 1.5})
  cpu = Plan.of(settled(config, platform='cpu'), num_images=1397)
  gpu = Plan.of(settled(config, platform='gpu'), num_images=1397)
  assert (cpu.steps_per_call, gpu.steps_per_call) == (1, 32)
  # An epoch is 29.1 steps: 2 epochs end in step 59, 4 in 117; 1.5 in 44, 3 in 88.
  assert (cpu.total_steps, cpu.eval_steps, cpu.save_steps) == (117, {59, 117}, {44, 88, 117})
  assert (gpu.total_steps, gpu.eval_steps, gpu.save_steps) == (117, {59, 117}, {44, 88, 117})
  ends = [call.stop for call in itertools.islice(gpu.calls(0), 7)]
  assert ends == [32, 44, 59, 88, 117, 149, 181]
  assert [gpu.call(s).stop for s in (0, 40, 44, 50, 100)] == [32, 44, 59, 59, 117]
  assert [call.stop for call in itertools.islice(gpu.calls(0), 5) if gpu.logs(call)] == [
    32, 59, 117]
  assert [s for s in range(1, 118) if cpu.logs(range(s - 1, s))] == [1, 50, 100]


@pytest.mark.parametrize('start', [0, 4, 5])
def test_a_call_that_ends_early_takes_no_batch_of_the_next_one(start):
  """Four steps a call, five an epoch: a batch goes to its own step, wherever a run goes on."""
  class Source:
    def iterate(self, step):
      return ({'x': np.full(2, n)} for n in itertools.count(step))

  plan = Plan.of(tiny_config(batch_size=32, steps_per_call=4, num_epochs=2), num_images=160)
  assert [len(call) for call in itertools.islice(plan.calls(0), 4)] == [4, 1, 4, 1]
  batches = HostFeed(plan, {}, Source()).batches(start)
  for call, batch in zip(itertools.islice(plan.calls(start), 3), batches, strict=False):
    assert batch['x'].shape == (4, 2)
    assert batch['x'][:len(call), 0].tolist() == [*call]


def test_every_location_takes_each_image_to_each_location_once():
  index, location = every_location(5, 9)
  assert sorted(zip(index.tolist(), location.tolist(), strict=True)) == [
    (i, l) for i in range(5) for l in range(9)]


def test_random_locations_take_each_image_once_a_pass():
  index, location = random_locations(300, 9, passes=3, seed=(0, 1))
  np.testing.assert_array_equal(index.reshape(3, 300), np.tile(np.arange(300), (3, 1)))
  counts = np.bincount(location, minlength=9)
  assert len(counts) == 9 and counts.min() > 70  # 100 expected, standard deviation 9.4
  again = random_locations(300, 9, passes=3, seed=(0, 2))[1]
  assert (location != again).mean() > 0.8
