"""The twin's side of `gapjax bench --against=torch`: a process that takes steps when it is told to.

Lines of JSON in, each answered by one: first {'config', 'mode', 'data_dir'}, by what this process
is once it is warm; then a number of steps, by the seconds they took; or 'memory'. How a mode runs:

    plain     uint8 images on the device, augmented there, in float32; on CPU in channels_last,
              which is quicker there (ResNet-18, batch 48, 96x96, 2 cores: 0.91 s against 1.08)
    compiled  plain, in channels_last, under autocast to bfloat16 and torch.compile
"""

import contextlib
import dataclasses
import json
import os
import sys
import time

import numpy as np
import torch

from gapjax import config as configs
from gapjax.errors import UsageError
from gapjax.pytorch import recipe, twin
from gapjax.speed import inputs
from gapjax.speed.bench import peak_rss
from gapjax.training import build, workdirs
from gapjax.training.plan import Plan
from gapjax.training.system import is_large, keep_freed_memory, usable_cores

WARM_UP_STEPS = 3  # the second still chooses algorithms; the last is the guess of a step's time


class TimedTwin:
  """The twin in training; `run` takes steps. `ready`: what the parent is told of it."""

  def __init__(self, config, mode, data_dir):
    cuda = torch.cuda.is_available()
    self.config, self.mode, self.device = config, mode, torch.device('cuda' if cuda else 'cpu')
    torch.set_num_threads(usable_cores())
    torch.backends.cudnn.benchmark = mode == 'compiled'
    train_set, task, _ = inputs.training_set(config, data_dir)
    dtype = getattr(torch, np.dtype(task.dtype).name)
    self.layout = (torch.channels_last if mode == 'compiled' or not cuda else
                   torch.contiguous_format)
    network = twin.create_twin(config.model, num_classes=task.num_classes)
    network = network.to(self.device, dtype, memory_format=self.layout).train()
    self.rule = recipe.create_optimizer(network, config)
    self.permutation = permutations(network, config, self.device)
    self.network = torch.compile(network) if mode == 'compiled' else network
    # Mean and std on the device once: a copy in every step would wait for the step before.
    mean, std = (torch.as_tensor(x, device=self.device) for x in (task.mean, task.std))
    feed = self.scenes if task.dense else self.images
    self.batches = feed(train_set, task, dataclasses.replace(task, mean=mean, std=std))
    seconds = [self.run(1)['seconds'] for _ in range(WARM_UP_STEPS)]
    self.ready = {
      'mode': mode, 'version': torch.__version__, 'step_seconds': seconds[-1],
      'compile_seconds': seconds[0] if mode == 'compiled' else None,
      'dtype': 'bfloat16' if mode == 'compiled' else str(dtype).removeprefix('torch.'),
      'device': torch.cuda.get_device_name() if cuda else f'{torch.get_num_threads()} CPU threads'}

  def run(self, steps: int) -> dict:
    """Takes steps, and waits for them. How long they waited for batches is not timed."""
    self.synchronise()
    start = time.perf_counter()
    for _ in range(steps):
      self.step(next(self.batches))
    self.synchronise()
    return {'seconds': time.perf_counter() - start, 'input_seconds': None}

  def step(self, batch) -> None:
    with (torch.autocast(self.device.type, torch.bfloat16) if self.mode == 'compiled' else
          contextlib.nullcontext()):
      loss, _ = recipe.loss_of(self.network, batch, self.config, self.permutation())
    recipe.descend(loss, self.network, self.rule, clip_norm=self.config.optimizer.clip_norm)

  def synchronise(self) -> None:
    if self.device.type == 'cuda':
      torch.cuda.synchronize()

  def memory(self) -> dict:
    if self.device.type == 'cuda':
      return {'memory_bytes': torch.cuda.max_memory_allocated(), 'memory': 'on a device'}
    return {'memory_bytes': peak_rss(), 'memory': 'of the process'}

  # ---- Batches: endless generators of what recipe.loss_of takes ----------------------------------

  def images(self, train_set, _, task):
    """Of images that lie on the device, augmented there."""
    images, labels = recipe.on_device(train_set, self.device)
    while True:
      drawn = torch.randint(len(images), (self.config.batch_size,), device=self.device)
      batch = recipe.training_batch(images[drawn], labels[drawn], task)
      yield {name: self.laid_out(x) for name, x in batch.items()}

  def scenes(self, train_set, host_task, task):
    """From gapjax's own feed of scenes, augmented on the host."""
    plan = Plan.of(self.config, num_images=len(train_set))
    for call in build.create_feed(self.config, host_task, train_set, plan).batches(0):
      for images, labels in zip(call['images'], call['labels'], strict=True):
        images = torch.from_numpy(images).to(self.device).movedim(-1, 1)
        yield {'images': self.laid_out(recipe.normalised(images, task)),
               'labels': torch.from_numpy(labels).to(self.device, torch.int64)}

  def laid_out(self, x):
    return x.contiguous(memory_format=self.layout) if x.ndim == 4 else x


def permutations(network, config, device):
  """A function that gives a step its permutation, drawn on the device: None without one."""
  if getattr(network, 'head', None) != 'permuted':
    return lambda: None
  fixed = network.draw().to(device)
  if config.model.permutation == 'fixed':
    return lambda: fixed
  return lambda: torch.randperm(len(fixed), device=device)


def main() -> None:
  answers = os.fdopen(os.dup(sys.stdout.fileno()), 'w')
  os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no answer

  def answer(value):
    print(json.dumps(value), file=answers, flush=True)

  order = json.loads(sys.stdin.readline())
  config = configs.default()
  config.update(order['config'])
  # PyTorch too is faster for it: the step of 2 GB takes 0.90 s against 0.93. Its OpenMP threads are
  # left to spin while they run, unless OMP_WAIT_POLICY says otherwise: 0.94 s if PASSIVE, though
  # half the time where other processes use the same cores. They sleep a moment after the last step
  # either way.
  keep_freed_memory(large=is_large(config))
  try:
    timed = TimedTwin(workdirs.settled(config, platform='cpu'), order['mode'],
                      order['data_dir'])
  except UsageError as error:
    return answer({'error': str(error)})
  answer(timed.ready)
  for request in map(json.loads, sys.stdin):
    answer(timed.memory() if request == 'memory' else timed.run(request))


if __name__ == '__main__':
  main()
