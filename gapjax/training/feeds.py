"""What a training step gets from the host: indices of images that lie on the device, or scenes.

A feed has `data`, placed on every device once; `batches(step)`, an endless iterator over the calls
from `step` on, each a tree of arrays (steps_per_call, batch_size, ...), of which a call that ends
early takes the first; and `local`, whether these are the process' share of the batch alone.
"""

import itertools

import jax
import numpy as np


class IndexFeed:
  """Indices of images that lie on every device."""
  local = False

  def __init__(self, plan, data):
    self.plan, self.data = plan, data

  def batches(self, step: int):
    k = self.plan.steps_per_call
    return (self.plan.batch_indices(call.start, k) for call in self.plan.calls(step))


class HostFeed:
  """Examples that Grain augments on the host; a batch is a function of (seed, step).

  Every process reads and augments its own share of it.
  """
  local = True

  def __init__(self, plan, data, source):
    self.plan, self.data, self.source = plan, data, source

  def batches(self, step: int):
    batches = iter(self.source.iterate(step))
    for call in self.plan.calls(step):
      taken = list(itertools.islice(batches, len(call)))
      filling = taken[-1:] * (self.plan.steps_per_call - len(call))
      yield jax.tree.map(lambda *x: np.stack(x), *taken, *filling)
