"""Segmentation: the loss, counts by region, networks, evaluation, resuming. NumPy and scikit-learn
say what is right."""

import json
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from conftest import SCENES, newest, refused, same, tiny_config
from sklearn.metrics import confusion_matrix, jaccard_score

from gapjax import config as configs
from gapjax.models import resnet
from gapjax.models.deeplab import DeepLab, resize
from gapjax.models.layers import Conv
from gapjax.tasks import segmentation
from gapjax.tasks.protocol import Counter
from gapjax.tasks.segmentation import SegmentationTask
from gapjax.training import build, optimizer, workdirs
from gapjax.training import devices as devices_module
from gapjax.training.devices import AXIS, Devices
from gapjax.training.plan import Plan
from gapjax.training.steps import TrainState
from gapjax.training.train import train

draw = np.random.default_rng(0)
K = 5


def random_maps(shape=(3, 17, 13), classes=K):
  """Predictions, and labels of which a fifth is void (255 or another number outside)."""
  labels = draw.integers(0, classes, shape)
  void = draw.random(shape) < 0.2
  return draw.integers(0, classes, shape), np.where(void, draw.choice([255, K, K + 3]), labels)


def test_confusion_and_miou_are_scikit_learns():
  for classes in (K, 3):  # with 3, two classes occur nowhere in the labels
    predicted, labels = random_maps(classes=classes)
    matrix = np.asarray(segmentation.confusion(jnp.asarray(predicted), jnp.asarray(labels), K))
    valid = labels < K
    expected = confusion_matrix(labels[valid], predicted[valid], labels=range(K))
    np.testing.assert_array_equal(matrix, expected)
    per_class, miou = segmentation.iou(matrix)
    occur = np.union1d(labels[valid], predicted[valid])
    scores = jaccard_score(labels[valid], predicted[valid], labels=occur, average=None)
    np.testing.assert_allclose(per_class[occur], scores, rtol=1e-12)
    np.testing.assert_allclose(miou, scores.mean(), rtol=1e-12)
    assert np.isnan(np.delete(per_class, occur)).all()
  assert np.isnan(segmentation.iou(np.zeros((K, K)))[1])
  assert segmentation.iou([[1, 0, 1], [0, 1, 0], [0, 0, 0]])[1] == .5  # 1/2, 1, and 0: no label


