"""Halving a feature map: by striding, through a blur, or by one of its polyphase components.

`blur`: Zhang 2019, *Making Convolutional Networks Shift-Invariant Again*. `polyphase`, the
strongest component: Chaman & Dokmanic 2021, *Truly Shift-Invariant Convolutional Neural Networks*.
`learned_polyphase`: Rojas-Gomez et al. 2022, *Learnable Polyphase Sampling for Shift Invariant and
Equivariant Convolutional Networks*. What strides in a network (a convolution, a max-pool) becomes
dense, and the result, after its ReLU, is halved: base.py's `halved`. In a network of your own do
the same with `BlurPool` or `AdaptivePolyphase`.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from gapjax.errors import UsageError, check_choice
from gapjax.models.convolution import convolve
from gapjax.models.layers import (
  PAD_MODES,
  SIZES,
  Conv,
  global_average_pool,
  of_step,
  per_example,
)

DOWNSAMPLINGS = ('stride', 'blur', 'polyphase', 'learned_polyphase')
# LPS: the temperature of the first training step, and after the last.
TEMPERATURES = (1.0, 0.025)


def binomial(size: int) -> np.ndarray:
  """The binomial filter of `size` taps, (size,), summing to 1: [1, 2, 1] / 4 for 3."""
  taps = np.ones(1)
  for _ in range(size - 1):
    taps = np.convolve(taps, [0.5, 0.5])
  return taps


def blur(x: jax.Array, size: int, *, stride: int, mode: str) -> jax.Array:
  """Blurs x (b, h, w, c) by the binomial filter of `size` taps along both axes, then strides.

  mode: how the border is padded, 'reflect' (Zhang's) or 'circular'; (size - 1) // 2 before and
  size // 2 after, so that h becomes ceil(h / stride). A map smaller than the filter is reflected
  again and again, as numpy.pad does it, so that a network's last stage may be a single pixel.
  """
  border = ((size - 1) // 2, size // 2)
  x = jnp.pad(x, ((0, 0), border, border, (0, 0)), mode=PAD_MODES[mode])
  for axis in (1, 2):  # separable: one axis after the other
    n = (x.shape[axis] - size) // stride + 1
    x = sum(weight * lax.slice_in_dim(x, i, i + stride * (n - 1) + 1, stride, axis)
            for i, weight in enumerate(binomial(size).astype(x.dtype)))
  return x


def components(x: jax.Array) -> jax.Array:
  """The four polyphase components of x (b, h, w, c): (b, 4, h / 2, w / 2, c), component 2 i + j
  being x[:, i::2, j::2].

  Raises UsageError when h or w is odd.
  """
  b, h, w, c = x.shape
  if h % 2 or w % 2:
    raise UsageError(f'polyphase downsampling needs even sizes, not a {h}x{w} feature map; '
                     f'resize or pad the images so that every stage is even ({SIZES})')
  parts = x.reshape(b, h // 2, 2, w // 2, 2, c).transpose(0, 2, 4, 1, 3, 5)
  return parts.reshape(b, 4, h // 2, w // 2, c)


def strongest(parts: jax.Array) -> jax.Array:
  """Which of components (b, 4, h, w, c) has the largest l2 norm, (b,)."""
  squares = jnp.square(parts.astype(jnp.promote_types(parts.dtype, jnp.float32)))
  return squares.sum((2, 3, 4)).argmax(1)


def taken(parts: jax.Array, component: jax.Array) -> jax.Array:
  """Of components (b, 4, h, w, c) the one of each example, (b,) integers, or their sum by weights
  (b, 4): (b, h, w, c)."""
  if component.ndim == 2:
    return (parts * component.astype(parts.dtype)[:, :, None, None, None]).sum(1)
  return jnp.take_along_axis(parts, component[:, None, None, None, None], 1)[:, 0]


class LearnedComponent(nn.Module):
  """Which polyphase component to take, learned (LPS, Rojas-Gomez et al. 2022).

  Each component has a logit, by the same layers: a 3x3 convolution with circular padding, ReLU, a
  1x1 convolution to one channel, GAP, so that components that a circular shift puts in another
  order keep their logits. (The paper's second convolution is 3x3, to several channels, and averaged
  over these and all positions: the same function, but for a bias that all logits share.) In
  training their weights are a softmax of the logits and Gumbel noise (rng stream 'gumbel'), whose
  temperature falls from 1 to 0.025, linearly over `total_steps`; at test the largest logit decides.

  Call: components (b, 4, h, w, c) -> in training weights (b, 4), at test integers (b,). Raises
  UsageError in training where the step is not among the variables (`of_step`).
  """
  total_steps: int = 0
  dtype: Any = jnp.float32
  convolve: Callable = convolve

  @nn.compact
  def __call__(self, parts: jax.Array, *, train: bool) -> jax.Array:
    b, _, h, w, c = parts.shape
    y = Conv(c, padding='circular', use_bias=True, dtype=self.dtype, convolve=self.convolve,
             name='conv')(parts.reshape(-1, h, w, c))
    y = Conv(1, 1, dtype=self.dtype, convolve=self.convolve, name='linear')(nn.relu(y))
    logits = global_average_pool(y).reshape(b, 4)
    if not train or self.is_initializing():
      return logits.argmax(1)
    number = of_step(self, 'number', None)
    if number is None or not self.total_steps:
      raise UsageError('learned polyphase sampling trains by a temperature that falls: give the '
                       "network total_steps, and `apply` the step, {**variables, 'step': "
                       "{'number': step}}")
    first, last = TEMPERATURES
    progress = jnp.minimum(jnp.asarray(number, logits.dtype) / self.total_steps, 1)
    noise = Gumbel(name='gumbel')(logits)
    return nn.softmax((logits + noise) / (first + (last - first) * progress))


class Gumbel(nn.Module):
  """Gumbel noise like x (b, n), from the rng stream 'gumbel' and each example's place in the global
  batch; drawn in float32, so that it is the same in float64."""

  def __call__(self, x):
    return per_example(self, 'gumbel', len(x), lambda key: jax.random.gumbel(
      key, x.shape[1:], jnp.float32)).astype(x.dtype)


class BlurPool(nn.Module):
  """Blurs by the binomial filter of `size` taps and takes every `stride`-th pixel (Zhang 2019).

  In place of a convolution or max-pool with stride 2, take it with stride 1 and, after its ReLU,
  this:

      x = nn.relu(nn.Conv(64, (3, 3))(x))        # was strides=(2, 2)
      x = BlurPool()(x)

  It has no parameters. padding: 'reflect' (Zhang's) or 'circular'.

  Call: (b, h, w, c) -> (b, ceil(h / stride), ceil(w / stride), c).

  Raises UsageError on a size or stride below 1, another padding, or x of another shape
  or of integers.
  """
  size: int = 3
  stride: int = 2
  padding: str = 'reflect'

  def __call__(self, x: Float[ArrayLike, 'b h w c']) -> Float[Array, 'b h2 w2 c']:
    check_blur(x, self.size, self.padding)
    if self.stride < 1:
      raise UsageError(f'stride {self.stride} takes no pixel; use 1 or more')
    return blur(x, self.size, stride=self.stride, mode=self.padding)


class AdaptivePolyphase(nn.Module):
  """Halves a map to its polyphase component of the largest norm (APS, Chaman & Dokmanic 2021).

  Used as `BlurPool`. With circular padding throughout, GAP after it is the same for every circular
  shift of the image. It has no parameters. size: taps of a binomial blur before it, 1 for none;
  padding: the blur's, 'reflect' or 'circular'.

  Call: (b, h, w, c), h and w even -> (b, h / 2, w / 2, c). In a residual block both branches must
  be halved alike: y, x = AdaptivePolyphase()(y, x) takes of x what it takes of y.

  Raises UsageError when h or w is odd, on a size below 1, another padding, or x of another shape.
  """
  size: int = 1
  padding: str = 'reflect'

  def __call__(self, x: Float[ArrayLike, 'b h w c'], *others: Float[ArrayLike, 'b h w _']):
    component, halved = None, []
    for y in (x, *others):
      check_blur(y, self.size, self.padding)
      parts = components(blur(y, self.size, stride=1, mode=self.padding))
      component = strongest(parts) if component is None else component
      halved.append(taken(parts, component))
    return tuple(halved) if others else halved[0]


def check_blur(x, size, padding) -> None:
  """Raises UsageError unless a filter of `size` taps and its padding fit x (b, h, w, c)."""
  check_choice(padding, ('reflect', 'circular'), what='padding')
  if size < 1 or x.ndim != 4:
    raise UsageError(f'a filter of {size} taps cannot blur {x.shape}; pass feature maps '
                     '(b, h, w, c) and a size of 1 or more')
  if size > 1 and not jnp.issubdtype(x.dtype, jnp.floating):
    raise UsageError(f'a blur averages, and maps are {x.dtype}; give them as floats')
