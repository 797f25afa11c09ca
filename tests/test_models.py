"""Networks and heads: sizes against published counts, heads against NumPy."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import refused, trained

from gapjax import config as configs
from gapjax import models
from gapjax.models import VGG, ResNet
from gapjax.models.heads import Permute
from gapjax.models.layers import PADDINGS, Conv
from gapjax.models.resnet import centred

draw = np.random.default_rng(0)

# Parameters as torchvision counts them: whole networks with 1,000 classes for the ResNets (the
# same but for the max-pool, which has none), `features` alone for VGG with BatchNorm.
PUBLISHED = {'resnet18': 11_689_512, 'resnet34': 21_797_672, 'resnet50': 25_557_032,
             'resnet101': 44_549_160, 'vgg11': 9_225_984, 'vgg16': 14_723_136,
             'efficientnet_lite0': 4_652_008}


def create(num_classes=5, **changes):
  c = configs.default()
  c.model.update(**{'width': 4, 'name': 'resnet10', **changes})
  configs.validate(c)
  return models.create_network(c.model, num_classes=num_classes)


def init(model, shape=(2, 32, 32, 3), dtype=jnp.float32):
  x = jnp.asarray(draw.normal(size=shape), dtype)
  return jax.jit(functools.partial(model.init, train=True))(jax.random.key(0), x), x


def apply(model, variables, x):
  """Logits and features in evaluation."""
  return jax.jit(functools.partial(model.apply, train=False))(variables, x)


def count(tree):
  return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize('name', PUBLISHED)
def test_parameters_as_published(name):
  model = create(1000, name=name, width=64, head='linear')
  variables = jax.eval_shape(lambda: init(model, (1, 64, 64, 3))[0])
  total = count(variables['params'])
  if name.startswith('vgg'):
    total -= count(variables['params']['head'])
  assert total == PUBLISHED[name]


@pytest.mark.parametrize(('name', 'stem', 'shapes'), [
  ('resnet18', 'canvas', {'stem': (16, 8), 'stage1': (16, 8), 'stage2': (8, 16),
                          'stage3': (4, 32), 'stage4': (2, 64)}),
  ('resnet50', 'cifar', {'stem': (32, 8), 'stage1': (32, 32), 'stage2': (16, 64),
                         'stage3': (8, 128), 'stage4': (4, 256)}),
  ('vgg11', 'canvas', {'stage1': (16, 8), 'stage2': (8, 16), 'stage3': (4, 32),
                       'stage4': (2, 64), 'stage5': (1, 64)}),
])
def test_features_by_name(name, stem, shapes):
  model = create(name=name, stem=stem, width=8)

  def forward():
    variables, x = init(model)
    return apply(model, variables, x)

  logits, features = jax.eval_shape(forward)
  assert logits.shape == (2, 5)
  last = list(shapes.values())[-1]
  assert {k: v.shape for k, v in features.items()} == {
    **{k: (2, s, s, c) for k, (s, c) in shapes.items()}, 'pooled': (2, last[1])}


@pytest.mark.parametrize('network', [
  functools.partial(ResNet, 'resnet18', 10), functools.partial(VGG, 'vgg11', 10)])
def test_a_network_that_would_not_permute_as_it_says_is_refused(network):
  refused(lambda: network(head='permuted'), r'give permute=Permute\(\)')
  refused(lambda: network(permute=Permute()), "give head='permuted'")
  network(head='permuted', permute=Permute(), permute_at='stage1')
  network(head='linear', permute=Permute())


def test_a_fixed_permutation_depends_on_its_seed_alone():
  x = jnp.arange(64.0).reshape(1, 64)
  fixed = Permute('fixed', seed=3)
  once = np.asarray(fixed.apply({}, x))[0]
  np.testing.assert_array_equal(np.sort(once), np.arange(64))
  assert not np.array_equal(once, np.arange(64))
  np.testing.assert_array_equal(fixed.apply({}, x)[0], once)
  assert not np.array_equal(Permute('fixed', seed=4).apply({}, x)[0], once)
  assert create(head='permuted', permutation='fixed', permutation_seed=4).permute == (
    Permute('fixed', seed=4))


@pytest.mark.parametrize(('name', 'place'), [
  ('resnet10', 'stage2'), ('vgg11', 'stage5'), ('efficientnet_lite0', 'stage5')])
def test_permutation_before_a_stage_changes_what_follows_only(shallow, name, place):
  plain, permuted = (create(name=name, head='permuted', permutation='fixed', permute_at=where)
                     for where in ('pooled', place))
  x = jnp.asarray(draw.normal(size=(2, 64, 64, 3)), jnp.float32)
  variables = trained(plain, x)
  (_, before), (_, after) = (apply(model, variables, x) for model in (plain, permuted))
  stages = models.stages(name)
  assert {stage: np.allclose(before[stage], after[stage], atol=1e-6) for stage in stages} == {
    stage: stage < place for stage in stages}


@pytest.mark.parametrize('padding', PADDINGS)
@pytest.mark.parametrize('name', ['resnet10', 'resnet50', 'vgg11'])
def test_padding_reaches_every_layer(name, padding):
  """Each convolution larger than 1x1, the one of GAPNet's head too, is given the padding."""
  seen = []

  def note(call, args, kwargs, context):
    if isinstance(context.module, Conv) and context.module.kernel_size > 1:
      seen.append((context.module.name, context.module.padding))
    return call(*args, **kwargs)

  model = create(name=name, padding=padding)
  with nn.intercept_methods(note):
    jax.eval_shape(lambda: init(model, (1, 288, 288, 3))[0])
  # Kernels above 1x1: the stem, two (basic) or one (bottleneck) a block, VGG's eight; the head.
  assert len(seen) == {'resnet10': 1 + 8, 'resnet50': 1 + 16, 'vgg11': 8}[name] + 1
  assert {p for _, p in seen} == {padding} and 'pre_classifier' in {n for n, _ in seen}


