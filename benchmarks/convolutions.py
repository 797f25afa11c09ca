"""What models/on_cpu.py gains: whole training steps with it and with XLA's own, in turns.

    JAX_PLATFORMS=cpu python benchmarks/convolutions.py [--case=stem16] [--rounds=7]

For each case it prints the median step of both in milliseconds, and how many times as long XLA's
takes: the median of the rounds' own ratios, the least and the most in brackets. The batch is one
and the same in every step, so that nothing is read or augmented while a step is timed.
"""

import argparse
import statistics
import time
from unittest import mock

import jax

from gapjax import config as configs
from gapjax import recipes
from gapjax.models import convolution, on_cpu
from gapjax.speed import inputs
from gapjax.speed.bench import median_and_range, range_of
from gapjax.training.devices import Devices
from gapjax.training.system import describe_devices, keep_freed_memory

WAYS = {'on_cpu': on_cpu.convolve, 'XLA': convolution.convolve}


def narrow(width):
  """Table 2's ResNet-18 with its 3x3 stem, 500 images of 32x32."""
  config = recipes.shifted('resnet18', recipes.cifar('cifar10'))
  config.model.width, config.batch_size = width, 500
  return config


def canvas():
  """Table 1's ResNet-18 at width 24, 48 canvases of 96x96."""
  config = configs.default()
  config.model.width = 24
  return config


CASES = {'stem16': lambda: narrow(16), 'stem24': lambda: narrow(24), 'canvas24': canvas,
         'camvid': lambda: recipes.camvid('small')}


def step_of(config, convolve=on_cpu.convolve):
  """A function that takes one training step and waits for it; how long it took, in seconds."""
  config.steps_per_call = 1
  if config.task != 'segmentation':
    config.data.train_images = config.batch_size
  devices = Devices(jax.local_devices()[:1])
  with mock.patch.object(on_cpu, 'convolve', convolve):  # what a network on a CPU gets
    program = inputs.Program(config, devices, None)
  key, data, state = devices.replicate((program.key, program.feed.data, program.state))
  batch = devices.split(next(program.feed.batches(0)), axis=1)

  def step():
    nonlocal state
    start = time.perf_counter()
    state, _ = jax.block_until_ready(program.train_steps(
      state, key, data, batch, program.count))
    return time.perf_counter() - start

  return step


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--case', choices=CASES, help='this one alone')
  parser.add_argument('--rounds', type=int, default=7)
  arguments = parser.parse_args()
  keep_freed_memory(large=True)
  print(f'{describe_devices(jax.local_devices()[:1])}, jax {jax.__version__}; '
        f'{arguments.rounds} rounds')
  for case in [arguments.case] if arguments.case else CASES:
    steps = {way: step_of(CASES[case](), convolve) for way, convolve in WAYS.items()}
    for step in steps.values():
      step()  # compiles
    rounds = [{way: step() for way, step in steps.items()} for _ in range(arguments.rounds)]
    medians = (f'{way} {1e3 * statistics.median(x[way] for x in rounds):,.0f} ms' for way in WAYS)
    ratio = range_of(median_and_range([x['XLA'] / x['on_cpu'] for x in rounds]), '{:.2f}')
    print(f'{case:10} {", ".join(medians)}, ratio {ratio}', flush=True)


if __name__ == '__main__':
  main()
