"""Semantic segmentation: the loss with void pixels, exact confusion counts, mIoU by region.

Labels are (b, h, w); what lies outside [0, num_classes), such as 255, is void and counts nowhere.
"""

import collections
import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from optax.losses import softmax_cross_entropy_with_integer_labels as cross_entropy

from gapjax import data as datasets
from gapjax.data import sheet
from gapjax.data.catalogue import VOID
from gapjax.errors import UsageError, check_choice
from gapjax.models import NORMALISATIONS
from gapjax.tasks.metrics import averages
from gapjax.tasks.protocol import Evaluation, Task, evaluated

# name -> (top, left, bottom, right), fractions of the image's size, rounded down to pixels: left
# and right are the columns [0, w // 2) and [w // 2, w).
REGIONS = {'all': (0.0, 0.0, 1.0, 1.0), 'left': (0.0, 0.0, 1.0, 0.5), 'right': (0.0, 0.5, 1.0, 1.0),
           'top': (0.0, 0.0, 0.5, 1.0), 'bottom': (0.5, 0.0, 1.0, 1.0),
           'center': (0.0, 0.25, 1.0, 0.75)}  # the authors': at full height


def region(where: str | Sequence[float]) -> tuple[float, float, float, float]:
  """A rectangle (top, left, bottom, right) in fractions of the image, from a name, 'T,L,B,R' or
  four numbers.

  Raises UsageError on an unknown name or a rectangle that is empty or leaves the image.
  """
  if isinstance(where, str) and where in REGIONS:
    return REGIONS[where]
  try:
    numbers = where.split(',') if isinstance(where, str) else where
    top, left, bottom, right = map(float, numbers)
  except (TypeError, ValueError):
    raise UsageError(f'unknown region `{where}`; known: {", ".join(REGIONS)}, or a rectangle '
                     'TOP,LEFT,BOTTOM,RIGHT in fractions such as 0,0.5,1,1') from None
  if not (0 <= top < bottom <= 1 and 0 <= left < right <= 1):
    raise UsageError(f'region {where} is empty or leaves the image: TOP,LEFT,BOTTOM,RIGHT are '
                     'fractions with 0 <= top < bottom <= 1 and 0 <= left < right <= 1')
  return top, left, bottom, right


def object_classes(names: Sequence[str], class_names: Sequence[str], *, dataset: str) -> list[int]:
  """The labels of the object of interest's classes. Raises UsageError on a name that is none of the
  dataset's."""
  names = [*map(str, names)]  # a class may be called 1, which a flag reads as a number
  for name in names:
    check_choice(name, class_names, what=f'class of {dataset} in neurons.classes')
  return [class_names.index(name) for name in names]


def check_sizes(model, scenes, *, padded: bool, way: str) -> None:
  """Raises UsageError, with a way out, unless a network whose downsampling needs even sizes, or
  whose padding maps larger than itself, takes the scenes that it will be evaluated on. Shapes alone
  are traced, each once; nothing is computed.

  scenes: data.Scenes; only their sizes are read. padded: whether all are filled up to one shape.
  """
  @functools.cache
  def trace(height, width):
    try:
      jax.eval_shape(lambda image: model.init(jax.random.key(0), image, train=False),
                     jax.ShapeDtypeStruct((1, height, width, 3), jnp.float32))
    except UsageError as error:
      raise UsageError(f'the evaluated scenes have {height}x{width} pixels: {error}, or use '
                       f'{way}') from None

  sizes = [scenes.size(i) for i in range(len(scenes))]
  for size in [np.max(sizes, 0).tolist()] if padded else sizes:
    trace(*size)


def check_labels(scenes) -> None:
  """Raises UsageError where all pixels are void: there is nothing to train on or to measure.

  scenes: data.Scenes; they are read until one has a pixel with a class, so mostly the first alone.
  """
  if not any((scene['label'] < len(scenes.class_names)).any() for scene in scenes):
    raise UsageError(f'no pixel of the {len(scenes)} scenes of {scenes.name} has a class, all are '
                     'void: choose another split, as data.train_split or data.eval_split')


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


