"""Folders that TFDS prepared: where they are, which version, and whether they can be read."""

import functools
import json
import logging
import os
import pathlib
import shlex

import tensorflow_datasets as tfds

from gapjax import errors

log = logging.getLogger(__name__)

# Made of what scikit-learn ships: prepared on first use, without a source.
EMBEDDED = ('digits', 'digit_scenes')

_FORMAT = tfds.core.FileFormat.ARRAY_RECORD


def data_root(data_dir):
  """The folder of all datasets; None means TFDS' own default. Raises UsageError for a bucket's."""
  root = str(data_dir or os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets')
  if '://' in root:
    raise errors.UsageError(f'{"--data_dir" if data_dir else "TFDS_DATA_DIR"} is {root}: datasets '
                            'are read from this machine; copy them here, and give that folder')
  return pathlib.Path(root).expanduser()


def open_named(name, data_dir):
  """A TFDS builder of the newest readable version of `name` under `data_dir`.

  Raises:
    UsageError: not prepared, prepared in part, or as tfrecord; with the command to run.
  """
  folder, problem = newest(data_root(data_dir) / name)
  if folder is None:
    raise errors.UsageError(explain(name, data_dir, problem=problem))
  return _builder(folder)


def open_folder(path, data_dir):
  """A TFDS builder of a prepared folder: a version's, or the dataset's (newest version).

  A run keeps the path that it was trained with: seen from elsewhere, or moved since, the folder is
  looked for under `data_dir`, by its whole path if that is relative, then by its last part.

  Raises:
    UsageError: not a prepared folder, or one that cannot be read.
  """
  named, root = pathlib.Path(path).expanduser(), data_root(data_dir)
  path = next(filter(pathlib.Path.is_dir, (named, root / named, root / named.name)), None)
  if path is None:
    raise errors.UsageError(
        f'there is no folder {named}, nor {named.name} in {root}; a dataset is a known name or a '
        'folder prepared by TFDS: give as --data_dir the folder that it is in')
  if path not in (named, root / named):
    _warn(f'there is no folder {named}; {path} is read instead')
  folder, problem = newest(path)
  if folder is None:
    raise errors.UsageError(problem or f'{path} is not a folder prepared by TFDS: it holds no '
                            'dataset_info.json and no version folder such as 1.0.0')
  return _builder(folder)


def newest(path):
  """(newest readable version folder or None, what is wrong with the newest of all or '')."""
  candidates = [path] if (path / 'dataset_info.json').exists() else _versions(path)
  problems = {folder: _problem(folder) for folder in candidates}
  readable = [folder for folder, problem in problems.items() if not problem]
  problem = next(iter(problems.values()), '')
  if readable and problem:
    _warn(f'{problem}; {readable[0]} is read instead')
  return (readable[0], '') if readable else (None, problem)


@functools.cache
def _warn(message):
  """Once: every split that is read asks for the newest version again."""
  log.warning(message)


def explain(name, data_dir, *, problem):
  """One line on why `name` cannot be read and the exact command that prepares it."""
  if 'tfrecord' in problem:  # the command would find the same folder again: build it elsewhere
    return f'{problem}, or run `{_command(name, "OTHER_FOLDER")}`'
  if problem:
    return f'{problem}, then run `{_command(name, data_dir)}`'
  return (f'{name} is not prepared in {data_root(data_dir)}; '
          f'run `{_command(name, data_dir)}`'
          + (' (without --source it is downloaded)' if name.startswith('cifar') else ''))


def _command(name, data_dir):
  source = '' if name in EMBEDDED else ' --source=PATH'
  where = f' --data_dir={shlex.quote(str(data_dir))}' if data_dir else ''
  return f'gapjax prepare {name}{source}{where}'


def _versions(path):
  """The folders named 1.2.3 in `path`, newest first."""
  versions = tfds.core.utils.version.list_all_versions(path)
  return [path / str(version) for version in versions[::-1]]


def _problem(folder):
  """'' when the folder is whole and readable without TensorFlow, else what to do about it.

  TFDS takes any version folder for a prepared one, so a copy cut short is told apart here.
  """
  partial = f'{folder} is incomplete ({{}}): remove it'
  for file in ('dataset_info.json', 'features.json'):
    try:
      json.loads((folder / file).read_text())
    except FileNotFoundError:
      return partial.format(f'no {file}')
    except ValueError:
      return partial.format(f'{file} is cut short')
  try:
    return _problem_of_content(folder, partial)
  except OSError:  # the disk's complaint
    raise
  except Exception as error:  # TFDS raises nearly anything for JSON that is not its own
    return f'{folder} cannot be read by TFDS ({errors.first_line(error)}): move it away'


def _problem_of_content(folder, partial):
  """`_problem` of a folder whose JSON files are whole."""
  info = tfds.builder_from_directory(folder).info
  if _FORMAT not in info.available_file_formats():
    return (f'{folder} is stored as {info.file_format.value}, not array_record: have its builder '
            "prepare it elsewhere by download_and_prepare(file_format='array_record'), or, in a "
            'virtual environment of its own, `pip install tensorflow-datasets tensorflow '
            'apache-beam mlcroissant array-record`, then `tfds convert_format '
            f'--dataset_version_dir={shlex.quote(str(folder))} --out_file_format=array_record`')
  splits = _builder(folder).info.splits.values()
  missing = [shard.name for split in splits for shard in split.filepaths if not shard.exists()]
  if missing:
    return partial.format(f'no {missing[0]}')
  # No record is smaller than a byte: what is not there is not counted, or waited for.
  short = [split.name for split in splits
           if split.num_examples > sum(map(os.path.getsize, split.filepaths))]
  return partial.format(f'split {short[0]} lacks records') if short else ''


def _builder(folder):
  """A builder that reads array_record, also from a folder that holds tfrecord as well."""
  builder = tfds.builder_from_directory(folder)
  # Not builder_from_directory(file_format=): it refuses a format that is not the folder's first.
  builder.info.set_file_format(_FORMAT, override=True, override_if_initialized=True)
  return builder
