"""A run's folder: whose config it is and on what data, who is using it, and its JSON files."""

import contextlib
import fcntl
import itertools
import os
import shlex
import socket

from ml_collections import ConfigDict

from gapjax import config as configs
from gapjax import paths
from gapjax.errors import UsageError
from gapjax.training.log import METRICS

DATA = 'data.json'


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


def settled(config: ConfigDict, *, platform: str) -> ConfigDict:
  """The config as it runs here: `steps_per_call` 0 (automatic) is 1 on CPU, where the gradients of
  convolutions are many times slower inside a loop, and 32 elsewhere."""
  config = ConfigDict(config.to_dict())
  config.steps_per_call = config.steps_per_call or (1 if platform == 'cpu' else 32)
  return config


def check(workdir, config: ConfigDict) -> None:
  """Raises UsageError, naming the fields, where workdir's run is trained with another config, or
  was evaluated with one: a run may go on to be evaluated otherwise only if it never was. And where
  it is a suite's, whose report would be taken for the run's."""
  workdir = paths.of(workdir)
  if any((workdir / name).exists() for name in ('results.json', 'run.json')):
    raise UsageError(f'{workdir} is the workdir of gapjax reproduce; use another --workdir')
  there = paths.read_json(path) if (path := workdir / 'config.json').exists() else None
  if there is None:
    return
  if different := configs.difference(
      config, there, deciding=configs.EVALUATION if _evaluated(workdir) else configs.RUN):
    raise UsageError(f'{workdir} is the workdir of another config: {"; ".join(different)}; '
                     'use another --workdir')


def _evaluated(workdir):
  return any(line['split'] != 'train' for line in paths.read_lines(workdir / METRICS))


def check_data(workdir, data: dict[str, dict]) -> None:
  """Raises UsageError, saying what differs, where workdir's run is trained on other data, or was
  evaluated on other; a run of which that was not written down may take any.

  data: what is there now, {'trained': the training set's `identity()`, 'evaluated': the other's}.
  """
  workdir = paths.of(workdir)
  there = paths.read_json(workdir / DATA) if (workdir / DATA).exists() else {}
  for job in ('trained', *(['evaluated'] if _evaluated(workdir) else [])):
    now, then = data[job], there.get(job, data[job])
    if now != then:
      raise UsageError(
        f'{workdir} was {job} on other data: {_difference(now, then)}; give the --data_dir of that '
        f'data, train in another --workdir, or remove {workdir / DATA} to take this data all the '
        'same')


def _difference(now, then):
  """'4 examples (there: 6), class 0 cat (there: dog)' of two sets' identities."""
  classes = itertools.zip_longest(now['classes'], then['classes'], fillvalue='none')
  found = [f'{now["examples"]} examples (there: {then["examples"]})'] * (
    now['examples'] != then['examples']) + [
      f'class {i} {one} (there: {other})' for i, (one, other) in enumerate(classes)
      if one != other][:1]
  return ', '.join(found) or 'other images or labels'


def claim(workdir, config: ConfigDict, data: dict | None = None) -> None:
  """Writes down that workdir is this config's, once the config is known to build, and, where it is
  trained now, on what data: see `check_data`."""
  paths.write_json(paths.of(workdir) / 'config.json', configs.as_json(config))
  if data:
    paths.write_json(paths.of(workdir) / DATA, data)


def read_config(workdir) -> ConfigDict:
  """The config of workdir's run. Raises UsageError when there is no run, or it is not valid."""
  path = paths.of(workdir) / 'config.json'
  if not path.exists():
    raise UsageError(f'{workdir} holds no run; train one: gapjax train --config=FILE '
                     f'--workdir={shlex.quote(str(workdir))}')
  found = paths.read_json(path)
  try:
    return configs.from_json(found)
  except (TypeError, UsageError) as error:
    raise UsageError(f'{path} is not a config of gapjax ({error}); use another --workdir') from None


def finished(workdir, config: ConfigDict) -> dict | None:
  """The summary of a config's finished run, or None; from now on it is ranked as the config says.

  Raises UsageError as `check` does.
  """
  check(workdir, config)
  summary = read_summary(workdir)
  if summary:
    claim(workdir, config)
  return summary


def read_summary(workdir) -> dict | None:
  """summary.json of a finished run, or None."""
  path = paths.of(workdir) / 'summary.json'
  return paths.read_json(path) if path.exists() else None
