"""BlurPool and adaptive polyphase sampling against NumPy, and what they are for: shifts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import refused, trained

from gapjax import config as configs
from gapjax import models
from gapjax.models import downsample

draw = np.random.default_rng(0)
# The rows of Pascal's triangle, by hand.
PASCAL = {1: [1], 2: [1, 1], 3: [1, 2, 1], 4: [1, 3, 3, 1], 5: [1, 4, 6, 4, 1]}


@pytest.mark.parametrize('size', PASCAL)
@pytest.mark.parametrize(('mode', 'numpy_mode'), [('reflect', 'reflect'), ('circular', 'wrap')])
@pytest.mark.parametrize(('shape', 'stride'), [
  ((6, 8), 2), ((7, 5), 2), ((7, 5), 1), ((1, 1), 1), ((2, 2), 1), ((1, 3), 1)])
def test_blur_by_its_definition(size, mode, numpy_mode, shape, stride):
  """Also of a map that is smaller than the filter."""
  x = draw.normal(size=(2, *shape, 3))
  ours = downsample.blur(jnp.asarray(x, jnp.float32), size, stride=stride, mode=mode)
  border = ((size - 1) // 2, size // 2)
  padded = np.pad(x, ((0, 0), border, border, (0, 0)), mode=numpy_mode)
  taps = np.outer(PASCAL[size], PASCAL[size]) / 4.0 ** (size - 1)
  windows = np.lib.stride_tricks.sliding_window_view(padded, (size, size), (1, 2))
  expected = np.einsum('bijckl,kl->bijc', windows[:, ::stride, ::stride], taps)
  np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


def test_polyphase_takes_the_strongest_component_of_each_image():
  x = draw.normal(size=(8, 6, 4, 3)).astype(np.float32)
  x[3, 1::2, 0::2] *= 5  # row 1, column 0: component 2
  ours, component = downsample.polyphase(x)
  seen = set()
  for image, out, chosen in zip(x, np.asarray(ours), np.asarray(component), strict=True):
    parts = [image[row::2, column::2] for row in (0, 1) for column in (0, 1)]
    strongest = int(np.argmax([np.linalg.norm(part.astype(np.float64)) for part in parts]))
    assert chosen == strongest
    np.testing.assert_array_equal(out, parts[strongest])
    seen.add(strongest)
  assert component[3] == 2 and len(seen) > 1
  other = draw.normal(size=(8, 6, 4, 5)).astype(np.float32)
  halved = downsample.AdaptivePolyphase().apply({}, x, other)
  np.testing.assert_array_equal(halved[0], ours)
  np.testing.assert_array_equal(downsample.AdaptivePolyphase().apply({}, x), ours)
  for out, image, chosen in zip(halved[1], other, component, strict=True):
    np.testing.assert_array_equal(out, image[chosen // 2::2, chosen % 2::2])


def test_polyphase_needs_even_sizes():
  refused(lambda: downsample.polyphase(jnp.zeros((1, 5, 4, 1))), 'even sizes, not a 5x4')


def network(**changes):
  c = configs.default()
  c.model.update(**{'name': 'resnet10', 'width': 4, 'head': 'linear', 'padding': 'circular',
                    **changes})
  configs.validate(c)
  model = models.create_network(c.model, num_classes=10)
  x = jnp.asarray(draw.normal(size=(4, 32, 32, 3)), jnp.float32)
  variables = trained(model, x)
  # In training mode: BatchNorm keeps the features of an untrained network at a useful size.
  forward = jax.jit(lambda v, x: model.apply(v, x, train=True, mutable=['batch_stats'])[0][0])
  return lambda shift: np.asarray(forward(variables, jnp.roll(x, shift, (1, 2))))


SHIFTS = [(0, 1), (1, 0), (3, 5), (7, 2), (16, 9)]


@pytest.mark.parametrize(('name', 'stem', 'blur_size'), [
  ('resnet10', 'cifar', 3), ('resnet50', 'cifar', 1),
  ('resnet10', 'imagenet', 1), ('vgg11', 'cifar', 1)])
def test_polyphase_is_exactly_consistent_under_circular_shifts(name, stem, blur_size):
  logits = network(name=name, stem=stem, downsample='polyphase', blur_size=blur_size)
  still = logits((0, 0))
  for shift in SHIFTS:
    np.testing.assert_allclose(logits(shift), still, atol=1e-3 * still.std())
    np.testing.assert_array_equal(logits(shift).argmax(1), still.argmax(1))


@pytest.mark.parametrize('name', ['resnet18', 'resnet50', 'vgg11'])
@pytest.mark.parametrize(('stem', 'size'), [('canvas', 96), ('cifar', 32)])
@pytest.mark.parametrize('method', ['blur', 'polyphase'])
def test_sizes_and_parameters_are_those_of_striding(name, stem, size, method):
  """Downsampling adds no parameter and no pixel: checkpoints fit both."""
  shapes = {}
  for how in ('stride', method):
    c = configs.default()
    c.model.update(name=name, width=4, stem=stem, downsample=how)
    model = models.create_network(c.model, num_classes=10)
    x = jnp.zeros((1, size, size, 3))
    out, variables = jax.eval_shape(
      functools.partial(model.init_with_output, train=True), jax.random.key(0), x)
    shapes[how] = jax.tree.map(lambda leaf: leaf.shape, (out, variables))
  assert shapes['stride'] == shapes[method]
