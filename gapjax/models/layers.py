"""Convolution with seven ways of padding and BatchNorm over devices, both as PyTorch has them.

What decides parity with PyTorch: kernels and biases start uniform in +-1/sqrt(fan_in); a strided
convolution pads (k - 1) // 2 on *both* sides (Flax's 'SAME', which is TensorFlow's, does not);
BatchNorm's running variance is the unbiased estimate and its running averages move by `momentum`.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gapjax.errors import UsageError, check_choice
from gapjax.models.convolution import convolve

# Our names (PyTorch's names) -> numpy.pad modes; the others need more than a pad. Those alone may
# stand before a block (MobileNet's early_padding).
PAD_MODES = {'zero': 'constant', 'reflect': 'reflect', 'replicate': 'edge', 'circular': 'wrap'}
PADDINGS = (*PAD_MODES, 'partial', 'full', 'none')
# For messages: what makes images larger.
SIZES = 'in a config: data.image_size, canvas.grid, segmentation.crop'
DTYPES = {'float32': jnp.float32, 'bfloat16': jnp.bfloat16, 'float64': jnp.float64}


def torch_uniform(fan_in: int) -> Callable:
  """PyTorch's default initialiser of conv and linear layers: U(-1/sqrt(fan_in), 1/sqrt(fan_in))."""
  bound = 1.0 / np.sqrt(fan_in)

  def init(key, shape, dtype=jnp.float32):
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return init


def param_dtype(dtype) -> Any:
  """Parameters stay in float32 under bfloat16 computation, and follow float64."""
  return jnp.promote_types(dtype, jnp.float32)


def check_maps(x) -> None:
  """Raises UsageError unless x is (b, h, w, c): of (h, w, c) means would be over other axes."""
  if jnp.ndim(x) != 4:
    raise UsageError(f'feature maps are (b, h, w, c), not {jnp.shape(x)}; of one image '
                     'give x[None]')


