"""The verbs `rank` and `attack`: the position channels of a finished run, on its own data."""

import dataclasses
import itertools
import logging

import jax
import numpy as np

from gapjax import config as configs
from gapjax import paths
from gapjax.data import load_scenes
from gapjax.errors import UsageError, check_choice
from gapjax.neurons import attack, network, rank
from gapjax.report.plots import neurons as pictures
from gapjax.tasks.segmentation import object_classes, region
from gapjax.training.evaluate import Run, open_run
from gapjax.training.evaluators import every_location
from gapjax.training.scene_evaluator import scene_batches

log = logging.getLogger(__name__)

RANKING, SWEEP = 'ranking.json', 'attack.json'
SIDES = ('left', 'right')
CENTRED = ('left_centred', 'right_centred')


def rank_run(workdir, *, data_dir=None, regions=SIDES, ids=None,
             neurons=()) -> dict[str, np.ndarray]:
  """Ranks the channels of a run's last stage, overall and by region.

  A region's ranking is the paper's, z - z' over its images. 'REGION_centred' is what that has over
  the same mean over all images: a mirrored street is another street whatever stands where, and
  that change, common to all images, is no position of the object.

  Writes `ranking.json`, the authors' format, and for left and right `activations.png`: the mean
  activation of their top channels with the object on either side.

  Args:
    workdir: of a segmentation or canvas run.
    data_dir: where datasets are; None is TFDS' default.
    regions: names or rectangles 'TOP,LEFT,BOTTOM,RIGHT' in fractions.
    ids: {region: list of image ids} to rank by, in place of the masks.
    neurons: flags '--config.neurons.FIELD=VALUE' that set other values than the run's.

  Returns:
    {'overall', region or region_centred: (c,) channels, first the one that encodes most}.

  Raises:
    UsageError: no checkpoint; no image for a region; a region that no mirror moves.
  """
  for name in regions:
    rank.mirror_axis(name)  # before hours of work, not after
  for name, chosen in (ids or {}).items():
    check_choice(name, regions, what='region of --ids')
    if not isinstance(chosen, list):
      raise UsageError(f'--ids: `{name}` is not a list of image ids: {chosen!r}')
  return _rank(_subject(workdir, data_dir, neurons), paths.of(workdir), regions, ids or {})


def _rank(subject, workdir, regions, ids):
  n = subject.config.neurons.images or None
  most = min(n or len(subject.scenes), len(subject.scenes))
  chosen = {name: subject.choose(name, limit=n, ids=ids.get(name)) for name in regions}
  features = subject.features
  needed = sorted({*range(most), *itertools.chain(*chosen.values())})  # each scene once a mirror
  found = {axis: np.concatenate(list(rank.differences(
    features, subject.batches(needed), axis=axis)))  # (needed, c)
    for axis in dict.fromkeys(['horizontal', *map(rank.mirror_axis, regions)])}
  scores = {'overall': np.abs(found['horizontal'][:most]).mean(0)}
  for name, indices in chosen.items():
    log.info('%s: %d images', name, len(indices))
    differences = found[rank.mirror_axis(name)]
    scores[name] = differences[np.searchsorted(needed, indices)].mean(0)
    scores[f'{name}_centred'] = scores[name] - differences[:most].mean(0)
  orders = {name: rank.order(values) for name, values in scores.items()}
  rank.save(workdir / RANKING, **orders)
  if set(SIDES) <= set(regions):
    log.info('scores of left and right, opposite if they tell the sides apart, correlate by %+.2f, '
             'centred by %+.2f', *(rank.correlation(*(scores[name] for name in pair))
                                   for pair in (SIDES, CENTRED)))
    pictures.activations(
      {name: rank.mean_activations(features, subject.batches(chosen[name])) for name in SIDES},
      workdir / 'activations.png', channels={
        name: orders[name] for name in (*SIDES, *CENTRED)})
  return orders


