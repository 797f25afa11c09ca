"""Definitions written out in NumPy and float64, independent of what they check."""

import numpy as np

PADDINGS = {'reflect': 'reflect', 'replicate': 'edge', 'circular': 'wrap'}  # NumPy's names


def conv(x, kernel, *, stride=1, padding='zero', bias=0, dilation=1, groups=1):
  """(b, h, w, c) with a (k, k, c / groups, o) kernel: sums over windows."""
  x, kernel, k = np.asarray(x, np.float64), np.asarray(kernel, np.float64), len(kernel)
  reach = dilation * (k - 1) + 1
  size = {'none': 0, 'full': reach - 1}.get(padding, reach // 2)
  border = ((0, 0), (size, size), (size, size), (0, 0))

  def windows(padded):  # (b, h', w', c, k, k)
    found = np.lib.stride_tricks.sliding_window_view(padded, (reach, reach), (1, 2))
    return found[:, ::stride, ::stride, :, ::dilation, ::dilation]

  parts = zip(np.split(windows(np.pad(x, border, PADDINGS.get(padding, 'constant'))), groups, 3),
              np.split(kernel, groups, 3), strict=True)
  out = np.concatenate([np.einsum('bhwcij,ijco->bhwo', *part) for part in parts], -1)
  if padding == 'partial':
    out *= k * k / windows(np.pad(np.ones((1, *x.shape[1:3], 1)), border)).sum((3, 4, 5))[..., None]
  return out + np.asarray(bias)


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
