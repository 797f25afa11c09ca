"""Pictures of scenes: a row a scene, a column each for the image, its labels, predictions."""

import numpy as np

from gapjax.plots import MIDDLE_GREY, drawing

# Void: between black, which is often a class, and what colours the classes have.
VOID_COLOUR = (70, 70, 70)


def coloured(labels, palette) -> np.ndarray:
  """(..., h, w) class numbers -> (..., h, w, 3) uint8 in the palette (K, 3)'s colours; void is
  dark grey."""
  labels = np.asarray(labels, np.int64)
  colours = np.concatenate([np.asarray(palette, np.uint8), [VOID_COLOUR]]).astype(np.uint8)
  return colours[np.where((labels >= 0) & (labels < len(palette)), labels, len(palette))]


def scenes(columns, path, *, width: float = 2.4) -> None:
  """A picture: columns is {title: list of (h, w, 3) uint8}, one a row, all columns equally long."""
  rows = len(next(iter(columns.values())))
  h, w = next(iter(columns.values()))[0].shape[:2]
  size = (width * len(columns), rows * width * h / w + 0.2)
  with drawing(path, size=size, transparent=True) as figure:
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    axes = figure.subplots(rows, len(columns), squeeze=False)
    for column, (title, pictures) in enumerate(columns.items()):
      axes[0, column].set_title(title, fontsize=9, color=MIDDLE_GREY)
      for axis, picture in zip(axes[:, column], pictures, strict=True):
        axis.imshow(picture, interpolation='nearest', aspect='auto')
        axis.set_axis_off()
