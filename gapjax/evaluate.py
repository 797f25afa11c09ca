"""Evaluation: exactly (every test image at every location), or with random placement."""

import pathlib

import numpy as np
from tqdm import tqdm

from gapjax import build, steps, workdirs
from gapjax.checkpoint import Checkpoints
from gapjax.errors import UsageError
from gapjax.metrics import EvalMetrics
from gapjax.parallel import AXIS, Devices
from gapjax.plan import Plan


class Evaluator:
  """One compiled evaluation step for both protocols. No image is dropped or counted twice: the
  last batch is filled up and the filling masked.

  PermuteNet draws one permutation a batch here, as the authors' test loop does: its accuracy
  depends, within that noise, on eval.batch_size (rounded up to a multiple of the devices).
  """

  def __init__(self, config, model, task, test_set, devices):
    self.seed, self.task, self.devices = config.seed, task, devices
    self.num_images = len(test_set.images)
    n = len(devices)
    self.batch_size = -(-min(config.eval.batch_size, self.num_images) // n) * n
    self.data = devices.replicate({'images': test_set.images, 'labels': test_set.labels})
    self.key = devices.replicate(steps.stream(config.seed, steps.EVAL))
    self.step = devices.pmap(
      steps.make_eval_step(model, task, axis_name=AXIS),
      split=(False, False, False, False, False, True), donate=0)

  def exact(self, state, *, stop=None, progress=False) -> dict | None:
    """Every test image at every location: {'accuracy', 'loss', 'per_location'}.

    None when `stop` was requested on the way.
    """
    index, location = every_location(self.num_images, self.task.num_locations)
    return self._run(state, index, location, stop=stop, progress=progress)

  def random(self, state, *, passes: int, stop=None, progress=False) -> dict | None:
    """The authors' protocol: every test image once a pass, each time at a random location."""
    index, location = random_locations(self.num_images, self.task.num_locations, passes=passes,
                                       seed=(self.seed, int(state.step)))
    return self._run(state, index, location, stop=stop, progress=progress)

  def _run(self, state, index, location, *, stop, progress):
    zeros = EvalMetrics.zeros(self.task.num_locations, self.task.dtype)
    totals = self.devices.replicate(zeros)
    for number, start in enumerate(tqdm(range(0, len(index), self.batch_size), unit='batch',
                                        desc='evaluate', leave=False, disable=not progress)):
      if stop is not None and stop.requested:
        return None
      here = np.arange(start, start + self.batch_size)
      inside = np.minimum(here, len(index) - 1)
      batch = {'index': index[inside].astype(np.int32),
               'location': location[inside].astype(np.int32), 'mask': here < len(index)}
      totals = self.step(totals, state, self.key, self.data, np.int32(number),
                         self.devices.split(batch))
    return self.devices.to_host(totals).compute()


def every_location(num_images: int, num_locations: int) -> tuple[np.ndarray, np.ndarray]:
  """Every (image, location) once: two arrays (num_images * num_locations,)."""
  return np.divmod(np.arange(num_images * num_locations), num_locations)


def random_locations(num_images: int, num_locations: int, *, passes: int,
                     seed) -> tuple[np.ndarray, np.ndarray]:
  """Every image `passes` times, each at a uniform location: two arrays (passes * num_images,)."""
  index = np.tile(np.arange(num_images), passes)
  return index, np.random.default_rng(seed).integers(num_locations, size=len(index))


def evaluate(workdir, *, data_dir=None, devices=None) -> dict:
  """All metrics of the newest checkpoint in workdir; also written to `workdir/evaluation.json`.

  Returns {'step', '<target>_accuracy' (exact), '<target>_accuracy_random' (the authors' test
  script: k * k passes with random placement), 'loss', 'per_location'}.
  """
  workdir = pathlib.Path(workdir)
  config = workdirs.read_config(workdir)
  devices = Devices(devices)
  train_set, test_set, task = build.load(config, data_dir=data_dir)
  plan = Plan.of(config, num_images=len(train_set.images))
  model, state, _, _ = build.create(config, task, train_set, plan)
  found = None
  if (workdir / 'checkpoints').exists():
    with Checkpoints(workdir, read_only=True) as checkpoints:
      found = checkpoints.restore(devices.to_host(state))
  if not found:
    raise UsageError(f'{workdir} holds no checkpoint; train first: gapjax train --config=FILE '
                     f'--workdir={workdir}')
  step, state, _ = found
  state = devices.replicate(state)
  evaluator = Evaluator(config, model, task, test_set, devices)
  exact = evaluator.exact(state, progress=True)
  random = evaluator.random(state, passes=task.num_locations, progress=True)
  name = f'{config.canvas.target}_accuracy'
  result = {'step': step, name: exact['accuracy'], f'{name}_random': random['accuracy'],
            'loss': exact['loss'], 'per_location': exact['per_location']}
  workdirs.write_json(workdir / 'evaluation.json', result)
  return result
