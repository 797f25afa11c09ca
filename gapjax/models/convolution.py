"""The convolution that every network calls unless it is given another one."""

import jax
import numpy as np
from jax import lax


def convolve(x: jax.Array, kernel: jax.Array, stride: int = 1, padding=0, dilation: int = 1,
             groups: int = 1) -> jax.Array:
  """Convolves x (b, h, w, c), padded with zeros by `padding`: a side, or ((top, bottom), (left,
  right)).

  The kernel is (k, k, c / groups, o): the channels, of input and output, fall into groups that do
  not see each other, as torch.nn.Conv2d's do. Padding here rather than before makes the input's
  gradient a smaller convolution.

  Returns:
    (b, h', w', o), h' = (h + top + bottom - dilation (k - 1) - 1) // stride + 1.
  """
  return lax.conv_general_dilated(
    x, kernel, (stride, stride), np.broadcast_to(padding, (2, 2)).tolist(),
    rhs_dilation=(dilation, dilation), dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    feature_group_count=groups)
