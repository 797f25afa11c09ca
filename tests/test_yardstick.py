"""What a ranking is measured by: against definitions, SciPy, and data whose truth is known."""

import itertools
import json

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


@pytest.mark.parametrize('kind', ['normal', 'skewed scales', 'centred'])
def test_without_an_effect_some_channel_exceeds_chance_in_about_5_percent(kind):
  """300 sets of 25 images and 20 correlated channels: 15 +- 3.8. Centred: the change is common to
  all images, and large."""
  found = 0
  for _ in range(300):
    sample = draw.normal(size=(25, 20)) + draw.normal(size=(25, 1))
    if kind == 'skewed scales':
      sample *= draw.exponential(size=(25, 1)) * np.resize(SPREAD, 20)
    if kind == 'centred':
      sample = yardstick.centred(sample + 9, np.arange(10), np.arange(25))
    found += (np.abs(sample.mean(0)) > yardstick.threshold(sample, flips=199)).any()
  assert 4 <= found <= 27


@pytest.mark.parametrize('centre', [False, True])
def test_exactly_the_channels_with_an_effect_exceed_chance(centre):
  sample = draw.normal(size=(60, 200))
  sample[:30, [3, 50, 199]] += [3, -3, 3]
  if centre:
    sample += 9
    sample = yardstick.centred(sample, np.arange(30), np.arange(60))
    found = yardstick.measure(sample, images=30)
  else:
    found = yardstick.measure(sample[:30])
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


def test_rows_of_a_centred_region_have_its_score_as_their_mean():
  found = rows(images=12)
  inside, everywhere = np.array([2, 5, 5, 11]), np.arange(8)
  np.testing.assert_allclose(
    yardstick.centred(found, inside, everywhere).mean(0),
    found[inside].mean(0) - found[:8].mean(0), atol=1e-12)


def test_a_large_network_takes_little_memory():
  """2,048 channels, 1,000 images, 1,000 flips."""
  limit = yardstick.threshold(draw.normal(size=(1000, 2048)))
  assert (limit > 0).all() and .1 < limit.mean() < .2  # |t| of about 4.1 over sqrt(1000)


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
  (lambda: list(yardstick.shifts(len, np.ones((1, 2, 2, 3)), axis='horizontl')), 'did you mean')])
def test_mistakes(call, message, unchecked):
  refused(call, message)


def test_shares_are_of_means_over_channels():
  z = draw.normal(0, 2, (4000, 3))
  found = yardstick.measure(np.abs(z - z[::-1])[:2000], moved=np.full((4000, 3), -.5),
                            averages=z)
  assert found.spread_share == pytest.approx(2 / np.sqrt(np.pi), rel=.05)  # another image
  assert found.shift_share == pytest.approx(.5 / found.mean.mean())
  assert Yardstick(2, 0, *np.zeros((2, 3)), shift=np.zeros(3)).shift_share == 0


# --- on disk, and the picture --------------------------------------------------------------------


def test_what_is_written_is_read_again(tmp_path):
  found = {'overall': yardstick.measure(np.abs(rows()), moved=rows(5), averages=rows(5)),
           'left': yardstick.measure(rows())}
  path = tmp_path / 'a.json'
  yardstick.write_json(path, found, step=7)
  again = yardstick.read_json(path, step=7)
  for name, one in found.items():
    for key in ('images', 'agreement', 'shift_share', 'spread_share', *yardstick.ARRAYS):
      a, b = (getattr(x, key) for x in (one, again[name]))
      absent = 'threshold' if name == 'overall' else 'shift spread shift_share spread_share'
      assert (a is None) == (b is None) == (key in absent.split())
      if a is not None:
        np.testing.assert_allclose(a, b, rtol=1e-5)
  assert not yardstick.read_json(path, step=8)
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
  pictures.yardsticks({'overall': Yardstick(9, .5, mean ** 2, np.full(4, .1), shift=mean ** 2)},
                      tmp_path / 'd.png')
  refused(lambda: pictures.yardsticks({}, tmp_path / 'e.png'), 'no ranking to draw')
  assert not (tmp_path / 'e.png').exists()
