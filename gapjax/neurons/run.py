"""The verbs `rank` and `attack`: the position channels of a finished run, on its own data."""

import dataclasses
import itertools
import logging
from typing import NamedTuple

import jax
import numpy as np

from gapjax import config as configs
from gapjax import paths
from gapjax.data import load_scenes, sheet
from gapjax.errors import UsageError, check_choice
from gapjax.neurons import attack, network, rank, sweeps, yardstick
from gapjax.tasks.canvas import every_location
from gapjax.tasks.images import index_batches
from gapjax.tasks.segmentation import (
  check_labels,
  object_classes,
  region,
  scene_batches,
  spread_out,
)
from gapjax.training.evaluate import FinishedRun, open_run

log = logging.getLogger(__name__)

RANKING, YARDSTICK, SWEEP = 'ranking.json', 'ranking_yardstick.json', 'attack.json'
SIDES = ('left', 'right')
CENTRED = ('left_centred', 'right_centred')


class Ranking(NamedTuple):
  """The channels of a run in order.

  Attributes:
    orders: {'overall', region or region_centred: (c,) channels, first the one that encodes most}.
    activations: {'left': (n, c), 'right': (m, c)}, the mean activations of the images that have
      the object there; empty unless both are ranked.
    yardsticks: {order: what its scores are measured by}, of those ranked here by two images or
      more; centred, where there are two others, too.
  """
  orders: dict[str, np.ndarray]
  activations: dict[str, np.ndarray]
  yardsticks: dict[str, yardstick.Yardstick]


class Attack(NamedTuple):
  """What removing the channels of a ranking cost; chance: {metric: fraction that guessing gets}."""
  ranking: Ranking
  sweep: sweeps.Sweep
  chance: dict[str, float]


def rank_run(workdir, *, data_dir=None, regions=SIDES, ids=None, neurons=()) -> Ranking:
  """Ranks the channels of a run's last stage, overall and by region.

  A region's ranking is the paper's, z - z' over its images. 'REGION_centred' is what that has over
  the same mean over all images: a mirrored street is another street whatever stands where, and
  that change, common to all images, is no position of the object.

  Writes `ranking.json`, the authors' format, and `ranking_yardstick.json`, whose records say the
  `step` of the checkpoint.

  Args:
    workdir: of a segmentation or canvas run.
    data_dir: where datasets are; None is TFDS' default.
    regions: names or rectangles 'TOP,LEFT,BOTTOM,RIGHT' in fractions.
    ids: {region: list of image ids} to rank by, in place of the masks.
    neurons: flags '--config.neurons.FIELD=VALUE' that set other values than the run's.

  Raises:
    UsageError: no checkpoint; a run of another task; no image for a region; a region that no mirror
      moves; no object of interest; a field or an id that is not there.
  """
  check_regions(regions, ids or {})
  subject = open_subject(workdir, data_dir, neurons)
  return rank_subject(subject, paths.of(workdir), regions, ids or {})


def check_regions(regions, ids) -> None:
  """Raises UsageError, before hours of work, for a region that no mirror moves, and for ids of
  another region or that are no list."""
  for name in regions:
    rank.mirror_axis(name)
  for name, chosen in ids.items():
    check_choice(name, regions, what='region of --ids')
    if not isinstance(chosen, list):
      raise UsageError(f'--ids: `{name}` is not a list of image ids: {chosen!r}; the file should '
                       f'look like {{"{name}": ["ID", ...]}}')


