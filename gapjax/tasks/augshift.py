"""AugShift, the pairwise-shift loss (section 4): two shifts of an image should pool to one vector.

The functions take arrays and work with any network. In a training step of one's own:

    pairs = random_shifts(key, images, max_shift=4)                     # (2, b, h, w, c)
    logits, features = network(pairs.reshape(-1, *images.shape[1:]))    # (2b, k), (2b, c)
    loss, parts = augshift_loss(logits, features, labels, weight=warm_up(step, 1.0, steps=500))

The paper gives the loss as a figure and no code; the weight and the range of the shift are not in
it.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Num, Shaped
from optax.losses import softmax_cross_entropy_with_integer_labels as cross_entropy

from gapjax import data as datasets
from gapjax.data.sheet import Sheet
from gapjax.errors import UsageError
from gapjax.tasks import consistency
from gapjax.tasks.images import as_keys, check_images, check_shift, random_flips
from gapjax.tasks.metrics import averages
from gapjax.tasks.resident import ResidentImages


@jax.jit
def augshift_loss(logits: Float[ArrayLike, '*pairs k'], features: Float[ArrayLike, '*pairs c'],
                  labels: Int[ArrayLike, ' b'], *, weight: Shaped[ArrayLike, ''],
                  ) -> tuple[Float[Array, ''], dict[str, Float[Array, '']]]:
  """AugShift (section 4): both crops' cross entropies, added, plus weight * MSE of their features.

  Of two cross entropies the sum is twice the usual loss: with SGD half the rate and twice the decay
  make a step what it would be on their mean.

  Args:
    logits: (2b, k), all first crops before all second ones, or (2, b, k): of the two crops of each
      image by the same classifier.
    features: (2b, c) or (2, b, c), their features after global average pooling by the same encoder.
    labels: (b,) integers in [0, k).
    weight: of the pairwise term, at least 0; 0 is the fair baseline that sees two crops too.

  Returns:
    The loss, a scalar: mean over b of the two cross entropies' sum, plus weight times the mean of
    (z1 - z2)^2 over b and c. And its parts, scalars: 'cross_entropy', 'distance' (that mean) and
    'relative_distance', the distance over the features' variance, since shrinking all features
    makes the distance small too. The variance is of this batch, or of what one device sees of it:
    an image or two say little.

  Raises:
    UsageError: the shapes are not those of two crops of b images; under jit, while tracing.
  """
  if isinstance(labels, tuple | list):
    raise UsageError('labels are a list; give an array of (b,) integers, such as '
                     'jnp.asarray(labels)')
  if jnp.ndim(labels) != 1 or not jnp.issubdtype(jnp.result_type(labels), jnp.integer):
    raise UsageError(f'labels must be (b,) integers, one an image, not {jnp.shape(labels)} '
                     f'{jnp.result_type(labels)}')
  b = len(labels)
  logits, features = _pairs('logits', logits, b), _pairs('features', features, b)
  entropy = cross_entropy(logits, jnp.broadcast_to(labels, logits.shape[:2])).mean(1).sum()
  distance = pair_distance(features)
  spread = features.var((0, 1)).mean()  # over crops and images, then channels
  return entropy + weight * distance, {
    'cross_entropy': entropy, 'distance': distance,
    'relative_distance': distance / jnp.maximum(spread, jnp.finfo(features.dtype).tiny)}


def pair_distance(features: Float[ArrayLike, '*pairs c']) -> Float[Array, '']:
  """AugShift's pairwise term alone (section 4), for a loss of one's own: the mean of (z1 - z2)^2
  over b and c.

  features: (2b, c), all first crops before all second ones, or (2, b, c).

  Raises UsageError on other shapes.
  """
  z1, z2 = _pairs('features', features)
  return jnp.square(z1 - z2).mean()


def _pairs(name, x, b=None):
  """x as (2, b, n), from that or (2b, n); where b is given it must be so many. In float32 or
  better: in float16 a square overflows from 256 on."""
  x = jnp.asarray(x)
  x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  pairs = x.reshape(2, -1, x.shape[-1]) if x.ndim == 2 and len(x) % 2 == 0 else x
  if pairs.ndim != 3 or len(pairs) != 2 or b not in (None, pairs.shape[1]):
    of_b = '' if b is None else f' with b = {b}, as labels has'
    raise UsageError(f'{name} must be (2b, n), all first crops before all second ones, or '
                     f'(2, b, n){of_b}, not {x.shape}')
  return pairs


def random_shifts(key: Shaped[Array, '*keys'], images: Num[ArrayLike, 'b h w c'], *,
                  max_shift: int, count: int = 2) -> Num[Array, 'count b h w c']:
  """`count` shifts of each image, independent and uniform in [-max_shift, max_shift]^2.

  Args:
    key: one key (), or one an image (b,).
    images: (b, h, w, c), normalised, so that the zeros that fill the border are the mean colour.
    max_shift: pixels.
    count: shifts of each image; a pair by default.

  Returns:
    (count, b, h, w, c); `.reshape(-1, h, w, c)` is one batch of all first shifts before all second
    ones.

  Raises:
    UsageError: images have other axes; keys are more or fewer; max_shift is negative, or not
      smaller than the image.
  """
  images = jnp.asarray(images)
  check_images(images)
  key = as_keys(key)
  b, h, w, _ = images.shape
  check_shift('a shift', max_shift, h, w)
  if key.shape not in ((), (b,)):
    raise UsageError(f'keys {key.shape} are neither one () nor one an image {(b,)}; give one, such '
                     'as jax.random.key(0)')
  keys = jax.random.split(key, b) if key.ndim == 0 else key
  offsets = jax.vmap(lambda k: jax.random.randint(k, (count, 2), 0, 2 * max_shift + 1))(keys)
  padded = jnp.pad(images, ((0, 0), (max_shift, max_shift), (max_shift, max_shift), (0, 0)))

  def crop(image, offset):
    return lax.dynamic_slice(image, (offset[0], offset[1], 0), images.shape[1:])

  return jax.vmap(jax.vmap(crop), (None, 1))(padded, offsets)  # the shifts are mapped outside


def warm_up(step: jax.Array | int, weight: float, *, steps: int) -> jax.Array:
  """The weight of the pairwise term, linear from 0 to `weight` in `steps` steps (0: at once)."""
  return weight * jnp.clip(step / steps, 0, 1) if steps else jnp.asarray(weight)


@dataclasses.dataclass(frozen=True, eq=False)
class AugShiftTask(ResidentImages):
  """Classification of randomly shifted images; with two shifts of each, AugShift.

  Attributes, beside those of every Task:
    crops: shifts of each training image: 1, the usual augmentation, or 2, the pairwise loss.
    max_shift: each shift is uniform in [-max_shift, max_shift]^2 pixels.
    weight: of the pairwise term.
    warm_up_steps: over which the weight rises from 0.
    stacked: both crops go through the network as one batch, with one BatchNorm statistic; or one
      after the other, each normalised by its own.
    map_offsets: shifts along each axis that the accuracy map is made of; see consistency.py.
  """
  num_classes: int
  crops: int = 1
  max_shift: int = 4
  weight: float = 1.0
  warm_up_steps: int = 0
  stacked: bool = True
  map_offsets: tuple[int, ...] = (0,)

  @classmethod
  def of(cls, config, train_set, *, dtype, axis_name=None) -> 'AugShiftTask':
    """The task of a config. Raises UsageError where a shift is as large as the images."""
    height, width = train_set.images.shape[1:3]
    for name, shift in (('augshift.max_shift', config.augshift.max_shift),
                        ('eval.shift', config.eval.shift),
                        ('eval.max_shift', config.eval.max_shift)):
      check_shift(f'{name}={shift}: a shift', shift, height, width)
    mean, std = datasets.normalisation(train_set.name, train_set.images)
    c, reach = config.augshift, config.eval.max_shift // config.eval.map_step
    return cls(
      mean=mean, std=std, flip=config.data.flip, dtype=dtype,
      num_classes=len(train_set.class_names), crops=c.crops, max_shift=c.max_shift,
      weight=c.weight, stacked=c.stacked,
      warm_up_steps=round(c.warm_up * config.num_epochs * len(train_set) / config.batch_size),
      map_offsets=tuple(config.eval.map_step * i for i in range(-reach, reach + 1)))

  @staticmethod
  def describe(config) -> str:
    c = config.augshift
    return f'head {config.model.head}, ' + (
      f'two crops, pairwise weight {c.weight} on' if c.crops == 2 else 'one crop of')

  def train_batch(self, keys: jax.Array, data: Mapping[str, Any],
                  indices: jax.Array) -> dict[str, jax.Array]:
    """The training examples `indices` (b,) of data, each augmented by its own key (b,).

    Returns 'images' (crops, b, h, w, 3) and 'labels' (b,).
    """
    images = self.normalised(data['images'][indices])
    if self.flip:
      images = random_flips(keys, images)
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, 2)
    return {'images': random_shifts(keys, images, max_shift=self.max_shift, count=self.crops),
            'labels': data['labels'][indices]}

  def loss(self, network, batch: Mapping[str, jax.Array],
           step: jax.Array) -> tuple[jax.Array, dict]:
    """The training loss of a batch, a scalar, and its metrics; network: a TrainingNetwork."""
    images, labels = batch['images'], batch['labels']
    if self.stacked:
      logits, features = network(images.reshape(-1, *images.shape[2:]))  # (crops * b, ...)
      logits, z = (x.reshape(*images.shape[:2], -1) for x in (logits, features['pooled']))
    else:
      outputs = [network(crop) for crop in images]
      logits = jnp.stack([logits for logits, _ in outputs])  # (crops, b, k)
      z = jnp.stack([features['pooled'] for _, features in outputs])  # (crops, b, c)
    correct = (logits.argmax(-1) == labels).mean(0).astype(logits.dtype)  # (b,), over the crops
    if self.crops == 1:
      losses = cross_entropy(logits[0], labels)
      return losses.mean(), averages(loss=losses, accuracy=correct)
    weight = warm_up(step, self.weight, steps=self.warm_up_steps)
    loss, parts = augshift_loss(logits, z, labels, weight=weight)
    return loss, averages(
      loss=jnp.broadcast_to(loss, labels.shape), accuracy=correct,
      relative_distance=jnp.broadcast_to(parts['relative_distance'], labels.shape))

  def samples(self, train_set, *, seed: int, count: int = 12) -> Sheet:
    """Training images as the network sees them, all first crops before all second ones."""
    few, batch = self.first_batch(train_set, seed=seed, count=count // self.crops)
    labels = [few.class_names[label] for label in few.labels] * self.crops
    return Sheet([*zip(labels, np.concatenate(self.shown(batch['images'])), strict=True)],
                 columns=6)

  def eval_inputs(self, data, common, batch) -> jax.Array:
    """Test examples batch['index'] (b,), each moved by batch['offset'] (b, v, 2): (v * b, ...)."""
    return consistency.shifted_views(self.normalised(data['images'][batch['index']]),
                                     batch['offset'], protocol=common['protocol'],
                                     max_shift=common['max_shift'])

  def eval_counts(self, logits, features, data, common, batch) -> dict[str, jax.Array]:
    """Sums over a batch of views, padding left out; see consistency.counts."""
    return consistency.counts(logits, features['pooled'], data['labels'][batch['index']], batch,
                              centre=common['centre'], num_cells=len(self.map_offsets) ** 2)

  def evaluation(self, config, test_set, counter) -> consistency.ShiftEvaluation:
    return consistency.ShiftEvaluation(config, self, test_set, counter)
