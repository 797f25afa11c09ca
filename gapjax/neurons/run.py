"""The verbs `rank` and `attack`: the position channels of a finished run, on its own data."""

import itertools
import logging
import pathlib

import jax
import numpy as np

from gapjax.data import load_scenes
from gapjax.errors import UsageError, check_choice
from gapjax.evaluate import Run, open_run
from gapjax.evaluators import every_location
from gapjax.neurons import attack, network, pictures, rank
from gapjax.scene_evaluator import scene_batches

log = logging.getLogger(__name__)

RANKING, SWEEP = 'ranking.json', 'attack.json'
SIDES = ('left', 'right')


def rank_run(workdir, *, data_dir=None, regions=SIDES, ids=None) -> dict[str, np.ndarray]:
  """Ranks the channels of a run's last stage, overall and by region.

  Writes `ranking.json`, the authors' format, and for left and right `activations.png`: the mean
  activation of their top channels with the object on either side.

  Args:
    workdir: of a segmentation or canvas run.
    data_dir: where datasets are; None is TFDS' default.
    regions: names or rectangles 'TOP,LEFT,BOTTOM,RIGHT' in fractions.
    ids: {region: list of image ids} to rank by, in place of the masks.

  Returns:
    {'overall' or region: (c,) channels, first the one that encodes most}.

  Raises:
    UsageError: no checkpoint; no image for a region; a region that no mirror moves.
  """
  return _rank(_subject(open_run(workdir, data_dir=data_dir), data_dir), pathlib.Path(workdir),
               regions, ids or {})


def _rank(subject, workdir, regions, ids):
  n = subject.config.neurons.images or None
  chosen = {name: subject.choose(name, limit=n, ids=ids.get(name)) for name in regions}
  features = subject.features
  orders = {'overall': rank.order(rank.overall(features, subject.batches(range(n or len(
    subject.scenes)))))}
  for name, indices in chosen.items():
    log.info('%s: %d images', name, len(indices))
    orders[name] = rank.order(rank.by_region(features, subject.batches(indices), region=name))
  rank.save(workdir / RANKING, **orders)
  if set(SIDES) <= set(regions):
    pictures.activations(
      {name: rank.mean_activations(features, subject.batches(chosen[name])) for name in SIDES},
      workdir / 'activations.png', channels={name: orders[name] for name in SIDES})
  return orders


def attack_run(workdir, *, data_dir=None, ranking=None,
               regions=attack.ATTACK_REGIONS) -> attack.Sweep:
  """Removes channels of a run's last stage, by rank and at random, and measures what is lost.

  Ranks first where there is no ranking. Writes `attack.json`, `attack.csv`, the curves
  `attack.png`, and for segmentation `attack_scenes.png`: predictions before and after.

  Args:
    workdir: of a segmentation or canvas run.
    data_dir: where datasets are; None is TFDS' default.
    ranking: a file in the authors' format; None is `workdir/ranking.json`.
    regions: segmentation: where mIoU is measured, names or rectangles.

  Raises:
    UsageError: no checkpoint; a ranking of another network; an unknown region.
  """
  workdir = pathlib.Path(workdir)
  subject = _subject(open_run(workdir, data_dir=data_dir), data_dir)
  c, channels = subject.config.neurons, subject.num_channels
  path = pathlib.Path(ranking) if ranking else workdir / RANKING
  if ranking or path.exists():
    orders = rank.load(path, num_channels=channels)
  else:
    orders = _rank(subject, workdir, SIDES, {})
  orders['random'] = attack.random_orders(channels, c.random_orders, seed=subject.config.seed)
  counts = np.unique(np.linspace(0, c.largest * channels, c.counts + 1).round().astype(int))[1:]
  sweep = subject.sweep(orders=orders, counts=counts.tolist(), regions=regions)
  attack.write_json(workdir / SWEEP, sweep)
  attack.write_csv(workdir / 'attack.csv', sweep)
  pictures.curves(sweep, workdir / 'attack.png')
  subject.draw(sweep, orders, workdir / 'attack_scenes.png')
  return sweep


def _subject(run, data_dir):
  check_choice(run.config.task, ('segmentation', 'canvas'), what='task to rank channels of')
  return (SceneSubject if run.config.task == 'segmentation' else CanvasSubject)(run, data_dir)


class Subject:
  """A run as ranking and attack see it: its network, and images with a mask of the object.

  Attributes:
    network: cut behind the last stage.
    scenes: a sequence of dicts 'image' (h, w, 3) normalised, 'label' (h, w) and 'id'.
    classes: the labels of the object of interest.
  """

  def __init__(self, run: Run):
    self.run, self.config, self.task = run, run.config, run.task
    self.variables = {'params': run.state.params, 'batch_stats': run.state.batch_stats}

  def features(self, images):
    """(b, h, w, 3) -> (b, h', w', c)."""
    return self.network.features(images)[self.network.stage]

  @property
  def num_channels(self) -> int:
    image = self.scenes[0]['image'][None]
    return jax.eval_shape(lambda: self.features(image)).shape[-1]

  def choose(self, region, *, limit, ids=None) -> list[int]:
    if ids is not None:
      return rank.with_ids(self.scenes, ids)
    c = self.config.neurons
    return rank.choose(self.scenes, region=region, classes=self.classes, limit=limit,
                       least_area=c.least_area, purity=c.purity)

  def batches(self, indices, size: int = 8):
    """The images of scenes, those of one size that follow each other together."""
    images = (self.scenes[int(i)]['image'] for i in indices)
    for _, same in itertools.groupby(images, key=np.shape):
      while batch := list(itertools.islice(same, size)):
        yield np.stack(batch)

  def draw(self, sweep, orders, path) -> None:
    """A picture of what was lost: nothing here."""


