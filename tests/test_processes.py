"""Several processes, as on the hosts of a TPU pod: what they compute and write, and that a run goes
on after one of them was killed, or on another number of devices."""

import os
import shutil
import signal
import socket
import time

import jax
import numpy as np
import pytest
from conftest import SCENES, newest, same, tiny_config

from gapjax.errors import Interrupted, UsageError
from gapjax.paths import read_json, read_lines
from gapjax.training import devices as devices_module
from gapjax.training.checkpoint import Checkpoints
from gapjax.training.devices import check_alike, initialize, told_by_environment
from gapjax.training.train import train

PERMUTED = {'model.head': 'permuted', 'eval.batch_size': 8}
KILLED = {**PERMUTED, 'num_epochs': 4, 'eval.every_epochs': 2, 'model.dtype': 'float64'}
DOUBLE = {'JAX_ENABLE_X64': '1'}


@pytest.fixture(scope='module')
def start(tmp_path_factory, gapjax, data_dir):
  """Starts `count` processes of two devices each: start(workdir, count, changes) -> [Popen].

  second: the workdir of all but the first, where it is another one.
  """
  tmp_path, running = tmp_path_factory.mktemp('processes'), []

  def start(workdir, count, changes, *, devices=2, second=None):
    path = tmp_path / 'config.json'
    path.write_text(tiny_config(**changes).to_json_best_effort())
    config = tmp_path / 'config.py'
    config.write_text(
      'import json\nfrom gapjax import config\n\ndef get_config(arg=None):\n'
      f'  c = config.default()\n  c.update(json.load(open({str(path)!r})))\n  return c\n')
    with socket.socket() as s:
      s.bind(('localhost', 0))
      port = s.getsockname()[1]
    rest = [[f'--distributed=localhost:{port},{count},{i}'] if count > 1 else []
            for i in range(count)]
    processes = [gapjax('train', f'--config={config}', f'--workdir={(i and second) or workdir}',
                        f'--data_dir={data_dir}', *more, devices=devices, env=DOUBLE, start=True)
                 for i, more in enumerate(rest)]
    running.extend(processes)
    return processes

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
def test_two_processes_are_one_with_as_many_devices(start, tmp_path, request, task):
  if task == 'canvas':
    changes, workdir = KILLED, request.getfixturevalue('two')
  else:
    changes, workdir = {**SCENES, 'data.train_images': 16, 'segmentation.crop': (16, 24),
                        'model.dtype': 'float64'}, tmp_path / 'two'
    for code, err in finish(start(workdir, 2, changes)):
      assert code == 0, err
  [(code, err)] = finish(start(tmp_path / 'one', 1, changes, devices=4))
  assert code == 0, err
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
  """The others see another disk, which holds nothing: all go on, are refused, and are finished,
  as it is with the first's."""
  first, second = tmp_path / 'first', tmp_path / 'second'
  shutil.copytree(two / 'checkpoints/15', first / 'checkpoints/15')
  for name in ('config.json', 'metrics.jsonl'):
    shutil.copy(two / name, first / name)
  for code, err in finish(start(first, 2, KILLED, second=second)):
    assert code == 0, err
  assert same(newest(first)[1], newest(two)[1]) and not second.exists()
  lines = [[(line['step'], line['split']) for line in read_lines(path / 'metrics.jsonl')]
           for path in (first, two)]
  assert lines[0] == lines[1]
  for code, err in finish(start(first, 2, {**KILLED, 'seed': 3}, second=second)):
    assert code == 2 and 'another config: seed 3 (there: 0)' in err.splitlines()[-1], err
  before = (first / 'metrics.jsonl').read_bytes()
  for code, err in finish(start(first, 2, KILLED, second=second)):
    assert code == 0, err
  assert (first / 'metrics.jsonl').read_bytes() == before


