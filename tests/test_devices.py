"""Training steps on one device and on several: the same computation."""

import functools
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import SCENES, python, same, tiny_config

from gapjax.errors import Interrupted
from gapjax.training import build, steps, workdirs
from gapjax.training.devices import Devices
from gapjax.training.plan import Plan
from gapjax.training.train import train


def steps_of(config, train_set, task, *, devices, count):
  """(params at first, state, metrics, last batch) of `count` calls, as they are on the devices."""
  here = Devices(jax.local_devices()[:devices])
  plan = Plan.of(workdirs.settled(config, platform=here.platform), num_images=len(train_set))
  model, state, rule, _ = build.create_learner(config, task, train_set, plan)
  start = Devices.to_host(state.params)
  step = build.create_train_steps(model, task, rule, here)
  feed = build.create_feed(config, task, train_set, plan)
  data = here.replicate(feed.data)
  key = here.replicate(steps.stream(config.seed, steps.TRAIN))
  state = here.replicate(state)
  for batch in itertools.islice(feed.batches(0), count):
    state, metrics = step(state, key, data, here.split(batch, axis=1),
                          np.int32(config.steps_per_call or 1))
  return start, state, metrics, batch


def take_steps(config, data_dir, **how):
  """(state, metrics) after some calls."""
  train_set, _, task = build.load_data(config, data_dir=data_dir)
  _, state, metrics, _ = steps_of(config, train_set, task, **how)
  metrics['batch'].pop('relative_distance', None)  # over the variance of a device's own share
  return state, {**metrics['batch'], 'grad_norm': metrics['grad_norm']}


def check_replicated(tree):
  """pmap's out_axes=None accepts values that differ between devices in silence: they must not."""
  for leaf in jax.tree.leaves(tree):
    first, *shards = [np.asarray(shard.data) for shard in leaf.addressable_shards]
    assert len(shards) == 3
    for shard in shards:
      np.testing.assert_array_equal(shard, first)


def assert_close(a, b, *, relative):
  """Largest difference over the largest value, leaf by leaf."""
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    assert np.abs(x - y).max() <= relative * max(np.abs(x).max(), 1e-3)


slow = functools.partial(pytest.param, marks=pytest.mark.slow)
PAIRS = {'task': 'classification', 'augshift.crops': 2, 'eval.shift': 2, 'eval.max_shift': 2}


@pytest.mark.parametrize('changes', [
  {'model.head': 'gap'}, slow({'model.head': 'permuted'}),
  slow({'model.head': 'linear', **PAIRS, 'model.downsample': 'learned_polyphase',
        'model.blur_size': 1}),
  slow({'model.head': 'linear', **PAIRS, 'augshift.stacked': False, 'augshift.warm_up': 0.5}),
  slow({**SCENES, 'optimizer.backbone_factor': 0.1, 'batch_size': 8})],
  ids=['gap', 'permuted', 'LPS', 'separate pairs', 'scenes'])
def test_one_and_four_devices_agree_in_float64(data_dir, changes):
  """Six Adam steps, with augmentation and permutation: the same to 1e-9 (design: float64)."""
  with jax.enable_x64(True):
    config = tiny_config(**{'model.dtype': 'float64', 'data.flip': True, **changes})
    one, metrics_one = take_steps(config, data_dir, devices=1, count=6)
    four, metrics_four = take_steps(config, data_dir, devices=4, count=6)
    check_replicated((four, metrics_four))
    host = Devices.to_host
    assert_close(host(one.params), host(four.params), relative=1e-9)
    assert_close(host(one.batch_stats), host(four.batch_stats), relative=1e-9)
    assert_close(host(metrics_one), host(metrics_four), relative=1e-9)
    moved = jax.tree.map(lambda x: float(np.abs(x).max()), host(one.opt_state))
    assert max(jax.tree.leaves(moved)) > 0


def test_unsynchronised_batch_norm_is_another_computation(data_dir):
  """Which returns the same on every device, too."""
  changes = {'model.dtype': 'float64', 'data.flip': True, 'model.head': 'gap'}
  with jax.enable_x64(True):
    states = [take_steps(tiny_config(**changes, sync_batch_norm=sync), data_dir, devices=4, count=6)
              for sync in (True, False)]
  check_replicated(states[1])
  a, b = (np.asarray(state.batch_stats['bn1']['var']) for state, _ in states)
  assert np.abs(a - b).max() > 1e-6


