"""The convolution that every network calls, not slow on CPU.

XLA's CPU backend computes the gradient of a convolution's kernel as a convolution whose window is
the whole feature map, up to nine times slower than the forward pass. The same sum is a few matrix
products of shifted inputs, which pays where there is much to do. 3x3 convolutions of many channels
are 1.3 to 2.3 times as fast by Winograd's algorithm (winograd.py), forward and backward. Depthwise
convolutions are slow there altogether, and are sums of shifted inputs. GPU and TPU keep what XLA
does.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from gapjax.models import winograd

# Output pixels of the batch times input and output channels, from which on products are quicker on
# CPU. ResNet-18 and -10, whole training steps, products against XLA: 0.9 times as fast at 4.7
# million (a layer), 0.96 and 0.8 to 1.1 at 7, 1.03 at 9.4, 1.33 at 34.
WORTH_PRODUCTS = 8_000_000
# Winograd's algorithm pays on CPU from so many channels on, of input and output: forward and
# gradients together, on one core, 1.3 to 1.9 times as fast with 48 or 64, 1.8 with 128, 1.8 to 2.3
# with 512, but 1.0 to 1.2 with 32. It takes about a second more to compile, hence the least work:
# input values of the batch times output channels.
WINOGRAD_CHANNELS = 48
WORTH_WINOGRAD = 30_000_000
# Input values of the images whose products are formed at once: more do not fit a processor's cache
# (256 maps of 32x32x64: 721 ms at once, 388 ms in four parts).
PART = 5_000_000


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def convolve(x: jax.Array, kernel: jax.Array, stride: int = 1, padding: int = 0,
             dilation: int = 1, groups: int = 1) -> jax.Array:
  """Convolves x (b, h, w, c), padded with zeros by `padding` a side.

  The kernel is (k, k, c / groups, o): the channels, of input and output, fall into groups that do
  not see each other, as torch.nn.Conv2d's do. Padding here rather than before makes the input's
  gradient a smaller convolution.

  Returns:
    (b, h', w', o), h' = (h + 2 padding - dilation (k - 1) - 1) // stride + 1.
  """
  return _forward(x, kernel, stride, padding, dilation, groups)[0]


def _convolve(x, kernel, stride, padding, dilation, groups=1):
  return lax.conv_general_dilated(
    x, kernel, (stride, stride), [(padding, padding)] * 2, rhs_dilation=(dilation, dilation),
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'), feature_group_count=groups)


def _is_winograd(x, kernel, stride, padding, dilation, groups):
  (k, _, c, o), half = kernel.shape, jnp.finfo(x.dtype).bits < 32
  return (k == 3 and stride == dilation == groups == 1 and padding < k and not half
          and min(c, o) >= WINOGRAD_CHANNELS and x.size * o >= WORTH_WINOGRAD)


def _is_depthwise(x, kernel, groups):
  return groups > 1 and groups == x.shape[-1] == kernel.shape[-1]


def _forward(x, kernel, *geometry):
  stride, padding, dilation, groups = geometry
  if _is_winograd(x, kernel, *geometry):
    on_cpu = functools.partial(winograd.convolve, padding=padding)
  elif _is_depthwise(x, kernel, groups):
    on_cpu = functools.partial(depthwise, stride=stride, padding=padding, dilation=dilation)
  else:
    return _convolve(x, kernel, *geometry), (x, kernel)
  y = lax.platform_dependent(x, kernel, cpu=on_cpu,
                             default=lambda x, kernel: _convolve(x, kernel, *geometry))
  return y, (x, kernel)


def _backward(stride, padding, dilation, groups, saved, gradient):
  x, kernel = saved
  geometry = stride, padding, dilation, groups

  def transposed(x, kernel, gradient, function=_convolve, geometry=geometry):
    _, transpose = jax.vjp(lambda x, kernel: function(x, kernel, *geometry), x, kernel)
    return transpose(gradient)

  def by_winograd(x, kernel, gradient):
    return (winograd.input_gradient(kernel, gradient, padding),
            winograd.kernel_gradient(x, gradient, padding))

  def by_products(x, kernel, gradient):
    _, transpose = jax.vjp(lambda x: _convolve(x, kernel, *geometry), x)
    return transpose(gradient)[0], kernel_gradient(
      x, gradient, size=len(kernel), stride=stride, padding=padding, dilation=dilation)

  few = x.shape[-1] < 8  # the stem's input channels: XLA is quicker there
  if _is_winograd(x, kernel, *geometry):
    on_cpu = by_winograd
  elif _is_depthwise(x, kernel, groups):
    on_cpu = functools.partial(transposed, function=depthwise, geometry=geometry[:-1])
  elif groups == 1 and not few and gradient.size * x.shape[-1] >= WORTH_PRODUCTS:
    on_cpu = by_products
  else:
    return transposed(x, kernel, gradient)
  return lax.platform_dependent(x, kernel, gradient, cpu=on_cpu, default=transposed)


convolve.defvjp(_forward, _backward)


def depthwise(x: jax.Array, kernel: jax.Array, stride: int, padding: int,
              dilation: int) -> jax.Array:
  """`convolve` with a group for each channel: x (b, h, w, c), a (k, k, 1, c) kernel.

  The sum over the kernel's entries of x, padded and shifted by dilation * (i, j), times the entry;
  in float32 or better. On CPU, a MobileNetV2 of width 32 on 4 images of 176x240: 0.01 s forward
  against XLA's 0.2, a training step 0.3 s against 0.9.
  """
  dtype, k, border = jnp.promote_types(x.dtype, jnp.float32), len(kernel), (padding, padding)
  padded = jnp.pad(x.astype(dtype), ((0, 0), border, border, (0, 0)))
  h, w = ((n - dilation * (k - 1) - 1) // stride + 1 for n in padded.shape[1:3])

  def shifted(i, j):
    i, j = dilation * i, dilation * j
    return padded[:, i:i + stride * (h - 1) + 1:stride, j:j + stride * (w - 1) + 1:stride]

  y = sum(shifted(i, j) * kernel[i, j, 0] for i in range(k) for j in range(k))
  return y.astype(x.dtype)  # (b, h, w, c) -> (b, h', w', c)


def kernel_gradient(x: jax.Array, gradient: jax.Array, *, size: int, stride: int, padding: int,
                    dilation: int) -> jax.Array:
  """The kernel's gradient (size, size, c, o) from x (b, h, w, c) and the output's (b, h', w', o).

  Kernel entry (i, j) is the product over b, h', w' of x, padded and shifted by dilation * (i, j),
  and the gradient. The batch is cut in equal parts whose results are added.
  """
  b, border = len(x), (padding, padding)
  parts = next(n for n in range(1, b + 1) if b % n == 0 and (x.size <= n * PART or n == b))
  return sum(_products(jnp.pad(x, ((0, 0), border, border, (0, 0))), gradient, size, stride,
                       dilation)
             for x, gradient in zip(jnp.split(x, parts), jnp.split(gradient, parts), strict=True))


def _products(x, gradient, size, stride, dilation):
  (h, w, c), (n, m, o) = x.shape[1:], gradient.shape[1:]
  shifts = range(0, size * dilation, dilation)
  if stride == 1 and size > 1 and c * o <= 64 * 64:
    # Few channels make narrow products, and those are slow: the gradient's horizontal shifts stand
    # side by side, and a vertical one is a contiguous slice of the flattened maps.
    shifted = [jnp.pad(gradient, ((0, 0), (0, h - n), (j, w - m - j), (0, 0))) for j in shifts]
    shifted = jnp.concatenate(shifted, -1).reshape(-1, size * o)  # (b * h * w, size * o)
    pixels = x.reshape(-1, c)  # (b * h * w, c)
    rows = len(pixels) - shifts[-1] * w
    products = [pixels[i * w:i * w + rows].T @ shifted[:rows] for i in shifts]
    return jnp.stack(products).reshape(size, c, size, o).swapaxes(1, 2)
  gradient = gradient.reshape(-1, o)

  def product(i, j):
    ends = (i + stride * (n - 1) + 1, j + stride * (m - 1) + 1)
    here = x[:, i:ends[0]:stride, j:ends[1]:stride]  # (b, h, w, c) -> (b, h', w', c)
    return here.reshape(-1, c).T @ gradient

  return jnp.stack([jnp.stack([product(i, j) for j in shifts]) for i in shifts])
