"""The publishers' files, read without trusting them.

Everything is read and checked in memory before a dataset is built, so that a bad file never
leaves a half-built folder behind. Nothing of an archive is written to disk.
"""

import dataclasses
import gzip
import io
import lzma
import os
import pathlib
import pickle
import tarfile
import zlib
from collections.abc import Mapping

import numpy as np

from gapjax import errors

_PIXELS = 3 * 32 * 32


@dataclasses.dataclass(frozen=True)
class Arrays:
  """A whole dataset in memory.

  Attributes:
    images: split -> (n, h, w, 3) uint8.
    labels: split -> label feature -> (n,) integers.
    class_names: label feature -> names, in the order of the labels.
  """

  images: Mapping[str, np.ndarray]
  labels: Mapping[str, Mapping[str, np.ndarray]]
  class_names: Mapping[str, tuple[str, ...]]


@dataclasses.dataclass(frozen=True)
class Layout:
  """Where one version (binary or python) of a CIFAR dataset keeps what.

  Attributes:
    folder: the folder in the publisher's archive.
    files: split -> its files, in order.
    keys: label feature -> its key in each pickle; empty for the binary version.
  """

  folder: str
  files: Mapping[str, tuple[str, ...]]
  keys: Mapping[str, str] = dataclasses.field(default_factory=dict)

  @property
  def needed(self):
    """Every file that must be there."""
    return [file for files in self.files.values() for file in files]


@dataclasses.dataclass(frozen=True)
class Cifar:
  """What the publisher says of CIFAR-10 or CIFAR-100.

  Attributes:
    url: the archive of the binary version.
    class_names: label feature -> names, in the order of a binary record's label bytes.
    records: split -> images in each of its files.
    layouts: the binary and the python version.
  """

  url: str
  class_names: Mapping[str, tuple[str, ...]]
  records: Mapping[str, int]
  layouts: tuple[Layout, ...]


_TEN = ('airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck')
_TWENTY = tuple('''
aquatic_mammals fish flowers food_containers fruit_and_vegetables household_electrical_devices
household_furniture insects large_carnivores large_man-made_outdoor_things
large_natural_outdoor_scenes large_omnivores_and_herbivores medium_mammals
non-insect_invertebrates people reptiles small_mammals trees vehicles_1 vehicles_2
'''.split())  # noqa: SIM905 - quotes around each would only be in the way
_HUNDRED = tuple('''
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus
butterfly camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch
crab crocodile cup dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo
keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain mouse
mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy
porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper
snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television
tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
'''.split())  # noqa: SIM905 - quotes around each would only be in the way
_BATCHES = tuple(f'data_batch_{i}' for i in range(1, 6))

CIFAR = {
    'cifar10': Cifar(
        url='https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz',
        class_names={'label': _TEN},
        records={'train': 10_000, 'test': 10_000},
        layouts=(
            Layout(folder='cifar-10-batches-bin',
                   files={'train': tuple(f'{batch}.bin' for batch in _BATCHES),
                          'test': ('test_batch.bin',)}),
            Layout(folder='cifar-10-batches-py',
                   files={'train': _BATCHES, 'test': ('test_batch',)},
                   keys={'label': 'labels'}))),
    'cifar100': Cifar(
        url='https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz',
        class_names={'coarse_label': _TWENTY, 'label': _HUNDRED},
        records={'train': 50_000, 'test': 10_000},
        layouts=(
            Layout(folder='cifar-100-binary',
                   files={'train': ('train.bin',), 'test': ('test.bin',)}),
            Layout(folder='cifar-100-python',
                   files={'train': ('train',), 'test': ('test',)},
                   keys={'coarse_label': 'coarse_labels', 'label': 'fine_labels'}))),
}


def read_digits():
  """scikit-learn's 1,797 handwritten digits as Arrays, 8x8 pixels, their 0..16 scaled to 0..255.

  The first 1,397 are the training split and the last 400 the test split: the file lists the
  scans writer by writer, so cutting it by position keeps most test writers out of training,
  which is harder and more honest than a random split.
  """
  from sklearn import datasets
  digits = datasets.load_digits()
  grey = np.rint(digits.images * (255 / 16)).astype(np.uint8)
  images = np.repeat(grey[..., None], 3, axis=-1)  # (1797, 8, 8, 3)
  parts = {'train': slice(0, 1397), 'test': slice(1397, None)}
  return Arrays(images={split: images[part] for split, part in parts.items()},
                labels={split: {'label': digits.target[part]} for split, part in parts.items()},
                class_names={'label': tuple(str(name) for name in digits.target_names)})


