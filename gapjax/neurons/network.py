"""A network cut at the channels that an attack removes.

Two plain functions suffice for `gapjax.attack`. What a head reads beside the maps, as DeepLabv3+'s
decoder does, needs a `Network`, which is re-run from the cut on for every number of removed
channels:

    cut = network.Network(
      variables,                                               # {'body': ..., 'head': ...}
      encode=lambda v, images: {'stage4': body.apply(v['body'], images)},
      head=lambda v, features: head.apply(v['head'], features['stage4']))

Where what follows the cut begins with a layer that is linear in the channels, as a convolution is,
give that layer and the rest instead, and a sweep over many numbers of channels costs the layer once
(attack.py). `branches` gets some channels alone and slices its kernel by them; it leaves out
biases and whatever else is not a sum over channels, which `rest` adds. With a 1x1 convolution:

    cut = network.Network(
      variables,
      encode=lambda v, images: {'stage4': body.apply(v['body'], images)},
      branches=lambda v, x, channels: x @ v['kernel'][channels],
      rest=lambda v, branches, features: tail.apply(v['tail'], branches + v['bias']))

gapjax's own networks: `deeplab` and `classifier`. What `cut.without` predicts with some channels
removed is there to look at: data/sheet.py.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gapjax import models
from gapjax.errors import UsageError
from gapjax.models.deeplab import DeepLab
from gapjax.models.heads import make_head
from gapjax.tasks.images import as_array, check_channels_last


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
  """What an attack needs of a network.

  Attributes:
    variables: whatever the functions take as their first argument, such as Flax variables.
    encode: (variables, images (b, h, w, 3)) -> features, a dict with `stage` (b, h', w', c), or
      (b, c), and whatever else the head reads. 'images' and the batch's 'number' are added.
    head: (variables, features) -> logits (b, ..., K). Not needed beside `branches` and `rest`.
    branches: (variables, x (b, h', w', k), channels (k,)) -> an array or a tree of arrays, linear
      in x: what these channels of `stage` add to it. The sum over disjoint channels is the whole.
    rest: (variables, branches, features) -> logits (b, ..., K).
    stage: the name of the cut.
    compiled: whether the functions are traced, and so must be pure; False calls them as they are.

  Raises:
    UsageError: there is neither `head` nor both `branches` and `rest`.
  """
  variables: Any
  encode: Callable
  head: Callable | None = None
  branches: Callable | None = None
  rest: Callable | None = None
  stage: str = 'stage4'
  compiled: bool = True

  def __post_init__(self):
    if (self.branches is None) != (self.rest is None) or (self.head or self.rest) is None:
      raise UsageError('a Network needs `head`, or both `branches` and `rest`, after `encode`')

  def features(self, images, number: int = 0) -> dict:
    """Features of images (b, h, w, 3), with 'images' and 'number'. Raises UsageError without
    `stage` among them."""
    if not isinstance(images, jax.Array):  # as they are where `encode` is, which may be torch's
      images = jnp.asarray(images) if self.compiled else np.asarray(images)
    features = self._encode(self.variables, images)
    if not isinstance(features, dict) or self.stage not in features:
      found = sorted(features) if isinstance(features, dict) else type(features).__name__
      raise UsageError(f'`encode` returns no `{self.stage}` but {found}; return a dict with it, or '
                       'name another `stage`')
    return {**features, 'images': images, 'number': np.int32(number)}

  def num_classes(self, features: dict) -> int:
    """K, the size of the logits' last axis; nothing is computed where functions can be traced."""
    if not self.compiled:
      return self._without(self.variables, features, True).shape[-1]
    return jax.eval_shape(self._logits, self.variables, features).shape[-1]

  def without(self, features: dict, channels=()) -> jax.Array:
    """The classes (b, ...) predicted with `channels` of the stage zeroed, from the cut on anew.

    Raises UsageError unless the channels are numbers of channels, since a mask or a fraction would
    be taken for others, and where a logit is not finite.
    """
    channels, n = np.asarray(channels), features[self.stage].shape[-1]
    if channels.size and (channels.dtype.kind not in 'iu' or channels.min() < 0
                          or channels.max() >= n):
      raise UsageError(f'channels must be integers from 0 to {n - 1}, not {channels.dtype} such as '
                       f'{channels.ravel()[0]}; of a mask take np.flatnonzero(mask)')
    keep = np.ones(n, bool)
    keep[channels.astype(int)] = False
    return _classes(self._without(self.variables, features, keep))

  def contribution(self, features: dict, channels, size: int) -> Any:
    """What `channels` (k,) add to the branches, computed as if they were `size` >= k channels, so
    that any number of them runs one compiled program. Others fill them up, as zeros: each channel
    is there once, since branches may scatter them."""
    others = np.setdiff1d(np.arange(features[self.stage].shape[-1]), channels)
    padded = np.concatenate([channels, others])[:size].astype(np.int32)
    return self._contribution(self.variables, features[self.stage], padded,
                              np.arange(len(padded)) < len(channels))

  def complete(self, features: dict, branches: Any) -> jax.Array:
    """The classes (b, ...) that the rest predicts from branches. Raises UsageError where a logit is
    not finite."""
    return _classes(self._complete(self.variables, branches, features))

  def _logits(self, variables, features):
    if self.head is not None:
      return self.head(variables, features)
    x = features[self.stage]
    return self.rest(variables, self.branches(variables, x, jnp.arange(x.shape[-1])), features)

  @functools.cached_property
  def _encode(self):
    return self._exact(self.encode)

  @functools.cached_property
  def _without(self):
    return self._exact(lambda variables, features, keep: self._logits(
      variables, {**features, self.stage: jnp.where(keep, features[self.stage], 0)}))

  @functools.cached_property
  def _contribution(self):
    return self._exact(lambda variables, x, channels, keep: self.branches(
      variables, jnp.where(keep, x[..., channels], 0), channels))

  @functools.cached_property
  def _complete(self):
    return self._exact(self.rest)

  def _exact(self, function):
    """The function with products in float32: a GPU's or TPU's default would be the larger error."""
    def exact(*arguments):
      with jax.default_matmul_precision('highest'):
        return function(*arguments)
    return jax.jit(exact) if self.compiled else exact


