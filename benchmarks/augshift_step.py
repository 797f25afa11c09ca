"""What AugShift costs: its training step against the baseline's, alternating in one process.

    python benchmarks/augshift_step.py [--width=64] [--batch=128] [--rounds=7] [--alone]

Prints each network's median step in milliseconds and its ratio to the baseline's, the range of the
ratios over the rounds in brackets. Images are random: a step's time does not depend on them.
"""

import argparse
import statistics
import time

import jax
import numpy as np

from gapjax import recipes
from gapjax.data import ImageDataset
from gapjax.training import build, steps, system, workdirs
from gapjax.training.devices import Devices
from gapjax.training.plan import Plan

APART = 'augshift_apart'  # the two crops one after the other: augshift.stacked=False


def prepare(network, *, width, batch):
  """A function that takes one training step of a table 2 network, or APART, and waits for it."""
  pair = {'stacked': False} if network == APART else {}
  config = recipes.shifted(network.removesuffix('_apart'), recipes.cifar('cifar10'), **pair)
  config.model.width, config.batch_size, config.steps_per_call = width, batch, 1
  draw = np.random.default_rng(0)
  images = ImageDataset('cifar10', draw.integers(0, 256, (4 * batch, 32, 32, 3)).astype(np.uint8),
                        draw.integers(0, 10, 4 * batch).astype(np.int32), tuple('0123456789'))
  devices = Devices()
  task = build.create_task(config, images)
  plan = Plan.of(workdirs.settled(config, platform=devices.platform),
                 num_images=len(images.images))
  model, state, rule, _ = build.create_learner(config, task, images, plan,
                                       platform=devices.platform)
  step = build.create_train_steps(model, task, rule, devices)
  data = devices.replicate({'images': images.images, 'labels': images.labels})
  key, state = devices.replicate((steps.stream(0, steps.TRAIN), state))
  indices = devices.split(plan.batch_indices(0), axis=1)

  def run():
    nonlocal state
    state, _ = jax.block_until_ready(step(state, key, data, indices, np.int32(1)))

  return run


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--width', type=int, default=64)
  parser.add_argument('--batch', type=int, default=128)
  parser.add_argument('--rounds', type=int, default=7)
  parser.add_argument('--alone', action='store_true', help='the baseline and AugShift alone')
  arguments = parser.parse_args()
  system.keep_freed_memory(large=True)
  networks = ('resnet18', 'augshift', APART)
  if not arguments.alone:
    networks = (*recipes.SHIFT_NETWORKS, APART)
  runs = {name: prepare(name, width=arguments.width, batch=arguments.batch) for name in networks}
  seconds = {name: [] for name in runs}
  for number in range(arguments.rounds + 1):
    for name, run in runs.items():
      start = time.perf_counter()
      run()
      if number:  # the first compiled
        seconds[name].append(time.perf_counter() - start)
  print(f'{system.describe_devices(jax.local_devices())}, jax {jax.__version__}; ResNet-18, width '
        f'{arguments.width}, {arguments.batch} images a step, {arguments.rounds} rounds')
  for name, values in seconds.items():
    ratios = [a / b for a, b in zip(values, seconds['resnet18'], strict=True)]
    print(f'{name:18} {1e3 * statistics.median(values):9.1f} ms   '
          f'{statistics.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})')


if __name__ == '__main__':
  main()
