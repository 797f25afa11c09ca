"""The same convolution, computed as XLA's CPU backend is quick at. For networks trained on CPUs.

XLA computes the gradient of a kernel as a convolution over the whole batch, whose working set does
not fit a processor's cache: 140 ms for 500 maps of 32x32x16, 65 ms in ten parts of the batch. The
batch is cut before the forward pass, so that differentiation cuts the gradients, too. A 1x1
convolution is a matrix product, and so are its gradients. A depthwise one is a sum of shifted
inputs: XLA's takes many times as long. benchmarks/convolutions.py measures whole training steps.
"""

import jax
import jax.numpy as jnp
import numpy as np

from gapjax.models import convolution

# Input values that are convolved at once. Steps of ResNet-18, width 16, 500 images of 32x32: 1.40 s
# with 400,000, 1.52 s with 200,000 or 800,000, and 2.6 s with the whole batch at once.
PART = 500_000
# Into how many parts a batch falls for a depthwise convolution: with more, compiling takes longer.
DEPTHWISE_PARTS = 4


def convolve(x: jax.Array, kernel: jax.Array, stride: int = 1, padding=0, dilation: int = 1,
             groups: int = 1) -> jax.Array:
  """As gapjax.models.convolution.convolve, to rounding."""
  if kernel.shape[:2] == (1, 1) and groups == 1 and not np.any(padding):
    return x[:, ::stride, ::stride] @ kernel[0, 0]  # (b, h, w, c) -> (b, h', w', o)
  if groups > 1 and groups == x.shape[-1] == kernel.shape[-1]:
    return depthwise(x, kernel, stride, padding, dilation)
  parts = min(-(-x.size // PART), len(x))
  return jnp.concatenate([convolution.convolve(part, kernel, stride, padding, dilation, groups)
                          for part in jnp.array_split(x, max(parts, 1))])


def depthwise(x: jax.Array, kernel: jax.Array, stride: int, padding, dilation: int) -> jax.Array:
  """`convolve` with a group for each channel: x (b, h, w, c), a (k, k, 1, c) kernel.

  The sum over the kernel's entries of x, padded and shifted by dilation * (i, j), times the entry;
  in float32 or better. On CPU, a MobileNetV2 of width 32 on 4 images of 176x240: 0.01 s forward
  against XLA's 0.2, a training step 0.3 s against 0.9. With kernels of 5x5, DeepLabv3 on
  EfficientNet-Lite0 and 8 images of 180x240: a training step 1.3 s against 9.6.

  An entry's gradient is the sum of a product of two maps. XLA computes the product, with x padded
  anew, inside of the sum, at a tenth of the speed that either has alone. So the entries become maps
  by a matrix product, which XLA leaves alone, and are shared by a few parts of the batch, whose
  products are added before: a step of DeepLabv3+ then takes a fifth less time, and half the memory.
  """
  dtype, k = jnp.promote_types(x.dtype, jnp.float32), len(kernel)
  padded = jnp.pad(x.astype(dtype), ((0, 0), *np.broadcast_to(padding, (2, 2)).tolist(), (0, 0)))
  h, w = ((n - dilation * (k - 1) - 1) // stride + 1 for n in padded.shape[1:3])
  size = -(-len(x) // DEPTHWISE_PARTS)
  ones = jnp.ones((size * h * w, 1), dtype)
  entries = {(i, j): (ones @ kernel[i, j].astype(dtype)).reshape(size, h, w, -1)
             for i in range(k) for j in range(k)}

  def shifted(part, i, j):
    i, j = dilation * i, dilation * j
    return part[:, i:i + stride * (h - 1) + 1:stride, j:j + stride * (w - 1) + 1:stride]

  y = jnp.concatenate([
    sum(shifted(part, *at) * entry[:len(part)] for at, entry in entries.items())
    for part in jnp.split(padded, list(range(size, len(x), size)))])
  return y.astype(x.dtype)  # (b, h, w, c) -> (b, h', w', c)
