"""The canvas task (section 3): an image pasted at one of k x k locations; say where, or say what.

Everything here runs on the device, inside the jitted step, on uint8 images.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, UInt8
from optax.losses import softmax_cross_entropy_with_integer_labels as cross_entropy

from gapjax import data as datasets
from gapjax.data.sheet import Sheet
from gapjax.errors import UsageError
from gapjax.tasks.images import index_batches, random_flips
from gapjax.tasks.metrics import averages
from gapjax.tasks.protocol import Evaluation, evaluated
from gapjax.tasks.resident import ResidentImages


def paste(patches: Float[ArrayLike, 'b s s c'], locations: Int[ArrayLike, ' b'], *, grid: int,
          fill: Float[ArrayLike, ' c']) -> Float[Array, 'b {grid}*s {grid}*s c']:
  """Pastes each patch into its own canvas.

  Args:
    patches: (b, s, s, c).
    locations: (b,) integers, row * grid + column.
    grid: k, the canvas has k x k locations.
    fill: (c,), the value of every other pixel.

  Returns:
    (b, k * s, k * s, c) canvases.
  """
  b, s, _, c = patches.shape
  here = jax.nn.one_hot(locations, grid * grid, dtype=bool).reshape(b, grid, 1, grid, 1, 1)
  tiles = patches[:, None, :, None]  # (b, s, s, c) -> (b, 1, s, 1, s, c)
  canvas = jnp.where(here, tiles, fill.astype(patches.dtype))  # (b, k, s, k, s, c)
  return canvas.reshape(b, grid * s, grid * s, c)


@dataclasses.dataclass(frozen=True, eq=False)
class CanvasTask(ResidentImages):
  """Inputs, targets, loss and metrics of location or image classification on a canvas.

  Attributes, beside those of every Task:
    grid: k.
    target: 'location' (k * k classes) or 'image'.
    fill: 'zero' pads after normalising, as the authors do, so that their "black" is the mean
      colour; 'black' pads with black pixels.
    num_image_classes: classes of the dataset.
  """
  grid: int
  target: str
  fill: str
  num_image_classes: int

  @classmethod
  def of(cls, config, train_set, *, dtype, axis_name=None) -> 'CanvasTask':
    """The task of a config. Raises UsageError unless the images are square."""
    (height, width), c = train_set.images.shape[1:3], config.canvas
    if height != width:
      raise UsageError(f'the images of {train_set.name} are {height}x{width}, and a canvas is made '
                       'of squares; set data.image_size')
    mean, std = datasets.normalisation(train_set.name, train_set.images)
    return cls(grid=c.grid, target=c.target, fill=c.fill, mean=mean, std=std, dtype=dtype,
               num_image_classes=len(train_set.class_names), flip=config.data.flip)

  @staticmethod
  def describe(config) -> str:
    c = config.canvas
    return f'head {config.model.head}, {c.target} on a {c.grid}x{c.grid} canvas of'

  def input_shape(self, train_set) -> tuple[int, int]:
    return tuple(side * self.grid for side in train_set.images.shape[1:3])

  @property
  def num_locations(self) -> int:
    return self.grid * self.grid

  @property
  def num_classes(self) -> int:
    """Logits that the network needs."""
    return self.num_locations if self.target == 'location' else self.num_image_classes

  def canvases(self, images: UInt8[ArrayLike, 'b s s 3'], locations: Int[ArrayLike, ' b'],
               ) -> Float[Array, 'b {self.grid}*s {self.grid}*s 3']:
    """uint8 (b, s, s, 3) images and (b,) locations -> normalised (b, k * s, k * s, 3) canvases."""
    black = self.normalised(jnp.zeros(3))
    fill = jnp.zeros_like(black) if self.fill == 'zero' else black
    return paste(self.normalised(images), locations, grid=self.grid, fill=fill)

  def train_batch(self, keys: jax.Array, data: Mapping[str, Any],
                  indices: jax.Array) -> dict[str, jax.Array]:
    """The training examples `indices` (b,) of data, each augmented and placed by its own key (b,).

    Returns 'canvases' (b, k * s, k * s, 3), 'locations' (b,) and 'targets' (b,).
    """
    images, labels = data['images'][indices], data['labels'][indices]
    locations = self.locations(keys)
    if self.flip:
      images = random_flips(keys, images)
    return {'canvases': self.canvases(images, locations), 'locations': locations,
            'targets': locations if self.target == 'location' else labels}

  def locations(self, keys: jax.Array) -> jax.Array:
    """The uniform location that each example's key (b,) draws, (b,) integers."""
    return jax.vmap(
      lambda key: jax.random.randint(jax.random.fold_in(key, 0), (), 0, self.num_locations))(keys)

  def loss(self, network, batch: Mapping[str, jax.Array],
           step: jax.Array) -> tuple[jax.Array, dict]:
    """Mean cross entropy of a batch, a scalar, and its metrics; network: a TrainingNetwork."""
    logits, _ = network(batch['canvases'])
    losses = cross_entropy(logits, batch['targets'])  # (b, k), (b,) -> (b,)
    correct = (logits.argmax(-1) == batch['targets']).astype(losses.dtype)
    return losses.mean(), averages(loss=losses, accuracy=correct)

  def samples(self, train_set, *, seed: int, count: int = 12) -> Sheet:
    """Training canvases as the network sees them, each with its class and location."""
    few, batch = self.first_batch(train_set, seed=seed, count=count)
    labels = [f'{few.class_names[label]} at {location}' for label, location
              in zip(few.labels, batch['locations'], strict=True)]
    return Sheet([*zip(labels, self.shown(batch['canvases']), strict=True)], columns=6,
                 grid=self.grid)

  def eval_inputs(self, data: Mapping[str, Any], common,
                  batch: Mapping[str, jax.Array]) -> jax.Array:
    """Canvases of the test examples batch['index'] (b,) of data at batch['location'] (b,)."""
    return self.canvases(data['images'][batch['index']], batch['location'])

  def eval_counts(self, logits, features, data, common, batch) -> dict[str, jax.Array]:
    """Exact counts by location, 'correct' and 'count' (k * k,) int32, and 'loss' (), their sum.

    Padding (batch['mask'] false) counts for nothing.
    """
    targets = (batch['location'] if self.target == 'location'
               else data['labels'][batch['index']])
    correct = (logits.argmax(-1) == targets) & batch['mask']
    losses = jnp.where(batch['mask'], cross_entropy(logits, targets), 0)
    at = jax.nn.one_hot(batch['location'], self.num_locations, dtype=jnp.int32)  # (b, k * k)
    return {'correct': correct.astype(jnp.int32) @ at,
            'count': batch['mask'].astype(jnp.int32) @ at, 'loss': losses.sum()}

  def evaluation(self, config, test_set, counter) -> 'CanvasEvaluation':
    return CanvasEvaluation(config, self, test_set, counter)


