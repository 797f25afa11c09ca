"""Evaluation of segmentation: mIoU over whole images, by region, and predictions to look at."""

import collections

import jax
import numpy as np
from tqdm import tqdm

from gapjax.report.plots import neurons as pictures
from gapjax.tasks.images import IMAGENET
from gapjax.tasks.segmentation import REGIONS, VOID, check_sizes, iou
from gapjax.training import steps
from gapjax.training.devices import AXIS
from gapjax.training.evaluators import Evaluator


class SceneEvaluator(Evaluator):
  """mIoU of the evaluated split at its images' size, in float64 of exact counts.

  Images of one size share batches and a compiled step: exact whatever the sizes. With eval.padded
  all are filled up to one shape (one program, as a TPU wants it), with the mean colour; then
  padding enters the image-pooling branch and the borders' receptive fields, and mIoU differs a
  little.
  """

  def __init__(self, config, model, task, test_set, devices):
    if config.model.downsample == 'polyphase':  # before an epoch of training, not after
      check_sizes(model, test_set, padded=config.eval.padded)
    self.config, self.model, self.task, self.devices = config, model, task, devices
    self.scenes = test_set
    self.batch_size = -(-min(config.eval.batch_size, len(test_set)) // len(devices)) * len(devices)
    self.key = devices.replicate(steps.stream(config.seed, steps.EVAL))
    self.step = devices.pmap(
      steps.make_eval_step(model, task, axis_name=AXIS),
      split=(False, False, False, False, False, True), donate=0)

  def during(self, state, *, stop=None) -> dict | None:
    return self.measure(state, stop=stop)

  def final(self, state, *, stop=None, progress=False) -> dict | None:
    return self.measure(state, stop=stop, progress=progress)

  def measure(self, state, *, stop=None, progress=False) -> dict | None:
    """{'accuracy' (of pixels), 'loss', 'miou', 'miou_left' and so on, 'per_class'}.

    A class that does not occur is None in 'per_class', (K,). None when `stop` was requested.
    """
    k, totals, number = self.task.num_classes, None, 0
    zeros = {'matrix': np.zeros((len(REGIONS), k, k), np.int32),
             'loss': np.zeros((), self.task.dtype), 'count': np.zeros((), np.int32)}
    with tqdm(total=len(self.scenes), unit='img', desc='evaluate', leave=False,
              disable=not progress) as bar:
      for batch, n in scene_batches(self.scenes, self.batch_size, padded=self.config.eval.padded):
        if stop is not None and stop.requested:
          return None
        counts = self.devices.to_host(self.step(
          self.devices.replicate(zeros), state, self.key, {}, {'number': np.int32(number)},
          self.devices.split(batch)))
        # A batch fits int32; the sum over a set (6e9 pixels in Cityscapes) does not.
        counts = {name: value.astype(np.float64 if name == 'loss' else np.int64)
                  for name, value in counts.items()}
        totals = counts if totals is None else jax.tree.map(np.add, totals, counts)
        number += 1
        bar.update(n)
    return self._measures(totals)

  @staticmethod
  def _measures(totals):
    matrices = dict(zip(REGIONS, totals['matrix'], strict=True))
    per_class, miou = iou(matrices['all'])
    regions = {f'miou_{name}': iou(matrix)[1] for name, matrix in matrices.items() if name != 'all'}
    found = {'accuracy': float(np.trace(matrices['all']) / matrices['all'].sum()),
             'loss': float(totals['loss'] / totals['count']), 'miou': miou, **regions}
    return {**{name: value if np.isfinite(value) else None for name, value in found.items()},
            'per_class': [None if np.isnan(value) else float(value) for value in per_class]}

  def save_pictures(self, state, workdir, count: int = 4) -> None:
    """`predictions.png`: scenes from the whole split, their labels and the network's classes."""
    chosen = np.linspace(0, len(self.scenes) - 1, min(count, len(self.scenes))).astype(int)
    examples = [self.scenes[int(i)] for i in chosen]
    variables = self.devices.to_host({'params': state.params, 'batch_stats': state.batch_stats})

    @jax.jit
    def predict(variables, image):
      logits, _ = self.model.apply(variables, self.task.normalised(image)[None], train=False)
      return logits[0].argmax(-1)

    names = self.scenes.class_names
    pictures.side_by_side(
      [{'image': e['image'], 'truth': e['label'].astype(int),
        'prediction': np.asarray(predict(variables, e['image']))} for e in examples],
      workdir / 'predictions.png', num_classes=len(names), names=names,
      colors=self.scenes.palette / 255)

  def summary(self, final: dict, evaluations: list[dict]) -> dict:
    best = max(evaluations, key=lambda line: line['miou'])
    names = self.scenes.class_names
    return {'final': _named(final), 'best': {'miou_best': best['miou'], 'step': best['step']},
            'per_class': dict(zip(names, final['per_class'], strict=True))}

  def report(self, state) -> dict:
    """All metrics of a checkpoint."""
    final = self.measure(state, progress=True)
    return {**_named(final), 'loss': final['loss'], 'per_class': final['per_class']}


def _named(line):
  """The numbers of an evaluation by the names that summaries and tables give them."""
  return {'pixel_accuracy': line['accuracy'], **{name: value for name, value in line.items()
                                                 if name.startswith('miou')}}


def scene_batches(scenes, batch_size: int, *, padded: bool = False):
  """Yields (batch, how many scenes it holds), every scene once.

  batch: 'images' (batch_size, h, w, 3) uint8, 'labels' (batch_size, h, w) uint8, 'size'
  (batch_size, 2) int32, each image's own. Scenes of one size share batches; if `padded`, all have
  the shape of the largest ones. What is filled up is mean colour and void.
  """
  shape, waiting = None, collections.defaultdict(list)
  if padded:
    shape = tuple(np.max([scenes[i]['label'].shape for i in range(len(scenes))], 0).tolist())
  for i in range(len(scenes)):
    scene = scenes[i]
    bucket = waiting[shape or scene['label'].shape]
    bucket.append(scene)
    if len(bucket) == batch_size:
      yield _stack(bucket, batch_size, shape), batch_size
      bucket.clear()
  for bucket in waiting.values():
    if bucket:
      yield _stack(bucket, batch_size, shape), len(bucket)


def _stack(bucket, batch_size, shape):
  h, w = shape or bucket[0]['label'].shape
  images = np.empty((batch_size, h, w, 3), np.uint8)
  images[:] = np.round(255 * np.array(IMAGENET[0]))
  labels = np.full((batch_size, h, w), VOID, np.uint8)
  sizes = np.full((batch_size, 2), (h, w), np.int32)
  for i, scene in enumerate(bucket):
    sizes[i] = n, m = scene['label'].shape
    images[i, :n, :m], labels[i, :n, :m] = scene['image'], scene['label']
  return {'images': images, 'labels': labels, 'size': sizes}
