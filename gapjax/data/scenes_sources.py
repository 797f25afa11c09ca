"""The publishers' files of segmentation sets, from their folders or archives.

Cityscapes has 11 GB, so nothing is held: a set is a list of scenes that read themselves. What is
cheap is checked before the first is read: every image has its mask, of the same size. An archive
is read in place, nothing of it is written to disk.
"""

import collections
import contextlib
import dataclasses
import functools
import io
import pathlib
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import BinaryIO

import numpy as np
import PIL.Image

from gapjax import errors
from gapjax.data.catalogue import VOID

_LARGEST = 1 << 28  # bytes of a file; Cityscapes' images have 3 million
_FOREIGN = 'Python cannot unpack this ({}); unpack it with another program and pass the folder'


@dataclasses.dataclass(frozen=True)
class Scene:
  """One image and its mask, read when called.

  Attributes:
    id: its name, unique in the split.
    image: () -> the bytes of the encoded image, the publisher's own.
    label: () -> (h, w) uint8, classes and 255 for void.
  """

  id: str
  image: Callable[[], bytes]
  label: Callable[[], np.ndarray]


def png(array) -> bytes:
  """The PNG file of a uint8 array, (h, w) or (h, w, 3)."""
  file = io.BytesIO()
  PIL.Image.fromarray(array).save(file, 'PNG')
  return file.getvalue()


@dataclasses.dataclass(frozen=True)
class SceneSet:
  """A segmentation set.

  Attributes:
    class_names: K names, in the order of the labels.
    palette: (K, 3) uint8, the publisher's colours of the classes.
    splits: split -> its scenes.
  """

  class_names: tuple[str, ...]
  palette: np.ndarray
  splits: Mapping[str, Sequence[Scene]]


@dataclasses.dataclass(frozen=True)
class Labels:
  """What the numbers in a publisher's masks mean.

  Attributes:
    title: what the publisher calls the set.
    classes: name -> (number in the masks, colour), in the order of our labels.
    void: other numbers that may occur.
  """

  title: str
  classes: Mapping[str, tuple[int, tuple[int, int, int]]]
  void: tuple[int, ...]

  def of_number(self):
    """(256,) int16: number in the masks -> our label, VOID, or -1 where it may not occur."""
    labels = np.full(256, -1, np.int16)
    labels[list(self.void)] = VOID
    labels[[number for number, _ in self.classes.values()]] = range(len(self.classes))
    return labels


def _voc_colour(index):
  """Each bit of the index, lowest first, is the next lower bit of red, green, blue in turn."""
  return tuple(sum((index >> 3 * i + channel & 1) << 7 - i for i in range(3))
               for channel in range(3))


_VOC = (
    'background', 'aeroplane', 'bicycle', 'bird', 'boat', 'bottle', 'bus', 'car', 'cat', 'chair',
    'cow', 'diningtable', 'dog', 'horse', 'motorbike', 'person', 'pottedplant', 'sheep', 'sofa',
    'train', 'tvmonitor')

LABELS = {
    'voc2012': Labels('VOC 2012', void=(VOID,), classes={
        name: (i, _voc_colour(i)) for i, name in enumerate(_VOC)}),
    # No 255: the publisher has it in the masks of his train ids alone, which number otherwise.
    'cityscapes': Labels('Cityscapes', void=tuple(range(34)), classes={
        'road': (7, (128, 64, 128)), 'sidewalk': (8, (244, 35, 232)),
        'building': (11, (70, 70, 70)), 'wall': (12, (102, 102, 156)),
        'fence': (13, (190, 153, 153)), 'pole': (17, (153, 153, 153)),
        'traffic light': (19, (250, 170, 30)), 'traffic sign': (20, (220, 220, 0)),
        'vegetation': (21, (107, 142, 35)), 'terrain': (22, (152, 251, 152)),
        'sky': (23, (70, 130, 180)), 'person': (24, (220, 20, 60)), 'rider': (25, (255, 0, 0)),
        'car': (26, (0, 0, 142)), 'truck': (27, (0, 0, 70)), 'bus': (28, (0, 60, 100)),
        'train': (31, (0, 80, 100)), 'motorcycle': (32, (0, 0, 230)),
        'bicycle': (33, (119, 11, 32))}),
    # Stored in Cityscapes' layout with the nearest of its numbers.
    'camvid': Labels('CamVid', void=(0, VOID), classes={
        'sky': (23, (128, 128, 128)), 'building': (11, (128, 0, 0)), 'pole': (17, (192, 192, 128)),
        'road': (7, (128, 64, 128)), 'pavement': (8, (0, 0, 192)), 'tree': (21, (128, 128, 0)),
        'sign': (20, (192, 128, 128)), 'fence': (13, (64, 64, 128)), 'car': (26, (64, 0, 128)),
        'pedestrian': (24, (64, 64, 0)), 'bicyclist': (33, (0, 128, 192))}),
}

