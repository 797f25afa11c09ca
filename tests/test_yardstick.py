"""What a ranking is measured by: against definitions, SciPy, and data whose truth is known."""

import itertools
import json
import sys

import jax
import numpy as np
import pytest
import scipy.stats
from conftest import refused
from pixels import pixels, where

from gapjax.neurons import rank, yardstick
from gapjax.neurons.yardstick import Yardstick
from gapjax.report.plots import base as plots
from gapjax.report.plots import neurons as pictures

draw = np.random.default_rng(0)
SPREAD = np.array([.1, 1, 10, 3])  # channels of unlike scales


@pytest.fixture(autouse=True)
def drawn_anew(monkeypatch):
  """A test draws the same, whatever ran before it."""
  monkeypatch.setattr(sys.modules[__name__], 'draw', np.random.default_rng(0))


def rows(images=30, channels=4, effect=0.0):
  return draw.normal(effect, 1, (images, channels)) * np.resize(SPREAD, channels)


def beyond(found):
  """Which channels exceed chance."""
  return np.abs(found.mean(0)) > yardstick.threshold(found)


def test_the_interval_is_students():
  found = rows()
  mean, half = yardstick.interval(found)
  tested = scipy.stats.ttest_1samp(found, 0).confidence_interval()
  np.testing.assert_allclose([mean - half, mean + half], tested, rtol=1e-12)


def test_halves_agree_as_far_as_their_rankings_do():
  """By SciPy on every split of four images; fully where all images say the same; not of noise."""
  found = rows(images=4, channels=9)
  splits = [scipy.stats.spearmanr(found[list(half)].mean(0), np.delete(found, half, 0).mean(0))[0]
            for half in itertools.combinations(range(4), 2)]
  assert yardstick.agreement(found) == pytest.approx(np.mean(splits), abs=.3)
  assert min(splits) <= yardstick.agreement(found) <= max(splits)
  two = found[:2]  # one split alone
  assert yardstick.agreement(two) == pytest.approx(scipy.stats.spearmanr(*two)[0])
  assert yardstick.agreement(np.arange(50) + 1e-3 * rows(30, 50)) == pytest.approx(1)
  assert abs(yardstick.agreement(draw.normal(size=(40, 500)))) < .15
  assert yardstick.agreement(found) == yardstick.agreement(found)


def test_the_threshold_is_the_largest_t_of_flipped_signs():
  """All 2^12 flips by Student's t of SciPy: a channel exceeds it that at most 5% of them reach."""
  found = rows(images=12) + np.array([0, 0, 12, 0])
  signs = np.array(list(itertools.product([-1, 1], repeat=12)))
  largest = np.array([np.abs(scipy.stats.ttest_1samp(s[:, None] * found, 0)[0]).max()
                      for s in signs])
  t = np.abs(scipy.stats.ttest_1samp(found, 0)[0])
  p = (largest[:, None] >= t - 1e-9).mean(0)
  limit = yardstick.threshold(found, flips=20_000)
  np.testing.assert_array_equal(np.abs(found.mean(0)) > limit, p <= .05)
  assert (p <= .05).any() and not (p <= .05).all()
  # In units of |t| it is the same for all channels, and the 95th percentile of the largest.
  r = limit * len(found) / np.linalg.norm(found, axis=0) / np.sqrt(12)
  np.testing.assert_allclose(np.sqrt(11) * r / np.sqrt(1 - r ** 2), np.quantile(largest, .95),
                             rtol=.02)


@pytest.mark.parametrize('kind', ['normal', 'skewed scales'])
def test_without_an_effect_some_channel_exceeds_chance_in_about_5_percent(kind):
  """300 sets of 25 images and 20 correlated channels: 15 +- 3.8."""
  found = 0
  for _ in range(300):
    sample = draw.normal(size=(25, 20)) + draw.normal(size=(25, 1))
    if kind == 'skewed scales':
      sample *= draw.exponential(size=(25, 1)) * np.resize(SPREAD, 20)
    found += (np.abs(sample.mean(0)) > yardstick.threshold(sample, flips=199)).any()
  assert 4 <= found <= 27


