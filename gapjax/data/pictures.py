"""Pillow images: opened, in RGB, resized, as a file. Without Pillow until one is there."""

import io

from gapjax import errors


def as_rgb(picture):
  """A Pillow image in RGB. Raises UsageError as `check_bytes` does."""
  check_bytes(picture, 'an image')
  return picture.convert('RGB')


def check_bytes(picture, where):
  """Raises UsageError where a Pillow image has more than a byte a value: it would be cut."""
  if picture.mode[0] in 'IF':  # 16 or 32 bits
    raise errors.UsageError(f'{where} has more than 8 bits a channel (Pillow calls it '
                            f'{picture.mode}); save it with 8 and prepare the dataset again')


def open_image(encoded):
  """A Pillow image of a file's bytes. Raises OSError where they are none, or where their header
  says more pixels than Pillow believes."""
  import PIL.Image
  try:
    return PIL.Image.open(io.BytesIO(encoded))
  except PIL.Image.DecompressionBombError as error:
    raise OSError(str(error)) from error


def resize(picture, size, *, box=None):
  """A Pillow image at another (width, height), or `box` of it, (left, top, right, bottom).

  A label (mode L) takes the nearest pixel; an image means of blocks where all of it shrinks by
  whole factors, else bilinear, antialiased.
  """
  from PIL.Image import Resampling
  whole = box is None and all(old % new == 0 for old, new in zip(picture.size, size, strict=True))
  return picture.resize(size, Resampling.NEAREST if picture.mode == 'L' else
                        Resampling.BOX if whole else Resampling.BILINEAR, box=box)


def png(array) -> bytes:
  """The PNG file of a uint8 array, (h, w) or (h, w, 3)."""
  import PIL.Image
  file = io.BytesIO()
  PIL.Image.fromarray(array).save(file, 'PNG')
  return file.getvalue()
