"""Image classification datasets as uint8 arrays, and their normalisation."""

import dataclasses
import hashlib

import numpy as np

from gapjax import errors
from gapjax.data import catalogue, disk
from gapjax.data.pictures import as_rgb, open_image, resize

_CLASSES = 10 ** 6  # more than these nobody labels
# Published mean and standard deviation of the training pixels, red green blue, on [0, 1].
_NORMALISATION = {
    'cifar10': ((.4914, .4822, .4465), (.2023, .1994, .2010)),
    'cifar100': ((.5071, .4865, .4409), (.2673, .2564, .2762)),
}


@dataclasses.dataclass(frozen=True)
class ImageDataset:
  """One split of a dataset, in memory.

  Attributes:
    name: what TFDS calls the dataset.
    images: (n, h, w, 3) uint8.
    labels: (n,) int32, each in [0, len(class_names)).
    class_names: the classes, in the order of the labels.
  """

  name: str
  images: np.ndarray
  labels: np.ndarray
  class_names: tuple[str, ...]

  def __len__(self):
    return len(self.images)

  def part(self, start, stop):
    """The images [start, stop)."""
    return dataclasses.replace(self, images=self.images[start:stop],
                               labels=self.labels[start:stop])

  def identity(self):
    """What tells these images from others: see `identity`. Every byte of them counts."""
    return identity(self, [repr(self.images.shape).encode(), self.images, self.labels])


def identity(dataset, content):
  """What a run writes down of a dataset, to know it again, as JSON has it.

  Args:
    dataset: with a length and class_names.
    content: bytes, or arrays in C order, that differ between one dataset and another.

  Returns:
    {'examples': how many, 'classes': their names, 'digest': BLAKE2 of the content}.
  """
  sums = hashlib.blake2b(digest_size=16)
  for part in content:
    sums.update(part)
  return {'examples': len(dataset), 'classes': list(dataset.class_names),
          'digest': sums.hexdigest()}


def check(name, *, data_dir=None):
  """Raises UsageError, as `load_images` would, unless the dataset is there and can be read."""
  disk.open_set(name, data_dir, known=catalogue.IMAGES)


def load_images(name, *, split, data_dir=None, image_size=None, limit=None):
  """Reads one split of a prepared dataset into memory.

  The order is that of the records on disk, always the same: the file's for the digits, TFDS' hashed
  one for CIFAR, so that the first `limit` images are a fixed sample of all classes.

  Args:
    name: one of catalogue.IMAGES, or a folder that TFDS prepared (a dataset with an image and a
      label). The digits are prepared on first use.
    split: 'train' or 'test', or another split that the folder has.
    data_dir: the folder of all datasets; None means TFDS' default.
    image_size: resize every image to image_size x image_size pixels, whatever its proportions:
      each pixel the mean of a block when that shrinks by whole factors, else bilinear.
    limit: only the first `limit` images; None or 0 means all.

  Returns:
    ImageDataset. Grey images have three equal channels.

  Raises:
    UsageError: unknown name or split; not prepared (with the command to run), or in a format that
      needs TensorFlow; no image and label; no images; images of several sizes without
      `image_size`; a damaged record; a label that is missing or no class.
  """
  builder = disk.open_set(name, data_dir, known=catalogue.IMAGES)
  errors.check_choice(split, tuple(builder.info.splits), what=f'split of {name}')
  image_key, label_key = _keys(builder, name)
  records = _records(builder, split, undecoded=image_key, limit=limit)
  if not records:
    raise errors.UsageError(f'split `{split}` of {name} is empty; choose another split')
  try:
    images = [_decode(record[image_key], image_size) for record in records]
  except errors.UsageError:
    raise
  except (OSError, SyntaxError, ValueError) as error:  # Pillow's, of a file that is no image
    raise errors.UsageError(f'{builder.data_dir} holds what is no image ({error}): remove it and '
                            'prepare the dataset again') from error
  if len({image.shape for image in images}) > 1:
    raise errors.UsageError(f'the images of {name} differ in size; set data.image_size')
  labels = np.array([record[label_key] for record in records], np.int32)
  if labels.min() < 0:
    raise errors.UsageError(f'split `{split}` of {name} has images without a label; '
                            'choose another split')
  class_names = tuple(builder.info.features[label_key].names)
  if labels.max() >= len(class_names):
    raise errors.UsageError(f'split `{split}` of {name} has the label {labels.max()} and names '
                            f'{len(class_names)} classes; prepare it again with all of them')
  return ImageDataset(name=builder.name, images=np.stack(images), labels=labels,
                      class_names=class_names)


def normalisation(name, images=None):
  """Mean and standard deviation of each channel, on the [0, 1] scale.

  Args:
    name: a dataset; CIFAR's published constants (the ones the paper's code uses) need no images.
    images: (n, h, w, 3) uint8 training images, for any other dataset.

  Returns:
    Two (3,) float32 arrays. The deviation of a channel that never changes is 1, not 0.

  Raises:
    ValueError: no images for a dataset without published constants.
  """
  if name in _NORMALISATION:
    mean, std = _NORMALISATION[name]
    return np.array(mean, np.float32), np.array(std, np.float32)
  if images is None:
    raise ValueError(f'{name} has no published normalisation: pass its training images')
  values = np.arange(256) / 255
  # Weights of the 256 values: exact float64 statistics without a float64 copy of the images.
  counts = np.stack([np.bincount(images[..., c].ravel(), minlength=256) for c in range(3)])
  weights = counts / counts.sum(axis=1, keepdims=True)  # (3, 256)
  mean = weights @ values
  variance = (weights * (values - mean[:, None]) ** 2).sum(axis=1)
  std = np.where(np.ptp(images, axis=(0, 1, 2)) > 0, np.sqrt(variance), 1)
  return mean.astype(np.float32), std.astype(np.float32)


def _keys(builder, name):
  """The names of the image and the label feature."""
  import tensorflow_datasets as tfds
  features = builder.info.features
  keys = builder.info.supervised_keys or ('image', 'label')
  kinds = (tfds.features.Image, tfds.features.ClassLabel)
  if len(keys) != 2 or not all(
      isinstance(key, str) and key in features and isinstance(features[key], kind)
      for key, kind in zip(keys, kinds, strict=True)):
    found = ', '.join(f'{key} ({type(features[key]).__name__})' for key in sorted(features))
    raise errors.UsageError(f'{name} is not a dataset of images with one label each: it needs an '
                            f'Image and a ClassLabel, and its features are {found}')
  if (features[keys[1]].num_classes or 0) > _CLASSES:
    raise errors.UsageError(f'features.json of {name} says {features[keys[1]].num_classes} classes,'
                            f' more than {_CLASSES}: it is damaged; prepare the dataset again')
  return keys


def _records(builder, split, *, undecoded, limit):
  """The first `limit` records, as dictionaries, the image under the key `undecoded` as its file."""
  import tensorflow_datasets as tfds
  try:
    # TFDS decodes one record at a time, at half this speed, and advises OpenCV on stderr.
    records = builder.as_data_source(split, decoders={undecoded: tfds.decode.SkipDecoding()})
    return records.__getitems__(range(min(limit or len(records), len(records))))
  except RuntimeError as error:  # what array_record raises when a checksum inside is wrong
    raise errors.UsageError(f'{builder.data_dir} is damaged ({error}): remove it and prepare the '
                            'dataset again') from error


def _decode(encoded, image_size):
  """One (h, w, 3) uint8 image of an encoded file, resized if asked."""
  image = as_rgb(open_image(encoded))
  return np.asarray(resize(image, (image_size, image_size)) if image_size else image)
