"""Semantic segmentation: the loss with void pixels, exact confusion counts, mIoU by region.

Labels are (b, h, w); what lies outside [0, num_classes), such as 255, is void and counts nowhere.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from optax.losses import softmax_cross_entropy_with_integer_labels as cross_entropy

from gapjax.errors import UsageError, check_choice
from gapjax.tasks.images import normalise
from gapjax.tasks.metrics import TrainMetrics

VOID = 255
# name -> (top, left, bottom, right), fractions of the image's size, rounded down to pixels: left
# and right are the columns [0, w // 2) and [w // 2, w).
REGIONS = {'all': (0.0, 0.0, 1.0, 1.0), 'left': (0.0, 0.0, 1.0, 0.5), 'right': (0.0, 0.5, 1.0, 1.0),
           'top': (0.0, 0.0, 0.5, 1.0), 'bottom': (0.5, 0.0, 1.0, 1.0),
           'center': (0.0, 0.25, 1.0, 0.75)}  # the authors': at full height


def region(where: str | Sequence[float]) -> tuple[float, float, float, float]:
  """A rectangle (top, left, bottom, right) in fractions of the image, from a name or 'T,L,B,R'.

  Raises UsageError on an unknown name or a rectangle that is empty or leaves the image.
  """
  if where in REGIONS:
    return REGIONS[where]
  try:
    numbers = where.split(',') if isinstance(where, str) else where
    top, left, bottom, right = map(float, numbers)
  except ValueError:
    raise UsageError(f'unknown region `{where}`; known: {", ".join(REGIONS)}, or a rectangle '
                     'TOP,LEFT,BOTTOM,RIGHT in fractions such as 0,0.5,1,1') from None
  if not (0 <= top < bottom <= 1 and 0 <= left < right <= 1):
    raise UsageError(f'region {where} is empty or leaves the image: TOP,LEFT,BOTTOM,RIGHT are '
                     'fractions with 0 <= top < bottom <= 1 and 0 <= left < right <= 1')
  return top, left, bottom, right


def object_classes(names: Sequence[str], class_names: Sequence[str], *, dataset: str) -> list[int]:
  """The labels of the object of interest's classes. Raises UsageError on a name that is none of the
  dataset's."""
  for name in names:
    check_choice(name, class_names, what=f'class of {dataset} in neurons.classes')
  return [class_names.index(name) for name in names]


def check_sizes(model, scenes, *, padded: bool) -> None:
  """Raises UsageError unless a network with polyphase downsampling, which needs even sizes, takes
  the scenes that it will be evaluated on. Shapes alone are traced, each once; nothing is computed.

  scenes: dicts with 'label' (h, w). padded: whether all are filled up to one shape.
  """
  @functools.cache
  def trace(height, width):
    try:
      jax.eval_shape(lambda image: model.init(jax.random.key(0), image, train=False),
                     jax.ShapeDtypeStruct((1, height, width, 3), jnp.float32))
    except UsageError as error:
      raise UsageError(f'the evaluated scenes have {height}x{width} pixels: {error}, or use '
                       'model.downsample=blur') from None

  sizes = (scenes[i]['label'].shape for i in range(len(scenes)))
  for size in [np.max(list(sizes), 0).tolist()] if padded else sizes:
    trace(*size)


def confusion(predicted: jax.Array, labels: jax.Array, num_classes: int) -> jax.Array:
  """How often each class is taken for which: (num_classes, num_classes) int32, [true, predicted].

  predicted: (b, h, w) integers in [0, num_classes). labels: (b, h, w); others than those are void.
  On a TPU an image may have up to 2^24 pixels.
  """
  # Counting is 10 to 50 times faster than products on a CPU; a TPU has no fast scatter.
  return lax.platform_dependent(
    predicted, labels, tpu=functools.partial(_products, num_classes=num_classes),
    default=functools.partial(_counts, num_classes=num_classes))


def confusions(predicted: jax.Array, regional: jax.Array, num_classes: int) -> jax.Array:
  """The confusion of every region, (regions, K, K) int32; regional: see `by_region`."""
  return jnp.stack([confusion(predicted, labels, num_classes) for labels in regional])


def by_region(labels: jax.Array, sizes: jax.Array, rectangles: Sequence) -> jax.Array:
  """Labels (b, h, w), void (-1) outside each rectangle: (regions, b, h, w) int32; sizes: see
  `inside`."""
  labels = labels.astype(jnp.int32)
  return jnp.stack([jnp.where(inside(rectangle, sizes, labels.shape[1:]), labels, -1)
                    for rectangle in rectangles])


def _counts(predicted, labels, *, num_classes):
  predicted, labels = (x.astype(jnp.int32) for x in (predicted, labels))
  valid, void = (labels >= 0) & (labels < num_classes), num_classes ** 2
  place = jnp.where(valid, labels * num_classes + predicted, void)
  counts = jnp.bincount(place.ravel(), length=void + 1)[:void]
  return counts.reshape(num_classes, num_classes).astype(jnp.int32)


