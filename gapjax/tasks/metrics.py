"""Metrics as (sum, count), which add over devices and batches."""

import jax
import jax.numpy as jnp
import numpy as np
from clu import metrics as clu_metrics
from flax import struct


@struct.dataclass
class TrainMetrics(clu_metrics.Collection):
  """Mean loss and top-1 accuracy of training batches; sums and counts add over devices."""
  loss: clu_metrics.Average.from_output('loss')
  accuracy: clu_metrics.Average.from_output('correct')


@struct.dataclass
class PairMetrics(clu_metrics.Collection):
  """The same over both shifts of a pair, and the distance of their pooled features over the
  features' variance on each device."""
  # clu looks at a class's own annotations alone, so these two cannot be inherited.
  loss: clu_metrics.Average.from_output('loss')
  accuracy: clu_metrics.Average.from_output('correct')
  relative_distance: clu_metrics.Average.from_output('relative_distance')


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

  def compute(self):
    """{'accuracy', 'loss', 'canvases' (how many were counted), 'per_location' (k, k) lists}.

    A location at which nothing was counted is None.
    """
    correct, count = (np.asarray(x, np.int64) for x in (self.correct, self.count))
    grid = round(len(count) ** 0.5)
    per_location = [[c / n if n else None for c, n in zip(row, counts, strict=True)]
                    for row, counts in zip(correct.reshape(grid, grid).tolist(),
                                           count.reshape(grid, grid).tolist(), strict=True)]
    return {'accuracy': float(correct.sum() / count.sum()),
            'loss': float(self.loss / count.sum()), 'canvases': int(count.sum()),
            'per_location': per_location}
