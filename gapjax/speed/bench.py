"""`gapjax bench`: how fast training goes here, alone or in turns with the PyTorch twin.

Rounds of gapjax and of PyTorch alternate, in an order that changes from round to round, so that
what else the machine does weighs on both. PyTorch runs in a process of its own
(gapjax/pytorch/bench.py), and each of the two sleeps while the other runs.
"""

import contextlib
import importlib.util
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import time

import jax

from gapjax import config as configs
from gapjax.errors import CheckFailed, UsageError, check_choice
from gapjax.report.render import Table, markdown_table
from gapjax.speed import flops, inputs
from gapjax.training.devices import Devices
from gapjax.training.system import describe_devices, versions
from gapjax.weights.files import require_torch

AGAINST = ('torch',)
# How the twin runs (gapjax/pytorch/bench.py).
MODES = {'plain': 'data on the device',
         'compiled': 'data on the device, channels_last, autocast to bfloat16, torch.compile'}
ROUND_SECONDS = 5.0  # what a round takes where the number of its steps is not given
WARM_CALLS = 4
PROFILED_CALLS = 3


def bench(config, *, steps_per_round=None, rounds=5, against=None, mode='plain', profile=None,
          data_dir=None) -> dict:
  """Times training on all devices; or in turns with the PyTorch twin, on one, as that does.

  Args:
    config: see gapjax/config.py.
    steps_per_round: training steps in a round, rounded up to whole calls; None for as many as take
      ROUND_SECONDS.
    rounds: how many rounds, from 1 on.
    against: None or 'torch'.
    mode: how the twin runs, one of MODES.
    profile: a folder for a trace of PROFILED_CALLS calls, or None.
    data_dir: where datasets are; None is TFDS' default. Random images stand in for what is not
      prepared there.

  Returns:
    {'device', 'load' (the machine's average before), 'versions', 'config', 'data', 'rounds',
    'model_flops' (of a step), 'peak', 'profile', 'gapjax', 'torch', 'ratio'}. 'gapjax' and 'torch'
    (None when alone): what `figures` gives, and 'dtype', 'utilisation' (None where the peak is not
    known, or is another dtype's), 'compile_seconds', 'memory_bytes', 'memory'. 'ratio': images per
    second of gapjax over PyTorch's, {'median', 'min', 'max'} over the rounds.

  Raises:
    UsageError: a config or an argument that cannot be; no PyTorch.
    CheckFailed: PyTorch's process failed.
  """
  configs.validate(config)
  check_choice(mode, MODES, what='--torch')
  if against:
    check_choice(against, AGAINST, what='--against')
    # Else jax takes three quarters of a GPU's memory. It reads this when it first sees a device.
    os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
  if profile:
    os.makedirs(profile, exist_ok=True)
  devices, load = Devices(jax.local_devices()[:1] if against else None), os.getloadavg()[0]
  devices.check_batch(config.batch_size)

  with contextlib.ExitStack() as stack:
    theirs = {'torch': stack.enter_context(
      TorchProcess(config, mode, data_dir))} if against else {}
    sides = {'gapjax': Trainer(config, devices, data_dir), **theirs}
    ours = sides['gapjax']
    trace = ours.profile(profile) if profile else None
    counts = {name: ours.whole_calls(steps_per_round or ROUND_SECONDS / side.step_seconds)
              for name, side in sides.items()}
    times = in_turns(sides, counts, rounds=rounds)
    measures = {name: {**figures(times[name], steps_taken=counts[name],
                                 batch_size=config.batch_size), **side.facts()}
                for name, side in sides.items()}

  most, what = flops.peak(devices.devices, config.model.dtype)
  for side in measures.values():
    same = most and side['dtype'] == config.model.dtype
    side['utilisation'] = ours.flops / side['step_seconds']['median'] / most if same else None
  return {
    'device': describe_devices(devices.devices), 'load': load, 'versions': versions(),
    'config': configs.as_json(ours.config), 'data': ours.images, 'rounds': rounds,
    'model_flops': ours.flops, 'peak': {'flops_per_second': most, 'what': what}, 'profile': trace,
    'torch': None, **measures, 'ratio': against and median_and_range([
      a / b for a, b in zip(*(side['by_round'] for side in measures.values()), strict=True)])}