def read_cifar(name, source):
  """CIFAR-10 or CIFAR-100 from the publisher's files.

  Args:
    name: 'cifar10' or 'cifar100'.
    source: the folder of the binary or python version, its parent, or the archive (.tar.gz).

  Returns:
    Arrays.

  Raises:
    UsageError: the files are missing, damaged, of another dataset, or unsafe.
  """
  cifar, source = CIFAR[name], pathlib.Path(source).expanduser()
  if not source.is_dir() and not source.is_file():
    raise errors.UsageError(f'{source} does not exist, or is a pipe; --source is the publisher\'s '
                            f'folder or .tar.gz, for example from {cifar.url}')
  layout, files, where = _choose(cifar, source, (
      _read_folder if source.is_dir() else _read_archive)(cifar, source))
  for file in layout.needed:
    if file not in files:
      raise errors.UsageError(f'{where}{file} is missing; unpack {cifar.url} again')
  parse = _parse_pickle if layout.keys else _parse_binary
  images, labels = {}, {}
  for split, split_files in layout.files.items():
    parts = [parse(files[file], f'{where}{file}', cifar=cifar, layout=layout, split=split)
             for file in split_files]
    pixels = np.concatenate([part[0] for part in parts])  # (n, 3072), channel by channel
    images[split] = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    labels[split] = {feature: np.concatenate([part[1][feature] for part in parts])
                     for feature in cifar.class_names}
    _check_even(labels[split]['label'], cifar.class_names['label'], where=f'{where}{split}')
  return Arrays(images=images, labels=labels, class_names=cifar.class_names)


def _choose(cifar, source, files):
  """The layout, {file: bytes}, and the prefix for messages, of what _read_... found."""
  for layout in cifar.layouts:
    for folder in (layout.folder, ''):
      chosen = {file: data for (place, file), data in files.items()
                if place == folder and file in layout.needed}
      if chosen:
        return layout, chosen, (f'{source / folder}{os.sep}' if source.is_dir() else
                                f'{source}: {layout.folder}/')
  expected = ' or '.join(f'{layout.folder}/{layout.needed[0]}' for layout in cifar.layouts)
  raise errors.UsageError(
      f'{source} does not hold this dataset: expected {expected}; '
      f'--source is the publisher\'s folder or .tar.gz, for example from {cifar.url}')


def _read_folder(cifar, source):
  """{(folder or '', file): bytes} of every layout, in a folder or its child."""
  paths = {(folder, file): source / folder / file for layout in cifar.layouts
           for folder in (layout.folder, '') for file in layout.needed}
  found = {}
  for place, path in paths.items():
    if path.is_file():
      with path.open('rb') as file:
        found[place] = _whole(file, path, cifar)
  return found


def _read_archive(cifar, source):
  """As _read_folder, from a tar archive, without extracting it.

  Only plain members are read, into memory, so a hostile name or link could not reach anything.
  """
  files, needed = {}, {file for layout in cifar.layouts for file in layout.needed}
  try:
    with tarfile.open(source) as archive:
      for member in archive:
        path = pathlib.PurePosixPath(member.name)
        if member.isreg() and path.name in needed:
          files[path.parent.name, path.name] = _whole(
            archive.extractfile(member), f'{source}: {member.name}', cifar)
      while archive.fileobj.read(1 << 20):  # the checksum of a .gz comes after the last member
        pass
  except errors.UsageError:
    raise
  except (tarfile.TarError, EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error, MemoryError,
          OverflowError, ValueError) as error:  # the last three of sizes in headers
    raise errors.UsageError(f'{source} is not a whole tar archive ({errors.first_line(error)}); '
                            f'download it again, for example from {cifar.url}') from error
  return files


def _whole(file, where, cifar):
  """All bytes of a file, whatever size its archive says. Raises UsageError where there are more
  than a file of the dataset can have: two for a pixel's byte in a pickle, and names."""
  most = 3 * _PIXELS * max(cifar.records.values())
  data = file.read(most + 1)
  if len(data) > most:
    raise errors.UsageError(f'{where} has more than {most} bytes: it is another file; unpack the '
                            'archive again')
  return data


def _parse_binary(data, where, *, cifar, layout, split):
  """((n, 3072) uint8, {feature: (n,) uint8}) of one binary file: label bytes, then pixels."""
  del layout  # the binary records need no keys
  width = len(cifar.class_names) + _PIXELS
  expected = cifar.records[split] * width
  if len(data) != expected:
    raise errors.UsageError(f'{where} has {len(data)} bytes instead of {expected}: it is '
                            'truncated or another file; unpack the archive again')
  records = np.frombuffer(data, np.uint8).reshape(-1, width)
  labels = {feature: records[:, i] for i, feature in enumerate(cifar.class_names)}
  return records[:, len(cifar.class_names):], _checked(labels, where, cifar=cifar)


