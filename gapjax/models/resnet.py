"""ResNet-10/18/34/50/101 (He et al. 2016) with the stem, padding, head and width as arguments."""

import flax.linen as nn
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from gapjax.models.base import Classifier, Convolutional
from gapjax.models.layers import global_average_pool, max_pool

# name -> (blocks a stage, is the block a bottleneck)
RESNETS = {
  'resnet10': ((1, 1, 1, 1), False),
  'resnet18': ((2, 2, 2, 2), False),
  'resnet34': ((3, 4, 6, 3), False),
  'resnet50': ((3, 4, 6, 3), True),
  'resnet101': ((3, 4, 23, 3), True),
}
# name -> (kernel, stride, is a 3x3 max-pool with stride 2 behind it)
STEMS = {'canvas': (7, 2, False), 'cifar': (3, 1, False), 'imagenet': (7, 2, True)}
STRIDES = (1, 2, 2, 2)


class Block(Convolutional):
  """Basic block (two 3x3 convolutions) or bottleneck (1x1, 3x3, 1x1 to 4 times the width).

  (b, h, w, c) -> (b, h', w', width or 4 * width). Under padding 'none' the main path shrinks by
  more than the shortcut does, under 'full' it grows by more; the shortcut is cropped, or padded
  with zeros, around its centre to the same size. Under
  another downsample than 'stride' the convolution that would stride is dense; its ReLU's output and
  the shortcut's input are halved, both by the same polyphase component.
  """
  width: int
  stride: int = 1
  bottleneck: bool = False
  dilation: int = 1

  @nn.compact
  def __call__(self, x, *, train):
    out = self.width * (4 if self.bottleneck else 1)
    # (channels, kernel, stride) of the main path; PyTorch strides the 3x3 of a bottleneck.
    path = ([(self.width, 1, 1), (self.width, 3, self.stride), (out, 1, 1)] if self.bottleneck
            else [(self.width, 3, self.stride), (out, 3, 1)])
    shortcut = self.stride != 1 or x.shape[-1] != out
    y = x
    for i, (features, kernel, stride) in enumerate(path, 1):
      y = self.convolution(features, kernel, stride, name=f'conv{i}',
                           dilation=self.dilation if kernel > 1 else 1)(y)
      y = self.batch_norm(name=f'bn{i}')(y, train=train)
      if i < len(path):
        y = nn.relu(y)
      y, component = self.halved(y, stride, train=train)
      x, _ = self.halved(x, stride, component)
    if shortcut:
      x = self.convolution(out, 1, self.stride, name='shortcut_conv')(x)
      x = self.batch_norm(name='shortcut_bn')(x, train=train)
    return nn.relu(centred(x, y.shape[1:3]) + y)


def centred(x, shape):
  """x (b, h, w, c) as (b, *shape, c): cropped, or padded with zeros, around its centre."""
  border = [(-((have - want) // 2), (want - have) // 2, 0)
            for have, want in zip(x.shape[1:3], shape, strict=True)]
  x = jnp.asarray(x)
  return lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *border, (0, 0, 0)))


class ResNet(Classifier):
  """ResNet on images (b, h, w, 3).

  Stem 'canvas' is the authors': a 7x7 convolution with stride 2 and no max-pool. Stem 'cifar' is a
  3x3 convolution with stride 1. Stem 'imagenet' is torchvision's, 7x7 and a max-pool, stride 4 in
  all. Stages have `width` times 1, 2, 4, 8 channels and strides 1-2-2-2; where the whole stride
  would exceed `output_stride` (if any) a stage is dilated instead, as torchvision does it.

  Beside its fields it has models.base.Classifier's and, as a Block, Convolutional's.

  Call: (images, train=...) -> (logits (b, num_classes), features), features a dict of 'stem',
  'stage1' to 'stage4' (b, h, w, c) and 'pooled' (b, c). Without a head (None), the logits are None.
  """
  variant: str
  num_classes: int
  width: int = 64
  stem: str = 'canvas'
  output_stride: int | None = None

  @nn.compact
  def __call__(self, x: Float[ArrayLike, 'b h w c'], *, train: bool) -> tuple[
      Float[Array, 'b k'] | None, dict[str, Float[Array, '...']]]:
    blocks, bottleneck = RESNETS[self.variant]
    kernel, stride, pool = STEMS[self.stem]
    x = self.convolution(self.width, kernel, stride, name='conv1')(x)
    x = nn.relu(self.batch_norm(name='bn1')(x, train=train))
    x, _ = self.halved(x, stride, train=train)
    if pool:
      x, _ = self.halved(max_pool(x, size=3, stride=self.strided(2), padding=1,
                                  circular=self.padding == 'circular'), 2, train=train,
                         name='pool_component')
    features, whole, dilation = {'stem': x}, stride * (2 if pool else 1), 1
    for s, (count, stride) in enumerate(zip(blocks, STRIDES, strict=True), 1):
      first = dilation  # torchvision: a dilated stage's first block has the dilation before it
      if self.output_stride and whole * stride > self.output_stride:
        stride, dilation = 1, dilation * stride
      whole *= stride
      x = self.permuted(x, f'stage{s}')
      for i in range(count):
        x = Block(self.width * 2 ** (s - 1), stride if i == 0 else 1, bottleneck,
                  dilation if i else first, name=f'layer{s}_{i}', **self.common)(x, train=train)
      features[f'stage{s}'] = x  # (b, h, w, c) -> (b, h / stride, w / stride, c')
    if self.head is None:
      return None, {**features, 'pooled': global_average_pool(x)}
    return self.classified(features)