def test_processes_that_would_not_begin_alike(monkeypatch):
  """Here the third, whose state or config has another digest than the first's."""
  monkeypatch.setattr(devices_module, 'is_alone', lambda: False)
  gathered = iter([[0, 0, 1], [0, 0, 0]])
  monkeypatch.setattr(devices_module.multihost_utils, 'process_allgather',
                      lambda x: np.stack([x ^ change for change in next(gathered)]))
  with pytest.raises(UsageError, match='process 2 would not begin where the first does'):
    check_alike('00ff')
  check_alike('00ff')


def wait_for_step(workdir, processes, *, after=0, seconds=300):
  end = time.time() + seconds
  while time.time() < end and all(process.poll() is None for process in processes):
    saved = workdir / 'checkpoints'
    if saved.exists() and any(p.name.isdigit() and int(p.name) > after for p in saved.iterdir()):
      return
    time.sleep(0.05)
  raise AssertionError([process.communicate() for process in processes])


@pytest.mark.slow
def test_one_is_killed_and_all_are_started_again(start, two, tmp_path):
  processes = start(tmp_path, 2, KILLED)
  wait_for_step(tmp_path, processes)
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
  wait_for_step(tmp_path / 'run', processes)
  processes[1].send_signal(signal.SIGTERM)
  steps = set()
  for code, err in finish(processes):
    assert code == 0 and 'stopped at step' in err.splitlines()[-1], err
    steps.add(err.splitlines()[-1].split()[4])
  assert steps == {str(newest(tmp_path / 'run')[0])}


@pytest.mark.parametrize('devices', [pytest.param(1, marks=pytest.mark.slow), 8])
def test_saved_on_four_devices_and_restored_on_others(tmp_path, data_dir, monkeypatch, devices):
  config = tiny_config(**PERMUTED, num_epochs=2)
  save = Checkpoints.save

  def save_and_stop(self, step, state, meta):
    save(self, step, state, meta)
    raise Interrupted('here', code=0)

  arguments = dict(workdir=tmp_path, data_dir=data_dir, progress=False)
  monkeypatch.setattr(Checkpoints, 'save', save_and_stop)
  with pytest.raises(Interrupted, match='here'):
    train(config, devices=jax.local_devices()[:4], **arguments)
  monkeypatch.undo()
  step, before = newest(tmp_path)
  assert step == 5
  seen, restore = [], Checkpoints.restore

  def restored(self, like):
    seen.append(restore(self, like))
    return seen[-1]

  monkeypatch.setattr(Checkpoints, 'restore', restored)
  summary = train(config, devices=jax.local_devices()[:devices], **arguments)
  assert summary['step'] == 10 and newest(tmp_path)[0] == 10
  (found_step, state, _), = seen
  assert found_step == 5 and same(state.params, before['params'])


def test_how_processes_find_each_other(monkeypatch):
  for wrong in ('here', 'here:1,2', 'here:1,2,x', 'here,2,0'):
    with pytest.raises(UsageError, match='HOST:PORT,NUMBER_OF_PROCESSES,PROCESS'):
      initialize(wrong)
  with pytest.raises(UsageError, match='from 0 to 1'):
    initialize('here:1,2,2')
  assert told_by_environment() is None
  monkeypatch.setenv('SLURM_STEP_NUM_TASKS', '2')
  assert told_by_environment() == 'auto'
  monkeypatch.setenv('SLURM_STEP_NUM_TASKS', '1')
  monkeypatch.setenv('TPU_WORKER_HOSTNAMES', 'a,b')
  assert told_by_environment() == 'auto'


def test_a_single_process_that_is_told_of_others_and_finds_none(gapjax, tmp_path):
  """`--distributed` without a value, where nothing says who the others are."""
  done = gapjax('train', '--config=configs/digits.py', f'--workdir={tmp_path}', '--distributed')
  assert done.returncode == 2, done.stderr
  assert 'do not find each other' in done.stderr.splitlines()[-1]
  assert not list(tmp_path.iterdir())
