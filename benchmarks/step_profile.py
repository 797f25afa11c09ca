"""What a training step on a CPU is spent on, by kinds of operation: gapjax's and PyTorch's.

    taskset -c 0,1 python benchmarks/step_profile.py --config=configs/digits.py [--config.FIELD=...]

gapjax's milliseconds are of XLA's trace of a few steps, summed over the threads that start an
operation, so that they exceed the step's where two run at the same time; what a convolution gives
to other threads is not in the trace, nor is a thread that waits. `cores` is the processor time
over the wall clock of steps that are not traced. PyTorch's are of its own profiler, on the one
thread that starts every operation. Needs PyTorch, and a machine without other work.
"""

import collections
import gzip
import json
import pathlib
import resource
import sys
import tempfile
import time

import jax

from gapjax import config as configs
from gapjax.report.render import Table, markdown_table
from gapjax.speed import bench
from gapjax.training.devices import Devices
from gapjax.training.system import is_large, keep_freed_memory
from gapjax.training.workdirs import settled

STEPS = 60
KINDS = {'convolutions and products': ('ynn_fusion', 'convolution', 'dot', 'aten::mkldnn_conv',
                                       'aten::convolution_backward', 'aten::addmm', 'aten::mm'),
         'changes of layout': ('transpose', 'copy', 'concatenate', 'aten::copy_', 'aten::clone'),
         'BatchNorm (PyTorch), fused with all else (gapjax)': (
           'aten::native_batch_norm', 'aten::_batch_norm', 'aten::native_batch_norm_backward')}


def kind_of(name):
  return next((kind for kind, starts in KINDS.items() if name.startswith(starts)), 'the rest')


def timed(run):
  """(milliseconds a step, cores) of run(STEPS)."""
  before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
  run(STEPS)
  seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
  busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
  return 1e3 * seconds / STEPS, busy / seconds


def of_gapjax(config):
  trainer = bench.Trainer(config, Devices(jax.local_devices()[:1]), None)
  wall, cores = timed(trainer.run)
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(trainer.profile(folder))
    events = json.loads(gzip.decompress(path.read_bytes()))
  events = events['traceEvents'] if isinstance(events, dict) else events
  threads = {(e['pid'], e['tid']) for e in events if e.get('ph') == 'M'
             and e['name'] == 'thread_name' and 'tf_XLA' in e['args']['name']}
  spent = collections.Counter()
  for e in events:
    if e.get('ph') == 'X' and (e['pid'], e['tid']) in threads and not e['name'].startswith(
        ('ThunkExecutor', 'SlinkyThreadPool', 'while', 'call')):
      spent[kind_of(e['name'])] += e['dur'] / 1e3 / bench.PROFILED_CALLS
  return wall, cores, spent


def of_torch(config):
  import torch

  from gapjax.pytorch.bench import TimedTwin
  twin = TimedTwin(settled(config, platform='cpu'), 'plain', None)
  twin.run(STEPS)
  wall, cores = timed(twin.run)
  with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
    twin.run(STEPS)
  spent = collections.Counter()
  for event in profile.key_averages():
    spent[kind_of(event.key)] += event.self_cpu_time_total / 1e3 / STEPS
  return wall, cores, spent


def main(argv):
  config = configs.from_flags(argv)
  keep_freed_memory(large=is_large(config))
  sides = [of_gapjax(config), of_torch(config)]
  rows = [['step, by the wall clock', *(f'{wall:.1f}' for wall, *_ in sides)],
          ['cores', *(f'{cores:.2f}' for _, cores, _ in sides)],
          *([kind, *(f'{spent[kind]:.1f}' for *_, spent in sides)]
            for kind in [*KINDS, 'the rest'])]
  print(markdown_table(Table(['ms a step', 'gapjax', 'PyTorch'], rows)))


if __name__ == '__main__':
  main(sys.argv[1:])