def inside(rectangle, sizes: jax.Array, shape: tuple[int, int]) -> jax.Array:
  """Which pixels of a batch lie in a rectangle: (b, h, w) bool.

  sizes: (b, 2) integers, each image's height and width; the image stands in the top left corner of
  an array of `shape`.
  """
  masks = []
  for n, low, high, axis in zip(shape, rectangle[:2], rectangle[2:], (1, 2), strict=True):
    size = sizes[:, axis - 1, None]
    pixels = jnp.arange(n)
    masks.append((pixels >= jnp.floor(low * size)) & (pixels < jnp.floor(high * size)))
  return masks[0][:, :, None] & masks[1][:, None, :]


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
  """Intersection over union of each class, (num_classes,), and their mean, fractions, from a
  confusion matrix (num_classes, num_classes), [true, predicted].

  A class that occurs in no label and is never predicted has NaN and is left out of the mean; one
  that is only predicted counts as 0, as in the authors' code.
  """
  matrix = np.asarray(matrix, np.int64)
  hit, true, taken = np.diag(matrix), matrix.sum(1), matrix.sum(0)
  union = true + taken - hit
  per_class = np.where(union > 0, hit / np.maximum(union, 1), np.nan)
  return per_class, float(np.nanmean(per_class)) if union.any() else float('nan')


