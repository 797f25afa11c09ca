"""Is a channel's position real? What a ranking's scores are measured by.

A score is the mean over images of some rows (n, c): of z - z' (`rank.differences`) for a region, of
|z - z'| overall. For any rows there are an `interval` and the `agreement` of two halves of the
images. Signed rows also have a null, in which the mirror is as likely as the image: `threshold`.
A region's centred score is the mean over its images less that over all; in its null any of
all images could as well be the region's: `centred`. |z - z'| has none, since a flip of the sign
leaves it as it is: `shifts` says how much of it a shift by one pixel makes, too. The same kind of
network with circular padding, on images whose sizes its strides divide, knows no place but for the
strides' phase: what it scores is handedness. Scores of two networks compare as parts of how z
differs between images.

    from gapjax.neurons import yardstick
    from gapjax.neurons.rank import differences
    rows = np.concatenate(list(differences(features, images)))           # z - z', (n, c)
    moved = np.concatenate(list(yardstick.shifts(features, images)))
    share = np.abs(moved).mean() / np.abs(rows).mean()                   # overall
    left = yardstick.centred(rows, np.flatnonzero(at_left), np.arange(len(rows)))
    real = np.abs(left.mean) > left.threshold                            # (c,)

`threshold` of *all* images' rows asks which channels know the mirror on average: where objects
stand on the left as often as on the right, their sides cancel in it.

All of it takes images to be drawn independently. Frames of one drive are not: then intervals are
too narrow and too many channels exceed the threshold.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from jaxtyping import Bool, Float, Int

from gapjax import paths
from gapjax.errors import UsageError, check_choice
from gapjax.neurons import rank

LEVEL = 0.05  # of intervals, and of all channels of a ranking together
SPLITS, DRAWS = 20, 1000
# How many images are shifted by a pixel: enough for the share of the mirror's score to a few
# percents, where all of a large set would take as long again as ranking it.
SHIFTED = 64
CHUNK = 50  # draws at a time: (CHUNK, n) and (CHUNK, c) numbers are held


@dataclasses.dataclass(frozen=True)
class Yardstick:
  """A ranking's scores and what they are measured by.

  Attributes:
    images: how many the score is a mean over; of a centred score, those of the region.
    agreement: the rank correlation of two halves of the images, from -1 to 1.
    mean: (c,) the scores.
    half: (c,) half the width of their 95% intervals.
    threshold: (c,) what |mean| must exceed to be more than chance; None overall.
    shift: (c,) the score that a shift by one pixel has; None by region, as are the next two.
    spread: (c,) the standard deviation of z over images.
    mirror: (c,) the score of the images that `shift` and `spread` are of, SHIFTED at most.
  """
  images: int
  agreement: float
  mean: np.ndarray
  half: np.ndarray
  threshold: np.ndarray | None = None
  shift: np.ndarray | None = None
  spread: np.ndarray | None = None
  mirror: np.ndarray | None = None

  @property
  def exceeding(self) -> np.ndarray | None:
    """(c,) 1 where the score is above the threshold, -1 where it is below its negative, else 0."""
    return (None if self.threshold is None else
            np.sign(self.mean) * (np.abs(self.mean) > self.threshold))

  @property
  def shift_share(self) -> float | None:
    """The mean over channels of `shift`, over that of the mirror's scores of the same images."""
    return (None if self.shift is None else
            float(self.shift.mean() / (self.mirror.mean() or np.inf)))

  @property
  def spread_share(self) -> float | None:
    """The mean over channels of the mirror's scores, over that of `spread`, of the same images:
    1.13, 2 over the root of pi, where a mirror image is as unlike its image as another image is (of
    a normal z)."""
    return (None if self.spread is None else
            float(self.mirror.mean() / (self.spread.mean() or np.inf)))


def interval(rows: Float[np.ndarray, 'n c']) -> tuple[np.ndarray, np.ndarray]:
  """The mean over images and half the width of Student's 95% interval of it, (c,) each.

  Student's, as everywhere in gapjax: a mean over tens of images is about normal, and a bootstrap
  would take a thousand of them to say the same. Raises UsageError for fewer than two images.
  """
  rows = _checked(rows)
  quantile = scipy.stats.t.ppf(1 - LEVEL / 2, len(rows) - 1)
  return rows.mean(0), quantile * rows.std(0, ddof=1) / np.sqrt(len(rows))


