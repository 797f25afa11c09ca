"""Small folders that TFDS prepared, of images or scenes that a person might have."""

import io

import numpy as np
import PIL.Image
import tensorflow_datasets as tfds

FEATURES = tfds.features


class Own(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """A dataset called 'own' of the given rows in their order, the same in both splits."""
  VERSION, name, code_path = tfds.core.Version('1.0.0'), 'own', None

  def __init__(self, rows, features, *, metadata=None, supervised=('image', 'label'), **more):
    self._given = rows, features, metadata, supervised
    super().__init__(**more)

  def _info(self):
    _, features, metadata, supervised = self._given
    return tfds.core.DatasetInfo(
      builder=self, features=FEATURES.FeaturesDict(features), supervised_keys=supervised,
      metadata=metadata and tfds.core.MetadataDict(metadata), disable_shuffling=True)

  def _split_generators(self, _):
    return {'train': self._generate_examples(), 'test': self._generate_examples()}

  def _generate_examples(self):
    yield from enumerate(
      {key: io.BytesIO(value) if isinstance(value, bytes) else value for key, value in row.items()}
      for row in self._given[0])


def encoded(pixels, *, palette=None, kind='PNG') -> bytes:
  """The file of an image (h, w) or (h, w, 3) uint8; with a palette, pixels are its indices."""
  image = PIL.Image.fromarray(pixels)
  if palette:
    image.putpalette(palette)  # of a grey image: it becomes one of indices
  file = io.BytesIO()
  image.save(file, kind)
  return file.getvalue()


def write_images(root, files, names=('a', 'b')):
  """Labels alternate. Returns the folder."""
  rows = [{'image': file, 'label': i % len(names)} for i, file in enumerate(files)]
  return write(root, rows, {'image': FEATURES.Image(shape=(None, None, 3)),
                             'label': FEATURES.ClassLabel(names=list(names))})


def write_scenes(root, masks):
  """Black scenes with these encoded masks. Returns the folder."""
  black = encoded(np.zeros((24, 32, 3), np.uint8))
  rows = [{'id': str(i), 'image': black, 'label': mask} for i, mask in enumerate(masks)]
  return write(root, rows, {
    'id': FEATURES.Text(), 'image': FEATURES.Image(shape=(None, None, 3)),
    'label': FEATURES.Image(shape=(None, None, 1), encoding_format='png')},
    metadata={'class_names': ['background', 'car'], 'palette': [[0, 0, 0], [128, 64, 128]]})


def write(root, rows, features, **more):
  """Rows {feature: value or file} as TFDS prepares them. Returns the folder."""
  builder = Own(rows, features, data_dir=root, **more)
  builder.download_and_prepare(file_format='array_record')
  return builder.data_dir