def rank_subject(subject, workdir, regions, ids) -> Ranking:
  """`rank_run` of a Subject, or of what has its images, limit, step, features, batches and choose.
  """
  most = min(subject.limit or len(subject.images), len(subject.images))
  chosen = {name: subject.choose(name, limit=subject.limit, ids=ids.get(name)) for name in regions}
  features = subject.features
  needed = sorted({*range(most), *itertools.chain(*chosen.values())})  # each scene once a mirror
  by_axis = {axis: np.concatenate(list(rank.differences(
    features, subject.batches(needed), axis=axis)))  # (needed, c)
    for axis in dict.fromkeys(['horizontal', *map(rank.mirror_axis, regions)])}
  sizes = np.abs(by_axis['horizontal'][:most])
  scores, measured, masks = {'overall': sizes.mean(0)}, {}, {}
  everywhere = np.arange(len(needed)) < most
  if most > 1:
    some = np.unique(np.linspace(0, most - 1, min(most, yardstick.SHIFTED)).round().astype(int))
    moved = np.concatenate(list(yardstick.shifts(features, subject.batches(some))))
    measured['overall'] = yardstick.measure(
      sizes, moved=moved, averages=rank.mean_activations(features, subject.batches(some)),
      some=some)
  for name, indices in chosen.items():
    log.info('%s: %d images', name, len(indices))
    differences, inside = by_axis[rank.mirror_axis(name)], np.searchsorted(needed, indices)
    scores[name] = differences[inside].mean(0)
    masks[name] = np.isin(np.arange(len(needed)), inside)
    scores[f'{name}_centred'] = scores[name] - differences[:most].mean(0)
    if len(indices) > 1:
      measured[name] = yardstick.measure(differences[inside])
      if len(set(range(most)) - set(indices)) > 1:
        measured[f'{name}_centred'] = yardstick.centred(differences, masks[name], everywhere)
  orders, activations = {name: rank.order(values) for name, values in scores.items()}, {}
  with paths.kept({name: order.tolist() for name, order in orders.items()}):
    rank.save(workdir / RANKING, **orders)
    yardstick.write_json(workdir / YARDSTICK, measured, step=subject.step)
  if set(SIDES) <= set(regions):
    log.info('scores of left and right, opposite if they tell the sides apart, correlate by %+.2f, '
             'centred by %+.2f (%+.2f by chance, as both are less the same mean)',
             *(rank.correlation(*(scores[name] for name in pair)) for pair in (SIDES, CENTRED)),
             yardstick.chance_correlation(*(masks[name] for name in SIDES), everywhere))
    activations = {name: rank.mean_activations(features, subject.batches(chosen[name]))
                   for name in SIDES}
  return Ranking(orders, activations, measured)


def attack_run(workdir, *, data_dir=None, ranking=None, regions=None, neurons=()) -> Attack:
  """Removes channels of a run's last stage, by rank and at random, and measures what is lost.

  Ranks first unless a ranking is given. Writes `attack.json`, whose records say the `step` of the
  checkpoint (the report shows those of a finished run alone), `attack.csv`, and for segmentation
  `attack_scenes.png`: predictions before and after.

  Args:
    workdir: of a segmentation or canvas run.
    data_dir: where datasets are; None is TFDS' default.
    ranking: a file in the authors' format, or NAME=FILE to call its one list so; None ranks this
      checkpoint, overall, left and right.
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
  subject = open_subject(workdir, data_dir, neurons)
  if regions and isinstance(subject, CanvasSubject):
    raise UsageError('--regions: a network that classifies has one answer an image; leave it out')
  c, channels = subject.config.neurons, subject.num_channels
  called, path = paths.named(ranking)
  ranked = (Ranking(rank.load(path, num_channels=channels, called=called), {}, {}) if ranking
            else rank_subject(subject, workdir, SIDES, {}))
  if 'random' in ranked.orders:
    raise UsageError(f'{ranking}: `random` is the name of the baseline; rename that list')
  orders = {**ranked.orders, 'random': attack.random_orders(channels, c.random_orders,
                                                            seed=subject.config.seed)}
  sweep = subject.sweep(orders=orders, counts=subject.counts(c.counts), regions=regions)
  with paths.kept(sweep.records()):
    sweeps.write_json(workdir / SWEEP, sweep, step=subject.run.step)
    sweeps.write_csv(workdir / 'attack.csv', sweep)
  scenes = workdir / 'attack_scenes.png'
  if scenes.exists():  # of an earlier attack: this one may have none to draw
    scenes.unlink()
  if rows := subject.lost(sweep, orders):
    sheet.scenes(rows, class_names=subject.run.test_set.class_names,
                 palette=subject.run.test_set.palette).save(scenes)
  return Attack(ranked, sweep, subject.chance)


def open_subject(workdir, data_dir, neurons) -> 'Subject':
  """A finished run as its channels are ranked and removed; arguments and errors: `rank_run`'s."""
  paths.check_writable(workdir)
  run = open_run(workdir, data_dir=data_dir)
  run = dataclasses.replace(run, config=configs.with_fields(run.config, neurons, of='neurons.'))
  check_choice(run.config.task, SUBJECTS, what='task to rank channels of')
  return SUBJECTS[run.config.task](run, data_dir)


