"""MobileNetV2 against torchvision's values (tests/golden/torchvision_mobilenet.py made them)."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from gapjax.errors import UsageError
from gapjax.models import on_cpu
from gapjax.models.mobilenet import InvertedResidual, MobileNet, channels, relu6
from gapjax.weights import files as weights
from gapjax.weights import names

draw = np.random.default_rng(0)
mobilenetv2 = functools.partial(MobileNet, 'mobilenetv2', 0, head=None)


def test_depthwise_sums_of_bfloat16_are_float32():
  """Nine rounded sums would be off by more than the one rounding of the result."""
  x, kernel = (jnp.asarray(draw.normal(size=shape), jnp.bfloat16)
               for shape in ((4, 9, 9, 8), (3, 3, 1, 8)))
  found = on_cpu.depthwise(x, kernel, 1, 0, 1)
  assert found.dtype == jnp.bfloat16
  exact = reference.conv(x, kernel, padding='none', groups=8)
  np.testing.assert_allclose(np.asarray(found, np.float64), exact, rtol=2 ** -8, atol=1e-6)


# ---- The network ---------------------------------------------------------------------------------


def test_channels_are_rounded_as_torchvisions():
  usual = (32, 16, 24, 32, 64, 96, 160, 320)
  expected = {64: usual, 32: (16, 8, 16, 16, 32, 48, 80, 160),  # 12 is nearest to 16: halves go up
              8: (8, 8, 8, 8, 8, 16, 24, 40),
              4: (8, 8, 8, 8, 8, 8, 16, 24)}  # 10 is nearest to 8, but that is a fifth less
  for width, counts in expected.items():
    assert tuple(channels(count, width) for count in usual) == counts
  assert channels(32, 22.4) == 16  # width_mult=0.35, whose published network has a stem of 16


def test_relu6_has_no_gradient_at_zero():
  values, gradients = jax.vmap(jax.value_and_grad(relu6))(jnp.array([-1., 0, 2, 7]))
  np.testing.assert_array_equal(values, [0, 0, 2, 6])
  np.testing.assert_array_equal(gradients, [0, 0, 1, 0])


@pytest.mark.parametrize(('stride', 'last'), [(None, (2, 2)), (16, (4, 4)), (8, (7, 8))])
def test_parameters_as_published(stride, last):
  """torchvision's whole network has 2,223,872 before its classifier, of which features.18 is
  320 * 1280 + 2 * 1280."""
  (logits, features), variables = jax.eval_shape(
    lambda: mobilenetv2(output_stride=stride).init_with_output(
      jax.random.key(0), jnp.zeros((1, 49, 64, 3)), train=False))
  assert sum(x.size for x in jax.tree.leaves(variables['params'])) == 2_223_872 - 412_160
  assert logits is None and features['pooled'].shape == (1, 320)
  assert features['stage1'].shape == (1, 13, 16, 24)
  assert features['stage4'].shape == (1, *last, 320)


def golden():
  """The weights as our variables, the image, and {kind/stage: features}, from the golden file."""
  arrays = dict(np.load(Path(__file__).parent / 'golden/torchvision_mobilenetv2.npz'))
  theirs = {name: arrays.pop(name) for name in list(arrays) if name.startswith('features')}
  image = arrays.pop('image').astype(np.float32)
  shapes = jax.eval_shape(lambda: mobilenetv2(8).init(jax.random.key(0), image, train=False))
  variables = weights.convert(shapes, theirs, names.backbone_names('mobilenetv2'), what='golden')
  return variables, image, arrays


@pytest.mark.parametrize('kind', ['32', '16', '8', '16_early'])
def test_features_are_torchvisions(kind):
  variables, image, expected = golden()
  stride, _, early = kind.partition('_')
  network = mobilenetv2(8, output_stride=int(stride), early_padding=bool(early), dtype=jnp.float64)
  with jax.enable_x64(True):  # in float32 eighteen blocks' roundings add up to some 1e-5
    _, found = jax.jit(lambda v, x: network.apply(v, x, train=False))(
      jax.tree.map(lambda x: x.astype(np.float64), variables), image)
  stages = [name for name in expected if name.startswith(f'{kind}/')]
  assert len(stages) == (5 if kind == '32' else 1)
  for name in stages:
    values = found[name.partition('/')[2]]
    assert values.shape == expected[name].shape
    np.testing.assert_allclose(values, expected[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('dilation', [1, 2])
def test_without_padding_a_block_is_the_middle_of_the_padded_one(dilation):
  x = draw.normal(size=(2, 8, 10, 4))
  none, zero = (InvertedResidual(4, padding=padding, dilation=dilation)
                for padding in ('none', 'zero'))
  variables = zero.init(jax.random.key(0), x, train=False)
  inside = slice(dilation, -dilation)
  np.testing.assert_allclose(none.apply(variables, x, train=False),
                             zero.apply(variables, x, train=False)[:, inside, inside], atol=1e-5)


def test_early_padding_says_where_the_map_is_too_small():
  with pytest.raises(UsageError, match=r'`circular` by 4 needs a larger .* at `features_\d+`'):
    jax.eval_shape(lambda: mobilenetv2(
      4, padding='circular', early_padding=True, output_stride=8).init(
        jax.random.key(0), jnp.zeros((1, 24, 24, 3)), train=False))


def test_polyphase_networks_are_circularly_shift_invariant():
  """A shift of the image shifts every map, by whatever it is; what is pooled stays."""
  variables, *_ = golden()
  x = draw.normal(size=(1, 64, 64, 3)).astype(np.float32)
  network = mobilenetv2(8, padding='circular', downsample='polyphase', blur_size=1)
  pooled = jax.jit(lambda x: network.apply(variables, x, train=False)[1]['pooled'])
  alone = np.asarray(pooled(x))
  for shift in (1, 6):
    np.testing.assert_allclose(pooled(np.roll(x, shift, (1, 2))), alone, atol=1e-3)
  assert np.abs(pooled(x[:, ::-1]) - alone).max() > 0.1
