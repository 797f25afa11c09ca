"""BlurPool and adaptive polyphase sampling against NumPy, and what they are for: shifts."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import refused, trained

from gapjax import config as configs
from gapjax import models
from gapjax.models import downsample
from gapjax.models.vgg import VGG
from gapjax.training import steps

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
  component = downsample.strongest(downsample.components(x))
  ours = downsample.taken(downsample.components(x), component)
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
  refused(lambda: downsample.components(jnp.zeros((1, 5, 4, 1))), 'even sizes, not a 5x4')


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


# ---- LPS -----------------------------------------------------------------------------------------

LPS = dict(name='resnet10', head='linear', padding='circular', downsample='learned_polyphase',
           blur_size=1, width=4)


@pytest.mark.parametrize('changes', [
  {'stem': 'cifar'}, {'stem': 'imagenet', 'width': 16}], ids=str)
def test_lps_is_exactly_consistent_under_circular_shifts_at_test(changes):
  """In float64 and unblurred: rounding decides between logits that are nearly equal, as those of
  the blurred components of a tiny map are."""
  c = configs.default()
  c.model.update(**{**LPS, **changes, 'dtype': 'float64'})
  configs.validate(c)
  model = models.create_network(c.model, num_classes=10)
  x, chosen = draw.normal(size=(8, 32, 32, 3)), []

  def forward(x):
    def kept(call, arguments, keywords, context):
      y = call(*arguments, **keywords)
      if isinstance(context.module, downsample.LearnedComponent):
        chosen.append(y)
      return y
    with nn.intercept_methods(kept):
      logits = model.apply(variables, x, train=False)[0]
    return np.asarray(logits)

  with jax.enable_x64(True):
    variables = jax.tree.map(np.float64, trained(model, x))
    still = forward(x)
    assert len(np.unique(np.concatenate(chosen))) > 1  # it does choose
    for shift in SHIFTS:
      moved = forward(np.roll(x, shift, (1, 2)))
      np.testing.assert_allclose(moved, still, atol=1e-9 * still.std())
      np.testing.assert_array_equal(moved.argmax(1), still.argmax(1))


def test_lps_weighs_components_by_its_definition():
  parts = draw.normal(size=(3, 4, 2, 5, 6)).astype(np.float32)
  layer = downsample.LearnedComponent(total_steps=200)
  variables = trained(layer, parts)  # its init takes train, too
  p = variables['params']
  padded = np.pad(parts.astype(np.float64), ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)), mode='wrap')
  windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3))  # b p h w c k k
  y = np.einsum('bphwckl,klco->bphwo', windows, p['conv']['kernel']) + p['conv']['bias']
  logits = np.maximum(y, 0).mean((2, 3)) @ p['linear']['kernel'][0, 0, :, 0]
  np.testing.assert_array_equal(layer.apply(variables, parts, train=False), logits.argmax(1))
  rngs = {'gumbel': jax.random.key(5)}
  refused(lambda: layer.apply(variables, parts, train=True, rngs=rngs), 'the step')
  for number, temperature in ((0, 1), (100, 0.5125), (200, 0.025), (300, 0.025)):
    found = []

    def kept(call, arguments, keywords, context, found=found):
      y = call(*arguments, **keywords)
      if isinstance(context.module, downsample.Gumbel):
        found.append(y)
      return y

    with nn.intercept_methods(kept):
      weights = layer.apply({**variables, 'step': {'number': number}}, parts, train=True,
                            rngs=rngs)
    z = (logits + np.asarray(found[0], np.float64)) / temperature
    expected = np.exp(z - z.max(1, keepdims=True))
    np.testing.assert_allclose(weights, expected / expected.sum(1, keepdims=True), atol=1e-4)
  taken = downsample.taken(jnp.asarray(parts), weights)
  np.testing.assert_allclose(taken, np.einsum('bphwc,bp->bhwc', parts, weights), atol=1e-5)


def test_gumbel_noise_is_gumbels():
  """Its mean is Euler's constant, its variance pi^2 / 6."""
  noise = np.asarray(downsample.Gumbel().apply({}, jnp.zeros((20_000, 4)),
                                               rngs={'gumbel': jax.random.key(0)}))
  assert noise.mean() == pytest.approx(np.euler_gamma, abs=4 * np.pi / np.sqrt(6 * noise.size))
  assert noise.var() == pytest.approx(np.pi ** 2 / 6, rel=0.03)


def test_noise_depends_on_the_place_in_the_global_batch_alone():
  """Also of two views of every image, which a network sees as one batch on each device."""
  class Noise(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
      self.variable('batch_stats', 'mean', lambda: 0.0)
      return downsample.Gumbel()(x), {}

  def of_step(x, places):
    network = steps.TrainingNetwork(Noise(), {}, {'mean': 0.0}, jax.random.key(1), number=0,
                                    places=places, batch_size=8)
    return network(x.reshape(-1, 3))[0].reshape(x.shape)

  x, places = jnp.zeros((2, 8, 3)), jnp.arange(8)
  whole = of_step(x, places)
  parts = jax.pmap(of_step, in_axes=(1, 0), out_axes=1)(x.reshape(2, 4, 2, 3), places.reshape(4, 2))
  np.testing.assert_array_equal(parts.reshape(2, 8, 3), whole)
  assert len(np.unique(whole)) == whole.size


def test_lps_is_for_resnets():
  refused(lambda: configs.validate(configs.replaced(
    configs.default(), model=dict(LPS, name='vgg11'))), 'take polyphase')
  refused(lambda: VGG('vgg11', 10, downsample='learned_polyphase').init(
    jax.random.key(0), jnp.zeros((1, 64, 64, 3)), train=True), "VGG has 'polyphase'")