def _parse_pickle(data, where, *, cifar, layout, split):
  """((n, 3072) uint8, {feature: (n,) int64}) of one pickle of the python version."""
  batch, n = _unpickle(data, where), cifar.records[split]
  pixels = batch.get('data')
  if (not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8
      or pixels.shape != (n, _PIXELS)):
    raise errors.UsageError(f'{where} does not hold {n} images of {_PIXELS} bytes under `data`; '
                            'unpack the archive again')
  for key in layout.keys.values():
    column = batch.get(key)
    if (not isinstance(column, list) or len(column) != n
        or not all(isinstance(label, int) for label in column)):
      raise errors.UsageError(f'{where} does not hold {n} integers under `{key}`; '
                              'unpack the archive again')
  labels = {feature: np.array(batch[key]) for feature, key in layout.keys.items()}
  return pixels, _checked(labels, where, cifar=cifar)


def _checked(labels, where, *, cifar):
  """The labels by their feature. Raises UsageError for one that is no class."""
  for feature, values in labels.items():
    classes = len(cifar.class_names[feature])
    bad = np.flatnonzero((values < 0) | (values >= classes))
    if bad.size:
      raise errors.UsageError(
          f'{where} is damaged: {feature} {values[bad[0]]} of record {bad[0]} is not in '
          f'[0, {classes}); unpack the archive again')
  return labels


def _check_even(labels, names, *, where):
  """Raises UsageError unless a split has as many images of each class as of any other: a file that
  is there twice, or a test file among the training files, would not be seen in any score."""
  counts, even = np.bincount(labels, minlength=len(names)), len(labels) // len(names)
  uneven = np.flatnonzero(counts != even)
  if uneven.size:
    raise errors.UsageError(
        f'{where} has {counts[uneven[0]]} images of class {names[uneven[0]]} instead of {even}: '
        'a file is there in place of another; unpack the archive again')


def _dtype(kind, align=False, copy=False):
  """np.dtype; the publisher's pickles give the two flags as 0 and 1, which numpy 2.4 warns of."""
  return np.dtype(kind, align=bool(align), copy=bool(copy))


def _encode(text, encoding):
  """How Python 3 pickles bytes for protocol 2; no other codec occurs, so no other is allowed."""
  if encoding != 'latin1':
    raise ValueError(f'codec {encoding}')
  return text.encode('latin1')


# numpy's functions that rebuild an array, asked of an array because their module has moved.
_RECONSTRUCT = np.empty(0).__reduce__()[0]
_FROM_BUFFER = np.empty(1).__reduce_ex__(5)[0]

# All that an array in a pickle may refer to. Old and new numpy name the modules differently.
_ALLOWED = {
    ('numpy', 'ndarray'): np.ndarray,
    ('numpy', 'dtype'): _dtype,
    ('numpy.core.multiarray', '_reconstruct'): _RECONSTRUCT,
    ('numpy._core.multiarray', '_reconstruct'): _RECONSTRUCT,
    ('numpy.core.numeric', '_frombuffer'): _FROM_BUFFER,
    ('numpy._core.numeric', '_frombuffer'): _FROM_BUFFER,
    ('_codecs', 'encode'): _encode,
}


class _ArraysOnly(pickle.Unpickler):
  """Unpickles containers, numbers, strings and arrays; refuses whatever could run code."""

  def __init__(self, data, *, where):
    # Python 2 strings: latin1 turns the keys and names to text and leaves array bytes whole.
    super().__init__(io.BytesIO(data), encoding='latin1')
    self._where = where

  def find_class(self, module, name):
    if (module, name) not in _ALLOWED:
      raise errors.UsageError(
          f'{self._where} refers to `{module}.{name}`, which has no place in a CIFAR file and '
          'could run code: refused; download it again from the publisher')
    return _ALLOWED[module, name]


def _unpickle(data, where):
  """The dictionary in a CIFAR pickle, with text keys."""
  try:
    content = _ArraysOnly(data, where=where).load()
  except errors.UsageError:
    raise
  except Exception as error:  # a damaged pickle can raise nearly anything
    raise errors.UsageError(f'{where} is not a whole pickle ({errors.first_line(error)}); '
                            'unpack the archive again') from error
  if not isinstance(content, dict):
    raise errors.UsageError(f'{where} holds no dictionary; unpack the archive again')
  return content
