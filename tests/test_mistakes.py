"""What a user of the public functions gets wrong: one line each that says the way out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import refused
from flax.core import FrozenDict

from gapjax import BlurPool, GAPHead, attack, consistency, random_shifts, rank
from gapjax.models.heads import Permute
from gapjax.neurons import yardstick
from gapjax.neurons.rank import choose
from gapjax.tasks import segmentation

draw = np.random.default_rng(0)
IMAGES = draw.normal(size=(6, 8, 10, 3)).astype(np.float32)
KEY = jax.random.key(0)
PREDICT = lambda images: images.mean((1, 2))  # noqa: E731
ONE = {'overall': [0, 1, 2]}


def attacked(labels, *, features=lambda x: x, orders=ONE, counts=(1,), batches=None, **more):
  """The attack on the images' own channels, whose means are the logits of labels (b,)."""
  batches = [{'images': IMAGES, 'labels': labels}] if batches is None else batches
  head = PREDICT if np.ndim(labels) == 1 else lambda maps: maps
  return attack(features, head, batches, orders=orders, counts=counts, **more)


ZEROS = np.zeros(6, int)
MISTAKES = {
  'a tuple of predict': (lambda: consistency(lambda x: (PREDICT(x), x), IMAGES, KEY),
                         '`predict` returns a tuple of 2; it should return logits .b, k. alone'),
  'a tuple of features': (lambda: rank(lambda x: (x, x), IMAGES), '`features` returns a tuple'),
  'a dict of features': (lambda: attacked(ZEROS, features=lambda x: {'maps': x}),
                         '`features` returns a dict'),
  'a column of predict': (lambda: consistency(lambda x: PREDICT(x)[:, :1], IMAGES, KEY),
                          r'one column .* np.concatenate\(\[-x, x\], 1\)'),
  'no logits': (lambda: consistency(lambda x: PREDICT(x)[:, :0], IMAGES, KEY),
                'or none'),
  'several keys': (lambda: consistency(PREDICT, IMAGES, jax.random.split(KEY, 2)),
                   r'keys \(2,\) are several'),
  'an old key and a half': (lambda: random_shifts(np.zeros(3, np.uint32), IMAGES, max_shift=1),
                            r'key is an array \(3,\) of uint32'),
  'bytes': (lambda: consistency(PREDICT, IMAGES.astype(np.uint8), KEY), 'images are uint8'),
  'an integer for a key': (lambda: consistency(PREDICT, IMAGES, 0), 'jax.random.key'),
  'an integer for a key of shifts': (lambda: random_shifts(0, IMAGES, max_shift=1),
                                     'jax.random.key'),
  'channels first': (lambda: consistency(PREDICT, IMAGES.transpose(0, 3, 1, 2), KEY, max_shift=2),
                     r'look like \(b, c, h, w\)'),
  'channels first, ranked': (lambda: rank(lambda x: x, IMAGES.transpose(0, 3, 1, 2)),
                             r'look like \(b, c, h, w\)'),
  'part of a pixel': (lambda: random_shifts(KEY, IMAGES, max_shift=2.0), 'no whole number'),
  'one batch of labels in columns': (lambda: attacked(np.zeros((6, 1), int)),
                                     r'labels are \(b,\), a class number an image, or'),
  'labels from 1': (lambda: attacked(ZEROS + 3), 'labels go from 3 to 3; .* has 3 classes'),
  'a region of nobody': (lambda: attacked(ZEROS, regions=['lft']), 'unknown region `lft`'),
  'an order without a name': (lambda: attacked(ZEROS, orders=np.arange(3)), 'orders is a ndarray'),
  'scores for an order': (lambda: attacked(ZEROS, orders={'a': [.3, .1, .2]}), 'rank.order'),
  'fractions for counts': (lambda: attacked(ZEROS, counts=[.1, .5]), 'no fractions'),
  'tuples to rank': (lambda: rank(lambda x: x, [(IMAGES, ZEROS)]), 'a batch is a tuple'),
  'a tuple of head': (lambda: attack(lambda x: x, lambda maps: (PREDICT(maps), maps),
                                     [{'images': IMAGES, 'labels': ZEROS}], orders=ONE,
                                     counts=[1]), '`head` returns a tuple'),
  'a mask for an order': (lambda: attacked(ZEROS, orders={'a': [True, False, True]}), 'holds bool'),
  'a shift alone': (lambda: yardstick.measure(np.ones((3, 2)), moved=np.ones((3, 2))),
                    '`moved` and `averages` go together'),
  'tuples for batches': (lambda: attacked(ZEROS, batches=[(IMAGES, ZEROS)]), 'not tuple'),
  'other keys in batches': (lambda: attacked(ZEROS, batches=[{'image': IMAGES, 'label': ZEROS}]),
                            'batches are dicts of'),
  'a layer that bends': (lambda: attacked(np.zeros((6, 8, 10), int),
                                          layer=lambda maps, _: jnp.square(
                                            maps.sum(-1, keepdims=True) * jnp.arange(3.))),
                         '`layer` .* is not a sum over channels'),
  'too few keys of shifts': (lambda: random_shifts(jax.random.split(KEY, 4), IMAGES, max_shift=1),
                             r'keys \(4,\) are neither one \(\) nor one an image \(6,\)'),
  'a mask with a channel': (lambda: choose([{'label': np.ones((4, 6, 1), int)}], region='left',
                                           classes=[1]), r'masks are .* not \(4, 6, 1\)'),
  'a blur of bytes': (lambda: BlurPool().apply({}, IMAGES.astype(np.uint8)), 'maps are uint8'),
  'a FrozenDict of predict': (lambda: consistency(lambda x: FrozenDict(a=PREDICT(x)), IMAGES, KEY),
                              '`predict` returns a FrozenDict of 1'),
  'a mode of nobody': (lambda: Permute('Fixed').apply({}, IMAGES, rngs={'permutation': KEY}),
                       'unknown mode `Fixed` .did you mean `fixed`'),
  "torch's name of a padding": (lambda: GAPHead(10, padding='zeros').init(KEY, IMAGES),
                                'unknown padding `zeros` .did you mean `zero`'),
  'a number for a region': (lambda: segmentation.region(.5), 'unknown region `0.5`'),
  'an open end of a region': (lambda: segmentation.region((0, .5, None, 1)), 'unknown region'),
  'three numbers for a region': (lambda: segmentation.region([0, .5, 1]), 'unknown region'),
  'maps of channels first': (lambda: rank(lambda x: x.transpose(0, 3, 1, 2), IMAGES[:, :, :8]),
                             r'maps \(6, 3, 8, 8\) that look like \(b, c, h, w\)'),
}


