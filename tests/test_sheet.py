"""Contact sheets: pixels against what was drawn."""

import numpy as np
import pytest
from PIL import Image

from gapjax.data import sheet
from gapjax.errors import UsageError

COLOURS = np.array([[230, 26, 26], [26, 230, 26], [26, 26, 230]], np.uint8)


def tile(colour, height=6, width=6):
  return np.full((height, width, 3), colour, np.uint8)


def pixels_of(path):
  with Image.open(path) as image:
    return np.asarray(image.convert('RGBA'), int)


def shows(pixels, colour):
  return (pixels[..., :3] == colour).all(-1) & (pixels[..., 3] == 255)


def test_tiles_stand_in_rows_below_their_labels(tmp_path):
  """Two rows of two: the first three colours, nothing bottom right."""
  for name in 'ab':
    sheet.Sheet([*zip('abc', map(tile, COLOURS), strict=True)], columns=2).save(
      tmp_path / f'{name}.png')
  assert (tmp_path / 'a.png').read_bytes() == (tmp_path / 'b.png').read_bytes()
  pixels = pixels_of(tmp_path / 'a.png')
  height, width = (side // 2 for side in pixels.shape[:2])
  parts = [pixels[:height, :width], pixels[:height, width:], pixels[height:, :width]]
  for part, colour in zip(parts, COLOURS, strict=True):
    drawn = shows(part, colour)
    assert drawn.mean() > .8 and not drawn[:10].any()  # the label's line
    assert part[:sheet.LINE, :, 3].any()
  assert not pixels[height:, width + sheet.GAP:, 3].any()  # transparent


@pytest.mark.parametrize('grid', [2, 3])
def test_thin_lines_part_a_tile(tmp_path, grid):
  sheet.Sheet([('', tile(102))], columns=1, grid=grid).save(tmp_path / 'x.png')
  picture = pixels_of(tmp_path / 'x.png')[..., 0]
  for axis in (0, 1):
    lines = np.flatnonzero(np.median(picture, axis) > 110)
    assert [round(at / picture.shape[1 - axis] * 12) for at in lines] == [
      12 * i // grid for i in range(1, grid)]


def test_scenes_have_the_colours_of_their_classes(tmp_path):
  """A class that never occurs is in no legend; void is neither."""
  row = {'image': tile(0, 4, 8), 'truth': np.full((4, 8), 255), 'before': np.zeros((4, 8), int),
         'without left': np.full((4, 8), 2)}
  sheet.scenes([row, row], class_names=('road', 'sky', 'person'), palette=COLOURS).save(
    tmp_path / 'x.png')
  pixels = pixels_of(tmp_path / 'x.png')
  height, width, _ = pixels.shape
  middles = pixels[[int(height * .4), int(height * .8)]][:, [
    int(width * share) for share in (.125, .375, .625, .875)]]
  expected = [[0, 0, 0], sheet.BLANK, COLOURS[0], COLOURS[2]]
  np.testing.assert_array_equal(middles[..., :3], [expected] * 2)
  assert not shows(pixels, COLOURS[1]).any()
  assert shows(pixels[-sheet.LINE:], COLOURS[0]).any() and shows(
    pixels[-sheet.LINE:], COLOURS[2]).any()


def test_a_legend_takes_as_many_lines_as_it_needs(tmp_path):
  legend = [(f'a class with the number {i}', colour) for i, colour in enumerate([*COLOURS] * 8)]
  sheet.Sheet([('', tile(9))], columns=1, legend=legend).save(tmp_path / 'x.png')
  pixels = pixels_of(tmp_path / 'x.png')[..., :3]
  swatches = sum(shows(pixels_of(tmp_path / 'x.png'), colour).sum() for colour in COLOURS)
  assert swatches == 24 * (sheet.LETTERS + 1) ** 2 and pixels.shape[1] < 450


def test_a_large_picture_is_averaged(tmp_path):
  """Stripes of one pixel become grey, not one of the two."""
  stripes = np.zeros((1000, 1000, 3), np.uint8)
  stripes[::2] = 255
  sheet.Sheet([('', stripes)], columns=1).save(tmp_path / 'x.png')
  assert abs(pixels_of(tmp_path / 'x.png')[..., 0].mean() - 127.5) < 1


def test_an_empty_sheet_is_refused(tmp_path):
  with pytest.raises(UsageError, match='no image'):
    sheet.scenes([], class_names=(), palette=np.zeros((0, 3))).save(tmp_path / 'x.png')