def test_exactly_the_channels_with_an_effect_exceed_chance():
  sample = draw.normal(size=(30, 200))
  sample[:, [3, 50, 199]] += [3, -3, 3]
  found = yardstick.measure(sample)
  assert np.flatnonzero(found.exceeding).tolist() == [3, 50, 199]
  assert found.exceeding[[3, 50, 199]].tolist() == [1, -1, 1]
  assert found.images == 30 and found.shift_share is None


def test_few_images_and_dead_channels_exceed_nothing():
  for images in range(2, 6):  # 2 of 2^5 flips reach every |t|
    assert not beyond(np.ones((images, 3))).any()
  assert beyond(np.ones((6, 3))).all()
  found = rows(images=20)
  found[:, 1] = 0
  assert not beyond(found)[1] and yardstick.measure(found).exceeding[1] == 0


def test_a_large_network_takes_little_memory():
  """2,048 channels, 1,000 images, 1,000 flips; 200 of all images, 1,000 draws."""
  sample = draw.normal(size=(1000, 2048))
  limit = yardstick.threshold(sample)
  assert (limit > 0).all() and .1 < limit.mean() < .2  # |t| of about 4.1 over sqrt(1000)
  limit = yardstick.centred(sample, np.arange(200), np.arange(1000)).threshold
  assert .22 < limit.mean() < .34  # |t| of about 4.3 times sqrt(.8 / 200)


# --- a centred region ----------------------------------------------------------------------------


def labels(inside, everywhere):
  """All that relabelling can make of two lists of images: a list of such pairs of lists."""
  images = {*inside, *everywhere}
  both, m = len({*inside} & {*everywhere}), len(inside)
  return [([*some], sorted({*images} - {*some} | {*kept}))
          for some in itertools.combinations(sorted(images), m)
          for kept in itertools.combinations(some, both)]


def t_of(rows, inside, everywhere):
  """A centred score over its standard error, from the definition."""
  others = sorted({*everywhere} - {*inside})
  m, k, both = len(inside), len(everywhere), len({*inside} & {*everywhere})
  variance = ((both * (1 / m - 1 / k) ** 2 + (m - both) / m ** 2) * rows[inside].var(0, ddof=1)
              + (k - both) / k ** 2 * rows[others].var(0, ddof=1))
  return (rows[inside].mean(0) - rows[everywhere].mean(0)) / np.sqrt(variance)


@pytest.mark.parametrize(('inside', 'everywhere'), [
  ([2, 3, 5, 9], range(10)), ([1, 8, 9], range(8))])  # two images are the region's alone
def test_the_threshold_of_a_centred_region_is_the_largest_t_of_relabelled_images(
    inside, everywhere):
  """Of all labels: a channel exceeds it that at most 5% of them reach."""
  everywhere = [*everywhere]
  found = rows(images=10) + 9
  found[inside, 2] += 90
  found[inside, 1] += 4
  largest = np.array([np.abs(t_of(found, *pair)).max() for pair in labels(inside, everywhere)])
  assert len(largest) == (210 if len(inside) == 4 else 360)
  t = np.abs(t_of(found, inside, everywhere))
  p = (largest[:, None] >= t - 1e-9).mean(0)
  one = yardstick.centred(found, np.array(inside), np.array(everywhere), draws=20_000)
  np.testing.assert_array_equal(one.exceeding, p <= .05)
  assert (p <= .05).any() and not (p <= .05).all()
  np.testing.assert_allclose(one.mean, found[inside].mean(0) - found[everywhere].mean(0))
  limit = one.threshold / (one.mean / t_of(found, inside, everywhere))
  np.testing.assert_allclose(limit, limit[0])
  assert np.quantile(largest, .94) <= limit[0] <= np.quantile(largest, .96) * (1 + 1e-5)
  assert one.images == len(inside)


def test_a_centred_interval_is_welchs():
  """By SciPy: of the difference of the region's images and the others, which is more than that of
  the region's and all."""
  found = rows(images=20) + draw.normal(size=4)
  inside = np.array([1, 4, 5, 11, 13, 19])
  others = np.setdiff1d(np.arange(20), inside)
  found[inside] *= 3
  one = yardstick.centred(found, inside, np.arange(20))
  tested = scipy.stats.ttest_ind(found[inside], found[others],
                                 equal_var=False).confidence_interval()
  np.testing.assert_allclose([one.mean - one.half, one.mean + one.half],
                             np.array(tested) * 14 / 20, rtol=1e-9)


