"""The canvas task (section 3): an image pasted at one of k x k locations; say where, or say what.

Everything here runs on the device, inside the jitted step, on uint8 images.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from optax.losses import softmax_cross_entropy_with_integer_labels as cross_entropy

from gapjax.tasks.images import normalise, random_flips
from gapjax.tasks.metrics import EvalMetrics, TrainMetrics


def place(patches: jax.Array, locations: jax.Array, *, grid: int, fill: jax.Array) -> jax.Array:
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
class CanvasTask:
  """Inputs, targets, loss and metrics of location or image classification on a canvas.

  Attributes:
    grid: k.
    target: 'location' (k * k classes) or 'image'.
    fill: 'zero' pads after normalising, as the authors do, so that their "black" is the mean
      colour; 'black' pads with black pixels.
    mean, std: (3,), normalisation on the [0, 1] scale.
    num_image_classes: classes of the dataset.
    flip: whether training images are flipped horizontally, each with probability 1/2.
    dtype: of the canvases.
  """
  grid: int
  target: str
  fill: str
  mean: np.ndarray
  std: np.ndarray
  num_image_classes: int
  flip: bool = True
  dtype: jnp.dtype = jnp.float32

  @property
  def num_locations(self) -> int:
    return self.grid * self.grid

  @property
  def num_classes(self) -> int:
    """Logits that the network needs."""
    return self.num_locations if self.target == 'location' else self.num_image_classes

  def canvases(self, images: jax.Array, locations: jax.Array) -> jax.Array:
    """uint8 (b, s, s, 3) images and (b,) locations -> normalised (b, k * s, k * s, 3) canvases."""
    patches = normalise(images, mean=self.mean, std=self.std, dtype=self.dtype)
    black = normalise(jnp.zeros(3), mean=self.mean, std=self.std, dtype=self.dtype)
    fill = jnp.zeros_like(black) if self.fill == 'zero' else black
    return place(patches, locations, grid=self.grid, fill=fill)

  def train_batch(self, keys: jax.Array, data: Mapping[str, jax.Array],
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
           step: jax.Array) -> tuple[jax.Array, TrainMetrics]:
    """Mean cross entropy of a batch, a scalar, and its metrics; network: see steps.Network."""
    del step  # the loss is the same throughout training
    logits, _ = network(batch['canvases'])
    losses = cross_entropy(logits, batch['targets'])  # (b, k), (b,) -> (b,)
    correct = (logits.argmax(-1) == batch['targets']).astype(losses.dtype)
    return losses.mean(), TrainMetrics.single_from_model_output(loss=losses, correct=correct)

  def samples(self, keys, data, indices):
    """Training canvases as the network sees them, (n, k * s, k * s, 3) normalised; which examples
    they are and at which location, (n,) each."""
    batch = self.train_batch(keys, data, indices)
    return batch['canvases'], jnp.arange(len(indices)), batch['locations']

  def eval_inputs(self, data: Mapping[str, jax.Array], common,
                  batch: Mapping[str, jax.Array]) -> jax.Array:
    """Canvases of the test examples batch['index'] (b,) of data at batch['location'] (b,)."""
    return self.canvases(data['images'][batch['index']], batch['location'])

  def eval_counts(self, logits, features, data, common, batch) -> EvalMetrics:
    """Counts by location; padding (batch['mask'] false) counts for nothing."""
    targets = (batch['location'] if self.target == 'location'
               else data['labels'][batch['index']])
    correct = (logits.argmax(-1) == targets) & batch['mask']
    losses = jnp.where(batch['mask'], cross_entropy(logits, targets), 0)
    at = jax.nn.one_hot(batch['location'], self.num_locations, dtype=jnp.int32)  # (b, k * k)
    return EvalMetrics(correct=correct.astype(jnp.int32) @ at,
                       count=batch['mask'].astype(jnp.int32) @ at, loss=losses.sum())
