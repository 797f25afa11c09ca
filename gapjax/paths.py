"""Where a run's files are: in a folder on disk, or in a Cloud Storage bucket (gs://BUCKET/FOLDER).

All files of a workdir go through here. A local path is a `pathlib.Path` and stays one. A remote one
is an `etils.epath.Path`, which without TensorFlow is fsspec's gcsfs: `pip install gcsfs`.
orbax reads and writes gs:// by itself, through epath and tensorstore.

An object in a bucket is there whole or not at all, but it cannot grow, be renamed, or be held by
one process: see `write_bytes`, `Staged`, `move` and `workdirs.lock`.
"""

import contextlib
import errno
import importlib.util
import io
import json
import os
import pathlib
import shutil
import sys
import tempfile
import time

from gapjax.errors import UsageError

SCHEME = 'gs://'
# A bucket takes one write a second to the same object, and each stops training for a moment.
UPLOAD_SECONDS = 10


def of(path):
  """A path to a file or folder, local or remote: pathlib.Path or epath.Path.

  Raises UsageError for an address that is not gs://BUCKET..., and where gcsfs is not installed.
  """
  text = os.fspath(path)
  if '://' not in text:
    return pathlib.Path(path)
  if not is_remote(text) or not text.removeprefix(SCHEME).strip('/'):
    raise UsageError(f'{text}: a remote folder must be gs://BUCKET/FOLDER; give one, or a local '
                     'folder')
  if not importlib.util.find_spec('gcsfs'):
    raise UsageError(f'{text} needs gcsfs, which is not installed: pip install gcsfs')
  import fsspec
  from etils import epath

  # Other processes write here too: a listing that was kept would not show it.
  fsspec.config.conf.setdefault('gcs', {}).setdefault('use_listings_cache', False)
  return epath.Path(text)


