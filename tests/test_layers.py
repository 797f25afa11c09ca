"""Paddings, convolution and BatchNorm against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from conftest import refused, same, trained

from gapjax import config, models
from gapjax.models import convolution, layers, on_cpu
from gapjax.models.deeplab import DeepLab
from gapjax.training.devices import AXIS, Devices

draw = np.random.default_rng(0)


@pytest.mark.parametrize('padding', layers.PADDINGS)
@pytest.mark.parametrize(('kernel_size', 'stride', 'dilation', 'shape', 'features', 'groups'), [
  (3, 1, 1, (5, 6), 4, 1), (3, 2, 1, (6, 7), 4, 1), (7, 2, 1, (8, 9), 4, 1),
  (1, 2, 1, (5, 5), 4, 1), (3, 1, 2, (6, 7), 4, 1), (3, 2, 3, (8, 7), 4, 1),
  (3, 1, 1, (8, 9), 6, 6), (3, 2, 1, (8, 9), 6, 6), (3, 1, 2, (8, 9), 6, 6),
  (3, 2, 3, (8, 9), 6, 6), (3, 1, 1, (8, 9), 12, 6), (3, 2, 2, (8, 9), 4, 2)])
def test_conv_equals_its_definition(padding, kernel_size, stride, dilation, shape, features,
                                    groups):
  x = draw.normal(size=(2, *shape, 6))
  conv = layers.Conv(features, kernel_size, stride, padding, use_bias=True, dilation=dilation,
                     groups=groups)
  variables = conv.init(jax.random.key(1), x)
  ours = conv.apply(variables, x)
  kernel, bias = map(np.asarray, (variables['params']['kernel'], variables['params']['bias']))
  assert kernel.shape == (kernel_size, kernel_size, 6 // groups, features)
  expected = reference.conv(x, kernel, stride=stride, padding=padding, bias=bias,
                            dilation=dilation, groups=groups)
  assert ours.shape == expected.shape
  np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('convolve', [convolution.convolve, on_cpu.convolve])
@pytest.mark.parametrize('padding', ['zero', 'reflect', 'partial'])
@pytest.mark.parametrize(('shape', 'kernel_size', 'stride', 'dilation', 'groups'), [
  (shape, kernel_size, *rest) for shape in ((8, 9), (7, 6)) for kernel_size in (3, 5)
  for rest in ((1, 1, 1), (2, 1, 1), (2, 1, 4), (1, 2, 4))])
def test_same_padding_is_tensorflows(convolve, padding, shape, kernel_size, stride, dilation,
                                     groups):
  """ceil(n / stride) values an axis, and the larger part of the padding behind it; zeros as XLA has
  them, whose SAME is the same."""
  x = draw.normal(size=(2, *shape, 4)).astype(np.float32)
  conv = layers.Conv(4, kernel_size, stride, padding, dilation=dilation, groups=groups, same=True,
                     convolve=convolve)
  variables = conv.init(jax.random.key(1), x)
  found, kernel = conv.apply(variables, x), variables['params']['kernel']
  assert found.shape[1:3] == tuple(-(-n // stride) for n in shape)
  borders = []
  for n in shape:
    total = max((-(-n // stride) - 1) * stride + dilation * (kernel_size - 1) + 1 - n, 0)
    borders.append((total // 2, total - total // 2))
    assert layers.same_padding(n, reach=dilation * (kernel_size - 1), stride=stride) == borders[-1]
  assert stride == 1 or all(after - before == (n + 1) % 2 for n, (before, after) in zip(
    shape, borders, strict=True))
  padded, inside = (np.pad(a, ((0, 0), *borders, (0, 0)), mode='reflect' if padding == 'reflect'
                           else 'constant') for a in (x, np.ones_like(x)))
  how = dict(stride=stride, padding='none', dilation=dilation, groups=groups)
  expected = reference.conv(padded, kernel, **how)
  if padding == 'zero':
    np.testing.assert_allclose(expected, jax.lax.conv_general_dilated(
      x, kernel, (stride, stride), 'SAME', rhs_dilation=(dilation, dilation),
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'), feature_group_count=groups), atol=1e-5)
  if padding == 'partial':
    area = reference.conv(inside, np.ones_like(kernel), **how) / kernel.shape[2]
    expected *= kernel_size ** 2 / area
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(('kernel_size', 'stride', 'padding', 'dilation', 'features', 'groups'), [
  (3, 1, 0, 1, 4, 1), (3, 1, 1, 1, 4, 1), (3, 2, 1, 1, 4, 1), (1, 2, 0, 1, 4, 1),
  (1, 1, 0, 1, 4, 1), (3, 1, 2, 2, 4, 1), (7, 2, 3, 1, 4, 1), (3, 2, 2, 2, 8, 8),
  (3, 1, 0, 3, 16, 8), (3, 1, 1, 1, 4, 2), (5, 2, ((1, 2), (2, 2)), 1, 8, 8),
  (3, 2, ((0, 1), (1, 1)), 1, 4, 1)])
@pytest.mark.parametrize('part', [None, 10 ** 6, 1500, 1])
def test_convolutions_and_their_gradients_by_their_definition(
    monkeypatch, kernel_size, stride, padding, dilation, features, groups, part):
  """On CPU whole, in parts of unequal size, image by image. A gradient is told by its product with
  any input or kernel: that of dy with what this gives, since a convolution is bilinear."""
  monkeypatch.setattr(on_cpu, 'PART', part)
  convolve = on_cpu.convolve if part else convolution.convolve
  x, other_x = draw.normal(size=(2, 7, 8, 9, 8))
  kernel, other = draw.normal(size=(2, kernel_size, kernel_size, 8 // groups, features))

  def definition(x, kernel):
    padded = np.pad(x, ((0, 0), *np.broadcast_to(padding, (2, 2)), (0, 0)))
    return reference.conv(padded, kernel, stride=stride, padding='none', dilation=dilation,
                          groups=groups)

  expected = definition(x, kernel)
  weight = draw.normal(size=expected.shape)
  with jax.enable_x64(True):
    found, transpose = jax.vjp(lambda x, k: convolve(x, k, stride, padding, dilation, groups),
                               jnp.asarray(x), jnp.asarray(kernel))
    gradient_x, gradient_kernel = transpose(jnp.asarray(weight))
  np.testing.assert_allclose(found, expected, atol=1e-10)
  np.testing.assert_allclose(
    [np.vdot(gradient_x, other_x), np.vdot(gradient_kernel, other)],
    [np.vdot(weight, definition(other_x, kernel)), np.vdot(weight, definition(x, other))],
    rtol=1e-9)


@pytest.mark.parametrize('convolve', [convolution.convolve, on_cpu.convolve])
def test_networks_are_differentiated_forwards_too(convolve):
  """jvp, jacfwd and linearize, which a custom gradient would refuse, against a difference."""
  with jax.enable_x64(True):
    conv = layers.Conv(2, dtype=jnp.float64, convolve=convolve)
    x, direction = (jnp.asarray(draw.normal(size=(2, 5, 5, 3))) for _ in range(2))
    variables = conv.init(jax.random.key(0), x)
    def f(x):
      return jnp.tanh(conv.apply(variables, x))
    _, found = jax.jvp(f, (x,), (direction,))
    difference = (f(x + 1e-6 * direction) - f(x - 1e-6 * direction)) / 2e-6
    np.testing.assert_allclose(found, difference, atol=1e-8)
    np.testing.assert_allclose(jax.linearize(f, x)[1](direction), found, atol=1e-12)
    np.testing.assert_allclose(jnp.tensordot(jax.jacfwd(f)(x), direction, 4), found, atol=1e-12)


def test_only_networks_on_cpu_convolve_in_parts():
  """Many convolutions on CPU, one for each layer anywhere else."""
  c = config.default().model
  c.update(name='resnet10', width=8)
  images = jax.ShapeDtypeStruct((64, 96, 96, 3), jnp.float32)

  def count(platform):
    model = models.create_network(c, num_classes=9, platform=platform)
    return str(jax.make_jaxpr(lambda x: model.init_with_output(
      jax.random.key(0), x, train=False)[0])(images)).count('conv_general_dilated[')

  assert count('gpu') == count('tpu') == count(None) == 13 < count('cpu')


def test_padding_needs_enough_pixels():
  x = jnp.zeros((1, 3, 3, 1))
  for size, mode, fits in [(2, 'reflect', True), (3, 'reflect', False), (3, 'circular', True),
                           (4, 'circular', False), (9, 'zero', True), (9, 'replicate', True)]:
    if fits:
      assert layers.pad(x, size, mode=mode).shape == (1, 3 + 2 * size, 3 + 2 * size, 1)
    else:
      refused(lambda size=size, mode=mode: layers.pad(x, size, mode=mode), 'larger')
  refused(lambda: layers.Conv(1, padding='none').init(jax.random.key(0), jnp.zeros((1, 2, 2, 1))),
          'larger images')


@pytest.mark.parametrize(('module', 'shape', 'fan_in'), [
  (layers.Conv(4000, use_bias=True), (1, 4, 4, 8), 3 * 3 * 8), (layers.Dense(4000), (1, 72), 72),
  (layers.Conv(4000, groups=4), (1, 3, 3, 8), 3 * 3 * 8 / 4)])  # a group's
def test_initialisation_is_pytorchs(module, shape, fan_in):
  params = module.init(jax.random.key(0), jnp.zeros(shape))['params']
  bound = 1 / np.sqrt(fan_in)
  for values in params.values():
    values = np.asarray(values).ravel()
    assert np.abs(values).max() <= bound
    # Uniform: the quartiles lie at -bound/2, 0, bound/2.
    np.testing.assert_allclose(np.quantile(values, [0.25, 0.5, 0.75]) / bound, [-0.5, 0, 0.5],
                               atol=0.05)


def test_batch_norm_by_its_definition():
  x = draw.normal(3, 2, size=(4, 3, 5, 6))
  norm = layers.BatchNorm()
  variables = norm.init(jax.random.key(0), x, train=True)
  stats = variables['batch_stats']
  np.testing.assert_array_equal(stats['mean'], np.zeros(6))
  np.testing.assert_array_equal(stats['var'], np.ones(6))
  scale, bias = draw.normal(size=6), draw.normal(size=6)
  params = {'scale': jnp.asarray(scale, jnp.float32), 'bias': jnp.asarray(bias, jnp.float32)}

  y, updates = norm.apply({'params': params, 'batch_stats': stats}, x, train=True,
                          mutable=['batch_stats'])
  mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
  np.testing.assert_allclose(y, (x - mean) / np.sqrt(var + 1e-5) * scale + bias, rtol=1e-4,
                             atol=1e-5)
  new = updates['batch_stats']
  np.testing.assert_allclose(new['mean'], 0.1 * mean, rtol=1e-5)
  np.testing.assert_allclose(new['var'], 0.9 + 0.1 * x.var((0, 1, 2), ddof=1), rtol=1e-5)

  y = norm.apply({'params': params, 'batch_stats': new}, x, train=False)
  expected = (x - np.asarray(new['mean'])) / np.sqrt(np.asarray(new['var']) + 1e-5)
  np.testing.assert_allclose(y, expected * scale + bias, rtol=1e-4, atol=1e-5)


def test_batch_norm_does_not_cancel():
  """E[x^2] - E[x]^2 in float32 would lose a variance of 1 under a mean of 3000."""
  x = (3000 + draw.normal(size=(8, 4, 4, 1))).astype(np.float32)
  norm = layers.BatchNorm()
  stats = norm.init(jax.random.key(0), x, train=True)
  _, updates = norm.apply(stats, x, train=True, mutable=['batch_stats'])
  var = x.astype(np.float64).var(ddof=1)
  np.testing.assert_allclose(updates['batch_stats']['var'], 0.9 + 0.1 * var, rtol=1e-5)


def test_batch_norm_over_devices_is_batch_norm_of_the_whole_batch():
  """Forward, running averages and the gradient, where the shares differ much in mean."""
  with jax.enable_x64(True):
    x = draw.normal(size=(8, 3, 3, 2)) + 10 * np.arange(8)[:, None, None, None]
    weight = draw.normal(size=x.shape)
    alone = layers.BatchNorm(dtype=jnp.float64)
    over = layers.BatchNorm(dtype=jnp.float64, axis_name=AXIS)
    variables = alone.init(jax.random.key(0), x, train=True)

    def loss(norm, x, weight):
      y, updates = norm.apply(variables, x, train=True, mutable=['batch_stats'])
      return (jnp.sin(y) * weight).sum(), updates['batch_stats']

    (value, stats), gradient = jax.value_and_grad(
      lambda x: loss(alone, x, weight), has_aux=True)(x)
    split = lambda a: a.reshape(4, 2, 3, 3, 2)  # noqa: E731
    step = jax.pmap(jax.value_and_grad(lambda x, w: loss(over, x, w), has_aux=True),
                    axis_name=AXIS, devices=Devices(jax.local_devices()[:4]).devices)
    (values, all_stats), gradients = step(split(x), split(weight))
    np.testing.assert_allclose(values.sum(), value, rtol=1e-12)
    np.testing.assert_allclose(gradients.reshape(x.shape), gradient, rtol=1e-9, atol=1e-12)
    for name in ('mean', 'var'):
      np.testing.assert_allclose(all_stats[name], np.tile(stats[name], (4, 1)), rtol=1e-12)


def test_bfloat16_keeps_statistics_in_float32():
  x = jnp.asarray(draw.normal(size=(64, 8, 8, 2)) + 1, jnp.bfloat16)
  norm = layers.BatchNorm(dtype=jnp.bfloat16)
  variables = norm.init(jax.random.key(0), x, train=True)
  y, updates = norm.apply(variables, x, train=True, mutable=['batch_stats'])
  assert y.dtype == jnp.bfloat16
  assert updates['batch_stats']['mean'].dtype == jnp.float32
  exact = np.asarray(x, np.float64).mean((0, 1, 2))
  np.testing.assert_allclose(updates['batch_stats']['mean'], 0.1 * exact, rtol=1e-5)
  pooled = layers.global_average_pool(x)
  assert pooled.dtype == jnp.float32
  np.testing.assert_allclose(pooled, np.asarray(x, np.float64).mean((1, 2)), rtol=1e-5)


def test_max_pool():
  x = draw.normal(size=(2, 5, 4, 3)).astype(np.float32)
  expected = x[:, :4].reshape(2, 2, 2, 2, 2, 3).max((2, 4))
  np.testing.assert_array_equal(layers.max_pool(x), expected)


def test_full_padding_counts_every_position_alike():
  """All of a kernel over all of an image: the sum of the output is that of the image times the
  kernel's, wherever in the image its content is."""
  x = draw.normal(size=(2, 6, 7, 3))
  conv = layers.Conv(4, padding='full')
  variables = conv.init(jax.random.key(0), x)
  kernel = np.asarray(variables['params']['kernel'], np.float64)
  found = np.asarray(conv.apply(variables, x), np.float64).sum((1, 2))
  np.testing.assert_allclose(found, x.sum((1, 2)) @ kernel.sum((0, 1)), rtol=1e-4, atol=1e-4)


