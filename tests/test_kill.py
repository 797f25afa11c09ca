"""Real processes, really stopped: by signals, by each other, by a disk that is full or read-only.

Of SIGKILL: tests/chaos.py.
"""

import os
import signal
import subprocess
import time

import jax
import pytest
from conftest import newest, tiny_config
from disks import mount_tmpfs

from gapjax.errors import Interrupted
from gapjax.paths import read_lines
from gapjax.tasks.canvas import CanvasEvaluation
from gapjax.training.train import train


@pytest.fixture(scope='module')
def command(tiny_file, data_dir):
  """`gapjax train` of 40 steps, without a workdir."""
  return ['train', f'--config={tiny_file(num_epochs=4)}', f'--data_dir={data_dir}']


def wait_for(path, process, *, seconds=300):
  """Until the file is there or the process has ended."""
  end = time.time() + seconds
  while not path.exists() and process.poll() is None and time.time() < end:
    time.sleep(0.01)


@pytest.mark.parametrize(('number', 'code'), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_stop_signals_save_and_say_how_to_go_on(command, gapjax, tmp_path, number, code):
  process = gapjax(*command, f'--workdir={tmp_path}', '--config.num_epochs=2000', start=True)
  wait_for(tmp_path / 'metrics.jsonl', process)
  process.send_signal(number)
  _, err = process.communicate(timeout=120)
  assert process.returncode == code, err
  assert 'stopped at step' in err.splitlines()[-1] and 'the same command' in err
  step, _ = newest(tmp_path)
  assert f'stopped at step {step} of' in err


@pytest.mark.slow
def test_two_commands_in_one_shell_pipeline_do_not_share_a_workdir(command, gapjax, tmp_path):
  """A second process in a workdir that is in use is told so, and the first is not disturbed."""
  command = [*command, f'--workdir={tmp_path}', '--config.num_epochs=16']
  first = gapjax(*command, start=True)
  wait_for(tmp_path / 'metrics.jsonl', first)
  second = gapjax(*command)
  assert second.returncode == 2 and 'in use' in second.stderr
  first.communicate(timeout=600)
  assert first.returncode == 0 and (tmp_path / 'summary.json').exists()


def test_full_disk(command, gapjax, tmp_path):
  """One line that says so, exit code 2, no traceback; with more space the run goes on."""
  if refused := mount_tmpfs(tmp_path, 'size=1400k'):
    pytest.skip(f'cannot mount a tmpfs here: {refused}')
  try:
    done = gapjax(*command, f'--workdir={tmp_path}/run')
    assert done.returncode == 2, done.stderr
    assert 'No space left on device' in done.stderr.splitlines()[-1]
    assert 'Traceback' not in done.stderr
    assert 0 < newest(tmp_path / 'run')[0] < 40
    subprocess.run(['mount', '-o', 'remount,size=20m', tmp_path], check=True)
    done = gapjax(*command, f'--workdir={tmp_path}/run')
    assert done.returncode == 0 and 'resumed from step' in done.stderr
  finally:
    subprocess.run(['umount', tmp_path], check=True)


def test_no_permission_to_write(command, gapjax, tmp_path):
  refused = mount_tmpfs(tmp_path, 'ro')
  if refused and os.geteuid() == 0:
    pytest.skip(f'root may write anywhere, and a read-only tmpfs cannot be mounted: {refused}')
  if refused:
    tmp_path.chmod(0o500)
  try:
    done = gapjax(*command, f'--workdir={tmp_path}/run')
    assert done.returncode == 2, done.stderr
    [line] = done.stderr.splitlines()
    assert 'Read-only file system' in line or 'Permission denied' in line
    assert str(tmp_path) in line
  finally:
    if not refused:
      subprocess.run(['umount', tmp_path], check=True)


def test_a_stop_during_an_evaluation_loses_no_evaluation(data_dir, tmp_path, monkeypatch):
  """Stopped inside the evaluation of step 10: saved there, and evaluated when it goes on."""
  config = tiny_config(num_epochs=4, **{'eval.every_epochs': 2})
  calls, whole = [], CanvasEvaluation.random

  def interrupted(self, state, **how):
    calls.append(int(state.step))
    if len(calls) == 1:
      signal.raise_signal(signal.SIGTERM)
    return whole(self, state, **how)

  monkeypatch.setattr(CanvasEvaluation, 'random', interrupted)
  arguments = dict(workdir=tmp_path, data_dir=data_dir, devices=jax.local_devices()[:1],
                   progress=False)
  with pytest.raises(Interrupted, match='stopped at step 10 of 20'):
    train(config, **arguments)
  train(config, **arguments)
  assert calls == [10, 10, 20]
  assert [line['step'] for line in read_lines(tmp_path / 'metrics.jsonl')
          if line['split'] == 'eval'] == [10, 20]
