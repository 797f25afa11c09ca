"""`gapjax compile`: does the training step fit a TPU that is not here, and how fast could it be.

The program is train.train's own, compiled ahead of time by libtpu, which needs no TPU for that. It
and jax read the environment as they load: gapjax/cli sets it first.
"""

import dataclasses
import importlib.metadata
import importlib.util
import logging
import math
import re
import time

import jax
from jax.experimental import topologies

from gapjax import config as configs
from gapjax.errors import UsageError
from gapjax.report.render import Table, markdown_table
from gapjax.speed import flops, inputs
from gapjax.training import build
from gapjax.training.devices import Devices
from gapjax.training.plan import Plan
from gapjax.training.system import versions

log = logging.getLogger(__name__)

GIB = 2 ** 30
# The slices of up to 256 chips that there are, by the dimensions of the chips' network.
FLAT = ('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')
SOLID = ('1x1x1', '2x2x1', '2x2x2', '2x2x4', '2x4x4', '4x4x4', '4x4x8', '4x8x8')
HOST = (2, 2, 1)  # chips of a host, where there are as many


@dataclasses.dataclass(frozen=True)
class Chip:
  """A TPU chip: what libtpu lets a program have of its HBM, in GiB (the rest is its own), bytes per
  second to and from it (Google's data sheet), the shapes of slices, and what libtpu is to be told.
  """
  gib: float
  bandwidth: float
  slices: tuple[str, ...]
  arguments: dict = dataclasses.field(default_factory=dict)


CHIPS = {
  'v4': Chip(30.75, 1228e9, SOLID, {'chip_config_name': 'megacore'}),  # else two devices a chip
  'v5e': Chip(15.75, 819e9, FLAT),
  'v5p': Chip(95.74, 2765e9, SOLID),
  'v6e': Chip(31.25, 1640e9, FLAT)}


def compile_step(config, *, topology: str, data_dir=None) -> dict:
  """Compiles the training step of a config for a TPU slice, and reads off what it needs.

  Args:
    config: see gapjax/config.py.
    topology: CHIP:SHAPE, of CHIPS and its slices.
    data_dir: where datasets are; None is TFDS' default. Random images stand in for what is not
      prepared there: only their sizes count.

  Returns:
    {'topology', 'chips', 'device', 'versions', 'config', 'data', 'available_bytes' (of HBM, a
    chip), 'needed_bytes', 'fits', 'largest_batch'}. The last is None where the config's fits, and 0
    where not even one example a chip fits. Where it fits also what `figures` gives, and
    'compile_seconds'.

  Raises UsageError: a config that cannot be, an unknown topology, no libtpu.
  """
  configs.validate(config)
  if config.model.dtype == 'float64':
    raise UsageError('model.dtype float64 is not for TPUs; use float32 or bfloat16')
  devices, chip = slice_of(topology)
  devices.check_batch(config.batch_size)
  step = Step(config, devices, data_dir)
  share, available = config.batch_size // len(devices), chip.gib * GIB
  compiled, needed = step.compile(share)
  result = {
    'topology': topology, 'chips': len(devices), 'device': devices.devices[0].device_kind,
    'versions': {**versions(), 'libtpu': importlib.metadata.version('libtpu')},
    'config': configs.as_json(step.config), 'data': step.images, 'available_bytes': available,
    'needed_bytes': needed if math.isfinite(needed) else None, 'fits': compiled is not None,
    'largest_batch': None}
  if compiled is None:
    log.info('batch_size %d does not fit; looking for the largest that does', config.batch_size)
    result['largest_batch'] = len(devices) * largest(
      lambda share: step.compile(share)[::-1], share, needed=needed, available=available)
    return result
  peak, what = flops.peak(devices.devices[:1], config.model.dtype)
  return {**result, 'compile_seconds': step.seconds, 'peak': {'flops_per_second': peak,
          'bytes_per_second': chip.bandwidth, 'what': what},
          **figures(compiled, peak=peak, bandwidth=chip.bandwidth, batch_size=config.batch_size,
                    model_flops=step.flops / len(devices))}


def slice_of(topology: str) -> tuple[Devices, Chip]:
  """The devices of a slice, that programs can be compiled for, and their kind.

  Raises UsageError where the slice is unknown, or libtpu is not installed.
  """
  name, _, shape = topology.partition(':')
  if name not in CHIPS or shape not in CHIPS[name].slices:
    offers = (f'{" and ".join(n for n in CHIPS if CHIPS[n].slices is slices)}: {", ".join(slices)}'
             for slices in (FLAT, SOLID))
    raise UsageError(f'unknown topology `{topology}`; give CHIP:SHAPE, such as v5e:2x2; '
                     + '; '.join(offers))
  if importlib.util.find_spec('libtpu') is None:
    raise UsageError("compiling for a TPU needs libtpu: pip install 'jax[tpu]'")
  sides = [*map(int, shape.split('x')), 1]
  described = topologies.get_topology_desc(
    platform='tpu', topology_name=topology, **CHIPS[name].arguments,
    chips_per_host_bounds=[min(pair) for pair in zip(sides, HOST, strict=False)])
  return Devices(sorted(described.devices, key=lambda d: (d.process_index, d.id))), CHIPS[name]


