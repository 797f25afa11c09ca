"""What a training step gets from the host: indices of images that lie on the device, or scenes.

A feed has `data`, placed on every device once; `batches(step)`, an endless iterator over the calls
from `step` on, each a tree of arrays (steps_per_call, batch_size, ...), of which a call that ends
early takes the first; `local`, whether these are the process' share of the batch alone; and
`save_samples(path)`.
"""

import itertools

import jax
import numpy as np

from gapjax.report.plots import base as plots
from gapjax.report.plots import neurons as pictures
from gapjax.tasks.images import IMAGENET
from gapjax.training import steps


class ImageFeed:
  """Images on the device, their indices from the host."""
  local = False

  def __init__(self, config, task, train_set, plan):
    self.config, self.task, self.train_set, self.plan = config, task, train_set, plan
    self.data = {'images': train_set.images, 'labels': train_set.labels}

  def batches(self, step: int):
    k = self.plan.steps_per_call
    return (self.plan.batch_indices(call.start, k) for call in self.plan.calls(step))

  def save_samples(self, path, count: int = 12) -> None:
    """A picture of the first training images, moved or placed at random as the network sees them.
    """
    task, train_set = self.task, self.train_set
    indices = np.arange(min(count, len(train_set)))
    examples = {name: values[indices] for name, values in self.data.items()}

    @jax.jit
    def draw(key):
      keys = jax.random.split(key, len(indices))
      return task.samples(keys, examples, indices)

    pictures, which, where = draw(steps.stream(self.config.seed, steps.SAMPLES))
    labels = [train_set.class_names[examples['labels'][i]] for i in which]
    if where is not None:
      labels = [f'{label} at {location}' for label, location in zip(labels, where, strict=True)]
    plots.canvas_samples(np.clip(np.asarray(pictures) * task.std + task.mean, 0, 1), labels=labels,
                         path=path, grid=task.grid)


class SceneFeed:
  """Scenes from disk, augmented by Grain on the host; a batch is a function of (seed, step).

  Every process reads and augments its own share of it.
  """
  local = True

  def __init__(self, config, train_set, plan):
    from gapjax.data.scenes import training_batches
    c = config.segmentation
    self.data, self.plan, self.scenes = {}, plan, train_set
    self.source = training_batches(
      train_set, batch_size=config.batch_size, seed=config.seed, crop_size=tuple(c.crop),
      scale=tuple(c.scale), flip=c.flip, fill=np.round(255 * np.array(IMAGENET[0])),
      num_hosts=jax.process_count(), host=jax.process_index())

  def batches(self, step: int):
    batches = iter(self.source.iterate(step))
    for call in self.plan.calls(step):
      taken = list(itertools.islice(batches, len(call)))
      filling = taken[-1:] * (self.plan.steps_per_call - len(call))
      yield jax.tree.map(lambda *x: np.stack(x), *taken, *filling)

  def save_samples(self, path, count: int = 6) -> None:
    """A picture of the first training crops and their labels."""
    batch, names = self.source.at(0), self.scenes.class_names
    pictures.side_by_side(
      [{'image': image, 'truth': label.astype(int)}
       for image, label in zip(batch['images'][:count], batch['labels'], strict=False)], path,
      num_classes=len(names), names=names, colors=self.scenes.palette / 255)
