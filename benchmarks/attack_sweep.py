"""What the one-pass attack costs: a sweep over N and random orders against full network passes.

    python benchmarks/attack_sweep.py [--height=512] [--width=1024] [--counts=20] [--orders=5]

Times the whole sweep of one image, confusion counts included, and a few full passes: the jitted
network with channels of stage4 zeroed, argmax and the same counts. A pass for every N and order is
that many times the median of those. Weights and the image are random: time does not depend on them.
"""

import argparse
import resource
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from gapjax.models.deeplab import DEEPLABS, DeepLab
from gapjax.neurons import attack, network
from gapjax.training import system


def main():
  system.keep_freed_memory(large=True)  # before jax starts its threads
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--model', choices=DEEPLABS, default='deeplabv3')
  parser.add_argument('--backbone', default='resnet50')
  parser.add_argument('--channels', type=int, default=64, help='of the backbone\'s first stage')
  parser.add_argument('--output_stride', type=int, default=16)
  parser.add_argument('--height', type=int, default=512)
  parser.add_argument('--width', type=int, default=1024)
  parser.add_argument('--classes', type=int, default=19)
  parser.add_argument('--counts', type=int, default=20, help='how many N')
  parser.add_argument('--orders', type=int, default=5, help='how many random orders')
  parser.add_argument('--passes', type=int, default=3, help='full passes to time')
  a = parser.parse_args()
  model = DeepLab(a.model, a.classes, a.backbone, a.channels, a.output_stride)
  draw = np.random.default_rng(0)
  batch = {'images': draw.normal(size=(1, a.height, a.width, 3)).astype(np.float32),
           'labels': draw.integers(0, a.classes, (1, a.height, a.width))}
  variables = jax.jit(lambda key: model.init(key, jnp.zeros((1, 64, 64, 3)), train=False))(
    jax.random.key(0))
  cut = network.deeplab(model, variables)
  channels = jax.eval_shape(cut.encode, variables, batch['images'])['stage4'].shape[-1]
  step = max(channels // a.counts // 10 * 10, 1)  # 100 of 2048
  counts = step * np.arange(1, a.counts + 1)
  orders = {'random': attack.random_orders(channels, a.orders, seed=0)}

  def timed(function):
    start = np.array([time.perf_counter(), time.process_time()])
    result = function()
    return result, np.array([time.perf_counter(), time.process_time()]) - start

  def one_pass():
    return attack.sweep(cut, [batch], orders=orders, counts=counts)

  def full_pass(count):
    # One program from the image to the logits, as a network pass is.
    keep = np.ones(channels, bool)
    keep[orders['random'][0, :count]] = False
    return np.asarray(counted(logits(variables, batch['images'], keep)))

  @jax.jit
  def logits(variables, images, keep):
    features = model.apply(variables, images, train=False, method='encode')
    x = jnp.where(keep, features['stage4'], 0)
    branches = model.apply(variables, x, method='branches')
    return model.apply(variables, branches, features, size=images.shape[1:3], train=False,
                       method='decode')

  @jax.jit
  def counted(logits):
    predicted = logits.argmax(-1)  # a program of its own, which is quicker on CPU
    table = (batch['labels'] * a.classes + predicted).ravel()
    return jnp.bincount(table, length=a.classes ** 2).reshape(a.classes, a.classes)

  one_pass(), full_pass(0)  # compiles
  passes = [timed(lambda: full_pass(counts[0]))]  # before and after: the machine may be shared
  result, sweep_seconds = timed(one_pass)
  passes += [timed(lambda n=n: full_pass(n)) for n in counts[1:a.passes]]
  for i, (table, _) in enumerate(passes, 1):
    moved = np.abs(table - result.matrices['random'][0, i, 0]).sum() / 2
    print(f'N = {counts[i - 1]}: {moved / table.sum():.2e} of the pixels differ from a full pass')
  total = a.counts * a.orders
  print(f'{system.describe_devices(jax.local_devices())}, jax {jax.__version__}; {a.model}, '
        f'{a.backbone}, width {a.channels}, output stride {a.output_stride}, '
        f'{a.height} x {a.width}')
  print(f'peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20:.1f} GB')
  # Where others use the machine, processor seconds on CPU say more than the clock.
  for i, what in enumerate(('', 'processor ')):
    each = [seconds[i] for _, seconds in passes]
    full = statistics.median(each)
    print(f'{what}seconds: one pass, {a.counts} N x {a.orders} orders: {sweep_seconds[i]:.2f}; a '
          f'full pass: {full:.2f} ({", ".join(f"{s:.2f}" for s in each)}), {total} of them: '
          f'{total * full:.0f}; ratio {total * full / sweep_seconds[i]:.1f}')


if __name__ == '__main__':
  main()
