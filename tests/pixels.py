"""Where something stands in a picture."""

import numpy as np
from PIL import Image


def pixels(path):
  """(h, w, 3) integers."""
  with Image.open(path) as image:
    return np.asarray(image.convert('RGB'), int)


def where(picture, color, within=12):
  """(n, 2): rows and columns of the pixels (h, w, 3) near a colour '#rrggbb' or (r, g, b)."""
  color = list(bytes.fromhex(color[1:])) if isinstance(color, str) else color
  return np.argwhere((abs(picture - color) < within).all(-1))


def row(picture, color):
  """The row that has most of a colour's pixels, which a legend's short lines are not."""
  return np.bincount(where(picture, color)[:, 0]).argmax()
