"""Rankings against their definition in NumPy, on features whose position channels are known."""

import inspect
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import refused
from pixels import pixels, where

from gapjax import config as configs
from gapjax import paths
from gapjax.neurons import rank
from gapjax.report.plots import base as plots
from gapjax.report.plots import neurons as pictures

H, W, C = 6, 8, 5
draw = np.random.default_rng(0)
MAPS = draw.normal(size=(H, W, C)).astype(np.float32)
IMAGES = draw.normal(size=(7, H, W, 3)).astype(np.float32)


@jax.jit
def features(images):
  """Each channel weighs brightness by a map of its own: it knows where things are."""
  return images.mean(-1, keepdims=True) * MAPS


def average(images):
  """z by its definition, (n, c)."""
  return np.einsum('nhwk,hwc->nc', images.astype(np.float64), MAPS) / (3 * H * W)


DIFFERENCES = {'horizontal': average(IMAGES) - average(IMAGES[:, :, ::-1]),
               'vertical': average(IMAGES) - average(IMAGES[:, ::-1])}


def batches(kind):
  """All seven images: one by one, in unequal batches, or as an iterator of device arrays."""
  return {'images': IMAGES, 'batches': [IMAGES[:4], IMAGES[4:6], IMAGES[6]],
          'iterator': map(jnp.asarray, [IMAGES[:5], IMAGES[5:]])}[kind]


# --- scores ----------------------------------------------------------------------------------


@pytest.mark.parametrize('axis', rank.AXES)
@pytest.mark.parametrize('kind', ['images', 'batches', 'iterator'])
def test_differences_and_overall_by_definition(axis, kind):
  found = np.concatenate(list(rank.differences(features, batches(kind), axis=axis)))
  np.testing.assert_allclose(found, DIFFERENCES[axis], atol=1e-6)
  overall = rank.overall(features, batches(kind), axis=axis)
  np.testing.assert_allclose(overall, np.abs(DIFFERENCES[axis]).mean(0), atol=1e-6)


@pytest.mark.parametrize(('region', 'axis'), [
  ('left', 'horizontal'), ('right', 'horizontal'), ('top', 'vertical'), ('bottom', 'vertical'),
  ((0, .4, .3, .8), 'vertical'), ('0,0,0.5,0.5', 'horizontal'), ((.1, .7, .7, .9), 'horizontal')])
def test_region_scores_are_signed_and_mirrored_by_the_region(region, axis):
  assert rank.mirror_axis(region) == axis
  found = rank.by_region(features, batches('batches'), region=region)
  np.testing.assert_allclose(found, DIFFERENCES[axis].mean(0), atol=1e-6)


@pytest.mark.parametrize('region', ['center', 'all', (.2, .1, .8, .9)])
def test_a_centred_region_is_refused(region):
  refused(lambda: rank.by_region(features, IMAGES, region=region), 'is centred')


def test_averages_may_come_from_the_network_already():
  pooled = rank.overall(lambda images: features(images).mean((1, 2)), IMAGES)
  np.testing.assert_allclose(pooled, np.abs(DIFFERENCES['horizontal']).mean(0), atol=1e-6)
  np.testing.assert_allclose(rank.mean_activations(features, batches('batches')),
                             average(IMAGES), atol=1e-6)