def test_centred_intervals_hold_95_percent_of_effects_too():
  """20 channels of 100 sets: 95 +- .5%."""
  for inside, share in ((np.arange(12), 1 - 12 / 300), (np.arange(294, 306), 1 - 6 / 300)):
    held = []
    for _ in range(100):
      sample = draw.normal(size=(306, 20))
      sample[inside] += 3
      one = yardstick.centred(sample, inside, np.arange(300), draws=19)
      held.append(np.abs(one.mean - 3 * share) < one.half)
    assert .93 < np.mean(held) < .97


@pytest.mark.parametrize('kind', ['skewed', 'common', 'outside', 'wider'])
def test_without_an_effect_some_channel_exceeds_relabelling_in_about_5_percent(kind):
  """200 sets of 300 images, 12 of them the region's, and 50 channels with a skewness of 2: 10 +- 3.
  Common: a change of all images, and all channels, that is large. Outside: half of the 12 are not
  among the 300. Wider: normal, the region's three times as far apart, for which the null says
  nothing; about 5% all the same."""
  found, inside = 0, np.arange(294, 306) if kind == 'outside' else np.arange(12)
  for _ in range(200):
    sample = draw.exponential(size=(306, 50)) if kind != 'wider' else draw.normal(size=(306, 50))
    if kind == 'common':
      sample += 9 + draw.exponential(size=(306, 1))
    if kind == 'wider':
      sample[inside] *= 3
    one = yardstick.centred(sample, inside, np.arange(300), draws=99)
    found += one.exceeding.any()
  assert 2 <= found <= (30 if kind == 'wider' else 20)


def test_exactly_the_channels_with_an_effect_exceed_relabelling():
  """The threshold does not depend on scales, and a dead channel exceeds nothing. Of 5% of the seeds
  one channel more would."""
  sample = np.random.default_rng(1).normal(size=(60, 200)) + 9
  sample[:30, [3, 50, 199]] += [3, -3, 3]
  sample[:, 7] = 0
  sample *= 10 ** draw.uniform(-6, 6, 200)
  one = yardstick.centred(sample, np.arange(30), np.arange(60))
  assert np.flatnonzero(one.exceeding).tolist() == [3, 50, 199]
  assert one.exceeding[[3, 50, 199]].tolist() == [1, -1, 1]
  assert one.mean[7] == one.half[7] == 0


def test_few_images_exceed_no_relabelling():
  """2 of 4 images are 2 of 6 pairs' largest |t|; 4 of 8 are 2 of 70."""
  for m, expected in ((2, False), (4, True)):
    sample = np.repeat([[1.0] * 3, [0] * 3], m, axis=0)
    one = yardstick.centred(sample, np.arange(m), np.arange(2 * m))
    assert (one.exceeding == expected).all()


def test_centred_halves_have_half_of_the_region_each():
  """With two images inside, one each: by SciPy on both such splits of four images. Fully where all
  inside say the same; not of what is common to all images."""
  found = rows(images=4, channels=9)
  inside, everywhere = np.array([0, 1]), np.arange(4)

  def score(a, b):  # of one image inside and one other
    return found[a] - found[[a, b]].mean(0)

  splits = [scipy.stats.spearmanr(score(0, i), score(1, 5 - i))[0] for i in (2, 3)]
  assert min(splits) <= yardstick.centred(found, inside, everywhere).agreement <= max(splits)
  sample = 1e-3 * draw.normal(size=(40, 50))
  sample[:2] += np.arange(50)
  assert yardstick.centred(sample, inside, np.arange(40)).agreement == pytest.approx(1)
  sample = draw.normal(size=(80, 500)) + np.arange(500)
  assert abs(yardstick.centred(sample, np.arange(40), np.arange(80)).agreement) < .15


@pytest.mark.parametrize('images', [[10, 10], [10, 16], [3, 7]])
def test_what_centred_scores_correlate_by_where_places_do_not_matter(images):
  """By many channels of noise; of 20 images the second pair and the first share some or none."""
  labels = np.arange(20)
  one, other = labels < images[0], labels >= 20 - images[1]
  everywhere = np.ones(20, bool)
  sample = draw.normal(size=(20, 40_000))
  scores = [sample[inside].mean(0) - sample.mean(0) for inside in (one, other)]
  chance = yardstick.chance_correlation(one, other, everywhere)
  assert chance == pytest.approx(np.corrcoef(*scores)[0, 1], abs=.02)
  if images == [10, 10]:  # every image is of one or the other
    assert chance == pytest.approx(-1)
    assert yardstick.chance_correlation(everywhere, other, everywhere) == 0


