"""Where the tests of the launch scripts run them: stand-ins for gcloud, srun, nvidia-smi and gapjax
come first in PATH, and no real one is ever called."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

from conftest import ROOT

STUBS = ROOT / 'tests' / 'launch' / 'bin'
TPU = ('--name=my-tpu', '--zone=us-central1-a')
V5E = (*TPU, '--accelerator-type=v5litepod-8')
TRAIN = ('train', '--config=configs/digits.py', '--workdir=gs://bucket/a run')


def make_checkout(folder):
  """A git repository of its own with the scripts in it: tpu_vm.sh installs the last commit."""
  shutil.copytree(ROOT / 'launch', folder / 'launch')
  (folder / 'configs').mkdir()
  shutil.copy(ROOT / 'configs' / 'digits.py', folder / 'configs')
  for command in ('init -q', 'add .', 'commit -q -m launch'):
    subprocess.run(['git', '-c', 'user.name=a', '-c', 'user.email=a@b',
                    '-c', 'commit.gpgsign=false', *command.split()], cwd=folder, check=True)
  return folder


class Desk:
  """A folder with the stand-ins first in PATH, from which scripts are run."""

  def __init__(self, checkout, folder):
    self.checkout, self.folder, self.bin = checkout, folder, folder / 'bin'
    shutil.copytree(STUBS, self.bin)
    for file in self.bin.iterdir():
      file.chmod(0o755)
    # What the TPU VM has once it was installed; uv is the only thing that it would download.
    (folder / 'home' / '.local' / 'bin').mkdir(parents=True)
    uv = folder / 'home' / '.local' / 'bin' / 'uv'
    uv.write_text('#!/bin/sh\necho "uv $*" >>"$STUB/uv"\nmkdir -p gapjax-venv/bin\n'
                  'cp "$STUB/bin/gapjax" gapjax-venv/bin\ncp /bin/true gapjax-venv/bin/python\n')
    uv.chmod(0o755)

  def environment(self, **changes):
    clean = {k: v for k, v in os.environ.items()
             if not k.startswith(('SLURM', 'STUB', 'XLA', 'JAX', 'CUDA', 'GAPJAX'))}
    environment = {**clean, 'PATH': f'{self.bin}:{os.environ["PATH"]}', 'STUB': str(self.folder),
                   'POLL_SECONDS': '0', 'STOP_SECONDS': '5', **changes}
    for name in ('gcloud', 'srun', 'nvidia-smi', 'gapjax', 'scontrol', 'scancel'):
      assert shutil.which(name, path=environment['PATH']) == str(self.bin / name)
    return environment

  def command(self, script, *argv):
    return ['bash', f'launch/{script}', *map(str, argv)]

  def run(self, script, *argv, **changes):
    return subprocess.run(self.command(script, *argv), cwd=self.checkout, text=True, check=False,
                          env=self.environment(**changes), capture_output=True, timeout=60)

  def start(self, script, *argv, until, **changes):
    """A process in a session of its own, once `until()` is true."""
    process = subprocess.Popen(self.command(script, *argv), cwd=self.checkout, text=True,
                               env=self.environment(**changes), stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, start_new_session=True)
    while not until():
      assert process.poll() is None, process.communicate()
      time.sleep(0.02)
    return process

  def waits(self, *names):
    """Whether those stand-ins wait for a signal."""
    return all((self.folder / f'waiting{name}').exists() for name in names)

  def calls(self):
    file = self.folder / 'calls'
    return file.read_text().splitlines() if file.exists() else []

  def exists(self):
    """What of it costs money: the TPU VM, or the request for one."""
    return [name for name in ('vm', 'queue') if (self.folder / name).exists()]

  def processes(self):
    """{id: command line} of all processes that were started with our stand-ins."""
    found = {}
    for process in Path('/proc').glob('[0-9]*'):
      try:
        if f'STUB={self.folder}\0' in (process / 'environ').read_text(errors='replace'):
          found[int(process.name)] = (process / 'cmdline').read_text()
      except OSError:  # it has ended
        pass
    return found

  def left_behind(self):
    """What is still there when that which was killed has had the time to go."""
    end = time.monotonic() + 5
    while (found := self.processes()) and time.monotonic() < end:
      time.sleep(0.05)
    return list(found.values())

  def clean_up(self):
    """Ends what a failed test has left."""
    for process in self.processes():
      os.kill(process, signal.SIGKILL)