@pytest.mark.parametrize(('height', 'width'), [(6, 8), (7, 9)])
def test_regions_are_the_pixels_that_their_names_say(height, width):
  """Left and right are the columns [0, w // 2) and [w // 2, w), also of an image in a larger one.
  """
  expected = {'all': (0, height, 0, width), 'left': (0, height, 0, width // 2),
              'right': (0, height, width // 2, width), 'top': (0, height // 2, 0, width),
              'bottom': (height // 2, height, 0, width),
              'center': (0, height, width // 4, 3 * width // 4)}
  for name, rectangle in segmentation.REGIONS.items():
    mask = np.zeros((height + 2, width + 3), bool)
    top, bottom, left, right = expected[name]
    mask[top:bottom, left:right] = True
    found = segmentation.inside(rectangle, jnp.array([[height, width]]), mask.shape)[0]
    np.testing.assert_array_equal(found, mask)


def test_regions_are_named_or_given():
  assert segmentation.region('left') == (0, 0, 1, 0.5)
  assert segmentation.region('0.25, 0, 1,0.5') == (0.25, 0, 1, 0.5)
  for wrong in ('middle', '0,0,1', '0.5,0,0.5,1', '0,0,1,1.5', 'a,b,c,d'):
    refused(lambda wrong=wrong: segmentation.region(wrong), 'region')


@pytest.mark.parametrize('name', ['cross_entropy', 'focal'])
def test_loss_by_its_definition(name):
  _, labels = random_maps()
  logits = 3 * draw.normal(size=(*labels.shape, K))
  task = SegmentationTask(np.zeros(3), np.ones(3), K, name, gamma=1.5)
  valid = labels < K
  entropies = reference.entropies(logits[valid], labels[valid])
  expected = ((1 - np.exp(-entropies)) ** (1.5 if name == 'focal' else 0) * entropies).mean()
  batch = {'images': None, 'labels': jnp.asarray(labels)}
  loss, metrics = task.loss(lambda _: (jnp.asarray(logits), {}), batch, 0)
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
  right = (logits.argmax(-1) == labels)[valid].mean()
  np.testing.assert_allclose(metrics['accuracy'].compute(), right, rtol=1e-5)


@pytest.mark.parametrize('gamma', [0., .5, 2.])
def test_focal_loss_has_a_gradient_where_a_pixel_is_certain(gamma):
  """Against differences in float64 where p < 1, and 0 where p is 1 to rounding."""
  task = SegmentationTask(np.zeros(3), np.ones(3), 2, 'focal', gamma=gamma)
  labels = jnp.zeros((1, 1, 2), int)

  def total(logits):
    return task.losses(logits, labels)[0].sum()

  with jax.enable_x64(True):
    logits = jnp.array([[[[.7, 0.], [100., 0.]]]], jnp.float64)
    gradient = jax.grad(total)(logits)

    def definition(x):  # of the first pixel
      p = 1 / (1 + np.exp(-x))
      return -(1 - p) ** gamma * np.log(p)

    difference = (definition(.7 + 1e-6) - definition(.7 - 1e-6)) / 2e-6
    np.testing.assert_allclose(gradient[0, 0, 0], [difference, -difference], rtol=1e-6)
    np.testing.assert_allclose(gradient[0, 0, 1], 0, atol=1e-12)


def test_loss_is_the_mean_over_the_pixels_of_all_devices():
  """Devices with more void do not count less."""
  labels = np.where(draw.random((4, 6, 6)) < np.array([0, .2, .5, .9])[:, None, None], 255, 1)
  logits = draw.normal(size=(4, 6, 6, K)).astype(np.float32)

  def loss(axis_name, logits, labels):
    task = SegmentationTask(np.zeros(3), np.ones(3), K, axis_name=axis_name)
    return task.loss(lambda _: (logits, {}), {'images': None, 'labels': labels}, 0)[0]

  alone = loss(None, jnp.asarray(logits), jnp.asarray(labels))
  parts = jax.pmap(lambda x, y: loss(AXIS, x, y), axis_name=AXIS)(
    jnp.asarray(logits)[:, None], jnp.asarray(labels)[:, None])
  np.testing.assert_allclose(parts.mean(), alone, rtol=1e-6)


def shapes_of(network, size):
  return jax.eval_shape(
    lambda: network.init_with_output(jax.random.key(0), jnp.zeros((2, *size, 3)), train=False))


@pytest.mark.parametrize('variant', ['deeplabv3', 'deeplabv3plus'])
def test_deeplabs_shapes_and_parameters(variant):
  """ResNet-50's are torchvision's 23,508,032; the head's follow from its description."""
  for stride, stage4 in ((8, (8, 11)), (16, (4, 6))):
    (logits, features), variables = shapes_of(
      DeepLab(variant, 21, 'resnet50', output_stride=stride), (61, 85))
    assert logits.shape == (2, 61, 85, 21)
    assert features['stage4'].shape == (2, *stage4, 2048)
    assert features['stage1'].shape == (2, 16, 22, 256)
    sizes = {name: sum(x.size for x in jax.tree.leaves(tree))
             for name, tree in variables['params'].items()}
    assert sizes.pop('backbone') == 23_508_032
    conv = lambda k, c, o: k * k * c * o + 2 * o  # noqa: E731 - and BatchNorm
    head = 2 * conv(1, 2048, 256) + 3 * conv(3, 2048, 256) + conv(1, 5 * 256, 256)
    low = (conv(1, 256, 48), 48) if variant == 'deeplabv3plus' else (0, 0)
    head += low[0] + conv(3, 256 + low[1], 256) + 256 * 21 + 21
    assert sum(sizes.values()) == head


def test_the_stages_dilate_where_torchvisions_do(monkeypatch):
  """The first block of a dilated stage has the dilation before it, the others the stage's."""
  dilations = []

  class Spy(resnet.Block):
    def setup(self):
      dilations.append((self.name, self.stride, self.dilation))

  monkeypatch.setattr(resnet, 'Block', Spy)
  for stride in (8, 16):
    shapes_of(DeepLab('deeplabv3', 2, 'resnet18', width=4, output_stride=stride), (32, 32))
  last = [found for found in dilations if found[0].startswith(('layer3', 'layer4'))]
  assert last == [('layer3_0', 1, 1), ('layer3_1', 1, 2), ('layer4_0', 1, 2), ('layer4_1', 1, 4),
                  ('layer3_0', 2, 1), ('layer3_1', 1, 1), ('layer4_0', 1, 1), ('layer4_1', 1, 2)]


def test_upsampling_is_pytorchs():
  torch = pytest.importorskip('torch')
  x = draw.normal(size=(1, 3, 4, 2))
  expected = torch.nn.functional.interpolate(
    torch.tensor(x).movedim(-1, 1), (11, 9), mode='bilinear', align_corners=False)
  np.testing.assert_allclose(resize(jnp.asarray(x), (11, 9)), expected.movedim(1, -1), atol=1e-6)


# ---- Evaluation ----------------------------------------------------------------------------------


def scene(height, width):
  return {'image': draw.integers(0, 256, (height, width, 3)).astype(np.uint8),
          'label': draw.integers(0, K, (height, width)).astype(np.uint8), 'id': 'x'}


class Scenes(list):
  """`decoded` are the scenes that were asked for by number."""
  class_names = tuple('abcdefgh'[:K])

  def __init__(self, *sizes):
    super().__init__(scene(*size) for size in sizes)
    self.decoded = []

  def __getitem__(self, i):
    self.decoded.append(i)
    return super().__getitem__(i)

  def size(self, i):
    return super().__getitem__(i)['label'].shape


class Recorder:
  """A counter of one of several processes with two devices each: the batches that it is given."""
  batch_size = 4

  def __init__(self, monkeypatch, process, processes):
    monkeypatch.setattr(jax, 'process_index', lambda: process)
    all_devices = [types.SimpleNamespace(process_index=i // 2) for i in range(2 * processes)]
    with monkeypatch.context() as patch:  # these devices cannot hold anything
      patch.setattr(devices_module, 'Mesh', lambda *_: None)
      patch.setattr(devices_module, 'NamedSharding', lambda *_: None)
      self.rows, self.batches = Devices(all_devices).own_rows(self.batch_size), []

  def count(self, state, zeros, batches, *, local, **_):
    assert local
    self.batches.extend(batches)
    return jax.tree.map(np.ones_like, zeros)


@pytest.mark.parametrize('processes', [1, 2])
@pytest.mark.parametrize('padded', [False, True])
def test_every_scene_is_in_one_batch_whole_and_the_rest_is_void(monkeypatch, padded, processes):
  """And decoded by one process, once."""
  scenes = Scenes(*[(4, 6), (5, 3), (4, 6), (4, 6), (5, 3), (4, 6), (4, 6)])
  task, config = SegmentationTask(np.zeros(3), np.ones(3), K), configs.default()
  config.eval.padded = padded
  counters = [Recorder(monkeypatch, process, processes) for process in range(processes)]
  for counter in counters:
    task.evaluation(config, scenes, counter).final(None)
  assert sorted(scenes.decoded) == list(range(7))
  batches = [({name: np.concatenate([batch[name] for batch, _ in parts]) for name in parts[0][0]},
              parts[0][1]) for parts in zip(*[c.batches for c in counters], strict=True)]
  assert all(len(batch['size']) == 4 for batch, _ in batches)
  assert sum(n for _, n in batches) == 7
  found = []
  for batch, n in batches:
    if padded:
      assert batch['labels'].shape == (4, 5, 6)
    for i in range(4):
      h, w = batch['size'][i]
      if i < n:
        found.append((batch['images'][i, :h, :w].tobytes(), batch['labels'][i, :h, :w].tobytes()))
        h, w = h if padded else 0, w if padded else 0
      else:
        h, w = 0, 0
      outside = np.ones(batch['labels'].shape[1:], bool)
      outside[:h, :w] = False
      if h or i >= n:
        assert (batch['labels'][i][outside] == 255).all()
  assert sorted(found) == sorted((s['image'].tobytes(), s['label'].tobytes()) for s in scenes)


class Brightness:
  """In place of a network: the class is the red value, modulo K."""

  def apply(self, variables, images, *, train, rngs=None):
    del variables, train, rngs
    return jax.nn.one_hot(jnp.round(images[..., 0] * 255).astype(int) % K, K), {}


def test_evaluation_counts_every_pixel_of_every_size_once():
  scenes = Scenes(*[(4, 6), (5, 3), (4, 6), (4, 6), (5, 7)])
  task = SegmentationTask(np.zeros(3), np.ones(3), K)
  state = TrainState(np.int32(0), {}, {}, {})
  expected = [confusion_matrix(
    np.concatenate([s['label'][:, part(s)].ravel() for s in scenes]),
    np.concatenate([s['image'][:, part(s), 0].ravel() % K for s in scenes]), labels=range(K))
    for part in (lambda s: slice(None), lambda s: slice(0, s['label'].shape[1] // 2),
                 lambda s: slice(s['label'].shape[1] // 2, None))]
  for padded in (False, True):
    config = configs.default()
    config.eval.update(batch_size=2, padded=padded)
    devices = Devices(jax.local_devices()[:2])
    evaluation = build.create_evaluation(config, Brightness(), task, scenes, devices)
    found = evaluation.final(state)
    for name, matrix in zip(('miou', 'miou_left', 'miou_right'), expected, strict=True):
      np.testing.assert_allclose(found[name], segmentation.iou(matrix)[1], rtol=1e-12)
    np.testing.assert_allclose(found['accuracy'], np.trace(expected[0]) / expected[0].sum())
    image = scenes[0]['image']
    np.testing.assert_array_equal(evaluation.counter.predict(state, image), image[..., 0] % K)


def test_counts_of_a_set_may_be_more_than_those_of_a_batch():
  """Beyond int32, which a batch's are: every pair of classes 2^30 times in each of four scenes."""
  class Large(Counter):
    batch_size = 1

    def count(self, state, zeros, batches, **_):
      assert len(batches) == 1
      return jax.tree.map(lambda x: np.full_like(x, 2 ** 30), zeros)

  task = SegmentationTask(np.zeros(3), np.ones(3), K)
  found = task.evaluation(configs.default(), Scenes(*[(4, 6)] * 4), Large()).final(None)
  assert (found['accuracy'], found['loss']) == (1 / K, 1)


# ---- Training ------------------------------------------------------------------------------------


def test_what_a_segmentation_run_leaves(scene_run):
  _, workdir, summary = scene_run
  assert summary['step'] == 6
  assert set(summary['final']) == {'pixel_accuracy', *(
    f'miou{region}' for region in ('', '_left', '_right', '_top', '_bottom', '_center'))}
  assert len(summary['per_class']) == 11 and 0 < summary['final']['pixel_accuracy'] < 1
  for picture in ('samples.png', 'predictions.png'):
    assert (workdir / picture).stat().st_size > 1000
  assert json.loads((workdir / 'summary.json').read_text()) == summary


def test_segmentation_resumes_bit_equal(scene_run, data_dir, tmp_path):
  """From the checkpoint of the first pass: Grain goes on where the step says, nothing is saved."""
  config, workdir, summary = scene_run
  shutil.copytree(workdir / 'checkpoints' / '3', tmp_path / 'checkpoints' / '3')
  again = train(config, workdir=tmp_path, data_dir=data_dir, devices=jax.local_devices()[:2],
                progress=False)
  for key in ('final', 'per_class', 'best'):
    assert again[key] == summary[key]
  (step, complete), (step_again, resumed) = newest(workdir), newest(tmp_path)
  assert step == step_again == 6 and same(complete, resumed)


@pytest.mark.parametrize('momentum', [.01, .3])
def test_the_backbone_has_its_own_rate_and_momentum(momentum, data_dir):
  """SGD's first step moves the backbone by a tenth of its gradient, the head by all of it; one
  batch moves the backbone's running averages by as much of the way as the config says and the
  head's by 0.1."""
  config = tiny_config(**SCENES)
  config.model.backbone_momentum = momentum
  config.optimizer.update(name='sgd', lr=1.0, backbone_factor=0.1)
  rule = optimizer.create_optimizer(config, lambda step: 1.0)
  params = {'backbone': {'a': jnp.ones(2)}, 'classifier': {'a': jnp.ones(2)}}
  updates, _ = rule.update(params, rule.init(params), params)
  np.testing.assert_allclose(updates['backbone']['a'], -0.1, rtol=1e-6)
  np.testing.assert_allclose(updates['classifier']['a'], -1, rtol=1e-6)
  train_set, _, task = build.load_data(config, data_dir=data_dir)
  model, state, *_ = build.create_learner(config, task, train_set, Plan.of(
    workdirs.settled(config, platform='cpu'), num_images=len(train_set)))
  images = jnp.asarray(draw.normal(size=(2, 24, 32, 3)), jnp.float32)
  _, updates = jax.jit(lambda images: model.clone(axis_name=None, dropout=0.0).apply(
    {'params': state.params, 'batch_stats': state.batch_stats}, images, train=True,
    mutable=['batch_stats'], capture_intermediates=lambda m, _: isinstance(m, Conv)))(images)
  inside, stats = updates['intermediates'], updates['batch_stats']
  for seen, moved, share in (
      (inside['backbone']['conv1'], stats['backbone']['bn1'], momentum),
      (inside['branch_convs_0'], stats['branch_norms_0'], 0.1)):
    mean = np.asarray(seen['__call__'][0], np.float64).mean((0, 1, 2))
    np.testing.assert_allclose(moved['mean'], share * mean, rtol=1e-3, atol=1e-6)


MOBILENET = {'model.name': 'deeplabv3plus', 'model.backbone': 'mobilenetv2',
             'model.stem': 'imagenet', 'model.separable': True}


@pytest.mark.slow
def test_a_mobilenet_with_a_separable_head_trains(shallow, data_dir, tmp_path):
  """A step of the real loop; every kernel, depthwise ones too, has moved from where it started."""
  config = tiny_config(**{**SCENES, **MOBILENET, 'data.train_images': 8, 'eval.images': 2,
                          'optimizer.name': 'sgd'})
  summary = train(config, workdir=tmp_path, data_dir=data_dir, devices=jax.local_devices()[:1],
                  progress=False)
  assert summary['step'] == 1 and 0 <= summary['final']['miou'] <= 1
  train_set, _, task = build.load_data(config, data_dir=data_dir)
  _, start, *_ = build.create_learner(config, task, train_set, Plan.of(
    workdirs.settled(config, platform='cpu'), num_images=len(train_set)))
  saved = newest(tmp_path)[1]
  params = saved['params']
  assert not any(jax.tree.leaves(jax.tree.map(  # every BatchNorm has seen a batch
    np.array_equal, saved['batch_stats'], start.batch_stats)))
  assert params['branch_convs_2']['depthwise']['kernel'].shape == (3, 3, 1, 16)
  stays = jax.tree.map(lambda a, b: bool((a == b).all()), params, start.params)
  for path, still in jax.tree_util.tree_leaves_with_path(stays):
    assert path[-1].key != 'kernel' or not still, jax.tree_util.keystr(path)


@pytest.mark.parametrize(('changes', 'words'), [
  ({'model.backbone': 'mobilenet'}, 'mobilenetv2'),
  ({**MOBILENET, 'model.stem': 'cifar'}, 'model.stem=imagenet'),
  ({'model.early_padding': True}, 'backbone=mobilenetv2'),
  ({**MOBILENET, 'model.early_padding': True, 'model.padding': 'partial'}, 'zero, reflect'),
  ({'model.padding': 'none'}, 'ASPP'),
  ({'model.name': 'resnet18'}, 'segmentation needs deeplabv3'),
  ({'task': 'canvas'}, 'do not fit'),
  ({'model.output_stride': 32}, 'known: 8, 16'),
  ({'segmentation.crop': (0, 32)}, r'segmentation\.crop must be a number at least 1'),
  ({'segmentation.crop': (32,)}, '2 numbers'),
  ({'segmentation.crop': (32.5, 32)}, 'whole pixels'),
  ({'model.output_stride': 16}, 'stem=cifar has a stride of 8'),
  ({'segmentation.scale': (2.0, 1.0)}, r'\(least, largest\)'),
  ({'segmentation.loss': 'hinge'}, 'hinge'),
  ({'data.held_out': 3}, 'eval_split')])
def test_what_cannot_be_segmented(changes, words):
  refused(lambda: configs.validate(tiny_config(**{**SCENES, **changes})), words)
