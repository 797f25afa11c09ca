"""What an attack's sweep measured: its records and its files.

A record is a metric of an order and N: report/ reads them back.
"""

import csv
import dataclasses
import io
from collections.abc import Iterable, Mapping

import numpy as np

from gapjax import paths
from gapjax.errors import UsageError
from gapjax.records.schema import spread

CLEAN = 'clean'  # the name of N = 0, which all orders share


@dataclasses.dataclass(frozen=True)
class Sweep:
  """What a sweep measured.

  Attributes:
    counts: (0, N_1, ..., N_m), ascending: how many channels were removed.
    metrics: {metric: {order: (repeats, m + 1) fractions in [0, 1]}}, repeats the orders of that
      name. NaN where no pixel counted.
    matrices: {order: (repeats, m + 1, regions, K, K) int64} confusion counts, [true, predicted],
      regions in the order of `metrics`; empty for accuracies.
  """
  counts: tuple[int, ...]
  metrics: dict[str, dict[str, np.ndarray]]
  matrices: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

  def records(self) -> list[dict]:
    """{'order', 'N', 'metric', 'values', 'mean', 'n', 'std'} for every order, N and metric.

    N = 0 is order 'clean'. `values` has one value a repeat, None where nothing counted; `std` is
    the sample's, None of one value.
    """
    return [record for metric, by_order in self.metrics.items() for record in (
      _record(CLEAN, 0, metric, next(iter(by_order.values()))[:1, 0]),
      *(_record(name, count, metric, values[:, i]) for name, values in by_order.items()
        for i, count in enumerate(self.counts) if i))]


def _record(order, count, metric, values):
  values = [float(v) if np.isfinite(v) else None for v in values]
  return {'order': order, 'N': count, 'metric': metric, 'values': values, **spread(values)}


def from_records(records: Iterable[Mapping]) -> Sweep:
  """The Sweep, without matrices, that has these records: `Sweep.records` backwards.

  Raises UsageError unless the records are a whole sweep.
  """
  metrics = {}
  try:
    values = {(r['metric'], r['order'], r['N']): r['values'] for r in records}
    counts = tuple(sorted({key[2] for key in values}))
    for metric, name in dict.fromkeys(key[:2] for key in values if key[1] != CLEAN):
      columns = [values[metric, name, count] for count in counts[1:]]
      clean = values[metric, CLEAN, 0]  # one a seed; the orders of a seed follow each other
      clean = np.repeat(clean, len(columns[0]) // len(clean))
      metrics.setdefault(metric, {})[name] = np.array([clean, *columns], float).T
  except (KeyError, ValueError, IndexError) as error:
    raise UsageError(f'the records of the attack are not a whole sweep ({error!r}); '
                     'run gapjax attack again') from None
  if not metrics:
    raise UsageError('there are no records of an attack; run gapjax attack first')
  return Sweep(counts, metrics)


def write_json(path, sweep: Sweep, **about) -> None:
  """Writes `sweep.records()`, a list of objects, what is said `about` them in each."""
  paths.write_json(path, [{**record, **about} for record in sweep.records()])


def write_csv(path, sweep: Sweep) -> None:
  """Writes one line for every value: order,N,repeat,metric,value; empty where nothing counted."""
  text = io.StringIO()
  lines = csv.writer(text, lineterminator='\n')
  lines.writerow(['order', 'N', 'repeat', 'metric', 'value'])
  for record in sweep.records():
    lines.writerows([record['order'], record['N'], repeat, record['metric'],
                     '' if value is None else value]
                    for repeat, value in enumerate(record['values']))
  paths.write_bytes(path, text.getvalue().encode())