def test_dropout_keeps_the_mean_and_depends_on_the_place_in_the_global_batch():
  x = jnp.ones((8, 50, 10))
  rngs = {'dropout': jax.random.key(3)}
  alone = layers.Dropout(0.25).apply({}, x, train=True, rngs=rngs)
  assert set(np.unique(alone)) == {0, np.float32(1 / 0.75)}
  assert abs(float(alone.mean()) - 1) < 0.05
  assert not np.array_equal(alone[0], alone[1])
  np.testing.assert_array_equal(layers.Dropout(0.25).apply({}, x, train=False), x)
  parts = jax.pmap(
    lambda x, places: layers.Dropout(0.25).apply({'step': {'places': places}}, x, train=True,
                                                 rngs=rngs),
    axis_name=AXIS)(x.reshape(4, 2, 50, 10), jnp.arange(8).reshape(4, 2))
  np.testing.assert_array_equal(parts.reshape(x.shape), alone)


def test_training_drops_channels_before_the_last_convolutions():
  x = draw.normal(size=(2, 16, 16, 3)).astype(np.float32)
  for rate in (0., .5):
    model = DeepLab('deeplabv3', 5, 'resnet10', width=4, dropout=rate)
    variables = trained(model, x)
    forward = jax.jit(lambda key, model=model, variables=variables: model.apply(
      variables, x, train=True, mutable=['batch_stats'], rngs={'dropout': key})[0][0])
    one, other = (forward(jax.random.key(i)) for i in range(2))
    assert same(one, other) == (rate == 0)