# Where each comes from, for messages.
ORIGINS = {
    'voc2012': 'http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar',
    'cityscapes': 'https://www.cityscapes-dataset.com/downloads (leftImg8bit_trainvaltest.zip and '
                  'gtFine_trainvaltest.zip; needs a login)',
    'camvid': "CamVid's images and 11 classes in Cityscapes' layout",
}


@contextlib.contextmanager
def open_scenes(name, source):
  """A SceneSet, readable inside the `with`.

  Args:
    name: one of LABELS.
    source: VOC: the folder VOC2012 or VOCdevkit, the parent of that, or the .tar. Cityscapes and
      CamVid: the folder that holds leftImg8bit and gtFine, or the two zips.

  Raises:
    UsageError: files are missing or damaged, sizes differ, or a list is empty; and when a scene is
      read, what is damaged in it, or a label that the set does not have.
  """
  source, classes = pathlib.Path(source).expanduser(), LABELS[name].classes
  if not source.exists():
    raise errors.UsageError(f'{source} does not exist; --source is where {LABELS[name].title} '
                            f'lies, from {ORIGINS[name]}')
  find, read = (_find_voc, _voc) if name == 'voc2012' else (_find_cityscapes, _cityscapes)
  with find(source, name) as tree:
    yield SceneSet(class_names=tuple(classes), splits=read(tree, name),
                   palette=np.array([colour for _, colour in classes.values()], np.uint8))


# ---- Folders and archives, read the same way. ----


@dataclasses.dataclass(frozen=True)
class _Tree:
  """Files of a folder or of archives.

  Attributes:
    files: name -> (() -> the open file).
    where: name -> where it lies, for messages.
  """

  files: Mapping[str, Callable[[], BinaryIO]]
  where: Callable[[str], str]


def _folder(root, folders):
  """The files under some folders of `root`."""
  paths = (path / file for folder in folders for path, files in _walk(root / folder)
           for file in files)
  return contextlib.nullcontext(_Tree(
      {path.relative_to(root).as_posix(): functools.partial(path.open, 'rb') for path in paths},
      where=lambda name: str(root / name)))


def _walk(folder, above=()):
  """(path, names of its files) of a folder and all below it, links followed, circles left."""
  path = folder.resolve()
  if not folder.is_dir() or path in above:
    return
  below = sorted(folder.iterdir())
  yield folder, [child.name for child in below if child.is_file()]  # a pipe would be waited for
  for child in below:
    yield from _walk(child, (*above, path))


def _find_voc(source, name):
  if source.is_file():
    return _voc_tar(source, name)
  for root in (source, source / 'VOC2012', source / 'VOCdevkit' / 'VOC2012'):
    if (root / 'JPEGImages').is_dir():
      return _folder(root, ['ImageSets/Segmentation', 'JPEGImages', 'SegmentationClass',
                            'SegmentationClassAug'])
  raise errors.UsageError(f'{source} does not hold VOC 2012: expected JPEGImages in it, in its '
                          f'VOC2012 or in its VOCdevkit/VOC2012; from {ORIGINS[name]}')


@contextlib.contextmanager
def _voc_tar(source, name):
  again = f'unpack it and pass the folder, or download it again from {ORIGINS[name]}'
  try:
    # Not compressed, as published: any member is one seek away.
    with tarfile.open(source, 'r:') as archive:
      members = {}
      for member in archive:
        _, inside, path = f'/{member.name}'.partition('/VOC2012/')
        if inside and member.isreg():
          members[path] = functools.partial(archive.extractfile, member)
      if not members:
        raise errors.UsageError(f'{source} holds no folder VOC2012; {again}')
      yield _Tree(members, where=lambda name: f'{source}: {name}')
  except errors.UsageError:
    raise
  except (tarfile.TarError, EOFError, MemoryError, OverflowError, ValueError) as error:
    raise errors.UsageError(f'{source} is not a whole tar archive without compression '
                            f'({errors.first_line(error)}); {again}') from error