def in_turns(sides, counts: dict[str, int], *, rounds: int) -> dict[str, list]:
  """What each side's rounds of so many steps took; every other round begins with the last side."""
  times = {name: [] for name in sides}
  for number in range(rounds):
    for name in list(sides)[::-1 if number % 2 else 1]:
      times[name].append(sides[name].run(counts[name]))
  return times


def figures(times, *, steps_taken: int, batch_size: int) -> dict:
  """The rounds of a side, [{'seconds', 'input_seconds'}], as figures.

  'images_per_second' and 'step_seconds', {'median', 'min', 'max'} over the rounds; 'by_round', the
  former in order; 'input_share', the part of the time in which the host made or awaited batches
  (while an accelerator computes: it waits for at most that), None where that was not timed.
  """
  rates = [steps_taken * batch_size / x['seconds'] for x in times]
  waits = [x['input_seconds'] for x in times]
  return {
    'steps_per_round': steps_taken, 'images_per_second': median_and_range(rates),
    'step_seconds': median_and_range([x['seconds'] / steps_taken for x in times]),
    'by_round': rates,
    'input_share': None if None in waits else sum(waits) / sum(x['seconds'] for x in times)}


def median_and_range(values) -> dict:
  return {'median': statistics.median(values), 'min': min(values), 'max': max(values)}


def peak_rss() -> int:
  """The most memory that this process has had, in bytes."""
  unit = 1 if sys.platform == 'darwin' else 1024
  return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# ---- gapjax --------------------------------------------------------------------------------------


