"""What tasks do alike: normalise and flip a batch on the device; hold images there."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from gapjax import data
from gapjax.errors import UsageError

# ImageNet's mean and standard deviation, red green blue on [0, 1]: segmentation's normalisation.
IMAGENET = ((.485, .456, .406), (.229, .224, .225))


def normalise(images: jax.Array, *, mean, std, dtype) -> jax.Array:
  """uint8 (..., 3) -> (images / 255 - mean) / std in `dtype`; mean and std are (3,)."""
  return (images.astype(dtype) / 255 - jnp.asarray(mean, dtype)) / jnp.asarray(std, dtype)


def random_flips(keys: jax.Array, images: jax.Array) -> jax.Array:
  """Flips each of images (b, h, w, c) left to right with probability 1/2, by its own key (b,)."""
  flips = jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, 1)))(keys)
  return jnp.where(flips[:, None, None, None], images[:, :, ::-1], images)


def check_images(images) -> None:
  """Raises UsageError unless images are (b, h, w, c)."""
  if jnp.ndim(images) != 4:
    raise UsageError(f'images must be (b, h, w, c), not {jnp.shape(images)}')


def check_shift(what: str, max_shift: int, height: int, width: int) -> None:
  """Raises UsageError unless 0 <= max_shift < both sizes of the image, in pixels."""
  if not 0 <= max_shift < min(height, width):
    raise UsageError(f'{what} of {max_shift} pixels does not fit images of {height}x{width}; '
                     f'choose one from 0 to {min(height, width) - 1}')


def shown(images: jax.Array, task) -> np.ndarray:
  """Normalised images of a task back as uint8, to be looked at."""
  pixels = np.asarray(images, np.float32) * task.std + task.mean
  return np.rint(255 * np.clip(pixels, 0, 1)).astype(np.uint8)


def index_batches(examples: Mapping[str, np.ndarray], size: int):
  """Cuts examples, arrays (n, ...) with 'index' among them, into batches for a Counter.

  Yields (int32 arrays (size, ...), how many examples these hold). No example is dropped or counted
  twice: the last batch is filled up, and 'mask' (size,) is false there.
  """
  n = len(examples['index'])
  for start in range(0, n, size):
    rows = np.arange(start, start + size)
    batch = {name: values[np.minimum(rows, n - 1)].astype(np.int32)
             for name, values in examples.items()}
    yield {**batch, 'mask': rows < n}, min(size, n - start)


class ResidentImages:
  """The part of a Task that trains on images with one label each, all of them on every device."""
  dense = False
  # By every process whole: its devices hold all images, since a batch takes any of them.
  load_split = staticmethod(data.load_images)

  @staticmethod
  def check_data(config, *, data_dir) -> None:
    data.check(config.data.name, data_dir=data_dir)

  def input_shape(self, train_set) -> tuple[int, int]:
    return train_set.images.shape[1:3]

  def resident(self, dataset) -> dict[str, np.ndarray]:
    return {'images': dataset.images, 'labels': dataset.labels}

  def host_batches(self, train_set, *, batch_size, seed, num_hosts=1, host=0) -> None:
    """None: a batch is indices."""
