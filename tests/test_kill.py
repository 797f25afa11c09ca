"""Real processes, really killed: a run that was killed and started again ends as if it had not."""

import os
import random
import re
import signal
import subprocess
import time

import jax
import pytest
from conftest import newest, same
from disks import mount_tmpfs

from gapjax import config as configs
from gapjax.errors import Interrupted
from gapjax.paths import read_lines
from gapjax.tasks.canvas import CanvasEvaluation
from gapjax.training.train import train


@pytest.fixture(scope='module')
def config_file(tiny_file):
  return tiny_file(num_epochs=16)


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory, config_file, data_dir):
  """The workdir of a run that nobody disturbed."""
  return tmp_path_factory.mktemp('undisturbed'), config_file, data_dir


def written(path):
  return path.stat().st_mtime_ns if path.exists() else 0


def wait_for(path, process, *, since=0, seconds=300):
  """Until the file is there and written after `since`, or the process has ended."""
  end = time.time() + seconds
  while written(path) <= since and process.poll() is None and time.time() < end:
    time.sleep(0.01)


@pytest.mark.slow
def test_killed_at_random_moments_and_started_again(undisturbed, gapjax, tmp_path):
  whole, config_file, data_dir = undisturbed
  arguments = ['train', f'--config={config_file}', f'--data_dir={data_dir}']
  done = gapjax(*arguments, f'--workdir={whole}')
  assert done.returncode == 0, done.stderr

  moments = random.Random(0)
  log, kills, resumed = tmp_path / 'metrics.jsonl', 0, []
  for attempt in range(7):
    before = written(log)
    process = gapjax(*arguments, f'--workdir={tmp_path}', start=True)
    if attempt == 3:  # at any moment of its life, while it imports and compiles too
      time.sleep(moments.uniform(0, 6))
    elif attempt < 6:  # while it trains: after so many lines of the log, one every 5 steps
      wait_for(log, process, since=before)
      lines = len(read_lines(log)) + moments.randint(1, 7)
      while process.poll() is None and len(read_lines(log)) < lines:
        time.sleep(0.002)
      time.sleep(moments.uniform(0, 0.05))
    else:
      process.wait()
    if process.poll() is None:
      os.kill(process.pid, signal.SIGKILL)
      kills += 1
    _, said = process.communicate()
    resumed += [int(step) for step in re.findall(r'resumed from step (\d+) of 160', said)]
  assert process.returncode == 0, said
  assert kills >= 4
  assert len({step for step in resumed if 0 < step < 160}) >= 2, resumed

  (step, state), (killed_step, killed_state) = newest(whole), newest(tmp_path)
  assert step == killed_step == 160
  assert same(state, killed_state)
  # The log is that of one run, too: the same steps once each, the same evaluations.
  for split in ('eval', 'final'):
    ours, theirs = ([(line['step'], line['accuracy']) for line in read_lines(w / 'metrics.jsonl')
                     if line['split'] == split] for w in (whole, tmp_path))
    assert ours == theirs


@pytest.mark.parametrize(('number', 'code'), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_stop_signals_save_and_say_how_to_go_on(undisturbed, gapjax, tmp_path, number, code):
  _, config_file, data_dir = undisturbed
  arguments = ['train', f'--config={config_file}', f'--data_dir={data_dir}',
               f'--workdir={tmp_path}', '--config.num_epochs=2000']
  process = gapjax(*arguments, start=True)
  wait_for(tmp_path / 'metrics.jsonl', process)
  time.sleep(1.0)
  process.send_signal(number)
  _, err = process.communicate(timeout=120)
  assert process.returncode == code, err
  assert 'stopped at step' in err.splitlines()[-1] and 'the same command' in err
  step, _ = newest(tmp_path)
  assert f'stopped at step {step} of' in err


@pytest.mark.slow
def test_two_commands_in_one_shell_pipeline_do_not_share_a_workdir(undisturbed, gapjax, tmp_path):
  """A second process in a workdir that is in use is told so, and the first is not disturbed."""
  _, config_file, data_dir = undisturbed
  arguments = ['train', f'--config={config_file}', f'--data_dir={data_dir}',
               f'--workdir={tmp_path}']
  first = gapjax(*arguments, start=True)
  wait_for(tmp_path / 'metrics.jsonl', first)
  second = gapjax(*arguments)
  assert second.returncode == 2 and 'in use' in second.stderr
  first.communicate(timeout=600)
  assert first.returncode == 0 and (tmp_path / 'summary.json').exists()


def test_full_disk(undisturbed, gapjax, tmp_path):
  """One line that says so, exit code 2, no traceback; with more space the run goes on."""
  _, config_file, data_dir = undisturbed
  if refused := mount_tmpfs(tmp_path, 'size=1800k'):
    pytest.skip(f'cannot mount a tmpfs here: {refused}')
  try:
    done = gapjax('train', f'--config={config_file}', f'--data_dir={data_dir}',
                  f'--workdir={tmp_path}/run')
    assert done.returncode == 2, done.stderr
    assert 'No space left on device' in done.stderr.splitlines()[-1]
    assert 'Traceback' not in done.stderr
    assert 0 < newest(tmp_path / 'run')[0] < 160
    subprocess.run(['mount', '-o', 'remount,size=20m', tmp_path], check=True)
    done = gapjax('train', f'--config={config_file}', f'--data_dir={data_dir}',
                  f'--workdir={tmp_path}/run')
    assert done.returncode == 0 and 'resumed from step' in done.stderr
  finally:
    subprocess.run(['umount', tmp_path], check=True)


def test_no_permission_to_write(undisturbed, gapjax, tmp_path):
  _, config_file, data_dir = undisturbed
  refused = mount_tmpfs(tmp_path, 'ro')
  if refused and os.geteuid() == 0:
    pytest.skip(f'root may write anywhere, and a read-only tmpfs cannot be mounted: {refused}')
  if refused:
    tmp_path.chmod(0o500)
  try:
    done = gapjax('train', f'--config={config_file}', f'--data_dir={data_dir}',
                  f'--workdir={tmp_path}/run')
    assert done.returncode == 2, done.stderr
    [line] = done.stderr.splitlines()
    assert 'Read-only file system' in line or 'Permission denied' in line
    assert str(tmp_path) in line
  finally:
    if not refused:
      subprocess.run(['umount', tmp_path], check=True)


def test_a_stop_during_an_evaluation_loses_no_evaluation(undisturbed, tmp_path, monkeypatch):
  """Stopped inside the evaluation of step 20: saved there, and evaluated when it goes on."""
  _, config_file, data_dir = undisturbed
  config = configs.from_flags([f'--config={config_file}', '--config.num_epochs=4'])
  config.eval.every_epochs = 2
  calls = []

  def interrupted(self, state, *, passes, stop, progress=False):
    calls.append(int(state.step))
    if len(calls) == 1:
      os.kill(os.getpid(), signal.SIGTERM)
    return whole(self, state, passes=passes, stop=stop, progress=progress)

  whole = CanvasEvaluation.random
  monkeypatch.setattr(CanvasEvaluation, 'random', interrupted)
  arguments = dict(workdir=tmp_path, data_dir=data_dir, devices=jax.local_devices()[:1],
                   progress=False)
  with pytest.raises(Interrupted, match='stopped at step 20 of 40'):
    train(config, **arguments)
  train(config, **arguments)
  assert calls == [20, 20, 40]
  assert [line['step'] for line in read_lines(tmp_path / 'metrics.jsonl')
          if line['split'] == 'eval'] == [20, 40]
