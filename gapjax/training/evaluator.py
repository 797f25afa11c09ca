"""Counting over evaluated examples on the devices, with one compiled step.

Which examples, and what is made of the counts, is the task's: see tasks/protocol.py.
"""

import functools

import jax
import numpy as np

from gapjax.tasks.protocol import Counter
from gapjax.training import steps
from gapjax.training.devices import AXIS


class DeviceCounter(Counter):
  """A protocol.Counter; its batches are eval.batch_size, rounded up to a multiple of the devices.

  Each batch has one permutation of PermuteNet, which depends on the seed, the training step and the
  batch's number. check_stop() raises Interrupted where the process was told to stop.
  """

  def __init__(self, config, model, task, test_set, devices, *, check_stop):
    self.check_stop = check_stop
    self.model, self.task, self.devices = model, task, devices
    n = len(devices)
    self.batch_size = -(-min(config.eval.batch_size, len(test_set)) // n) * n
    self.rows = devices.own_rows(self.batch_size)
    self.image_shape = (1, *task.input_shape(test_set), 3)
    self.data = devices.replicate(task.resident(test_set))
    self._classes = jax.jit(lambda variables, image: model.apply(
      variables, task.normalised(image[None]), train=False)[0][0].argmax(-1))
    self.key = devices.replicate(steps.stream(config.seed, steps.EVAL))
    self.step = devices.pmap(
      steps.make_eval_step(model, task, axis_name=AXIS),
      split=(False, False, False, False, False, True), donate=0)

  @functools.cached_property
  def num_channels(self) -> int:
    image = jax.ShapeDtypeStruct(self.image_shape, self.task.dtype)
    (_, features), _ = jax.eval_shape(
      lambda image: self.model.init_with_output(jax.random.key(0), image, train=False), image)
    return features['pooled'].shape[-1]

  def count(self, state, zeros, batches, *, bar, common=(), local=False):
    """See protocol.Counter; `state` lies on the devices."""
    totals = self.devices.replicate(zeros)
    for number, (batch, examples) in enumerate(batches):
      self.check_stop()
      totals = self.step(totals, state, self.key, self.data,
                         {**dict(common), 'number': np.int32(number)},
                         self.devices.split(batch, local=local))
      bar.update(examples)
    return self.devices.to_host(totals)

  def predict(self, state, image) -> np.ndarray:
    """See protocol.Counter."""
    variables = self.devices.to_host({'params': state.params, 'batch_stats': state.batch_stats})
    return np.asarray(self._classes(variables, image))
