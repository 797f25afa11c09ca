"""What stands between the last stage and the logits, and the permutation of channels (section 3).

Each head maps (b, h, w, c) to logits (b, num_classes) and the pooled features (b, c), both float32
or better.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Float, Num

from gapjax.errors import check_choice
from gapjax.models.convolution import convolve
from gapjax.models.layers import Conv, Dense, global_average_pool

HEADS = ('gap', 'permuted', 'linear')
PERMUTATIONS = ('batch', 'fixed')
LogitsAndPooled = tuple[Float[ArrayLike, 'b k'], Float[ArrayLike, 'b c']]


class Permute(nn.Module):
  """Permutes the channels of x (..., c), all examples and positions alike.

  mode 'batch' draws the permutation anew for every forward pass, in training and in testing, from
  the rng stream 'permutation' (the authors' PermuteNet). mode 'fixed' uses one permutation, drawn
  from `seed`, for ever: the next layer can absorb it, which makes it the control. Raises UsageError
  on another mode.
  """
  mode: str = 'batch'
  seed: int = 0

  def __call__(self, x: Num[ArrayLike, '*b c']) -> Num[ArrayLike, '*b c']:
    check_choice(self.mode, PERMUTATIONS, what='mode')
    if self.mode == 'fixed':
      key = jax.random.fold_in(jax.random.key(self.seed), x.shape[-1])
    elif self.is_initializing():
      return x
    else:
      key = self.make_rng('permutation')
    return jnp.take(x, jax.random.permutation(key, x.shape[-1]), axis=-1)


class GAPHead(nn.Module):
  """GAPNet's (section 3): a 3x3 convolution to one channel a class, then GAP, which gives the
  logits.

  `padding` is one of models.layers.PADDINGS. Call: (b, h, w, c) -> logits (b, num_classes), and
  (b, c), what GAP makes of the input.
  """
  num_classes: int
  padding: str = 'zero'
  dtype: Any = jnp.float32
  convolve: Callable = convolve

  @nn.compact
  def __call__(self, x: Float[ArrayLike, 'b h w c']) -> LogitsAndPooled:
    y = Conv(self.num_classes, padding=self.padding, use_bias=True, dtype=self.dtype,
             convolve=self.convolve, name='pre_classifier')(x)  # (b, h, w, c) -> (b, h, w, k)
    return global_average_pool(y), global_average_pool(x)


class LinearHead(nn.Module):
  """The standard classifier: GAP, the channels in another order if `permute` is given, and a linear
  layer.

  Call: (b, h, w, c) -> logits (b, num_classes), and (b, c), the pooled features in their own order.
  """
  num_classes: int
  dtype: Any = jnp.float32
  permute: Permute | None = None

  @nn.compact
  def __call__(self, x: Float[ArrayLike, 'b h w c']) -> LogitsAndPooled:
    pooled = global_average_pool(x)  # (b, h, w, c) -> (b, c)
    z = pooled if self.permute is None else self.permute(pooled)
    logits = Dense(self.num_classes, dtype=self.dtype, name='classifier')(z)
    return logits.astype(pooled.dtype), pooled


class PermuteHead(LinearHead):
  """PermuteNet's (section 3): GAP, a permutation of the channels, and a linear layer.

  The permutation is drawn anew for every forward pass, one for the batch, from the rng stream
  'permutation': pass `rngs={'permutation': key}` to `apply`, in testing, too.
  `permute=Permute('fixed', seed=0)` is the control, one order for ever, and needs no rng.

  Call: (b, h, w, c) -> logits (b, num_classes), and (b, c), the pooled features in their own order.
  """
  num_classes: int
  dtype: Any = jnp.float32
  permute: Permute | None = dataclasses.field(default_factory=Permute)


def make_head(kind: str, num_classes: int, *, padding: str = 'zero',
              permute: Permute | None = None, dtype: Any = jnp.float32,
              convolve: Callable = convolve, name: str | None = None) -> nn.Module:
  """The head that a config names; what is 'permuted' before an earlier stage has no `permute`."""
  if kind == 'gap':
    return GAPHead(num_classes, padding, dtype, convolve, name=name)
  return LinearHead(num_classes, dtype, permute, name=name)
