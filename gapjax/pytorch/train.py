"""The twin's training, read top to bottom, and its evaluation: PyTorch on gapjax's data, batch by
batch, at its learning rates and by its protocols. Augmentation, places and permutations are drawn
by PyTorch.

On a GPU jax takes three quarters of the memory at its start: where PyTorch needs more than the
rest, set XLA_PYTHON_CLIENT_PREALLOCATE=false.
"""

import contextlib
import dataclasses
import operator
import pathlib
import sys

import jax
import numpy as np
import torch
from torch import nn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from gapjax import config as configs
from gapjax import paths
from gapjax.errors import Interrupted, TrainingFailed, UsageError
from gapjax.pytorch import recipe, twin
from gapjax.tasks import TASKS
from gapjax.tasks.augshift import AugShiftTask, warm_up
from gapjax.training import build, optimizer, workdirs
from gapjax.training.log import Writer
from gapjax.training.plan import Plan
from gapjax.training.system import (
  Clock,
  StopSignals,
  commit,
  describe_devices,
  usable_cores,
  versions,
)
from gapjax.weights import files as weights
from gapjax.weights import names

WEIGHTS = 'weights.pth'


def train(config, *, workdir, data_dir=None, progress=True) -> dict:
  """Trains and evaluates the twin of a network of the tasks 'canvas' and 'classification'.

  Args:
    config: see gapjax/config.py.
    workdir: the folder where everything goes, and no run of gapjax.
    data_dir: where datasets are; None is TFDS' default.
    progress: whether to show a progress bar.

  Returns:
    The summary, as in `workdir/summary.json`: as gapjax's, of classification without the curves and
    the map. The weights are in `workdir/weights.pth`, under the authors' names.

  Raises:
    UsageError: a config that cannot be, or not in the twin; a workdir of another run.
    TrainingFailed: a loss is not finite.
    Interrupted: SIGTERM or Ctrl-C; the same command begins again.
  """
  configs.validate(config)
  config = workdirs.settled(config, platform='cpu')  # it trains step by step, anywhere
  if TASKS[config.task].dense or config.model.dtype == 'bfloat16':
    raise UsageError('the PyTorch twin is trained in the tasks canvas and classification, in '
                     f'float32 or float64; not in {config.task}, {config.model.dtype}: leave it '
                     'out')
  workdir, device = pathlib.Path(workdir), torch.device('cpu')
  if torch.cuda.is_available():
    device = torch.device('cuda')
  torch.set_num_threads(usable_cores())

  with contextlib.ExitStack() as stack:
    stop = stack.enter_context(StopSignals())

    # ---- Workdir and data: a finished run needs none --------------------------------------------
    finished = workdirs.finished(workdir, config)
    if (workdir / 'checkpoints').exists() or (finished and 'torch' not in finished['versions']):
      raise UsageError(f'{workdir} holds a run of gapjax; give the PyTorch twin another folder')
    if finished:
      return finished
    train_set, test_set, task = build.load_data(config, data_dir=data_dir)
    stack.enter_context(workdirs.lock(workdir))
    workdirs.claim(workdir, config)

    # ---- Network, optimiser, and what changes from step to step ----------------------------------
    torch.manual_seed(config.seed)
    plan = Plan.of(config, num_images=len(train_set))
    dtype = getattr(torch, np.dtype(task.dtype).name)
    network = twin.create_twin(config.model, num_classes=task.num_classes).to(device, dtype)
    rule = recipe.create_optimizer(network, config)
    rates, pair_weights = schedules(config, task, plan)
    shares = [group['lr'] / config.optimizer.lr for group in rule.param_groups]
    evaluation = task.evaluation(config, test_set,
                                 TorchCounter(config, network, task, test_set))
    images, labels = on_device(train_set, device)

    clock = Clock(0.0)
    writer = stack.enter_context(Writer(workdir, step=-1))
    stack.enter_context(logging_redirect_tqdm())
    bar = stack.enter_context(tqdm(
      total=plan.total_steps * config.batch_size, unit='img', unit_scale=True, desc='PyTorch',
      disable=not progress, file=sys.stderr, dynamic_ncols=True))
    pending = []  # losses still on the device

    for step in range(1, plan.total_steps + 1):
      # ---- Train ------------------------------------------------------------------------------
      network.train()
      which = torch.as_tensor(plan.batch_indices(step - 1)[0], dtype=torch.int64, device=device)
      batch = recipe.training_batch(images[which], labels[which], task)
      loss, _ = recipe.loss_of(network, batch, config, weight=pair_weights[step - 1])
      for group, share in zip(rule.param_groups, shares, strict=True):
        group['lr'] = rates[step - 1] * share
      rule.zero_grad()
      loss.backward()
      if config.optimizer.clip_norm:
        nn.utils.clip_grad_norm_(network.parameters(), config.optimizer.clip_norm)
      rule.step()
      pending.append(loss.detach())
      bar.update(config.batch_size)

      # ---- Log: brings the losses home, and stops at one that is not finite ----------------------
      if plan.logs(range(step - 1, step)) or plan.evaluates(step):
        losses = torch.stack(pending).tolist()
        for number, value in enumerate(losses, step - len(losses) + 1):
          check_finite(value, number)
        writer.write(step, 'train', loss=sum(losses) / len(losses), learning_rate=rates[step - 1],
                     images_per_second=clock.lap(config.batch_size * len(losses)))
        bar.set_postfix(loss=f'{losses[-1]:.3f}')
        pending = []

      # ---- Evaluate, as the authors do each epoch ----------------------------------------------
      if plan.evaluates(step) and not stop.requested:
        with clock.paused():
          result = evaluation.during(Trained(step, network), stop=stop)
        if result is not None:
          check_finite(result['loss'], step)
          writer.write(step, 'eval', **result)
      if stop.requested:
        raise Interrupted(f'stopped the PyTorch twin at step {step} of {plan.total_steps}; it does '
                          'not resume: the same command begins it again', code=stop.code)

    # ---- Final: every test image at every location; consistency ----------------------------------
    final = evaluation.final(Trained(step, network), stop=stop, progress=progress, brief=True)
    if final is None:
      raise Interrupted('stopped in the final evaluation of the PyTorch twin, which does not '
                        'resume: the same command begins it again', code=stop.code)
    check_finite(final['loss'], step)
    stack.enter_context(paths.kept(final))
    writer.write(step, 'final', **final)
    arrays = {name: x.cpu().numpy() for name, x in network.state_dict().items()}
    (workdir / WEIGHTS).unlink(missing_ok=True)  # of a run that was killed just here
    weights.write(workdir / WEIGHTS, arrays)
    evaluations = [line for line in writer.lines if line['split'] == 'eval']
    summary = {
      'config': configs.as_json(config), 'step': step, **evaluation.summary(final, evaluations),
      'wall_seconds': clock.wall_seconds(), 'images_per_second': clock.images_per_second(),
      'device': f'gpu x 1 ({torch.cuda.get_device_name()})' if device.type == 'cuda'
      else describe_devices(jax.devices('cpu')[:1]),
      'versions': {**versions(), 'torch': torch.__version__}, 'commit': commit()}
    summary['sizes'] = {
      'train_images': len(train_set), 'test_images': len(test_set),
      'input_size': task.input_shape(train_set)[1], 'chance': 1 / task.num_classes,
      'parameters': sum(arrays[name].size for name in names.names(config.model)
                        if 'running' not in name)}
    paths.write_json(workdir / 'summary.json', summary)
    return summary


