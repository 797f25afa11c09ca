"""ResNet-10/18/34/50/101 (He et al. 2016) with the stem, padding, head and width as arguments."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gapjax.models.downsample import halve
from gapjax.models.heads import Head, Permute
from gapjax.models.layers import BatchNorm, Conv

# name -> (blocks a stage, is the block a bottleneck)
RESNETS = {
  'resnet10': ((1, 1, 1, 1), False),
  'resnet18': ((2, 2, 2, 2), False),
  'resnet34': ((3, 4, 6, 3), False),
  'resnet50': ((3, 4, 6, 3), True),
  'resnet101': ((3, 4, 23, 3), True),
}
STEMS = ('canvas', 'cifar')
STRIDES = (1, 2, 2, 2)


class Block(nn.Module):
  """Basic block (two 3x3 convolutions) or bottleneck (1x1, 3x3, 1x1 to 4 times the width).

  (b, h, w, c) -> (b, h', w', width or 4 * width). Under padding 'none' the main path shrinks by
  more than the shortcut does; the shortcut is cropped at its centre to the same size. Under
  downsample 'blur' and 'polyphase' the convolution that would stride is dense; its ReLU's output
  and the shortcut's input are halved, both by the same polyphase component.
  """
  width: int
  stride: int = 1
  bottleneck: bool = False
  padding: str = 'zero'
  downsample: str = 'stride'
  blur_size: int = 3
  norm: Any = BatchNorm
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, *, train):
    out = self.width * (4 if self.bottleneck else 1)
    dense = self.downsample != 'stride'
    # (channels, kernel, stride) of the main path; PyTorch strides the 3x3 of a bottleneck.
    path = ([(self.width, 1, 1), (self.width, 3, self.stride), (out, 1, 1)] if self.bottleneck
            else [(self.width, 3, self.stride), (out, 3, 1)])
    shortcut = self.stride != 1 or x.shape[-1] != out
    y = x
    for i, (features, kernel, stride) in enumerate(path, 1):
      y = Conv(features, kernel, 1 if dense else stride, self.padding, dtype=self.dtype,
               name=f'conv{i}')(y)
      y = self.norm(name=f'bn{i}')(y, train=train)
      if i < len(path):
        y = nn.relu(y)
      if dense and stride == 2:
        how = dict(method=self.downsample, blur_size=self.blur_size, padding=self.padding)
        y, component = halve(y, **how)
        x, _ = halve(x, component=component, **how)
    if shortcut:
      x = Conv(out, 1, 1 if dense else self.stride, dtype=self.dtype, name='shortcut_conv')(x)
      x = self.norm(name='shortcut_bn')(x, train=train)
    return nn.relu(centre_crop(x, y.shape[1:3]) + y)


def centre_crop(x, shape):
  """The central (h', w') = shape of x (b, h, w, c)."""
  top, left = ((have - want) // 2 for have, want in zip(x.shape[1:3], shape, strict=True))
  return x[:, top:top + shape[0], left:left + shape[1]]


class ResNet(nn.Module):
  """ResNet on images (b, h, w, 3).

  Stem 'canvas' is the authors': a 7x7 convolution with stride 2 and no max-pool. Stem 'cifar' is a
  3x3 convolution with stride 1. Stages have `width` times 1, 2, 4, 8 channels, strides 1-2-2-2.

  Call: (images, train=...) -> (logits (b, num_classes), features), features a dict of 'stem',
  'stage1' to 'stage4' (b, h, w, c) and 'pooled' (b, c). `permute`, if any, is applied before the
  stage that `permute_at` names, or to the pooled features; in mode 'batch' it needs the rng
  stream 'permutation'.
  """
  variant: str
  num_classes: int
  width: int = 64
  stem: str = 'canvas'
  padding: str = 'zero'
  downsample: str = 'stride'
  blur_size: int = 3
  head: str = 'gap'
  permute: Permute | None = None
  permute_at: str = 'pooled'
  axis_name: str | None = None
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> tuple[jax.Array, dict[str, jax.Array]]:
    blocks, bottleneck = RESNETS[self.variant]
    norm = functools.partial(BatchNorm, axis_name=self.axis_name, dtype=self.dtype)
    kernel, stride = (7, 2) if self.stem == 'canvas' else (3, 1)
    dense = self.downsample != 'stride'
    x = Conv(self.width, kernel, 1 if dense else stride, self.padding, dtype=self.dtype,
             name='conv1')(x)
    x = nn.relu(norm(name='bn1')(x, train=train))
    if dense and stride == 2:
      x, _ = halve(x, method=self.downsample, blur_size=self.blur_size, padding=self.padding)
    features = {'stem': x}
    for s, (count, stride) in enumerate(zip(blocks, STRIDES, strict=True), 1):
      if self.permute is not None and self.permute_at == f'stage{s}':
        x = self.permute(x)
      for i in range(count):
        x = Block(self.width * 2 ** (s - 1), stride if i == 0 else 1, bottleneck, self.padding,
                  self.downsample, self.blur_size, norm, self.dtype,
                  name=f'layer{s}_{i}')(x, train=train)
      features[f'stage{s}'] = x  # (b, h, w, c) -> (b, h / stride, w / stride, c')
    logits, features['pooled'] = Head(
      self.num_classes, self.head, self.padding,
      self.permute if self.permute_at == 'pooled' else None, self.dtype, name='head')(x)
    return logits, features
