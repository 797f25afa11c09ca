"""Is a channel's position real? What a ranking's scores are measured by.

A score is the mean over images of some rows (n, c): of z - z' (`rank.differences`) for a region, of
|z - z'| overall, of `centred` rows for a centred region. For any rows there are an `interval` and
the `agreement` of two halves of the images. Signed rows also have a null, in which the mirror is as
likely as the image: `threshold`. |z - z'| has none, since a flip of the sign leaves it as it is:
`shifts` says how much of it a shift by one pixel makes, too. The same kind of network with circular
padding, on images whose sizes its strides divide, knows no place but for the strides' phase: what
it scores is handedness. Scores of two networks compare as parts of how z differs between images.

    from gapjax.neurons import yardstick
    from gapjax.neurons.rank import differences
    rows = np.concatenate(list(differences(features, images)))           # z - z', (n, c)
    real = np.abs(rows.mean(0)) > yardstick.threshold(rows)              # (c,)
    moved = np.concatenate(list(yardstick.shifts(features, images)))
    share = np.abs(moved).mean() / np.abs(rows).mean()

All of it takes images to be drawn independently. Frames of one drive are not: then intervals are
too narrow and too many channels exceed the threshold.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping

import jax.numpy as jnp
import numpy as np
import scipy.stats
from jaxtyping import Float, Int

from gapjax import paths
from gapjax.errors import UsageError, check_choice
from gapjax.neurons import rank

LEVEL = 0.05  # of intervals, and of all channels of a ranking together
SPLITS, FLIPS = 20, 1000
CHUNK = 50  # flips at a time: (CHUNK, n) and (CHUNK, c) numbers are held


@dataclasses.dataclass(frozen=True)
class Yardstick:
  """A ranking's scores and what they are measured by.

  Attributes:
    images: how many the score is a mean over; of a centred region, those of the region.
    agreement: the rank correlation of two halves of the images.
    mean, half: (c,) the scores, and half the width of their 95% intervals.
    threshold: (c,) what |mean| must exceed to be more than chance; None overall.
    shift: (c,) the score that a shift by one pixel has; None by region.
    spread: (c,) the standard deviation of z over images; None by region.
  """
  images: int
  agreement: float
  mean: np.ndarray
  half: np.ndarray
  threshold: np.ndarray | None = None
  shift: np.ndarray | None = None
  spread: np.ndarray | None = None

  @property
  def exceeding(self) -> np.ndarray | None:
    """(c,) 1 where the score is above the threshold, -1 where it is below its negative, else 0."""
    return (None if self.threshold is None else
            np.sign(self.mean) * (np.abs(self.mean) > self.threshold))

  @property
  def shift_share(self) -> float | None:
    """The mean over channels of `shift`, over that of the mirror's scores."""
    return None if self.shift is None else float(self.shift.mean() / (self.mean.mean() or np.inf))

  @property
  def spread_share(self) -> float | None:
    """The mean over channels of the mirror's scores, over that of `spread`: 1.13, 2 over the root
    of pi, where a mirror image is as unlike its image as another image is (of a normal z)."""
    return (None if self.spread is None else
            float(self.mean.mean() / (self.spread.mean() or np.inf)))


def interval(rows: Float[np.ndarray, 'n c']) -> tuple[np.ndarray, np.ndarray]:
  """The mean over images and half the width of Student's 95% interval of it, (c,) each.

  Student's, as everywhere in gapjax: a mean over tens of images is about normal, and a bootstrap
  would take a thousand of them to say the same. Raises UsageError for fewer than two images.
  """
  rows = _checked(rows)
  quantile = scipy.stats.t.ppf(1 - LEVEL / 2, len(rows) - 1)
  return rows.mean(0), quantile * rows.std(0, ddof=1) / np.sqrt(len(rows))


