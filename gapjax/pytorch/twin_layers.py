"""Layers of the twin's networks, on (b, c, h, w): convolutions by every padding, and halving."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from gapjax.pytorch import tables


class Conv(nn.Conv2d):
  """nn.Conv2d padded by (k - 1) // 2 a side, or k - 1 if 'full', in one of gapjax's ways."""

  def __init__(self, channels, features, kernel_size, stride=1, *, padding='zero', bias=False,
               dilation=1, groups=1):
    size = 0 if padding == 'none' else dilation * (kernel_size - 1) // 2
    size = dilation * (kernel_size - 1) if padding == 'full' else size
    self.way, self.border = padding, size if padding in tables.NUMPY_MODES else 0
    super().__init__(channels, features, kernel_size, stride, size - self.border, dilation, groups,
                     bias)
    self.partial = padding == 'partial' and size > 0

  def forward(self, x):
    if not self.partial:
      return super().forward(padded(x, [self.border] * 4, self.way))
    # Kernel area over the part of it inside the image (Liu et al. 2018), before the bias.
    ones = x.new_ones(1, 1, *x.shape[2:])
    window = x.new_ones(1, 1, *self.kernel_size)
    inside = F.conv2d(ones, window, None, self.stride, self.padding, self.dilation)
    y = F.conv2d(x, self.weight, None, self.stride, self.padding, self.dilation, self.groups)
    y = y * (self.kernel_size[0] ** 2 / inside)
    return y if self.bias is None else y + self.bias[:, None, None]


class SameConv(Conv):
  """A Conv without bias whose border is TensorFlow's SAME: an axis of n pixels becomes one of
  ceil(n / stride), and of an odd number of padded pixels the larger part stands at its end."""

  def forward(self, x):
    if self.way in ('none', 'full'):
      return super().forward(x)
    (stride, _), (dilation, _), (kernel, _) = self.stride, self.dilation, self.kernel_size
    border = []
    for n in (x.shape[3], x.shape[2]):  # F.pad begins with the last axis
      size = max((-(-n // stride) - 1) * stride + dilation * (kernel - 1) + 1 - n, 0)
      border += [size // 2, size - size // 2]
    y = F.conv2d(padded(x, border, self.way), self.weight, None, stride, 0, dilation, self.groups)
    if self.way == 'partial':
      ones = F.pad(x.new_ones(1, 1, *x.shape[2:]), border)
      y = y * kernel ** 2 / F.conv2d(ones, x.new_ones(1, 1, kernel, kernel), None, stride, 0,
                                     dilation)
    return y


class SeparableConv(nn.Module):
  """`body`: a convolution of every channel alone, then a 1x1 across them."""

  def __init__(self, channels, features, kernel_size, *, padding='zero', dilation=1):
    super().__init__()
    self.body = nn.Sequential(
      Conv(channels, channels, kernel_size, padding=padding, dilation=dilation, groups=channels),
      Conv(channels, features, 1))

  def forward(self, x):
    return self.body(x)


def pad(x, border, mode):
  """numpy.pad's modes on maps of any size: (b, c, h, w) -> (b, c, h + before + after, ...); border:
  (before, after), or one for each axis."""
  rows, columns = (torch.as_tensor(np.pad(np.arange(n), size, mode), device=x.device)
                   for n, size in zip(x.shape[2:], np.broadcast_to(border, (2, 2)), strict=True))
  return x[:, :, rows][..., columns]


def padded(x, border, padding):
  """x with a border (left, right, top, bottom), as F.pad's, by gapjax's name of the padding."""
  if not any(border):
    return x
  if padding in tables.NUMPY_MODES:
    return pad(x, (border[2:], border[:2]), tables.NUMPY_MODES[padding])
  return F.pad(x, border)


def dense(stride, how):
  """The stride that is left to what strides: 1 where a map is halved otherwise."""
  return stride if how['downsample'] == 'stride' else 1


def halved(x, stride, component=None, *, downsample, blur_size, padding, learned=None):
  """(b, c, h, w) -> (b, c, h / 2, w / 2) by a blur, or its strongest polyphase component, and that
  component (b,); x itself where the stride is 1, or was taken. learned: the Component that chooses
  instead, by weights (b, 4) in training."""
  if stride == 1 or downsample == 'stride':
    return x, None
  taps = torch.tensor(tables.BINOMIAL[blur_size], dtype=x.dtype, device=x.device)
  taps = taps / taps.sum()
  window = torch.outer(taps, taps).expand(x.shape[1], 1, blur_size, blur_size)
  mode = 'circular' if padding == 'circular' else 'reflect'
  x = pad(x, ((blur_size - 1) // 2, blur_size // 2), tables.NUMPY_MODES[mode])
  if downsample == 'blur':
    return F.conv2d(x, window, stride=2, groups=x.shape[1]), None
  if blur_size > 1:
    x = F.conv2d(x, window, groups=x.shape[1])
  parts = torch.stack([x[..., i::2, j::2] for i in (0, 1) for j in (0, 1)], 1)  # (b, 4, c, h, w)
  if component is None:
    component = learned(parts) if learned else parts.square().sum((2, 3, 4)).argmax(1)
  if component.ndim == 2:
    return torch.einsum('bpchw,bp->bchw', parts, component), component
  return parts[torch.arange(len(x), device=x.device), component], component


class Component(nn.Module):
  """LPS (Rojas-Gomez et al. 2022): parts (b, 4, c, h, w) -> which one, (b,); in training weights
  (b, 4), a softmax of logits and Gumbel noise at a temperature. `anneal` sets the two."""
  temperature, noise = 1.0, None

  def __init__(self, channels):
    super().__init__()
    self.conv = Conv(channels, channels, 3, padding='circular', bias=True)
    self.linear = Conv(channels, 1, 1)

  def forward(self, parts):
    z = self.linear(F.relu(self.conv(parts.flatten(0, 1))))
    logits = z.mean((1, 2, 3)).view(len(parts), 4)
    if not self.training:
      return logits.argmax(1)
    noise = self.noise
    if noise is None:
      noise = -torch.empty_like(logits).exponential_().log()
    return F.softmax((logits + noise) / self.temperature, 1)


def component(channels, stride, how):
  """A Component where one chooses what a stride of 2 keeps, else None."""
  return Component(channels) if stride == 2 and how['downsample'] == 'learned_polyphase' else None


def anneal(network, progress, noise=None):
  """Sets a network's Components to the step of training at `progress`, from 0 to 1: a temperature
  from 1 to 0.025, and noise for each of them in their order, or None for PyTorch's own."""
  layers = [layer for layer in network.modules() if isinstance(layer, Component)]
  for i, layer in enumerate(layers):
    layer.temperature = 1 + (0.025 - 1) * min(progress, 1)
    layer.noise = None if noise is None else noise[i]


def centred(x, shape):
  """x (b, c, h, w) cropped to (b, c, *shape), or padded with zeros, around its centre."""
  (top, more), (left, wider) = ((-((a - b) // 2), b - a)
                                for a, b in zip(x.shape[2:], shape, strict=True))
  return F.pad(x, (left, wider - left, top, more - top))  # below 0 it crops