class Mapped:
  """A sequence whose items are made when they are asked for."""

  def __init__(self, length, make):
    self._length, self._make = length, make

  def __len__(self):
    return self._length

  def __getitem__(self, i):
    if not 0 <= i < self._length:
      raise IndexError(i)
    return self._make(i)


class SceneSubject(Subject):
  """A segmentation network; the object is what neurons.classes names."""

  def __init__(self, run, data_dir):
    super().__init__(run)
    self.network = network.deeplab(run.model, self.variables)
    c, known = self.config, run.test_set.class_names
    if not c.neurons.classes:
      raise UsageError('neurons.classes names no object of interest: set it in the run\'s '
                       f'config.json; {c.data.name} has {", ".join(known)}')
    for name in c.neurons.classes:
      check_choice(name, known, what=f'class of {c.data.name}')
    self.classes = [known.index(name) for name in c.neurons.classes]
    scenes = load_scenes(c.data.name, split=c.neurons.split, data_dir=data_dir,
                         image_size=c.data.image_size or None)
    self.scenes = Mapped(len(scenes), lambda i: {
      **scenes[i], 'image': self.normalised(scenes[i]['image'])})

  def normalised(self, images):
    return np.asarray(self.task.normalised(images), np.float32)

  def sweep(self, *, orders, counts, regions):
    batches = ({**batch, 'images': self.normalised(batch['images'])} for batch, _ in
               scene_batches(self.run.test_set, self.config.eval.batch_size))
    return attack.sweep(self.network, batches, orders=orders, counts=counts, regions=regions)

  def draw(self, sweep, orders, path, rows: int = 4):
    """Predictions without left and right channels, at the N where their sides suffer most unequally
    in the sweep, of evaluated scenes in equal distances."""
    if not set(SIDES) <= set(orders) or not {f'miou_{side}' for side in SIDES} <= set(
        sweep.metrics):
      return
    left, right = ({side: sweep.metrics[f'miou_{half}'][side][0] for side in SIDES}
                   for half in SIDES)  # of the halves of the image, for every N
    gain = left['right'] - left['left'] + right['left'] - right['right']
    count = sweep.counts[int(np.argmax(gain))]
    test_set, table = self.run.test_set, []
    for i in np.linspace(0, len(test_set) - 1, rows).astype(int):
      scene = test_set[int(i)]
      features = self.network.features(self.normalised(scene['image'])[None])
      table.append({'image': scene['image'], 'truth': scene['label'].astype(int), **{
        title: np.asarray(self.network.without(features, removed))[0]
        for title, removed in (
          ('prediction', ()), (f'without {count} left channels', orders['left'][:count]),
          (f'without {count} right channels', orders['right'][:count]))}})
    pictures.side_by_side(table, path, num_classes=len(test_set.class_names),
                          names=test_set.class_names, colors=test_set.palette / 255)


class CanvasSubject(Subject):
  """GAPNet or PermuteNet; the object is the image on its canvas."""

  def __init__(self, run, data_dir):
    del data_dir  # the run's own images
    super().__init__(run)
    self.network = network.classifier(run.model, self.variables)
    self.classes, grid = [1], self.task.grid
    images = run.train_set.images
    side = images.shape[1]
    places = np.random.default_rng(self.config.seed).integers(grid * grid, size=len(images))

    def make(i):
      label = np.zeros((side * grid, side * grid), np.uint8)
      row, column = divmod(int(places[i]), grid)
      label[row * side:(row + 1) * side, column * side:(column + 1) * side] = 1
      return {'image': np.asarray(self.task.canvases(images[i][None], places[i:i + 1])[0]),
              'label': label, 'id': str(i)}

    self.scenes = Mapped(len(images), make)

  def sweep(self, *, orders, counts, regions):
    """Accuracy of the run's target, every test image at every place."""
    del regions  # a canvas has one answer
    data, target = self.run.test_set, self.task.target
    index, place = every_location(len(data), self.task.num_locations)
    size = self.config.eval.batch_size

    def batches():
      for start in range(0, len(index), size):
        here = np.arange(start, start + size)
        i, p = (x[np.minimum(here, len(index) - 1)] for x in (index, place))
        yield {'images': self.task.canvases(data.images[i], p), 'mask': here < len(index),
               'labels': p if target == 'location' else data.labels[i]}

    return attack.accuracy_sweep(self.network, batches(), orders=orders, counts=counts,
                                 metric=f'{target}_accuracy')
