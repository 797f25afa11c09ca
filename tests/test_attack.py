"""The one-pass sweep against zeroing and re-running, and its counts against scikit-learn."""

import csv
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_shallow, refused, trained
from sklearn.metrics import confusion_matrix, jaccard_score

from gapjax.models.deeplab import DeepLab
from gapjax.neurons import attack, network, sweeps
from gapjax.neurons.network import Network
from gapjax.report.plots import neurons as pictures
from gapjax.tasks import segmentation
from gapjax.tasks.segmentation import REGIONS, region

draw = np.random.default_rng(0)


def pixels(rectangle, height, width):
  """The rows and columns of a rectangle in fractions, rounded down, as slices."""
  top, left, bottom, right = rectangle
  return (slice(int(top * height), int(bottom * height)),
          slice(int(left * width), int(right * width)))


# --- DeepLab: one pass equals zeroing and re-running ---------------------------------------------

SIZE = 48
IMAGES = draw.normal(size=(2, SIZE, SIZE, 3)).astype(np.float32)
KINDS = [('deeplabv3', 8, 'replicate'), ('deeplabv3plus', 16, 'zero'),
         ('deeplabv3plus', 8, 'partial', 'mobilenetv2', 'separable'),
         ('deeplabv3', 16, 'zero', 'efficientnet_lite0')]


@pytest.fixture(scope='module', params=KINDS, ids=lambda kind: '-'.join(map(str, kind)))
def deeplab(request):
  """A tiny network, its variables, and its cut."""
  variant, stride, padding, *more = request.param
  backbone, separable = more[0] if more else 'resnet10', 'separable' in more
  model = DeepLab(variant, 5, backbone, 4, stride, padding=padding, separable=separable)
  with pytest.MonkeyPatch.context() as patch:
    make_shallow(patch)
    variables = trained(model, IMAGES)
    yield model, variables, network.deeplab(model, variables)


def test_one_pass_equals_zeroing_and_rerunning(deeplab):
  model, variables, cut = deeplab

  @jax.jit
  def rerun(features, keep):
    branches = model.apply(variables, features['stage4'] * keep, method='branches')
    return model.apply(variables, branches, features, size=IMAGES.shape[1:3], train=False,
                       method='decode')

  features = cut.features(IMAGES)
  # Both from the same features: MobileNetV2's 52 layers with drawn statistics make 1e-4 of
  # float32's rounding, and another order of the same sums would be all that is seen.
  encoded = jax.jit(lambda x: model.apply(variables, x, train=False, method='encode'))(IMAGES)
  np.testing.assert_allclose(features['stage4'], encoded['stage4'],
                             atol=1e-3 * np.abs(encoded['stage4']).max())
  channels = features['stage4'].shape[-1]
  assert channels == (32 if model.backbone_name == 'resnet10' else 16)
  order, counts = draw.permutation(channels), (1, 5, 9, 13, channels)
  clean = np.asarray(rerun(features, np.ones(channels, np.float32)))
  predicted = {key: np.asarray(p) for key, p in attack.predictions(
    cut, features, orders={'a': order}, counts=counts)}
  found = dict(attack.remaining(cut, features, order, counts=(0, *counts)))
  assert list(found) == [*counts[::-1], 0] and len(predicted) == 1 + len(counts)
  for count in (0, *counts):
    keep = np.ones(channels, np.float32)
    keep[order[:count]] = 0
    expected = np.asarray(rerun(features, keep))
    ours = cut._complete(variables, found[count], features)  # the logits
    np.testing.assert_allclose(ours, expected, atol=1e-5 * np.abs(expected).max())
    assert count < 5 or np.abs(expected - clean).max() > 1e-2 * np.abs(clean).max()
    for classes in (predicted['a' if count else sweeps.CLEAN, 0, count],
                    cut.without(features, order[:count])):
      assert (classes == expected.argmax(-1)).mean() > .998  # but for ties
  # All blocks, of 4, 4, 4, 7 and 4 or 12 channels, were one program; the whole network another.
  assert cut._contribution._cache_size() <= 2 and cut._complete._cache_size() == 1


def test_bfloat16_networks_are_attacked_in_float32(deeplab):
  model, variables, _ = deeplab
  half = network.deeplab(model.clone(dtype=jnp.bfloat16), variables)
  shapes = jax.eval_shape(half.encode, variables, IMAGES)
  assert shapes['stage4'].dtype == jnp.float32
  assert half.num_classes({**shapes, 'images': IMAGES, 'number': 0}) == 5
  assert set(shapes) == {'stage4', 'stage1'} - ({'stage1'} if model.variant == 'deeplabv3' else
                                                set())


# --- counts, on a network of integers: exact, whatever the order of its sums -------------------

