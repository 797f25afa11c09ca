"""Which images a step takes, and at which steps something else happens."""

import dataclasses
import functools
import math

import jax
import numpy as np

from gapjax.training import steps


@dataclasses.dataclass(frozen=True)
class Plan:
  """A run's timetable, in steps: the same whatever `steps_per_call` is, but for lines of metrics.

  The training images form one endless sequence of shuffled passes, cut into batches across the
  borders of passes: no image is dropped, and every batch has the same size. A call takes as many
  steps as there are to the next evaluation or checkpoint, at most `steps_per_call`.
  """
  seed: int
  num_images: int
  batch_size: int
  steps_per_call: int
  total_steps: int
  log_every: int
  eval_steps: frozenset[int]
  save_steps: frozenset[int]

  @classmethod
  def of(cls, config, *, num_images: int) -> 'Plan':
    """The plan of a settled config (workdirs.settled) on a training set of num_images."""

    def step_of(epoch):  # the first at or after the end of an epoch
      return max(math.ceil(epoch * num_images / config.batch_size - 1e-9), 1)

    def every(epochs):
      marks = np.arange(1, math.floor(config.num_epochs / epochs + 1e-9) + 1) * epochs
      return frozenset({*map(step_of, marks), step_of(config.num_epochs)})

    return cls(
      seed=config.seed, num_images=num_images, batch_size=config.batch_size,
      steps_per_call=config.steps_per_call, total_steps=step_of(config.num_epochs),
      log_every=config.log_every, eval_steps=every(config.eval.every_epochs),
      save_steps=every(config.checkpoint.every_epochs))

  @property
  def steps_per_epoch(self) -> float:
    return self.num_images / self.batch_size

  def call(self, step: int) -> range:
    """The steps, counted from 0, that the call after `step` steps takes."""
    end = step + 1
    while end < step + self.steps_per_call and not (self.evaluates(end) or self.saves(end)):
      end += 1
    return range(step, end)

  def calls(self, step: int):
    """Yields the calls after `step` steps, without an end."""
    while True:
      yield (call := self.call(step))
      step = call.stop

  def logs(self, call: range) -> bool:
    """Whether a line of metrics is due after a call: after the first too, to show early that the
    loss is finite."""
    return call.start == 0 or call.stop // self.log_every > call.start // self.log_every

  def evaluates(self, step: int) -> bool:
    return step in self.eval_steps

  def saves(self, step: int) -> bool:
    return step in self.save_steps

  def batch_indices(self, step: int, count: int = 1) -> np.ndarray:
    """Training images of the `count` steps that follow `step` steps: (count, batch_size) int32."""
    positions = step * self.batch_size + np.arange(count * self.batch_size)
    epochs, offsets = np.divmod(positions, self.num_images)
    indices = np.empty(len(positions), np.int32)
    for epoch in np.unique(epochs):
      order = shuffled(self.seed, int(epoch), self.num_images)
      indices[epochs == epoch] = order[offsets[epochs == epoch]]
    return indices.reshape(count, self.batch_size)


def shuffled(seed: int, epoch: int, num_images: int) -> np.ndarray:
  """The order of the images in one pass: a permutation of range(num_images)."""
  order = np.asarray(_order(seed, epoch, num_images))
  # The next pass' is computed behind the training steps that are under way, and is on the host when
  # its turn comes: asked for then only, the host would wait for all of them.
  _order(seed, epoch + 1, num_images)
  return order


@functools.lru_cache(maxsize=4)
def _order(seed, epoch, num_images):
  order = _permutation(steps.stream(seed, steps.ORDER), epoch, num_images)
  order.copy_to_host_async()
  return order


@functools.partial(jax.jit, static_argnums=2)
def _permutation(key, epoch, n):
  return jax.random.permutation(jax.random.fold_in(key, epoch), n)
