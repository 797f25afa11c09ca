"""The attack on CamVid by every protocol: which scenes rank the channels, and by which objects.

    gapjax reproduce attack --scale=pretrained --seeds=2 --workdir=RUNS
    python benchmarks/attack_protocols.py RUNS/cells/deeplabv3plus/camvid/seed* [--data_dir=DIR]

Scenes: the training split, gapjax's choice, and the test split, which is attacked, the authors'.
Objects: pedestrians alone, cars alone, and pedestrians, cars or bicyclists. Left and right by the
signed mean of z - z' (the paper's), and by that less its mean over all scenes of the split
(centred). Every test scene is evaluated by one sweep of all these orders and five random ones.
Writes results/attack_protocols/seedN.json; some minutes a network on 2 cores.
"""

import argparse
import logging
import pathlib

import numpy as np

from gapjax import paths
from gapjax.neurons import attack, rank, run
from gapjax.report.compared import HALVES
from gapjax.report.parts import number
from gapjax.report.render import Table

FOLDER = pathlib.Path(__file__).parent.parent / 'results' / 'attack_protocols'
SPLITS = {'train': 'training (gapjax)', 'test': 'test, attacked (the authors)'}
OBJECTS = {'pedestrians': ['pedestrian'], 'cars': ['car'],
           'all three': ['pedestrian', 'car', 'bicyclist']}
COUNTS = 5

log = logging.getLogger(__name__)


def orders_of(workdir, split, data_dir):
  """({order: channels}, {objects: {side: how many scenes}}) of a run by the scenes of a split."""
  subject = run.open_subject(workdir, data_dir, [f'--config.neurons.split={split}'])
  names, c = subject.run.test_set.class_names, subject.config.neurons
  differences = np.concatenate(list(rank.differences(
    subject.features, subject.batches(range(len(subject.images))))))  # (scenes, c)
  orders, scenes = {f'{split}/overall': rank.order(np.abs(differences).mean(0))}, {}
  for objects, classes in OBJECTS.items():
    for side in run.SIDES:
      inside = rank.choose(subject.images, region=side, classes=[*map(names.index, classes)],
                           least_area=c.least_area, purity=c.purity)
      scenes.setdefault(objects, {})[side] = len(inside)
      scores = differences[inside].mean(0)
      orders[f'{split}/{objects}/{side}'] = rank.order(scores)
      orders[f'{split}/{objects}/{side}_centred'] = rank.order(scores - differences.mean(0))
  return orders, scenes


def measure(workdir, data_dir):
  """What a file of results/attack_protocols says: mIoU by region, order and N."""
  orders, scenes = {}, {}
  for split in SPLITS:
    log.info('%s: ranking by %s', workdir, split)
    ranked, scenes[split] = orders_of(workdir, split, data_dir)
    orders.update(ranked)
  subject = run.open_subject(workdir, data_dir, [])
  channels, seed = subject.num_channels, subject.config.seed
  orders['random'] = attack.random_orders(channels, subject.config.neurons.random_orders, seed=seed)
  sweep = subject.sweep(orders=orders, counts=subject.counts(COUNTS),
                        regions=('all', 'left', 'right'))
  return {'seed': seed, 'step': subject.step, 'channels': channels, 'counts': sweep.counts,
          'scenes': scenes, 'metrics': {
            metric: {order: values.mean(0).round(5).tolist() for order, values in by_order.items()}
            for metric, by_order in sweep.metrics.items()}}


def table(found) -> Table:
  """A row for each protocol; found: what the files say, a seed each."""
  def points(differences):  # of each seed (m,), the mean over N
    return ', '.join(f'{100 * np.mean(values):+.1f}' for values in differences)

  def curve(seed, metric, order):
    return np.array(seed['metrics'][metric][order])[1:]

  def halves(split, objects, centred):
    return [points(curve(s, f'miou_{side}', f'{split}/{objects}/{other}{centred}')
                   - curve(s, f'miou_{side}', f'{split}/{objects}/{side}{centred}') for s in found)
            for side, other in HALVES.items()]

  rows, breaks = [], set()
  for split, title in SPLITS.items():
    breaks.add(len(rows))
    overall = points(curve(s, 'miou', 'random') - curve(s, 'miou', f'{split}/overall')
                     for s in found)
    for objects in OBJECTS:
      scenes = found[0]['scenes'][split][objects]
      rows.append([title, objects, f'{scenes["left"]} / {scenes["right"]}', overall,
                   *halves(split, objects, ''), *halves(split, objects, '_centred')])
  clean = ', '.join(number(s['metrics']['miou']['random'][0]) for s in found)
  return Table(
    ['ranked on', 'by where they stand', 'scenes left / right', 'overall', 'left', 'right',
     'left, centred', 'right, centred'], rows, text=2, breaks=frozenset(breaks - {0}),
    caption=f'Percentage points of mIoU, the mean over N, by seed; without removal {clean}.')


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('workdirs', nargs='+')
  parser.add_argument('--data_dir')
  flags = parser.parse_args()
  logging.basicConfig(level=logging.INFO, format='%(message)s')
  FOLDER.mkdir(parents=True, exist_ok=True)
  for workdir in flags.workdirs:
    found = measure(workdir, flags.data_dir)
    paths.write_json(FOLDER / f'seed{found["seed"]}.json', found)


if __name__ == '__main__':
  main()