def test_planted_position_channels_are_found():
  """Channels that see the left, the right or the top half, and one that sees everything."""
  masks = np.zeros((H, W, 4), np.float32)
  masks[:, :W // 2, 0] = masks[:, W // 2:, 1] = masks[:H // 2, :, 2] = masks[..., 3] = 1
  def halves(images):
    return images.mean(-1, keepdims=True) * masks
  images = np.zeros((4, H, W, 3), np.float32)
  images[:2, :2, :2] = 1  # an object top left
  images[2:, :2, -2:] = 1  # the same top right
  left, right = (rank.by_region(halves, part, region=name)
                 for part, name in ((images[:2], 'left'), (images[2:], 'right')))
  assert (rank.order(left)[0], rank.order(left)[-1]) == (0, 1)
  assert (rank.order(right)[0], rank.order(right)[-1]) == (1, 0)
  assert rank.order(rank.by_region(halves, images, region='top'))[0] == 2
  assert set(rank.order(rank.overall(halves, images))[:2]) == {0, 1}
  np.testing.assert_allclose(rank.overall(halves, images)[2:], 0, atol=1e-7)


def test_order_is_stable_and_refuses_what_is_no_number():
  assert rank.order([1, 3, 2, 3]).tolist() == [1, 3, 2, 0]
  refused(lambda: rank.order([0, np.nan, 1]), r'channels \[1\]')


@pytest.mark.parametrize(('call', 'message'), [
  (lambda: rank.overall(features, []), 'no image'),
  (lambda: rank.mean_activations(features, []), 'no image'),
  (lambda: rank.overall(features, IMAGES, axis='horizontl'), 'did you mean `horizontal`'),
  (lambda: rank.overall(features, IMAGES[0]), 'images have shape'),
  (lambda: rank.overall(lambda x: x.sum((1, 2, 3)), IMAGES), 'it should return'),
])
def test_what_cannot_be_ranked(call, message):
  refused(call, message)


# --- a region's images -----------------------------------------------------------------------


def scene(name, *places, shape=(4, 8), **more):
  """A mask in which the pixels (row, column, class) are set, 0 elsewhere."""
  label = np.zeros(shape, np.int32)
  for y, x, c in places:
    label[y, x] = c
  return {'id': name, 'label': label, **more}


SCENES = [
  scene('nothing'),
  scene('left', (0, 0, 7), (1, 3, 8), (2, 2, 7)),
  scene('right', (0, 4, 7), (1, 7, 7)),
  scene('both', (0, 0, 7), (0, 1, 7), (0, 3, 7), (3, 4, 8)),  # three quarters left
  scene('other', (0, 0, 9), (0, 1, 255)),
  # The image is 4 x 4 of the array: its middle is column 2, and beyond it nothing counts.
  scene('small', (0, 1, 7), (1, 0, 7), (0, 6, 7), size=(4, 4)),
]


@pytest.mark.parametrize(('settings', 'expected'), [
  ({}, ['left', 'small']),
  ({'region': 'right'}, ['right']),
  ({'region': (0, .5, 1, 1)}, ['right']),
  ({'purity': .75}, ['left', 'both', 'small']),
  ({'purity': .76}, ['left', 'small']),
  ({'region': 'right', 'purity': .25}, ['right', 'both']),
  ({'region': 'top', 'purity': .6}, ['left', 'right', 'both', 'small']),
  ({'least_area': 3 / 32}, ['left', 'small']),  # 3 of 32 pixels; 2 of 16
  ({'least_area': 3.1 / 32}, ['small']),
  ({'classes': [7]}, ['left', 'both', 'small']),
  ({'classes': [9]}, ['other']),
  ({'limit': 1}, ['left']),
])
def test_images_of_a_region_are_chosen_by_their_masks(settings, expected):
  settings = {'region': 'left', 'classes': [7, 8], 'least_area': 0, **settings}
  found = rank.choose(iter(SCENES), **settings)
  assert [SCENES[i]['id'] for i in found] == expected
  assert rank.with_ids(SCENES, expected) == found


def test_images_are_chosen_as_a_run_chooses_them_by_default():
  own, run = inspect.signature(rank.choose).parameters, configs.default().neurons
  assert (own['least_area'].default, own['purity'].default) == (run.least_area, run.purity)


@pytest.mark.parametrize(('settings', 'message'), [
  ({'classes': []}, 'no class'), ({'classes': 1}, 'numbers of classes in a list'),
  ({'classes': ['car']}, 'numbers of classes'), ({'purity': 0}, 'purity 0'),
  ({'least_area': 1.5}, 'fractions'),
  ({'limit': 0}, 'limit 0'), ({'region': 'lft'}, 'unknown region'),
  ({'classes': [3]}, r'none of 6 images has classes \[3\].*lower least_area'),
  ({'least_area': .5}, 'none of 6 images')])
def test_settings_that_choose_nothing(settings, message, unchecked):
  settings = {'region': 'left', 'classes': [7], **settings}
  refused(lambda: rank.choose(SCENES, **settings), message)


def test_ids_that_are_not_there():
  assert rank.with_ids([{'id': 12}, {'id': 7}], ['7', 12]) == [1, 0]
  refused(lambda: rank.with_ids(SCENES, ['left', 'rigt']),
          r'no image has the id `rigt` .did you mean `right`')
  refused(lambda: rank.with_ids(SCENES, []), 'empty')
  theirs = ['lindau_000000_000019_leftImg8bit']  # a line of the authors' CityPerson.txt
  assert rank.with_ids([{'id': 'lindau_000000_000019'}], theirs) == [0]
  refused(lambda: rank.with_ids([{'id': 12}, {'id': 7}], [7, 12, '7']), 'names `7` twice')


# --- the authors' JSON -------------------------------------------------------------------------


def test_the_authors_files_are_read_and_written(tmp_path):
  channels = draw.permutation(2048)
  rank.save(tmp_path / 'ours.json', overall=channels)
  assert json.loads((tmp_path / 'ours.json').read_text()) == {'overall': channels.tolist()}
  theirs = tmp_path / 'left.json'
  with open(theirs, 'w') as file:
    json.dump({'left': channels[:300].tolist()}, file)
  assert rank.load(theirs, num_channels=2048)['left'].tolist() == channels[:300].tolist()
  right = tmp_path / 'cityscapes_right-2048.json'  # the authors' has this key, too
  right.write_bytes(theirs.read_bytes())
  refused(lambda: rank.load(right, num_channels=2048), 'after the right.*`left`.*--ranking=right=')
  assert [*rank.load(right, num_channels=2048, called='right')] == ['right']
  assert paths.named(f'right={right}') == ('right', str(right))
  odd = tmp_path / 'lr=0.1'
  odd.mkdir()
  for path in (str(odd / 'left.json'), str(odd)):  # the '=' of a folder is no name
    assert paths.named(path) == (None, path)
  assert paths.named('lr=0.1') == ('lr', '0.1') and paths.named(None) == (None, None)
  rank.save(tmp_path / 'two.json', left=channels, right=channels)
  refused(lambda: rank.load(tmp_path / 'two.json', num_channels=2048, called='right'),
          'holds 2 lists')
  rank.save(tmp_path / 'again.json', **rank.load(theirs, num_channels=2048))
  assert (tmp_path / 'again.json').read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize(('text', 'message'), [
  ('{"left": [0, 4]}', 'names channel 4, but the network has 4'),
  ('{"left": [0, -1]}', 'names channel -1'), ('{"left": [2, 0, 2]}', 'names channel 2 twice'),
  ('{"left": [0.5]}', 'not a list of channel numbers'), ('{"left": []}', 'not a list'),
  ('{"left": [true]}', 'not a list'), ('{"left": 3}', 'not a list'), ('{}', 'no list of channels'),
  ('[1, 2]', 'JSON object'), ('{"left": [1', 'is not JSON')])
def test_a_file_that_is_no_order_is_named(tmp_path, text, message):
  (tmp_path / 'order.json').write_text(text)
  refused(lambda: rank.load(tmp_path / 'order.json', num_channels=4), f'order.json.*{message}')


# --- the picture -----------------------------------------------------------------------------


def test_correlation_is_pearsons():
  a, b = np.random.default_rng(0).normal(size=(2, 50))
  assert rank.correlation(a, b) == pytest.approx(np.corrcoef(a, b)[0, 1], abs=1e-12)
  assert rank.correlation(a, 3 - 2 * a) == pytest.approx(-1)
  assert rank.correlation(a, np.ones(50)) == 0


def test_picture_of_activations_tells_left_from_right(tmp_path):
  left, right = draw.normal(1, .1, (5, 9)), draw.normal(1, .1, (6, 9))
  left[:, 3] += 2
  right[:, 4] += 2
  groups, channels = {'left': left, 'right': right}, {'left': [3], 'right': [4, 3]}
  for name in 'ab':
    pictures.activations(groups, tmp_path / f'{name}.png', channels=channels, top=1)
  assert (tmp_path / 'a.png').read_bytes() == (tmp_path / 'b.png').read_bytes()
  picture = pixels(tmp_path / 'a.png')
  half = picture.shape[1] // 2
  dots = picture[picture.shape[0] // 3:]  # below the legend
  for panel, sign in ((dots[:, :half], 1), (dots[:, half:], -1)):
    here, there = (where(panel, plots.LINES[i], 8)[:, 1].mean() for i in (0, 2))  # left, right
    assert sign * (here - there) > half / 4


@pytest.mark.parametrize(('groups', 'channels', 'message'), [
  ({}, {'left': [0]}, 'nothing to draw'), ({'left': np.ones((2, 3))}, {}, 'nothing to draw'),
  ({'left': np.ones((0, 3))}, {'left': [0]}, 'nothing to draw'),
  ({'left': np.ones((2, 3))}, {'left': [3]}, 'channel 3 is none of the 3')])
def test_activations_that_cannot_be_drawn(tmp_path, groups, channels, message):
  refused(lambda: pictures.activations(groups, tmp_path / 'a.png', channels=channels), message)
  assert not (tmp_path / 'a.png').exists()
