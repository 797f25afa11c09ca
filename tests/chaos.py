"""Trains under launch/restart.sh, disturbs it at random, and compares with an undisturbed run.

    python tests/chaos.py --rounds=30 --seed=0 --output=results/chaos

A round is one training, one kind of fault. It must end with the undisturbed run's parameters and
log, to the bit; or stop with one clear line and exit code 2, its last good checkpoint intact, and
end so once the cause is repaired. Anything else is a loss: exit code 1, and its files are kept.
The same seed and round number draw the same faults: --only=17 repeats one.
"""

import argparse
import contextlib
import datetime
import logging
import os
import pathlib
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time

from chaos_faults import KINDS, disk
from chaos_judge import log_lines, not_clear, not_ended, not_intact
from conftest import ROOT, XLA_FLAGS

from gapjax import paths
from gapjax.data import builders
from gapjax.training import workdirs

RESTART = ROOT / 'launch' / 'restart.sh'
PATIENCE = 300  # seconds until a training that neither ends nor moves is a loss
STARTS = 12  # by this script, in one round
CONFIG = """
from gapjax import config as configs

def get_config(arg=None):
  folder, epochs = arg.rsplit(',', 1)
  c = configs.default()
  c.task, c.num_epochs, c.batch_size, c.log_every = 'segmentation', int(epochs), 8, 4
  c.data.update(name=folder, train_images=24)
  c.model.update(name='deeplabv3', backbone='resnet10', width=4, output_stride=8)
  c.segmentation.crop = (24, 32)
  c.eval.update(images=6, batch_size=4, every_epochs=8)
  c.checkpoint.update(every_epochs=2, keep=2)
  return c
"""


class Ground:
  """The folder of all rounds: a config, a dataset on disk, the undisturbed run."""

  def __init__(self, folder, *, epochs=40):
    self.folder, self.data = folder, folder / 'scenes'
    config = folder / 'tiny.py'
    config.write_text(CONFIG)
    shutil.move(builders.prepare('digit_scenes', source=None, data_dir=folder / 'prepared',
                                 quiet=True), self.data)
    self.argv = [sys.executable, '-m', 'gapjax', 'train', f'--config={config}:{self.data},{epochs}']
    self.environment = {
      'JAX_COMPILATION_CACHE_DIR': str(folder / 'compilations'),
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.2', **os.environ,
      'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': XLA_FLAGS.format(1), 'WAIT': '0'}
    self.reference = folder / 'undisturbed'
    done = subprocess.run(  # keeps all checkpoints: what a disturbed run has left is held to them
      [*self.argv, f'--workdir={self.reference}', '--config.checkpoint.keep=1000'], cwd=ROOT,
      env=self.environment, capture_output=True, text=True, check=False)
    if done.returncode:
      raise RuntimeError(f'the undisturbed run failed: {done.stderr}')
    self.lines = len(log_lines(self.reference))
    self.steps = workdirs.read_summary(self.reference)['step']


