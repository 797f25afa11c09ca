"""The machine and the process: clock, stop signals, device and version names."""

import contextlib
import ctypes
import functools
import hashlib
import importlib.metadata
import math
import os
import pathlib
import platform
import signal
import subprocess
import time

from gapjax.errors import Interrupted

REPORTED_PACKAGES = ('gapjax', 'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint',
                     'tensorflow-datasets', 'numpy')


class Clock:
  """Wall time over restarts, and the training rate without compilation and evaluation."""

  def __init__(self, previous_seconds: float):
    self._previous, self._start = previous_seconds, time.perf_counter()
    self._mark = None
    self._images = self._seconds = 0.0

  def wall_seconds(self) -> float:
    return self._previous + time.perf_counter() - self._start

  def lap(self, images: int) -> float | None:
    """Images per second since the last lap; None for the first, which compiled."""
    now, before = time.perf_counter(), self._mark
    self._mark = now
    if before is None:
      return None
    self._images += images
    self._seconds += now - before
    return images / (now - before)

  @contextlib.contextmanager
  def paused(self):
    """What runs inside is not training."""
    yield
    if self._mark is not None:  # else the first lap is still to come
      self._mark = time.perf_counter()

  def images_per_second(self) -> float | None:
    """Over all laps but the first; None when there was no other."""
    return self._images / self._seconds if self._seconds else None


class StopSignals:
  """While entered, SIGTERM and Ctrl-C set `requested`; a second one acts as it always does.

  A signal that nothing acted on inside raises Interrupted at the end: a suite must not go on.
  `message` is what that says. until: at this time.monotonic(), `requested` is set by itself; what
  ends later all the same has ended.
  """
  message = 'stopped; what was finished is saved, and the same command goes on'

  def __init__(self, until: float = math.inf):
    self._until, self._told, self.code = until, False, 0

  @property
  def requested(self) -> bool:
    return self._told or time.monotonic() >= self._until

  def __enter__(self):
    self._old = {s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGINT)}
    return self

  def __exit__(self, kind, *_):
    for number, handler in self._old.items():
      signal.signal(number, handler)
    if kind is None and self._told:
      self.check()

  def check(self) -> None:
    """Raises Interrupted after a request."""
    if self.requested:
      raise Interrupted(self.message, code=self.code)

  def _handle(self, number, _):
    self._told, self.code = True, 0 if number == signal.SIGTERM else 130
    signal.signal(number, self._old[number])
    if number == signal.SIGINT:  # no logging: the signal may have come in the middle of it
      with contextlib.suppress(OSError):
        os.write(2, b'\nstopping soon; after another Ctrl-C nothing more is saved\n')


class Unbreakable:
  """What is written to stderr, whether it is closed or its reader has gone: no reason to end."""

  def __init__(self, stream):
    self._stream = stream

  def __getattr__(self, name):
    return getattr(self._stream, name)

  def write(self, text):
    with contextlib.suppress(OSError, ValueError, AttributeError):
      self._stream.write(text)
    return len(text)

  def flush(self):
    with contextlib.suppress(OSError, ValueError, AttributeError):
      self._stream.flush()


# Bytes of a batch's first feature map from which on one arena for all threads is faster. Measured
# with gapjax bench, images a second, one arena over many: digits (1.8 MB) 0.92, ResNet-18 of width
# 16 on canvases of 80 pixels (4.9 MB) 1.08, of width 64 on 96 pixels (28 MB) 1.14. glibc's other
# arenas map and unmap what is larger than 64 MB.
LARGE_MAP = 3e6


def is_large(config) -> bool:
  """Whether a training step of a config takes large buffers, as far as the config tells."""
  if config.task == 'segmentation':
    return True
  grid, crops = ((config.canvas.grid, 1) if config.task == 'canvas' else
                 (1, config.augshift.crops))
  side = grid * (config.data.image_size or 32) / (1 if config.model.stem == 'cifar' else 2)
  return 4 * config.batch_size * crops * config.model.width * side ** 2 > LARGE_MAP


def keep_freed_memory(*, large: bool) -> bool:
  """Tells glibc to keep what is freed. Returns whether there was a glibc to tell.

  XLA on CPU frees and allocates its temporary buffers every step; glibc would hand them back to
  the system and fault the pages in again (0.5 million faults and a quarter of the time for a step
  of 2 GB). large: where steps are (`is_large`), all threads share one arena. A thread that has one
  already keeps it, so call this before jax starts its threads.
  """
  mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
  if mallopt is None:
    return False
  # malloc.h: M_MMAP_MAX, M_TRIM_THRESHOLD (never), M_ARENA_MAX
  settings = {-4: 0, -1: -1, **({-8: 1} if large else {})}
  return min(mallopt(name, value) for name, value in settings.items()) == 1


def versions() -> dict[str, str]:
  """{'python': '3.12.1', 'jax': ...} of what decides a result."""
  return {'python': platform.python_version(),
          **{name: importlib.metadata.version(name) for name in REPORTED_PACKAGES}}


@functools.cache
def commit() -> str:
  """What the environment variable GAPJAX_COMMIT says, for code that is a copy of a commit; else the
  commit of the clone that gapjax runs from, with '+' where its Python files or those of configs/
  differ from it; where it is installed, its version and a digest of these files, such as
  '0.2.0-1f6c0b7a92d4'. Asked once: a process runs the code that it has loaded."""
  if told := os.environ.get('GAPJAX_COMMIT'):
    return told
  here = pathlib.Path(__file__).resolve().parent

  def git(*command):
    return subprocess.run(['git', '-C', str(here), *command], capture_output=True, text=True,
                          check=True).stdout.strip()

  try:
    if git('ls-files', '--error-unmatch', __file__):
      return git('rev-parse', '--short=12', 'HEAD') + '+' * bool(
        git('status', '--porcelain', '--untracked-files=no', '--', '../*.py', '../../configs/*.py'))
  except (OSError, subprocess.CalledProcessError):
    pass
  package, sums = here.parent, hashlib.blake2b(digest_size=6)
  for path in sorted(package.rglob('*.py')):
    sums.update(f'{path.relative_to(package)}\n'.encode() + path.read_bytes())
  return f'{importlib.metadata.version("gapjax")}-{sums.hexdigest()}'


def describe_devices(devices) -> str:
  """'cpu x 1 (AMD EPYC, 2 cores)' or 'gpu x 1 (NVIDIA H200)'."""
  kind = devices[0].device_kind
  if devices[0].platform == 'cpu':
    kind = f'{_processor()}, {usable_cores()} cores'
  return f'{devices[0].platform} x {len(devices)} ({kind})'


def usable_cores() -> int:
  """How many cores this process may use."""
  affinity = getattr(os, 'sched_getaffinity', None)  # Linux; macOS has no affinity
  return len(affinity(0)) if affinity else os.cpu_count()


def _processor():
  """The processor's name; Linux keeps it in /proc only."""
  with contextlib.suppress(OSError), open('/proc/cpuinfo') as lines:
    for line in lines:
      if line.startswith('model name'):
        return line.partition(':')[2].strip()
  return platform.processor() or platform.machine()
