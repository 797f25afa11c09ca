"""The part of a task that trains on images with one label each, all of them on every device."""

import jax
import numpy as np

from gapjax import data
from gapjax.tasks.protocol import Task


class ResidentImages(Task):
  """A task of images with one label each."""
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

  def first_batch(self, train_set, *, seed: int, count: int):
    """The first `count` training examples, a dataset, and their batch for `loss`."""
    few = train_set.part(0, count)
    return few, jax.jit(self.train_batch)(jax.random.split(jax.random.key(seed), len(few)),
                                          self.resident(few), np.arange(len(few)))

  def shown(self, images: jax.Array) -> np.ndarray:
    """Normalised images back as uint8, to be looked at."""
    pixels = np.asarray(images, np.float32) * self.std + self.mean
    return np.rint(255 * np.clip(pixels, 0, 1)).astype(np.uint8)