def agreement(rows: Float[np.ndarray, 'n c'], *, seed: int = 0) -> float:
  """Spearman's rank correlation of the scores of two halves of the images, from -1 to 1.

  The mean over SPLITS random splits: one alone, such as even and odd, is a matter of luck. Overall
  it is high for any network whose channels differ in scale, which says nothing about position.

  Raises UsageError for fewer than two images.
  """
  rows = _checked(rows)
  halves = np.tile(np.arange(len(rows)) < len(rows) // 2, (SPLITS, 1))
  first = np.random.default_rng(seed).permuted(halves, axis=1)
  ranks = [scipy.stats.rankdata(half @ rows, axis=1) for half in (first, ~first)]  # (SPLITS, c)
  return float(np.mean([rank.correlation(a, b) for a, b in zip(*ranks, strict=True)]))


def threshold(rows: Float[np.ndarray, 'n c'], *, flips: int = FLIPS,
              seed: int = 0) -> Float[np.ndarray, ' c']:
  """What a channel's |mean| must exceed, (c,), so that chance lets any channel do so in 5% of all.

  The null: an image is as likely as its mirror image, so that the sign of a row may be flipped, all
  channels of an image together. Of every flip the largest |t| over the channels counts (max-T:
  Westfall and Young 1993; for images Nichols and Holmes 2002), so the rate of 5% is that of one or
  more false channels among all, and a channel is measured by its own spread. From fewer than six
  images no channel exceeds it.

  Args:
    rows: z - z', or `centred` rows.
    flips: how many are drawn, from `seed`; 19 or more.

  Raises:
    UsageError: there are fewer than two images or 19 flips.
  """
  rows = _checked(rows)
  if flips < 19:
    raise UsageError(f'{flips} flips know no 5%; use 19 or more, such as {FLIPS}')
  # |t| grows with |sum| / norm, and no flip changes the norm: one product serves all flips.
  norm = np.linalg.norm(rows, axis=0)
  unit = rows / np.where(norm, norm, 1)
  draw, largest = np.random.default_rng(seed), []
  for start in range(0, flips, CHUNK):
    signs = draw.choice([-1.0, 1.0], (min(CHUNK, flips - start), len(rows)))
    largest.append(np.abs(signs @ unit).max(1))
  # The data's own signs are one flip more; with it, p <= 5% is to exceed this one.
  limit = np.sort(np.concatenate(largest))[-int(LEVEL * (flips + 1))]
  return limit * (1 + 1e-9) * norm / len(rows)  # of few images a flip may be the data's own signs


def centred(differences: Float[np.ndarray, 'n c'], inside: Int[np.ndarray, ' m'],
            everywhere: Int[np.ndarray, ' k']) -> Float[np.ndarray, 'n c']:
  """Rows whose mean is that of the differences of the images `inside`, less that of `everywhere`.

  Each image's part in that difference, times n, so that an image that counts on both sides counts
  with what is left of it.
  """
  n = len(differences)
  weights = (np.bincount(inside, minlength=n) / len(inside)
             - np.bincount(everywhere, minlength=n) / len(everywhere))
  return n * weights[:, None] * (differences - differences[everywhere].mean(0))


def shifts(features: Callable, images: Iterable, *, axis: str = 'horizontal') -> Iterator:
  """z of every image less z of the image moved by one pixel: what strides add to a mirror's z - z'.

  A convolution with a stride samples an even number of pixels from one side, and so a mirror also
  moves the samples. The last column is repeated. To cut both images to the columns that they share
  would keep every pixel real, but an odd width is padded otherwise than an even one, which is what
  is to be measured, and networks with adaptive polyphase sampling take none.

  Arguments, what it yields and what it raises: as `rank.differences`.
  """
  check_choice(axis, rank.AXES, what='shift')

  def moved(batch):
    size = batch.shape[rank.AXES[axis]]
    return jnp.take(jnp.asarray(batch), np.minimum(np.arange(size) + 1, size - 1),
                    axis=rank.AXES[axis])

  return rank.changes(features, images, change=moved)


def measure(rows: Float[np.ndarray, 'n c'], *, images: int | None = None,
            moved: Float[np.ndarray, 'm c'] | None = None,
            averages: Float[np.ndarray, 'm c'] | None = None) -> Yardstick:
  """The Yardstick of rows: signed ones, or |z - z'| with what `shifts` gives of some images and z
  of them.

  images: how many these are, if not len(rows). Raises UsageError for fewer than two rows.
  """
  mean, half = interval(rows)
  return Yardstick(images or len(rows), agreement(rows), mean, half,
                   threshold=threshold(rows) if moved is None else None,
                   shift=None if moved is None else np.abs(moved).mean(0),
                   spread=None if averages is None else averages.std(0, ddof=1))


def _checked(rows):
  rows = np.asarray(rows, np.float64)
  if rows.ndim != 2 or len(rows) < 2:
    raise UsageError(f'differences are of shape {rows.shape}; give those of two images or more, '
                     '(n, c)')
  return rows


# --- on disk -------------------------------------------------------------------------------------

ARRAYS = ('mean', 'half', 'threshold', 'shift', 'spread')


def write_json(path, yardsticks: Mapping[str, Yardstick], **about) -> None:
  """Writes a list of objects, one an order, what is said `about` them in each; six digits."""
  def plain(values):
    return None if values is None else [float(f'{value:.6g}') for value in values]

  paths.write_json(path, [
    {'order': name, 'images': found.images, 'agreement': found.agreement,
     **{key: plain(getattr(found, key)) for key in ARRAYS}, **about}
    for name, found in yardsticks.items()])


def read_json(path, **about) -> dict[str, Yardstick]:
  """{order: Yardstick} of those in a file of which `about` is said: `write_json` backwards.

  Raises UsageError naming the file where it holds something else.
  """
  try:
    return {record['order']: Yardstick(
      record['images'], record['agreement'],
      *(None if record[key] is None else np.array(record[key], float) for key in ARRAYS))
      for record in paths.read_json(path, list) if about.items() <= record.items()}
  except (KeyError, TypeError, ValueError, AttributeError) as error:
    if isinstance(error, UsageError):
      raise
    raise UsageError(f'{path} holds no yardsticks ({error!r}); run gapjax rank again') from None