def attack_run(workdir, *, data_dir=None, ranking=None,
               regions=None, neurons=()) -> attack.Sweep:
  """Removes channels of a run's last stage, by rank and at random, and measures what is lost.

  Ranks first unless a ranking is given. Writes `attack.json`, whose records say the `step` of the
  checkpoint (the report shows those of a finished run alone), `attack.csv`, the curves
  `attack.png`, and for segmentation `attack_scenes.png`: predictions before and after.

  Args:
    workdir: of a segmentation or canvas run.
    data_dir: where datasets are; None is TFDS' default.
    ranking: a file in the authors' format; None ranks this checkpoint, overall, left and right.
    regions: segmentation: where mIoU is measured, names or rectangles; None for
      attack.ATTACK_REGIONS.
    neurons: flags '--config.neurons.FIELD=VALUE' that set other values than the run's.

  Raises:
    UsageError: no checkpoint; a ranking of another network; an unknown region, or regions of a
      network that classifies.
  """
  workdir = paths.of(workdir)
  for name in regions or ():
    region(name)  # before hours of work, not after
  subject = _subject(workdir, data_dir, neurons)
  if regions and isinstance(subject, CanvasSubject):
    raise UsageError('--regions: a network that classifies has one answer an image; leave it out')
  c, channels = subject.config.neurons, subject.num_channels
  orders = (rank.load(ranking, num_channels=channels) if ranking
            else _rank(subject, workdir, SIDES, {}))
  if 'random' in orders:
    raise UsageError(f'{ranking}: `random` is the name of the baseline; rename that list')
  orders['random'] = attack.random_orders(channels, c.random_orders, seed=subject.config.seed)
  counts = np.unique(np.linspace(0, c.largest * channels, c.counts + 1).round().astype(int))[1:]
  sweep = subject.sweep(orders=orders, counts=counts.tolist(), regions=regions)
  attack.write_json(workdir / SWEEP, sweep, step=subject.run.step)
  attack.write_csv(workdir / 'attack.csv', sweep)
  pictures.curves(sweep, workdir / 'attack.png', chance=subject.chance)
  scenes = workdir / 'attack_scenes.png'
  if scenes.exists():  # of an earlier attack: this one may have none to draw
    scenes.unlink()
  subject.draw(sweep, orders, scenes)
  return sweep


def _subject(workdir, data_dir, neurons):
  run = open_run(workdir, data_dir=data_dir)
  run = dataclasses.replace(run, config=configs.with_fields(run.config, neurons, of='neurons.'))
  check_choice(run.config.task, ('segmentation', 'canvas'), what='task to rank channels of')
  return (SceneSubject if run.config.task == 'segmentation' else CanvasSubject)(run, data_dir)


