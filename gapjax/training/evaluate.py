"""A finished run opened again, and the verb `evaluate`: all metrics of its newest checkpoint."""

import dataclasses
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from gapjax import paths
from gapjax.errors import UsageError
from gapjax.training import build, workdirs
from gapjax.training.checkpoint import newest
from gapjax.training.devices import Devices, keep_programs
from gapjax.training.plan import Plan
from gapjax.training.steps import TrainState


@dataclasses.dataclass(frozen=True)
class FinishedRun:
  """A run on disk: its config, data, task, network and, on the host, its newest state."""
  config: ConfigDict
  train_set: Any
  test_set: Any
  task: Any
  model: Any
  state: TrainState
  step: int


def open_run(workdir, *, data_dir=None) -> FinishedRun:
  """Reads a run's config, data and newest checkpoint. Raises UsageError where there is none, and
  where the data is another than the run's."""
  workdir = paths.of(workdir)
  config = workdirs.read_config(workdir)
  train_set, test_set, task = build.load_data(config, data_dir=data_dir)
  workdirs.check_data(workdir, build.identities(train_set, test_set))
  plan = Plan.of(config, num_images=len(train_set))
  model, state, _, _ = build.create_learner(config, task, train_set, plan,
                                    platform=jax.default_backend())
  step, state = newest(workdir, Devices.to_host(state))
  return FinishedRun(config, train_set, test_set, task, model, state, step)


def evaluate(workdir, *, data_dir=None, devices=None) -> dict:
  """All metrics of the newest checkpoint in workdir; also written to `workdir/evaluation.json`.

  Returns {'step', 'loss', and those of the task}: on a canvas '<target>_accuracy' (every place),
  '<target>_accuracy_random' (the authors' test script) and 'per_location'; in classification
  'image_accuracy', 'consistency' with its 'protocol', 'consistency_crop', 'consistency_circular',
  'feature_distance' and 'shifts'; in
  segmentation 'miou', 'miou_left' and so on, 'pixel_accuracy' and 'per_class'. Accuracies,
  consistencies and mIoU are fractions.

  Raises UsageError as `open_run` does, where workdir cannot be written to, and where the checkpoint
  computes infinities or NaN.
  """
  workdir, devices = paths.of(workdir), Devices(devices)
  keep_programs(devices.platform)
  paths.check_writable(workdir)
  run = open_run(workdir, data_dir=data_dir)
  evaluation = build.create_evaluation(run.config, run.model, run.task, run.test_set, devices)
  result = {'step': run.step, **evaluation.report(devices.replicate(run.state))}
  if not np.isfinite(result['loss']):
    raise UsageError(f'checkpoint {run.step} in {workdir} computes infinities or NaN (loss '
                     f'{result["loss"]}): a weight is not finite, or a running variance is below '
                     '0; train or convert it again')
  with paths.kept(result):
    paths.write_json(workdir / 'evaluation.json', result)
  return result
