"""The training loop, read top to bottom."""

import contextlib
import logging
import math

import jax
import numpy as np
from clu import parameter_overview

from gapjax import config as configs
from gapjax import paths
from gapjax.errors import Diverged, Interrupted
from gapjax.training import build, steps, workdirs
from gapjax.training.checkpoint import Checkpoints, digest
from gapjax.training.devices import (
  Devices,
  agree,
  check_alike,
  decided,
  is_alone,
  is_first,
  keep_programs,
  wait_for_all,
)
from gapjax.training.log import Writer, progress_bar
from gapjax.training.plan import Plan
from gapjax.training.system import Clock, StopSignals, commit, describe_devices, versions

log = logging.getLogger(__name__)


def train(config, *, workdir, data_dir=None, devices=None, progress=True, alike=(),
          stop=None, until=math.inf) -> dict:
  """Trains and evaluates one network; goes on where workdir's newest checkpoint stands.

  Args:
    config: see gapjax/config.py.
    workdir: the folder where everything goes, local or gs://BUCKET/FOLDER.
    data_dir: where datasets are; None is TFDS' default.
    devices: jax devices; None for all, of all processes.
    progress: whether to show a progress bar.
    alike: workdirs that this run is averaged with, and so must share its data with.
    stop: StopSignals that a caller in the main thread has entered; None: its own.
    until: a time.monotonic() at which it stops, saved, as if SIGTERM had come (without `stop`).

  Returns:
    The summary, as in `workdir/summary.json`.

  Raises:
    UsageError: a config that cannot be; a workdir of another config, or of other data; data that is
      not there.
    Diverged: a loss, gradient or parameter is not finite.
    Interrupted: SIGTERM or Ctrl-C, or the time is up, after saving.
  """
  configs.validate(config)
  devices = Devices(devices)
  keep_programs(devices.platform)
  devices.check_batch(config.batch_size)
  workdir, config = paths.of(workdir), workdirs.settled(config, platform=devices.platform)

  with contextlib.ExitStack() as stack:
    stop = stop or stack.enter_context(StopSignals(until))

    # ---- A finished run needs nothing more, not even its data -----------------------------------
    if finished := decided(lambda: workdirs.finished(workdir, config)):
      log.info('%s is finished; nothing to do', workdir)
      return finished

    # ---- Data ---------------------------------------------------------------------------------
    train_set, test_set, task = build.load_data(config, data_dir=data_dir)
    identities = build.identities(train_set, test_set)

    # ---- Workdir: new, or of the same config and data; nobody else's meanwhile -----------------
    if is_first():  # the process that reads and writes there
      stack.enter_context(workdirs.lock(workdir))
    decided(lambda: workdirs.check(workdir, config))
    decided(lambda: [workdirs.check_data(run, identities) for run in (workdir, *alike)])

    # ---- Network, optimiser, compiled steps ----------------------------------------------------
    plan = Plan.of(config, num_images=len(train_set))
    model, state, rule, schedule = build.create_learner(config, task, train_set, plan,
                                                 platform=devices.platform)
    log.info('%s\n%s', describe(config, task, plan, devices),
             parameter_overview.get_parameter_overview(state.params, include_stats=False))
    if config.schedule.warmup_epochs >= config.num_epochs:
      log.warning('the learning rate rises to the end: schedule.warmup_epochs=%g of num_epochs=%g',
                  config.schedule.warmup_epochs, config.num_epochs)
    train_steps = build.create_train_steps(model, task, rule, devices)
    evaluation = build.create_evaluation(config, model, task, test_set, devices,
                                         check_stop=stop.check if is_alone() else lambda: None)

    # ---- Resume, or begin: the workdir is this config's ----------------------------------------
    checkpoints = stack.enter_context(Checkpoints(workdir, keep=config.checkpoint.keep))
    found = checkpoints.restore(devices.to_host(state))
    step, state, meta = found or (0, build.pretrained(config, state), {'wall_seconds': 0.0})
    check_alike(digest({'config': configs.as_json(config), 'data': identities, 'state': state}))
    if is_first():
      workdirs.claim(workdir, config, identities)
    if found:
      log.info('resumed from step %d of %d', step, plan.total_steps)
    clock, code = Clock(meta['wall_seconds']), commits(meta)
    writer = stack.enter_context(Writer(workdir, step=step))
    feed = build.create_feed(config, task, train_set, plan)
    if is_first():
      task.samples(train_set, seed=config.seed).save(workdir / 'samples.png')

    # ---- On the device: what of the training set lies there, the state, the key ----------------
    data = devices.replicate(feed.data)
    state = devices.replicate(state)
    key = devices.replicate(steps.stream(config.seed, steps.TRAIN))

    bar = stack.enter_context(progress_bar(plan, step=step, show=progress and is_first()))
    pending = []  # (call, metrics still on the device)
    batches, call = feed.batches(step), range(step, step)

    def log_line(pending):
      """Stops at a loss that is not finite."""
      line = summarise(pending, schedule, clock, config.batch_size)
      writer.write(pending[-1][0].stop, 'train', **line)
      bar.set_postfix(loss=f'{line["loss"]:.3f}', accuracy=f'{line["accuracy"]:.3f}')
      return []

    while True:
      marked = plan.logs(call) or plan.evaluates(step) or plan.saves(step)
      stopping = agree(stop.requested, ask=marked)

      # What follows waits for the device anyway, and must not come before the log.
      if pending and (plan.evaluates(step) or plan.saves(step) or stopping):
        pending = log_line(pending)

      # ---- Evaluate, as the authors do each epoch ----------------------------------------------
      if plan.evaluates(step) and not writer.evaluated(step) and not stopping:
        try:
          with clock.paused():
            result = evaluation.during(state)
          check_finite(result['loss'], step)
          writer.write(step, 'eval', **result)
          bar.set_postfix(test_accuracy=f'{result["accuracy"]:.3f}')
        except Interrupted:
          stopping = True  # saved at this step, so that going on begins with the evaluation

      # ---- Checkpoint --------------------------------------------------------------------------
      if plan.saves(step) or stopping:
        writer.upload()  # a run that goes on from here has the lines up to here
        checkpoints.save(step, devices.to_host(state),
                         {'wall_seconds': clock.wall_seconds(), 'commit': code})
      if stopping:
        checkpoints.wait()
        raise Interrupted(f'stopped at step {step} of {plan.total_steps}, saved in {workdir}; '
                          'the same command goes on from there', code=stop.code)
      if step >= plan.total_steps:
        break

      # ---- Train: up to `steps_per_call` steps in one dispatch ---------------------------------
      # One call waits while one runs, no more: a stop would wait for all (jax on CPU takes 32).
      jax.block_until_ready([metrics for _, metrics in pending[-2:-1]])
      last, call = call, plan.call(step)
      batch = next(batches)  # (steps, batch, ...)
      state, metrics = train_steps(state, key, data, devices.split(batch, axis=1, local=feed.local),
                                   np.int32(len(call)))

      # ---- Log: brings the last call's metrics home while the device is at work on this one ------
      if pending and plan.logs(last):
        pending = log_line(pending)
      step = call.stop
      pending.append((call, metrics))
      bar.update(len(call) * config.batch_size)

    # ---- Final: every test image at every location; consistency; mIoU --------------------------
    checkpoints.wait()
    final = evaluation.final(state, progress=progress and is_first())
    check_finite(final['loss'], step)
    if is_first():
      stack.enter_context(paths.kept(final))
      for name, picture in evaluation.pictures(state).items():
        picture.save(workdir / name)
    writer.write(step, 'final', **final)
    finished = summary(
      config, evaluation, train_set, final, writer.lines, clock, step=step,
      code=code, device=describe_devices(devices.devices),
      parameters=sum(x.size for x in jax.tree.leaves(state.params)))
    if is_first():
      paths.write_json(workdir / 'summary.json', finished)
    wait_for_all('finished')
    return finished