# --- a shift -------------------------------------------------------------------------------------


@pytest.mark.parametrize(('axis', 'dy', 'dx'), [('horizontal', 0, 1), ('vertical', 1, 0)])
def test_a_shift_repeats_the_last_column(axis, dy, dx):
  maps = draw.normal(size=(6, 8, 5)).astype(np.float32)
  images = draw.normal(size=(3, 6, 8, 3)).astype(np.float32)
  moved = np.pad(images, ((0, 0), (0, dy), (0, dx), (0, 0)), 'edge')[:, dy:, dx:]
  expected = np.einsum('nhwk,hwc->nc', images - moved, maps, dtype=float) / (3 * 48)
  features = jax.jit(lambda x: x.mean(-1, keepdims=True) * maps)
  found = np.concatenate(list(yardstick.shifts(features, [images[:2], images[2]], axis=axis)))
  np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_stride_alone_makes_the_mirror_and_a_shift_change_alike():
  """One pixel in two is seen, so both show the other half of noise; without a stride the mirror
  changes no mean."""
  images = draw.normal(size=(40, 16, 16, 3)).astype(np.float32)

  def changed(stride):
    features = lambda x: np.asarray(x)[:, ::stride, ::stride]  # noqa: E731
    return [np.abs(np.concatenate(list(kind(features, images)))).mean()
            for kind in (yardstick.shifts, rank.differences)]

  moved, mirrored = changed(2)
  assert moved / mirrored == pytest.approx(1, abs=.15)
  moved, mirrored = changed(1)
  assert mirrored < 1e-7 and moved > 1e-3


@pytest.mark.parametrize(('call', 'message'), [
  (lambda: yardstick.interval(np.ones((1, 3))), 'two images or more'),
  (lambda: yardstick.agreement(np.ones(3)), r'\(n, c\)'),
  (lambda: yardstick.threshold(np.ones((5, 3)), flips=18), 'use 19 or more'),
  (lambda: yardstick.centred(np.ones((5, 3)), [0, 1], range(5), draws=18), 'use 19 or more'),
  (lambda: yardstick.centred(np.ones((5, 3)), [0], range(5)), 'of 5 images 1 are inside'),
  (lambda: yardstick.centred(np.ones((5, 3)), [], range(5)), 'of 5 images 0 are inside'),
  (lambda: yardstick.centred(np.ones((5, 3)), [1, 1, 0, 0, 0], range(5)), 'a mask of 5 booleans'),
  (lambda: yardstick.centred(np.ones((5, 3)), np.ones(4, bool), range(5)), 'np.flatnonzero'),
  (lambda: yardstick.centred(np.ones((5, 3)), [0, 1], range(6)), 'different indices below 5'),
  (lambda: yardstick.centred(np.ones((5, 3)), [-1, 1], range(5)), 'different indices below 5'),
  (lambda: yardstick.threshold(np.full((5, 3), np.nan)), 'infinities or NaN'),
  (lambda: yardstick.chance_correlation(*np.zeros((3, 5), bool)), 'a region holds no image'),
  (lambda: yardstick.measure(np.ones((0, 3)), moved=rows(5), averages=rows(5)), 'two images or'),
  (lambda: yardstick.measure(rows(), moved=rows(5), averages=rows(5)), r'give np.abs\(rows\)'),
  (lambda: yardstick.measure(np.abs(rows()), moved=rows(5), averages=rows(5)), 'say by `some`'),
  (lambda: yardstick.centred(np.ones((5, 3)), [0, 1, 2, 3], range(5)), 'two or more others'),
  (lambda: list(yardstick.shifts(len, np.ones((1, 2, 2, 3)), axis='horizontl')), 'did you mean')])
def test_mistakes(call, message, unchecked):
  refused(call, message)