def cache() -> pathlib.Path:
  """gapjax's folder among the user's caches."""
  return pathlib.Path(os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache'), 'gapjax')


def is_remote(path) -> bool:
  """Whether it is in a bucket."""
  return os.fspath(path).startswith(SCHEME)


def make(folder) -> None:
  """Makes a folder and those above it; in a bucket it comes with its first file."""
  if not is_remote(folder):
    folder.mkdir(parents=True, exist_ok=True)


def check_writable(folder) -> None:
  """Raises UsageError where a folder on disk takes no file: asked before the work that is to be
  kept there. What is not there yet is made later, and a bucket is asked when it is written to."""
  if is_remote(folder) or not os.path.isdir(folder):
    return
  try:
    tempfile.TemporaryFile(dir=folder).close()
  except OSError as error:
    raise UsageError(f'{folder} cannot be written to ({error.strerror}), and the results go there; '
                     'give a folder that you may write to, such as a copy of it') from None


@contextlib.contextmanager
def kept(results):
  """Inside, results are written. Where that fails they are printed as JSON: they took long."""
  try:
    yield
  except Exception:
    print(json.dumps(results))
    raise


@contextlib.contextmanager
def full_disk(folder):
  """Turns what a library makes of a full disk or quota, such as a RuntimeError, or an OSError
  without its number, into the OSError that it is, of `folder`."""
  try:
    yield
  except (OSError, RuntimeError, ValueError) as error:
    for number in (errno.ENOSPC, errno.EDQUOT):
      if os.strerror(number) in str(error):
        raise OSError(number, os.strerror(number), str(folder)) from error
    raise


def write_bytes(path, data: bytes) -> None:
  """Writes through a temporary file: a reader, a kill or a full disk never leaves half of it.

  In a bucket one write is that already.
  """
  path = of(path)
  if is_remote(path):
    path.write_bytes(data)
    return
  temporary = path.with_name(f'.{path.name}.tmp')
  temporary.write_bytes(data)
  temporary.replace(path)


@contextlib.contextmanager
def opened(path):
  """What a picture is written to: a buffer, written to the path after."""
  buffer = io.BytesIO()
  yield buffer
  write_bytes(path, buffer.getvalue())


def move(source, target) -> None:
  """Moves a folder to where nothing is, or replaces the folder there.

  In a bucket its files are copied, and until all of them are `source` is whole.
  """
  make(target.parent)
  if target.exists():
    shutil.rmtree(target) if not is_remote(target) else target.rmtree()
  if is_remote(source):
    import fsspec
    fsspec.filesystem('gcs').mv(os.fspath(source), os.fspath(target), recursive=True)
  else:
    shutil.move(source, target)


class Staged:
  """`folder`, where files that grow are written: the workdir itself if it is local.

  For a remote one it is a temporary folder on this machine, and `upload` copies each of its files
  that has grown to the workdir, whole. A kill loses what was not uploaded.
  """

  def __init__(self, workdir):
    self._workdir, self._sizes, self._last = of(workdir), {}, -UPLOAD_SECONDS
    self._temporary = is_remote(workdir) and tempfile.TemporaryDirectory(prefix='gapjax.')
    self.folder = pathlib.Path(self._temporary.name) if self._temporary else self._workdir

  def upload(self, *, due: bool = False) -> None:
    """Copies now; with `due` only if the last time was UPLOAD_SECONDS ago."""
    if not self._temporary or (due and time.monotonic() - self._last < UPLOAD_SECONDS):
      return
    for file in sorted(self.folder.rglob('*')):
      if file.is_file() and (size := file.stat().st_size) != self._sizes.get(file):
        write_bytes(self._workdir / file.relative_to(self.folder).as_posix(), file.read_bytes())
        self._sizes[file] = size
    self._last = time.monotonic()

  def close(self) -> None:
    """Copies what is left, and removes the temporary folder."""
    try:
      self.upload()
    finally:
      if self._temporary:
        self._temporary.cleanup()


def refused(error) -> str:
  """What to tell the user where a bucket is not there or not theirs, by gcsfs' exception, else ''.

  gcsfs raises FileNotFoundError for 404, a plain OSError for 403, neither with an errno, and its
  HttpError for 401.
  """
  no = ((isinstance(error, FileNotFoundError) and error.errno is None) or _forbidden(error)
        or getattr(error, 'code', None) in (401, 403)
        or type(error).__name__ == 'DefaultCredentialsError')
  if not no or 'gcsfs' not in sys.modules:
    return ''
  return (f'the bucket cannot be used ({str(error).strip() or type(error).__name__}); see that it '
          'exists and that you may write to it: gcloud auth application-default login')


def unreachable(error) -> bool:
  """Whether it is the way to the bucket that fails, or permission, and not what is in it."""
  library = type(error).__module__.partition('.')[0]
  # tensorstore raises ValueError, whose text begins with the name of the status; so does that of
  # jax's errors, which are of another class.
  return (_forbidden(error) or library in ('aiohttp', 'fsspec', 'gcsfs', 'google', 'requests')
          or (isinstance(error, ValueError) and str(error).startswith((
            'UNAVAILABLE', 'DEADLINE_EXCEEDED', 'RESOURCE_EXHAUSTED', 'PERMISSION_DENIED',
            'UNAUTHENTICATED', 'ABORTED'))))


def _forbidden(error):
  return type(error) is OSError and str(error).startswith('Forbidden')


# ---- JSON ----------------------------------------------------------------------------------------


def read_json(path, kind=dict):
  """The JSON value of a file, a dict or a list as `kind` says.

  Raises UsageError naming the file, and the line where that is known.
  """
  return _parse(_text(path), path, kind)


def check_fields(value: dict, fields: dict, where) -> None:
  """Raises UsageError where a JSON object lacks a field, or has one of another type.

  Args:
    value: the object.
    fields: {key: type or types that it may have}.
    where: what holds it, for the message.
  """
  for key, kind in fields.items():
    if key not in value or not isinstance(value[key], kind):
      wrong = f'`{key}` is {json.dumps(value[key])[:40]}' if key in value else f'no `{key}`'
      raise UsageError(f'{where} is not as gapjax writes it: {wrong}; mend it, or move the file '
                       'away, and run again')


def named(argument) -> tuple[str | None, str]:
  """(NAME, FILE) of 'NAME=FILE', (None, FILE) of a file, whose own path may hold a '='; `~` is
  expanded."""
  name, equals, path = str(argument or '').partition('=')
  if not equals or '/' in name or os.path.exists(argument):
    return None, argument and os.path.expanduser(argument)
  return name, os.path.expanduser(path)


def read_names(path) -> list[str]:
  """The names in a text file, such as ids, one a line. Raises UsageError as `read_json` does."""
  return [name for line in _text(of(path)).split('\n') if (name := line.strip())]


def read_lines(path) -> list[dict]:
  """The lines of a metrics.jsonl, which training/log.py writes; [] without one.

  A last line that a killed process left unfinished is dropped; any other that is not a JSON object
  with its step and split raises UsageError.
  """
  path = of(path)
  texts = _text(path).split('\n')[:-1] if path.exists() else []
  lines = {number: _parse(text, path, dict, number)
           for number, text in enumerate(texts, 1) if text.strip()}
  for number, line in lines.items():
    check_fields(line, {'step': int, 'split': str}, f'{path} line {number}')
  return [*lines.values()]


def _text(path):
  try:
    return of(path).read_text(encoding='utf-8-sig')  # Windows' editors put a mark first
  except UnicodeDecodeError:
    raise UsageError(f'{path} is not UTF-8 text; mend it, or move it away, and run again') from None


def _parse(text, path, kind, line=1):
  """The JSON value in `text`; `line` is where it starts."""
  try:
    value, wrong = json.loads(text), f'should hold a JSON {"list" if kind is list else "object"}'
  except json.JSONDecodeError as error:
    value, line, wrong = None, line + error.lineno - 1, f'is not JSON ({error.msg})'
  except (RecursionError, ValueError):  # hundreds of brackets in each other; thousands of digits
    value, wrong = None, 'is JSON that cannot be read, too deep or of too long a number'
  if not isinstance(value, kind):
    raise UsageError(f'{path} line {line} {wrong}; mend it, or move it away, and run again')
  return value


def write_json(path, value) -> None:
  """Writes valid JSON, never half of it. Raises ValueError on NaN, which JSON does not have."""
  write_bytes(path, (json.dumps(value, indent=2, allow_nan=False) + '\n').encode())