class CanvasEvaluation(Evaluation):
  """The exact accuracy, and the authors' protocol; see protocol.Evaluation.

  PermuteNet draws one permutation a batch, as the authors' test loop does: its accuracy depends,
  within that noise, on eval.batch_size (rounded up to a multiple of the devices).
  """

  @property
  def metric(self) -> str:
    return f'{self.task.target}_accuracy'

  def during(self, state) -> dict:
    """The authors' protocol, once: every test image at a random location."""
    return self.random(state, passes=1)

  def final(self, state, *, progress=False, brief=False) -> dict:
    return self.exact(state, progress=progress)

  def exact(self, state, *, progress=False) -> dict:
    """Every test image at every location, as `accuracies` has it."""
    return self._count(state, *every_location(len(self.test_set), self.task.num_locations),
                       progress=progress)

  def random(self, state, *, passes: int, progress=False) -> dict:
    """The authors' protocol: every test image once a pass, each time at a random location."""
    return self._count(state, *random_locations(
      len(self.test_set), self.task.num_locations, passes=passes,
      seed=(self.config.seed, int(state.step))), progress=progress)

  def _count(self, state, index, location, *, progress):
    batches = index_batches({'index': index, 'location': location}, self.counter.batch_size)
    none = np.zeros(self.task.num_locations, np.int32)
    zeros = {'correct': none, 'count': none.copy(), 'loss': np.zeros((), self.task.dtype)}
    with evaluated(len(index), progress=progress) as bar:
      return accuracies(self.counter.count(state, zeros, batches, bar=bar))

  def summary(self, final: dict, evaluations: list[dict]) -> dict:
    best = max(evaluations, key=lambda line: line['accuracy'])
    return {'final': {self.metric: final['accuracy'], 'loss': final['loss']},
            'best': {f'{self.metric}_best_random': best['accuracy'], 'step': best['step']},
            'per_location': final['per_location']}

  def report(self, state) -> dict:
    """All metrics of a checkpoint: the exact ones, and the authors' test script (k * k passes with
    random placement)."""
    exact = self.exact(state, progress=True)
    random = self.random(state, passes=self.task.num_locations, progress=True)
    return {self.metric: exact['accuracy'], f'{self.metric}_random': random['accuracy'],
            'loss': exact['loss'], 'per_location': exact['per_location']}


def accuracies(counts: Mapping[str, np.ndarray]) -> dict:
  """{'accuracy', 'loss', 'canvases' (how many were counted), 'per_location' (k, k) lists} of the
  sums of eval_counts; accuracies are fractions. A location where nothing was counted is None."""
  correct, count = (np.asarray(counts[name], np.int64) for name in ('correct', 'count'))
  grid = round(len(count) ** 0.5)
  per_location = [[c / n if n else None for c, n in zip(*rows, strict=True)] for rows in zip(
    correct.reshape(grid, grid).tolist(), count.reshape(grid, grid).tolist(), strict=True)]
  return {'accuracy': float(correct.sum() / count.sum()),
          'loss': float(counts['loss'] / count.sum()), 'canvases': int(count.sum()),
          'per_location': per_location}


def every_location(num_images: int, num_locations: int) -> tuple[np.ndarray, np.ndarray]:
  """Every (image, location) once: two arrays (num_images * num_locations,)."""
  return np.divmod(np.arange(num_images * num_locations), num_locations)


def random_locations(num_images: int, num_locations: int, *, passes: int,
                     seed) -> tuple[np.ndarray, np.ndarray]:
  """Every image `passes` times, each at a uniform location: two arrays (passes * num_images,)."""
  index = np.tile(np.arange(num_images), passes)
  return index, np.random.default_rng(seed).integers(num_locations, size=len(index))
