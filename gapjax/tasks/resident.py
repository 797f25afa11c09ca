"""The part of a task that trains on images with one label each, all of them on every device."""

import jax
import numpy as np
from flax import struct

from gapjax import data
from gapjax.tasks.protocol import Task


@struct.dataclass
class Rows:
  """Images, a row of bytes each: images[indices (b,)] is (b, h, w, 3).

  XLA for TPUs copied (n, h, w, 3) and (n, h, w * 3) into another layout at every call, 0.3 GB read
  and written of CIFAR-10; rows it takes as they are.

  pixels: (n, h * w * 3) uint8. shape: (h, w, 3).
  """
  pixels: jax.Array
  shape: tuple[int, int, int] = struct.field(pytree_node=False)

  @classmethod
  def of(cls, images: np.ndarray) -> 'Rows':
    return cls(images.reshape(len(images), -1), images.shape[1:])

  def __getitem__(self, indices: jax.Array) -> jax.Array:
    return self.pixels[indices].reshape(-1, *self.shape)


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

  def resident(self, dataset) -> dict[str, Rows | np.ndarray]:
    return {'images': Rows.of(dataset.images), 'labels': dataset.labels}

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
