"""How each task is evaluated: which test images, where they are put, what is made of the counts.

An evaluator has two protocols: `during`, run every few epochs of training, and `final`, run once on
the final weights. Both return a dict that becomes a line of metrics.jsonl, with the numbers
'accuracy' and 'loss' in it; `summary` makes the task's part of summary.json of those lines.
"""

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from gapjax.tasks.consistency import PROTOCOLS
from gapjax.tasks.metrics import EvalMetrics
from gapjax.training import steps
from gapjax.training.devices import AXIS

# s of protocol `circular`, as Chaman & Dokmanic 2021 measure APS: rolls of up to 3 pixels.
CIRCULAR_SHIFT = 3


class Evaluator:
  """Counts over test examples with one compiled step. No image is dropped or counted twice: the
  last batch is filled up and the filling masked.

  PermuteNet draws one permutation a batch here, as the authors' test loop does: its accuracy
  depends, within that noise, on eval.batch_size (rounded up to a multiple of the devices).
  """

  def __init__(self, config, model, task, test_set, devices):
    self.config, self.task, self.devices = config, task, devices
    self.num_images = len(test_set.images)
    n = len(devices)
    self.batch_size = -(-min(config.eval.batch_size, self.num_images) // n) * n
    self.data = devices.replicate({'images': test_set.images, 'labels': test_set.labels})
    self.key = devices.replicate(steps.stream(config.seed, steps.EVAL))
    self.step = devices.pmap(
      steps.make_eval_step(model, task, axis_name=AXIS),
      split=(False, False, False, False, False, True), donate=0)

  def save_pictures(self, state, workdir) -> None:
    """What else a finished run leaves to look at: nothing here."""

  def count(self, state, zeros, examples, *, common=(), stop=None, bar=None):
    """The totals, starting from `zeros`, over examples: a dict of arrays (n, ...), 'index' among
    them; `common` is the same for all. None when `stop` was requested on the way."""
    totals, n = self.devices.replicate(zeros), len(examples['index'])
    for number, start in enumerate(range(0, n, self.batch_size)):
      if stop is not None and stop.requested:
        return None
      here = np.arange(start, start + self.batch_size)
      inside = np.minimum(here, n - 1)
      batch = {name: values[inside].astype(np.int32) for name, values in examples.items()}
      totals = self.step(totals, state, self.key, self.data,
                         {**dict(common), 'number': np.int32(number)},
                         self.devices.split({**batch, 'mask': here < n}))
      if bar is not None:
        bar.update(min(self.batch_size, n - start))
    return self.devices.to_host(totals)


class CanvasEvaluator(Evaluator):
  """Location or image classification on a canvas (section 3)."""

  def during(self, state, *, stop=None):
    """The authors' protocol, once: every test image at a random location."""
    return self.random(state, passes=1, stop=stop)

  def final(self, state, *, stop=None, progress=False):
    return self.exact(state, stop=stop, progress=progress)

  def exact(self, state, *, stop=None, progress=False) -> dict | None:
    """Every test image at every location: {'accuracy', 'loss', 'per_location'}.

    None when `stop` was requested on the way.
    """
    index, location = every_location(self.num_images, self.task.num_locations)
    return self._run(state, index, location, stop=stop, progress=progress)

  def random(self, state, *, passes: int, stop=None, progress=False) -> dict | None:
    """The authors' protocol: every test image once a pass, each time at a random location."""
    index, location = random_locations(self.num_images, self.task.num_locations, passes=passes,
                                       seed=(self.config.seed, int(state.step)))
    return self._run(state, index, location, stop=stop, progress=progress)

  def _run(self, state, index, location, *, stop, progress):
    zeros = EvalMetrics.zeros(self.task.num_locations, self.task.dtype)
    with tqdm(total=len(index), unit='img', desc='evaluate', leave=False,
              disable=not progress) as bar:
      totals = self.count(state, zeros, {'index': index, 'location': location}, stop=stop, bar=bar)
    return totals and totals.compute()

  def summary(self, final: dict, evaluations: list[dict]) -> dict:
    name = f'{self.task.target}_accuracy'
    best = max(evaluations, key=lambda line: line['accuracy'])
    return {'final': {name: final['accuracy'], 'loss': final['loss']},
            'best': {f'{name}_best_random': best['accuracy'], 'step': best['step']},
            'per_location': final['per_location']}

  def report(self, state) -> dict:
    """All metrics of a checkpoint: the exact ones, and the authors' test script (k * k passes with
    random placement)."""
    name = f'{self.task.target}_accuracy'
    exact = self.exact(state, progress=True)
    random = self.random(state, passes=self.task.num_locations, progress=True)
    return {name: exact['accuracy'], f'{name}_random': random['accuracy'], 'loss': exact['loss'],
            'per_location': exact['per_location']}


class ShiftEvaluator(Evaluator):
  """Top-1 accuracy and shift consistency (section 4); protocols: tasks/consistency.py."""

  def __init__(self, config, model, task, test_set, devices):
    super().__init__(config, model, task, test_set, devices)
    images = jnp.zeros((1, *test_set.images.shape[1:]), task.dtype)
    (_, features), _ = jax.eval_shape(
      lambda: model.init_with_output(jax.random.key(0), images, train=False))
    self.num_channels = features['pooled'].shape[-1]

  def during(self, state, *, stop=None):
    """Top-1 of the images as they are, and the headline consistency."""
    return self._headline(state, stop=stop)

  def final(self, state, *, stop=None, progress=False) -> dict | None:
    """The same, consistency by the other protocols, and the curves and the map of _shifts."""
    n = self.num_images
    few = min(self.config.eval.shift_images or n, n)
    cells = len(self.task.map_offsets) ** 2
    curves = len(PROTOCOLS) * self.config.eval.max_shift
    others = self.other_protocols
    with tqdm(total=(2 + len(others)) * n + few * (curves + cells), unit='img', desc='evaluate',
              leave=False, disable=not progress) as bar:
      result = self._headline(state, stop=stop, bar=bar)
      for protocol, s in others.items():
        pairs = result and self._pairs(state, np.arange(n), protocol, s, stop=stop, bar=bar)
        result = pairs and {**result, f'consistency_{protocol}': _agreement(pairs)}
      shifts = result and self._shifts(state, few, stop=stop, bar=bar)
    return shifts and {**result, 'shifts': shifts}

  def _headline(self, state, **rest):
    everything, s = np.arange(self.num_images), self.config.eval.shift
    still = self._moved(state, everything, np.zeros((self.num_images, 1, 2)), 'pad', 0, **rest)
    if still is None:
      return None
    centre = still['deviation'] / self.num_images
    pairs = self._pairs(state, everything, 'pad', s, centre=centre, **rest)
    if pairs is None:
      return None
    # Variance of the moved images' features over images and views: their mean is near `centre`.
    views = 2 * self.num_images
    variance = pairs['square'] / views - np.square(pairs['deviation'] / views)  # (c,)
    distance = pairs['distance'] / (self.num_images * len(centre))
    return {'accuracy': float(still['correct'].sum() / still['count'].sum()),
            'loss': float(still['loss'] / still['count'].sum()),
            'consistency': _agreement(pairs),
            'feature_distance': float(distance / max(variance.mean(), np.finfo(np.float32).tiny))}

  def _shifts(self, state, few: int, **rest) -> dict | None:
    """On the first `few` test images: consistency by protocol for s = 1 .. eval.max_shift, and
    accuracy as a function of (dy, dx)."""
    images, protocols = np.arange(few), {}
    for protocol in PROTOCOLS:
      protocols[protocol] = []
      for s in range(1, self.config.eval.max_shift + 1):
        pairs = self._pairs(state, images, protocol, s, **rest)
        if pairs is None:
          return None
        protocols[protocol].append(_agreement(pairs))
    offsets = np.array(self.task.map_offsets)
    side = len(offsets)
    cell, index = np.divmod(np.arange(side * side * few), few)
    moves = offsets[np.stack(np.divmod(cell, side), -1)]  # (side * side * few, 2): dy, dx
    totals = self._moved(state, index, moves[:, None], 'pad', 0, cell=cell, **rest)
    if totals is None:
      return None
    return {'protocols': protocols, 'images': few, 'offsets': offsets.tolist(),
            'accuracy_map': (totals['correct'] / totals['count']).reshape(side, side).tolist()}

  def _pairs(self, state, index, protocol, s, **rest):
    """Two views of each image, with offsets that depend on (seed, protocol, s, image) alone."""
    draw = np.random.default_rng((self.config.seed, PROTOCOLS.index(protocol), s))
    offsets = draw.integers(-s, s, endpoint=True, size=(self.num_images, 2, 2))
    return self._moved(state, index, offsets[index], protocol, s, **rest)

  def _moved(self, state, index, offset, protocol, s, *, centre=None, cell=None, **rest):
    """Counts of the images index (n,), each moved by offset (n, v, 2)."""
    dtype, width = self.task.dtype, self.num_channels
    cells = np.zeros(len(self.task.map_offsets) ** 2, np.int32)
    zero, channels = np.zeros((), dtype), np.zeros(width, dtype)
    zeros = {'count': cells, 'correct': cells.copy(), 'agree': np.zeros((), np.int32),
             'loss': zero, 'distance': zero.copy(), 'deviation': channels,
             'square': channels.copy()}
    common = {'protocol': np.int32(PROTOCOLS.index(protocol)), 'max_shift': np.int32(s),
              'centre': np.zeros(width, dtype) if centre is None else centre.astype(dtype)}
    examples = {'index': index, 'offset': offset,
                'cell': np.zeros(len(index), int) if cell is None else cell}
    return self.count(state, zeros, examples, common=common, **rest)

  def summary(self, final: dict, evaluations: list[dict]) -> dict:
    best = max(evaluations, key=lambda line: line['accuracy'])
    return {'final': _named(final),
            'best': {'image_accuracy_best': best['accuracy'], 'step': best['step']},
            'shifts': {**final['shifts'], 'protocol': self.protocol}}

  def report(self, state) -> dict:
    """All metrics of a checkpoint."""
    final = self.final(state, progress=True)
    return {**_named(final), 'protocol': self.protocol, 'shifts': final['shifts']}

  @property
  def other_protocols(self) -> dict[str, int]:
    """Those beside the headline's that the final evaluation counts on all test images, and s."""
    return {'crop': self.config.eval.shift, 'circular': CIRCULAR_SHIFT}

  @property
  def protocol(self) -> str:
    """How the headline consistency was measured, for tables."""
    return f'pad, s = {self.config.eval.shift}'


def _named(line):
  """The numbers of an evaluation by the names that summaries and tables give them."""
  names = {'accuracy': 'image_accuracy', **{name: name for name in (
    'consistency', 'consistency_crop', 'consistency_circular', 'feature_distance', 'loss')}}
  return {new: line[old] for old, new in names.items() if old in line}


def _agreement(pairs) -> float:
  """The share of images whose two views get the same class."""
  return float(pairs['agree'] / pairs['count'].sum())


def every_location(num_images: int, num_locations: int) -> tuple[np.ndarray, np.ndarray]:
  """Every (image, location) once: two arrays (num_images * num_locations,)."""
  return np.divmod(np.arange(num_images * num_locations), num_locations)


def random_locations(num_images: int, num_locations: int, *, passes: int,
                     seed) -> tuple[np.ndarray, np.ndarray]:
  """Every image `passes` times, each at a uniform location: two arrays (passes * num_images,)."""
  index = np.tile(np.arange(num_images), passes)
  return index, np.random.default_rng(seed).integers(num_locations, size=len(index))