@dataclasses.dataclass(frozen=True, eq=False)
class SegmentationTask(Task):
  """A class for every pixel. Images are normalised as published weights of the backbone expect it.

  Attributes, beside those of every Task:
    loss_name: 'cross_entropy' or 'focal' (Lin et al. 2017): (1 - p)^gamma times cross entropy, p
      the true class' probability.
    gamma: the focal loss' exponent.
    axis_name: the pmap axis; the loss is the mean over all its pixels that are not void.
    crop, scale: of the training images; see data.training_batches.
  """
  num_classes: int
  loss_name: str = 'cross_entropy'
  gamma: float = 2.0
  axis_name: str | None = None
  crop: tuple[int, int] = (513, 513)
  scale: tuple[float, float] = (0.5, 2.0)
  dense = True
  load_split = staticmethod(datasets.load_scenes)

  @classmethod
  def of(cls, config, train_set, *, dtype, axis_name) -> 'SegmentationTask':
    c, (mean, std) = config.segmentation, np.array(NORMALISATIONS[config.model.backbone])
    return cls(mean=mean, std=std, num_classes=len(train_set.class_names), loss_name=c.loss,
               gamma=c.gamma, axis_name=axis_name, crop=tuple(c.crop), scale=tuple(c.scale),
               flip=c.flip, dtype=dtype)

  @staticmethod
  def check_data(config, *, data_dir) -> None:
    for split in (config.data.train_split, config.data.eval_split, config.neurons.split):
      scenes = datasets.load_scenes(config.data.name, split=split, data_dir=data_dir)
      object_classes(config.neurons.classes, scenes.class_names, dataset=config.data.name)

  @staticmethod
  def describe(config) -> str:
    return f'{config.model.backbone}, output stride {config.model.output_stride}, scenes of'

  @property
  def fill(self) -> np.ndarray:
    """The colour around a scene, (3,) uint8: normalised it is about 0, as what convolutions pad."""
    return np.rint(255 * self.mean).astype(np.uint8)

  def input_shape(self, train_set) -> tuple[int, int]:
    return self.crop

  def resident(self, dataset) -> dict[str, np.ndarray]:
    """Nothing: scenes stay on disk."""
    return {}

  def host_batches(self, train_set, *, batch_size, seed, num_hosts=1, host=0):
    """Random crops of scaled scenes, by Grain. Raises UsageError as `check_labels` does."""
    check_labels(train_set)
    return datasets.training_batches(
      train_set, batch_size=batch_size, seed=seed, crop_size=self.crop, scale=self.scale,
      flip=self.flip, fill=self.fill, num_hosts=num_hosts, host=host)

  def samples(self, train_set, *, seed: int, count: int = 6) -> sheet.Sheet:
    """The first training crops and their labels."""
    batch = self.host_batches(train_set, batch_size=count, seed=seed).at(0)
    return sheet.scenes([{'image': image, 'truth': labels} for image, labels
                         in zip(batch['images'], batch['labels'], strict=True)],
                        class_names=train_set.class_names, palette=train_set.palette)

  def train_batch(self, keys, data, examples: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Examples come augmented from the host: 'images' (b, h, w, 3) uint8, 'labels' (b, h, w)."""
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

  def loss(self, network, batch, step) -> tuple[jax.Array, dict]:
    """The mean loss of the batch's pixels, and its metrics; network: see steps.TrainingNetwork."""
    logits, _ = network(batch['images'])
    losses, valid = self.losses(logits, batch['labels'])
    total, share = valid.sum(), 1
    if self.axis_name is not None:  # gradients are averaged over devices, pixels are not equal
      total, share = lax.psum((total, 1), self.axis_name)
    correct = (logits.argmax(-1) == batch['labels']).astype(losses.dtype)
    return losses.sum() * share / jnp.maximum(total, 1), averages(
      loss=losses.ravel(), accuracy=correct.ravel(), mask=valid.ravel())

  def eval_inputs(self, data, common, batch) -> jax.Array:
    """Whole images, batch['images'] (b, h, w, 3) uint8."""
    return self.normalised(batch['images'])

  def eval_counts(self, logits, features, data, common, batch) -> dict[str, jax.Array]:
    """'matrix' (REGIONS, K, K) int32, and 'loss' and 'count', sums over pixels that count.

    batch['labels'] (b, h, w) is void where an image, or the batch, is filled up; batch['size']
    (b, 2) is each image's own size, which regions are fractions of.
    """
    labels = batch['labels'].astype(jnp.int32)
    losses, valid = self.losses(logits, labels)
    regional = by_region(labels, batch['size'], REGIONS.values())
    return {'matrix': confusions(logits.argmax(-1), regional, self.num_classes),
            'loss': losses.sum(), 'count': valid.sum()}

  def evaluation(self, config, test_set, counter) -> 'SceneEvaluation':
    return SceneEvaluation(config, self, test_set, counter)


class SceneEvaluation(Evaluation):
  """mIoU of the evaluated split at its images' size, of exact counts; see protocol.Evaluation.

  Images of one size share batches and a compiled step: exact whatever the sizes. With eval.padded
  all are filled up to one shape (one program, as a TPU wants it), with the mean colour; then
  padding enters the image-pooling branch and the borders' receptive fields, and mIoU differs a
  little.

  Raises UsageError where neurons.classes names what is no class of the dataset, or no pixel has a
  class: before an epoch of training, not after.
  """

  def __init__(self, config, task, test_set, counter):
    super().__init__(config, task, test_set, counter)
    object_classes(config.neurons.classes, test_set.class_names, dataset=config.data.name)
    check_labels(test_set)

  def during(self, state) -> dict:
    return self.final(state)

  def final(self, state, *, progress=False, brief=False) -> dict:
    """{'accuracy' (of pixels), 'loss', 'miou', 'miou_left' and so on, 'per_class'}: fractions but
    for the loss.

    A class that does not occur is None in 'per_class', (K,), and so is the mIoU of a region that is
    void.
    """
    k, totals = self.task.num_classes, []
    zeros = {'matrix': np.zeros((len(REGIONS), k, k), np.int32),
             'loss': np.zeros((), self.task.dtype), 'count': np.zeros((), np.int32)}
    with evaluated(len(self.test_set), progress=progress) as bar:
      for batch in scene_batches(self.test_set, self.counter.batch_size, rows=self.counter.rows,
                                 padded=self.config.eval.padded, fill=self.task.fill):
        # A batch fits int32; the sum over a set (6e9 pixels in Cityscapes) does not.
        counts = self.counter.count(state, zeros, [batch], local=True, bar=bar)
        totals.append({name: np.float64(value) if name == 'loss' else np.int64(value)
                       for name, value in counts.items()})
    return measures(jax.tree.map(lambda *parts: sum(parts), *totals))

  def pictures(self, state) -> dict[str, sheet.Sheet]:
    """Scenes from the whole split, their labels and the network's classes."""
    rows = [{'image': scene['image'], 'truth': scene['label'],
             'prediction': self.counter.predict(state, scene['image'])}
            for scene in spread_out(self.test_set)]
    return {'predictions.png': sheet.scenes(rows, class_names=self.test_set.class_names,
                                            palette=self.test_set.palette)}

  def summary(self, final: dict, evaluations: list[dict]) -> dict:
    best = max(evaluations, key=lambda line: line['miou'])
    return {'final': _named(final), 'best': {'miou_best': best['miou'], 'step': best['step']},
            'per_class': dict(zip(self.test_set.class_names, final['per_class'], strict=True))}

  def report(self, state) -> dict:
    """All metrics of a checkpoint."""
    final = self.final(state, progress=True)
    return {**_named(final), 'loss': final['loss'], 'per_class': final['per_class']}


def measures(totals) -> dict:
  """The numbers of an evaluation from its sums, as `SceneEvaluation.final` returns them."""
  matrices = dict(zip(REGIONS, totals['matrix'], strict=True))
  per_class, miou = iou(matrices['all'])
  known = {f'miou_{name}': iou(matrix)[1] for name, matrix in matrices.items() if name != 'all'}
  regions = {name: None if np.isnan(value) else value for name, value in known.items()}
  return {'accuracy': float(np.trace(matrices['all']) / matrices['all'].sum()),
          'loss': float(totals['loss'] / totals['count']), 'miou': miou, **regions,
          'per_class': [None if np.isnan(value) else float(value) for value in per_class]}


def _named(line):
  """The numbers of an evaluation by the names that summaries and tables give them."""
  return {'pixel_accuracy': line['accuracy'], **{name: value for name, value in line.items()
                                                 if name.startswith('miou')}}


def scene_batches(scenes, batch_size: int, *, fill: np.ndarray, padded: bool = False,
                  rows: slice = slice(None)):
  """Yields (batch, how many scenes it holds), every scene once; batches are planned by sizes alone.

  batch: 'images' (batch_size, h, w, 3) uint8, 'labels' (batch_size, h, w) uint8, 'size'
  (batch_size, 2) int32, each image's own. Scenes of one size share batches; if `padded`, all have
  the shape of the largest ones. What is filled up has the colour `fill`, (3,) uint8, and is void.

  rows: of each batch only these are decoded, and it has no others: one process' share.
  """
  shapes, waiting = [scenes.size(i) for i in range(len(scenes))], collections.defaultdict(list)
  if padded:
    shapes = [tuple(np.max(shapes, 0).tolist())] * len(shapes)
  for i, shape in enumerate(shapes):
    bucket = waiting[shape]
    bucket.append(i)
    if len(bucket) == batch_size:
      yield _stack(scenes, bucket[rows], shape, fill), batch_size
      bucket.clear()
  for shape, bucket in waiting.items():
    if bucket:
      filled = bucket + [None] * (batch_size - len(bucket))
      yield _stack(scenes, filled[rows], shape, fill), len(bucket)


def _stack(scenes, indices, shape, fill):
  """The batch of these scenes, filled up to `shape`; None is a row without one."""
  images = np.empty((len(indices), *shape, 3), np.uint8)
  images[:] = fill
  labels = np.full((len(indices), *shape), VOID, np.uint8)
  sizes = np.full((len(indices), 2), shape, np.int32)
  for row, i in enumerate(indices):
    if i is not None:
      scene = scenes[i]
      sizes[row] = h, w = scene['label'].shape
      images[row, :h, :w], labels[row, :h, :w] = scene['image'], scene['label']
  return {'images': images, 'labels': labels, 'size': sizes}


def spread_out(scenes, count: int = 4) -> list[dict]:
  """A few scenes in equal distances."""
  return [scenes[int(i)] for i in np.linspace(0, len(scenes) - 1, min(count, len(scenes)))]