class Trainer(inputs.Program):
  """The inner loop of train.train: the same program, feed and placement, compiled and warm.

  `step_seconds`: of a first guess.
  """

  def __init__(self, config, devices, data_dir):
    super().__init__(config, devices, data_dir)
    self.batches = self.feed.batches(0)
    self.state, self.key, self.data = devices.replicate((self.state, self.key, self.feed.data))
    batch = self.next_batch()
    start = time.perf_counter()
    self.train_steps = self.train_steps.lower(self.state, self.key, self.data, batch,
                                              self.count).compile()
    self.compile_seconds = time.perf_counter() - start
    # The first call is slow, and on CPU memory still grows in the next few.
    self.run(WARM_CALLS * self.config.steps_per_call)
    self.step_seconds = self.run(1)['seconds'] / self.config.steps_per_call

  def next_batch(self):
    return self.devices.split(next(self.batches), axis=1)

  def whole_calls(self, steps_wanted: float) -> int:
    """The least number of steps, at least that and 1, that is whole calls."""
    per_call = self.config.steps_per_call
    return per_call * max(1, -(-round(steps_wanted) // per_call))

  def run(self, steps_wanted: int) -> dict:
    """Takes so many steps, in whole calls, and waits for them; see `figures`."""
    start, waited = time.perf_counter(), 0.0
    for call in range(self.whole_calls(steps_wanted) // self.config.steps_per_call):
      with jax.profiler.StepTraceAnnotation('train', step_num=call):
        before = time.perf_counter()
        batch = self.next_batch()
        waited += time.perf_counter() - before
        self.state, _ = self.train_steps(self.state, self.key, self.data, batch, self.count)
    jax.block_until_ready(self.state)
    return {'seconds': time.perf_counter() - start, 'input_seconds': waited}

  def profile(self, folder) -> str:
    """Writes a trace of PROFILED_CALLS calls; returns the path of the part that Perfetto reads."""
    with jax.profiler.trace(folder, create_perfetto_trace=True):
      self.run(PROFILED_CALLS * self.config.steps_per_call)
    return str(max(pathlib.Path(folder).rglob('perfetto_trace.json.gz'),
                   key=lambda path: path.stat().st_mtime))

  def facts(self) -> dict:
    peaks = [(device.memory_stats() or {}).get('peak_bytes_in_use')
             for device in self.devices.devices]
    memory, where = (peak_rss(), 'of the process') if None in peaks else (max(peaks), 'on a device')
    analysis = self.train_steps.memory_analysis()
    return {'dtype': self.config.model.dtype, 'compile_seconds': self.compile_seconds,
            'memory_bytes': memory, 'memory': where,
            'temporary_bytes': analysis and analysis.temp_size_in_bytes}


# ---- PyTorch -------------------------------------------------------------------------------------


class TorchProcess:
  """The twin in its own process, warm and asleep until `run`; ended on leaving.

  `step_seconds`: of a first guess.
  """

  def __init__(self, config, mode, data_dir):
    if importlib.util.find_spec('torch') is None:  # importing it here would count as our memory
      require_torch('--against=torch', 'leave it out')
    # jax, imported there, shall leave the GPU alone, and Ctrl-C reach this process only.
    self.process = subprocess.Popen(
      [sys.executable, '-m', 'gapjax.pytorch.bench'], text=True, start_new_session=True,
      stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, 'JAX_PLATFORMS': 'cpu'})
    try:
      self.ready = self.ask({'config': configs.as_json(config), 'mode': mode,
                             'data_dir': data_dir and str(data_dir)})
    except BaseException:
      self.__exit__()
      raise
    self.step_seconds = self.ready.pop('step_seconds')

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.process.kill()
    self.process.communicate()

  def ask(self, question) -> dict:
    """Its answer to a line of JSON."""
    with contextlib.suppress(BrokenPipeError):  # then there is no answer either
      print(json.dumps(question), file=self.process.stdin, flush=True)
    line = self.process.stdout.readline()
    if not line:
      raise CheckFailed(f'the process of PyTorch ended (exit code {self.process.wait()}); what it '
                        'said stands above')
    answer = json.loads(line)
    if 'error' in answer:
      raise UsageError(answer['error'])
    return answer

  def run(self, steps_wanted: int) -> dict:
    return self.ask(steps_wanted)

  def facts(self) -> dict:
    return {**self.ready, **self.ask('memory')}


# ---- What is printed -----------------------------------------------------------------------------


def lines(result: dict) -> list[str]:
  """What bench found, as it is printed; against PyTorch the last line is `ratio X.XX`."""
  c, torch, most = result['config'], result['torch'], result['peak']['flops_per_second']
  sides = [side for side in (result['gapjax'], torch) if side]
  shown = {
    'images per second': lambda x: range_of(x['images_per_second'], '{:,.1f}'),
    'step, ms': lambda x: range_of(x['step_seconds'], '{:,.1f}', 1e3),
    'utilisation': lambda x: _known(x['utilisation'], '{:.1%}'),
    'waiting for input': lambda x: _known(x['input_share'], '{:.2%}'),
    'compile time, s': lambda x: _known(x['compile_seconds'], '{:.1f}'),
    'peak memory, GB': lambda x: f'{x["memory_bytes"] / 1e9:.2f} {x["memory"]}'}
  text = [
    f'{c["model"]["name"]} width {c["model"]["width"]}, {c["model"]["dtype"]}, task {c["task"]}, '
    f'batch {c["batch_size"]}, {c["steps_per_call"]} steps a call, on {result["data"]}',
    f'gapjax: jax {result["versions"]["jax"]}, {result["device"]}']
  if torch:
    text.append(f'PyTorch: torch {torch["version"]}, {torch["device"]}, {torch["dtype"]}; '
                f'{torch["mode"]}: {MODES[torch["mode"]]}')
  text += ['', markdown_table(Table(
    head=['', 'gapjax', *(['PyTorch'] if torch else [])],
    rows=[[what, *map(show, sides)] for what, show in shown.items()])), '',
    f'Medians of {result["rounds"]} rounds of '
    f'{" and ".join(str(x["steps_per_round"]) for x in sides)} steps, the least and the most in '
    f'brackets; load average before: {result["load"]:.1f} (on CPU other work slows both, and '
    'PyTorch, whose threads spin, most).',
    f'Utilisation: {result["model_flops"] / 1e9:,.1f} GFLOP of the model a step, over '
    + (f'{most / 1e12:,.3g} TFLOP/s, {result["peak"]["what"]}.' if most
       else f'what is not known: {result["peak"]["what"]}.')]
  if result['profile']:
    text.append(f'Trace: {result["profile"]}, for https://ui.perfetto.dev; its folder is for '
                'TensorBoard with the plugin xprof.')
  if result['ratio']:
    text += ['Images per second of gapjax over PyTorch\'s, by round: '
             f'{range_of(result["ratio"], "{:.2f}")}', f'ratio {result["ratio"]["median"]:.2f}']
  return text


def range_of(found: dict, form: str, factor: float = 1.0) -> str:
  """'2.0 (1.9 to 2.2)' of a `median_and_range`: the median, the least and the most."""
  median, least, most = (form.format(factor * found[name]) for name in ('median', 'min', 'max'))
  return f'{median} ({least} to {most})'


def _known(value, form):
  return '\N{EN DASH}' if value is None else form.format(value)
