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

import jax
import numpy as np
import torch

from gapjax import config as configs
from gapjax import paths
from gapjax.errors import UsageError
from gapjax.pytorch import recipe, twin, twin_layers
from gapjax.tasks import TASKS
from gapjax.tasks.augshift import AugShiftTask, warm_up
from gapjax.tasks.protocol import Counter
from gapjax.training import build, optimizer, workdirs
from gapjax.training.log import Writer, progress_bar
from gapjax.training.plan import Plan
from gapjax.training.system import Clock, StopSignals, commit, describe_devices, usable_cores
from gapjax.training.train import check_finite, summary
from gapjax.weights import files as weights
from gapjax.weights import names

WEIGHTS, TWIN = 'weights.pth', 'the PyTorch twin at step'


def check_trained(config) -> None:
  """Raises UsageError for a config whose twin is not trained."""
  if TASKS[config.task].dense or config.model.dtype == 'bfloat16':
    raise UsageError('the PyTorch twin is trained in the tasks canvas and classification, in '
                     f'float32 or float64; not in {config.task}, {config.model.dtype}: leave '
                     '--with_torch out, or take these, as with --config.model.dtype=float32')


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
  check_trained(config)
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
                                 TorchCounter(config, network, task, test_set,
                                              check_stop=stop.check))
    images, labels = recipe.on_device(train_set, device)

    clock = Clock(0.0)
    writer = stack.enter_context(Writer(workdir, step=-1))
    bar = stack.enter_context(progress_bar(plan, show=progress, title='PyTorch'))
    pending = []  # losses still on the device

    for step in range(1, plan.total_steps + 1):
      # ---- Train ------------------------------------------------------------------------------
      network.train()
      twin_layers.anneal(network, (step - 1) / plan.total_steps)
      which = torch.as_tensor(plan.batch_indices(step - 1)[0], dtype=torch.int64, device=device)
      batch = recipe.training_batch(images[which], labels[which], task)
      loss, _ = recipe.loss_of(network, batch, config, weight=pair_weights[step - 1])
      for group, share in zip(rule.param_groups, shares, strict=True):
        group['lr'] = rates[step - 1] * share
      recipe.descend(loss, network, rule, clip_norm=config.optimizer.clip_norm)
      pending.append(loss.detach())
      bar.update(config.batch_size)

      # ---- Log: brings the losses home, and stops at one that is not finite ----------------------
      if plan.logs(range(step - 1, step)) or plan.evaluates(step):
        losses = torch.stack(pending).tolist()
        for number, value in enumerate(losses, step - len(losses) + 1):
          check_finite(value, number, what=TWIN)
        writer.write(step, 'train', loss=sum(losses) / len(losses), learning_rate=rates[step - 1],
                     images_per_second=clock.lap(config.batch_size * len(losses)))
        bar.set_postfix(loss=f'{losses[-1]:.3f}')
        pending = []

      # ---- Evaluate, as the authors do each epoch ----------------------------------------------
      stop.message = (f'stopped the PyTorch twin at step {step} of {plan.total_steps}; it does not '
                      'resume: the same command begins it again')
      stop.check()
      if plan.evaluates(step):
        with clock.paused():
          result = evaluation.during(Trained(step, network))
        check_finite(result['loss'], step, what=TWIN)
        writer.write(step, 'eval', **result)

    # ---- Final: every test image at every location; consistency ----------------------------------
    final = evaluation.final(Trained(step, network), progress=progress, brief=True)
    check_finite(final['loss'], step, what=TWIN)
    stack.enter_context(paths.kept(final))
    writer.write(step, 'final', **final)
    arrays = {name: x.cpu().numpy() for name, x in network.state_dict().items()}
    (workdir / WEIGHTS).unlink(missing_ok=True)  # of a run that was killed just here
    weights.write(workdir / WEIGHTS, arrays)
    finished = summary(
      config, evaluation, train_set, final, writer.lines, clock, step=step,
      code=commit(), device=f'gpu x 1 ({torch.cuda.get_device_name()})' if device.type == 'cuda'
      else describe_devices(jax.devices('cpu')[:1]),
      parameters=sum(arrays[name].size for name in names.names(config.model)
                     if 'running' not in name))
    finished['versions']['torch'] = torch.__version__
    paths.write_json(workdir / 'summary.json', finished)
    return finished


def schedules(config, task, plan) -> tuple[list[float], list[float]]:
  """The learning rate and the pairwise term's weight of every step."""
  n = plan.total_steps
  rate = optimizer.create_schedule(config, steps_per_epoch=plan.steps_per_epoch, total_steps=n)
  weight = 0.0
  if isinstance(task, AugShiftTask):
    weight = warm_up(np.arange(n), task.weight, steps=task.warm_up_steps)
  return tuple(np.broadcast_to(x, n).tolist() for x in (rate(np.arange(n)), weight))


# ---- Evaluation: gapjax's protocols and counts, PyTorch's passes ---------------------------------


@dataclasses.dataclass(frozen=True)
class Trained:
  """What stands in for gapjax's training state."""
  step: int
  network: torch.nn.Module


class TorchCounter(Counter):
  """Examples go through a network in PyTorch. check_stop: as a DeviceCounter's."""

  def __init__(self, config, network, task, test_set, *, check_stop=lambda: None):
    self.check_stop = check_stop
    self.task, self.num_channels = task, network.channels
    self.batch_size = min(config.eval.batch_size, len(test_set))
    self.images, _ = recipe.on_device(test_set, next(network.parameters()).device)
    self.data = {'labels': test_set.labels}
    self.counts = jax.jit(task.eval_counts)

  def count(self, state, zeros, batches, *, bar, common=(), local=False):
    """The totals over batches; each draws a permutation."""
    totals = zeros
    state.network.eval()
    for batch, examples in batches:
      self.check_stop()
      logits, features = self.forward(state.network, batch)
      counts = self.counts(logits, features, self.data, dict(common), batch)
      totals = jax.tree.map(operator.add, totals, jax.device_get(counts))
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
