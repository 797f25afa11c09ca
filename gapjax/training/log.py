"""Where metrics are written: JSON lines and TensorBoard event files."""

import contextlib
import json
import sys
import time
import warnings

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from gapjax import paths
from gapjax.training.devices import decided, is_first

METRICS = 'metrics.jsonl'


class Writer(contextlib.ExitStack):
  """Appends metrics to `workdir/metrics.jsonl` and to TensorBoard event files.

  Lines of steps beyond `step` are those of a run that was killed after its last checkpoint, and
  final ones those of a run that was killed before its summary: they are dropped, since the run
  repeats them. In all processes `lines` are what the first has read and written since; the others
  write nothing.

  A remote workdir gets both as `paths.Staged` says: now and then, at `upload` and at the end.
  """

  def __init__(self, workdir, *, step: int):
    super().__init__()
    self.lines = decided(lambda: [
      line for line in paths.read_lines(paths.of(workdir) / METRICS)
      if line['step'] <= step and line['split'] != 'final'])
    if not is_first():
      return
    self._staged = self.enter_context(contextlib.closing(paths.Staged(workdir)))
    path = self._staged.folder / METRICS
    paths.write_bytes(path, ''.join(map(self._text, self.lines)).encode())
    self._events = self.enter_context(contextlib.closing(EventFile(self._staged.folder, step=step)))
    self._file = self.enter_context(path.open('a'))

  def write(self, step: int, split: str, **values) -> None:
    """One line; numbers go to the event files too, as `split/name`."""
    line = {'step': step, 'split': split, **values}
    self.lines.append(line)
    if not is_first():
      return
    self._file.write(self._text(line))
    self._file.flush()
    self._events.write(step, {f'{split}/{name}': value for name, value in values.items()
                              if isinstance(value, (int, float))})
    self._staged.upload(due=split == 'train')

  def upload(self) -> None:
    """Brings all lines to a remote workdir now; a local one has them already."""
    if is_first():
      self._staged.upload()

  @staticmethod
  def _text(line):
    return json.dumps(line, allow_nan=False) + '\n'

  def evaluated(self, step: int) -> bool:
    """Whether the evaluation of this step is written already."""
    return any(line['step'] == step and line['split'] == 'eval' for line in self.lines)


@contextlib.contextmanager
def progress_bar(plan, *, step: int = 0, show: bool = True, title: str | None = None):
  """A bar over training images, which log lines do not break; it stands where `step` does."""
  with logging_redirect_tqdm() if show else contextlib.nullcontext(), tqdm(
      total=plan.total_steps * plan.batch_size, initial=step * plan.batch_size, unit='img',
      unit_scale=True, desc=title, disable=not show, file=sys.stderr, dynamic_ncols=True) as bar:
    yield bar


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
