"""Segmentation sets: scenes read one by one, and endless batches of augmented crops.

A training batch is a function of (seed, step) alone: Grain shuffles, repeats and augments by
position in one global order, and the step is that position. Nothing is saved to resume.
"""

import contextlib
import dataclasses
import math
import os
from collections.abc import Sequence

import numpy as np

from gapjax import errors
from gapjax.data import catalogue, disk
from gapjax.data.catalogue import VOID
from gapjax.data.images import identity
from gapjax.data.pictures import as_rgb, open_image, resize

# Batches made at once, each in a thread: Pillow decodes and resizes without Python's lock.
_THREADS = 8
# At most so many scenes, in equal distances, are read to know a set again.
_READ = 8


@dataclasses.dataclass(frozen=True, eq=False)
class Scenes(Sequence):
  """One split of a segmentation set, on disk; `scenes[i]` reads and decodes one scene.

  `len(scenes)` is the number of scenes. `scenes[i]`, for i in [0, len(scenes)), is a dictionary:
  'image' (h, w, 3) uint8, 'label' (h, w) uint8 in [0, K) or 255 for void, 'id' str. Any number of
  threads may read.

  Attributes:
    name: what TFDS calls the dataset.
    class_names: K names, in the order of the labels.
    palette: (K, 3) uint8, the classes' colours.
    image_size: pixels of the shorter side after resizing; None leaves the size.
  """

  name: str
  class_names: tuple[str, ...]
  palette: np.ndarray
  image_size: int | None
  _folder: os.PathLike
  _bytes: int  # of all records of the split, as TFDS has counted them
  _records: object
  _indices: range

  def __len__(self):
    return len(self._indices)

  def __getitem__(self, i):
    """One scene. Raises IndexError beyond the last, UsageError where the files are damaged."""
    import PIL.Image
    with self._reading():
      record = self._records[self._indices[i]]
      image, label = (open_image(record[key]) for key in ('image', 'label'))
      image, numbers = as_rgb(image), np.asarray(label)  # of a palette, its indices
    if numbers.ndim != 2 or not 0 <= numbers.min() <= numbers.max() <= VOID:
      raise errors.UsageError(f'the label of scene {i} in {self._folder} is no mask: its pixels '
                              f'are {label.mode}, not one class number from 0 to {VOID} each; '
                              'prepare the dataset with masks')
    if numbers.shape != image.size[::-1]:
      raise errors.UsageError(f'the label of scene {i} in {self._folder} has another size than its '
                              'image; prepare the dataset with a class for each pixel')
    strange = numbers[(numbers >= len(self.class_names)) & (numbers != VOID)]
    if strange.size:
      raise errors.UsageError(f'the label of scene {i} in {self._folder} holds {strange[0]}, and '
                              f'its classes are 0 to {len(self.class_names) - 1}, void {VOID}; '
                              'prepare the dataset with masks of these, or name all classes')
    label = PIL.Image.fromarray(numbers.astype(np.uint8))
    size = self._resized(image)
    return {'image': np.asarray(resize(image, size)), 'label': np.asarray(resize(label, size)),
            'id': record['id'] if isinstance(record['id'], str) else record['id'].decode()}

  def size(self, i):
    """(height, width) of one scene, from its image's header: nothing is decoded.

    Raises as `scenes[i]` does, but sees no damage beyond the header.
    """
    with self._reading():
      image = open_image(self._records[self._indices[i]]['image'])
    return self._resized(image)[::-1]

  @contextlib.contextmanager
  def _reading(self):
    """Inside, what a damaged file raises is a UsageError."""
    try:
      yield
    except errors.UsageError:
      raise
    except (RuntimeError, OSError, SyntaxError, ValueError) as error:  # array_record's, Pillow's
      raise errors.UsageError(f'{self._folder} is damaged ({error}): remove it and prepare the '
                              'dataset again') from error

  def _resized(self, image):
    """(width, height) that `image_size` gives a Pillow image."""
    pixels, shorter = self.image_size or min(image.size), min(image.size)
    return tuple(max(1, round(side * pixels / shorter)) for side in image.size)

  def identity(self):
    """What tells these scenes from others: see `images.identity`. To read gigabytes at each start
    would take too long: the size of all, and the files of a few."""
    with self._reading():
      few = [self._records[i] for i in self._indices[::len(self) // _READ + 1]]
    return identity(self, [repr(self._bytes).encode(), *(
        record[key] for record in few for key in ('image', 'label'))])


def load_scenes(name, *, split, data_dir=None, image_size=None, limit=None):
  """One split of a prepared segmentation set.

  The order is that of the records on disk, always the same and hashed: the first `limit` scenes are
  a fixed sample of all.

  Args:
    name: one of catalogue.SCENES, or a folder that TFDS prepared from one (image, label and id;
      class_names and palette in its metadata). digit_scenes is prepared on first use.
    split: 'train' or 'val' (digit_scenes: 'test'), or another split that the folder has.
    data_dir: the folder of all datasets; None means TFDS' default.
    image_size: resize each scene so that its shorter side has this many pixels: the image bilinear,
      antialiased (means of blocks where it shrinks by whole factors), the label nearest.
    limit: only the first `limit` scenes; None or 0 means all.

  Returns:
    Scenes.

  Raises:
    UsageError: unknown name or split; not prepared (with the command to run); not a segmentation
      set.
  """
  builder = disk.open_set(name, data_dir, known=catalogue.SCENES)
  import tensorflow_datasets as tfds
  features, metadata = builder.info.features, dict(builder.info.metadata or {})
  if not ({'image', 'label', 'id'} <= set(features) and {'class_names', 'palette'} <= set(metadata)
          and isinstance(features['label'], tfds.features.Image)):
    raise errors.UsageError(f'{name} does not hold scenes with a class for every pixel: it needs '
                            'image, label and id, and class_names and palette in metadata.json')
  errors.check_choice(split, tuple(builder.info.splits), what=f'split of {name}')
  # Undecoded: TFDS would advise OpenCV on stderr, and take twice as long.
  records = builder.as_data_source(split, decoders={
      key: tfds.decode.SkipDecoding() for key in ('image', 'label')})
  indices = range(len(records))
  return Scenes(name=builder.name, class_names=tuple(metadata['class_names']),
                palette=np.array(metadata['palette'], np.uint8), image_size=image_size or None,
                _folder=builder.data_dir, _bytes=builder.info.splits[split].num_bytes,
                _records=records,
                _indices=indices[:limit] if limit else indices)


def training_batches(scenes, *, batch_size, seed, crop_size, scale, flip, fill, num_hosts=1,
                     host=0):
  """Endless batches of random crops, the same for the same (seed, step) whatever happened before.

  All scenes in a seeded order, a new one each epoch, each scaled, cropped and flipped as a function
  of seed and position in that order alone; batches run across the borders of epochs. The parts of
  the hosts, one after the other, are the batch that one host alone would get.

  Args:
    scenes: Scenes, or any sequence of its dictionaries.
    batch_size: of all hosts together, a multiple of `num_hosts`.
    seed: a non-negative integer.
    crop_size: (height, width) of the crops, pixels.
    scale: (low, high), both above 0: each scene is resized by a uniform factor in between, bilinear
      (label: nearest).
    flip: whether to mirror scenes left to right, each with probability 1/2.
    fill: (3,) uint8, the colour around a scene smaller than the crop. Such a scene stands in the
      middle; its surroundings are void.
    num_hosts: number of processes that share a batch.
    host: which of them this is.

  Returns:
    Batches.

  Raises:
    UsageError: no scenes.
  """
  import grain
  if not len(scenes):
    raise errors.UsageError('there are no scenes to train on; choose another split or limit')
  fill = np.asarray(fill, np.uint8)

  def augment(scene, rng):
    return _augment(scene, rng, crop_size=crop_size, scale=scale, flip=flip, fill=fill)

  # Grain shuffles epoch e with seed + e: spread the seeds, so that 0 and 1 share no epoch.
  shuffle_seed, augment_seed = (int(x) for x in np.random.SeedSequence(seed).generate_state(2))
  order = grain.MapDataset.source(scenes).shuffle(seed=shuffle_seed).repeat()
  batches = order.random_map(augment, seed=augment_seed).batch(
      batch_size // num_hosts, drop_remainder=True)
  return Batches(batches[host::num_hosts])


class Batches:
  """This host's batches: {'images': (b, h, w, 3) uint8, 'labels': (b, h, w) uint8, 255 void}."""

  def __init__(self, batches):
    self._batches = batches

  def at(self, step):
    """The batch of one step."""
    return self._batches[step]

  def iterate(self, start_step=0):
    """Yields the batches of start_step, start_step + 1, ...; threads make them ahead of time.

    An endless generator: `close()` it (or leave it to the garbage collector) to end the threads.
    """
    import grain
    threads = min(_THREADS, os.cpu_count() or 1)
    iterator = iter(self._batches[start_step:].to_iter_dataset(
        grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + 1)))
    try:
      yield from iterator
    finally:
      iterator.close()


def _augment(scene, rng, *, crop_size, scale, flip, fill):
  """One crop: {'images': (h, w, 3), 'labels': (h, w)} uint8."""
  import PIL.Image
  factor = rng.uniform(*scale)
  height, width = (max(1, round(side * factor)) for side in scene['label'].shape)
  # Where the crop's corner lies in the scene; beyond it where the scene is smaller: in the middle.
  top, left = (rng.integers(have - want + 1) if have > want else (have - want) // 2
               for have, want in zip((height, width), crop_size, strict=True))
  mirrored = rng.random() < 0.5 and flip
  window = (max(left, 0), max(top, 0),
            min(left + crop_size[1], width), min(top + crop_size[0], height))
  place = slice(window[1] - top, window[3] - top), slice(window[0] - left, window[2] - left)
  crop = {}
  for name, key, around in (('images', 'image', fill), ('labels', 'label', VOID)):
    out = np.empty((*crop_size, *scene[key].shape[2:]), np.uint8)
    out[:] = around
    out[place] = _window(PIL.Image.fromarray(scene[key]), (width, height), window)
    crop[name] = out[:, ::-1] if mirrored else out
  return crop


def _window(picture, size, window):
  """A Pillow image resized to (width, height), and of that only (left, top, right, bottom).

  Resizes little more than the window: a Cityscapes scene at twice its size has 8 million pixels.
  """
  margin = 1 + math.ceil(max(new / old for new, old in zip(size, picture.size, strict=True)))
  margin = max(margin, 2)  # as far as bilinear reaches, in pixels after resizing
  low = [max(edge - margin, 0) for edge in window[:2]]
  high = [min(edge + margin, side) for edge, side in zip(window[2:], size, strict=True)]
  box = [edge * old / new for edge, old, new in
         zip((*low, *high), picture.size * 2, size * 2, strict=True)]
  part = resize(picture, (high[0] - low[0], high[1] - low[1]), box=box)
  return part.crop([edge - start for edge, start in zip(window, low * 2, strict=True)])
