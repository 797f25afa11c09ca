"""The loop over cells and seeds of a suite: resumable, its results written as each finishes."""

import concurrent.futures
import datetime
import logging
import math
import time

import jax

from gapjax import paths
from gapjax.config import replaced
from gapjax.errors import Interrupted, UsageError, check_choice
from gapjax.neurons.run import attack_run
from gapjax.report import page as report
from gapjax.report.plots import neurons as pictures
from gapjax.reproduce.records import (
  add,
  add_attack,
  add_torch,
  check_commit,
  joined,
  read_own,
  torch_seeds,
  write,
)
from gapjax.reproduce.suites import SCALES, SUITES, by_worth, changed, chosen
from gapjax.speed.inputs import step_flops
from gapjax.tasks import TASKS
from gapjax.training import build, workdirs
from gapjax.training.plan import Plan
from gapjax.training.system import (
  StopSignals,
  commit,
  describe_devices,
  is_large,
  keep_freed_memory,
  versions,
)
from gapjax.training.train import train
from gapjax.weights.files import require_torch

log = logging.getLogger(__name__)


def run(suite: str, *, scale: str, seeds: int, workdir, data_dir=None, command: str,
        only: str | None = None, changes=(), with_torch: bool = False, progress: bool = True,
        at_once: int = 1, pace: 'Pace | None' = None):
  """Trains what the workdir's results.json does not hold yet, cell by cell, then its report.

  Args:
    suite: a key of SUITES.
    scale: one of its SCALES.
    seeds: trains with seeds 0 to seeds - 1.
    workdir: cells are trained in `workdir/cells/CELL/seedN`; `workdir/results.json` is written
      after each.
    data_dir: where datasets are; None is TFDS' default.
    command: what the report says made it, below the earlier commands of this workdir.
    only: trains only the cells whose names match one of these patterns, parted by spaces.
    changes: flags '--config.FIELD=VALUE' that set a field of every cell.
    with_torch: trains the PyTorch twin of every cell too, in `workdir/cells/CELL/seedN/torch`.
    progress: whether to show progress bars.
    at_once: on a single device, trains so many cells at the same time, without progress bars where
      that is several: a small network keeps one core busy, not two.
    pace: how long training may take (without at_once): a cell is begun only if it ends in time,
      and one that does not is cut off, saved. None: as long as it does.

  Returns:
    The path of report.html; None where nothing was finished in time.

  Raises:
    UsageError: no such scale, cells or fields; data or PyTorch are missing; results.json holds
      other cells, or seeds of another commit that more are to be averaged with.
    TrainingFailed, Interrupted: as train.train does.
  """
  workdir = paths.of(workdir)
  if with_torch and paths.is_remote(workdir):
    raise UsageError(f'--with_torch trains in a local folder only, not in {workdir}; leave it out, '
                     'or give another --workdir')
  if with_torch:
    require_torch('--with_torch', 'leave it out')
  every, cells = checked(suite, scale, changes, only, data_dir=data_dir)
  if with_torch:
    from gapjax.pytorch.train import check_trained  # PyTorch is optional
    for cell in cells:
      check_trained(cell.config)
  keep_freed_memory(large=any(is_large(cell.config) for cell in cells))
  with workdirs.lock(workdir):  # results.json is read once, and written after every cell
    if (workdir / 'config.json').exists():  # whose report would be lost
      raise UsageError(f'{workdir} is the workdir of a run; use another --workdir')
    path = workdir / 'results.json'
    records = read_own(path, every)
    for name in dict.fromkeys(record['cell'] for record in records):
      log.warning('%s is known from %s', name, path)
    left = to_train(records, cells, seeds=seeds, twin=with_torch)
    _train(left, records, suite=suite, scale=scale, workdir=workdir, data_dir=data_dir,
           command=command, progress=progress, at_once=at_once, pace=pace or Pace(None, data_dir))
    return report.build(workdir) if path.exists() else None


def checked(suite, scale, changes, only, *, data_dir):
  """(All cells of a suite with the changes, those that are chosen), whose data is there.

  Raises UsageError, before hours of training and not after, as `run` does.
  """
  check_choice(scale, SCALES[suite], what=f'scale of {suite}')
  every = changed(SUITES[suite](scale), changes, only=only)
  cells = chosen(every, only)
  for c in (cell.config for cell in cells):
    TASKS[c.task].check_data(c, data_dir=data_dir)
  return every, cells


