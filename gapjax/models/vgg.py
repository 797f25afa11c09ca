"""VGG-11/16 with BatchNorm (Simonyan & Zisserman 2015), without the fully connected layers."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from gapjax.errors import UsageError
from gapjax.models.convolution import convolve
from gapjax.models.downsample import halve
from gapjax.models.heads import Permute, check_permute, make_head
from gapjax.models.layers import BatchNorm, Conv, max_pool, pad

# name -> convolutions a stage; each stage ends in a max-pool. Channels: width x 1, 2, 4, 8, 8.
VGGS = {'vgg11': (1, 1, 2, 2, 2), 'vgg16': (2, 2, 3, 3, 3)}
MULTIPLES = (1, 2, 4, 8, 8)


class VGG(nn.Module):
  """VGG on images (b, h, w, 3): five stages of 3x3 convolutions, each ended by a 2x2 max-pool.

  Call: (images, train=...) -> (logits (b, num_classes), features), features a dict of 'stage1' to
  'stage5' (b, h, w, c) and 'pooled' (b, c). Arguments as ResNet's; the first stage is the stem.
  """
  variant: str
  num_classes: int
  width: int = 64
  padding: str = 'zero'
  downsample: str = 'stride'
  blur_size: int = 3
  head: str = 'gap'
  permute: Permute | None = None
  permute_at: str = 'pooled'
  axis_name: str | None = None
  dtype: Any = jnp.float32
  convolve: Callable = convolve

  def __post_init__(self):
    check_permute(self)
    super().__post_init__()

  @nn.compact
  def __call__(self, x: Float[ArrayLike, 'b h w c'], *, train: bool) -> tuple[
      Float[Array, 'b k'], dict[str, Float[Array, '...']]]:
    features = {}
    for s, (count, multiple) in enumerate(zip(VGGS[self.variant], MULTIPLES, strict=True), 1):
      if self.permute is not None and self.permute_at == f'stage{s}':
        x = self.permute(x)
      for i in range(count):
        x = Conv(self.width * multiple, padding=self.padding, use_bias=True, dtype=self.dtype,
                 convolve=self.convolve, name=f'conv{s}_{i}')(x)
        x = nn.relu(BatchNorm(axis_name=self.axis_name, dtype=self.dtype,
                              name=f'bn{s}_{i}')(x, train=train))
      if min(x.shape[1:3]) < 2:
        raise UsageError(
          f'nothing is left to pool at stage{s} of {self.variant} with padding '
          f'`{self.padding}`; use a larger canvas (canvas.grid, data.image_size)')
      features[f'stage{s}'] = x = self.pool(x)  # (b, h, w, c) -> (b, h / 2, w / 2, c)
    logits, features['pooled'] = make_head(
      self.head, self.num_classes, padding=self.padding, dtype=self.dtype, convolve=self.convolve,
      permute=self.permute if self.permute_at == 'pooled' else None, name='head')(x)
    return logits, features

  def pool(self, x):
    """The stage's max-pool: with stride 2, or dense and then halved.

    A dense 2x2 pool loses a row and a column; under 'polyphase', which needs even sizes, they are
    padded.
    """
    if self.downsample == 'stride':
      return max_pool(x)
    if self.downsample == 'polyphase':
      x = pad(x, (0, 1), mode='circular' if self.padding == 'circular' else 'replicate')
    return halve(max_pool(x, stride=1), method=self.downsample, blur_size=self.blur_size,
                 padding=self.padding)[0]
