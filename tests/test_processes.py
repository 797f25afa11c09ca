"""Several processes, as on the hosts of a TPU pod: what they compute and write, and that a run goes
on after one of them was killed, or on another number of devices."""

import json
import os
import shutil
import signal
import socket

import jax
import numpy as np
import pytest
from chaos_judge import complete
from conftest import SCENES, config_file, newest, refused, same, tiny_config, wait_until

from gapjax.errors import TrainingFailed, UsageError
from gapjax.paths import read_json, read_lines
from gapjax.training import devices as devices_module
from gapjax.training.devices import check_alike, initialize, told_by_environment
from gapjax.training.train import train

PERMUTED = {'model.head': 'permuted', 'eval.batch_size': 8}
KILLED = {**PERMUTED, 'num_epochs': 4, 'eval.every_epochs': 2, 'model.dtype': 'float64'}
DOUBLE = {'JAX_ENABLE_X64': '1'}


# Processes that have met once go on to the next command.
COMMANDS = """
import json, sys
from gapjax import cli
from gapjax.training import devices
for command in json.loads(sys.argv[1]):
  code = cli.main(command)
  devices.initialize = lambda _: None
sys.exit(code)
"""


@pytest.fixture(scope='module')
def start(tmp_path_factory, gapjax, data_dir):
  """Starts `count` processes of two devices each: start(workdir, count, changes) -> [Popen].

  changes: of one config after the other. second: the workdir of all but the first, where it is
  another one.
  """
  tmp_path, running = tmp_path_factory.mktemp('processes'), []

  def start(workdir, count, *changes, second=None):
    configs = [config_file(tmp_path / f'config{i}.py', tiny_config(**one))
               for i, one in enumerate(changes)]
    with socket.socket() as s:
      s.bind(('localhost', 0))
      port = s.getsockname()[1]
    for i in range(count):
      commands = [['train', f'--config={config}', f'--workdir={(i and second) or workdir}',
                   f'--data_dir={data_dir}', f'--distributed=localhost:{port},{count},{i}']
                  for config in configs]
      running.append(gapjax(json.dumps(commands), code=COMMANDS, devices=2, env=DOUBLE, start=True))
    return running[-count:]

  yield start
  for process in running:
    if process.poll() is None:
      process.kill()
      process.communicate()


@pytest.fixture(scope='module')
def two(start, tmp_path_factory):
  """The workdir of an undisturbed run of KILLED on two processes."""
  workdir = tmp_path_factory.mktemp('two')
  for code, err in finish(start(workdir, 2, KILLED)):
    assert code == 0, err
  return workdir


def finish(processes):
  """(returncode, stderr) of each."""
  return [(process.returncode, err) for process, (_, err) in
          [(process, process.communicate(timeout=600)) for process in processes]]


@pytest.mark.parametrize('task', [
  'canvas', pytest.param('scenes', marks=pytest.mark.slow)])
def test_two_processes_are_one_with_as_many_devices(start, tmp_path, data_dir, request, task):
  if task == 'canvas':
    changes, workdir = KILLED, request.getfixturevalue('two')
  else:
    changes, workdir = {**SCENES, 'data.train_images': 16, 'segmentation.crop': (16, 24),
                        'model.dtype': 'float64'}, tmp_path / 'two'
    for code, err in finish(start(workdir, 2, changes)):
      assert code == 0, err
  with jax.enable_x64(True):
    train(tiny_config(**changes), workdir=tmp_path / 'one', data_dir=data_dir,
          devices=jax.local_devices()[:4], progress=False)
  (step, one), (other_step, two) = newest(tmp_path / 'one'), newest(workdir)
  assert step == other_step
  for name in ('params', 'batch_stats'):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-9 * np.abs(b).max()),
                 two[name], one[name])
  lines = [read_lines(path / 'metrics.jsonl') for path in (tmp_path / 'one', workdir)]
  assert [(line['step'], line['split']) for line in lines[0]] == [
    (line['step'], line['split']) for line in lines[1]]  # one process wrote them, once
  for a, b in zip(*lines, strict=True):
    assert a['accuracy'] == b['accuracy'] and a['loss'] == pytest.approx(b['loss'], rel=1e-9)
  summaries = [read_json(path / 'summary.json') for path in (tmp_path / 'one', workdir)]
  assert summaries[0]['final'] == pytest.approx(summaries[1]['final'], rel=1e-9)