def schedules(config, task, plan) -> tuple[list[float], list[float]]:
  """The learning rate and the pairwise term's weight of every step."""
  n = plan.total_steps
  rate = optimizer.create_schedule(config, steps_per_epoch=plan.steps_per_epoch, total_steps=n)
  weight = 0.0
  if isinstance(task, AugShiftTask):
    weight = warm_up(np.arange(n), task.weight, steps=task.warm_up_steps)
  return tuple(np.broadcast_to(x, n).tolist() for x in (rate(np.arange(n)), weight))


def on_device(dataset, device) -> tuple[torch.Tensor, torch.Tensor]:
  """A dataset's images, (n, 3, h, w) uint8, and labels, (n,) int64."""
  images = torch.tensor(dataset.images, device=device).movedim(-1, 1).contiguous()
  return images, torch.tensor(dataset.labels, dtype=torch.int64, device=device)


def check_finite(loss: float, step: int) -> None:
  """Raises TrainingFailed when a loss is not finite."""
  if not np.isfinite(loss):
    raise TrainingFailed(
      f'the loss of the PyTorch twin is {loss} at step {step}: try a lower optimizer.lr, '
      'schedule.warmup_epochs or optimizer.clip_norm in a new workdir')


# ---- Evaluation: gapjax's protocols and counts, PyTorch's passes ---------------------------------


@dataclasses.dataclass(frozen=True)
class Trained:
  """What stands in for gapjax's training state."""
  step: int
  network: nn.Module


class TorchCounter:
  """A tasks.protocol.Counter: examples go through a network in PyTorch."""
  rows = slice(None)  # it is the only process

  def __init__(self, config, network, task, test_set):
    self.task, self.num_channels = task, network.channels
    self.batch_size = min(config.eval.batch_size, len(test_set))
    self.images, _ = on_device(test_set, next(network.parameters()).device)
    self.data = {'labels': test_set.labels}
    self.counts = jax.jit(task.eval_counts)

  def count(self, state, zeros, batches, *, common=(), local=False, stop=None, bar=None):
    """The totals over batches; each draws a permutation."""
    del local
    totals = zeros
    state.network.eval()
    for batch, examples in batches:
      if stop is not None and stop.requested:
        return None
      logits, features = self.forward(state.network, batch)
      counts = self.counts(logits, features, self.data, dict(common), batch)
      totals = jax.tree.map(operator.add, totals, jax.device_get(counts))
      if bar is not None:
        bar.update(examples)
    return totals

  @torch.inference_mode()
  def forward(self, network, batch):
    """Logits, and pooled features by that name, of a batch: arrays."""
    examples = {name: torch.as_tensor(values, dtype=torch.int64, device=self.images.device)
                for name, values in batch.items()}
    images = recipe.normalised(self.images[examples['index']], self.task)
    if 'location' in examples:
      inputs = recipe.placed(images, examples['location'], self.task)
    else:  # all first views before all second ones, (v * b, 3, h, w)
      inputs = torch.cat([recipe.moved(images, offset) for offset in examples['offset'].unbind(1)])
    logits, features = network(inputs)
    return logits.cpu().numpy(), {'pooled': features['pooled'].cpu().numpy()}
