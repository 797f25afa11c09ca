"""The twin's side of `gapjax bench --against=torch`: a process that takes steps when it is told to.

Lines of JSON in, each answered by one: first {'config', 'mode', 'data_dir'}, by what this process
is once it is warm; then a number of steps, by the seconds they took; or 'memory'. How a mode runs:

    plain     uint8 images on the device, augmented there, in float32; on CPU in channels_last,
              which is quicker there (ResNet-18, batch 48, 96x96, 2 cores: 0.91 s against 1.08)
    authors   as the authors train: a DataLoader, each image augmented and pasted on its canvas by a
              worker, the batch then copied to the device; float32
    compiled  plain, in channels_last, under autocast to bfloat16 and torch.compile
"""

import contextlib
import dataclasses
import json
import os
import sys
import time

import numpy as np
import PIL.Image
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, RandomSampler

from gapjax import config as configs
from gapjax.errors import UsageError, check_choice
from gapjax.pytorch import recipe, twin
from gapjax.speed import bench_data
from gapjax.speed.bench import MODES, peak_rss
from gapjax.training import build, workdirs
from gapjax.training.plan import Plan
from gapjax.training.system import keep_freed_memory, usable_cores

WARM_UP_STEPS = 3  # the second still chooses algorithms; the last is the guess of a step's time
WORKERS = 4  # of the authors' DataLoader, where there are as many cores


class Twin:
  """The twin in training; `run` takes steps. `ready`: what the parent is told of it."""

  def __init__(self, config, mode, data_dir):
    check_choice(mode, MODES, what='mode')
    if mode == 'authors' and config.task != 'canvas':
      raise UsageError('--torch=authors is the authors\' training on the task canvas; theirs on '
                       f'{config.task} is not known: use --torch=plain')
    cuda = torch.cuda.is_available()
    self.config, self.mode, self.device = config, mode, torch.device('cuda' if cuda else 'cpu')
    torch.set_num_threads(usable_cores())
    torch.backends.cudnn.benchmark = mode == 'compiled'
    train_set, task, _ = bench_data.load(config, data_dir)
    dtype = getattr(torch, np.dtype(task.dtype).name)
    network = twin.create_twin(config.model, num_classes=task.num_classes)
    network = network.to(self.device, dtype).train()
    self.layout = torch.contiguous_format
    if mode == 'compiled' or (mode == 'plain' and not cuda):
      self.layout = torch.channels_last
      network = network.to(memory_format=self.layout)
    self.rule = recipe.create_optimizer(network, config)
    self.permutation = permutations(network, config, self.device)
    self.network = torch.compile(network) if mode == 'compiled' else network
    self.feed = self.create_feed(train_set, task)
    seconds = [self.run(1)['seconds'] for _ in range(WARM_UP_STEPS)]
    self.ready = {
      'mode': mode, 'version': torch.__version__, 'step_seconds': seconds[-1],
      'compile_seconds': seconds[0] if mode == 'compiled' else None,
      'dtype': 'bfloat16' if mode == 'compiled' else str(dtype).removeprefix('torch.'),
      'device': torch.cuda.get_device_name() if cuda else f'{torch.get_num_threads()} CPU threads'}

  def run(self, steps: int) -> dict:
    """Takes steps, and waits for them; 'input_seconds' of those are for the DataLoader's batches.

    With it a first step is not timed, in which the workers start and their queue fills.
    """
    batches, waited = self.feed(), 0.0
    if self.mode == 'authors':
      self.step(next(batches))
    self.synchronise()
    start = time.perf_counter()
    for _ in range(steps):
      before = time.perf_counter()
      batch = next(batches)
      waited += time.perf_counter() - before
      self.step(batch)
    self.synchronise()
    seconds = time.perf_counter() - start
    batches.close()  # ends the workers
    return {'seconds': seconds, 'input_seconds': waited if self.mode == 'authors' else None}

  def step(self, batch) -> None:
    autocast = contextlib.nullcontext()
    if self.mode == 'compiled':
      autocast = torch.autocast(self.device.type, torch.bfloat16)
    with autocast:
      loss, _ = recipe.loss_of(self.network, batch, self.config, self.permutation())
    self.rule.zero_grad()
    loss.backward()
    if self.config.optimizer.clip_norm:
      nn.utils.clip_grad_norm_(self.network.parameters(), self.config.optimizer.clip_norm)
    self.rule.step()

  def synchronise(self) -> None:
    if self.device.type == 'cuda':
      torch.cuda.synchronize()

  def memory(self) -> dict:
    if self.device.type == 'cuda':
      return {'memory_bytes': torch.cuda.max_memory_allocated(), 'memory': 'on a device'}
    return {'memory_bytes': peak_rss(), 'memory': 'of the process'}

  # ---- Batches: endless generators of what recipe.loss_of takes ----------------------------------

  def create_feed(self, train_set, task):
    """A function that begins a feed."""
    if self.mode == 'authors':
      return lambda: self.loaded(Canvases(train_set, task))
    # On the device once: a copy in every step would make the host wait for the step before.
    mean, std = (torch.as_tensor(x, device=self.device) for x in (task.mean, task.std))
    task = dataclasses.replace(task, mean=mean, std=std)
    if self.config.task != 'segmentation':
      images = torch.tensor(train_set.images, device=self.device).movedim(-1, 1).contiguous()
      labels = torch.tensor(train_set.labels, dtype=torch.int64, device=self.device)
      return lambda: self.drawn(images, labels, task)
    plan = Plan.of(self.config, num_images=len(train_set))
    calls = build.create_feed(self.config, task, train_set, plan).batches(0)
    return lambda: self.scenes(calls, task)

  def drawn(self, images, labels, task):
    """Of images (n, 3, h, w) uint8 that lie on the device."""
    while True:
      which = torch.randint(len(images), (self.config.batch_size,), device=self.device)
      batch = recipe.training_batch(images[which], labels[which], task)
      yield {name: self.laid_out(x) for name, x in batch.items()}

  def scenes(self, calls, task):
    """From gapjax's own feed of scenes, augmented on the host."""
    for call in calls:
      for images, labels in zip(call['images'], call['labels'], strict=True):
        images = torch.from_numpy(images).to(self.device).movedim(-1, 1)
        yield {'images': self.laid_out(recipe.normalised(images, task)),
               'labels': torch.from_numpy(labels).to(self.device, torch.int64)}

  def loaded(self, canvases):
    workers = min(WORKERS, usable_cores())
    sampler = RandomSampler(canvases, replacement=True, num_samples=10 ** 9)  # never ends
    loader = DataLoader(canvases, self.config.batch_size, sampler=sampler, num_workers=workers)
    for images, targets in loader:
      yield {'canvases': images.to(self.device), 'targets': targets.to(self.device)}

  def laid_out(self, x):
    return x.contiguous(memory_format=self.layout) if x.ndim == 4 else x


