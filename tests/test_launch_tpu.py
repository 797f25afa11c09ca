"""tpu_vm.sh against a gcloud that fails wherever one can: nobody pays for what they do not know of.
"""

import os
import re
import shlex
import signal
import subprocess
import time

import pytest
from launch_desk import TPU, TRAIN, V5E, Desk

DELETE = '  launch/tpu_vm.sh delete --name=my-tpu --zone=us-central1-a'


def test_tpu_from_nothing_to_done_to_nothing(desk):
  """The commands that go over ssh are really run, on a folder: quoting is right at every level."""
  ran = desk.run('tpu_vm.sh', 'all', *V5E, '--queued', *TRAIN, '--config.x=it\'s "a" $HOME',
                 STUB_QUEUE='WAITING_FOR_RESOURCES PROVISIONING ACTIVE', STUB_GAPJAX='0:ok')
  assert ran.returncode == 0, ran.stderr
  assert ('<train><--distributed><--config=configs/digits.py><--workdir=gs://bucket/a run>'
          '<--config.x=it\'s "a" $HOME>\n') in ran.stdout
  assert 'the run has ended well, or was stopped and saved' in ran.stderr
  assert './gapjax-src[tpu,gcs]' in (desk.folder / 'uv').read_text()
  assert (desk.folder / 'home' / 'gapjax-src' / 'configs' / 'digits.py').exists()
  assert [line for line in ran.stderr.splitlines() if 'my-tpu: ' in line] == [
    'tpu_vm.sh: my-tpu: WAITING_FOR_RESOURCES', 'tpu_vm.sh: my-tpu: PROVISIONING']
  assert desk.exists() == ['vm', 'queue'] and DELETE in ran.stderr

  ran = desk.run('tpu_vm.sh', 'status', *TPU)
  assert 'VM READY v5litepod-8, queued resource ACTIVE' in ran.stdout
  assert 'ended with exit code 0' in ran.stdout and DELETE in ran.stderr
  ran = desk.run('tpu_vm.sh', 'delete', *TPU)
  assert (ran.returncode, desk.exists()) == (0, []) and DELETE not in ran.stderr
  ran = desk.run('tpu_vm.sh', 'delete', *TPU)
  assert ran.returncode == 0 and 'nothing named my-tpu' in ran.stderr


def test_tpu_run_is_stopped_on_the_worker(desk):
  assert desk.run('tpu_vm.sh', 'create', *V5E).returncode == 0
  assert desk.run('tpu_vm.sh', 'install', *TPU).returncode == 0
  ran = desk.run('tpu_vm.sh', 'run', *TPU, *TRAIN, STUB_GAPJAX='0:wait')
  assert ran.returncode == 0 and DELETE in ran.stderr
  ran = desk.run('tpu_vm.sh', 'install', *TPU)
  assert ran.returncode == 1 and 'a run is going on here' in ran.stderr
  while not desk.waits('0'):
    time.sleep(0.02)
  ran = desk.run('tpu_vm.sh', 'stop', *TPU)
  assert (ran.returncode, ran.stdout) == (0, 'stopped\n') and DELETE in ran.stderr
  assert 'saved' in (desk.folder / 'home' / 'gapjax-run' / 'log').read_text()
  assert desk.left_behind() == []


# half: a create that fails has created all the same.
@pytest.mark.parametrize(('queued', 'half'), [(False, ''), (False, '1'), (True, '1')])
def test_tpu_failing_at_each_step_says_how_to_delete(checkout, tmp_path, queued, half):
  """Whichever call of gcloud fails: nothing costly comes after it, and what exists is named."""
  def attempt(name, *flags, **changes):
    desk = Desk(checkout, tmp_path / name)
    return desk, desk.run('tpu_vm.sh', 'all', *V5E, *(['--queued'] if queued else []), *flags,
                          *TRAIN, STUB_GAPJAX='0:ok', STUB_HALF=half, **changes)

  calls = len(attempt('well')[0].calls())
  assert calls >= 9
  for k in range(1, calls + 1):
    desk, ran = attempt(f'from{k}', STUB_FAIL=f'{k}+')
    assert ran.returncode == 1, (k, ran.stderr)
    created = any(' create ' in call for call in desk.calls())
    assert (DELETE in ran.stderr.splitlines()) == created, (k, ran.stderr)
    for call in desk.calls()[k:]:
      assert ' list ' in call, (k, call)  # asking what exists is all that may follow
    if desk.exists():
      # The command without the script, as it is printed, leaves nothing.
      raw = next(line for line in ran.stderr.splitlines() if line.startswith('  gcloud '))
      subprocess.run(shlex.split(raw), env=desk.environment(), check=True)
      assert desk.exists() == []


