"""What a training step has to compute, and what a device can at most: model flops and peaks."""

import math
import re
import time
import timeit

import jax
import jax.numpy as jnp
import numpy as np

# A training step over a forward pass: the gradients of inputs and of kernels cost one each.
TRAINING = 3

# device_kind -> dense peak of one device in TFLOP/s, of bfloat16 and of float32 as jax multiplies
# it unless told otherwise: in bfloat16 on TPUs, in TF32 on GPUs since Ampere. From Google's and
# NVIDIA's data sheets, without sparsity. V100 and T4 have no bfloat16: theirs is float16's.
PEAKS = {
  'TPU v4': (275, 275),
  'TPU v5( lite|e)': (197, 197),
  'TPU v5p?': (459, 459),
  'TPU v6( lite|e)': (918, 918),
  'NVIDIA A100(-SXM4|-PCIE)?[- ][48]0GB( PCIe)?': (312, 156),
  'NVIDIA H100 PCIe': (756, 378),
  'NVIDIA H100 80GB HBM3': (989, 494.5),
  'NVIDIA H200': (989, 494.5),
  'NVIDIA L4': (121, 60.5),
  '(NVIDIA|Tesla) V100-.*': (125, 15.7),
  '(NVIDIA|Tesla) T4': (65, 8.1)}


def forward_flops(model, image_shape: tuple[int, int, int]) -> int:
  """Floating-point operations of a network's pass over one image (h, w, 3).

  Two for each multiplication of its convolutions and matrix products, nothing for the rest; zeros
  around an image count as if they were multiplied, as usual. The network is one that convolves by
  convolution: on_cpu.py's sums of shifted inputs would not count.
  """
  image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
  program = jax.make_jaxpr(
    lambda image: model.init_with_output(jax.random.key(0), image, train=False))(image)
  return _count(program.jaxpr)


def _count(jaxpr):
  total = 0
  for equation in jaxpr.eqns:
    name, params = equation.primitive.name, equation.params
    size = sum(variable.aval.size for variable in equation.outvars)
    if name == 'conv_general_dilated':
      kernel, (features, *_) = equation.invars[1].aval, params['dimension_numbers'].rhs_spec
      total += 2 * size * kernel.size // kernel.shape[features]  # k * k * c / groups each
    elif name == 'dot_general':
      (summed, _), _ = params['dimension_numbers']
      total += 2 * size * math.prod(equation.invars[0].aval.shape[axis] for axis in summed)
    else:
      inner = [getattr(value, 'jaxpr', value) for value in params.values()]
      total += params.get('length', 1) * sum(_count(x) for x in inner if hasattr(x, 'eqns'))
  return total


def peak(devices, dtype: str) -> tuple[float | None, str]:
  """The devices' operations per second in `dtype` (a config's), and what that figure is.

  CPUs are measured. None for a device or dtype without a known figure; the text then says so.
  """
  kind, n = devices[0].device_kind, len(devices)
  if devices[0].platform == 'cpu':  # many devices there are still the same cores
    return matmul_peak(dtype), f'the best {dtype} matrix product here'
  for pattern, peaks in PEAKS.items():
    if re.fullmatch(pattern, kind) and dtype in ('bfloat16', 'float32'):
      how = dtype if dtype == 'bfloat16' else 'float32 as jax multiplies it'
      return n * peaks[dtype == 'float32'] * 1e12, f'the data sheet of {n} x {kind}, {how}'
  return None, f'no peak is known of {kind} in {dtype}'


def matmul_peak(dtype: str, *, size: int = 2048, rounds: int = 5) -> float:
  """Operations per second of the fastest of `rounds` products of two (size, size) matrices."""
  x = jnp.asarray(np.random.default_rng(0).normal(size=(size, size)), dtype)
  product = jax.jit(jnp.matmul)
  jax.block_until_ready(product(x, x))  # compiles
  return 2 * size ** 3 / min(timeit.repeat(
    lambda: jax.block_until_ready(product(x, x)), timer=time.perf_counter, number=1, repeat=rounds))
