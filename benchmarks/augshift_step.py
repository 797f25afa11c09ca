"""What AugShift costs: its training step against the baseline's, alternating in one process.

    python benchmarks/augshift_step.py [--width=64] [--batch=128] [--rounds=7] [--alone]

Prints each network's median step on one device in milliseconds and its ratio to the baseline's, the
range of the ratios over the rounds in brackets. Images are CIFAR-10's, or random where it is not
prepared: a step's time does not depend on them.
"""

import argparse
import statistics

import jax
from convolutions import step_of

from gapjax import recipes
from gapjax.training import system

APART = 'augshift_apart'  # the two crops one after the other: augshift.stacked=False


def config_of(network, *, width, batch):
  """Of a table 2 network, or of APART."""
  pair = {'stacked': False} if network == APART else {}
  config = recipes.shifted(network.removesuffix('_apart'), recipes.cifar('cifar10'), **pair)
  config.model.width, config.batch_size = width, batch
  return config


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
  steps = {name: step_of(config_of(name, width=arguments.width, batch=arguments.batch))
           for name in networks}
  for step in steps.values():
    step()  # compiles
  rounds = [{name: step() for name, step in steps.items()} for _ in range(arguments.rounds)]
  print(f'{system.describe_devices(jax.local_devices()[:1])}, jax {jax.__version__}; ResNet-18, '
        f'width {arguments.width}, {arguments.batch} images a step, {arguments.rounds} rounds')
  for name in networks:
    ratios = [x[name] / x['resnet18'] for x in rounds]
    print(f'{name:18} {1e3 * statistics.median(x[name] for x in rounds):9.1f} ms   '
          f'{statistics.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})')


if __name__ == '__main__':
  main()
