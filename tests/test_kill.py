"""Real processes, really stopped: by signals, by each other, by a disk that is full or read-only.

Of SIGKILL: tests/chaos.py.
"""

import os
import signal
import subprocess

import jax
import pytest
from conftest import newest, tiny_config, wait_until
from disks import mount_tmpfs

from gapjax import config as configs
from gapjax.errors import Interrupted, UsageError
from gapjax.paths import read_lines
from gapjax.tasks.canvas import CanvasEvaluation
from gapjax.training import workdirs
from gapjax.training.train import train


@pytest.fixture(scope='module')
def command(tiny_file, data_dir):
  """`gapjax train` of 40 steps, without a workdir."""
  return ['train', f'--config={tiny_file(num_epochs=4)}', f'--data_dir={data_dir}']


def test_ctrl_c_saves_and_says_how_to_go_on(command, gapjax, tmp_path):
  process = gapjax(*command, f'--workdir={tmp_path}', '--config.num_epochs=2000', start=True)
  wait_until((tmp_path / 'metrics.jsonl').exists, process)
  process.send_signal(signal.SIGINT)
  _, err = process.communicate(timeout=120)
  assert process.returncode == 130, err
  step, _ = newest(tmp_path)
  assert f'stopped at step {step} of' in err and 'the same command' in err.splitlines()[-1]
  assert '\nstopping soon; after another Ctrl-C nothing more is saved\n' in err


def test_a_workdir_in_use_is_left_alone(tmp_path):
  with workdirs.lock(tmp_path), pytest.raises(UsageError, match='in use by another process'):
    train(tiny_config(), workdir=tmp_path, progress=False)
  assert [path.name for path in tmp_path.iterdir()] == ['.lock']


def test_full_disk(command, gapjax, data_dir, tmp_path):
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
    summary = train(configs.from_flags(command[1:2]), workdir=tmp_path / 'run', data_dir=data_dir,
                    devices=jax.local_devices()[:1], progress=False)
    assert summary['step'] == 40
  finally:
    subprocess.run(['umount', '-l', tmp_path], check=True)


def test_no_permission_to_write(command, complaint, tmp_path):
  refused = mount_tmpfs(tmp_path, 'ro')
  if refused and os.geteuid() == 0:
    pytest.skip(f'root may write anywhere, and a read-only tmpfs cannot be mounted: {refused}')
  if refused:
    tmp_path.chmod(0o500)
  try:
    line = complaint(*command, f'--workdir={tmp_path}/run')
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
  with pytest.raises(Interrupted, match='stopped at step 10 of 20') as stop:
    train(config, **arguments)
  assert stop.value.code == 0
  train(config, **arguments)
  assert calls == [10, 10, 20]
  assert [line['step'] for line in read_lines(tmp_path / 'metrics.jsonl')
          if line['split'] == 'eval'] == [10, 20]