def run_several(suites, *, scale: str, seeds: int, workdir, command, data_dir=None, only=None,
                minutes=None, changes=(), with_torch: bool = False, **how) -> dict[str, str]:
  """`run` of some suites: one in workdir itself, several each in `workdir/SUITE`, and their cells
  in an order of worth (suites.by_worth).

  Args:
    command: suite -> what its report says made it.
    minutes: how long all of them may train: see `run`'s pace.
    how: see `run`.

  Returns:
    The path of report.html by suite, of those of which something is finished.

  Raises what `run` does.
  """
  pace, pages, workdir, parts = Pace(minutes, data_dir), {}, paths.of(workdir), [(suites[0], only)]
  folders = {suite: workdir / suite if len(suites) > 1 else workdir for suite in suites}
  if len(suites) > 1:
    for suite in suites:  # what each would refuse when its turn comes
      check_choice(scale, SCALES[suite], what=f'scale of {suite}')
    parts = by_worth(suites, scale, only)
    whole = {suite: patterns if only else None for suite, patterns in parts}
    for suite, patterns in whole.items():
      every, cells = checked(suite, scale, changes, patterns, data_dir=data_dir)
      to_train(read_own(folders[suite] / 'results.json', every), cells, seeds=seeds,
               twin=with_torch)
  with build.datasets_kept():
    for suite, patterns in parts:
      if page := run(suite, scale=scale, seeds=seeds, data_dir=data_dir, command=command(suite),
                     only=patterns, workdir=folders[suite], changes=changes, pace=pace,
                     with_torch=with_torch, **how):
        pages[suite] = page
  return pages


def to_train(records, cells, *, seeds: int, twin: bool) -> list[tuple]:
  """[(seed, cell, what is `missing`)], a value of each cell first.

  Raises UsageError where a seed would be averaged with those of another commit.
  """
  left = [(seed, cell, parts) for seed in range(seeds) for cell in cells
          if (parts := missing(records, cell, seed, twin=twin))]
  for _, cell, parts in left:
    check_code(records, cell, parts)
  return left


def check_code(records, cell, parts) -> None:
  """Raises UsageError where parts of one more seed are trained by other code than those there."""
  own = [record for record in records if record['cell'] == cell.name]
  if 'trained' in parts:
    check_commit([record['commit'] for record in own], commit(), name=cell.name)
  if 'twinned' in parts:
    check_commit([twin.get('commit') for record in own if (twin := record.get('torch'))], commit(),
                 name=f'the PyTorch twin of {cell.name}')


def missing(records, cell, seed: int, *, twin: bool) -> set[str]:
  """What the records lack of a cell's seed: of 'trained', 'attacked' and 'twinned'."""
  own = [record for record in records if record['cell'] == cell.name]
  done = {'attacked' if 'N' in record else 'trained' for record in own if seed in record['seeds']}
  if any(seed in torch_seeds(record) for record in own):
    done.add('twinned')
  return {'trained', *(['attacked'] if cell.attack else []), *(['twinned'] if twin else [])} - done


class Pace:
  """Which cells still end in time, judging by what those took that were begun here from nothing.

  A cell of so many floating-point operations takes as long for each as the finished one did whose
  number is nearest, compilation and evaluation included. The first is always begun.
  """

  def __init__(self, minutes: float | None, data_dir):
    self.until = math.inf if minutes is None else time.monotonic() + 60 * minutes
    self.data_dir, self._finished = data_dir, []

  def in_time(self, items, workdir):
    """Yields those of (number, (seed, cell, parts)) that do, to be trained in workdir."""
    for number, (seed, cell, parts) in items:
      if math.isinf(self.until):
        yield number, (seed, cell, parts)
        continue
      work, begin = self._work(cell.config), time.monotonic()
      anew = not (_folder(workdir, cell, seed) / 'config.json').exists()  # else a part is done
      rates = sorted((abs(math.log(work / other)), seconds / other)
                     for other, seconds in self._finished)
      if begin + work * (rates[0][1] if rates else 0) > self.until:
        continue
      yield number, (seed, cell, parts)
      if anew:
        self._finished.append((work, time.monotonic() - begin))

  def _work(self, config):
    train_set, _, task = build.load_data(config, data_dir=self.data_dir)
    plan = Plan.of(config, num_images=len(train_set))
    return plan.total_steps * step_flops(config, task, train_set)