@pytest.mark.parametrize('queued', [False, True])
def test_tpu_delete_on_failure(checkout, tmp_path, queued):
  flags = ['--queued'] if queued else []
  steps = range(3, 9 + queued)  # from create to the start of the run
  for k in steps:
    desk = Desk(checkout, tmp_path / str(k))
    ran = desk.run('tpu_vm.sh', 'all', *V5E, *flags, '--delete-on-failure', *TRAIN, STUB_HALF='1',
                   STUB_FAIL=str(k), STUB_GAPJAX='0:ok')
    if queued and k == 4:  # one unanswered look at the queue is not a failure
      assert ran.returncode == 0
      continue
    assert (ran.returncode, desk.exists()) == (1, []), (k, ran.stderr)
    assert DELETE not in ran.stderr.splitlines()
  # If deleting fails too, it says so.
  desk = Desk(checkout, tmp_path / 'both')
  ran = desk.run('tpu_vm.sh', 'all', *V5E, *flags, '--delete-on-failure', *TRAIN, STUB_HALF='1',
                 STUB_FAIL='3+')
  assert ran.returncode == 1 and 'my-tpu is NOT deleted' in ran.stderr
  assert desk.exists() and DELETE in ran.stderr.splitlines()


def test_tpu_has_ended_well_when_every_worker_has(desk):
  """The first worker's run ends well, and is followed; another's does not."""
  ran = desk.run('tpu_vm.sh', 'all', *V5E, *TRAIN, STUB_GAPJAX='0:ok', STUB_OTHERS='90')
  assert ran.returncode == 1 and 'the run has ended, and not well' in ran.stderr


@pytest.mark.parametrize('config', ['digits', 'configs/digits', 'digits.py:variant'])
def test_tpu_takes_the_configs_that_gapjax_does(desk, config):
  ran = desk.run('tpu_vm.sh', 'all', *V5E, '--dry-run', 'train', f'--config={config}',
                 '--workdir=gs://bucket/run')
  assert ran.returncode == 0, ran.stderr


def test_tpu_delete_when_done(desk):
  ran = desk.run('tpu_vm.sh', 'all', *V5E, '--delete-when-done', *TRAIN, STUB_GAPJAX='0:fail',
                 RESTARTS='0')
  assert ran.returncode == 1 and 'the run has ended, and not well' in ran.stderr
  assert 'ended with exit code 7' in ran.stdout
  assert desk.exists() == [] and DELETE not in ran.stderr


def test_tpu_interrupted_while_following_goes_on(desk):
  process = desk.start('tpu_vm.sh', 'all', *V5E, '--delete-on-failure', *TRAIN,
                       STUB_GAPJAX='0:wait', until=lambda: desk.waits('0') and desk.calls() and
                       'restart.sh logs' in desk.calls()[-1])
  os.killpg(process.pid, signal.SIGINT)
  output = process.communicate(timeout=20)[0]
  assert process.returncode == 130 and DELETE in output.splitlines()
  assert desk.exists() == ['vm']
  assert any('gapjax-venv' in line for line in desk.processes().values())
  assert desk.run('tpu_vm.sh', 'stop', *TPU).returncode == 0
  assert desk.left_behind() == []


@pytest.mark.parametrize(('flags', 'left'), [((), ['vm', 'queue']), (('--delete-on-failure',), [])])
def test_tpu_interrupted_while_waiting(desk, flags, left):
  process = desk.start('tpu_vm.sh', 'create', *V5E, '--queued', *flags, POLL_SECONDS='0.1',
                       STUB_QUEUE='WAITING_FOR_RESOURCES', until=lambda: len(desk.calls()) > 4)
  os.killpg(process.pid, signal.SIGINT)
  output = process.communicate(timeout=20)[0]
  assert process.returncode == 130
  assert desk.exists() == left and (DELETE in output.splitlines()) == bool(left)