def test_shares_are_of_means_over_channels():
  z = draw.normal(0, 2, (4000, 3))
  found = yardstick.measure(np.abs(z - z[::-1]), moved=np.full((4000, 3), -.5), averages=z)
  assert found.spread_share == pytest.approx(2 / np.sqrt(np.pi), rel=.05)  # another image
  assert found.shift_share == pytest.approx(.5 / found.mean.mean())
  assert Yardstick(2, 0, *np.zeros((2, 3)), shift=np.zeros(3), mirror=np.zeros(3)).shift_share == 0


def test_shares_are_of_one_set_of_images():
  """Those that were shifted, though the mirror changes the others ten times as much."""
  sizes = np.abs(rows(images=20)) * np.where(np.arange(20) % 5, 10, 1)[:, None]
  some = np.arange(0, 20, 5)
  found = yardstick.measure(sizes, moved=sizes[some] / 2, averages=rows(4), some=some)
  assert found.shift_share == pytest.approx(.5)
  assert found.spread_share == pytest.approx(sizes[some].mean() / found.spread.mean())
  np.testing.assert_allclose(found.mean, sizes.mean(0))


# --- on disk, and the picture --------------------------------------------------------------------


def test_what_is_written_is_read_again(tmp_path):
  found = {'overall': yardstick.measure(np.abs(rows(5)), moved=rows(5), averages=rows(5)),
           'left': yardstick.measure(rows())}
  path = tmp_path / 'a.json'
  yardstick.write_json(path, found, step=7)
  again = yardstick.read_json(path, step=7)
  for name, one in found.items():
    for key in ('images', 'agreement', 'shift_share', 'spread_share', *yardstick.ARRAYS):
      a, b = (getattr(x, key) for x in (one, again[name]))
      absent = ('threshold' if name == 'overall' else
                'shift spread mirror shift_share spread_share')
      assert (a is None) == (b is None) == (key in absent.split())
      if a is not None:
        np.testing.assert_allclose(a, b, rtol=1e-5)
  assert not yardstick.read_json(path, step=8)
  for key, value in [('half', [[1]] * 4), ('half', None), ('half', [1]), ('agreement', None),
                     ('mean', ['1'] * 4), ('mean', []), ('mean', 4), ('images', 2.5), ('order', 3),
                     ('order', ['left']), ('threshold', [None] * 4), ('mirror', None)]:
    [*records, last] = json.loads(path.read_text())
    bad = tmp_path / 'bad.json'
    bad.write_text(json.dumps([{**(records[0] if key == 'mirror' else last), key: value}]))
    refused(lambda bad=bad: yardstick.read_json(bad), 'bad.json holds no yardsticks')
  path.write_text(json.dumps([{'order': 'left', 'step': 7}]))
  refused(lambda: yardstick.read_json(path, step=7), 'a.json holds no yardsticks')
  path.write_text('[3]')
  refused(lambda: yardstick.read_json(path), 'a.json holds no yardsticks')
  path.write_text('{}')
  refused(lambda: yardstick.read_json(path), 'JSON list')


def test_the_picture_has_dots_beyond_the_grey_alone(tmp_path):
  mean = np.array([.5, -1.0, 2.0, 0.0])
  one = Yardstick(9, .5, mean, np.full(4, .1), threshold=np.full(4, 1.5))
  for name in 'ab':
    pictures.yardsticks({'left': one}, tmp_path / f'{name}.png')
  assert (tmp_path / 'a.png').read_bytes() == (tmp_path / 'b.png').read_bytes()
  few, none = pixels(tmp_path / 'a.png'), Yardstick(9, .5, mean, np.full(4, .1), np.full(4, 2.5))
  pictures.yardsticks({'left': none}, tmp_path / 'c.png')
  count = [len(where(picture, plots.LINES[0])) for picture in (few, pixels(tmp_path / 'c.png'))]
  assert count[0] > count[1]
  assert len(where(few, plots.RULE, 3)) > few.shape[0] * few.shape[1] / 8
  pictures.yardsticks({'overall': Yardstick(9, .5, mean ** 2, np.full(4, .1), shift=mean ** 2,
                                            mirror=mean ** 2)},
                      tmp_path / 'd.png')
  refused(lambda: pictures.yardsticks({}, tmp_path / 'e.png'), 'no ranking to draw')
  assert not (tmp_path / 'e.png').exists()
