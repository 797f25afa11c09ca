"""Judges what a disturbed run left: its files against those of the run that nobody disturbed.

Every function returns what is wrong, a list of sentences; [] where nothing is.
"""

import functools
import json
import math
import re

import jax
import numpy as np
import orbax.checkpoint as ocp
from conftest import same

RATE = 'images_per_second'  # the one value of a line that the clock decides


def complete(workdir):
  """The steps of the checkpoints that are in place, as the folder's names say."""
  folder = workdir / 'checkpoints'
  names = [path.name for path in folder.iterdir()] if folder.exists() else []
  return sorted(int(name) for name in names if name.isdigit())


def states(workdir):
  """{step: the state as nested dicts, or None where it cannot be read}, with orbax alone."""
  found = {}
  steps = complete(workdir)
  if not steps:
    return found
  with ocp.CheckpointManager((workdir / 'checkpoints').absolute(),
                             options=ocp.CheckpointManagerOptions(read_only=True)) as manager:
    for step in steps:
      try:
        read = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore()))
        found[step] = jax.tree.map(np.asarray, read.state)
      except Exception:  # a broken file shows as almost any exception
        found[step] = None
  return found


# The undisturbed run's, which stay as they are.
reference_states = functools.cache(states)


def not_ended(workdir, reference, *, stopped=()):
  """What differs from the undisturbed run's end: parameters, log, summary.

  stopped: the steps at which the run was stopped and saved; it logs a line there, too.
  """
  wrong = []
  ours, theirs = states(workdir), reference_states(reference)
  last = max(theirs)
  if max(ours, default=None) != last:
    wrong.append(f'the newest checkpoint is of step {max(ours, default=None)}, not {last}')
  elif ours[last] is None:
    wrong.append('the final checkpoint cannot be read')
  elif not identical(ours[last], theirs[last]):
    wrong.append("the final checkpoint is not the undisturbed run's")
  lines = log_lines(workdir)
  if lines is None:
    wrong.append('metrics.jsonl is not whole lines of JSON objects')
  else:
    wrong += log_differs(lines, log_lines(reference), stopped=stopped)
  return wrong + summary_differs(workdir, reference)


def identical(a, b):
  """Whether two states are equal to the bit, and of the same structure."""
  return jax.tree.structure(a) == jax.tree.structure(b) and same(a, b)


def log_lines(workdir):
  """The objects in metrics.jsonl, or None where it is not whole lines of them."""
  path = workdir / 'metrics.jsonl'
  try:
    text = path.read_text()
    lines = [json.loads(line) for line in text.splitlines()]
  except (OSError, ValueError):
    return None
  whole = text.endswith('\n') and all(isinstance(line, dict) for line in lines)
  return lines if whole else None


def log_differs(ours, theirs, *, stopped=()):
  """Steps logged twice, left out, or too many; values that are not the undisturbed run's.

  A stop cuts the steps that a training line averages in two: those two lines' mean is compared.
  """
  keys, expected = ([(line['split'], line['step']) for line in lines] for lines in (ours, theirs))
  wrong = [f'{split} {step} is logged {keys.count((split, step))} times'
           for split, step in sorted({key for key in keys if keys.count(key) > 1})]
  wrong += [f'{split} {step} is not logged' for split, step in expected
            if (split, step) not in keys]
  wrong += [f'{split} {step} should not be logged' for split, step in keys
            if (split, step) not in expected and (split != 'train' or step not in stopped)]
  if wrong:
    return wrong
  for split in ('eval', 'final'):
    wrong += [f'{split} {a["step"]} has other values' for a, b in zip(
      of(ours, split), of(theirs, split), strict=True) if a != b]
  start = 0
  for line in of(theirs, 'train'):
    parts = [part for part in of(ours, 'train') if start < part['step'] <= line['step']]
    if not (parts == [line] if len(parts) == 1 else averages_to(parts, line, start=start)):
      wrong.append(f'train {line["step"]} has other values')
    start = line['step']
  return wrong


def of(lines, split):
  """One split's lines, without the rate."""
  return [{name: value for name, value in line.items() if name != RATE}
          for line in lines if line['split'] == split]


def averages_to(parts, line, *, start):
  """Whether the mean of these lines over the steps after `start` is `line`."""
  steps = np.diff([start, *(part['step'] for part in parts)])
  return parts[-1]['learning_rate'] == line['learning_rate'] and all(
    math.isclose(np.average([part[name] for part in parts], weights=steps), line[name],
                 rel_tol=1e-5) for name in ('loss', 'accuracy', 'grad_norm'))


def summary_differs(workdir, reference):
  """Whether summary.json is missing, not JSON, or of other final metrics."""
  try:
    ours, theirs = (json.loads((w / 'summary.json').read_text()) for w in (workdir, reference))
  except (OSError, ValueError) as error:
    return [f'summary.json is missing or not JSON ({type(error).__name__})']
  return [f'{name} of summary.json differs' for name in ('step', 'final', 'best')
          if ours.get(name) != theirs.get(name)]


def not_intact(workdir, reference, *, least):
  """Whether no checkpoint of step `least` or later is left that equals the undisturbed run's.

  reference: a run that kept all its checkpoints. least: 0 where there was none to lose.
  """
  kept = reference_states(reference)
  good = [step for step, state in states(workdir).items() if step >= least and state is not None
          and step in kept and identical(state, kept[step])]
  return [] if good or not least else [f'no good checkpoint of step {least} or later is left']


def not_clear(output):
  """Whether a failed command's output is not one `gapjax:` line at its end, or has a traceback."""
  complaints = re.findall(r'(?m)^gapjax: .+$', output)
  lines = output.strip().splitlines()
  wrong = [] if len(complaints) == 1 and lines[-1] == complaints[0] else [
    'the error is not one line at the end']
  return wrong + (['the output holds a traceback'] if 'Traceback' in output else [])
