"""Halving a feature map: by striding, through a blur, or by its strongest polyphase component.

`blur`: Zhang 2019, *Making Convolutional Networks Shift-Invariant Again*. `polyphase`: Chaman &
Dokmanic 2021, *Truly Shift-Invariant Convolutional Neural Networks*. What strides in a network
(a convolution, a max-pool) becomes dense, and the result, after its ReLU, is halved by `halve`.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gapjax.errors import UsageError
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
    raise UsageError(f'polyphase downsampling needs even sizes, not a {h}x{w} feature map; choose '
                     'data.image_size and canvas.grid so that every stage is even')
  parts = x.reshape(b, h // 2, 2, w // 2, 2, c).transpose(0, 2, 4, 1, 3, 5)
  parts = parts.reshape(b, 4, h // 2, w // 2, c)
  if component is None:
    component = jnp.square(parts.astype(jnp.promote_types(x.dtype, jnp.float32))).sum(
      (2, 3, 4)).argmax(1)
  return jnp.take_along_axis(parts, component[:, None, None, None, None], 1)[:, 0], component


def halve(x: jax.Array, *, method: str, blur_size: int, padding: str,
          component: jax.Array | None = None) -> tuple[jax.Array, jax.Array | None]:
  """Halves x (b, h, w, c) by 'blur' or 'polyphase'; the latter blurs first if blur_size > 1.

  padding: the network's; its circular networks blur circularly, the others with reflection.

  Returns:
    (b, ceil(h / 2), ceil(w / 2), c) and the polyphase component, None under 'blur'.
  """
  mode = 'circular' if padding == 'circular' else 'reflect'
  if method == 'blur':
    return blur(x, blur_size, stride=2, mode=mode), None
  return polyphase(blur(x, blur_size, stride=1, mode=mode), component)
