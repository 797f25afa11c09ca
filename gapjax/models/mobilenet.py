"""MobileNetV2 (Sandler et al. 2018) without its classifier: torchvision's features[:-1], in order.

Two paddings are in use. torchvision pads the stem and each depthwise convolution. The authors'
code, as the DeepLabV3Plus-Pytorch that it builds on, pads a block's *input* instead, so that its
expansion and BatchNorm make other numbers than zeros of the border, and not the stem at all:
`early_padding`. Weights fit either.
"""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from gapjax.models.base import Convolutional
from gapjax.models.layers import global_average_pool, pad
from gapjax.models.resnet import centred

MOBILENETS = ('mobilenetv2',)
STEM, STEM_STRIDE = 32, 2
# Of each stage the runs of inverted residuals: (expansion, channels, blocks, stride).
STAGES = (((1, 16, 1, 1), (6, 24, 2, 2)),
          ((6, 32, 3, 2),),
          ((6, 64, 4, 2), (6, 96, 3, 1)),
          ((6, 160, 3, 2), (6, 320, 1, 1)))


def channels(usual: int, width: int) -> int:
  """How many channels a layer of `usual` ones has in a network of `width`, where 64 is usual.

  torchvision's rounding: the nearest multiple of 8, the next if that is more than a tenth less, and
  never below 8. So widths below 16 make hardly smaller networks: 4 has 8 to 24 channels.
  """
  exact = usual * width / 64
  rounded = max(8, int(exact + 4) // 8 * 8)
  return rounded + 8 if rounded < 0.9 * exact else rounded


def relu6(x):
  """min(max(x, 0), 6), its gradient 0 at 0 (jax.nn.relu6: 1/2), where a dead channel stands."""
  return jnp.minimum(nn.relu(x), 6)


class InvertedResidual(Convolutional):
  """1x1 expansion (none where `expansion` is 1), depthwise 3x3, linear 1x1; a shortcut where stride
  and channels allow it.

  (b, h, w, c) -> (b, h', w', features). Under padding 'none' the shortcut is cropped at its centre;
  under downsample 'blur' and 'polyphase' the depthwise convolution that would stride is dense and
  its ReLU6's output is halved.
  """
  features: int
  stride: int = 1
  expansion: int = 6
  early_padding: bool = False
  dilation: int = 1

  @nn.compact
  def __call__(self, x, *, train):
    def layer(y, features, name, kernel_size=1, stride=1, **more):
      y = self.convolution(features, kernel_size, stride, name=f'{name}_conv', **more)(y)
      return self.batch_norm(name=f'{name}_bn')(y, train=train)

    y, padding, hidden = x, self.padding, self.expansion * x.shape[-1]
    if self.early_padding:
      y, padding = pad(x, self.dilation, mode=padding, where=f' at `{"/".join(self.path)}`'), 'none'
    if self.expansion > 1:
      y = relu6(layer(y, hidden, 'expand'))  # (b, h, w, c) -> (b, h, w, expansion * c)
    y = relu6(layer(y, hidden, 'depthwise', 3, self.stride, padding=padding,
                    dilation=self.dilation, groups=hidden))
    y, _ = self.halved(y, self.stride)
    y = layer(y, self.features, 'project')
    if self.stride == 1 and x.shape[-1] == self.features:
      y = centred(x, y.shape[1:3]) + y
    return y


class MobileNetV2(Convolutional):
  """MobileNetV2's features on images (b, h, w, 3); a layer has `channels(usual, width)` channels.

  The stem (torchvision's features.0) is `conv1` and `bn1`, the blocks are `features_1` to
  `features_17`. Where the whole stride would exceed `output_stride` (if any) a run of blocks is
  dilated instead, its first block by the dilation before it, as DeepLabV3Plus-Pytorch does it.
  `early_padding`: see above; for paddings that pad.

  Call: (images, train=...) -> (None, features), as a ResNet without a head: features a dict of
  'stem', 'stage1' to 'stage4' (b, h, w, c) and 'pooled' (b, c). At width 64 stage1 has 24 channels
  and stride 4, stage4 has 320.
  """
  width: int = 64
  early_padding: bool = False
  output_stride: int | None = None

  @nn.compact
  def __call__(self, x: Float[ArrayLike, 'b h w c'], *, train: bool) -> tuple[
      None, dict[str, Float[Array, '...']]]:
    x = self.convolution(channels(STEM, self.width), 3, STEM_STRIDE, name='conv1',
                         padding='none' if self.early_padding else self.padding)(x)
    x, _ = self.halved(relu6(self.batch_norm(name='bn1')(x, train=train)), STEM_STRIDE)
    features, whole, dilation, block = {'stem': x}, STEM_STRIDE, 1, 0
    for s, runs in enumerate(STAGES, 1):
      for expansion, usual, count, stride in runs:
        first = dilation
        if self.output_stride and whole * stride > self.output_stride:
          stride, dilation = 1, dilation * stride
        whole *= stride
        for i in range(count):
          block += 1
          x = InvertedResidual(
            channels(usual, self.width), 1 if i else stride, expansion, self.early_padding,
            dilation if i else first, name=f'features_{block}', **self.common)(x, train=train)
      features[f'stage{s}'] = x  # (b, h, w, c) -> (b, h / stride, w / stride, c')
    return None, {**features, 'pooled': global_average_pool(x)}
