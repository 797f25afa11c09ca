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


def conv(x, kernel, *, stride=1, padding='zero', bias=None, dilation=1, groups=1):
  """(b, h, w, c) with a (k, k, c, o) kernel, one output at a time."""
  k = kernel.shape[0]
  reach = dilation * (k - 1) + 1
  size = 0 if padding == 'none' else reach // 2
  x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
  if groups > 1:  # each group's alone, side by side
    out = np.concatenate([
      conv(part, of, stride=stride, padding=padding, dilation=dilation) for part, of in zip(
        np.split(x, groups, -1), np.split(kernel, groups, -1), strict=True)], -1)
    return out if bias is None else out + bias
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


def moved(images, dy, dx):
  """Images (..., h, w, c) on zeros, their content dy down and dx right."""
  h, w = images.shape[-3:-1]
  padded = np.pad(images, [*[(0, 0)] * (images.ndim - 3), (h, h), (w, w), (0, 0)])
  return padded[..., h - dy:2 * h - dy, w - dx:2 * w - dx, :]


def entropies(logits, labels):
  """Cross entropies: -log of the softmax of logits (..., k) at labels (...)."""
  logits = logits - logits.max(-1, keepdims=True)
  log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  return -np.take_along_axis(log_p, np.asarray(labels)[..., None], -1)[..., 0]
