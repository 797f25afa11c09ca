"""Writes CIFAR's publisher's formats, with few records, independently of gapjax' reader."""

import io
import pickle
import struct
import tarfile
import types

import numpy as np
from conftest import refused

RECORDS = {'cifar10': {'train': 6, 'test': 10}, 'cifar100': {'train': 200, 'test': 100}}
FILES = {'cifar10': {'train': 5, 'test': 1}, 'cifar100': {'train': 1, 'test': 1}}
BINARY = {'cifar10': 'cifar-10-batches-bin', 'cifar100': 'cifar-100-binary'}
PYTHON = {'cifar10': 'cifar-10-batches-py', 'cifar100': 'cifar-100-python'}


def make_truth(name):
  """Images (n, 32, 32, 3), labels (n,) and coarse labels of each split, as many of each class."""
  rng = np.random.default_rng(0)
  truth = types.SimpleNamespace(images={}, label={}, coarse={})
  for split in ('train', 'test'):
    n = RECORDS[name][split] * FILES[name][split]
    truth.images[split] = rng.integers(0, 256, (n, 32, 32, 3), np.uint8)
    truth.label[split] = rng.permutation(n) % (10 if name == 'cifar10' else 100)
    truth.coarse[split] = rng.integers(0, 20, n)
  return truth


def planes(image):
  """All red bytes row by row, then green, then blue."""
  return b''.join(image[..., c].tobytes() for c in range(3))


def file_parts(name, split, truth):
  n = RECORDS[name][split]
  for i in range(FILES[name][split]):
    part = slice(i * n, (i + 1) * n)
    yield truth.images[split][part], truth.label[split][part], truth.coarse[split][part]


def write_binary(root, name, truth):
  folder = root / BINARY[name]
  folder.mkdir(parents=True)
  for split in ('train', 'test'):
    for i, (images, label, coarse) in enumerate(file_parts(name, split, truth), start=1):
      if name == 'cifar10':
        file = f'data_batch_{i}.bin' if split == 'train' else 'test_batch.bin'
        heads = [bytes([one]) for one in label]
      else:
        file = f'{split}.bin'
        heads = [bytes([two, one]) for one, two in zip(label, coarse, strict=True)]
      (folder / file).write_bytes(b''.join(
          head + planes(image) for head, image in zip(heads, images, strict=True)))
  return folder


class Python2Pickler(pickle._Pickler):
  """Writes what Python 2 and its numpy wrote: byte strings, numpy.core, dtype flags 0 and 1."""

  dispatch = pickle._Pickler.dispatch.copy()

  def save_string(self, obj):
    raw = obj if isinstance(obj, bytes) else obj.encode()
    self.write(b'T' + struct.pack('<i', len(raw)) + raw)
    self.memoize(obj)

  dispatch[bytes] = dispatch[str] = save_string

  def reducer_override(self, obj):
    if isinstance(obj, np.dtype):
      return obj.__reduce__()[0], ('u1', 0, 1), obj.__reduce__()[2]
    return NotImplemented


def python2_pickle(content):
  out = io.BytesIO()
  Python2Pickler(out, protocol=2).dump(content)
  return out.getvalue().replace(b'cnumpy._core.multiarray\n', b'cnumpy.core.multiarray\n')


def write_python(root, name, truth, dump=python2_pickle):
  folder = root / PYTHON[name]
  folder.mkdir(parents=True)
  for split in ('train', 'test'):
    for i, (images, label, coarse) in enumerate(file_parts(name, split, truth), start=1):
      rows = np.stack([np.frombuffer(planes(image), np.uint8) for image in images])
      if name == 'cifar10':
        file = f'data_batch_{i}' if split == 'train' else 'test_batch'
        content = {'batch_label': file, 'labels': label.tolist(), 'data': rows}
      else:
        file = split
        content = {'fine_labels': label.tolist(), 'coarse_labels': coarse.tolist(),
                   'data': rows}
      (folder / file).write_bytes(dump(content))
  return folder


def tar(folder, path):
  with tarfile.open(path, 'w:gz') as archive:
    archive.add(folder, folder.name)
  return path


def fails(call, *parts):
  """`call` raises a one-line UsageError with each of `parts`."""
  message = refused(call)
  for part in parts:
    assert part in message, message
