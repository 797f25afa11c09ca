"""3x3 convolutions of stride 1 with 2.25 times fewer multiplications: Winograd's F(2x2, 3x3).

A. Lavin, S. Gray, *Fast Algorithms for Convolutional Neural Networks*, CVPR 2016: with a 4x4 tile d
of the input, taken every two pixels, and a kernel g, the 2x2 outputs are

  Y = A^T [(G g G^T) * (B^T d B)] A,

where the product of the 4x4 entries is, with channels, sixteen matrix products. All three maps are
linear. So the kernel's gradient is G^T [(B^T d B) * (A dY A^T)] G, summed over the tiles, and the
input's is a convolution of dY with the kernel turned around. Sums of at most four values and halves
make the transforms: in float32 the results are about as close to the exact ones as a direct
convolution's. Worth it on CPU, where products take the time; see convolution.py.

A 4x4 (or 2x2, 3x3) of arrays is a list of rows.
"""

import jax
import jax.numpy as jnp

# Input values of the images that are transformed at once: more do not fit a processor's cache. But
# at least so many times the kernel's values, which every part reads and whose gradient it adds to.
PART, PART_OF_KERNEL = 1_200_000, 32

# The matrices, as the sums that they are, of a list of arrays.


def _input(d):
  """B^T."""
  return [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]]


def _kernel(g):
  """G."""
  return [g[0], (g[0] + g[1] + g[2]) / 2, (g[0] - g[1] + g[2]) / 2, g[2]]


def _kernel_transposed(m):
  """G^T."""
  return [m[0] + (m[1] + m[2]) / 2, (m[1] - m[2]) / 2, (m[1] + m[2]) / 2 + m[3]]


def _output(m):
  """A^T."""
  return [m[0] + m[1] + m[2], m[1] - m[2] - m[3]]


def _output_transposed(y):
  """A."""
  return [y[0], y[0] + y[1], y[0] - y[1], -y[1]]


def _both(matrix, entries):
  """matrix @ entries @ matrix^T."""
  rows = [matrix(row) for row in entries]
  columns = [matrix(column) for column in zip(*rows, strict=True)]
  return [list(row) for row in zip(*columns, strict=True)]


def _products(a, b):
  """Entry by entry, the matrix products of two 4x4."""
  return [[p @ q for p, q in zip(*rows, strict=True)] for rows in zip(a, b, strict=True)]


def _stack(entries):
  return jnp.stack([jnp.stack(row) for row in entries])


def _phases(x):
  """x (b, 2 m, 2 n, c) as 2x2 of (b, m, n, c): rows and columns of equal parity."""
  b, h, w, c = x.shape
  x = x.reshape(b, h // 2, 2, w // 2, 2, c)
  return [[x[:, :, i, :, j] for j in range(2)] for i in range(2)]


def _interleave(phases):
  """The inverse of `_phases`."""
  x = jnp.stack([jnp.stack(row, 3) for row in phases], 2)  # (b, m, 2, n, 2, c)
  b, m, _, n, _, c = x.shape
  return x.reshape(b, 2 * m, 2 * n, c)


def _tiles(h, w):
  """How many tiles, one above the other and side by side, cover h x w outputs."""
  return -(-h // 2), -(-w // 2)


def _tile_inputs(x, padding):
  """B^T d B of all m x n tiles of each image: 4x4 of (b m n, c)."""
  h, w, c = x.shape[1:]
  m, n = _tiles(h + 2 * padding - 2, w + 2 * padding - 2)
  border = [(padding, 2 * k + 2 - length - padding) for k, length in ((m, h), (n, w))]
  phases = _phases(jnp.pad(x, ((0, 0), *border, (0, 0))))  # 2x2 of (b, m + 1, n + 1, c)

  def entry(i, j):
    return phases[i % 2][j % 2][:, i // 2:i // 2 + m, j // 2:j // 2 + n].reshape(-1, c)

  return _both(_input, [[entry(i, j) for j in range(4)] for i in range(4)])


def _tile_gradients(gradient):
  """A dY A^T of all tiles of each image: 4x4 of (b m n, o)."""
  h, w, o = gradient.shape[1:]
  even = jnp.pad(gradient, ((0, 0), (0, h % 2), (0, w % 2), (0, 0)))
  return _both(_output_transposed, [[y.reshape(-1, o) for y in row] for row in _phases(even)])


def _in_parts(function, *arrays, kernel_size):
  """The function of equal parts of the batch, one after the other: (parts, ...)."""
  x, b = arrays[0], len(arrays[0])
  most = max(PART, PART_OF_KERNEL * kernel_size)
  parts = next(n for n in range(1, b + 1) if b % n == 0 and (x.size <= n * most or n == b))
  if parts == 1:
    return jax.tree.map(lambda y: y[None], function(*arrays))
  # A loop, since two cores given all parts would transform all before the first products.
  cut = [array.reshape(parts, b // parts, *array.shape[1:]) for array in arrays]
  return jax.lax.map(lambda part: function(*part), cut)


def convolve(x: jax.Array, kernel: jax.Array, padding: int) -> jax.Array:
  """Convolves x (b, h, w, c), padded with zeros by `padding` (0 to 2), with a (3, 3, c, o) kernel.

  Returns:
    (b, h', w', o), h' = h + 2 padding - 2.
  """
  return _with_kernels(x, _both(_kernel, kernel), padding)


def input_gradient(kernel: jax.Array, gradient: jax.Array, padding: int) -> jax.Array:
  """The gradient of `convolve`'s x (b, h, w, c), from y's (b, h', w', o)."""
  # The kernel turned around: g[0] and g[2] change places, and so do the first and last rows of G g.
  # (Turning it before would read 512 x 512 channels across: 123 ms in place of 41.)
  kernels, order = _both(_kernel, kernel), (3, 1, 2, 0)
  turned = [[kernels[i][j].T for j in order] for i in order]  # 4x4 of (o, c)
  return _with_kernels(gradient, turned, 2 - padding)


def _with_kernels(x, kernels, padding):
  """`convolve` with G g G^T, 4x4 of (c, o)."""
  h, w = (length + 2 * padding - 2 for length in x.shape[1:3])

  def part(x):
    y = _both(_output, _products(_tile_inputs(x, padding), kernels))  # 2x2 of (b m n, o)
    return _interleave([[y.reshape(len(x), *_tiles(h, w), -1) for y in row] for row in y])

  y = _in_parts(part, x, kernel_size=kernels[0][0].size)  # (parts, b / parts, 2 m, 2 n, o)
  return y.reshape(-1, *y.shape[2:])[:, :h, :w]


def kernel_gradient(x: jax.Array, gradient: jax.Array, padding: int) -> jax.Array:
  """The gradient of `convolve`'s kernel (3, 3, c, o), from x and y's (b, h', w', o)."""

  def part(x, gradient):
    transposed = [[entry.T for entry in row] for row in _tile_inputs(x, padding)]
    return _products(transposed, _tile_gradients(gradient))  # 4x4 of (c, o)

  size = x.shape[-1] * gradient.shape[-1]
  parts = _in_parts(part, x, gradient, kernel_size=size)  # 4x4 of (parts, c, o)
  return _stack(_both(_kernel_transposed, jax.tree.map(lambda part: part.sum(0), parts)))