KEPT = """
import sys
import jax
from gapjax.training.devices import keep_programs
keep_programs(sys.argv[1])
print(jax.config.jax_compilation_cache_dir)
"""


@pytest.mark.parametrize(('platform', 'chosen', 'kept'), [
  ('gpu', {}, 'home/gapjax/programs'), ('cpu', {}, 'None'),
  ('gpu', {'JAX_COMPILATION_CACHE_DIR': '/mine'}, '/mine')])
def test_programs_are_kept_for_accelerators(platform, chosen, kept, monkeypatch):
  """In the user's cache folder, or where the user says."""
  monkeypatch.delenv('JAX_COMPILATION_CACHE_DIR')
  assert python(KEPT, platform, XDG_CACHE_HOME='home', **chosen).stdout.split() == [kept]


def test_every_step_and_batch_draws_anew():
  """Augmentation by example and step; PermuteNet's order by step and, evaluated, by batch: as the
  keys say that a task and a network are given. A loss that warms up is told the step."""
  def apply(_, images, *, rngs, mutable=(), **__):
    order = jax.random.key_data(rngs['permutation'])
    return ((order, {}), {'batch_stats': {}}) if mutable else (order, {})

  task = types.SimpleNamespace(
    train_batch=lambda keys, data, examples: jax.random.key_data(keys),
    loss=lambda network, batch, step: (
      0.0, {'examples': batch, 'order': network(batch)[0], 'step': step}),
    eval_inputs=lambda data, common, batch: batch, eval_counts=lambda order, *_: order)
  model, rule, params = types.SimpleNamespace(apply=apply), optax.sgd(0.1), {'w': jnp.ones(())}
  train, evaluate = (jax.vmap(made, axis_name='devices', in_axes=axes) for made, axes in (
    (steps.make_train_step(model, task, rule, axis_name='devices'), (None, None, None, 0)),
    (steps.make_eval_step(model, task, axis_name='devices'), (None,) * 5 + (0,))))
  key, some = steps.stream(0, steps.TRAIN), np.arange(8)[None]
  examples, orders, evaluated = set(), set(), set()
  for number in range(4):
    state = steps.TrainState(jnp.int32(number), params, {}, rule.init(params))
    metrics = train(state, key, {}, some)[1]['batch']
    assert metrics['step'][0] == number
    examples |= {*map(tuple, np.asarray(metrics['examples'][0]).tolist())}
    orders.add(tuple(np.asarray(metrics['order'][0]).tolist()))
    for batch in range(2):
      found = evaluate(jnp.zeros(2, jnp.uint32), state, key, {}, {'number': batch}, some)
      evaluated.add(tuple(np.asarray(found[0]).tolist()))
  assert (len(examples), len(orders), len(evaluated)) == (32, 4, 8)


@pytest.mark.parametrize('changes', [{}, SCENES], ids=['images', 'scenes'])
def test_seeds_share_nothing(data_dir, changes):
  """Neither the first weights, nor the first batch, nor what an evaluation draws."""
  def drawn(seed):
    config = tiny_config(**changes, seed=seed)
    train_set, test_set, task = build.load_data(config, data_dir=data_dir)
    plan = Plan.of(workdirs.settled(config, platform='cpu'), num_images=len(train_set))
    model, state, *_ = build.create_learner(config, task, train_set, plan)
    evaluation = build.create_evaluation(config, model, task, test_set,
                                         Devices(jax.local_devices()[:1]))
    kernel = next(x for x in jax.tree.leaves(state.params) if x.ndim == 4)
    return [kernel, next(build.create_feed(config, task, train_set, plan).batches(0)),
            jax.random.key_data(evaluation.counter.key)]

  assert [*map(same, drawn(0), drawn(1))] == [False] * 3


def test_training_draws_by_the_seed(data_dir, tmp_path, monkeypatch):
  def first(state, key, *_):
    assert same(*map(jax.random.key_data, (key, steps.stream(1, steps.TRAIN))))
    raise Interrupted('before the first step', code=1)
  monkeypatch.setattr(build, 'create_train_steps', lambda *_: first)
  with pytest.raises(Interrupted):
    train(tiny_config(seed=1), workdir=tmp_path, data_dir=data_dir,
          devices=jax.local_devices()[:1], progress=False)