C, K = 9, 4
MIX = draw.integers(-2, 3, (3, C)).astype(np.float32)
KERNEL = draw.integers(-3, 4, (C, K)).astype(np.float32)
BIAS = np.array([.25, -.5, 0, .125], np.float32)  # no ties between the integers
TOY = {'mix': MIX, 'kernel': KERNEL, 'bias': BIAS}
VOID = [-1, K, 255]
BATCHES = [{'images': draw.integers(0, 9, (3, 8, 12, 3)).astype(np.float32),
            'labels': np.where(draw.random((3, 8, 12)) < .2, draw.choice(VOID, (3, 8, 12)),
                               draw.integers(0, K, (3, 8, 12)))} for _ in range(2)]
ORDERS = {'left': draw.permutation(C)[:6], 'random': attack.random_orders(C, 2, seed=3)}
COUNTS = (2, 3, 6)
ATTACKED = ('all', 'left', 'center', '0,0.25,0.5,1')


def encode(variables, images):
  return {'cut': images @ variables['mix']}


def toy(**changes):
  return dataclasses.replace(Network(
    TOY, encode, branches=lambda v, x, channels: {'y': x @ v['kernel'][channels]},
    rest=lambda v, branches, features: branches['y'] + v['bias'], stage='cut'), **changes)


def rerun_toy(images, removed):
  """The classes by definition: integers, in NumPy."""
  x = images @ MIX
  x[..., removed] = 0
  return (x @ KERNEL + BIAS).argmax(-1)


def all_orders():
  return [(name, i, row) for name, rows in ORDERS.items()
          for i, row in enumerate(np.atleast_2d(rows))]


HEAD_ONLY = dict(branches=None, rest=None,
                 head=lambda v, features: features['cut'] @ v['kernel'] + v['bias'])


@pytest.fixture(scope='module')
def swept():
  return attack.sweep(toy(), BATCHES, orders=ORDERS, counts=[6, 3, 2, 0], regions=ATTACKED)


def test_sweep_counts_as_scikit_learn_does(swept):
  assert swept.counts == (0, *COUNTS)
  for name, i, row in all_orders():
    for n, count in enumerate(swept.counts):
      for r, where in enumerate(ATTACKED):
        rows, columns = pixels(region(where), 8, 12)
        truth, predicted = (np.concatenate([p[:, rows, columns].ravel() for p in parts])
                            for parts in ([b['labels'] for b in BATCHES],
                                          [rerun_toy(b['images'], row[:count]) for b in BATCHES]))
        expected = confusion_matrix(truth, predicted, labels=range(K))  # ignores void
        np.testing.assert_array_equal(swept.matrices[name][i, n, r], expected)
        known = ~np.isin(truth, VOID)
        iou = jaccard_score(truth[known], predicted[known], labels=np.unique(truth[known]),
                            average='macro')
        metric = 'miou' if where == 'all' else f'miou_{where}'
        assert swept.metrics[metric][name][i, n] == pytest.approx(iou, abs=1e-12)


def test_rerunning_gives_the_same(swept):
  result = attack.sweep(toy(**HEAD_ONLY), iter(BATCHES), orders=ORDERS, counts=COUNTS,
                        regions=ATTACKED)
  assert result.matrices.keys() == swept.matrices.keys()
  for name, matrices in result.matrices.items():
    np.testing.assert_array_equal(matrices, swept.matrices[name])


@pytest.mark.parametrize('size', [1, 2, 3, 20])
def test_blocks_may_be_convolved_in_pieces_of_any_size(swept, monkeypatch, size):
  monkeypatch.setattr(attack, 'piece_size', lambda sizes: size)
  result = attack.sweep(toy(), BATCHES, orders=ORDERS, counts=COUNTS, regions=ATTACKED)
  for name, matrices in result.matrices.items():
    np.testing.assert_array_equal(matrices, swept.matrices[name])


def test_every_channel_is_convolved_once_and_features_are_shared():
  seen, encoded = [], []

  class Counting(Network):
    def contribution(self, features, channels, size):
      seen.append(len(channels))
      return super().contribution(features, channels, size)

    def features(self, images, step=0):
      encoded.append(step)
      return super().features(images, step)

  orders = {'random': attack.random_orders(C, 5, seed=0)}
  attack.sweep(Counting(**vars(toy())), BATCHES, orders=orders, counts=COUNTS)
  assert encoded == [0, 1]
  # The whole, the first order whole as a check, and all others but for their first block.
  assert sum(seen) == len(BATCHES) * (C + C + 4 * (C - COUNTS[0]))


