"""Metrics of training as (sum, count), which add over devices and batches."""

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
