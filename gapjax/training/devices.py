"""The only file that names pmap: wrap a step, place its arguments, bring its results home; and what
several processes have to agree on.

State, data and metrics are replicated and carry no device axis (`in_axes` and `out_axes` None);
batches are split along a leading device axis. Every process of a run (one a host) executes the same
program on the same global batch, and places the parts of its own devices; the first alone writes.
"""

import contextlib
import json
import logging
import os
import sys

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gapjax import paths
from gapjax.errors import TrainingFailed, UsageError

AXIS = 'devices'

log = logging.getLogger(__name__)


def initialize(how: str) -> None:
  """Joins the other processes of a run; call it before anything else of jax.

  how: 'auto' on Cloud TPU and under SLURM, which know the processes; else 'HOST:PORT,N,I', where
  the first process listens, how many there are, and which this is, from 0.

  Raises UsageError when `how` is neither, or the others cannot be found.
  """
  arguments = {}
  if how != 'auto':
    address, *numbers = how.split(',')
    if len(numbers) != 2 or ':' not in address or not all(n.isdigit() for n in numbers):
      raise UsageError(f'--distributed={how}: give HOST:PORT,NUMBER_OF_PROCESSES,PROCESS, such as '
                       '10.0.0.1:1234,2,0; or leave the value out on Cloud TPU and under SLURM')
    arguments = dict(coordinator_address=address, num_processes=int(numbers[0]),
                     process_id=int(numbers[1]))
    if arguments['process_id'] >= arguments['num_processes']:
      raise UsageError(f'--distributed={how}: processes are counted from 0 to '
                       f'{arguments["num_processes"] - 1}')
  print('gapjax: waiting for the other processes of the run', file=sys.stderr, flush=True)
  try:
    jax.distributed.initialize(**arguments)
  except (ValueError, RuntimeError) as error:
    line = str(error).strip().splitlines()[0]
    # A RuntimeError is that some did not come in time: later the same command may well succeed.
    kind = TrainingFailed if isinstance(error, RuntimeError) else UsageError
    raise kind(f'the processes of the run do not find each other ({line}); outside Cloud TPU '
               'and SLURM give --distributed=HOST:PORT,NUMBER_OF_PROCESSES,PROCESS') from None
  log.info('process %d of %d, with %d of %d devices', jax.process_index(), jax.process_count(),
           jax.local_device_count(), jax.device_count())
  if not is_first():  # one voice is enough
    logging.getLogger('gapjax').setLevel(logging.WARNING)


def told_by_environment() -> str | None:
  """'auto' in a process that SLURM or GKE started as one of several, else None."""
  tasks = os.environ.get('SLURM_STEP_NUM_TASKS', '')
  several = ((tasks.isdigit() and int(tasks) > 1)
             or ',' in os.environ.get('TPU_WORKER_HOSTNAMES', ''))
  return 'auto' if several else None


def is_first() -> bool:
  """Whether this is the process that writes."""
  return jax.process_index() == 0


def is_alone() -> bool:
  """Whether there is no other process."""
  return jax.process_count() == 1


def agree(flag: bool, *, ask: bool) -> bool:
  """Whether any process says so. A process that is not alone asks the others only where all do, at
  the same point of the program; elsewhere the answer is no."""
  if is_alone():
    return flag
  return ask and bool(multihost_utils.process_allgather(np.array(flag)).any())


def decided(decide):
  """What decide() returns in the first process, to all: anything that JSON holds. What is on disk
  is looked at by one process, since each might see something else.

  Raises in every process the UsageError that it raises in the first.
  """
  if is_alone():
    return decide()
  answer = {}
  if is_first():
    try:
      answer = {'value': decide()}
    except UsageError as error:
      answer = {'error': str(error)}
  text = np.frombuffer(json.dumps(answer).encode(), np.uint8)
  size = broadcast(np.int32(text.size))
  answer = json.loads(bytes(broadcast(np.resize(text, int(size)))))
  if 'error' in answer:
    raise UsageError(answer['error'])
  return answer['value']


def broadcast(tree):
  """A tree of numpy arrays of the first process, to all; the others give arrays of the same shapes.
  """
  return tree if is_alone() else multihost_utils.broadcast_one_to_all(tree)


def check_alike(digest: str) -> None:
  """Raises UsageError in every process unless all give the same digest, in hexadecimal."""
  if is_alone():
    return
  found = multihost_utils.process_allgather(np.frombuffer(bytes.fromhex(digest), np.uint8))
  if others := np.flatnonzero((found != found[0]).any(1)).tolist():
    raise UsageError(
      f'process {others[0]} would not begin where the first does: it has another config, other '
      'data, other versions or another file of weights; start all processes with the same command')


def wait_for_all(name: str) -> None:
  """Returns when every process is here."""
  if not is_alone():
    multihost_utils.sync_global_devices(name)


