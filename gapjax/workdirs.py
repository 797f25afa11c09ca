"""A run's folder: whose config it is, who is using it, and its JSON files."""

import contextlib
import fcntl
import json
import os

from etils import epath

from gapjax import config as configs
from gapjax.errors import UsageError


def claim(workdir, config) -> None:
  """Makes workdir the folder of this config, or checks that it is.

  Raises UsageError naming the fields in which the config there differs.
  """
  path = epath.Path(workdir) / 'config.json'
  if path.exists():
    different = configs.difference(config, read_json(path))
    if different:
      raise UsageError(f'{workdir} is the workdir of another config: {"; ".join(different)}; '
                       'use another --workdir')
    return
  write_json(path, configs.as_json(config))


@contextlib.contextmanager
def lock(workdir):
  """Makes workdir, and holds it for this process; the system lets go when the process ends.

  Raises UsageError when another process holds it. A remote workdir (gs://) cannot be held.
  """
  workdir = epath.Path(workdir)
  workdir.mkdir(parents=True, exist_ok=True)
  if '://' in str(workdir):
    yield
    return
  with open(os.fspath(workdir / '.lock'), 'w') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise UsageError(f'{workdir} is in use by another process; wait for it, or use another '
                       '--workdir') from None
    yield


def read_summary(workdir) -> dict | None:
  """summary.json of a finished run, or None."""
  path = epath.Path(workdir) / 'summary.json'
  return read_json(path) if path.exists() else None


def read_json(path):
  """Raises UsageError naming the file when it is not JSON."""
  try:
    return json.loads(epath.Path(path).read_text())
  except json.JSONDecodeError as error:
    raise UsageError(f'{path} is not valid JSON (line {error.lineno}: {error.msg}); '
                     'move it away and run the command again') from None


def write_json(path, value) -> None:
  """Writes through a temporary file: a reader, or a kill, never sees half of it."""
  path = epath.Path(path)
  temporary = path.parent / f'.{path.name}.tmp'
  temporary.write_text(json.dumps(value, indent=2) + '\n')
  temporary.replace(path)