@pytest.mark.parametrize('mistake', MISTAKES)
def test_mistakes_of_a_users_are_one_line(mistake):
  refused(*MISTAKES[mistake])


@pytest.mark.parametrize('made', [dict(requires_grad=True), dict(dtype='bfloat16'),
                                  dict(device='meta')], ids=str)  # meta: as a GPU's, without one
@pytest.mark.parametrize('call', [
  lambda f: consistency(f, IMAGES, KEY, max_shift=2), lambda f: rank(f, IMAGES),
  lambda f: attacked(ZEROS, features=f),
  lambda f: attack(lambda x: x, f, [{'images': IMAGES, 'labels': ZEROS}], orders=ONE, counts=[1])],
  ids=['consistency', 'rank', 'features', 'head'])
def test_tensors_that_are_no_arrays(made, call):
  torch = pytest.importorskip('torch')
  made = {**made, **({'dtype': torch.bfloat16} if 'dtype' in made else {})}
  refused(lambda: call(lambda images: torch.zeros((6, 3), **made)),
          r'returns a tensor .*\.detach\(\)\.float\(\)\.cpu\(\)\.numpy\(\)')


@pytest.mark.parametrize('of', [tuple, list, np.array])
def test_a_rectangle_is_four_numbers_of_any_kind(of):
  assert segmentation.region(of([0, .5, 1, 1])) == (0, .5, 1, 1)


def test_a_mask_is_as_good_as_indices():
  rows, inside = draw.normal(size=(20, 3)), np.arange(20) % 3 == 0
  masked, listed = (yardstick.centred(rows, some, np.arange(20), draws=99)
                    for some in (inside, np.flatnonzero(inside)))
  assert masked.images == listed.images == 7
  np.testing.assert_array_equal(masked.threshold, listed.threshold)


@pytest.mark.parametrize('call', [
  rank,
  lambda features, images: rank(features, images, region='top'),
  lambda features, images: [*yardstick.shifts(features, images)],
  lambda features, images: attacked(ZEROS, features=features, batches=[
    {'images': images, 'labels': ZEROS}])])
@pytest.mark.parametrize('kind', [np.float64, np.float32, jnp.float32])
def test_features_get_every_batch_as_the_caller_has_it(call, kind):
  """As torch.from_numpy takes NumPy's: nothing of jax's, nothing with a negative stride."""
  images, seen = kind(IMAGES) if kind is not jnp.float32 else jnp.asarray(IMAGES), []

  def features(x):
    seen.append((type(x), x.dtype, isinstance(x, jax.Array) or min(x.strides) > 0))
    return x

  call(features, images)
  assert {*seen} == {(type(images), images.dtype, True)}


def test_one_count_and_what_is_printed():
  assert attacked(ZEROS, counts=2).counts == (0, 2)
  assert str(consistency(PREDICT, IMAGES[:4], KEY, max_shift=0)) == '100.0% of 4 images'


def test_one_batch_may_stand_alone():
  batch = {'images': IMAGES, 'labels': ZEROS}
  assert attacked(ZEROS, batches=batch).metrics['accuracy']['overall'].shape == (1, 2)