@contextlib.contextmanager
def together():
  """Inside, the loss of another process is a TrainingFailed that says what to do."""
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    if is_alone() or 'RESOURCE_EXHAUSTED' in str(error):  # its own fault, which stays
      raise
    raise TrainingFailed(
      f'a step failed, likely because another process of the run ended '
      f'({str(error).splitlines()[0][:200]}); start all of them again: the same commands go on '
      'from the newest checkpoint') from error


def refused(error) -> str:
  """What to tell the user where jax cannot have the device that it is asked for, or the device has
  too little memory, else ''."""
  try:
    if asked := os.environ.get('JAX_PLATFORMS'):
      jax.devices()
  except (RuntimeError, AssertionError):  # the latter of a GPU that is not there
    return (f'JAX_PLATFORMS={asked} asks for a device that is not here, or that the installed jax '
            'does not know; unset it, or set it to cpu')
  if isinstance(error, jax.errors.JaxRuntimeError) and 'RESOURCE_EXHAUSTED' in str(error):
    return (f'the device has too little memory ({str(error).splitlines()[0][:200]}); train with a '
            'smaller batch_size, or eval.batch_size where it was evaluating, or '
            'model.dtype=bfloat16; of a trained run, JAX_PLATFORMS=cpu computes on the host')
  return ''


def leave(code: int) -> None:
  """Ends a process that has failed, without waiting for the others as jax would: they wait for it.
  """
  with contextlib.suppress(RuntimeError, AssertionError):  # jax', without a device to ask
    if code and not is_alone():
      sys.stdout.flush()
      sys.stderr.flush()
      os._exit(code)


def keep_programs(platform: str) -> None:
  """Compiled programs are kept in the user's cache folder, where an accelerator takes minutes to
  compile what it trains in one; JAX_COMPILATION_CACHE_DIR is another folder, or, empty, none."""
  chosen = 'JAX_COMPILATION_CACHE_DIR' in os.environ or jax.config.jax_compilation_cache_dir
  if platform != 'cpu' and not chosen:
    jax.config.update('jax_compilation_cache_dir', os.fspath(paths.cache() / 'programs'))


class Devices:
  """The devices of a run. `Devices()` takes all of all processes, a process' own side by side."""

  def __init__(self, devices=None):
    self.devices = list(devices or sorted(jax.devices(), key=lambda d: (d.process_index, d.id)))
    here = [i for i, d in enumerate(self.devices) if d.process_index == jax.process_index()]
    self._here = slice(here[0], here[-1] + 1)
    mesh = Mesh(np.asarray(self.devices[self._here]), (AXIS,))
    self._replicated = NamedSharding(mesh, PartitionSpec())
    self._split = NamedSharding(mesh, PartitionSpec(AXIS))

  def __len__(self):
    return len(self.devices)

  @property
  def platform(self) -> str:
    return self.devices[0].platform

  def check_batch(self, batch_size: int) -> None:
    """Raises UsageError unless the devices can share a global batch equally."""
    n, over = len(self), batch_size % len(self)
    if over:
      below, above = batch_size - over, batch_size - over + n
      choice = f'{below} or {above}' if below else f'{above}'
      raise UsageError(f'batch_size {batch_size} cannot be shared by {n} devices; '
                       f'use {choice} (--config.batch_size={above})')

  def pmap(self, step, *, split: tuple[bool, ...], donate: int):
    """pmap of step(*args): split[i] says whether args[i] has a leading device axis.

    Results are replicated, so the step must have reduced whatever it returns over AXIS. Argument
    `donate` is given up.
    """
    return jax.pmap(step, axis_name=AXIS, in_axes=tuple(0 if s else None for s in split),
                    out_axes=None, devices=self.devices, donate_argnums=donate)

  def replicate(self, tree):
    """Host arrays -> the same arrays on every device."""
    return jax.device_put(tree, self._replicated)

  def split(self, tree, *, axis: int = 0, local: bool = False):
    """Cuts the batch axis of arrays, one part for each device, and places this process' own.

    (batch, ...) -> (devices, batch / devices, ...), and with axis 1 (steps, batch) -> (devices,
    steps, batch / devices). local: the arrays hold this process' share of the batch alone.
    """
    def put(x):
      parts = (np.split(x, len(self.devices[self._here]), axis) if local else
               np.split(x, len(self), axis)[self._here])
      return jax.device_put(np.stack(parts), self._split)
    return jax.tree.map(put, tree)

  def own_rows(self, batch_size: int) -> slice:
    """Which rows of a batch this process' own devices take: what `split` takes with `local`."""
    each = batch_size // len(self)
    return slice(self._here.start * each, self._here.stop * each)

  @staticmethod
  def to_host(tree):
    """Replicated device arrays -> numpy arrays (also what orbax can save from any process).

    Copies: on CPU a view would be overwritten once the state is donated to the next step.
    """
    return jax.tree.map(lambda x: np.array(x.addressable_data(0)), tree)