class Subject:
  """A run as ranking and attack see it: its network, and images with a mask of the object.

  Attributes:
    network: cut behind the last stage.
    scenes: a sequence of dicts 'image' (h, w, 3), normalised.
    masks: a sequence of dicts 'label' (h, w) and 'id', of the same scenes.
    classes: the labels of the object of interest.
    chance: what guessing gets, {metric: fraction}, where it is known.
  """

  def __init__(self, run: Run):
    self.chance = {}
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
      return rank.with_ids(self.masks, ids)
    c = self.config.neurons
    return rank.choose(self.masks, region=region, classes=self.classes, limit=limit,
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
      raise UsageError('neurons.classes names no object of interest; give '
                       f'--config.neurons.classes="(\'{known[-1]}\',)": {c.data.name} has '
                       f'{", ".join(known)}')
    self.classes = object_classes(c.neurons.classes, known, dataset=c.data.name)
    scenes = load_scenes(c.data.name, split=c.neurons.split, data_dir=data_dir,
                         image_size=c.data.image_size or None)
    self.masks = scenes
    self.scenes = Mapped(len(scenes), lambda i: {'image': self.normalised(scenes[i]['image'])})

  def normalised(self, images):
    return np.asarray(self.task.normalised(images), np.float32)

  def sweep(self, *, orders, counts, regions):
    batches = ({**batch, 'images': self.normalised(batch['images'])} for batch, _ in
               scene_batches(self.run.test_set, self.config.eval.batch_size,
                             padded=self.config.eval.padded))
    return attack.sweep(self.network, batches, orders=orders, counts=counts,
                        regions=regions or attack.ATTACK_REGIONS)

  def draw(self, sweep, orders, path, rows: int = 4):
    """Predictions without left and without right channels, of evaluated scenes in equal distances:
    of the two pairs of rankings and all N, where the sides suffer most unequally in the sweep."""
    halves = [sweep.metrics.get(f'miou_{side}') for side in SIDES]
    pairs = [pair for pair in (SIDES, CENTRED) if set(pair) <= set(orders)]
    if not pairs or None in halves:
      return

    def gain(pair):  # for each N but 0: what an order takes from its own half more than the other
      (left, right), (there, here) = halves, pair
      return (right[there][0] - left[there][0] + left[here][0] - right[here][0])[1:]

    pair = max(pairs, key=lambda pair: gain(pair).max())
    count = sweep.counts[1 + int(np.argmax(gain(pair)))]
    test_set, table = self.run.test_set, []
    for i in np.linspace(0, len(test_set) - 1, rows).astype(int):
      scene = test_set[int(i)]
      features = self.network.features(self.normalised(scene['image'])[None])
      removed = {'prediction': (), **{
        f'without {count} {name.replace("_", " ")}': orders[name][:count] for name in pair}}
      table.append({'image': scene['image'], 'truth': scene['label'].astype(int), **{
        title: np.asarray(self.network.without(features, channels))[0]
        for title, channels in removed.items()}})
    pictures.side_by_side(table, path, num_classes=len(test_set.class_names),
                          names=test_set.class_names, colors=test_set.palette / 255)


class CanvasSubject(Subject):
  """GAPNet or PermuteNet; the object is the image on its canvas."""

  def __init__(self, run, data_dir):
    del data_dir  # the run's own images
    super().__init__(run)
    self.network = network.classifier(run.model, self.variables, seed=self.config.seed)
    self.classes, self.images, k = [1], run.train_set.images, self.task.grid
    self.places = np.random.default_rng(self.config.seed).integers(k * k, size=len(self.images))
    self.canvases = jax.jit(self.task.canvases)
    self.metric = f'{self.task.target}_accuracy'
    self.chance = {self.metric: 1 / self.task.num_classes}
    self.masks = Mapped(len(self.images), lambda i: {'label': self.mask(self.places[i]),
                                                     'id': str(i)})
    self.scenes = Mapped(len(self.images), lambda i: {
      'image': np.asarray(self.canvases(self.images[i][None], self.places[i:i + 1])[0])})

  def mask(self, place) -> np.ndarray:
    """The object at one place: (k * s, k * s) of 0 and 1."""
    k = self.task.grid
    there = np.arange(k * k).reshape(k, k) == place
    return np.kron(there, np.ones(self.images.shape[1:3])).astype(np.uint8)

  def choose(self, region, *, limit, ids=None) -> list[int]:
    if ids is not None:
      return super().choose(region, limit=limit, ids=ids)
    c, masks = self.config.neurons, [{'label': self.mask(p)} for p in range(self.task.grid ** 2)]
    places = rank.choose(masks, region=region, classes=self.classes, purity=c.purity,
                         least_area=c.least_area)  # images at one place have one mask
    return np.flatnonzero(np.isin(self.places, places))[:limit].tolist()

  def batches(self, indices, size: int = 48):
    """Whole batches and the rest one by one: two compiled programs, however many images."""
    indices = np.asarray(indices)
    whole = len(indices) // size * size
    for part in (*indices[:whole].reshape(-1, size), *indices[whole:, None]):
      yield self.canvases(self.images[part], self.places[part])

  def sweep(self, *, orders, counts, regions):
    """Accuracy of the run's target, every test image at every place."""
    data = self.run.test_set
    index, place = every_location(len(data), self.task.num_locations)
    size = self.config.eval.batch_size

    def batches():
      for start in range(0, len(index), size):
        here = np.arange(start, start + size)
        i, p = (x[np.minimum(here, len(index) - 1)] for x in (index, place))
        yield {'images': self.canvases(data.images[i], p), 'mask': here < len(index),
               'labels': p if self.task.target == 'location' else data.labels[i]}

    return attack.accuracy_sweep(self.network, batches(), orders=orders, counts=counts,
                                 metric=self.metric)