def same_padding(n: int, *, reach: int, stride: int) -> tuple[int, int]:
  """TensorFlow's SAME: (before, after) of an axis of n pixels that makes ceil(n / stride) of them.

  reach: dilation * (kernel_size - 1). With a stride of 1 both are half of it; with a stride the
  one after may be larger by one.
  """
  total = max((-(-n // stride) - 1) * stride + reach + 1 - n, 0)
  return total // 2, total - total // 2


def pad(x: jax.Array, size, *, mode: str, where: str = '') -> jax.Array:
  """Pads both spatial axes of x (b, h, w, c) by `size` on each side.

  Args:
    x: (b, h, w, c).
    size: pixels a side, (before, after), or ((top, bottom), (left, right)); 0 returns x.
    mode: 'zero', 'reflect', 'replicate' or 'circular', as torch.nn.Conv2d's padding_mode.
    where: the layer's name, for the message.

  Returns:
    (b, h + top + bottom, w + left + right, c).

  Raises:
    UsageError: the feature map is too small for the mode (reflect needs size < h, circular <= h).
  """
  sizes = np.broadcast_to(size, (2, 2))
  if not sizes.any():
    return x
  most = {'reflect': np.array(x.shape[1:3]) - 1, 'circular': np.array(x.shape[1:3])}
  if mode in most and (sizes.max(1) > most[mode]).any():
    raise UsageError(
      f'padding `{mode}` by {sizes.max()} needs a larger feature map than {x.shape[1]}x{x.shape[2]}'
      f'{where}; use larger images ({SIZES}) or padding `zero`')
  return jnp.pad(x, ((0, 0), *sizes.tolist(), (0, 0)), mode=PAD_MODES[mode])


class Conv(nn.Module):
  """2-d convolution, NHWC, with PyTorch's initialisation and a choice of padding.

  padding 'partial' is partial convolution (Liu et al. 2018, *Partial Convolution based Padding*):
  zero padding, and each output is scaled by (kernel area / area of the kernel inside the image).
  padding 'none' shrinks the map by kernel_size - 1; 'full' pads zeros until every position that the
  kernel can touch counts (F-Conv, Kayhan & van Gemert 2020, *On Translation Invariance in CNNs*),
  and the map grows by as much. `groups` as torch.nn.Conv2d's: each of so many
  groups of output channels sees the same share of the input's channels alone. `same`: what pads
  by half the kernel on both sides pads as TensorFlow's SAME. `convolve`: what computes it,
  models/convolution.py's or on_cpu.py's.

  Call: (b, h, w, c) -> (b, h', w', features), h' = (h + 2 p - r (k - 1) - 1) // stride + 1, where
  p = r (k - 1) // 2 ('full': r (k - 1)) and r is the dilation; with `same`, h' = ceil(h / stride).

  Raises UsageError on another padding, x of another shape, when nothing would be left of the
  feature map, and as `pad` does.
  """
  features: int
  kernel_size: int = 3
  stride: int = 1
  padding: str = 'zero'
  use_bias: bool = False
  dtype: Any = jnp.float32
  dilation: int = 1
  groups: int = 1
  same: bool = False
  convolve: Callable = convolve

  @nn.compact
  def __call__(self, x):
    check_choice(self.padding, PADDINGS, what='padding')
    check_maps(x)
    k, channels = self.kernel_size, x.shape[-1] // self.groups
    reach = self.dilation * (k - 1)
    size = {'none': 0, 'full': reach}.get(self.padding)
    if size is None:
      size = [same_padding(n, reach=reach, stride=self.stride) for n in x.shape[1:3]
              ] if self.same else reach // 2
    sizes = np.broadcast_to(size, (2, 2))  # ((top, bottom), (left, right))
    init = torch_uniform(channels * k * k)
    kernel = self.param('kernel', init, (k, k, channels, self.features), param_dtype(self.dtype))
    where = f' at `{"/".join(self.path)}`'
    shape = x.shape[1:3]
    zeros = sizes if self.padding in ('zero', 'partial', 'full') else 0 * sizes
    x = pad(x, sizes - zeros, mode=self.padding, where=where)
    if (x.shape[1:3] + zeros.sum(1) <= reach).any():
      raise UsageError(
        f'padding `{self.padding}` leaves a {x.shape[1]}x{x.shape[2]} feature map{where}, smaller '
        f'than its {k}x{k} kernel; use larger images ({SIZES}) or another padding')
    x = self.convolve(x.astype(self.dtype), kernel.astype(self.dtype), self.stride, zeros,
                      self.dilation, self.groups)
    if self.padding == 'partial' and sizes.any():
      x = x * jnp.asarray(partial_ratio(shape, sizes, k, self.stride, self.dilation), self.dtype)
    if self.use_bias:
      x = x + self.param('bias', init, (self.features,), param_dtype(self.dtype)).astype(self.dtype)
    return x


class SeparableConv(nn.Module):
  """A convolution of every channel alone (depthwise), then a 1x1 across them (pointwise).

  Nothing stands between the two, so that it is linear, as a `Conv` of the same shape.

  Call: (b, h, w, c) -> (b, h', w', features), h' and errors as `Conv`'s.
  """
  features: int
  kernel_size: int = 3
  padding: str = 'zero'
  dtype: Any = jnp.float32
  dilation: int = 1
  convolve: Callable = convolve

  @nn.compact
  def __call__(self, x):
    channels, how = x.shape[-1], dict(dtype=self.dtype, convolve=self.convolve)
    x = Conv(channels, self.kernel_size, padding=self.padding, dilation=self.dilation,
             groups=channels, name='depthwise', **how)(x)
    return Conv(self.features, 1, name='pointwise', **how)(x)


def partial_ratio(shape: tuple[int, int], sizes: np.ndarray, kernel_size: int, stride: int,
                  dilation: int) -> np.ndarray:
  """Kernel area over the part of it inside the image, (h', w', 1), for partial convolution; sizes:
  of the padding, ((top, bottom), (left, right))."""
  taps = dilation * np.arange(kernel_size)

  def inside(n, padding):  # how many of the kernel's rows fall inside [0, n) at each position
    start = np.arange(0, n + padding.sum() - taps[-1], stride) - padding[0]
    rows = start[:, None] + taps  # (h', k)
    return ((rows >= 0) & (rows < n)).sum(1)

  area = np.outer(*map(inside, shape, sizes))
  return (kernel_size ** 2 / area)[..., None]


class Dense(nn.Module):
  """Linear layer with PyTorch's initialisation: (b, c) -> (b, features)."""
  features: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    init = torch_uniform(x.shape[-1])
    kernel = self.param('kernel', init, (x.shape[-1], self.features), param_dtype(self.dtype))
    bias = self.param('bias', init, (self.features,), param_dtype(self.dtype))
    return x.astype(self.dtype) @ kernel.astype(self.dtype) + bias.astype(self.dtype)


class BatchNorm(nn.Module):
  """BatchNorm over (b, h, w), and over all devices when `axis_name` is given, as PyTorch has it.

  The batch is normalised by its biased variance; the running variance averages the unbiased one
  (n the count over all devices). Statistics are float32 (float64 in float64), whatever x is. The
  variance is two-pass on each device and the devices' moments are merged exactly (Chan et al.
  1979) from one all-gather: E[x^2] - E[x]^2 would cancel.

  Call: (b, h, w, c) -> (b, h, w, c); train=False uses the running averages. Raises UsageError on x
  of another shape, and in training on one value a channel, as PyTorch does.
  """
  momentum: float = 0.1
  epsilon: float = 1e-5
  axis_name: str | None = None
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, *, train: bool):
    check_maps(x)
    dtype, c = param_dtype(self.dtype), x.shape[-1]
    scale = self.param('scale', nn.initializers.ones, (c,), dtype)
    bias = self.param('bias', nn.initializers.zeros, (c,), dtype)
    running_mean = self.variable('batch_stats', 'mean', jnp.zeros, (c,), dtype)
    running_var = self.variable('batch_stats', 'var', jnp.ones, (c,), dtype)
    x = x.astype(dtype)
    if train:
      mean, var, n = self.batch_moments(x)
      if not self.is_initializing():
        if n == 1:
          raise UsageError('BatchNorm in training would make 0 of the one value that each channel '
                           'has here, of a batch of one and a map of one pixel; use a larger '
                           'batch_size, and sync_batch_norm where each device has one image')
        for running, new in ((running_mean, mean), (running_var, var * n / max(n - 1, 1))):
          running.value += self.momentum * (lax.stop_gradient(new) - running.value)
    else:
      mean, var = running_mean.value, running_var.value
    y = (x - mean) * (lax.rsqrt(var + self.epsilon) * scale) + bias
    return y.astype(self.dtype)

  def batch_moments(self, x):
    """Mean (c,), biased variance (c,) and count of x (b, h, w, c) over the batch of all devices."""
    n = x.size // x.shape[-1]
    mean = x.mean((0, 1, 2))
    var = jnp.square(x - mean).mean((0, 1, 2))
    if self.axis_name is None or self.is_initializing():
      return mean, var, n
    means, variances = lax.all_gather(jnp.stack([mean, var]), self.axis_name, axis=1)  # (d, c) x 2
    mean = means.mean(0)
    return mean, (variances + jnp.square(means - mean)).mean(0), n * means.shape[0]


def max_pool(x: jax.Array, *, size: int = 2, stride: int = 2, padding: int = 0,
             circular: bool = False) -> jax.Array:
  """Max-pool: (b, h, w, c) -> (b, (h + 2 padding - size) // stride + 1, ..., c).

  The border is padded with what no maximum is, or with the opposite border if `circular`.
  """
  if circular:
    x, padding = pad(x, padding, mode='circular'), 0
  return nn.max_pool(x, (size, size), (stride, stride), [(padding, padding)] * 2)


def of_step(module: nn.Module, name: str, otherwise: Any) -> Any:
  """What a training step says of itself in the network's variables (steps.TrainingNetwork), such as
  its 'number'; `otherwise` where the caller gives no such variables."""
  root = module.scope.root
  return root.get_variable('step', name) if root.has_variable('step', name) else otherwise


def per_example(module: nn.Module, stream: str, count: int, draw: Callable) -> jax.Array:
  """draw(key) of each of `count` examples, stacked; a key is of the rng stream and the place in the
  global batch."""
  places = of_step(module, 'places', jnp.arange(count))
  return jax.vmap(draw)(jax.vmap(jax.random.fold_in, (None, 0))(module.make_rng(stream), places))


class Dropout(nn.Module):
  """Zeroes elements of x (b, ...) with probability `rate` in training, and scales up the others.

  Each example's mask depends on the rng stream 'dropout' and its place in the global batch alone
  (`per_example`), so that the number of devices changes nothing.
  """
  rate: float

  @nn.compact
  def __call__(self, x, *, train: bool):
    if not train or not self.rate or self.is_initializing():
      return x
    keep = per_example(self, 'dropout', len(x),
                       lambda key: jax.random.bernoulli(key, 1 - self.rate, x.shape[1:]))
    return jnp.where(keep, x / (1 - self.rate), jnp.zeros_like(x))


def global_average_pool(x: jax.Array) -> jax.Array:
  """GAP: (b, h, w, c) -> (b, c), summed in float32 whatever x is.

  Raises UsageError on x of another shape.
  """
  check_maps(x)
  if x.dtype == jnp.bfloat16:  # fused with what made x, jax 0.11 and 0.12 compute NaN on CPU
    x = lax.platform_dependent(x, cpu=lax.optimization_barrier, default=lambda x: x)
  return x.astype(param_dtype(x.dtype)).mean((1, 2))
