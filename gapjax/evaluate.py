"""The verb `evaluate`: all metrics of a run's newest checkpoint."""

import pathlib

from gapjax import build, workdirs
from gapjax.checkpoint import Checkpoints
from gapjax.errors import UsageError
from gapjax.parallel import Devices
from gapjax.plan import Plan


def evaluate(workdir, *, data_dir=None, devices=None) -> dict:
  """All metrics of the newest checkpoint in workdir; also written to `workdir/evaluation.json`.

  Returns {'step', 'loss', and those of the task}: on a canvas '<target>_accuracy' (every place),
  '<target>_accuracy_random' (the authors' test script) and 'per_location'; in classification
  'image_accuracy', 'consistency' with its 'protocol', 'feature_distance' and 'shifts'; in
  segmentation 'miou', 'miou_left' and so on, 'pixel_accuracy' and 'per_class'.
  """
  workdir = pathlib.Path(workdir)
  config = workdirs.read_config(workdir)
  devices = Devices(devices)
  train_set, test_set, task = build.load(config, data_dir=data_dir)
  plan = Plan.of(config, num_images=len(train_set))
  model, state, _, _ = build.create(config, task, train_set, plan)
  found = None
  if (workdir / 'checkpoints').exists():
    with Checkpoints(workdir, read_only=True) as checkpoints:
      found = checkpoints.restore(devices.to_host(state))
  if not found:
    raise UsageError(f'{workdir} holds no checkpoint; train first: gapjax train --config=FILE '
                     f'--workdir={workdir}')
  step, state, _ = found
  evaluator = build.create_evaluator(config, model, task, test_set, devices)
  result = {'step': step, **evaluator.report(devices.replicate(state))}
  workdirs.write_json(workdir / 'evaluation.json', result)
  return result