def maps_of(features: Callable, images) -> jax.Array:
  """features(images), maps (b, h', w', c) or their averages (b, c). Raises UsageError unless it is
  one."""
  if np.ndim(images) == 4:
    check_channels_last(images)
  maps = as_array(features(images), of='features', wanted="feature maps (b, h', w', c)")
  if maps.ndim not in (2, 4) or len(maps) != len(images):
    raise UsageError(f'`features` maps images {images.shape} to {maps.shape}; it should return '
                     "feature maps (b, h', w', c) or their averages (b, c)")
  if maps.ndim == np.ndim(images) == 4 and in_last_axes(maps.shape, images.shape):
    raise UsageError(f'`features` returns maps {maps.shape} that look like (b, c, h, w); return '
                     '(b, h, w, c), such as maps.transpose(0, 2, 3, 1) of an array')
  return maps


def in_last_axes(maps: tuple[int, ...], images: tuple[int, ...]) -> bool:
  """Whether maps of a shape (b, ., ., .) have the proportions of images (b, h, w, 3) in their last
  two axes and not in the two before, as no ordinary network makes them."""
  (_, height, width, _), (_, h, w, c) = images, maps
  if height == width:
    return w == c != h

  def fit(a, b):  # up to rounding
    return abs(a * width - b * height) <= max(height, width)

  return fit(w, c) and not fit(h, w)


def _classes(logits):
  """argmax over the last axis: (b, ..., K) -> (b, ...), uint8 where that holds them.

  Raises UsageError where a logit is infinite or NaN, which argmax would take for a class.
  """
  classes, finite = _argmax(logits)
  if not finite:
    raise UsageError('the network computes infinities or NaN; attack a checkpoint that did not '
                     'diverge')
  return classes


@jax.jit
def _argmax(logits):
  """A program of its own: XLA on CPU would fuse the upsampling with it and take half as long again.
  """
  classes = logits.argmax(-1).astype(jnp.uint8 if logits.shape[-1] <= 256 else jnp.int32)
  return classes, jnp.isfinite(logits.max(-1)).all()


def deeplab(model: DeepLab, variables) -> Network:
  """DeepLabv3 or v3+ cut at stage4, in float32 or better, on one device.

  variables: {'params', 'batch_stats'} as the model has them; images are normalised.
  """
  model = model.clone(dtype=jnp.promote_types(model.dtype, jnp.float32), axis_name=None)
  read = ('stage1', 'stage4') if model.variant == 'deeplabv3plus' else ('stage4',)
  convs = [name for name in variables['params'] if name.startswith('branch_convs')]

  def encode(variables, images):
    features = model.apply(variables, images, train=False, method='encode')
    return {name: features[name] for name in read}

  def branches(variables, x, channels):
    # Flax checks a kernel's shape against its input alone, so a slice of both is a smaller layer.
    def part(path, kernel):  # of (k, k, c, o), or (k, k, 1, c) where a separable one is depthwise
      return kernel[..., channels] if path[-2].key == 'depthwise' else kernel[:, :, channels]

    params = jax.tree_util.tree_map_with_path(
      part, {name: variables['params'][name] for name in convs})
    return model.apply({'params': params}, x, method='branches')

  def rest(variables, branches, features):
    return model.apply(variables, branches, features, size=features['images'].shape[1:3],
                       train=False, method='decode')

  return Network(variables, encode, branches=branches, rest=rest)


def classifier(model, variables, *, seed: int = 0) -> Network:
  """A classifier cut at its last stage: GAPNet, PermuteNet and the standard one.

  variables: {'params', 'batch_stats'}; images as the network takes them. PermuteNet's permutation
  is drawn anew for every batch, from `seed`, and is the same for all that is removed from it.

  Raises UsageError for a permutation before an earlier stage, which is none of the head's.
  """
  if model.permute is not None and model.permute_at != 'pooled':
    raise UsageError(f'a network that permutes at `{model.permute_at}` cannot be cut behind it; '
                     'train one with model.permute_at=pooled')
  dtype = jnp.promote_types(model.dtype, jnp.float32)
  model = model.clone(dtype=dtype, axis_name=None)
  head = make_head(model.head, model.num_classes, padding=model.padding, permute=model.permute,
                   dtype=dtype)
  key = jax.random.key(seed)
  stage = models.stages(model.variant)[-1]

  def encode(variables, images):
    _, features = model.apply(variables, images, train=False, rngs={'permutation': key})
    return {stage: features[stage]}

  def classify(variables, features):
    logits, _ = head.apply({'params': variables['params']['head']}, features[stage],
                           rngs={'permutation': jax.random.fold_in(key, features['number'])})
    return logits

  return Network(variables, encode, head=classify, stage=stage)