def test_the_first_decides_for_all(start, two, tmp_path):
  """The others see another disk, which holds nothing: all go on, are finished, and are refused,
  as it is with the first's."""
  first, second = tmp_path / 'first', tmp_path / 'second'
  shutil.copytree(two / 'checkpoints/15', first / 'checkpoints/15')
  for name in ('config.json', 'metrics.jsonl'):
    shutil.copy(two / name, first / name)
  for code, err in finish(
      start(first, 2, KILLED, KILLED, {**KILLED, 'seed': 3}, second=second)):
    assert code == 2 and 'another config: seed 3 (there: 0)' in err, err
  assert same(newest(first)[1], newest(two)[1]) and not second.exists()
  lines = [[(line['step'], line['split']) for line in read_lines(path / 'metrics.jsonl')]
           for path in (first, two)]
  assert lines[0] == lines[1]


def test_processes_that_would_not_begin_alike(monkeypatch):
  """Here the third, whose state or config has another digest than the first's."""
  monkeypatch.setattr(devices_module, 'is_alone', lambda: False)
  gathered = iter([[0, 0, 1], [0, 0, 0]])
  monkeypatch.setattr(devices_module.multihost_utils, 'process_allgather',
                      lambda x: np.stack([x ^ change for change in next(gathered)]))
  refused(lambda: check_alike('00ff'), 'process 2 would not begin where the first does')
  check_alike('00ff')


@pytest.mark.slow
def test_one_is_killed_and_all_are_started_again(start, two, tmp_path):
  processes = start(tmp_path, 2, KILLED)
  wait_until(lambda: complete(tmp_path), *processes)
  os.kill(processes[1].pid, signal.SIGKILL)
  (code, err), _ = finish(processes)
  assert code in (1, -signal.SIGABRT), err  # jax itself ends a process whose partner is silent
  assert 'another process of the run ended' in err or 'another task died' in err

  for code, err in finish(start(tmp_path, 2, KILLED)):
    assert code == 0, err
  (step, killed), (_, whole) = newest(tmp_path), newest(two)
  assert step == 20 and same(killed, whole)


@pytest.mark.slow
def test_a_signal_to_one_stops_all_and_saves(start, tmp_path):
  processes = start(tmp_path / 'run', 2, {**PERMUTED, 'num_epochs': 2000})
  wait_until(lambda: complete(tmp_path / 'run'), *processes)
  processes[1].send_signal(signal.SIGTERM)
  steps = set()
  for code, err in finish(processes):
    assert code == 0 and 'stopped at step' in err.splitlines()[-1], err
    steps.add(err.splitlines()[-1].split()[4])
  assert steps == {str(newest(tmp_path / 'run')[0])}


def test_how_processes_find_each_other(monkeypatch):
  for wrong in ('here', 'here:1,2', 'here:1,2,x', 'here,2,0'):
    refused(lambda wrong=wrong: initialize(wrong), 'HOST:PORT,NUMBER_OF_PROCESSES,PROCESS')
  refused(lambda: initialize('here:1,2,2'), 'from 0 to 1')
  assert told_by_environment() is None
  for tasks, told in (('4', 'auto'), ('', None), ('x', None), ('1', None)):
    monkeypatch.setenv('SLURM_STEP_NUM_TASKS', tasks)
    assert told_by_environment() == told
  monkeypatch.setenv('TPU_WORKER_HOSTNAMES', 'a,b')
  assert told_by_environment() == 'auto'


@pytest.mark.parametrize(('error', 'kind'), [
  (RuntimeError('DEADLINE_EXCEEDED: late'), TrainingFailed), (ValueError('unknown'), UsageError)])
def test_who_comes_too_late_may_come_yet(monkeypatch, error, kind):
  """Exit code 1, which launch/restart.sh starts again; where nobody was named, 2."""
  def find(**_):
    raise error

  monkeypatch.setattr(jax.distributed, 'initialize', find)
  with pytest.raises(kind, match='do not find each other'):
    initialize('here:1,2,0')


def test_the_end_of_another_process_is_told_from_too_little_memory(monkeypatch):
  monkeypatch.setattr(devices_module, 'is_alone', lambda: False)
  for text, kind in (('UNAVAILABLE: socket closed', TrainingFailed),
                     ('RESOURCE_EXHAUSTED: out of memory', jax.errors.JaxRuntimeError)):
    with pytest.raises(kind, match=text.split(':')[0]), devices_module.together():
      raise jax.errors.JaxRuntimeError(text)


def test_a_single_process_that_is_told_of_others_and_finds_none(gapjax, tmp_path):
  """`--distributed` without a value, where nothing says who the others are."""
  done = gapjax('train', '--config=configs/digits.py', f'--workdir={tmp_path}', '--distributed')
  assert done.returncode == 2, done.stderr
  assert 'do not find each other' in done.stderr.splitlines()[-1]
  assert not list(tmp_path.iterdir())
