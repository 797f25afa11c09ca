"""The twin's batches, losses and optimisers in plain PyTorch: what the authors describe in the
paper's sections 3 to 5. Random numbers are PyTorch's own."""

import numpy as np
import torch
import torch.nn.functional as F

from gapjax.tasks import TASKS
from gapjax.tasks.canvas import CanvasTask
from gapjax.tasks.segmentation import VOID

# ---- Batches -------------------------------------------------------------------------------------


def normalised(images, task):
  """uint8 (..., 3, h, w) -> (images / 255 - mean) / std, by the task's mean and std."""
  like = dict(dtype=getattr(torch, np.dtype(task.dtype).name), device=images.device)
  mean, std = (torch.as_tensor(x, **like)[:, None, None] for x in (task.mean, task.std))
  return (images.to(like['dtype']) / 255 - mean) / std


def on_device(dataset, device) -> tuple[torch.Tensor, torch.Tensor]:
  """A dataset's images, (n, 3, h, w) uint8, and labels, (n,) int64."""
  images = torch.tensor(dataset.images, device=device).movedim(-1, 1).contiguous()
  return images, torch.tensor(dataset.labels, dtype=torch.int64, device=device)


def training_batch(images, labels, task) -> dict:
  """uint8 images (b, 3, h, w) and their labels (b,), augmented, as `loss_of` takes them.

  task: a CanvasTask, whose images are put at uniform locations, or an AugShiftTask, whose images
  are moved by uniform offsets, filled with zeros; the crops of a pair share their flip.
  """
  b, on = len(images), dict(device=images.device)
  x = normalised(images, task)
  if task.flip:
    x = torch.where((torch.rand(b, **on) < 0.5)[:, None, None, None], x.flip(-1), x)
  if isinstance(task, CanvasTask):
    locations = torch.randint(task.num_locations, (b,), **on)
    return {'canvases': placed(x, locations, task),
            'targets': locations if task.target == 'location' else labels}
  s = task.max_shift
  offsets = torch.randint(-s, s + 1, (task.crops, b, 2), **on)
  return {'images': torch.stack([moved(x, offset) for offset in offsets]), 'labels': labels}


def placed(patches, locations, task):
  """Normalised (b, 3, s, s), each at its location (b,) -> canvases (b, 3, k * s, k * s)."""
  b, c, s, _ = patches.shape
  k = task.grid
  canvas = patches.new_zeros(b, c, k, s, k, s)
  if task.fill == 'black':
    canvas += normalised(patches.new_zeros(3, 1, 1), task)[:, None, None]
  canvas[torch.arange(b, device=patches.device), :, locations // k, :, locations % k] = patches
  return canvas.reshape(b, c, k * s, k * s)


def moved(images, offsets):
  """Images (b, c, h, w), each moved down and right by its offset (b, 2), the rest zero.

  Offsets are smaller than the image.
  """
  b, _, h, w = images.shape
  padded = F.pad(images, [w, w, h, h])
  rows, columns = (torch.arange(n, device=images.device) + n - offset[:, None]
                   for n, offset in zip((h, w), offsets.T, strict=True))  # (b, h), (b, w)
  which = torch.arange(b, device=images.device)[:, None, None]
  return padded[which, :, rows[:, :, None], columns[:, None]].movedim(-1, 1)


# ---- Losses --------------------------------------------------------------------------------------


def loss_of(network, batch, config, permutation=None, *, weight=None):
  """The loss of a batch, a scalar, and the logits.

  batch: tensors, 'canvases' (b, 3, h, w) and 'targets' (b,); 'images' (crops, b, 3, h, w) and
  'labels' (b,); or 'images' (b, 3, h, w) and 'labels' (b, h, w), by config.task. weight: the
  pairwise term's at this step of its warm-up; None for config.augshift.weight.
  """
  if config.task == 'canvas':
    logits, _ = network(batch['canvases'], permutation)
    return F.cross_entropy(logits, batch['targets']), logits
  if TASKS[config.task].dense:
    logits, _ = network(batch['images'])
    return segmentation_loss(logits, batch['labels'], config.segmentation), logits
  crops, labels = batch['images'], batch['labels']
  passes = crops.flatten(0, 1)[None] if config.augshift.stacked else crops
  if permutation is None and config.model.head == 'permuted':
    permutation = network.draw()  # one a step, as in gapjax
  outputs = [network(images, permutation) for images in passes]
  logits = torch.cat([logits for logits, _ in outputs])
  z = torch.cat([features['pooled'] for _, features in outputs])
  y, z = (x.unflatten(0, crops.shape[:2]) for x in (logits, z))
  loss = sum(F.cross_entropy(logits, labels) for logits in y)
  if len(crops) == 2:
    weight = config.augshift.weight if weight is None else weight
    loss = loss + weight * F.mse_loss(z[0], z[1])
  return loss, logits


def segmentation_loss(logits, labels, config):
  """Cross entropy or focal loss, the mean over pixels that are not void; 0 where all are."""
  losses = F.cross_entropy(logits, labels, ignore_index=VOID, reduction='none')
  if config.loss == 'focal':
    wrong = -torch.expm1(-losses)  # 1 - p; its power has no derivative at 0
    power = torch.where(wrong > 0, wrong, 1) ** config.gamma
    losses = torch.where(wrong > 0, power, 0. ** config.gamma) * losses
  return losses.sum() / (labels != VOID).sum().clamp(min=1)


# ---- Optimisers ----------------------------------------------------------------------------------


def create_optimizer(network, config):
  """PyTorch's own Adam or SGD, the backbone at its share of the rate."""
  c = config.optimizer
  groups = [{'params': [p for name, p in network.named_parameters()
                        if name.startswith('backbone.') == inside], 'lr': c.lr * factor}
            for inside, factor in ((False, 1), (True, c.backbone_factor))]
  if c.name == 'adam':
    return torch.optim.Adam(groups, betas=(c.b1, c.b2), weight_decay=c.weight_decay)
  return torch.optim.SGD(groups, momentum=c.momentum, weight_decay=c.weight_decay,
                         nesterov=c.nesterov and c.momentum > 0)  # without, it is the same rule


def descend(loss, network, rule, *, clip_norm: float) -> None:
  """A step of an optimiser down the gradient of a loss, which is clipped if clip_norm is not 0."""
  rule.zero_grad()
  loss.backward()
  if clip_norm:
    torch.nn.utils.clip_grad_norm_(network.parameters(), clip_norm)
  rule.step()
