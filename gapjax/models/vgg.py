"""VGG-11/16 with BatchNorm (Simonyan & Zisserman 2015), without the fully connected layers."""

import flax.linen as nn
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from gapjax.errors import UsageError
from gapjax.models.base import Classifier
from gapjax.models.layers import SIZES, max_pool, pad

# name -> convolutions a stage; each stage ends in a max-pool. Channels: width x 1, 2, 4, 8, 8.
VGGS = {'vgg11': (1, 1, 2, 2, 2), 'vgg16': (2, 2, 3, 3, 3)}
MULTIPLES = (1, 2, 4, 8, 8)


class VGG(Classifier):
  """VGG on images (b, h, w, 3): five stages of 3x3 convolutions, each ended by a 2x2 max-pool.

  Call: (images, train=...) -> (logits (b, num_classes), features), features a dict of 'stage1' to
  'stage5' (b, h, w, c) and 'pooled' (b, c). Arguments as ResNet's; the first stage is the stem.

  Raises UsageError where a stage has nothing left to pool.
  """
  variant: str
  num_classes: int
  width: int = 64

  @nn.compact
  def __call__(self, x: Float[ArrayLike, 'b h w c'], *, train: bool) -> tuple[
      Float[Array, 'b k'], dict[str, Float[Array, '...']]]:
    features = {}
    for s, (count, multiple) in enumerate(zip(VGGS[self.variant], MULTIPLES, strict=True), 1):
      x = self.permuted(x, f'stage{s}')
      for i in range(count):
        x = self.convolution(self.width * multiple, 3, use_bias=True, name=f'conv{s}_{i}')(x)
        x = nn.relu(self.batch_norm(name=f'bn{s}_{i}')(x, train=train))
      if min(x.shape[1:3]) < 2:
        raise UsageError(
          f'nothing is left to pool at stage{s} of {self.variant} with padding '
          f'`{self.padding}`; use larger images ({SIZES})')
      features[f'stage{s}'] = x = self.pool(x)  # (b, h, w, c) -> (b, h / 2, w / 2, c)
    return self.classified(features)

  def pool(self, x):
    """The stage's max-pool: with stride 2, or dense and then halved.

    A dense 2x2 pool loses a row and a column; under 'polyphase', which needs even sizes, they are
    padded.
    """
    if self.downsample == 'polyphase':
      x = pad(x, (0, 1), mode='circular' if self.padding == 'circular' else 'replicate')
    return self.halved(max_pool(x, stride=self.strided(2)), 2)[0]
