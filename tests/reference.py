"""Definitions written out in NumPy and float64: slow, and independent of what they check."""

import numpy as np


def pad(x, size, mode):
  """(h, w, c) -> (h + 2 size, w + 2 size, c), index by index."""
  h, w, c = x.shape
  out = np.zeros((h + 2 * size, w + 2 * size, c))

  def source(i, n):
    if 0 <= i < n:
      return i
    if mode == 'reflect':
      return -i if i < 0 else 2 * (n - 1) - i
    if mode == 'replicate':
      return 0 if i < 0 else n - 1
    if mode == 'circular':
      return i % n
    return None

  for y in range(h + 2 * size):
    for z in range(w + 2 * size):
      a, b = source(y - size, h), source(z - size, w)
      if a is not None and b is not None:
        out[y, z] = x[a, b]
  return out


def conv(x, kernel, *, stride=1, padding='zero', bias=None, dilation=1):
  """(b, h, w, c) with a (k, k, c, o) kernel, one output at a time."""
  k = kernel.shape[0]
  reach = dilation * (k - 1) + 1
  size = 0 if padding == 'none' else reach // 2
  x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
  padded = np.stack([pad(image, size, padding) for image in x])
  inside = pad(np.ones((*x.shape[1:3], 1)), size, 'zero')[..., 0]
  h, w = ((n - reach) // stride + 1 for n in padded.shape[1:3])
  out = np.zeros((len(x), h, w, kernel.shape[-1]))
  for i in range(h):
    for j in range(w):
      rows, columns = (slice(stride * n, stride * n + reach, dilation) for n in (i, j))
      out[:, i, j] = np.einsum('bhwc,hwco->bo', padded[:, rows, columns], kernel)
      if padding == 'partial':
        out[:, i, j] *= k * k / inside[rows, columns].sum()
  return out if bias is None else out + bias


def adam(gradients, *, lr, b1, b2, eps=1e-8, decay=0.0, start=0.0):
  """torch.optim.Adam's parameter after each gradient, by its documentation's formulas."""
  p, m, v, path = np.float64(start), 0.0, 0.0, []
  for t, g in enumerate(gradients, 1):
    grad = g + decay * p
    m, v = b1 * m + (1 - b1) * grad, b2 * v + (1 - b2) * grad * grad
    p = p - lr(t - 1) * (m / (1 - b1 ** t)) / (np.sqrt(v / (1 - b2 ** t)) + eps)
    path.append(p)
  return np.array(path)


def sgd(gradients, *, lr, momentum, decay=0.0, start=0.0):
  """torch.optim.SGD's parameter after each gradient, by its documentation's formulas."""
  p, buffer, path = np.float64(start), 0.0, []
  for t, g in enumerate(gradients):
    buffer = momentum * buffer + g + decay * p
    p = p - lr(t) * buffer
    path.append(p)
  return np.array(path)
