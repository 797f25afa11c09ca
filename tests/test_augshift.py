"""The pairwise-shift loss against NumPy in float64, its gradient against finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import refused
from reference import entropies, moved

from gapjax.data import ImageDataset
from gapjax.errors import UsageError
from gapjax.tasks.augshift import (
  AugShiftTask,
  augshift_loss,
  pair_distance,
  random_shifts,
  warm_up,
)

draw = np.random.default_rng(0)
B, K, C = 6, 5, 7
LOGITS, FEATURES = draw.normal(size=(2, B, K)), draw.normal(2, 3, size=(2, B, C))
LABELS = draw.integers(0, K, B)


def by_definition(logits, features, weight):
  entropy = sum(entropies(crop, LABELS).mean() for crop in logits)
  distance = ((features[0] - features[1]) ** 2).mean()
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


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_loss_stays_in_float32(dtype):
  """Of features whose squared difference no float16 holds, and whose mean no bfloat16 does."""
  logits, features = (jnp.asarray(x, dtype) for x in (LOGITS, 300 * FEATURES))
  loss, parts = augshift_loss(logits, features, LABELS, weight=1.0)
  expected, _, distance = by_definition(*(np.asarray(x, float) for x in (logits, features)), 1.0)
  assert distance > 65504  # float16's largest
  for found, value in ((loss, expected), (pair_distance(features), distance)):
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, value, rtol=1e-6)
  assert parts['relative_distance'].dtype == jnp.float32


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


@pytest.mark.parametrize(('logits', 'features', 'labels', 'message'), [
  ((3, B, K), (2, B, C), (B,), r'logits must be \(2b, n\).* b = 6, .* not \(3, 6, 5\)'),
  ((2, B, K), (B, 2, C), (B,), 'features must be'),
  ((2, B, K), (2, B, 4, 4, C), (B,), 'features must be'),
  ((2 * B, K), (B, C), (B,), r'features must be .* not \(6, 7\)'),
  ((2 * B, K), (2 * B, C), (2 * B,), 'logits must be .* b = 12'),
  ((2 * B, K), (2 * B, C), (B, K), r'labels must be \(b,\) integers, .* not \(6, 5\)')])
def test_other_layouts_are_refused(logits, features, labels, message):
  """(b, 2, c) would otherwise compare two images in silence; under jit, while tracing."""
  with pytest.raises(UsageError, match=message) as error:
    jax.eval_shape(lambda *of: augshift_loss(*of, weight=1.0), np.zeros(logits), np.zeros(features),
                   np.zeros(labels, int))
  assert isinstance(error.value, ValueError)


def test_older_keys_are_taken_too():
  images = draw.normal(size=(3, 6, 6, 1)).astype(np.float32)
  for old, new in ((jax.random.PRNGKey(0), jax.random.key(0)),
                   (jax.random.split(jax.random.PRNGKey(0), 3),
                    jax.random.split(jax.random.key(0), 3))):
    np.testing.assert_array_equal(random_shifts(old, images, max_shift=2),
                                  random_shifts(new, images, max_shift=2))


@pytest.mark.parametrize('one_key', [True, False])
def test_pairs_are_two_independent_uniform_shifts(one_key):
  n, size, s = 800, 7, 2
  images = np.arange(1.0, size * size + 1).reshape(1, size, size, 1).repeat(n, 0).astype(np.float32)
  key = jax.random.key(0)
  keys = key if one_key else jax.random.split(key, n)
  pairs = np.asarray(random_shifts(keys, images, max_shift=s))
  assert pairs.shape == (2, n, size, size, 1)
  shifted = {(dy, dx): moved(images[0], dy, dx) for dy in range(-s, s + 1)
             for dx in range(-s, s + 1)}
  found = np.zeros((2, n, 2), int)
  for crop in range(2):
    for i in range(n):
      [shift] = [k for k, v in shifted.items() if np.array_equal(v, pairs[crop, i])]
      found[crop, i] = shift
  for crop in range(2):
    counts = np.bincount((found[crop] + s) @ [5, 1], minlength=25)
    assert counts.min() > 10 and counts.max() < 60  # 32 expected
  both = np.corrcoef(found[0].ravel(), found[1].ravel())[0, 1]
  assert abs(both) < 0.1


@pytest.mark.parametrize('shift', [-1, 5, 9])
def test_a_shift_that_does_not_fit(shift):
  refused(lambda: random_shifts(jax.random.key(0), jnp.zeros((1, 5, 6, 3)), max_shift=shift),
          'from 0 to 4')


def test_warm_up():
  values = [float(warm_up(step, 4.0, steps=8)) for step in (0, 2, 8, 100)]
  assert values == [0.0, 1.0, 4.0, 4.0]
  assert float(warm_up(0, 4.0, steps=0)) == 4.0


# ---- The task -----------------------------------------------------------------------------------

MEAN, STD = np.float64([0.5, 0.4, 0.3]), np.float64([0.2, 0.25, 0.5])
IMAGES = draw.integers(0, 256, (12, 7, 7, 3)).astype(np.uint8)
DATA = {'images': IMAGES, 'labels': draw.integers(0, K, 12)}


def make_task(**changes):
  fields = dict(mean=MEAN, std=STD, num_classes=K, crops=2, max_shift=2)
  return AugShiftTask(**{**fields, **changes})


@pytest.mark.parametrize(('crops', 'flip'), [(1, True), (2, True), (2, False)])
def test_training_batch_moves_and_flips_both_crops_alike(crops, flip):
  b, s = 300, 2
  indices = draw.integers(0, 12, b)
  keys = jax.random.split(jax.random.key(3), b)
  batch = jax.jit(make_task(crops=crops, flip=flip).train_batch)(keys, DATA, indices)
  images = np.asarray(batch['images'])
  assert images.shape == (crops, b, 7, 7, 3)
  np.testing.assert_array_equal(batch['labels'], DATA['labels'][indices])
  flips, shifts = np.zeros((crops, b), int), set()
  for i, index in enumerate(indices):
    normal = (IMAGES[index] / 255 - MEAN) / STD
    views = {(mirrored, dy, dx): moved(normal[:, ::-1] if mirrored else normal, dy, dx)
             for mirrored in (0, 1) for dy in range(-s, s + 1) for dx in range(-s, s + 1)}
    found = []
    for crop in range(crops):
      [view] = [k for k, v in views.items() if np.allclose(v, images[crop, i], atol=1e-5)]
      flips[crop, i] = view[0]
      found.append(view[1:])
    shifts.add(tuple(found))
  assert (flips == flips[0]).all()
  assert (100 < flips[0].sum() < 200) if flip else not flips.any()
  assert len(shifts) > (20 if crops == 1 else 200)  # of 25 and of 625


class LinearNetwork:
  """A network whose features are the image's channel means less those of its batch, so that it
  shows which crops share a batch's statistic; and which counts its calls."""

  def __init__(self):
    self.calls, self.kernel = 0, np.random.default_rng(1).normal(size=(3, K))

  def __call__(self, images):
    self.calls += 1
    z = images.mean((1, 2))
    z = z - z.mean(0)
    return z @ self.kernel, {'pooled': z}


