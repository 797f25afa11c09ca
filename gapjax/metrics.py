"""Metrics as (sum, count), reduced on the device, and where they are written."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
from clu import metrics as clu_metrics
from etils import epath
from flax import struct


@struct.dataclass
class TrainMetrics(clu_metrics.Collection):
  """Mean loss and top-1 accuracy of training batches; sums and counts add over devices."""
  loss: clu_metrics.Average.from_output('loss')
  accuracy: clu_metrics.Average.from_output('correct')


@struct.dataclass
class EvalMetrics(clu_metrics.Metric):
  """Exact integer counts by location, (k * k,) each, and the summed loss."""
  correct: jax.Array
  count: jax.Array
  loss: jax.Array

  @classmethod
  def zeros(cls, num_locations, dtype=jnp.float32):
    counts = np.zeros(num_locations, np.int32)
    return cls(correct=counts, count=counts.copy(), loss=np.zeros((), dtype))

  def merge(self, other):
    return jax.tree.map(jnp.add, self, other)

  def compute(self):
    """{'accuracy', 'loss', 'per_location' (k, k) lists}; the counts are of the whole test set."""
    correct, count = (np.asarray(x, np.int64) for x in (self.correct, self.count))
    grid = int(round(len(count) ** 0.5))
    per_location = [[c / n if n else None for c, n in zip(row, counts, strict=True)]
                    for row, counts in zip(correct.reshape(grid, grid).tolist(),
                                           count.reshape(grid, grid).tolist(), strict=True)]
    return {'accuracy': float(correct.sum() / count.sum()),
            'loss': float(self.loss / count.sum()), 'per_location': per_location}
