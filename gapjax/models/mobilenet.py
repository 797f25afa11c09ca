"""MobileNetV2 (Sandler et al. 2018) and EfficientNet-Lite0 (Tan & Le 2019, without
squeeze-and-excitation and with ReLU6): networks of inverted residuals.

Of MobileNetV2's padding two ways are in use. torchvision pads the stem and each depthwise
convolution. The authors' code, as the DeepLabV3Plus-Pytorch that it builds on, pads a block's
*input* instead, so that its expansion and BatchNorm make other numbers than zeros of the border,
and not the stem at all: `early_padding`. Weights fit either. EfficientNet-Lite0's are TensorFlow's:
padding SAME, and BatchNorm's epsilon 1e-3.
"""

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from gapjax.models.base import Classifier, Convolutional
from gapjax.models.layers import global_average_pool, pad
from gapjax.models.resnet import centred

STEM, STEM_STRIDE, LAST = 32, 2, 1280


class Run(NamedTuple):
  """Inverted residuals in a row; the first of them has the stride."""
  expansion: int
  channels: int
  blocks: int
  stride: int
  kernel_size: int = 3


# name -> of each stage the runs
MOBILENETS = {
  'mobilenetv2': (
    (Run(1, 16, 1, 1), Run(6, 24, 2, 2)), (Run(6, 32, 3, 2),),
    (Run(6, 64, 4, 2), Run(6, 96, 3, 1)), (Run(6, 160, 3, 2), Run(6, 320, 1, 1))),
  'efficientnet_lite0': (
    (Run(1, 16, 1, 1), Run(6, 24, 2, 2)), (Run(6, 40, 2, 2, 5),),
    (Run(6, 80, 3, 2), Run(6, 112, 3, 1, 5)), (Run(6, 192, 4, 2, 5), Run(6, 320, 1, 1))),
}
# What makes a network one of TensorFlow's.
TENSORFLOW = {'efficientnet_lite0': dict(same=True, epsilon=1e-3)}


def channels(usual: int, width: int) -> int:
  """How many channels a layer of `usual` ones has in a network of `width`, where 64 is usual.

  torchvision's rounding (the authors cut): the nearest multiple of 8, the next if that is more than
  a tenth less, and never below 8. So widths below 16 make hardly smaller networks: 4 has 8 to 24
  channels.
  """
  exact = usual * width / 64
  rounded = max(8, int(exact + 4) // 8 * 8)
  return rounded + 8 if rounded < 0.9 * exact else rounded


def relu6(x):
  """min(max(x, 0), 6), its gradient 0 at 0 (jax.nn.relu6: 1/2), where a dead channel stands."""
  return jnp.minimum(nn.relu(x), 6)


class InvertedResidual(Convolutional):
  """1x1 expansion (none where `expansion` is 1), depthwise convolution, linear 1x1; a shortcut
  where stride and channels allow it. `same`: the depthwise convolution's; `epsilon`: BatchNorm's.

  (b, h, w, c) -> (b, h', w', features). Under padding 'none' the shortcut is cropped at its centre;
  under downsample 'blur' and 'polyphase' the depthwise convolution that would stride is dense and
  its ReLU6's output is halved.
  """
  features: int
  stride: int = 1
  expansion: int = 6
  early_padding: bool = False
  dilation: int = 1
  kernel_size: int = 3
  same: bool = False
  epsilon: float = 1e-5

  @nn.compact
  def __call__(self, x, *, train):
    def layer(y, features, name, kernel_size=1, stride=1, **more):
      y = self.convolution(features, kernel_size, stride, name=f'{name}_conv', **more)(y)
      return self.batch_norm(name=f'{name}_bn', epsilon=self.epsilon)(y, train=train)

    y, padding, hidden = x, self.padding, self.expansion * x.shape[-1]
    if self.early_padding:
      reach = self.dilation * (self.kernel_size - 1)
      y, padding = pad(x, reach // 2, mode=padding, where=f' at `{"/".join(self.path)}`'), 'none'
    if self.expansion > 1:
      y = relu6(layer(y, hidden, 'expand'))  # (b, h, w, c) -> (b, h, w, expansion * c)
    y = relu6(layer(y, hidden, 'depthwise', self.kernel_size, self.stride, padding=padding,
                    dilation=self.dilation, groups=hidden, same=self.same))
    y, _ = self.halved(y, self.stride)
    y = layer(y, self.features, 'project')
    if self.stride == 1 and x.shape[-1] == self.features:
      y = centred(x, y.shape[1:3]) + y
    return y


class MobileNet(Classifier):
  """A network of MOBILENETS on images (b, h, w, 3); a layer has `channels(usual, width)` channels.

  The stem is `conv1` and `bn1`, the blocks are `features_1`, `features_2`, ..., and `conv2` and
  `bn2`, to 1280 channels, stand before a head alone. Where the whole stride would exceed
  `output_stride` (if any) a run of blocks is dilated instead, its first block by the dilation
  before it, as DeepLabV3Plus-Pytorch does it. `early_padding`: see above; MobileNetV2's, for
  paddings that pad.

  Call: (images, train=...) -> (logits (b, num_classes), features), features a dict of 'stem',
  'stage1' to 'stage5' (b, h, w, c) and 'pooled' (b, c). Without a head (None), the logits are None
  and stage4 is the last. At width 64 stage1 has 24 channels and stride 4, stage4 has 320.
  """
  variant: str
  num_classes: int
  width: int = 64
  output_stride: int | None = None
  early_padding: bool = False

  @nn.compact
  def __call__(self, x: Float[ArrayLike, 'b h w c'], *, train: bool) -> tuple[
      Float[Array, 'b k'] | None, dict[str, Float[Array, '...']]]:
    how = TENSORFLOW.get(self.variant, dict(same=False, epsilon=1e-5))

    def activated(x, name):
      return relu6(self.batch_norm(name=name, epsilon=how['epsilon'])(x, train=train))

    x = self.convolution(channels(STEM, self.width), 3, STEM_STRIDE, name='conv1', same=how['same'],
                         padding='none' if self.early_padding else self.padding)(x)
    x, _ = self.halved(activated(x, 'bn1'), STEM_STRIDE)
    features, whole, dilation, block = {'stem': x}, STEM_STRIDE, 1, 0
    for s, runs in enumerate(MOBILENETS[self.variant], 1):
      x = self.permuted(x, f'stage{s}')
      for expansion, usual, count, stride, kernel_size in runs:
        first = dilation
        if self.output_stride and whole * stride > self.output_stride:
          stride, dilation = 1, dilation * stride
        whole *= stride
        for i in range(count):
          block += 1
          x = InvertedResidual(
            channels(usual, self.width), 1 if i else stride, expansion, self.early_padding,
            dilation if i else first, kernel_size, name=f'features_{block}', **how,
            **self.common)(x, train=train)
      features[f'stage{s}'] = x  # (b, h, w, c) -> (b, h / stride, w / stride, c')
    if self.head is None:
      return None, {**features, 'pooled': global_average_pool(x)}
    x = self.convolution(channels(LAST, self.width), 1, name='conv2')(self.permuted(x, 'stage5'))
    return self.classified({**features, 'stage5': activated(x, 'bn2')})