@pytest.mark.parametrize('stacked', [True, False])
@pytest.mark.parametrize('step', [0, 3, 50])
def test_loss_of_a_batch(stacked, step):
  with jax.enable_x64(True):
    task = make_task(stacked=stacked, weight=4.0, warm_up_steps=8, dtype=jnp.float64)
    keys = jax.random.split(jax.random.key(0), B)
    indices = np.arange(B)
    batch = task.train_batch(keys, DATA, indices)
    network = LinearNetwork()
    loss, metrics = task.loss(network, batch, step)
    values = {name: mean.compute() for name, mean in metrics.items()}
  assert network.calls == (1 if stacked else 2)
  z = np.asarray(batch['images']).mean((2, 3))  # (2, b, 3)
  z = z - z.mean((0, 1) if stacked else 1, keepdims=True)
  logits = z @ network.kernel
  entropy = sum(entropies(crop, DATA['labels'][:B]).mean() for crop in logits)
  distance = ((z[0] - z[1]) ** 2).mean()
  np.testing.assert_allclose(loss, entropy + 4 * min(step / 8, 1) * distance, rtol=1e-12)
  np.testing.assert_allclose(values['loss'], loss, rtol=1e-12)
  np.testing.assert_allclose(values['accuracy'],
                             (logits.argmax(-1) == DATA['labels'][:B]).mean(), rtol=1e-12)
  np.testing.assert_allclose(values['relative_distance'],
                             distance / z.reshape(-1, 3).var(0).mean(), rtol=1e-12)


def test_one_crop_is_plain_cross_entropy():
  with jax.enable_x64(True):
    task = make_task(crops=1, weight=100.0, dtype=jnp.float64)
    batch = task.train_batch(jax.random.split(jax.random.key(0), B), DATA, np.arange(B))
    network = LinearNetwork()
    loss, metrics = task.loss(network, batch, 0)
    assert set(metrics) == {'loss', 'accuracy'}
    logits = np.asarray(network(batch['images'][0])[0])
  np.testing.assert_allclose(loss, entropies(logits, DATA['labels'][:B]).mean(), rtol=1e-12)


@pytest.mark.parametrize('crops', [1, 2])
def test_samples_are_pairs(crops):
  task = make_task(crops=crops, flip=False, max_shift=0)
  train_set = ImageDataset('digits', DATA['images'], DATA['labels'], tuple('0123456789'))
  tiles = task.samples(train_set, seed=0).tiles
  which = [*range(12 // crops)] * crops
  assert [label for label, _ in tiles] == [str(DATA['labels'][i]) for i in which]
  np.testing.assert_array_equal([image for _, image in tiles], IMAGES[which])