class Subject:
  """A run as ranking and attack see it: its network, and images with a mask of the object.

  Attributes:
    network: cut behind the last stage.
    images: those that rank the channels, as the dataset has them.
    limit: at most so many of them, and of each region; None is all.
    step: of the checkpoint.
    chance: what guessing gets, {metric: fraction}, where it is known.
  """

  def __init__(self, run: FinishedRun):
    self.chance = {}
    self.run, self.config, self.task = run, run.config, run.task
    self.limit, self.step = run.config.neurons.images or None, run.step
    # On the device once, not at every call.
    self.variables = jax.device_put({'params': run.state.params,
                                     'batch_stats': run.state.batch_stats})

  def features(self, images):
    """(b, h, w, 3) -> (b, h', w', c)."""
    return self.network.features(images)[self.network.stage]

  @property
  def num_channels(self) -> int:
    image = next(self.batches([0]))
    return jax.eval_shape(lambda: self.features(image)).shape[-1]

  def counts(self, number: int) -> list[int]:
    """That many N in equal steps, up to the share neurons.largest of the channels."""
    largest = self.config.neurons.largest * self.num_channels
    return np.unique(np.linspace(0, largest, number + 1).round().astype(int))[1:].tolist()

  def chosen(self, masks, classes, *, region, limit=None) -> list[int]:
    """rank.choose with the run's settings."""
    c = self.config.neurons
    return rank.choose(masks, region=region, classes=classes, limit=limit,
                       least_area=c.least_area, purity=c.purity)

  def lost(self, sweep, orders) -> list[dict]:
    """Scenes before and after channels are removed, as sheet.scenes takes them: none here."""
    return []