def commits(meta: dict) -> str | None:
  """The commits that train a run: 'A, B' where B goes on with what A began, so that it is averaged
  with no run of B alone. meta: its checkpoint's, which of old ones does not say."""
  here = commit()
  then = meta.get('commit', here)
  return here if then == here else ', '.join(dict.fromkeys(
    [*(then or 'unknown').split(', '), here or 'unknown']))


def summary(config, evaluation, train_set, final: dict, lines: list[dict], clock: Clock, *,
            step: int, code: str | None, device: str, parameters: int) -> dict:
  """What summary.json says of a finished run: `lines` are those of metrics.jsonl, `final` the last
  evaluation, `code` the commits that trained it."""
  task = evaluation.task
  return {
    'config': configs.as_json(config), 'step': step,
    **evaluation.summary(final, [line for line in lines if line['split'] == 'eval']),
    'wall_seconds': clock.wall_seconds(), 'images_per_second': clock.images_per_second(),
    'device': device, 'versions': versions(), 'commit': code,
    'sizes': {'train_images': len(train_set), 'test_images': len(evaluation.test_set),
              'input_size': task.input_shape(train_set)[1], 'chance': 1 / task.num_classes,
              'parameters': parameters}}


def describe(config, task, plan, devices) -> str:
  """One line on what is about to run."""
  m = config.model
  return (f'{m.name} width {m.width}, padding {m.padding}, {m.dtype}; '
          f'{task.describe(config)} {config.data.name}; {plan.total_steps} steps of batch '
          f'{config.batch_size} on {describe_devices(devices.devices)}')


def check_finite(loss: float, step: int, *,
                 what: str = 'the last good checkpoint is kept; the evaluation after step') -> None:
  """Raises Diverged when a loss is not finite."""
  if not np.isfinite(loss):
    raise Diverged(f'{what} {step} has loss {loss}')


def summarise(pending, schedule, clock, batch_size) -> dict:
  """Fetches the metrics of [(the steps of a call, its metrics)] and averages them over all
  examples, or pixels that are not void: a mean over none is 0.

  Raises Diverged, naming the step, at the first loss or gradient that is not finite.
  """
  totals = {}
  for call, metrics in pending:
    metrics, n = Devices.to_host(metrics), len(call)  # of the rows, those of the call's steps
    batch, norms = metrics['batch'], metrics['grad_norm'][:n]
    losses = (batch['loss'].total / np.maximum(batch['loss'].count, 1))[:n]
    bad = ~(np.isfinite(losses) & np.isfinite(norms))
    if bad.any():
      first = int(bad.argmax())
      raise Diverged(
        f'the loss or its gradient is not finite at step {call[first] + 1} (loss {losses[first]}, '
        f'gradient norm {norms[first]}); the last good checkpoint is kept')
    means = {name: (mean.total[:n], mean.count[:n]) for name, mean in batch.items()}
    for name, sums in {**means, 'grad_norm': (norms, np.ones_like(norms))}.items():
      totals.setdefault(name, []).append(np.array(sums, np.float64))  # (2, steps in the call)
  line = {name: total / max(count, 1)
          for name, (total, count) in ((name, np.concatenate(sums, 1).sum(1).tolist())
                                       for name, sums in totals.items())}
  rate = clock.lap(batch_size * sum(sums.shape[1] for sums in totals['loss']))
  return {**line, 'learning_rate': float(schedule(pending[-1][0][-1])), 'images_per_second': rate}