def _products(predicted, labels, *, num_classes):
  b = labels.shape[0]  # one image's sums are exact in float32 up to 2^24 pixels
  true, taken = (jax.nn.one_hot(x.reshape(b, -1), num_classes, dtype=jnp.float32)
                 for x in (labels, predicted))  # (b, h * w, num_classes); void is all zeros
  counts = jnp.einsum('bpt,bpq->btq', true, taken, precision=lax.Precision.HIGHEST)
  return counts.astype(jnp.int32).sum(0, dtype=jnp.int32)  # float64 mode would make it int64


def iou(matrix) -> tuple[np.ndarray, float]:
  """Intersection over union of each class, (num_classes,), and their mean, from a confusion matrix.

  A class that occurs in no label and is never predicted has NaN and is left out of the mean; one
  that is only predicted counts as 0, as in the authors' code.
  """
  matrix = np.asarray(matrix, np.int64)
  hit, true, taken = np.diag(matrix), matrix.sum(1), matrix.sum(0)
  union = true + taken - hit
  per_class = np.where(union > 0, hit / np.maximum(union, 1), np.nan)
  return per_class, float(np.nanmean(per_class)) if union.any() else float('nan')


@dataclasses.dataclass(frozen=True, eq=False)
class SegmentationTask:
  """A class for every pixel.

  Attributes:
    mean, std: (3,), normalisation on the [0, 1] scale.
    num_classes: K.
    loss_name: 'cross_entropy' or 'focal' (Lin et al. 2017): (1 - p)^gamma times cross entropy, p
      the true class' probability.
    gamma: the focal loss' exponent.
    axis_name: the pmap axis; the loss is the mean over all its pixels that are not void.
    dtype: of the images.
  """
  mean: np.ndarray
  std: np.ndarray
  num_classes: int
  loss_name: str = 'cross_entropy'
  gamma: float = 2.0
  axis_name: str | None = None
  dtype: jnp.dtype = jnp.float32
  grid = 1  # the image is the whole input

  def normalised(self, images: jax.Array) -> jax.Array:
    return normalise(images, mean=self.mean, std=self.std, dtype=self.dtype)

  def train_batch(self, keys, data, examples: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Examples come augmented from the host: 'images' (b, h, w, 3) uint8, 'labels' (b, h, w)."""
    del keys, data
    return {'images': self.normalised(examples['images']),
            'labels': examples['labels'].astype(jnp.int32)}

  def losses(self, logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Loss of each pixel, 0 where void, and whether it counts: (b, h, w) each."""
    valid = (labels >= 0) & (labels < self.num_classes)
    losses = cross_entropy(logits, jnp.where(valid, labels, 0))
    if self.loss_name == 'focal':
      wrong = -jnp.expm1(-losses)  # 1 - p; its power has no derivative at 0
      factor = jnp.where(wrong > 0, jnp.where(wrong > 0, wrong, 1) ** self.gamma, 0 ** self.gamma)
      losses = factor * losses
    return jnp.where(valid, losses, 0), valid

  def loss(self, network, batch, step) -> tuple[jax.Array, TrainMetrics]:
    """The mean loss of the batch's pixels, and its metrics; network: see steps.Network."""
    del step
    logits, _ = network(batch['images'])
    losses, valid = self.losses(logits, batch['labels'])
    total, share = valid.sum(), 1
    if self.axis_name is not None:  # gradients are averaged over devices, pixels are not equal
      total, share = lax.psum((total, 1), self.axis_name)
    correct = (logits.argmax(-1) == batch['labels']).astype(losses.dtype)
    return losses.sum() * share / jnp.maximum(total, 1), TrainMetrics.single_from_model_output(
      loss=losses.ravel(), correct=correct.ravel(), mask=valid.ravel())

  def eval_inputs(self, data, common, batch) -> jax.Array:
    """Whole images, batch['images'] (b, h, w, 3) uint8."""
    del data, common
    return self.normalised(batch['images'])

  def eval_counts(self, logits, features, data, common, batch) -> dict[str, jax.Array]:
    """'matrix' (REGIONS, K, K) int32, and 'loss' and 'count', sums over pixels that count.

    batch['labels'] (b, h, w) is void where an image, or the batch, is filled up; batch['size']
    (b, 2) is each image's own size, which regions are fractions of.
    """
    del features, data, common
    labels = batch['labels'].astype(jnp.int32)
    losses, valid = self.losses(logits, labels)
    regional = by_region(labels, batch['size'], REGIONS.values())
    return {'matrix': confusions(logits.argmax(-1), regional, self.num_classes),
            'loss': losses.sum(), 'count': valid.sum()}


def inside(rectangle, sizes: jax.Array, shape: tuple[int, int]) -> jax.Array:
  """Which pixels of a batch lie in a rectangle: (b, h, w) bool.

  sizes: (b, 2) integers, each image's height and width; the image stands in the top left corner of
  an array of `shape`.
  """
  masks = []
  for n, low, high, axis in zip(shape, rectangle[:2], rectangle[2:], (1, 2), strict=True):
    size = sizes[:, axis - 1, None]
    place = jnp.arange(n)
    masks.append((place >= jnp.floor(low * size)) & (place < jnp.floor(high * size)))
  return masks[0][:, :, None] & masks[1][:, None, :]
