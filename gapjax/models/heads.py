"""What stands between the last stage and the logits, and the permutation of channels (section 3).

Heads: `gap` is GAPNet (a 3x3 convolution to K channels, then GAP: those K numbers are the logits);
`permuted` is PermuteNet (GAP, a permutation of the channels, a linear layer); `linear` is the
standard classifier (GAP, a linear layer).
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gapjax.errors import UsageError
from gapjax.models.convolution import convolve
from gapjax.models.layers import Conv, Dense, global_average_pool

HEADS = ('gap', 'permuted', 'linear')
PERMUTATIONS = ('batch', 'fixed')


class Permute(nn.Module):
  """Permutes the channels of x (..., c), all examples and positions alike.

  mode 'batch' draws the permutation anew for every forward pass, in training and in testing, from
  the rng stream 'permutation' (the authors' PermuteNet). mode 'fixed' uses one permutation, drawn
  from `seed`, for ever: the next layer can absorb it, which makes it the control.
  """
  mode: str = 'batch'
  seed: int = 0

  def __call__(self, x):
    if self.mode == 'fixed':
      key = jax.random.fold_in(jax.random.key(self.seed), x.shape[-1])
    elif self.is_initializing():
      return x
    else:
      key = self.make_rng('permutation')
    return jnp.take(x, jax.random.permutation(key, x.shape[-1]), axis=-1)


def check_permute(model) -> None:
  """Raises UsageError unless a network permutes exactly where its `head` and `permute` say."""
  if (model.head == 'permuted') > (model.permute is not None):
    raise UsageError("head='permuted' permutes by what `permute` says: give permute=Permute(), or "
                     "another head")
  if model.permute is not None and (model.head, model.permute_at) == ('gap', 'pooled'):
    raise UsageError("head='gap' has no pooled features to permute before its logits: give "
                     "head='permuted', or permute_at='stage1' or a later one")


class Head(nn.Module):
  """(b, h, w, c) -> logits (b, num_classes) and pooled features (b, c)."""
  num_classes: int
  head: str = 'gap'
  padding: str = 'zero'
  permute: Permute | None = None
  dtype: Any = jnp.float32
  convolve: Callable = convolve

  @nn.compact
  def __call__(self, x):
    pooled = global_average_pool(x)  # (b, h, w, c) -> (b, c)
    if self.head == 'gap':
      x = Conv(self.num_classes, padding=self.padding, use_bias=True, dtype=self.dtype,
               convolve=self.convolve, name='pre_classifier')(x)  # (b, h, w, c) -> (b, h, w, k)
      logits = global_average_pool(x)  # -> (b, k)
    else:
      z = pooled if self.permute is None else self.permute(pooled)
      logits = Dense(self.num_classes, dtype=self.dtype, name='classifier')(z)
    return logits.astype(pooled.dtype), pooled
