"""What networks and their blocks share: convolutions, BatchNorm, halving a map, and a head."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gapjax.errors import UsageError
from gapjax.models.convolution import convolve
from gapjax.models.downsample import LearnedComponent, blur, components, strongest, taken
from gapjax.models.heads import Permute, make_head
from gapjax.models.layers import BatchNorm, Conv, SeparableConv

COMMON = ('padding', 'downsample', 'blur_size', 'total_steps', 'axis_name', 'dtype', 'momentum',
          'convolve')


class Convolutional(nn.Module, kw_only=True):
  """A network or a block of one. Its fields, COMMON, go by keyword, and to all that it is made of.

  Attributes:
    padding: of its convolutions, one of layers.PADDINGS.
    downsample: how a map is halved, one of downsample.DOWNSAMPLINGS.
    blur_size: taps of the blur that downsampling may have.
    total_steps: of the training; a LearnedComponent's temperature falls over them.
    axis_name: the pmap axis that BatchNorm synchronises over; None for one device.
    dtype: what is computed in.
    momentum: BatchNorm's.
    convolve: what computes a convolution, models/convolution.py's or on_cpu.py's.
  """
  padding: str = 'zero'
  downsample: str = 'stride'
  blur_size: int = 3
  total_steps: int = 0
  axis_name: str | None = None
  dtype: Any = jnp.float32
  momentum: float = 0.1
  convolve: Callable = convolve

  @property
  def common(self) -> dict[str, Any]:
    return {name: getattr(self, name) for name in COMMON}

  def strided(self, stride: int) -> int:
    """The stride of what strides: 1 where downsampling makes it dense, and `halved` follows."""
    return stride if self.downsample == 'stride' else 1

  def convolution(self, features: int, kernel_size: int, stride: int = 1, *,
                  separable: bool = False, **more) -> nn.Module:
    """A convolution; separable if that is asked for and the kernel is more than 1x1."""
    how = {'padding': self.padding, 'dtype': self.dtype, 'convolve': self.convolve, **more}
    if separable and kernel_size > 1:
      return SeparableConv(features, kernel_size, **how)
    return Conv(features, kernel_size, self.strided(stride), **how)

  def batch_norm(self, **more) -> nn.Module:
    return BatchNorm(self.momentum, axis_name=self.axis_name, dtype=self.dtype, **more)

  def halved(self, x: jax.Array, stride: int, component: jax.Array | None = None, *,
             train: bool | None = None, name: str = 'component'):
    """x (b, h, w, c), halved if the stride is 2 and was not taken, and its polyphase component.

    Circular networks blur circularly, the others with reflection; the polyphases blur first if
    blur_size > 1. Sizes become ceil(h / 2), ceil(w / 2). The component, as `taken` takes it, is
    None but there. train, name: of the layer that learns which to take.

    Raises UsageError where a network does not say `train` for it, and as `components` does.
    """
    mode = 'circular' if self.padding == 'circular' else 'reflect'
    if stride == self.strided(stride):
      return x, None
    if self.downsample == 'blur':
      return blur(x, self.blur_size, stride=2, mode=mode), None
    choose = strongest
    if component is None and self.downsample == 'learned_polyphase':
      if train is None:
        raise UsageError(f"downsample='learned_polyphase' is for ResNets; {type(self).__name__} "
                         "has 'polyphase'")
      choose = functools.partial(LearnedComponent(self.total_steps, self.dtype, self.convolve,
                                                  name=name), train=train)
    parts = components(blur(x, self.blur_size, stride=1, mode=mode))
    component = choose(parts) if component is None else component
    return taken(parts, component), component


class Classifier(Convolutional, kw_only=True):
  """A network with a head.

  Attributes:
    head: one of heads.HEADS, or None for features alone.
    permute: what permutes channels, if any; in mode 'batch' it needs the rng stream 'permutation'.
    permute_at: 'pooled', after GAP, or the stage before which it does so.

  Raises UsageError unless it permutes exactly where `head` and `permute` say.
  """
  head: str | None = 'gap'
  permute: Permute | None = None
  permute_at: str = 'pooled'

  def __post_init__(self):
    if (self.head == 'permuted') > (self.permute is not None):
      raise UsageError("head='permuted' permutes by what `permute` says: give permute=Permute(), "
                       'or another head')
    if self.permute is not None and (self.head, self.permute_at) == ('gap', 'pooled'):
      raise UsageError("head='gap' has no pooled features to permute before its logits: give "
                       "head='permuted', or permute_at='stage1' or a later one")
    super().__post_init__()

  def permuted(self, x: jax.Array, before: str) -> jax.Array:
    """x (..., c), permuted if that is done before the stage of this name."""
    return x if self.permute is None or self.permute_at != before else self.permute(x)

  def classified(self, features: dict[str, jax.Array]):
    """(logits (b, num_classes), features with 'pooled') of the stages, by the last of them."""
    logits, pooled = make_head(
      self.head, self.num_classes, padding=self.padding, dtype=self.dtype, convolve=self.convolve,
      permute=self.permute if self.permute_at == 'pooled' else None,
      name='head')(list(features.values())[-1])
    return logits, {**features, 'pooled': pooled}
