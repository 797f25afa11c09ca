"""Schedules against their formulas; Adam and SGD against PyTorch's own."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gapjax import config as configs
from gapjax.training import optimizer


def make(total=100, per_epoch=10.0, **changes):
  c = configs.default()
  c.update_from_flattened_dict({'optimizer.lr': 0.5, **changes})
  configs.validate(c)
  return c, optimizer.create_schedule(c, steps_per_epoch=per_epoch, total_steps=total)


@pytest.mark.parametrize(('name', 'formula'), [
  ('constant', lambda t, total: 1.0),
  ('cosine', lambda t, total: (1 + math.cos(math.pi * t / total)) / 2),
  ('poly', lambda t, total: (1 - t / total) ** 1.5),
  ('step', lambda t, total: 0.1 ** ((t >= 30) + (t >= 60))),
])
@pytest.mark.parametrize('warmup', [0, 20])
def test_schedules(name, formula, warmup):
  _, schedule = make(**{'schedule.name': name, 'schedule.warmup_epochs': warmup / 10,
                        'schedule.power': 1.5,
                        'schedule.step_epochs': ((30 + warmup) / 10, (60 + warmup) / 10)})
  for step in (0, 1, 19, 20, 21, 29, 30, 31, 50, 59, 60, 79, 80, 99):
    t = step - warmup
    expected = 0.5 * (step / warmup if t < 0 else formula(t, 100 - warmup))
    np.testing.assert_allclose(schedule(step), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(('name', 'momentum', 'nesterov'), [
  ('adam', .7, False), ('sgd', .7, False), ('sgd', .7, True), ('sgd', 0., True)])
@pytest.mark.parametrize('decay', [0.0, 0.1])
def test_rules_are_pytorchs(name, momentum, nesterov, decay):
  """Nesterov's step without momentum, which PyTorch refuses, is SGD's."""
  torch = pytest.importorskip('torch')
  p = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
  theirs = (torch.optim.Adam([p], betas=(0.8, 0.95), weight_decay=decay) if name == 'adam' else
            torch.optim.SGD([p], momentum=momentum, weight_decay=decay,
                            nesterov=nesterov and momentum > 0))
  with jax.enable_x64(True):
    config, schedule = make(**{
      'optimizer.name': name, 'optimizer.weight_decay': decay, 'optimizer.lr': 0.01,
      'optimizer.b1': 0.8, 'optimizer.b2': 0.95, 'optimizer.momentum': momentum,
      'optimizer.nesterov': nesterov, 'schedule.name': 'poly', 'schedule.power': 1.5})
    rule = optimizer.create_optimizer(config, schedule)
    params = jnp.float64(1.5)
    state = rule.init(params)
    for t, g in enumerate(np.random.default_rng(0).normal(size=20)):
      updates, state = rule.update(jnp.float64(g), state, params)
      params = optax.apply_updates(params, updates)
      theirs.param_groups[0]['lr'] = 0.01 * (1 - t / 100) ** 1.5
      p.grad = torch.tensor(g)
      theirs.step()
      assert float(params) == pytest.approx(p.item(), rel=1e-7)


def test_clipping_is_of_the_global_norm():
  config, _ = make(**{'optimizer.name': 'sgd', 'optimizer.clip_norm': 1.0})
  rule = optimizer.create_optimizer(config, lambda step: 1.0)
  gradients = {'a': jnp.array([3.0]), 'b': jnp.array([4.0])}  # norm 5
  updates, _ = rule.update(gradients, rule.init(gradients), gradients)
  np.testing.assert_allclose([updates['a'][0], updates['b'][0]], [-0.6, -0.8], rtol=1e-6)


def test_decay_is_added_to_what_was_clipped():
  config, _ = make(**{'optimizer.name': 'sgd', 'optimizer.clip_norm': 1.0,
                      'optimizer.weight_decay': .1})
  rule = optimizer.create_optimizer(config, lambda step: 1.0)
  params = {'a': jnp.array([10.0]), 'b': jnp.array([0.0])}
  gradients = {'a': jnp.array([3.0]), 'b': jnp.array([4.0])}  # norm 5
  updates, _ = rule.update(gradients, rule.init(params), params)
  np.testing.assert_allclose([updates['a'][0], updates['b'][0]], [-(.6 + 1), -.8], rtol=1e-6)


def test_two_boundaries_on_one_step_count_twice():
  _, schedule = make(**{'schedule.name': 'step', 'schedule.step_epochs': (3.0, 3.01)})
  np.testing.assert_allclose([schedule(30), schedule(31)], [0.005, 0.005], rtol=1e-6)
  assert float(schedule(29)) == 0.5