class Round:
  """One training under its supervisor, in a folder of its own."""

  def __init__(self, ground, folder, rng):
    self.ground, self.folder, self.random, self.data = ground, folder, rng, ground.data
    self.workdir = folder / 'disk' / 'run'
    self.faults, self.errors, self.wrong, self.starts = [], [], [], 0
    self.least = 0  # the step of the checkpoint that must not be lost
    self.damaged = set()  # steps whose checkpoints a fault has damaged
    self.repair = lambda: None
    self._last, self._mark = 0, 0
    self.start()

  # ---- The supervisor and its child --------------------------------------------------------------
  def start(self):
    """Starts the supervisor, which starts the training; its log begins anew."""
    self.starts += 1
    self.log = self.folder / f'log.{self.starts}'
    (self.folder / 'exit_code').unlink(missing_ok=True)
    self._mark = self._written()
    with self.log.open('w') as log:
      self.supervisor = subprocess.Popen(
        ['bash', RESTART, 'loop', self.folder, 'bash', '-c', 'echo $$ >"$0"; exec "$@"',
         self.folder / 'child', *self.ground.argv, f'--workdir={self.workdir}'], cwd=ROOT,
        env=self.ground.environment, stdout=log, stderr=log, start_new_session=True)

  def running(self):
    return self.supervisor.poll() is None

  def _child(self):
    """The training's process id, once it is another than the one killed last; None at the end."""
    while self.running():
      with contextlib.suppress(OSError, ValueError):
        found = int((self.folder / 'child').read_text())
        if found != self._last:
          return found
      time.sleep(0.002)
    return None

  def _signal(self, number):
    child = self._child()
    with contextlib.suppress(ProcessLookupError):
      if child:
        os.kill(child, number)
    return child

  def kill(self, word=None):
    """SIGKILL to the training; returns when it is dead, and restart.sh starts it again."""
    before, child = self._lines(), self._signal(signal.SIGKILL)
    self._wait_for_end(child)
    self._last, self._mark = child or self._last, self._written()
    if word:
      self.faults.append(f'{word} after {before} lines')

  def kill_machine(self, word):
    """SIGKILL to the supervisor and the training at once."""
    before = self._lines()
    with contextlib.suppress(ProcessLookupError):
      os.killpg(self.supervisor.pid, signal.SIGKILL)
    self.supervisor.wait()
    self.faults.append(f'{word} after {before} lines')

  def terminate(self, *, supervisor):
    """SIGTERM; returns the training's process id."""
    before, child = self._lines(), self._child()
    if supervisor:
      self.supervisor.terminate()
    else:
      self._signal(signal.SIGTERM)
    self.faults.append(f'SIGTERM to the {"supervisor" if supervisor else "training"} after '
                       f'{before} lines')
    return child

  @staticmethod
  def _wait_for_end(process):
    end = time.time() + PATIENCE
    with contextlib.suppress(ProcessLookupError):
      while process and time.time() < end:
        os.kill(process, 0)
        time.sleep(0.002)

  # ---- Moments -----------------------------------------------------------------------------------
  def _written(self):
    path = self.workdir / 'metrics.jsonl'
    return path.stat().st_mtime_ns if path.exists() else 0

  def _lines(self):
    path = self.workdir / 'metrics.jsonl'
    return path.read_bytes().count(b'\n') if path.exists() else 0

  def moment(self, early=0.2):
    """Waits for a random moment; returns whether the training is still going on.

    early: how likely that is one of the first seconds, at imports and compilation; else it is after
    so many lines of the log, at most two thirds of those still to come.
    """
    if self.random.random() < early:
      time.sleep(self.random.uniform(0, 6))
      return self.running()
    end = time.time() + PATIENCE
    part, pause = self.random.uniform(0, 0.67), self.random.uniform(0, 0.2)
    while self.running() and self._written() <= self._mark and time.time() < end:
      time.sleep(0.002)
    lines = self._lines()
    lines += part * (self.ground.lines - lines)
    while self.running() and self._lines() < lines and time.time() < end:
      time.sleep(0.002)
    time.sleep(pause)
    return self.running()

  def temporary(self, wait=True):
    """The name of the checkpoint being written, or None; waits for one as long as it runs."""
    folder = self.workdir / 'checkpoints'
    while True:
      names = os.listdir(folder) if folder.exists() else ()
      found = [name for name in names if 'orbax-checkpoint-tmp' in name]
      if found or not (wait and self.running()):
        return found[0] if found else None
      time.sleep(0.002)

  # ---- To the end --------------------------------------------------------------------------------
  def go_on(self, process=None):
    """Once `process` has ended: starts again, unless the supervisor goes on or all is over."""
    self._wait_for_end(process)
    with contextlib.suppress(subprocess.TimeoutExpired):
      self.supervisor.wait(timeout=0.5)
    if not self.running() and not self.finished():
      self.start()

  def finished(self):
    """What the supervisor's end means: True where the run has ended or is lost."""
    code, output = self.supervisor.returncode, self.log.read_text(errors='replace')
    said = [part for part in re.split(r'(?m)^--- .*\n', output) if part.strip()]
    said = said[-1].strip() if said else 'nothing'
    if code < 0:  # killed by us, with the supervisor
      return False
    code = int((self.folder / 'exit_code').read_text())
    if code == 0 and (self.workdir / 'summary.json').exists():
      return True
    if (code == 0 and 'stopped' in said.splitlines()[-1]) or code == 128 + signal.SIGTERM:
      return False
    if code != 2:
      self.wrong.append(f'ended with exit code {code}')
      return True
    self.errors.append(said.splitlines()[-1])
    self.wrong += not_clear(said)
    self.wrong += not_intact(self.workdir, self.ground.reference, least=self.least)
    self.repair()
    return bool(self.wrong)

  def follow(self):
    """Starts the run again until it ends, and judges it."""
    while not self.wrong:
      try:
        self.supervisor.wait(timeout=PATIENCE)
      except subprocess.TimeoutExpired:
        self.wrong.append(f'has not ended after {PATIENCE} s')
        self.kill_machine('SIGKILL')
      if self.wrong or self.finished():
        break
      if self.starts == STARTS:
        self.wrong.append(f'has not ended after {STARTS} starts')
      self.start()
    output = ''.join(path.read_text(errors='replace') for path in self.folder.glob('log.*'))
    resumed = {int(step) for step in re.findall(r'resumed from step (\d+)', output)}
    self.wrong = self.wrong or not_ended(self.workdir, self.ground.reference, stopped=resumed)
    if not self.wrong and 'Traceback' in output:
      self.wrong.append('its output holds a traceback')
    return len(re.findall(r'(?m)^--- .* -m gapjax train ', output)) - 1


