"""DeepLabv3 and v3+ (Chen et al. 2017, 2018), cut where channels of the backbone are removed.

A network is `encode` (the backbone), `branches` (the first convolution of each ASPP branch: affine
in the channels of stage4, which the attack of section 5 uses) and `decode` (everything after).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from gapjax.models.base import Convolutional
from gapjax.models.layers import Dropout, global_average_pool
from gapjax.models.mobilenet import MOBILENETS, MobileNet
from gapjax.models.resnet import ResNet

DEEPLABS = ('deeplabv3', 'deeplabv3plus')
# output stride -> dilation rates of ASPP's 3x3 branches
RATES = {8: (12, 24, 36), 16: (6, 12, 18)}


class ConvNormRelu(Convolutional):
  """Convolution, BatchNorm, ReLU: (b, h, w, c) -> (b, h, w, features)."""
  features: int
  kernel_size: int = 1
  separable: bool = False

  @nn.compact
  def __call__(self, x, *, train):
    x = self.convolution(self.features, self.kernel_size, separable=self.separable, name='conv')(x)
    return nn.relu(self.batch_norm(name='bn')(x, train=train))


class DeepLab(Convolutional):
  """Semantic segmentation: a dilated backbone, atrous spatial pyramid pooling (ASPP), a classifier.

  variant: 'deeplabv3', or 'deeplabv3plus' whose decoder also reads stage1. The head has 4 * `width`
  channels (256 at the usual width of 64); `separable` makes all its convolutions of more than 1x1
  separable. `backbone_name`: a ResNet, or one of MOBILENETS, whose stem is its own: `stem` is the
  ResNets', `early_padding` MobileNetV2's. `output_stride`: 8 or 16, pixels of the image to one of
  stage4.

  Call: (images (b, h, w, 3), train=...) -> (logits (b, h, w, num_classes), features), features a
  dict of the backbone's 'stem', 'stage1' to 'stage4' and 'pooled'. Training with dropout needs the
  rng stream 'dropout'.
  """
  variant: str
  num_classes: int
  backbone_name: str = 'resnet50'
  width: int = 64
  output_stride: int = 16
  stem: str = 'imagenet'
  dropout: float = 0.1
  backbone_momentum: float = 0.01
  separable: bool = False
  early_padding: bool = False

  def setup(self):
    common, channels = self.common, 4 * self.width
    backbone = {**common, 'width': self.width, 'output_stride': self.output_stride,
                'momentum': self.backbone_momentum, 'head': None}
    if self.backbone_name in MOBILENETS:
      self.backbone = MobileNet(self.backbone_name, 0, early_padding=self.early_padding, **backbone)
    else:
      self.backbone = ResNet(self.backbone_name, 0, stem=self.stem, **backbone)
    shapes = [(1, 1), *((3, rate) for rate in RATES[self.output_stride]), (1, 1)]
    self.branch_convs = [self.convolution(channels, kernel, separable=self.separable,
                                          dilation=rate) for kernel, rate in shapes]
    self.branch_norms = [self.batch_norm() for _ in shapes]
    self.project = ConvNormRelu(channels, **common)
    self.dropped = Dropout(self.dropout)
    if self.variant == 'deeplabv3plus':
      self.low_level = ConvNormRelu(max(3 * self.width // 4, 1), **common)
    self.last = ConvNormRelu(channels, 3, self.separable, **common)
    self.classifier = self.convolution(self.num_classes, 1, use_bias=True)

  def __call__(self, x: Float[ArrayLike, 'b h w c'], *, train: bool) -> tuple[
      Float[Array, 'b h w k'], dict[str, Float[Array, '...']]]:
    features = self.encode(x, train=train)
    return self.decode(self.branches(features['stage4']), features, size=x.shape[1:3],
                       train=train), features

  def encode(self, x: jax.Array, *, train: bool) -> dict[str, jax.Array]:
    """(b, h, w, 3) -> the backbone's features."""
    return self.backbone(x, train=train)[1]

  def branches(self, x: jax.Array) -> list[jax.Array]:
    """stage4 (b, h, w, c) -> the five branches' convolutions, (b, h, w, c') each, (b, 1, 1, c') the
    image-pooling one's. Linear in x: a sum over its channels."""
    pooled = global_average_pool(x)[:, None, None].astype(x.dtype)  # (b, 1, 1, c)
    return [*(conv(x) for conv in self.branch_convs[:4]), self.branch_convs[4](pooled)]

  def decode(self, branches: list[jax.Array], features: dict[str, jax.Array], *,
             size: tuple[int, int], train: bool) -> jax.Array:
    """From `branches` to logits (b, *size, num_classes); v3+ reads features['stage1'] too."""
    shape = branches[0].shape[1:3]
    y = [nn.relu(norm(x, train=train))
         for norm, x in zip(self.branch_norms, branches, strict=True)]
    y[4] = jnp.broadcast_to(y[4], (*y[4].shape[:1], *shape, y[4].shape[-1]))
    y = self.project(jnp.concatenate(y, -1), train=train)
    y = self.dropped(y, train=train)
    if self.variant == 'deeplabv3plus':
      low = self.low_level(features['stage1'], train=train)
      y = jnp.concatenate([low, resize(y, low.shape[1:3])], -1)
    logits = self.classifier(self.last(y, train=train))  # (b, h / stride, w / stride, num_classes)
    return resize(logits.astype(jnp.promote_types(self.dtype, jnp.float32)), size)


def resize(x: jax.Array, size: tuple[int, int]) -> jax.Array:
  """Bilinear, as PyTorch's interpolate with align_corners=False: (b, h, w, c) -> (b, *size, c)."""
  return jax.image.resize(x, (x.shape[0], *size, x.shape[-1]), 'bilinear', antialias=False)