class Step(inputs.Program):
  """train.train's step on the devices of a topology, to be compiled for any size of batch.

  `seconds`: what the last compilation took.
  """

  def __init__(self, config, devices, data_dir):
    super().__init__(config, devices, data_dir)
    self.seconds = 0.0
    single = configs.replaced(self.config, batch_size=1, steps_per_call=1)
    feed = build.create_feed(single, self.task, self.train_set,
                             Plan.of(single, num_images=len(self.train_set)))
    self.example, self.constant = jax.eval_shape(  # (1, 1, ...), and what no batch changes
      lambda *arrays: arrays, next(feed.batches(0)), (self.state, self.key, self.feed.data))

  def compile(self, share: int):
    """The compiled call for `share` examples a chip, and the bytes of HBM that it needs of each.

    None, and what the compiler says it would need (or infinity), where it does not fit.
    """
    log.info('compiling for batch_size %d on %d x %s; this can take minutes',
             share * len(self.devices), len(self.devices), self.devices.devices[0].device_kind)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(
      (len(self.devices), self.config.steps_per_call, share, *x.shape[2:]), x.dtype), self.example)
    start = time.perf_counter()
    lowered = self.train_steps.lower(*self.constant, batch, self.count)
    try:
      compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
      needed = bytes_wanted(str(error))
      if needed is None:
        raise
      return None, needed
    self.seconds = time.perf_counter() - start
    return compiled, sum(memory(compiled).values())


def bytes_wanted(message: str) -> float | None:
  """What a program would need of HBM, from the compiler's refusal; None for another complaint."""
  if 'RESOURCE_EXHAUSTED' not in message or 'hbm' not in message.lower():
    return None
  first = re.search(r'\b(\d+(?:\.\d+)?)([KMGT])\b', message)
  return float(first[1]) * 2 ** (10 * ' KMGT'.index(first[2])) if first else math.inf