class Canvases(Dataset):
  """Image by image on the CPU: PIL image, flip, tensor, normalise, paste on the canvas."""

  def __init__(self, train_set, task):
    self.images, self.labels, self.task = train_set.images, train_set.labels, task
    self.mean, self.std = (torch.as_tensor(x)[:, None, None] for x in (task.mean, task.std))

  def __len__(self):
    return len(self.images)

  def __getitem__(self, i):
    """A canvas (3, k * s, k * s) and its target."""
    image, k = PIL.Image.fromarray(self.images[i]), self.task.grid
    if self.task.flip and torch.rand(1) < 0.5:
      image = image.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT)
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    x = x.to(self.mean.dtype).div(255).sub_(self.mean).div_(self.std)
    s, location = x.shape[-1], int(torch.randint(k * k, ()))
    row, column = divmod(location, k)
    canvas = x.new_zeros(3, k * s, k * s)
    canvas[:, row * s:(row + 1) * s, column * s:(column + 1) * s] = x
    return canvas, location if self.task.target == 'location' else int(self.labels[i])


def permutations(network, config, device):
  """A function that gives a step its permutation, drawn on the device: None without one."""
  if config.task == 'segmentation' or config.model.head != 'permuted':
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
  try:
    twin = Twin(workdirs.settle(os.devnull, config, platform='cpu'), order['mode'],
                order['data_dir'])
  except UsageError as error:
    return answer({'error': str(error)})
  answer(twin.ready)
  for line in sys.stdin:
    request = json.loads(line)
    answer(twin.memory() if request == 'memory' else twin.run(request))


if __name__ == '__main__':
  # PyTorch too is faster for it: that step 0.90 s against 0.93. Its OpenMP threads are left to spin
  # while they run, unless OMP_WAIT_POLICY says otherwise: 0.94 s if PASSIVE, though half the time
  # where other processes use the same cores. They sleep a moment after the last step either way.
  keep_freed_memory()
  main()
