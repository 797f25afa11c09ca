"""The machine and the process."""

import importlib.metadata
import os
import signal
import subprocess
import sys

import pytest
from conftest import python

from gapjax import config
from gapjax.errors import Interrupted
from gapjax.training import system
from gapjax.training.system import Clock, StopSignals, is_large

# Two allocations of 256 MB, one after the other, in a thread of its own, as XLA's are.
ALLOCATE = """
import resource, sys, threading
import numpy as np
from gapjax.training.system import keep_freed_memory

if sys.argv[1] == 'keep':
  assert keep_freed_memory(large=True)
faults = []

def work():
  for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(2 ** 25)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

thread = threading.Thread(target=work)
thread.start()
thread.join()
print(*faults)
"""


def test_what_ends_after_its_time_has_ended_all_the_same():
  with StopSignals(until=0) as stop:
    assert stop.requested
    with pytest.raises(Interrupted):
      stop.check()
  with pytest.raises(Interrupted), StopSignals():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='glibc alone is told')
def test_freed_memory_is_kept():
  """The second allocation faults no page in, unless glibc is left as it is."""
  for how in ('keep', 'leave'):
    first, second = map(int, python(ALLOCATE, how).stdout.split())
    assert first > 100
    assert (second < first / 10) == (how == 'keep')


@pytest.mark.parametrize('file, fields, large', [
  ('digits', {}, False), ('gapnet_cifar10', {}, True), ('augshift_cifar10', {}, True),
  ('deeplab_camvid', {}, True),
  ('gapnet_cifar10', {'model.width': 16, 'data.image_size': 16}, False),
  ('gapnet_cifar10', {'model.width': 16, 'data.image_size': 16, 'canvas.grid': 5}, True)])
def test_large_steps_are_known_by_their_config(file, fields, large):
  c = config.from_file(f'{file}.py')
  c.update_from_flattened_dict(fields)
  assert is_large(c) == large


def test_the_first_lap_compiles_also_after_an_evaluation(monkeypatch):
  """As where a run goes on at an evaluation that was cut off."""
  now = [0.0]
  monkeypatch.setattr('time.perf_counter', lambda: now[0])
  clock = Clock(0.0)
  rates = []
  for seconds in (30, 90, 2):  # an evaluation, a lap that compiles, one that does not
    now[0] += seconds
    if seconds == 30:
      with clock.paused():
        now[0] += 5
    else:
      rates.append(clock.lap(100))
  assert rates == [None, 50.0] and clock.images_per_second() == 50.0


def test_a_clone_differs_from_its_commit_where_its_code_does(monkeypatch, tmp_path):
  """A page that was edited trains nothing else."""
  monkeypatch.delenv('GAPJAX_COMMIT', raising=False)
  files = ['README.md', 'gapjax/config.py', 'gapjax/training/system.py', 'configs/digits.py']
  for file in files:
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text('')
  for command in ('init -q', 'add .', 'commit -q -m all'):
    subprocess.run(['git', '-c', 'user.name=a', '-c', 'user.email=a@b',
                    '-c', 'commit.gpgsign=false', *command.split()], cwd=tmp_path, check=True)
  monkeypatch.setattr(system, '__file__', str(tmp_path / 'gapjax' / 'training' / 'system.py'))
  told = {}
  for file in files:
    (tmp_path / file).write_text('x = 1')
    told[file] = system.commit.__wrapped__()
    (tmp_path / file).write_text('')
  assert [file for file in files if told[file].endswith('+')] == files[1:]


def test_installed_code_is_known_by_its_files(monkeypatch, tmp_path):
  """Two installations of other code are of two commits, though git knows neither."""
  monkeypatch.delenv('GAPJAX_COMMIT', raising=False)
  found = []
  for name, text in (('a', 'x = 1'), ('b', 'x = 1'), ('c', 'x = 2')):
    module = tmp_path / name / 'gapjax' / 'training' / 'system.py'
    module.parent.mkdir(parents=True)
    module.write_text('')
    (module.parents[1] / 'config.py').write_text(text)
    monkeypatch.setattr(system, '__file__', str(module))
    found.append(system.commit.__wrapped__())
  assert found[0] == found[1] != found[2]
  assert found[0].startswith(importlib.metadata.version('gapjax') + '-')
