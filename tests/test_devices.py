"""Training steps on one device and on several: the same computation."""

import functools
import itertools

import jax
import numpy as np
import pytest
from conftest import SCENES, tiny_config

from gapjax.training import build, steps, workdirs
from gapjax.training.devices import Devices
from gapjax.training.plan import Plan


def take_steps(config, data_dir, *, devices, count):
  """(state, metrics) after `count` calls, as they are on the devices."""
  train_set, _, task = build.load_data(config, data_dir=data_dir)
  here = Devices(jax.local_devices()[:devices])
  plan = Plan.of(workdirs.settled(config, platform=here.platform),
                 num_images=len(train_set))
  model, state, rule, _ = build.create_learner(config, task, train_set, plan)
  step = build.create_train_steps(model, task, rule, here)
  feed = build.create_feed(config, task, train_set, plan)
  data = here.replicate(feed.data)
  key = here.replicate(steps.stream(config.seed, steps.TRAIN))
  state = here.replicate(state)
  for batch in itertools.islice(feed.batches(0), count):
    state, metrics = step(state, key, data, here.split(batch, axis=1),
                          np.int32(config.steps_per_call or 1))
  return state, {**metrics['batch'], 'grad_norm': metrics['grad_norm']}


def assert_close(a, b, *, relative):
  """Largest difference over the largest value, leaf by leaf."""
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    assert np.abs(x - y).max() <= relative * max(np.abs(x).max(), 1e-3)


slow = functools.partial(pytest.param, marks=pytest.mark.slow)
PAIRS = {'task': 'classification', 'augshift.crops': 2, 'eval.shift': 2, 'eval.max_shift': 2}


@pytest.mark.parametrize('changes', [
  {'model.head': 'gap'}, slow({'model.head': 'permuted'}),
  slow({'model.head': 'linear', **PAIRS}),
  slow({'model.head': 'linear', **PAIRS, 'augshift.stacked': False, 'augshift.warm_up': 0.5}),
  slow({**SCENES, 'optimizer.backbone_factor': 0.1, 'batch_size': 8})],
  ids=['gap', 'permuted', 'pairs', 'separate pairs', 'scenes'])
def test_one_and_four_devices_agree_in_float64(data_dir, changes):
  """Six Adam steps, with augmentation and permutation: the same to 1e-9 (design: float64)."""
  with jax.enable_x64(True):
    config = tiny_config(**{'model.dtype': 'float64', 'data.flip': True, **changes})
    one, metrics_one = take_steps(config, data_dir, devices=1, count=6)
    four, metrics_four = take_steps(config, data_dir, devices=4, count=6)
    host = Devices.to_host
    assert_close(host(one.params), host(four.params), relative=1e-9)
    assert_close(host(one.batch_stats), host(four.batch_stats), relative=1e-9)
    assert_close(host(metrics_one), host(metrics_four), relative=1e-9)
    moved = jax.tree.map(lambda x: float(np.abs(x).max()), host(one.opt_state))
    assert max(jax.tree.leaves(moved)) > 0


def test_one_and_four_devices_agree_in_float32_on_one_step(data_dir):
  """Loss and gradient of the first step, to 1e-5; SGD's first momentum is the gradient."""
  config = tiny_config(**{'optimizer.name': 'sgd', 'optimizer.lr': 1.0})
  one, metrics_one = take_steps(config, data_dir, devices=1, count=1)
  four, metrics_four = take_steps(config, data_dir, devices=4, count=1)
  assert_close(Devices.to_host(metrics_one), Devices.to_host(metrics_four), relative=1e-5)
  gradients = [np.concatenate([np.float64(g).ravel() for g in jax.tree.leaves(state.opt_state)])
               for state in map(Devices.to_host, (one, four))]
  difference = np.linalg.norm(gradients[0] - gradients[1])
  assert np.linalg.norm(gradients[0]) > 0 and difference <= 1e-5 * np.linalg.norm(gradients[0])


@pytest.mark.parametrize('sync', [True, False])
def test_what_is_returned_as_replicated_is_replicated(data_dir, sync):
  """pmap's out_axes=None accepts values that differ between devices in silence: they must not."""
  config = tiny_config(sync_batch_norm=sync)
  state, metrics = take_steps(config, data_dir, devices=4, count=2)
  for leaf in jax.tree.leaves((state, metrics)):
    shards = [np.asarray(shard.data) for shard in leaf.addressable_shards]
    assert len(shards) == 4
    for shard in shards[1:]:
      np.testing.assert_array_equal(shard, shards[0])


def test_unsynchronised_batch_norm_is_another_computation(data_dir):
  a, _ = take_steps(tiny_config(sync_batch_norm=True), data_dir, devices=4, count=1)
  b, _ = take_steps(tiny_config(sync_batch_norm=False), data_dir, devices=4, count=1)
  stem = lambda s: np.asarray(s.batch_stats['bn1']['var'])  # noqa: E731
  assert np.abs(stem(a) - stem(b)).max() > 1e-6


def test_scanned_steps_are_the_same_steps(data_dir):
  """What accelerators run in one dispatch equals one dispatch a step (float64)."""
  with jax.enable_x64(True):
    config = tiny_config(**{'model.dtype': 'float64', 'steps_per_call': 3})
    scanned, metrics = take_steps(config, data_dir, devices=2, count=1)
    config.steps_per_call = 1
    single, _ = take_steps(config, data_dir, devices=2, count=3)
    assert metrics['grad_norm'].shape == (3,)
    assert_close(Devices.to_host(scanned), Devices.to_host(single), relative=1e-9)
