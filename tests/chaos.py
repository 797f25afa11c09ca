"""Trains, disturbs the training at random, and compares with an undisturbed run.

    python tests/chaos.py --rounds=30 --seed=0 --output=results/chaos

A round is one training, one kind of fault. It must end with the undisturbed run's parameters and
log, to the bit; or stop with one clear line and exit code 2, its last good checkpoint intact, and
end so once the cause is repaired. Anything else is a loss: exit code 1, and its files are kept.
The same seed and round number draw the same faults: --only=17 repeats one.
"""

import argparse
import contextlib
import datetime
import json
import logging
import os
import pathlib
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time

from chaos_judge import complete, differs, not_clear, not_intact
from conftest import ROOT, XLA_FLAGS, wait_until
from disks import mount_tmpfs

from gapjax import data, paths

PATIENCE = 300  # seconds until a training that neither ends nor moves is a loss
STARTS = 12  # of the training, in one round
MB = 2 ** 20
DISK, BLOCK = 16 * MB, 4096
CONFIG = """
from gapjax import config as configs

def get_config(arg=None):
  folder, epochs = arg.rsplit(',', 1)
  c = configs.default()
  c.task, c.num_epochs, c.batch_size, c.log_every = 'segmentation', int(epochs), 8, 1
  c.data.update(name=folder, train_images=24)
  c.model.update(name='deeplabv3', backbone='resnet10', width=4, output_stride=8)
  c.segmentation.crop = (24, 32)
  c.eval.update(images=6, batch_size=4, every_epochs=8)
  c.checkpoint.update(every_epochs=2, keep=2)
  return c
"""


def count_lines(workdir):
  path = workdir / 'metrics.jsonl'
  return path.read_bytes().count(b'\n') if path.exists() else 0


class Ground:
  """The folder of all rounds: a config, a dataset on disk, the undisturbed run."""

  def __init__(self, folder, *, epochs=40):
    self.folder, self.data = folder, folder / 'scenes'
    config = folder / 'tiny.py'
    config.write_text(CONFIG)
    shutil.move(data.prepare('digit_scenes', data_dir=folder / 'prepared'), self.data)
    self.argv = [sys.executable, '-m', 'gapjax', 'train', f'--config={config}:{self.data},{epochs}']
    self.environment = {
      'JAX_COMPILATION_CACHE_DIR': str(folder / 'compilations'),
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.2', **os.environ,
      'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': XLA_FLAGS.format(1)}
    self.reference = folder / 'undisturbed'
    # It keeps all checkpoints: what a disturbed run has left is held to them.
    self.start(f'--workdir={self.reference}', '--config.checkpoint.keep=1000').wait()
    self.summary = json.loads((self.reference / 'summary.json').read_text())
    self.lines = count_lines(self.reference)

  def start(self, *flags, output=None):
    """A training as a process."""
    return subprocess.Popen([*self.argv, *flags], cwd=ROOT, env=self.environment, stdout=output,
                            stderr=output)