def kind_of(number, seed):
  """Kinds come in shuffled blocks of all: each is drawn about equally often."""
  block, place = divmod(number, len(KINDS))
  return random.Random(f'{seed}/block {block}').sample(list(KINDS), len(KINDS))[place]


def run_round(ground, number, *, seed, kinds=()) -> dict:
  """One round: {'round', 'kind', 'outcome', 'faults', 'errors', 'restarts', 'seconds', ...}.

  kinds: what to do, one after the other, instead of what the number says. outcome: 'equal',
  'repaired' (stopped with a clear error, then ended equal), 'loss', 'missed' (it ended before the
  fault), or 'skipped'. A loss keeps its folder.
  """
  kinds, began = kinds or (kind_of(number, seed),), time.time()
  folder = ground.folder / f'round_{number}'
  folder.mkdir()
  record = {'round': number, 'kind': ' + '.join(kinds)}
  with contextlib.ExitStack() as stack:
    if 'full disk' in kinds and (refused := stack.enter_context(disk(folder / 'disk'))):
      return {**record, 'outcome': 'skipped', 'reason': f'cannot mount a tmpfs: {refused}'}
    run = Round(ground, folder, random.Random(f'{seed}/round {number}'))
    try:
      for kind in kinds:
        KINDS[kind](run)
      restarts = run.follow()
    finally:
      if run.running():
        run.kill_machine('SIGKILL')
    outcome = ('loss' if run.wrong else 'repaired' if run.errors else
               'equal' if run.faults else 'missed')
    if outcome == 'loss' and 'full disk' in kinds:
      shutil.copytree(run.workdir.parent, folder / 'kept')
  if outcome != 'loss':
    shutil.rmtree(folder)
  hide = str(ground.folder)  # no path of this machine in the results
  return {**record, 'outcome': outcome, 'faults': run.faults, 'restarts': restarts,
          'errors': [error.replace(hide, 'FOLDER') for error in run.errors],
          'wrong': run.wrong, 'seconds': round(time.time() - began, 1)}


# ---- Results -------------------------------------------------------------------------------------
COLUMNS = ('rounds', 'equal', 'repaired', 'loss', 'missed', 'skipped', 'restarts')


def totals(records) -> dict:
  """{kind: {column: how many}}, and of all kinds as 'all'."""
  table = {}
  for kind in dict.fromkeys((*KINDS, *(record['kind'] for record in records), 'all')):
    chosen = [record for record in records if kind in (record['kind'], 'all')]
    if not chosen:
      continue
    table[kind] = {'rounds': len(chosen), **{
      column: sum(record['outcome'] == column for record in chosen) for column in COLUMNS[1:-1]},
      'restarts': sum(record.get('restarts', 0) for record in chosen)}
  return table


def as_table(table) -> str:
  """The totals in Markdown."""
  rows = [('kind of fault', *COLUMNS), ('---', *['---:'] * len(COLUMNS)),
          *((kind, *map(str, row.values())) for kind, row in table.items())]
  return '\n'.join(f'| {" | ".join(row)} |' for row in rows)