def test_regions_are_fractions_of_each_images_own_size():
  images = BATCHES[0]['images'][:2]
  labels = BATCHES[0]['labels'][:2].copy()
  sizes = np.array([[8, 12], [4, 6]])
  labels[1, 4:] = labels[1, :, 6:] = 255
  result = attack.sweep(toy(), [{'images': images, 'labels': labels, 'size': sizes}],
                        orders={'left': ORDERS['left']}, counts=[2], regions=['right'])
  predicted = rerun_toy(images, ORDERS['left'][:2])
  truth = np.concatenate([labels[0, :, 6:].ravel(), labels[1, :4, 3:6].ravel()])
  taken = np.concatenate([predicted[0, :, 6:].ravel(), predicted[1, :4, 3:6].ravel()])
  np.testing.assert_array_equal(result.matrices['left'][0, 1, 0],
                                confusion_matrix(truth, taken, labels=range(K)))


def test_left_channels_matter_to_the_left():
  """Planted: channel 0 tells the class in the left half, channel 1 in the right."""
  w, labels = 12, draw.integers(0, 2, (2, 8, 12))
  masks = np.zeros((8, w, 2), np.float32)
  masks[:, :6, 0] = masks[:, 6:, 1] = 1
  cut = Network({}, lambda v, x: {'stage4': (2 * x[..., :1] - 1) * masks},
                lambda v, f: jnp.stack([-f['stage4'].sum(-1) + .5, f['stage4'].sum(-1)], -1))
  images = np.repeat(labels[..., None], 3, -1).astype(np.float32)
  result = attack.sweep(cut, [{'images': images, 'labels': labels}],
                        orders={'left': [0], 'right': [1]}, counts=[1])
  lost = {m: {name: v[0, 0] - v[0, 1] for name, v in by.items()}
          for m, by in result.metrics.items()}
  assert lost['miou_left']['right'] == lost['miou_right']['left'] == 0
  assert lost['miou_left']['left'] > .5 and lost['miou_right']['right'] > .5
  assert set(result.metrics) == {'miou', 'miou_left', 'miou_right', 'miou_center'}
  assert set(attack.ATTACK_REGIONS) <= set(REGIONS)


# --- what is refused ---------------------------------------------------------------------------


def biased(v, x, channels):
  return {'y': x @ v['kernel'][channels] + 1}


def rectified(v, x, channels):
  return {'y': jax.nn.relu(x @ v['kernel'][channels])}


def attacked(batches=BATCHES, *, cut=None, orders=ORDERS, counts=COUNTS, **more):
  return attack.sweep(cut or toy(), batches, orders=orders, counts=counts, **more)


@pytest.mark.parametrize(('call', 'message'), [
  (lambda: attacked(cut=toy(branches=biased)), 'not a sum over channels.*or leave it out'),
  (lambda: attacked(cut=toy(branches=rectified)), 'not a sum over channels'),
  (lambda: attacked(cut=toy(variables={**TOY, 'mix': np.full_like(MIX, np.nan)})),
   'infinities or NaN'),
  (lambda: attacked(cut=toy(stage='stage4')), r"no `stage4` but \['cut'\]"),
  (lambda: attacked(cut=toy(encode=lambda v, x: x)), 'return a dict'),
  (lambda: toy(rest=None), 'needs `head`, or both'), (lambda: Network({}, encode), 'needs `head`'),
  (lambda: attacked([]), 'no batch'),
  (lambda: attacked(counts=[0]), 'to remove'), (lambda: attacked(counts=[-1, 2]), 'to remove'),
  (lambda: attacked(counts=[2, 7]), '`left` has 6 channels, fewer than the 7'),
  (lambda: attacked(orders={}), 'name the orders'),
  (lambda: attacked(orders={'clean': range(9)}), 'none of them `clean`'),
  (lambda: attacked(orders={'a': [0, 1, 2, 3, 4, 5, 9]}), 'no list of distinct channels'),
  (lambda: attacked(orders={'a': [0, 1, 2, 3, 4, 4]}), 'no list of distinct channels'),
  (lambda: attacked(orders={'a': [0, 1, 2, 3, 4, -1]}), 'no list of distinct channels'),
  (lambda: attacked(orders={'a': [.5, 1, 2, 3, 4, 0]}), 'no numbers of channels'),
  (lambda: attacked(regions=['lef']), 'unknown region'),
  (lambda: attacked([{**BATCHES[0], 'labels': np.zeros((3, 4, 6), int)}]), 'resize its logits'),
  (lambda: attack.accuracy_sweep(toy(), [{**BATCHES[0], 'labels': np.zeros(3, int)}],
                                 orders=ORDERS, counts=COUNTS), 'one row of logits'),
  (lambda: attack.accuracy_sweep(toy(), [], orders=ORDERS, counts=COUNTS), 'no batch'),
  (lambda: attack.random_orders(5, 0, seed=0), 'no baseline'),
  (lambda: attacked(cut=toy(**{**HEAD_ONLY, 'head': lambda v, f: f['cut'][..., :1]})), 'one class'),
  (lambda: attacked([{**BATCHES[0], 'labels': BATCHES[0]['labels'][..., None]}]), r'\(b, h, w\)'),
  (lambda: attacked([{'image': 0, 'label': 0}]), "'images'.*not"),
  (lambda: attacked([tuple(BATCHES[0].values())]), 'not tuple'),
  *((lambda channels=channels: toy().without({'cut': np.zeros((1, 2, 2, C))}, channels),
     'integers from 0 to 8') for channels in (np.arange(C) == 4, [-1], [5.9], [C])),
])
def test_what_cannot_be_attacked(call, message):
  refused(call, message)