class Run:
  """One training in a folder of its own, started again each time that it stops too early."""

  def __init__(self, ground, folder, rng):
    self.ground, self.folder, self.random = ground, folder, rng
    self.workdir = folder / 'disk' / 'run'
    self.faults, self.errors, self.wrong, self.starts = [], [], [], 0
    self.least = 0  # the step of the checkpoint that must not be lost
    self.damaged = set()  # steps whose checkpoints a fault has damaged
    self.repair = lambda: None
    self.start()

  # ---- The process -------------------------------------------------------------------------------
  def start(self):
    self.starts += 1
    self._mark = self._written()
    with (self.folder / 'output').open('w') as output:
      self.process = self.ground.start(f'--workdir={self.workdir}', output=output)

  def running(self):
    return self.process.poll() is None

  def signal(self, number):
    if self.running():
      self.faults.append(f'{signal.Signals(number).name} after {count_lines(self.workdir)} lines')
      self.process.send_signal(number)
    if number == signal.SIGKILL:
      self.process.wait()

  def go_on(self):
    """Waits for the process's end, judges it, and starts another if more is to come; if it did."""
    try:
      code = self.process.wait(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
      self.process.kill()
      code = f'none after {PATIENCE} s'
    said = (self.folder / 'output').read_text(errors='replace')
    if 'Traceback' in said:
      self.wrong.append('its output holds a traceback')
    if code == 0 and (self.workdir / 'summary.json').exists():
      return False
    if code == 2:
      self.errors += said.splitlines()[-1:]
      self.wrong += not_clear(said) + not_intact(self.workdir, self.ground.reference,
                                                 least=self.least)
      self.repair()
    elif code not in (-signal.SIGKILL, -signal.SIGTERM) and 'stopped at step' not in said:
      self.wrong.append(f'ended with exit code {code}')
    if self.starts == STARTS:
      self.wrong.append(f'has not ended after {STARTS} starts')
    if not self.wrong:
      self.start()
    return not self.wrong

  def follow(self):
    """To the end; judges it. Returns how often the training was started again."""
    while self.go_on():
      pass
    self.wrong = self.wrong or differs(self.workdir, self.ground.reference)
    return self.starts - 1

  # ---- Moments -----------------------------------------------------------------------------------
  def _written(self):
    path = self.workdir / 'metrics.jsonl'
    return path.stat().st_mtime_ns if path.exists() else 0

  def wait(self, until):
    """Until that is so, or the training has ended; whether it is still going on."""
    wait_until(until, self.process, seconds=PATIENCE)
    return self.running()

  def moment(self, early=0.2):
    """Waits for a random moment; returns whether the training is still going on.

    early: how likely that is one of the first seconds, at imports and compilation; else it is after
    some of the log's lines, at most two thirds of those still to come.
    """
    if self.random.random() < early:
      time.sleep(self.random.uniform(0, 6))
      return self.running()
    part, pause = self.random.uniform(0, 0.67), self.random.uniform(0, 0.2)
    self.wait(lambda: self._written() > self._mark)
    lines = (1 - part) * count_lines(self.workdir) + part * self.ground.lines
    self.wait(lambda: count_lines(self.workdir) >= lines)
    time.sleep(pause)
    return self.running()

  def temporary(self):
    """The names of the checkpoints being written."""
    return [path.name for path in (self.workdir / 'checkpoints').glob('*orbax-checkpoint-tmp*')]

  def guard(self):
    """The newest checkpoint that is good by now must not be lost."""
    self.least = max(set(complete(self.workdir)) - self.damaged, default=0)


# ---- Faults; their docstrings are lines of the results' README -----------------------------------
def sigkill(run):
  """SIGKILL, one to three times, at any moment of its life"""
  for _ in range(run.random.randint(1, 3)):
    if run.moment():
      run.signal(signal.SIGKILL)
      run.go_on()


def sigterm(run):
  """SIGTERM, one to three times; sometimes SIGKILL soon after"""
  for _ in range(run.random.randint(1, 3)):
    if run.moment():
      run.signal(signal.SIGTERM)
      if run.random.random() < 0.4:
        time.sleep(run.random.uniform(0, 1.5))
        run.signal(signal.SIGKILL)
      run.go_on()


def during_a_checkpoint(run):
  """SIGKILL while orbax' temporary checkpoint folder is there, one to three times"""
  times = run.random.randint(1, 3)
  # A checkpoint is over in 0.2 s, and the kill may come too late: the folder left behind tells.
  while times and run.moment(early=0) and run.wait(run.temporary):
    time.sleep(run.random.uniform(0, 0.1))
    if run.temporary():
      run.signal(signal.SIGKILL)
      if left := run.temporary():
        run.faults.append(f'with {left[0]} there')
        times -= 1
      run.go_on()


def truncate(run):
  """Files of the newest checkpoint are truncated, before or after a SIGKILL"""
  def cut(path):
    os.truncate(path, run.random.randrange(max(path.stat().st_size, 1)))
  _damage(run, cut, 'truncated')


def delete(run):
  """Files of the newest checkpoint are deleted, before or after a SIGKILL"""
  _damage(run, os.remove, 'deleted')


def _damage(run, act, word):
  """Does `act` to one, some or all of the newest checkpoint's files; there are two checkpoints."""
  run.moment(early=0)
  if not run.wait(lambda: len(complete(run.workdir)) > 1):  # a run that is over mends nothing
    return
  if run.random.random() < 0.5:
    run.signal(signal.SIGKILL)
  run.least, newest = complete(run.workdir)[-2:]
  run.damaged.add(newest)
  folder = run.workdir / 'checkpoints' / str(newest)
  files = sorted(path for path in folder.rglob('*') if path.is_file())
  share = run.random.choice((0, 0, 0.3, 1))  # of the files: one, some, all
  for path in run.random.sample(files, max(1, round(share * len(files)))):
    with contextlib.suppress(FileNotFoundError):  # a newer one came, and this one went
      act(path)
      run.faults.append(f'{path.relative_to(folder)} of {newest} {word}')
  time.sleep(run.random.uniform(0, 0.5))
  run.signal(signal.SIGKILL)
  run.go_on()


def full_disk(run):
  """The workdir's disk, a small tmpfs, is filled by something else, and emptied after the error"""
  if not run.moment():
    return
  free = run.random.choice((0, run.random.randrange(MB), run.random.randrange(3 * MB)))
  ballast = run.workdir.parent / 'ballast'
  run.guard()
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
  run.guard()
  away = run.ground.data.with_name('away')
  run.ground.data.rename(away)
  seconds = run.random.uniform(0.2, 8)
  run.faults.append(f'no data for {seconds:.1f} s')
  if run.random.random() < 0.6:
    run.signal(signal.SIGKILL)
    run.go_on()
  time.sleep(seconds)
  away.rename(run.ground.data)


KINDS = {'sigkill': sigkill, 'sigterm': sigterm, 'during a checkpoint': during_a_checkpoint,
         'truncated checkpoint': truncate, 'deleted checkpoint': delete, 'full disk': full_disk,
         'no data': no_data}


def kind_of(number, seed):
  """Kinds come in shuffled blocks of all: each is drawn about equally often."""
  block, place = divmod(number, len(KINDS))
  return random.Random(f'{seed}/block {block}').sample(list(KINDS), len(KINDS))[place]


def run_round(ground, number, *, seed, kinds) -> dict:
  """One round of these faults: {'round', 'kind', 'outcome', 'faults', 'restarts', ...}.

  outcome: 'equal', 'repaired' (stopped with a clear error, then ended equal), 'loss', 'missed' (it
  ended before the fault), or 'skipped'. A loss keeps its folder.
  """
  folder = ground.folder / f'round_{number}'
  disk = folder / 'disk'
  disk.mkdir(parents=True)
  record = {'round': number, 'kind': ' + '.join(kinds)}
  if 'full disk' in kinds and (refused := mount_tmpfs(disk, f'size={DISK}')):
    return {**record, 'outcome': 'skipped', 'reason': f'cannot mount a tmpfs: {refused}'}
  run = Run(ground, folder, random.Random(f'{seed}/round {number}'))
  try:
    for kind in kinds:
      KINDS[kind](run)
    restarts = run.follow()
  finally:
    run.process.kill()
  outcome = ('loss' if run.wrong else 'repaired' if run.errors else
             'equal' if run.faults else 'missed')
  if outcome == 'loss':
    shutil.copytree(disk, folder / 'kept')
  if 'full disk' in kinds:
    subprocess.run(['umount', '-l', disk], check=True)
  if outcome != 'loss':
    shutil.rmtree(folder)
  errors = [error.replace(str(ground.folder), 'FOLDER') for error in run.errors]
  return {**record, 'outcome': outcome, 'faults': run.faults, 'errors': errors, 'wrong': run.wrong,
          'restarts': restarts}


COLUMNS = ('rounds', 'equal', 'repaired', 'loss', 'missed', 'skipped', 'restarts')


def totals(records) -> dict:
  """{kind: {column: how many}}, and of all kinds as 'all'."""
  table = {}
  for kind in (*dict.fromkeys(record['kind'] for record in records), 'all'):
    chosen = [record for record in records if kind in (record['kind'], 'all')]
    table[kind] = {'rounds': len(chosen), **{
      column: sum(record['outcome'] == column for record in chosen) for column in COLUMNS[1:-1]},
      'restarts': sum(record.get('restarts', 0) for record in chosen)}
  return table


PAGE = """# Chaos: a training that is disturbed ends as if it had not been

    {command}

{steps} steps of a small DeepLabv3 on {device}; {date}, {seconds} s in all; {packages}.

{table}

- equal: parameters, log and final metrics are those of the undisturbed run, to the bit
- repaired: it stopped with one clear line and exit code 2, the last good checkpoint intact, and ended equal once the cause was taken away
- loss: anything else
- missed: it had ended before the fault
- restarts: of the command, in all rounds

Kinds:

{kinds}

What happened in each round: `results.json`.
"""  # noqa: E501


def write(folder, records, *, command, ground, began) -> None:
  """results.json and README.md, of nothing but what was run."""
  folder.mkdir(parents=True, exist_ok=True)
  about = {'command': command, 'device': ground.summary['device'],
           'versions': ground.summary['versions'],
           'date': datetime.datetime.now(datetime.UTC).date().isoformat(),
           'seconds': round(time.time() - began), 'steps': ground.summary['step']}
  counts = totals(records)
  paths.write_json(folder / 'results.json', {**about, 'kinds': counts, 'rounds': records})
  rows = [('kind of fault', *COLUMNS), ('---', *['---:'] * len(COLUMNS)),
          *((kind, *map(str, row.values())) for kind, row in counts.items())]
  (folder / 'README.md').write_text(PAGE.format(
    **about, table='\n'.join(f'| {" | ".join(row)} |' for row in rows),
    packages=', '.join(f'{name} {version}' for name, version in about['versions'].items()),
    kinds='\n'.join(f'- {kind}: {fault.__doc__}' for kind, fault in KINDS.items())))


def main(argv=None) -> int:
  """Exit code 1 when a round was lost."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
  parser.add_argument('--rounds', type=int, default=30)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--only', type=int, nargs='+', metavar='ROUND', help='only these rounds')
  parser.add_argument('--output', type=pathlib.Path, help='the folder of the results')
  arguments, began = parser.parse_args(argv), time.time()
  logging.getLogger('absl').setLevel(logging.ERROR)  # orbax warns that it only reads
  ground, records = Ground(pathlib.Path(tempfile.mkdtemp(prefix='chaos.'))), []
  command = shlex.join(['python', 'tests/chaos.py', *(argv or sys.argv[1:])])
  for number in arguments.only or range(arguments.rounds):
    records.append(run_round(ground, number, seed=arguments.seed,
                             kinds=[kind_of(number, arguments.seed)]))
    print(records[-1], flush=True)
    if arguments.output:  # after each, so that an interrupted script leaves what it has seen
      write(arguments.output, records, command=command, ground=ground, began=began)
  if lost := [record['round'] for record in records if record['outcome'] == 'loss']:
    print(f'lost rounds: {lost}; their files: {ground.folder}')
  else:
    shutil.rmtree(ground.folder)
  return 1 if lost else 0


if __name__ == '__main__':
  sys.exit(main())