def merged(previous, about, records):
  """(about, rounds) where these rounds replace those of the same numbers in earlier results."""
  if not previous:
    return about, records
  numbers = {record['round'] for record in records}
  rounds = [record for record in previous['rounds'] if record['round'] not in numbers] + records
  return ({**about, 'command': f'{previous["command"]} && {about["command"]}',
           'seconds': previous['seconds'] + about['seconds']},
          sorted(rounds, key=lambda record: record['round']))


def write(folder, records, *, command, ground, began, previous=None) -> None:
  """results.json and README.md, of nothing but what was run."""
  folder.mkdir(parents=True, exist_ok=True)
  summary = workdirs.read_summary(ground.reference)
  about = {'command': command, 'device': summary['device'], 'versions': summary['versions'],
           'date': datetime.datetime.now(datetime.UTC).date().isoformat(),
           'seconds': round(time.time() - began), 'steps': summary['step'],
           'undisturbed_seconds': round(summary['wall_seconds'], 1)}
  about, records = merged(previous, about, records)
  table = totals(records)
  paths.write_json(folder / 'results.json', {**about, 'kinds': table, 'rounds': records})
  versions = ', '.join(f'{name} {version}' for name, version in about['versions'].items())
  reasons = {f'- skipped, {r["kind"]}: {r["reason"]}' for r in records if r['outcome'] == 'skipped'}
  (folder / 'README.md').write_text('\n\n'.join([
    '# Chaos: a training that is disturbed ends as if it had not been', f'    {about["command"]}',
    f'{about["steps"]} steps of a small DeepLabv3 on {about["device"]}; {about["date"]}, '
    f'{about["seconds"]} s in all; {versions}.', as_table(table),
    '- equal: parameters, log and final metrics are those of the undisturbed run, to the bit\n'
    '- repaired: it stopped with one clear line and exit code 2, the last good checkpoint intact, '
    'and ended equal once the cause was taken away\n- loss: anything else\n'
    '- missed: it had ended before the fault\n- restarts: of the command, in all rounds',
    'Kinds:', '\n'.join(f'- {kind}: {" ".join(fault.__doc__.split())}'
                        for kind, fault in KINDS.items()),
    *(['\n'.join(sorted(reasons))] if reasons else []),
    'What happened in each round: `results.json`.']) + '\n')


def main(argv=None) -> int:
  """Exit code 1 when a round was lost."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
  parser.add_argument('--rounds', type=int, default=30)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--only', type=int, nargs='+', metavar='ROUND',
                      help='only these rounds; in the output they replace the earlier ones')
  parser.add_argument('--kinds', choices=KINDS, nargs='+', default=(), metavar='KIND',
                      help='all of these in every round, in place of a drawn one')
  parser.add_argument('--epochs', type=int, default=40, help='of three steps')
  parser.add_argument('--output', type=pathlib.Path, help='the folder of the results')
  parser.add_argument('--folder', type=pathlib.Path, help='where to work, a new one; it is kept')
  argv = sys.argv[1:] if argv is None else argv
  arguments, began = parser.parse_args(argv), time.time()
  logging.getLogger('absl').setLevel(logging.ERROR)  # orbax warns that it only reads
  folder = arguments.folder or pathlib.Path(tempfile.mkdtemp(prefix='chaos.'))
  folder.mkdir(exist_ok=True)
  ground, records = Ground(folder, epochs=arguments.epochs), []
  said = [word for word in argv if not pathlib.Path(word.partition('=')[2]).is_absolute()]
  earlier = arguments.output and arguments.output / 'results.json'
  previous = None
  if arguments.only and earlier and earlier.exists():
    previous = paths.read_json(earlier)
  for number in arguments.only or range(arguments.rounds):
    records.append(run_round(ground, number, seed=arguments.seed, kinds=arguments.kinds))
    print(' '.join(f'{name}={value}' for name, value in records[-1].items() if value != []),
          flush=True)
    if arguments.output:  # after each, so that an interrupted script leaves what it has found
      write(arguments.output, records, command=shlex.join(['python', 'tests/chaos.py', *said]),
            ground=ground, began=began, previous=previous)
  print(as_table(totals(records)))
  if lost := [record['round'] for record in records if record['outcome'] == 'loss']:
    print(f'lost rounds: {lost}; their files: {folder}')
  elif not arguments.folder:
    shutil.rmtree(folder)
  return 1 if lost else 0


if __name__ == '__main__':
  sys.exit(main())