# --- parts ---------------------------------------------------------------------------------------


def test_random_orders_are_permutations_by_seed():
  orders = attack.random_orders(50, 4, seed=1)
  np.testing.assert_array_equal(np.sort(orders, 1), np.tile(np.arange(50), (4, 1)))
  assert len({tuple(row) for row in orders}) == 4
  np.testing.assert_array_equal(attack.random_orders(50, 2, seed=1), orders[:2])
  assert (attack.random_orders(50, 4, seed=2) != orders).any(1).all()


@pytest.mark.parametrize('sizes', [[48, *[100] * 19], [2048 - 1000, *[100] * 9], [0, 7],
                                   [1, 1, 3, 5, 10, 30, 50, 100, 300, 500, 1048], [3]])
def test_pieces_cost_no_more_than_of_any_other_size(sizes):
  def cost(piece):
    return sum(-(-size // piece) for size in sizes) * (piece + attack.OVERHEAD)
  assert cost(attack.piece_size(sizes)) == min(map(cost, range(1, max(sizes) + 1)))


# --- files ---------------------------------------------------------------------------------------


def test_records_csv_and_json_say_what_was_measured(swept, tmp_path):
  records = swept.records()
  by_name = {(r['order'], r['N'], r['metric']): r for r in records}
  assert len(by_name) == len(records) == len(ATTACKED) * (1 + 2 * len(COUNTS))
  random = swept.metrics['miou_left']['random'][:, 2]
  record = by_name['random', 3, 'miou_left']
  assert record == {'order': 'random', 'N': 3, 'metric': 'miou_left', 'values': random.tolist(),
                    'mean': pytest.approx(random.mean()),
                    'std': pytest.approx(np.std(random, ddof=1)), 'n': 2}
  assert by_name['left', 6, 'miou']['std'] is None
  assert by_name['clean', 0, 'miou']['values'] == [swept.metrics['miou']['left'][0, 0]]
  sweeps.write_json(tmp_path / 'a.json', swept)
  again = sweeps.from_records(json.loads((tmp_path / 'a.json').read_text()))
  assert again.counts == swept.counts and again.records() == records
  sweeps.write_csv(tmp_path / 'a.csv', swept)
  with open(tmp_path / 'a.csv', newline='') as file:
    lines = list(csv.DictReader(file))
  assert len(lines) == sum(len(r['values']) for r in records)
  for line in lines:
    value = by_name[line['order'], int(line['N']), line['metric']]['values'][int(line['repeat'])]
    assert float(line['value']) == value


def test_a_region_without_a_label_is_empty_not_zero(tmp_path):
  batch = {**BATCHES[0], 'labels': np.where(np.arange(12) < 6, BATCHES[0]['labels'], 255)}
  result = attacked([batch], regions=['left', 'right'])
  record = next(r for r in result.records() if r['metric'] == 'miou_right')
  assert (record['values'], record['mean'], record['std'], record['n']) == ([None], None, None, 0)
  sweeps.write_json(tmp_path / 'a.json', result)
  again = sweeps.from_records(json.loads((tmp_path / 'a.json').read_text()))
  assert np.isnan(again.metrics['miou_right']['random']).all()
  sweeps.write_csv(tmp_path / 'a.csv', result)
  assert 'random,2,1,miou_right,\n' in (tmp_path / 'a.csv').read_text()
  pictures.curves(again, tmp_path / 'a.png')


@pytest.mark.parametrize('change', [
  lambda records: records[:-1], lambda records: records[1:], lambda records: []])
def test_records_of_half_a_sweep_are_refused(swept, change):
  refused(lambda: sweeps.from_records(change(swept.records())), 'run gapjax attack')


def test_counting_and_products_agree_with_scikit_learn():
  """The two ways of making confusion counts: the TPU's is reached by no other test."""
  labels, predicted = draw.integers(0, K + 2, (2, 8, 12)), draw.integers(0, K, (2, 8, 12))
  expected = confusion_matrix(labels.ravel(), predicted.ravel(), labels=range(K))
  for count in (segmentation._counts, segmentation._products):
    np.testing.assert_array_equal(count(predicted, jnp.asarray(labels), num_classes=K), expected)
