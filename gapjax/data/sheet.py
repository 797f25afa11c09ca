"""A contact sheet: images, each below its label, as one PNG. Needs Pillow alone.

The background is transparent and the letters are grey, readable on a white page and on a dark one.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from gapjax import paths
from gapjax.errors import UsageError

WIDTH, GAP = 1248, 8  # pixels of a sheet, and between its tiles
LINE, LETTERS = 24, 16  # pixels of a line of text, and of its letters
LEGEND = 156  # pixels of a name in the legend
GREY, BLANK = (123, 133, 143), (228, 231, 233)  # of letters; of pixels that are void


@dataclasses.dataclass(frozen=True, eq=False)
class Sheet:
  """Tiles side by side, row by row from the top.

  Attributes:
    tiles: (label, image) each, the image (h, w, 3) uint8.
    columns: tiles in a row.
    grid: k; thin lines part every image into k x k.
    legend: (name, colour) each, below the tiles; the colour is (3,) uint8.
  """
  tiles: Sequence[tuple[str, np.ndarray]]
  columns: int
  grid: int = 1
  legend: Sequence[tuple[str, np.ndarray]] = ()

  def save(self, path) -> None:
    """Writes the PNG; the same sheet gives the same bytes. Raises UsageError without a tile."""
    if not self.tiles:
      raise UsageError('there is no image to draw')
    columns = min(self.columns, len(self.tiles))
    side = (WIDTH + GAP) // max(columns, 3) - GAP  # one or two are no larger than three
    width = columns * (side + GAP) - GAP
    rows = [*_rows([_tile(label, image, side, self.grid) for label, image in self.tiles],
                   columns, side + GAP),
            *_rows([_swatch(name, colour) for name, colour in self.legend],
                   max(width // LEGEND, 1), LEGEND)]
    tops = np.cumsum([0, *(max(part.height for _, part in row) + GAP for row in rows)])
    sheet = PIL.Image.new('RGBA', (width, int(tops[-1]) - GAP))
    for top, row in zip(tops, rows, strict=False):
      for left, part in row:
        sheet.paste(part, (left, int(top)))
    with paths.opened(path) as file:
      sheet.save(file, 'PNG')


def scenes(rows: Sequence[Mapping], *, class_names: Sequence[str], palette: np.ndarray) -> Sheet:
  """Scenes with their label maps, a row each.

  Args:
    rows: dicts of 'image' (h, w, 3) uint8, and under any further names, the same in every row,
      labels (h, w), void outside [0, K).
    class_names: K names; the legend has those that occur.
    palette: (K, 3) uint8, the classes' colours.
  """
  colours = np.vstack([palette, BLANK]).astype(np.uint8)
  k, tiles, present = len(class_names), [], set()
  for number, row in enumerate(rows):
    for title, picture in row.items():
      if title != 'image':
        labels = np.asarray(picture).astype(int)
        labels = np.where((labels >= 0) & (labels < k), labels, k)
        present |= set(np.unique(labels).tolist()) - {k}
        picture = colours[labels]
      tiles.append(('' if number else title, picture))
  return Sheet(tiles, columns=len(rows[0]) if rows else 1,
               legend=[(class_names[c], colours[c]) for c in sorted(present)])


def _rows(parts, columns, step):
  """[[(left, part), ...], ...]."""
  placed = [(i % columns * step, part) for i, part in enumerate(parts)]
  return [placed[i:i + columns] for i in range(0, len(placed), columns)]


def _tile(label, image, side, grid):
  """A picture of `side` pixels' width below its label, whose end is cut off where it is longer."""
  height, width, _ = image.shape
  how = PIL.Image.Resampling.BOX if width > side else PIL.Image.Resampling.NEAREST
  picture = PIL.Image.fromarray(image).resize((side, round(side * height / width)), how)
  pen = PIL.ImageDraw.Draw(picture, 'RGBA')
  shade = 0 if np.median(image) > 150 else 255
  for i in range(1, grid):
    for line in ([(0, i * picture.height // grid), (side, i * picture.height // grid)],
                 [(i * side // grid, 0), (i * side // grid, picture.height)]):
      pen.line(line, fill=(shade, shade, shade, 115))
  top = LINE if label else 0
  tile = PIL.Image.new('RGBA', (side, top + picture.height))
  tile.paste(picture, (0, top))
  PIL.ImageDraw.Draw(tile).text((side // 2, 2), label, fill=GREY, font=_font(), anchor='ma')
  return tile


def _swatch(name, colour):
  """A square of a colour, and its name, whose end is cut off where it is longer."""
  swatch = PIL.Image.new('RGBA', (LEGEND - GAP, LINE))
  pen = PIL.ImageDraw.Draw(swatch)
  pen.rectangle((0, 4, LETTERS, 4 + LETTERS), fill=tuple(map(int, colour)))
  pen.text((LETTERS + 6, 2), name, fill=GREY, font=_font())
  return swatch


def _font():
  return PIL.ImageFont.load_default(LETTERS)
