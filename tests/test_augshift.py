"""The pairwise-shift loss against NumPy in float64, its gradient against finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gapjax.errors import UsageError
from gapjax.tasks.augshift import augshift_loss, crop_pairs, warm_up

draw = np.random.default_rng(0)
B, K, C = 6, 5, 7
LOGITS, FEATURES = draw.normal(size=(2, B, K)), draw.normal(2, 3, size=(2, B, C))
LABELS = draw.integers(0, K, B)


def by_definition(logits, features, weight):
  entropy = 0.0
  for crop in range(2):
    for b in range(B):
      p = np.exp(logits[crop, b] - logits[crop, b].max())
      entropy -= np.log(p[LABELS[b]] / p.sum()) / B
  distance = ((features[0] - features[1]) ** 2).sum() / (B * C)
  return entropy + weight * distance, entropy, distance


@pytest.mark.parametrize('weight', [0.0, 1.0, 10.0])
@pytest.mark.parametrize('dtype', ['float32', 'float64'])
def test_loss_by_its_definition(weight, dtype):
  with jax.enable_x64(dtype == 'float64'):
    loss, parts = augshift_loss(jnp.asarray(LOGITS, dtype), jnp.asarray(FEATURES, dtype), LABELS,
                                weight=weight)
    expected, entropy, distance = by_definition(LOGITS, FEATURES, weight)
    tolerance = 1e-6 if dtype == 'float32' else 1e-12
    np.testing.assert_allclose(loss, expected, rtol=tolerance)
    np.testing.assert_allclose(parts['cross_entropy'], entropy, rtol=tolerance)
    np.testing.assert_allclose(parts['distance'], distance, rtol=tolerance)
    variance = FEATURES.reshape(-1, C).var(0).mean()
    np.testing.assert_allclose(parts['relative_distance'], distance / variance, rtol=tolerance * 5)


def test_gradient_by_finite_differences():
  with jax.enable_x64(True):
    value = lambda l, z: augshift_loss(l, z, LABELS, weight=2.5)[0]  # noqa: E731
    gradients = jax.grad(value, (0, 1))(LOGITS, FEATURES)
  for which, x in enumerate((LOGITS, FEATURES)):
    for index in [(0, 0, 0), (1, 2, 3), (0, 5, 4), (1, 5, 1)]:
      step = np.zeros_like(x)
      step[index] = 1e-5
      change = [by_definition(*(x + s * step if which == i else y
                                for i, y in enumerate((LOGITS, FEATURES))), 2.5)[0]
                for s in (1, -1)]
      np.testing.assert_allclose(gradients[which][index], (change[0] - change[1]) / 2e-5,
                                 rtol=1e-6, atol=1e-9)


def test_relative_distance_does_not_fall_by_shrinking_the_features():
  _, parts = augshift_loss(LOGITS, FEATURES, LABELS, weight=1.0)
  _, small = augshift_loss(LOGITS, FEATURES / 100, LABELS, weight=1.0)
  np.testing.assert_allclose(small['distance'], parts['distance'] / 1e4, rtol=1e-5)
  np.testing.assert_allclose(small['relative_distance'], parts['relative_distance'], rtol=1e-5)
  _, dead = augshift_loss(LOGITS, FEATURES * 0, LABELS, weight=1.0)
  assert float(dead['relative_distance']) == 0


@pytest.mark.parametrize('one_key', [True, False])
def test_pairs_are_two_independent_uniform_shifts(one_key):
  n, size, s = 800, 7, 2
  images = np.arange(1.0, size * size + 1).reshape(1, size, size, 1).repeat(n, 0).astype(np.float32)
  key = jax.random.key(0)
  pairs = np.asarray(crop_pairs(key if one_key else jax.random.split(key, n), images, max_shift=s))
  assert pairs.shape == (2, n, size, size, 1)
  shifted = {}
  for dy in range(-s, s + 1):
    for dx in range(-s, s + 1):
      canvas = np.zeros((size + 2 * s, size + 2 * s))
      canvas[s:-s, s:-s] = images[0, :, :, 0]
      shifted[dy, dx] = canvas[s + dy:s + dy + size, s + dx:s + dx + size]
  found = np.zeros((2, n, 2), int)
  for crop in range(2):
    for i in range(n):
      [shift] = [k for k, v in shifted.items() if np.array_equal(v, pairs[crop, i, :, :, 0])]
      found[crop, i] = shift
  for crop in range(2):
    counts = np.bincount((found[crop] + s) @ [5, 1], minlength=25)
    assert counts.min() > 10 and counts.max() < 60  # 32 expected
  both = np.corrcoef(found[0].ravel(), found[1].ravel())[0, 1]
  assert abs(both) < 0.1


@pytest.mark.parametrize('shift', [-1, 5, 9])
def test_a_shift_that_does_not_fit(shift):
  with pytest.raises(UsageError, match='from 0 to 4'):
    crop_pairs(jax.random.key(0), jnp.zeros((1, 5, 6, 3)), max_shift=shift)


def test_warm_up():
  values = [float(warm_up(step, 4.0, steps=8)) for step in (0, 2, 8, 100)]
  assert values == [0.0, 1.0, 4.0, 4.0]
  assert float(warm_up(0, 4.0, steps=0)) == 4.0
