"""Small folders that TFDS prepared, of images or scenes that a person might have."""

import io

import numpy as np
import PIL.Image
import tensorflow_datasets as tfds

FEATURES = tfds.features


class Own(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """A dataset called 'own' of the given rows, the same in both splits."""
  VERSION, name, code_path = tfds.core.Version('1.0.0'), 'own', None

  def __init__(self, rows, features, metadata=None, **more):
    self._given = rows, features, metadata
    super().__init__(**more)

  def _info(self):
    _, features, metadata = self._given
    return tfds.core.DatasetInfo(
      builder=self, features=FEATURES.FeaturesDict(features), supervised_keys=('image', 'label'),
      metadata=metadata and tfds.core.MetadataDict(metadata))

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
  return _write(root, rows, {'image': FEATURES.Image(shape=(None, None, 3)),
                             'label': FEATURES.ClassLabel(names=list(names))})


def write_scenes(root, masks):
  """Black scenes with these encoded masks. Returns the folder."""
  black = encoded(np.zeros((24, 32, 3), np.uint8))
  rows = [{'id': str(i), 'image': black, 'label': mask} for i, mask in enumerate(masks)]
  return _write(root, rows, {
    'id': FEATURES.Text(), 'image': FEATURES.Image(shape=(None, None, 3)),
    'label': FEATURES.Image(shape=(None, None, 1), encoding_format='png')},
    {'class_names': ['background', 'car'], 'palette': [[0, 0, 0], [128, 64, 128]]})


def _write(root, rows, features, metadata=None):
  builder = Own(rows, features, metadata, data_dir=root)
  builder.download_and_prepare(file_format='array_record')
  return builder.data_dir
