"""Halving a feature map: by striding, through a blur, or by its strongest polyphase component.

`blur`: Zhang 2019, *Making Convolutional Networks Shift-Invariant Again*. `polyphase`: Chaman &
Dokmanic 2021, *Truly Shift-Invariant Convolutional Neural Networks*. What strides in a network
(a convolution, a max-pool) becomes dense, and the result, after its ReLU, is halved: base.py's
`halved`. In a network of your own do the same with `BlurPool` or `AdaptivePolyphase`.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from gapjax.errors import UsageError, check_choice
from gapjax.models.layers import PAD_MODES

DOWNSAMPLINGS = ('stride', 'blur', 'polyphase')


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


def polyphase(x: jax.Array, component: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
  """The polyphase component of x (b, h, w, c), h and w even, with the largest l2 norm.

  component: (b,), 2 * row + column of the one to take instead, as a residual block's other branch
  chose it.

  Returns:
    (b, h / 2, w / 2, c) and the component (b,).

  Raises:
    UsageError: h or w is odd.
  """
  b, h, w, c = x.shape
  if h % 2 or w % 2:
    raise UsageError(f'polyphase downsampling needs even sizes, not a {h}x{w} feature map; '
                     'resize or pad the images so that every stage is even (in a config: '
                     'data.image_size, canvas.grid)')
  parts = x.reshape(b, h // 2, 2, w // 2, 2, c).transpose(0, 2, 4, 1, 3, 5)
  parts = parts.reshape(b, 4, h // 2, w // 2, c)
  if component is None:
    component = jnp.square(parts.astype(jnp.promote_types(x.dtype, jnp.float32))).sum(
      (2, 3, 4)).argmax(1)
  return jnp.take_along_axis(parts, component[:, None, None, None, None], 1)[:, 0], component


class BlurPool(nn.Module):
  """Blurs by the binomial filter of `size` taps and takes every `stride`-th pixel (Zhang 2019).

  In place of a convolution or max-pool with stride 2, take it with stride 1 and, after its ReLU,
  this:

      x = nn.relu(nn.Conv(64, (3, 3))(x))        # was strides=(2, 2)
      x = BlurPool()(x)

  It has no parameters. padding: 'reflect' (Zhang's) or 'circular'.

  Call: (b, h, w, c) -> (b, ceil(h / stride), ceil(w / stride), c).

  Raises UsageError on a size or stride below 1, or another padding.
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
  """Takes of the four ways to halve a map the one with the largest norm (APS, Chaman & Dokmanic).

  Used as `BlurPool`. With circular padding throughout, GAP after it is the same for every circular
  shift of the image. It has no parameters. size: taps of a binomial blur before it, 1 for none;
  padding: the blur's, 'reflect' or 'circular'.

  Call: (b, h, w, c), h and w even -> (b, h / 2, w / 2, c). In a residual block both branches must
  be halved alike: y, x = AdaptivePolyphase()(y, x) takes of x what it takes of y.

  Raises UsageError when h or w is odd, on a size below 1, or another padding.
  """
  size: int = 1
  padding: str = 'reflect'

  def __call__(self, x: Float[ArrayLike, 'b h w c'], *others: Float[ArrayLike, 'b h w _']):
    component, halved = None, []
    for y in (x, *others):
      check_blur(y, self.size, self.padding)
      y, component = polyphase(blur(y, self.size, stride=1, mode=self.padding), component)
      halved.append(y)
    return tuple(halved) if others else halved[0]


def check_blur(x, size, padding) -> None:
  """Raises UsageError unless a filter of `size` taps and its padding fit x (b, h, w, c)."""
  check_choice(padding, ('reflect', 'circular'), what='padding')
  if size < 1 or x.ndim != 4:
    raise UsageError(f'a filter of {size} taps cannot blur {x.shape}; pass feature maps '
                     '(b, h, w, c) and a size of 1 or more')
