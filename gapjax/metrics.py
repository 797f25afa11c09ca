"""Metrics as (sum, count), reduced on the device, and where they are written."""

import json
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from clu import metrics as clu_metrics
from flax import struct

from gapjax import paths, workdirs


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


class Writer:
  """Appends metrics to `workdir/metrics.jsonl` and to TensorBoard event files.

  Lines of steps beyond `step` are those of a run that was killed after its last checkpoint, and
  final ones those of a run that was killed before its summary: they are dropped, since the run
  repeats them. Read only, it keeps `lines` and writes nothing.

  A remote workdir gets both as `paths.Staged` says: now and then, at `upload` and at the end.
  """

  def __init__(self, workdir, *, step: int, read_only: bool = False):
    name = 'metrics.jsonl'
    self.lines = [line for line in workdirs.read_lines(paths.of(workdir) / name)
                  if line['step'] <= step and line['split'] != 'final']
    self._read_only = read_only
    if read_only:
      return
    self._staged = paths.Staged(workdir)
    path = self._staged.folder / name
    workdirs.write_bytes(path, ''.join(map(self._text, self.lines)).encode())
    self._file = path.open('a')
    self._events = EventFile(self._staged.folder, step=step)

  def __enter__(self):
    return self

  def __exit__(self, *_):
    if self._read_only:
      return
    try:
      self._file.close()
    finally:
      self._events.close()
      self._staged.close()

  def write(self, step: int, split: str, **values) -> None:
    """One line; numbers go to the event files too, as `split/name`."""
    line = {'step': step, 'split': split, **values}
    self.lines.append(line)
    if self._read_only:
      return
    self._file.write(self._text(line))
    self._file.flush()
    self._events.write(step, {f'{split}/{name}': value for name, value in values.items()
                              if isinstance(value, (int, float))})
    self._staged.upload(due=split == 'train')

  def upload(self) -> None:
    """Brings all lines to a remote workdir now; a local one has them already."""
    if not self._read_only:
      self._staged.upload()

  @staticmethod
  def _text(line):
    return json.dumps(line, allow_nan=False) + '\n'

  def evaluated(self, step: int) -> bool:
    """Whether the evaluation of this step is written already."""
    return any(line['step'] == step and line['split'] == 'eval' for line in self.lines)


class EventFile:
  """A TensorBoard event file, by tensorboardX's own writer of events.

  Its SummaryWriter would do the same from a thread, which cannot be told of a full disk.
  """

  def __init__(self, folder, *, step: int):
    with warnings.catch_warnings():  # its protobuf stubs warn, depending on protobuf's version
      warnings.simplefilter('ignore')
      from tensorboardX import event_file_writer, summary
      from tensorboardX.proto import event_pb2
    self._scalar, self._event = summary.scalar, event_pb2.Event
    self._file = event_file_writer.EventsWriter(str(folder / 'events'), f'.{step}')
    # TensorBoard forgets what an earlier, killed process wrote of these steps.
    self._file.write_event(self._event(
      step=step + 1, wall_time=time.time(),
      session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START)))

  def write(self, step: int, scalars: dict[str, float]) -> None:
    for tag, value in scalars.items():
      self._file.write_event(self._event(step=step, wall_time=time.time(),
                                         summary=self._scalar(tag, value)))
    self._file.flush()

  def close(self) -> None:
    self._file.close()