def test_bfloat16_networks_keep_parameters_and_averages_in_float32():
  model = create(dtype='bfloat16')
  (logits, features), variables = jax.eval_shape(lambda: model.init_with_output(
    jax.random.key(0), jnp.zeros((2, 32, 32, 3)), train=False))
  assert features['stage4'].dtype == jnp.bfloat16
  assert logits.dtype == features['pooled'].dtype == jnp.float32
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype('float32')}


@pytest.mark.parametrize(('have', 'want'), [(5, 2), (4, 2), (2, 5), (2, 4), (3, 3)])
def test_a_shortcut_is_cropped_or_padded_around_its_centre(have, want):
  """As torch.nn.functional.pad with the same borders; the odd pixel is cropped or left behind."""
  x = np.arange(1.0, have * have + 1).reshape(1, have, have, 1)
  found = np.asarray(centred(jnp.asarray(x), (want, want)))[0, :, :, 0]
  first = (have - want) // 2  # of the crop; below 0, the rows that are padded before
  expected = [[x[0, first + i, first + j, 0] if 0 <= first + i < have and 0 <= first + j < have
               else 0 for j in range(want)] for i in range(want)]
  np.testing.assert_array_equal(found, expected)


def test_bfloat16_pools_to_what_float32_pools_to():
  """Evaluated as a canvas, most of which is one colour; jax 0.11 and 0.12 computed NaN there."""
  images = jnp.pad(jnp.asarray(draw.normal(size=(50, 32, 32, 3)), jnp.float32),
                   ((0, 0), (32, 32), (32, 32), (0, 0)))
  pooled = []
  for dtype in ('float32', 'bfloat16'):
    model = create(name='resnet18', head='linear', dtype=dtype)
    variables = jax.jit(functools.partial(model.init, train=True))(jax.random.key(0), images[:1])
    pooled.append(jax.jit(lambda v, x, m=model: m.apply(v, x, train=False)[1]['pooled'])(
      variables, images))
  assert pooled[1].dtype == jnp.float32
  np.testing.assert_allclose(*pooled[::-1], rtol=0, atol=.02 * float(pooled[0].max()))
