"""What is done to a supervised training, by kind; every choice is drawn from the round's generator.

A fault's docstring is its line in the results' README. `disturb(run)` does it; where the cause
stays, `run.repair` takes it away.
"""

import contextlib
import os
import shutil
import subprocess
import time

from chaos_judge import complete
from disks import mount_tmpfs

MB = 2 ** 20
DISK, BLOCK = 16 * MB, 4096


def sigkill(run):
  """SIGKILL to the training, one to three times, at any moment of its life"""
  for _ in range(run.random.randint(1, 3)):
    if run.moment():
      run.kill('SIGKILL')


def sigterm(run):
  """SIGTERM to the training or its supervisor, one to three times; sometimes SIGKILL soon after"""
  for _ in range(run.random.randint(1, 3)):
    if not run.moment():
      continue
    to_supervisor, grace = run.random.random() < 0.5, run.random.uniform(0, 1.5)
    child = run.terminate(supervisor=to_supervisor)
    if run.random.random() < 0.4:
      time.sleep(grace)
      if run.running():
        run.kill_machine(f'SIGKILL {grace:.2f} s later')
    run.go_on(child)


def during_a_checkpoint(run):
  """SIGKILL while orbax' temporary checkpoint folder is there, one to three times"""
  times = run.random.randint(1, 3)
  # A checkpoint is over in 0.2 s, and the kill may come too late: the folder left behind tells.
  while times and run.moment(early=0) and run.temporary():
    time.sleep(run.random.uniform(0, 0.1))
    if run.temporary(wait=False):
      run.kill()
      if left := run.temporary(wait=False):
        run.faults.append(f'SIGKILL with {left} there')
        times -= 1


def truncate(run):
  """Files of the newest checkpoint are truncated, before or after the machine is lost"""
  def cut(path):
    os.truncate(path, run.random.randrange(max(path.stat().st_size, 1)))
  _damage(run, cut, 'truncated')


def delete(run):
  """Files of the newest checkpoint, or all of it, are deleted, before or after the machine is lost
  """
  _damage(run, os.remove, 'deleted', whole=True)


def _damage(run, act, word, *, whole=False):
  """Does `act` to one, some or all of the newest checkpoint's files; there are two checkpoints."""
  if not run.moment(early=0):
    return
  while len(complete(run.workdir)) < 2 and run.running():
    time.sleep(0.002)
  order = run.random.choice(('lost, then damaged', 'damaged, then lost', 'damaged'))
  if order.startswith('lost') and run.running():
    run.kill_machine('SIGKILL to all')
  if run.ground.steps in complete(run.workdir):  # the run may be over: nothing would mend it
    run.go_on()
    return
  share = run.random.choice((0, 0, 0.3, 1))  # of the files: one, some, all
  older, newest = complete(run.workdir)[-2:]
  run.least, done = older, []
  run.damaged.add(newest)
  folder = run.workdir / 'checkpoints' / str(newest)
  files = sorted(path for path in folder.rglob('*') if path.is_file())
  for path in run.random.sample(files, max(1, round(share * len(files)))):
    with contextlib.suppress(FileNotFoundError):  # a newer one came, and this one went
      act(path)
      done.append(path)
  if whole and share == 1:
    shutil.rmtree(folder, ignore_errors=True)
  if done:
    run.faults.append(f'{order}: {len(done)} of {len(files)} files of {newest} {word}'
                        + (f' ({done[0].relative_to(folder)})' if len(done) == 1 else ''))
  if order.endswith('then lost'):
    time.sleep(run.random.uniform(0, 0.5))
    run.kill_machine('SIGKILL to all')
  run.go_on()


def full_disk(run):
  """The workdir's disk, a small tmpfs, is filled by something else, and emptied after the error"""
  if not run.moment():
    return
  free = run.random.choice((0, run.random.randrange(MB), run.random.randrange(3 * MB)))
  ballast = run.workdir.parent / 'ballast'
  run.least = max(set(complete(run.workdir)) - run.damaged, default=0)
  # Block by block: the training writes meanwhile, and takes room that a single request counts on.
  with ballast.open('wb', buffering=0) as file, contextlib.suppress(OSError):
    while shutil.disk_usage(ballast.parent).free > free:
      file.write(bytes(BLOCK))
  run.faults.append(f'{shutil.disk_usage(ballast.parent).free} bytes left')
  run.repair = lambda: ballast.unlink(missing_ok=True)


def no_data(run):
  """The dataset's folder is renamed for a while; sometimes the training is killed meanwhile"""
  if not run.moment():
    return
  run.least = max(set(complete(run.workdir)) - run.damaged, default=0)
  away = run.data.with_name('away')
  run.data.rename(away)
  try:
    seconds, killed = run.random.uniform(0.2, 8), run.random.random() < 0.6
    run.faults.append(f'no data for {seconds:.1f} s')
    if killed and run.running():
      run.kill('SIGKILL meanwhile')
    time.sleep(seconds)
  finally:
    away.rename(run.data)


KINDS = {'sigkill': sigkill, 'sigterm': sigterm, 'during a checkpoint': during_a_checkpoint,
         'truncated checkpoint': truncate, 'deleted checkpoint': delete, 'full disk': full_disk,
         'no data': no_data}


@contextlib.contextmanager
def disk(folder):
  """A small tmpfs at `folder`, as long as entered; yields '' or why there is none."""
  folder.mkdir()
  refused = mount_tmpfs(folder, f'size={DISK}')
  try:
    yield refused
  finally:
    if not refused:
      subprocess.run(['umount', '-l', folder], check=True)
