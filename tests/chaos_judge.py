"""Judges what a disturbed run left: its files against those of the run that nobody disturbed.

Every function returns what is wrong, a list of sentences; [] where nothing is.
"""

import json
import re

import jax
import numpy as np
import orbax.checkpoint as ocp
from conftest import same

RATE = 'images_per_second'  # the one value of a line that the clock decides


def complete(workdir):
  """The steps of the checkpoints that are in place, as the folder's names say."""
  return sorted(int(path.name) for path in (workdir / 'checkpoints').glob('*')
                if path.name.isdigit())


def state(workdir, step):
  """A checkpoint's state as nested dicts, read with orbax alone; None where it cannot be read."""
  with ocp.CheckpointManager((workdir / 'checkpoints').absolute(),
                             options=ocp.CheckpointManagerOptions(read_only=True)) as manager:
    try:
      read = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore()))
    except Exception:  # a broken file shows as almost any exception
      return None
  return jax.tree.map(np.asarray, read.state)


def identical(workdir, reference, step):
  """Whether a step's checkpoint can be read and is the undisturbed run's, to the bit."""
  ours = state(workdir, step)
  return ours is not None and same(ours, state(reference, step))


def differs(workdir, reference):
  """What is not the undisturbed run's: its last checkpoint, log, step and metrics."""
  last = max(complete(reference))
  wrong = []
  if max(complete(workdir), default=None) != last or not identical(workdir, reference, last):
    wrong.append("the final checkpoint is not the undisturbed run's")
  for name, read in (('metrics.jsonl', log_lines), ('summary.json', results)):
    try:
      if read(workdir / name) != read(reference / name):
        wrong.append(f"{name} is not the undisturbed run's")
    except (OSError, ValueError) as error:
      wrong.append(f'{name} is missing or not JSON ({type(error).__name__})')
  return wrong


def log_lines(path):
  """A log's lines, without the rate."""
  lines = map(json.loads, path.read_text().splitlines())
  return [{name: value for name, value in line.items() if name != RATE} for line in lines]


def results(path):
  """What a summary says of the run and not of the machine."""
  summary = json.loads(path.read_text())
  return {name: summary[name] for name in ('step', 'final', 'best')}


def not_intact(workdir, reference, *, least):
  """Whether no checkpoint of step `least` or later is left that equals the undisturbed run's.

  reference: a run that kept all its checkpoints. least: 0 where there was none to lose.
  """
  good = not least or any(identical(workdir, reference, step) for step in complete(workdir)
                          if step >= least)
  return [] if good else [f'no good checkpoint of step {least} or later is left']


def not_clear(output):
  """Whether a failed command's output does not end in its one `gapjax:` line."""
  complaints = re.findall(r'(?m)^gapjax: .+$', output)
  clear = len(complaints) == 1 and output.strip().endswith(complaints[0])
  return [] if clear else ['the error is not one line at the end']
