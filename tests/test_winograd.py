"""Winograd's convolution against the definition in NumPy, and where it is taken."""

import jax
import numpy as np
import pytest
import reference

from gapjax.models import convolution, winograd

draw = np.random.default_rng(0)


def by_definition(x, kernel, gradient, padding):
  """The gradients of x and the kernel, a kernel entry at a time."""
  h, w = gradient.shape[1:3]
  padded = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
  of_padded, of_kernel = np.zeros_like(padded), np.zeros_like(kernel)
  for i in range(3):
    for j in range(3):
      of_padded[:, i:i + h, j:j + w] += gradient @ kernel[i, j].T
      of_kernel[i, j] = np.einsum('bhwc,bhwo->co', padded[:, i:i + h, j:j + w], gradient)
  return of_padded[:, padding:padding + x.shape[1], padding:padding + x.shape[2]], of_kernel


@pytest.mark.parametrize('part', [10 ** 6, 400])
@pytest.mark.parametrize('padding', [0, 1, 2])
@pytest.mark.parametrize('shape', [(8, 6), (7, 9), (6, 5), (3, 3)])
def test_the_convolution_and_its_gradients_by_definition(monkeypatch, shape, padding, part):
  """Even and odd maps, tiles that reach over the border, the batch at once and in parts."""
  monkeypatch.setattr(winograd, 'PART', part)
  monkeypatch.setattr(winograd, 'PART_OF_KERNEL', 1)
  x, kernel = draw.normal(size=(4, *shape, 5)), draw.normal(size=(3, 3, 5, 7))
  expected = reference.conv(np.pad(x, ((0, 0), (padding,) * 2, (padding,) * 2, (0, 0))), kernel,
                            padding='none')
  gradient = draw.normal(size=expected.shape)
  with jax.enable_x64(True):
    lowered = jax.jit(lambda x, kernel: winograd.convolve(x, kernel, padding)).lower(x, kernel)
    assert ('while' in lowered.as_text()) == (x.size > part)
    y = winograd.convolve(x, kernel, padding)
    of_x = winograd.input_gradient(kernel, gradient, padding)
    of_kernel = winograd.kernel_gradient(x, gradient, padding)
  np.testing.assert_allclose(y, expected, atol=1e-12)
  for ours, definition in zip((of_x, of_kernel), by_definition(x, kernel, gradient, padding),
                              strict=True):
    np.testing.assert_allclose(ours, definition, atol=1e-12)


def test_float32_is_about_as_close_to_the_exact_result_as_xlas_convolution():
  x = draw.normal(size=(4, 12, 12, 96)).astype(np.float32)
  kernel = draw.normal(size=(3, 3, 96, 64)).astype(np.float32)
  exact = reference.conv(np.pad(x.astype(np.float64), ((0, 0), (1, 1), (1, 1), (0, 0))),
                         kernel.astype(np.float64), padding='none')

  def error(y):
    return np.sqrt(np.mean((np.asarray(y, np.float64) - exact) ** 2))

  direct = error(convolution._convolve(x, kernel, 1, 1, 1))
  assert error(winograd.convolve(x, kernel, 1)) < 2 * direct < 1e-4


def taken(batch=4, *, dtype=np.float32, channels=64, stride=1, dilation=1, groups=1, size=3,
          platform='cpu'):
  """How many convolutions and matrix products `convolve`, lowered for a platform, becomes."""
  x = jax.ShapeDtypeStruct((batch, 32, 32, channels), dtype)
  kernel = jax.ShapeDtypeStruct((size, size, channels // groups, channels), dtype)

  def convolve(x, kernel):
    return convolution.convolve(x, kernel, stride, size // 2, dilation, groups)

  text = jax.jit(convolve).trace(x, kernel).lower(lowering_platforms=(platform,)).as_text()
  return text.count('stablehlo.convolution'), text.count('dot_general')


def test_it_is_for_many_channels_on_cpu_alone():
  batch = -(-convolution.WORTH_WINOGRAD // (32 * 32 * 64 * 64))
  assert taken(batch) == (0, 16)
  assert taken(batch, platform='cuda') == taken(batch, platform='tpu') == (1, 0)
  assert taken(batch - 1) == taken(20 * batch, channels=32) == (1, 0)  # too little work
  for other in ({'stride': 2}, {'dilation': 2}, {'groups': 2}, {'size': 1},
                {'dtype': jax.numpy.bfloat16}):
    assert taken(2 * batch, **other) == (1, 0)


@pytest.mark.parametrize('padding', [0, 1, 2])
def test_autodiff_reaches_it_and_agrees_with_xla(monkeypatch, padding):
  monkeypatch.setattr(convolution, 'WORTH_WINOGRAD', 1)
  monkeypatch.setattr(convolution, 'WINOGRAD_CHANNELS', 5)
  x, kernel = draw.normal(size=(2, 7, 8, 5)), draw.normal(size=(3, 3, 5, 6))
  with jax.enable_x64(True):
    def gradients(convolve):
      return jax.grad(lambda x, k: (convolve(x, k, 1, padding, 1) ** 2).sum(), (0, 1))
    text = jax.jit(gradients(convolution.convolve)).lower(x, kernel).as_text()
    assert (text.count('dot_general'), text.count('stablehlo.convolution')) == (48, 0)
    ours, xlas = (gradients(c)(x, kernel) for c in (convolution.convolve, convolution._convolve))
  for a, b in zip(ours, xlas, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-9)
