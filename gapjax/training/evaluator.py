"""Counting over evaluated examples on the devices, with one compiled step.

Which examples, and what is made of the counts, is the task's: see tasks/protocol.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from gapjax.training import steps
from gapjax.training.devices import AXIS


class DeviceCounter:
  """A protocol.Counter; its batches are eval.batch_size, rounded up to a multiple of the devices.

  Each batch has one permutation of PermuteNet, which depends on the seed, the training step and the
  batch's number.
  """

  def __init__(self, config, model, task, test_set, devices):
    self.model, self.task, self.devices = model, task, devices
    n = len(devices)
    self.batch_size = -(-min(config.eval.batch_size, len(test_set)) // n) * n
    self.rows = devices.own_rows(self.batch_size)
    self.image_shape = (1, *task.input_shape(test_set), 3)
    self.data = devices.replicate(task.resident(test_set))
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

  def count(self, state, zeros, batches, *, common=(), local=False, stop=None, bar=None):
    """See protocol.Counter; `state` lies on the devices."""
    totals = self.devices.replicate(zeros)
    for number, (batch, examples) in enumerate(batches):
      if stop is not None and stop.requested:
        return None
      totals = self.step(totals, state, self.key, self.data,
                         {**dict(common), 'number': np.int32(number)},
                         self.devices.split(batch, local=local))
      if bar is not None:
        bar.update(examples)
    return self.devices.to_host(totals)

  def predict(self, state, image) -> np.ndarray:
    """See protocol.Counter."""
    variables = self.devices.to_host({'params': state.params, 'batch_stats': state.batch_stats})
    return np.asarray(self._predict(variables, image))

  @functools.cached_property
  def _predict(self):
    def predict(variables, image):
      images = self.task.eval_inputs({}, {}, {'images': jnp.asarray(image)[None]})
      logits, _ = self.model.apply(variables, images, train=False)
      return logits[0].argmax(-1)
    return jax.jit(predict)