def _find_cityscapes(source, name):
  folders = ('leftImg8bit', 'gtFine')
  missing = [folder for folder in folders if not (source / folder).is_dir()]
  if not missing:
    return _folder(source, folders)
  zips = {folder: source / f'{folder}_trainvaltest.zip' for folder in folders}
  absent = [path.name for path in zips.values() if not path.is_file()]
  if absent:
    raise errors.UsageError(
        f'{source} does not hold {LABELS[name].title}: no {" and no ".join(missing)} folder, and '
        f'no {" and no ".join(absent)}; --source is the folder that holds both, from '
        f'{ORIGINS[name]}')
  return _zips(zips, name)


@contextlib.contextmanager
def _zips(paths, name):
  """Of several archives, as one tree; the first folder in a name says which archive."""
  members = {}
  with contextlib.ExitStack() as stack:
    for path in paths.values():
      try:
        archive = stack.enter_context(zipfile.ZipFile(path))
      except (zipfile.BadZipFile, EOFError) as error:
        raise errors.UsageError(f'{path} is not a whole zip archive ({errors.first_line(error)}); '
                                f'download it again from {ORIGINS[name]}') from error
      except NotImplementedError as error:  # of a newer version of the format
        raise errors.UsageError(f'{path}: {_FOREIGN.format(errors.first_line(error))}') from error
      members |= {name: functools.partial(archive.open, name) for name in archive.namelist()}
    yield _Tree(members, where=lambda name: f'{paths[name.partition("/")[0]]}: {name}')


# ---- Layouts. ----


def _voc(tree, name):
  """split -> scenes of VOC's lists; train_aug where SegmentationClassAug and its list are there."""
  lists, masks = 'ImageSets/Segmentation', 'SegmentationClass'
  splits = {'train': (f'{lists}/train.txt', masks), 'val': (f'{lists}/val.txt', masks)}
  for file in (f'{lists}/trainaug.txt', f'{lists}/train_aug.txt'):  # both names are about
    if file in tree.files and any(path.startswith(f'{masks}Aug/') for path in tree.files):
      splits['train_aug'] = (file, f'{masks}Aug')
  return {split: [
      _scene(tree, name, id=id, image=f'JPEGImages/{id}.jpg', mask=f'{folder}/{id}.png',
             listed=f', listed in {file}')
      for id in _read_list(tree, file)] for split, (file, folder) in splits.items()}


def _read_list(tree, file):
  """The names in a list, one a line."""
  if file not in tree.files:
    raise errors.UsageError(f'{tree.where(file)} is missing; unpack or download VOC 2012 again')
  with _reading(tree, file) as lines:
    ids = [id for line in _whole(lines).decode('utf-8').split('\n') if (id := line.strip())]
  if not ids:
    raise errors.UsageError(f'{tree.where(file)} names no image; unpack VOC 2012 again')
  twice = [id for id, count in collections.Counter(ids).items() if count > 1]
  if twice:
    raise errors.UsageError(f'{tree.where(file)} names {twice[0]} twice; unpack VOC 2012 again')
  return ids


def _cityscapes(tree, name):
  """split -> scenes: train, val, and test when its masks are no dummies."""
  pairs = {split: {} for split in ('train', 'val', 'test')}  # split -> (city, stem) -> kinds
  # No name with a dot first: macOS puts a file ._NAME beside each on a disk of another system.
  pattern = re.compile(r'(leftImg8bit|gtFine)/(train|val|test)/([^/.][^/]*)/([^/.][^/]*)_'
                       r'(leftImg8bit|gtFine_labelIds)\.png')
  for path in sorted(tree.files):
    match = pattern.fullmatch(path)
    if match and match[5].startswith(match[1]):
      pairs[match[2]].setdefault((match[3], match[4]), []).append(match[1])
  splits = {}
  for split, kinds in pairs.items():
    if split == 'test' and not any('gtFine' in kind for kind in kinds.values()):
      continue  # images alone, or nothing: the publisher keeps these masks
    if not kinds:
      raise errors.UsageError(f'{LABELS[name].title} needs '
                              f'leftImg8bit/{split}/CITY/NAME_leftImg8bit.png, and there is none; '
                              'unpack it again')
    images = {(city, stem): f'leftImg8bit/{split}/{city}/{stem}_leftImg8bit.png'
              for city, stem in kinds}
    _check_names(tree, images)
    scenes = [
        _scene(tree, name, id=stem, image=image,
               mask=f'gtFine/{split}/{city}/{stem}_gtFine_labelIds.png', listed='')
        for (city, stem), image in images.items()]
    # Cityscapes' own test masks are dummies without any class.
    if split != 'test' or any((scene.label() != VOID).any() for scene in scenes):
      splits[split] = scenes
  return splits