class SceneSubject(Subject):
  """A segmentation network; the object is what neurons.classes names."""

  def __init__(self, run, data_dir):
    super().__init__(run)
    self.network = network.deeplab(run.model, self.variables)
    c, names = self.config, run.test_set.class_names
    if not c.neurons.classes:
      raise UsageError('neurons.classes names no object of interest; give '
                       f'--config.neurons.classes="(\'{names[-1]}\',)": {c.data.name} has '
                       f'{", ".join(names)}')
    self.classes = object_classes(c.neurons.classes, names, dataset=c.data.name)
    self.images = load_scenes(c.data.name, split=c.neurons.split, data_dir=data_dir,
                              image_size=c.data.image_size or None)

  def choose(self, region, *, limit, ids=None) -> list[int]:
    return (self.chosen(self.images, self.classes, region=region, limit=limit) if ids is None else
            rank.with_ids(self.images, ids))

  def batches(self, indices, size: int = 8):
    """The images of scenes, those of one size that follow each other together."""
    images = (self.normalised(self.images[int(i)]['image']) for i in indices)
    for _, same in itertools.groupby(images, key=np.shape):
      while batch := list(itertools.islice(same, size)):
        yield np.stack(batch)

  def normalised(self, images):
    return np.asarray(self.task.normalised(images), np.float32)

  def sweep(self, *, orders, counts, regions):
    check_labels(self.run.test_set)
    batches = ({**batch, 'images': self.normalised(batch['images'])} for batch, _ in
               scene_batches(self.run.test_set, self.config.eval.batch_size,
                             fill=self.task.fill, padded=self.config.eval.padded))
    return attack.sweep(self.network, batches, orders=orders, counts=counts,
                        regions=regions or attack.ATTACK_REGIONS)

  def lost(self, sweep, orders) -> list[dict]:
    """Predictions without left and without right channels, of evaluated scenes in equal distances:
    of the two pairs of rankings and all N, where the sides suffer most unequally in the sweep."""
    halves = [sweep.metrics.get(f'miou_{side}') for side in SIDES]
    pairs = [pair for pair in (SIDES, CENTRED) if set(pair) <= set(orders)]
    if not pairs or None in halves:
      return []

    def gain(pair):  # for each N but 0: what an order takes from its own half more than the other
      (left, right), (there, here) = halves, pair
      return (right[there][0] - left[there][0] + left[here][0] - right[here][0])[1:]

    pair = max(pairs, key=lambda pair: gain(pair).max())
    count = sweep.counts[1 + int(np.argmax(gain(pair)))]
    removed = {'prediction': (), **{
      f'without {count} {name.replace("_", " ")}': orders[name][:count] for name in pair}}
    rows = []
    for scene in spread_out(self.run.test_set):
      features = self.network.features(self.normalised(scene['image'])[None])
      rows.append({'image': scene['image'], 'truth': scene['label'], **{
        title: np.asarray(self.network.without(features, channels))[0]
        for title, channels in removed.items()}})
    return rows


class CanvasSubject(Subject):
  """GAPNet or PermuteNet; the object is the image on its canvas."""

  def __init__(self, run, data_dir):
    super().__init__(run)
    self.network = network.classifier(run.model, self.variables, seed=self.config.seed)
    self.images, k = run.train_set.images, self.task.grid
    self.locations = np.random.default_rng(self.config.seed).integers(k * k, size=len(self.images))
    self.canvases = jax.jit(self.task.canvases)
    self.metric = f'{self.task.target}_accuracy'
    self.chance = {self.metric: 1 / self.task.num_classes}

  def mask(self, location) -> np.ndarray:
    """The object at one location: (k * s, k * s) of 0 and 1."""
    k = self.task.grid
    chosen = np.arange(k * k).reshape(k, k) == location
    return np.kron(chosen, np.ones(self.images.shape[1:3])).astype(np.uint8)

  def choose(self, region, *, limit, ids=None) -> list[int]:
    if ids is not None:
      return rank.with_ids([{'id': i} for i in range(len(self.images))], ids)
    masks = [{'label': self.mask(location)} for location in range(self.task.num_locations)]
    locations = self.chosen(masks, [1], region=region)  # images at one location share a mask
    return np.flatnonzero(np.isin(self.locations, locations))[:limit].tolist()

  def batches(self, indices, size: int = 48):
    """Whole batches and the rest one by one: two compiled programs, however many images."""
    indices = np.asarray(indices)
    whole = len(indices) // size * size
    for part in (*indices[:whole].reshape(-1, size), *indices[whole:, None]):
      yield self.canvases(self.images[part], self.locations[part])

  def sweep(self, *, orders, counts, regions):
    """Accuracy of the run's target, every test image at every place."""
    data = self.run.test_set
    index, location = every_location(len(data), self.task.num_locations)

    def batches():
      for batch, _ in index_batches({'index': index, 'location': location},
                                    self.config.eval.batch_size):
        yield {'images': self.canvases(data.images[batch['index']], batch['location']),
               'mask': batch['mask'],
               'labels': (batch['location'] if self.task.target == 'location'
                          else data.labels[batch['index']])}

    return attack.accuracy_sweep(self.network, batches(), orders=orders, counts=counts,
                                 metric=self.metric)


SUBJECTS = {'segmentation': SceneSubject, 'canvas': CanvasSubject}