def agreement(rows: Float[np.ndarray, 'n c']) -> float:
  """Spearman's rank correlation of the scores of two halves of the images, from -1 to 1.

  The mean over SPLITS random splits: one alone, such as even and odd, is a matter of luck. Overall
  it is high for any network whose channels differ in scale, which says nothing about position.

  Raises UsageError for fewer than two images.
  """
  rows = _checked(rows)
  first = _halves(len(rows), np.random.default_rng(0))
  return _agreement(first @ rows, ~first @ rows)


def _halves(n, draw):
  """Which of n images are in the first half of each split, (SPLITS, n)."""
  return draw.permuted(np.tile(np.arange(n) < n // 2, (SPLITS, 1)), axis=1)


def _agreement(*scores):
  """Of two halves' scores (SPLITS, c)."""
  ranks = [scipy.stats.rankdata(half, axis=1) for half in scores]
  return float(np.mean([rank.correlation(a, b) for a, b in zip(*ranks, strict=True)]))


def threshold(rows: Float[np.ndarray, 'n c'], *,
              flips: int = DRAWS) -> Float[np.ndarray, ' c']:
  """What a channel's |mean| must exceed, (c,), so that by chance any channel does in 5% of draws.

  The null: an image is as likely as its mirror image, so that the sign of a row may be flipped, all
  channels of an image together. Of every flip the largest |t| over the channels counts (max-T:
  Westfall and Young 1993; for images Nichols and Holmes 2002), so the rate of 5% is that of one or
  more false channels among all, and a channel is measured by its own spread. From fewer than six
  images 1,000 flips let no channel exceed it.

  Args:
    rows: z - z'.
    flips: how many are drawn; 19 or more.

  Raises:
    UsageError: there are fewer than two images or 19 flips.
  """
  rows = _checked(rows)
  # |t| grows with |sum| / norm, and no flip changes the norm: one product serves all flips.
  norm = np.linalg.norm(rows, axis=0)
  unit = rows / np.where(norm, norm, 1)
  draw = np.random.default_rng(0)
  limit = _limit(lambda k: np.abs(draw.choice([-1.0, 1.0], (k, len(rows))) @ unit), flips)
  return limit * (1 + 1e-9) * norm / len(rows)  # of few images a flip may be the data's own signs


def _limit(statistics, draws):
  """What chance lets any channel exceed in 5% of draws; `statistics` gives (k, c) of k draws."""
  if draws < 19:
    raise UsageError(f'{draws} draws know no 5%; use 19 or more, such as {DRAWS}')
  largest = np.concatenate([statistics(min(CHUNK, draws - start)).max(1)
                            for start in range(0, draws, CHUNK)])
  # The data themselves are one draw more; with it, p <= 5% is to exceed this one.
  return np.sort(largest)[-int(LEVEL * (draws + 1))]


def centred(differences: Float[np.ndarray, 'n c'],
            inside: Int[np.ndarray, ' m'] | Bool[np.ndarray, ' n'],
            everywhere: Int[np.ndarray, ' k'] | Bool[np.ndarray, ' n'], *,
            draws: int = DRAWS) -> Yardstick:
  """The Yardstick of the mean over the images `inside` a region, less that over `everywhere`.

  The threshold's null: which of these images are the region's is chance. Every draw relabels them,
  and the largest |t| over the channels counts, as for `threshold`. No flips of the sign: nothing
  makes a centred difference as likely as its negative, and where differences are skewed, flips let
  too many channels pass. t is Welch's, so that few channels pass whose images inside only differ
  more from each other than the others do; with a dozen images inside that costs power. Images
  inside but not `everywhere` are relabelled with the others, as the null takes them to be alike.

  The interval has the spread of the images inside about their own mean, that of the others about
  theirs, and Welch's degrees of freedom. Half of the images inside are in either half that agrees.

  Args:
    differences: z - z'.
    inside, everywhere: indices of images, all different, or masks (n,) of booleans.
    draws: how many are drawn; 19 or more.

  Raises:
    UsageError: there are fewer than two images inside, two others everywhere, or 19 draws; or a
      choice of images is neither.
  """
  rows = _checked(differences)
  inside, everywhere = (_mask(chosen, len(rows)) for chosen in (inside, everywhere))
  rows, inside, everywhere = (x[inside | everywhere] for x in (rows, inside, everywhere))
  groups = [inside, ~inside]
  if min(group.sum() for group in groups) < 2:
    raise UsageError(f'of {len(rows)} images {inside.sum()} are inside the region; a centred score '
                     'needs two or more inside, and two or more others')
  draw, scale = np.random.default_rng(0), rows.std(0)
  unit = (rows - rows.mean(0)) / np.where(scale, scale, 1)
  first = np.zeros((SPLITS, len(rows)), bool)
  for group in groups:
    first[:, group] = _halves(group.sum(), draw)
  agree = _agreement(*(_weights(inside & half, everywhere & half) @ rows
                       for half in (first, ~first)))

  [mean], parts = _welch(unit, inside[None], everywhere[None])
  [variance], below = sum(parts), sum(part ** 2 / (group.sum() - 1)
                                      for part, group in zip(parts, groups, strict=True))[0]
  freedom = np.divide(variance ** 2, below, out=np.ones_like(below), where=below > 0)
  half = scipy.stats.t.ppf(1 - LEVEL / 2, freedom) * np.sqrt(variance)

  def relabelled(k):
    order = draw.permuted(np.tile(np.arange(len(rows)), (k, 1)), axis=1)
    scores, parts = _welch(unit, inside[order], everywhere[order])
    return np.abs(scores) / _error(sum(parts))

  # Of few images a draw may be the data's own labels.
  limit = _limit(relabelled, draws) * (1 + 1e-6) * _error(variance)
  return Yardstick(int(inside.sum()), agree, scale * mean, scale * half, threshold=scale * limit)


def chance_correlation(one: Bool[np.ndarray, ' n'], other: Bool[np.ndarray, ' n'],
                       everywhere: Bool[np.ndarray, ' n']) -> float:
  """What the centred scores of two regions correlate by where no image's place matters.

  Both are less the mean over `everywhere`, so that their weights of the images are opposite in
  part, and the scores with them: -1 where every image is of one region or the other. Of images
  that are alike in distribution this is the cosine of the weights. Masks of images; 0 where a
  region is everywhere. Raises UsageError for other masks, and for a region without images.
  """
  one, other, everywhere = (_mask(x, len(everywhere)) for x in (one, other, everywhere))
  if not (one.any() and other.any() and everywhere.any()):
    raise UsageError('a region holds no image; give masks that are true somewhere')
  a, b = (_weights(inside, everywhere) for inside in (one, other))
  norm = np.linalg.norm(a) * np.linalg.norm(b)
  return float(a @ b / norm) if norm else 0.0


def _mask(chosen, n):
  """The images of a choice, (n,) booleans."""
  chosen = np.asarray(chosen)
  if chosen.dtype == bool and chosen.shape == (n,):
    return chosen
  if chosen.size and not (chosen.ndim == 1 and chosen.dtype.kind in 'iu' and chosen.min() >= 0
                          and chosen.max() < n and len(np.unique(chosen)) == len(chosen)):
    raise UsageError(f'images of a region are a mask of {n} booleans, or different indices below '
                     f'{n}; not {chosen.dtype} of shape {chosen.shape} (np.flatnonzero makes '
                     'indices of a mask)')
  return np.isin(np.arange(n), chosen)


def _weights(inside, everywhere):
  """What makes the images' differences the score: labels (..., n) of 0 and 1 -> (..., n)."""
  return (inside / inside.sum(-1, keepdims=True)
          - everywhere / everywhere.sum(-1, keepdims=True))


def _welch(rows, inside, everywhere):
  """The scores of labels (k, n), and what the images inside and the others add to their variance:
  (k, c) each, of rows whose mean is 0."""
  weights, inside = _weights(inside, everywhere), inside.astype(float)
  total, squares = inside @ rows, inside @ rows ** 2
  parts = []
  for group, square in ((inside, squares), (1 - inside, (rows ** 2).sum(0) - squares)):
    n = group.sum(-1, keepdims=True)
    parts.append((group * weights ** 2).sum(-1, keepdims=True)
                 * np.maximum(square - total ** 2 / n, 0) / (n - 1))
  return weights @ rows, parts


def _error(variance):
  """The root of a variance, of rows whose deviation is 1; not 0 where all inside, and all others,
  are alike."""
  return np.sqrt(np.maximum(variance, 1e-8))


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
    take = jnp.take if isinstance(batch, jax.Array) else np.take  # of the kind that the batch is
    return take(batch, np.minimum(np.arange(size) + 1, size - 1), axis=rank.AXES[axis])

  return rank.changes(features, images, change=moved)


def measure(rows: Float[np.ndarray, 'n c'], *, moved: Float[np.ndarray, 'k c'] | None = None,
            averages: Float[np.ndarray, 'k c'] | None = None,
            some: Int[np.ndarray, ' k'] | None = None) -> Yardstick:
  """The Yardstick of rows: signed ones, or |z - z'| with what `shifts` gives of `some` of the
  images, and z of them.

  averages: z of the images that `moved` is of (`rank.mean_activations`), which goes with it.
  some: their indices; None is all. Raises UsageError for fewer than two rows, `moved` alone, of
  other images, or with signed rows.
  """
  if (moved is None) != (averages is None):
    raise UsageError('`moved` and `averages` go together: yardstick.shifts and '
                     'rank.mean_activations of the same images')
  rows = _checked(rows)
  mean, half = interval(rows)
  found = Yardstick(len(rows), agreement(rows), mean, half)
  if moved is None:
    return dataclasses.replace(found, threshold=threshold(rows))
  if np.min(rows) < 0:
    raise UsageError('with `moved`, rows are |z - z\'|, but some are negative; give np.abs(rows)')
  moved, averages = _checked(moved), _checked(averages)
  mirrored = rows if some is None else rows[np.asarray(some)]
  if not moved.shape == averages.shape == mirrored.shape:
    raise UsageError(f'`moved` {moved.shape} and `averages` {averages.shape} are of other '
                     f'images or channels than rows {mirrored.shape}; say by `some` of which')
  return dataclasses.replace(found, shift=np.abs(moved).mean(0), spread=averages.std(0, ddof=1),
                             mirror=mirrored.mean(0))


def _checked(rows):
  rows = np.asarray(rows, np.float64)
  if rows.ndim != 2 or len(rows) < 2:
    raise UsageError(f'differences are of shape {rows.shape}; give those of two images or more, '
                     '(n, c)')
  if not np.isfinite(rows).all():
    raise UsageError('differences hold infinities or NaN, which would hide every channel; rank a '
                     'network that did not diverge, in float32')
  return rows


# --- on disk -------------------------------------------------------------------------------------

ARRAYS = ('mean', 'half', 'threshold', 'shift', 'spread', 'mirror')


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
    return {record['order']: _read(record) for record in paths.read_json(path, list)
            if about.items() <= record.items()}
  except (KeyError, TypeError, ValueError, AttributeError) as error:
    if isinstance(error, UsageError):
      raise
    raise UsageError(f'{path} holds no yardsticks ({error!r}); run gapjax rank again') from None


def _read(record):
  """The Yardstick of a record. Raises TypeError or ValueError where it says something else."""
  given = {key: record[key] for key in ARRAYS
           if record[key] is not None or key in ('mean', 'half')}
  numbers = [record['agreement'], *itertools.chain(*given.values())]
  if type(record['order']) is not str or type(record['images']) is not int or any(
      type(number) not in (int, float) for number in numbers):
    raise TypeError('a value of another type')
  if {len(values) for values in given.values()} != {len(record['mean']) or 1} or (
      'mirror' not in given and {'shift', 'spread'} & {*given}):
    raise ValueError('values of another number of channels')
  return Yardstick(record['images'], record['agreement'],
                   **{key: np.array(values, float) for key, values in given.items()})