def _check_names(tree, images):
  """Raises UsageError where two cities have an image of the same name: TFDS would complain after
  all are read, without the names. images: (city, name) -> path."""
  first = {}
  for (_, stem), path in images.items():
    if stem in first:
      raise errors.UsageError(f'{tree.where(first[stem])} and {tree.where(path)} have one name, '
                              'and a split takes it once: take one of them and its mask away')
    first[stem] = path


def _scene(tree, name, *, id, image, mask, listed):
  """A Scene, after a look at both files' headers."""
  for path, what in ((image, f'the image of {mask}'), (mask, f'the mask of {image}')):
    if path not in tree.files:
      raise errors.UsageError(f'{tree.where(path)} is missing, {what}{listed}; unpack or download '
                              f'{LABELS[name].title} again')
  sizes = []
  for path in (image, mask):
    with _reading(tree, path) as file, PIL.Image.open(file) as picture:
      sizes.append('{}x{}'.format(*picture.size))
  if sizes[0] != sizes[1]:
    raise errors.UsageError(f'{tree.where(image)} has {sizes[0]} pixels and its mask {mask} '
                            f'{sizes[1]}; they must agree: unpack {LABELS[name].title} again')
  return Scene(id=id, image=lambda: _read_image(tree, image),
               label=lambda: _read_label(tree, mask, LABELS[name]))


# ---- Files. ----


@contextlib.contextmanager
def _reading(tree, path):
  """The open file; turns what a damaged one raises into a UsageError that names it."""
  try:
    with tree.files[path]() as file:
      yield file
  except RuntimeError as error:  # zipfile's, of a password or a method that it does not have
    message = _FOREIGN.format(errors.first_line(error))
    raise errors.UsageError(f'{tree.where(path)}: {message}') from error
  except (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, tarfile.TarError,
          zipfile.BadZipFile, PIL.Image.DecompressionBombError) as error:
    if isinstance(error, OSError) and error.errno is not None:
      raise  # the disk's complaint, not the file's
    raise errors.UsageError(f'{tree.where(path)} is damaged ({errors.first_line(error)}); unpack '
                            'or download it again') from error


def _whole(file):
  """All bytes of a file, whatever size its archive says. Raises ValueError where there are more
  than an image or a list can have."""
  content = file.read(_LARGEST + 1)
  if len(content) > _LARGEST:
    raise ValueError(f'more than {_LARGEST >> 20} MiB')
  return content


def _read_image(tree, path):
  """The bytes of an image that decodes: a damaged one is found now, not in training."""
  with _reading(tree, path) as file:
    content = _whole(file)
    with PIL.Image.open(io.BytesIO(content)) as picture:
      if picture.format == 'PNG':
        picture.verify()  # its checksums, at a tenth of the time
      else:
        picture.load()
  return content


def _read_label(tree, path, labels):
  """(h, w) uint8 of a mask in the publisher's numbers."""
  with _reading(tree, path) as file, PIL.Image.open(file) as picture:
    mode, numbers = picture.mode, np.asarray(picture)
  if mode not in ('P', 'L'):
    raise errors.UsageError(f'{tree.where(path)} is no mask of {labels.title}: its pixels are '
                            f'{mode}, not one byte each')
  label = labels.of_number()[numbers]
  if (label < 0).any():
    raise errors.UsageError(f'{tree.where(path)} holds the label {numbers[label < 0][0]}, which '
                            f'{labels.title} does not have; pass its own masks (not those of train '
                            'ids)')
  return label.astype(np.uint8)
