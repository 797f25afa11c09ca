"""`digit_scenes`: scikit-learn's real handwritten digits in scenes, with a class for every pixel.

Drawn from a fixed seed: no files, no network. A quarter of the scenes has digits in the left half
only and another quarter in the right half only, so that channels can be ranked by region.
"""

import numpy as np
import PIL.Image

from gapjax.data import sources
from gapjax.data.catalogue import VOID
from gapjax.data.pictures import png
from gapjax.data.scenes_sources import Scene, SceneSet

HEIGHT, WIDTH = 64, 96
SCENES = {'train': 400, 'test': 100}
_SEED = 2021
_INK, _EDGE = 0.5, 0.2  # ink from which a pixel is the digit's, and from which it is void
_COLOURS = [(0, 0, 0), (230, 25, 75), (60, 180, 75), (255, 225, 25), (0, 130, 200), (245, 130, 48),
            (145, 30, 180), (70, 240, 240), (240, 50, 230), (210, 245, 60), (250, 190, 212)]


def digit_scenes():
  """400 training and 100 test scenes of 64 x 96 pixels with 3 to 6 digits each, as a SceneSet.

  Label 0 is background and d + 1 the digit d; a digit's faint border is void. The digits of the
  two splits are those of the `digits` dataset's splits, so no scan is in both. Digits are 16 to
  20 pixels high and do not overlap.
  """
  arrays = sources.read_digits()
  return SceneSet(class_names=('background', *arrays.class_names['label']),
                  palette=np.array(_COLOURS, np.uint8), splits={
                      split: [_scene(arrays, number, split, i) for i in range(count)]
                      for number, (split, count) in enumerate(SCENES.items())})


def _scene(arrays, number, split, i):
  """The i-th Scene of a split, which is the SCENES' of this number."""
  def draw():
    return _draw(np.random.default_rng((_SEED, number, i)), arrays.images[split][..., 0],
                 arrays.labels[split]['label'])

  return Scene(id=f'{split}_{i:05d}', image=lambda: png(draw()[0]), label=lambda: draw()[1])


def _draw(rng, digits, classes):
  """((64, 96, 3), (64, 96)) uint8: one scene and its labels. digits: (n, 8, 8) uint8."""
  image = _background(rng)
  label = np.zeros((HEIGHT, WIDTH), np.uint8)
  free = np.ones((HEIGHT, WIDTH), bool)
  low, high = ((0, WIDTH // 2), (WIDTH // 2, WIDTH), (0, WIDTH), (0, WIDTH))[rng.integers(4)]
  for _ in range(rng.integers(3, 7)):
    which, size = rng.integers(len(digits)), rng.integers(16, 21)
    for _ in range(30):  # places to try; a full scene gets fewer digits
      top, left = rng.integers(HEIGHT - size + 1), rng.integers(low, high - size + 1)
      place = slice(top, top + size), slice(left, left + size)
      if free[place].all():
        break
    else:
      continue
    free[place] = False
    ink = np.asarray(PIL.Image.fromarray(digits[which]).resize(
        (size, size), PIL.Image.Resampling.BILINEAR)) / 255
    colour = rng.integers(190, 256, 3) if rng.integers(2) else rng.integers(0, 41, 3)
    image[place] += (colour - image[place]) * ink[..., None]
    label[place] = np.where(ink >= _INK, classes[which] + 1, np.where(ink >= _EDGE, VOID, 0))
  return np.clip(np.rint(image), 0, 255).astype(np.uint8), label


def _background(rng):
  """(64, 96, 3) float: colours that change smoothly, over them a texture and grain."""
  def smooth(rows, columns, low, high):
    grid = rng.integers(low, high, (rows, columns, 3), np.uint8)
    return np.asarray(PIL.Image.fromarray(grid).resize(
        (WIDTH, HEIGHT), PIL.Image.Resampling.BICUBIC), np.float64)

  return smooth(3, 4, 80, 160) + smooth(16, 24, 0, 30) - 15 + rng.normal(0, 4, (HEIGHT, WIDTH, 3))
