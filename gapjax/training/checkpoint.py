"""Checkpoints with orbax: saved on any number of devices, restored on any, checked when read."""

import errno
import hashlib
import logging
import os
import re
import shlex
import shutil
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp

from gapjax import paths
from gapjax.errors import Diverged, UsageError
from gapjax.training.devices import broadcast, decided, is_first
from gapjax.training.system import versions

log = logging.getLogger(__name__)


class Checkpoints:
  """The checkpoints of a run: `workdir/checkpoints/STEP`. The first process alone reads and writes
  there, and tells the others what it read.

  Each holds the state and a `meta` dict with the state's digest: a file that was truncated or
  altered without the format noticing is found all the same.
  """

  def __init__(self, workdir, *, keep: int = 1, read_only: bool = False):
    workdir = paths.of(workdir)
    if not paths.is_remote(workdir):  # orbax takes no relative path
      workdir = workdir.absolute()
    self.directory, self._read_only = workdir / 'checkpoints', read_only
    if not is_first():
      return
    if not read_only:
      self.directory.mkdir(parents=True, exist_ok=True)
    alone = ocp.options.MultiprocessingOptions(active_processes={0})
    self.manager = ocp.CheckpointManager(
      self.directory,
      item_handlers={'state': ocp.StandardCheckpointHandler(multiprocessing_options=alone),
                     'meta': ocp.JsonCheckpointHandler(multiprocessing_options=alone)},
      options=ocp.CheckpointManagerOptions(
        read_only=read_only, max_to_keep=None if read_only else keep, create=False,
        cleanup_tmp_directories=not read_only,  # what a kill amid a save left; `keep` counts none
        multiprocessing_options=alone))

  def __enter__(self):
    self._hook = sys.unraisablehook
    sys.unraisablehook = self._unraisable
    return self

  def __exit__(self, kind, *_):
    if is_first():
      with paths.full_disk(self.directory):  # of tensorstore a ValueError
        self.manager.close()
    if kind is None or not issubclass(kind, OSError | ValueError):
      sys.unraisablehook = self._hook  # else threads of a write that failed may still speak up

  def _unraisable(self, event):
    """A read or write that failed once has raised already; tensorstore's other threads then find
    its event loop closed, and would print a traceback each."""
    if str(event.exc_value) != 'Event loop is closed':
      self._hook(event)

  def save(self, step: int, state, meta: dict) -> None:
    """Saves numpy arrays in the background; a step that is there already is left alone.

    Raises Diverged, and saves nothing, when a value is not finite: the newest checkpoint is
    always a good one. Raises OSError when the disk is full.
    """
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state)):
      raise Diverged(
        f'a parameter is not finite after step {step}; the last good checkpoint is kept')
    if not is_first() or step in self.manager.all_steps():
      return
    self._check_space(state)
    with paths.full_disk(self.directory):
      self.manager.save(step, args=ocp.args.Composite(
        state=ocp.args.StandardSave(state),
        meta=ocp.args.JsonSave({**meta, 'digest': digest(state), 'optax': versions()['optax']})))

  def wait(self) -> None:
    """Returns when the last save is on disk; raises what went wrong with it."""
    if is_first():
      with paths.full_disk(self.directory):
        self.manager.wait_until_finished()

  def _check_space(self, state):
    """Raises OSError on a disk too full for the state, before anything is half written."""
    if paths.is_remote(self.directory):
      return
    needed = 1.1 * sum(leaf.nbytes for leaf in jax.tree.leaves(state)) + 2 ** 20
    if shutil.disk_usage(self.directory).free < needed:
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.directory))

  def restore(self, like, *, any_shape: bool = False):
    """The newest checkpoint that is whole, as (step, state, meta), or None if there is none at all.

    like: a state of numpy arrays with the shapes and types to expect; any_shape: shapes are those
    on disk. A broken checkpoint is reported, the one before used, and then the broken one moved to
    `workdir/checkpoints_broken/` (unless read_only).

    Raises UsageError when there are checkpoints but none can be read: starting again from nothing
    would lose them; and when the newest is of another optimiser's state, or another network's.
    Raises OSError when it is the disk or the permissions that fail, and what gcsfs and tensorstore
    raise when it is the way to the bucket.
    """
    states = [like]

    def read():
      if found := self._read(like, any_shape):
        step, states[0], meta = found
        return step, meta

    told = decided(read)
    return told and (told[0], broadcast(states[0]), told[1])

  def _read(self, like, any_shape):
    broken = {}
    for step in sorted(self.manager.all_steps(), reverse=True):
      try:
        self._check_structure(step, like, any_shape)
        found = self.manager.restore(step, args=ocp.args.Composite(
          state=ocp.args.StandardRestore(like), meta=ocp.args.JsonRestore()))
        if digest(found.state) != found.meta['digest']:
          raise ValueError('its contents do not match its digest')
      except UsageError:
        raise
      except Exception as error:  # a broken file shows as almost any exception
        missing = (None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR)
        if isinstance(error, MemoryError) or getattr(error, 'errno', None) not in missing:
          raise
        if paths.is_remote(self.directory) and paths.unreachable(error):
          raise
        broken[step] = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        log.warning('checkpoint %d is broken (%s); trying the one before', step, broken[step])
        continue
      aside = self.directory.parent / 'checkpoints_broken'
      for bad in () if self._read_only else broken:  # out of the way of new ones, but not lost
        paths.move(self.directory / str(bad), aside / str(bad))
        self.manager.reload()
      return step, jax.tree.map(np.asarray, found.state), found.meta
    if broken:
      raise UsageError(f'no checkpoint in {self.directory} can be read (the newest: '
                       f'{broken[max(broken)]}); use another --workdir, or remove that folder to '
                       'train from the start')
    return None

  def _check_structure(self, step, like, any_shape):
    """Raises UsageError where a checkpoint holds other arrays than `like`, or of other shapes."""
    there, ours = map(_shapes, (self.manager.item_metadata(step).state.tree, like))
    if set(there) != set(ours):
      meta = self.manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
      raise UsageError(
        f'checkpoint {step} in {self.directory} is of another optax or gapjax: it was written with '
        f'optax {meta.get("optax", "(unknown)")}, here is {versions()["optax"]}, and only one of '
        f'them has `{min(set(there) ^ set(ours))}`; install what it was trained with, or use '
        'another --workdir')
    different = sorted(name for name, shape in ours.items() if there[name] != shape)
    if different and not any_shape:
      name = different[0]
      raise UsageError(
        f'checkpoint {step} in {self.directory} has `{name}` of shape {there[name]}, and the '
        f'network for this data {ours[name]}: it was trained on data with another number of '
        'classes, or config.json was changed; give the --data_dir of that data, or use another '
        '--workdir')


def _shapes(tree):
  """The shapes of a tree's arrays by their names, which are the same for a tuple, its named form
  and what orbax makes of it."""
  return {'.'.join(re.sub(r"[^\w]", '', str(key)) for key in path): tuple(leaf.shape)
          for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def newest(workdir, like, *, any_shape: bool = False):
  """(step, state) of a run's newest checkpoint, read only; arguments as of `Checkpoints.restore`.

  Raises UsageError where there is none.
  """
  workdir, found = paths.of(workdir), None
  if (workdir / 'checkpoints').exists():
    with Checkpoints(workdir, read_only=True) as checkpoints:
      found = checkpoints.restore(like, any_shape=any_shape)
  if not found:
    raise UsageError(f'{workdir} holds no checkpoint; train first: gapjax train --config=FILE '
                     f'--workdir={shlex.quote(str(workdir))}')
  return found[:2]


def digest(tree) -> str:
  """BLAKE2 of every leaf's name, type, shape and bytes."""
  sums = hashlib.blake2b(digest_size=16)
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    values = np.asarray(leaf)
    sums.update(f'{jax.tree_util.keystr(path)} {values.dtype} {values.shape}'.encode())
    sums.update(values.tobytes())
  return sums.hexdigest()
