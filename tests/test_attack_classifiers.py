"""Channels removed from networks that classify, against the definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import trained

from gapjax.errors import UsageError
from gapjax.models.heads import Permute, PermuteHead
from gapjax.models.resnet import ResNet
from gapjax.models.vgg import VGG
from gapjax.neurons import attack, network

draw = np.random.default_rng(0)
SMALL = draw.normal(size=(4, 32, 32, 3)).astype(np.float32)


def classifier(model):
  variables = trained(model, SMALL)
  return variables, network.classifier(model, variables, seed=5)


@pytest.fixture(scope='module')
def permuted():
  return classifier(ResNet('resnet10', 6, 4, head='permuted', permute=Permute()))


def test_accuracy_after_removal_by_definition(permuted):
  """PermuteNet: the permuted, partly zeroed z times the linear layer; the mask leaves one out."""
  variables, cut = permuted
  head = variables['params']['head']['classifier']
  labels = np.asarray(cut.without(cut.features(SMALL, 0))).astype(int)  # its own, but for one
  labels[0] = (labels[0] + 1) % 6
  batches = [{'images': SMALL, 'labels': labels, 'mask': np.arange(4) < 3}] * 2
  orders = {'overall': draw.permutation(32), 'random': attack.random_orders(32, 2, seed=0)}
  result = attack.accuracy_sweep(cut, batches, orders=orders, counts=[4, 32],
                                 metric='location_accuracy')
  z = np.asarray(cut.features(SMALL)['stage4']).mean((1, 2))
  for name, rows in orders.items():
    for i, row in enumerate(np.atleast_2d(rows)):
      for n, count in enumerate((0, 4, 32)):
        hits = 0
        for step, batch in enumerate(batches):
          left = z.copy()
          left[:, row[:count]] = 0
          key = jax.random.fold_in(jax.random.key(5), step)
          predicted = (permute(left, key) @ head['kernel'] + head['bias']).argmax(-1)
          hits += ((predicted == batch['labels']) & batch['mask']).sum()
        assert result.metrics['location_accuracy'][name][i, n] == pytest.approx(hits / 6)
  assert result.metrics['location_accuracy']['overall'][0, 0] >= 2 / 6


def permute(z, key):
  """z as the head reorders it with the rng stream's key: a linear layer of ones and zeros tells."""
  layer = {'kernel': np.eye(32, dtype=np.float32), 'bias': np.zeros(32, np.float32)}
  found, _ = PermuteHead(32).apply(
    {'params': {'classifier': layer}}, z[:, None, None], rngs={'permutation': key})
  np.testing.assert_allclose(np.sort(found), np.sort(z), rtol=1e-6)
  return np.asarray(found)


def test_a_permutation_is_a_batchs_own_and_the_same_for_all_it_removes(permuted):
  variables, cut = permuted
  logits = [cut.head(variables, cut.features(SMALL, step)) for step in (0, 0, 1)]
  np.testing.assert_array_equal(logits[0], logits[1])
  assert np.abs(logits[0] - logits[2]).max() > 1e-3


@pytest.mark.parametrize('model', [ResNet('resnet10', 5, 4), VGG('vgg11', 5, 2)],
                         ids=['resnet10', 'vgg11'])
def test_gapnets_are_cut_before_their_head(model):
  variables, cut = classifier(model)
  features = cut.features(SMALL)
  logits, stages = jax.jit(lambda x: model.apply(variables, x, train=False))(SMALL)
  np.testing.assert_allclose(cut.head(variables, features), logits, atol=1e-5)
  np.testing.assert_allclose(features[cut.stage], stages[cut.stage], atol=1e-5)
  assert cut.stage == max(name for name in stages if name.startswith('stage'))
  bias = variables['params']['head']['pre_classifier']['bias']
  every = np.arange(features[cut.stage].shape[-1])
  np.testing.assert_array_equal(cut.without(features, every), np.argmax(bias))
  np.testing.assert_array_equal(cut.without(features, []), logits.argmax(-1))


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_a_layer_may_round(dtype):
  """Its blocks add up to the whole but for rounding, and accuracy is what NumPy counts."""
  features, kernel = draw.normal(size=(64, 32)), draw.normal(size=(32, 3))
  logits, order, counts = features @ kernel, draw.permutation(32), [*range(2, 24, 2)]
  result = attack.attack(
    lambda images: features, lambda y: np.asarray(y, float),
    [{'images': np.zeros((64, 4, 4, 3)), 'labels': logits.argmax(1)}], orders={'a': order},
    counts=counts, layer=lambda maps, channels: (
      jnp.asarray(maps, dtype) @ jnp.asarray(kernel[channels], dtype)))
  expected = [((features[:, left] @ kernel[left]).argmax(1) == logits.argmax(1)).mean()
              for left in (order[n:] for n in (0, *counts))]
  np.testing.assert_allclose(result.metrics['accuracy']['a'][0], expected, atol=4 / 64)


def test_branches_may_scatter_their_channels():
  """Into all of them: what fills a block up must not overwrite what is in it."""
  maps, kernel = draw.normal(size=(4, 6)).astype(np.float32), draw.normal(size=(6, 3))

  def scatter(_, x, channels):
    whole = np.zeros((len(x), 6))
    whole[:, channels] = x
    return whole @ kernel

  cut = network.Network(None, lambda _, images: {'stage4': maps}, branches=scatter,
                        rest=lambda _, branches, features: branches, compiled=False)
  features = cut.features(SMALL)
  for channels in ([0, 2], [3, 0, 5], [1], [], range(6)):
    channels = np.array([*channels], int)
    for size in {max(len(channels), 4), 6}:
      np.testing.assert_allclose(cut.contribution(features, channels, size),
                                 maps[:, channels].astype(float) @ kernel[channels], atol=1e-6)


def test_a_permutation_before_a_stage_is_refused():
  with pytest.raises(UsageError, match='permutes at `stage2`'):
    network.classifier(ResNet('resnet10', 5, 4, permute=Permute(), permute_at='stage2'), {})