def _train(left, records, *, suite, scale, workdir, data_dir, command, progress, at_once, pace):
  """Trains what is left, and writes results.json and run.json after each."""
  done, note = set(), _diary(workdir / 'run.json', command)

  def work(item, **how):
    number, (seed, cell, parts) = item
    check_code(records, cell, parts)  # again: an earlier seed may have been resumed
    log.warning('%s seed %d (%d of %d)', cell.name, seed, number, len(left))
    return _work(cell, seed, parts, folder=_folder(workdir, cell, seed), data_dir=data_dir,
                 until=pace.until, **how)

  try:
    for (_, (seed, cell, parts)), (folder, summary, attacked) in _several(
        work, pace.in_time(enumerate(left, 1), workdir), at_once=at_once, progress=progress):
      about = dict(seed=seed, summary=summary, suite=suite, scale=scale)
      if 'trained' in parts:
        records = add(records, cell, lines=paths.read_lines(folder / 'metrics.jsonl'), **about)
      if attacked:
        pictures.save(folder, *attacked)
        records = add_attack(records, cell, sweep=attacked.sweep, **about)
      if summary:  # of gapjax's own; before results.json, which is not read without run.json
        note(summary)
      write(workdir / 'results.json', records)
      for line in report.told([record for record in records if record['cell'] == cell.name]):
        log.warning('  %s', line)
      if 'twinned' in parts:
        from gapjax.pytorch import train as twin
        twinned = twin.train(replaced(cell.config, seed=seed), workdir=folder / 'torch',
                             data_dir=data_dir, progress=progress)
        records = add_torch(records, cell, seed=seed, summary=twinned)
        note(twinned)
        write(workdir / 'results.json', records)
      if attacked or 'attacked' not in parts:
        done.add((seed, cell.name))
  except Interrupted:
    note()
    if time.monotonic() < pace.until:
      raise
  if unfinished := [f'{cell.name} seed {seed}' for seed, cell, _ in left
                    if (seed, cell.name) not in done]:
    log.warning('not finished in time: %s; the same command goes on', ', '.join(unfinished))


def _folder(workdir, cell, seed):
  """Where a cell's seed is trained."""
  return workdir / 'cells' / cell.name / f'seed{seed}'


def _diary(path, command):
  """`note`, which writes run.json: what it said before, and this command."""
  run = paths.read_json(path) if path.exists() else {}
  began, mark = datetime.date.today().isoformat(), time.perf_counter()

  def note(summary=None):
    """Adds the time since the last note, and what trained: a summary's machine and versions, or
    those here, of a cell that was cut off and has none."""
    nonlocal run, mark
    about, now = {'device': describe_devices(jax.devices()), 'versions': versions(),
                  **(summary or {})}, time.perf_counter()
    run = joined(run, {'began': began, 'ended': datetime.date.today().isoformat(),
                       'command': command, 'device': about['device'],
                       'versions': about['versions'], 'wall_seconds': now - mark})
    mark = now
    paths.write_json(path, run)

  return note


def _work(cell, seed, parts, *, folder, data_dir, until, **how):
  """Trains and attacks a cell's seed: (folder, summary, attack), None where not in `parts`. No
  attack begins after `until`: nothing stops it."""
  summary = attacked = None
  if parts & {'trained', 'attacked'}:
    summary = train(replaced(cell.config, seed=seed), workdir=folder, data_dir=data_dir,
                    until=until, **how,
                    alike=[folder.with_name(f'seed{earlier}') for earlier in range(seed)])
  if 'attacked' in parts and time.monotonic() < until:
    attacked = attack_run(folder, data_dir=data_dir)
  return folder, summary, attacked


def _several(work, items, *, at_once: int, progress: bool):
  """Yields (item, work(item)) as each is done, `at_once` of them in threads at the same time."""
  if at_once == 1 or jax.device_count() > 1:  # whose sums would wait for each other's
    for item in items:
      yield item, work(item, progress=progress)
    return
  with StopSignals() as stop, concurrent.futures.ThreadPoolExecutor(at_once) as pool:
    futures = {pool.submit(work, item, progress=False, stop=stop): item for item in items}
    try:
      for future in concurrent.futures.as_completed(futures):
        yield futures[future], future.result()
    finally:
      pool.shutdown(cancel_futures=True)