def test_tpu_is_reused(desk):
  (desk.folder / 'vm').write_text('READY\tv5litepod-8\n')
  ran = desk.run('tpu_vm.sh', 'create', *V5E)
  assert ran.returncode == 0 and DELETE in ran.stderr
  assert not any(' create ' in call for call in desk.calls())
  ran = desk.run('tpu_vm.sh', 'create', *TPU, '--accelerator-type=v4-8')
  assert ran.returncode == 1 and 'is a v5litepod-8, not a v4-8' in ran.stderr
  ran = desk.run('tpu_vm.sh', 'run', *TPU, 'evaluate', '--workdir=gs://b/c', STUB_GAPJAX='0:ok')
  assert ran.returncode == 1  # nothing is installed
  (desk.folder / 'vm').write_text('READY\tv4-32\n')
  ran = desk.run('tpu_vm.sh', 'run', *TPU, 'evaluate', '--workdir=gs://b/c')
  assert ran.returncode == 2 and 'needs a type with one worker' in ran.stderr


@pytest.mark.parametrize(('vm', 'queue', 'flags'), [
  ('PREEMPTED', '', ()), ('', 'FAILED', ('--queued',)), ('', 'SUSPENDED', ('--queued',)),
  ('TERMINATED', 'SUSPENDED', ('--queued', '--spot'))])
def test_tpu_that_is_of_no_use_is_created_anew_if_asked(desk, vm, queue, flags):
  for name, state in (('vm', vm), ('queue', queue)):
    if state:
      (desk.folder / name).write_text(f'{state}\tv5litepod-8\n' if name == 'vm' else f'{state}\n')
  ran = desk.run('tpu_vm.sh', 'create', *V5E, *flags)
  assert ran.returncode == 1 and '--recreate' in ran.stderr and DELETE in ran.stderr
  assert not any(' create ' in call for call in desk.calls())
  ran = desk.run('tpu_vm.sh', 'create', *V5E, *flags, '--recreate')
  assert ran.returncode == 0, ran.stderr
  assert (desk.folder / 'vm').read_text() == 'READY\tv5litepod-8\n'


@pytest.mark.parametrize(('vm', 'queue', 'expected'), [
  ('STOPPED', '', 'is STOPPED: wait'), ('CREATING', '', 'is CREATING: wait'),
  ('', 'WAITING_FOR_RESOURCES', 'give --queued too')])
def test_tpu_that_is_not_ours_to_take(desk, vm, queue, expected):
  for name, state in (('vm', vm), ('queue', queue)):
    if state:
      (desk.folder / name).write_text(f'{state}\n')
  ran = desk.run('tpu_vm.sh', 'create', *V5E, '--recreate', '--delete-on-failure')
  assert ran.returncode == 1 and expected in ran.stderr and DELETE in ran.stderr
  assert all(' list ' in call for call in desk.calls())


@pytest.mark.parametrize('states', ['FAILED', 'WAITING_FOR_RESOURCES SUSPENDED'])
def test_tpu_request_that_comes_to_nothing(desk, states):
  ran = desk.run('tpu_vm.sh', 'create', *V5E, '--queued', STUB_QUEUE=states)
  assert ran.returncode == 1 and f'it is {states.split()[-1]}' in ran.stderr
  assert DELETE in ran.stderr


def test_tpu_that_is_taken_away_says_how_to_go_on(desk):
  """The connection breaks while following the run, and the VM is no longer there."""
  argv = ('all', *V5E, '--spot', *TRAIN)
  # The follower's connection is the last call of ssh; after it gcloud says PREEMPTED.
  gcloud = desk.bin / 'gcloud'
  gcloud.write_text(gcloud.read_text().replace(
    "  *'tpu-vm ssh '*)", "  *'restart.sh logs'*)\n    sed -i s/READY/PREEMPTED/ \"$STUB/vm\"\n"
    "    exit 255 ;;\n  *'tpu-vm ssh '*)"))
  ran = desk.run('tpu_vm.sh', *argv, STUB_GAPJAX='0:ok')
  assert ran.returncode == 1 and DELETE in ran.stderr
  command = re.search(r'goes on from there: launch/tpu_vm.sh (.*)', ran.stderr).group(1)
  assert shlex.split(command) == ['all', '--recreate', *argv[1:]]