def largest(trial, share: int, *, needed: float, available: float) -> int:
  """The largest share of a batch that fits, by a line through two that do; verified, or 0.

  trial(share) -> (bytes, whether they fit). `share` itself does not: it would need `needed` bytes
  (or infinity) of the `available`.
  """
  # A first one that fits: somewhat below where proportion says, else by halves.
  guess = int(0.9 * share * available / needed) if math.isfinite(needed) else share // 2
  too_large, share = share, min(max(guess, 1), share - 1)
  while share:
    first, fits = trial(share)
    if fits:
      break
    too_large, share = share, share // 2
  best = too_large - 1
  if share > 1:
    second, _ = trial(share // 2)
    slope = (first - second) / (share - share // 2)  # bytes an example
    if slope > 0:
      best = min(best, share + int((available - first) / slope))
  while best > share:
    if trial(best)[1]:
      return best
    best = (share + best) // 2
  return share


# ---- What the compiler says ----------------------------------------------------------------------


def figures(compiled, *, peak: float, bandwidth: float, batch_size: int,
             model_flops: float) -> dict:
  """What a compiled call takes of a chip for a step, and the roofline.

  XLA counts the body of a loop once, so what it says of a call of several steps is a step's.

  Args:
    compiled: jax's compiled program.
    peak, bandwidth: of a chip, in operations and bytes per second.
    batch_size: of all chips together.
    model_flops: a chip's, of a step, as flops.forward_flops counts.

  Returns:
    {'memory': see `memory`, 'flops', 'bytes', 'model_flops', 'collectives': see `collectives`,
    'step_seconds', 'images_per_second', 'utilisation' (of model_flops at that pace)}.
  """
  cost = compiled.cost_analysis()
  seconds = max(roofline(cost['flops'], cost['bytes accessed'], peak=peak, bandwidth=bandwidth))
  return {'memory': memory(compiled), 'flops': cost['flops'], 'bytes': cost['bytes accessed'],
          'model_flops': model_flops, 'collectives': collectives(compiled.as_text()),
          'step_seconds': seconds, 'images_per_second': batch_size / seconds,
          'utilisation': model_flops / seconds / peak}


def roofline(operations: float, moved: float, *, peak: float,
             bandwidth: float) -> tuple[float, float]:
  """Seconds that so many operations and so many bytes take, each by itself."""
  return operations / peak, moved / bandwidth


def memory(compiled) -> dict[str, int]:
  """Bytes of a chip's HBM by what lies there; the state comes back where it was."""
  sizes = compiled.memory_analysis()
  return {'state': sizes.alias_size_in_bytes,
          'inputs': sizes.argument_size_in_bytes - sizes.alias_size_in_bytes,
          'outputs': sizes.output_size_in_bytes - sizes.alias_size_in_bytes,
          'temporaries': sizes.temp_size_in_bytes, 'program': sizes.generated_code_size_in_bytes}


_COLLECTIVE = re.compile(
  r'^\s*(?:ROOT )?%?\S+ = (.*?) '
  r'(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)\(.*?(?:channel_id=(\d+)|$)')


def collectives(hlo: str) -> dict[str, dict[str, int]]:
  """The collective operations in the text of a program, {kind: {'count', 'bytes' (of results)}}.

  One that computation overlaps stands there several times, where it starts and where it ends, under
  one channel.
  """
  seen = {}
  for line in hlo.splitlines():
    if match := _COLLECTIVE.match(line):
      arrays = tuple(re.findall(r'([a-z]+)(\d*)\[([\d,]*)\]', match[1]))
      seen[match[2], match[3] or line, arrays] = sum(
        math.prod(map(int, filter(None, sides.split(',')))) * (int(bits or 8) // 8)
        for _, bits, sides in arrays)
  sizes = {kind: [size for (other, *_), size in seen.items() if other == kind]
           for kind, *_ in seen}
  return {kind: {'count': len(group), 'bytes': sum(group)} for kind, group in sizes.items()}


# ---- What is printed -----------------------------------------------------------------------------


def lines(result: dict) -> list[str]:
  """What compile_step found, as it is printed, where it fits."""
  c, most = result['config'], result['peak']
  names = {'state': 'parameters, statistics and the optimiser\'s state',
           'inputs': 'the dataset or a call\'s images, and the rest that goes in',
           'outputs': 'metrics', 'temporaries': 'activations, gradients and other temporaries',
           'program': 'the program'}
  computing, moving = roofline(result['flops'], result['bytes'], peak=most['flops_per_second'],
                               bandwidth=most['bytes_per_second'])
  rows = [
    ['memory, GiB', f'{result["needed_bytes"] / GIB:.3f} of {result["available_bytes"] / GIB:.2f}'],
    *([f'- {names[name]}', f'{size / GIB:.3f}'] for name, size in result['memory'].items()),
    ['GFLOP a step', f'{result["flops"] / 1e9:,.2f}'],
    ['GB read and written a step', f'{result["bytes"] / 1e9:,.3f}'],
    *([f'{kind}, MB a step', f'{total["count"]} of together {total["bytes"] / 1e6:,.2f}']
      for kind, total in sorted(result['collectives'].items())),
    ['step by the roofline, ms', f'{1e3 * result["step_seconds"]:,.3f}'],
    ['images per second by it, all chips', f'{result["images_per_second"]:,.0f}'],
    ['utilisation by it', f'{result["utilisation"]:.1%}']]
  return [
    f'{c["model"]["name"]} width {c["model"]["width"]}, {c["model"]["dtype"]}, task {c["task"]}, '
    f'batch {c["batch_size"]}, {c["steps_per_call"]} steps a call, on {result["data"]}',
    f'for {result["topology"]}: {result["chips"]} x {result["device"]}; '
    f'jax {result["versions"]["jax"]}, libtpu {result["versions"]["libtpu"]}; '
    f'compiled in {result["compile_seconds"]:.0f} s', '',
    markdown_table(Table(head=['', 'a chip'], rows=rows)), '',
    f'Roofline: the operations take {1e3 * computing:,.3f} ms at '
    f'{most["flops_per_second"] / 1e12:,.0f} TFLOP/s, the bytes {1e3 * moving:,.3f} ms at '
    f'{most["bytes_per_second"] / 1e9:,.0f} GB/s; a step, the longer. Communication, dispatch and '
    'evaluation come on top; the bytes count traffic with the chip\'s own fast memory (VMEM) too.',
    f'Utilisation: {result["model_flops"] / 1e9:,.2f} GFLOP of the model a step and chip, over '
    f'that peak ({most["what"]}).']


def refusal(result: dict) -> str:
  """Why it does not fit, and what would, in one line."""
  batch, best, needed = (result['config']['batch_size'], result['largest_batch'],
                         result['needed_bytes'])
  size = f'{needed / GIB:,.2f} GiB a chip, of ' if needed else 'more a chip than '
  return (f'batch_size {batch} does not fit {result["topology"]}: it needs {size}'
          f'{result["available_bytes"] / GIB:.2f}; '
          + (f'the largest that fits is {best} (--config.batch_size={best})' if best else
             f'nor does {result["chips"]}, one example a chip: use chips with more memory, '
             'or a smaller network'))
