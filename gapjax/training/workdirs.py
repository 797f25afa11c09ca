"""A run's folder: whose config it is, who is using it, and its JSON files."""

import contextlib
import fcntl
import os
import socket

from ml_collections import ConfigDict

from gapjax import config as configs
from gapjax import paths
from gapjax.errors import UsageError


@contextlib.contextmanager
def lock(workdir):
  """Makes workdir, and holds it for this process; the system lets go when the process ends.

  In a bucket nothing would let go when a process dies, so nothing is held there: do not start two
  runs in one remote workdir. Instead it is written down there who runs, which also shows, before
  hours of work, that the bucket can be written to.

  Raises UsageError when another process holds it.
  """
  workdir = paths.of(workdir)
  paths.make(workdir)
  if paths.is_remote(workdir):
    paths.write_json(workdir / '.lock', {'host': socket.gethostname(), 'pid': os.getpid()})
    yield
    return
  with open(workdir / '.lock', 'w') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise UsageError(f'{workdir} is in use by another process; wait for it, or use another '
                       '--workdir') from None
    yield


def settle(workdir, config: ConfigDict, *, platform: str) -> ConfigDict:
  """The config as workdir's run has it, with `steps_per_call` 0 (automatic) settled.

  Automatic is what the run began with, wherever it goes on; a new one takes 1 on CPU (the gradients
  of convolutions are many times slower inside a loop there) and 32 elsewhere.

  Raises UsageError naming the fields in which the config there differs.
  """
  config = ConfigDict(config.to_dict())
  path = paths.of(workdir) / 'config.json'
  there = paths.read_json(path) if path.exists() else None
  if not config.steps_per_call:
    config.steps_per_call = (there or {}).get('steps_per_call') or (1 if platform == 'cpu' else 32)
  if there is not None and (different := configs.difference(config, there)):
    raise UsageError(f'{workdir} is the workdir of another config: {"; ".join(different)}; '
                     'use another --workdir')
  return config


def claim(workdir, config: ConfigDict) -> None:
  """Writes down that workdir is this config's, once the config is known to build."""
  path = paths.of(workdir) / 'config.json'
  if not path.exists():
    paths.write_json(path, configs.as_json(config))


def read_config(workdir) -> ConfigDict:
  """The config of workdir's run. Raises UsageError when there is no run, or it is not valid."""
  path = paths.of(workdir) / 'config.json'
  if not path.exists():
    raise UsageError(f'{workdir} holds no run; train one: gapjax train --config=FILE '
                     f'--workdir={workdir}')
  config = configs.default()
  try:
    config.update(paths.read_json(path))
  except (KeyError, TypeError, ValueError, AttributeError) as error:
    raise UsageError(f'{path} is not a config of gapjax ({error}); use another --workdir') from None
  configs.validate(config)
  return config


def read_summary(workdir) -> dict | None:
  """summary.json of a finished run, or None."""
  path = paths.of(workdir) / 'summary.json'
  return paths.read_json(path) if path.exists() else None
