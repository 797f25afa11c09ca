"""PyTorch's weights: files, names, layouts, torchvision's own features, and runs that start from
them. tests/golden/torchvision_resnets.py made the golden files with torch and torchvision."""

import contextlib
import io
import pickle
import re
import sys
import types
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, SCENES, newest, refused, same, tiny_config
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from gapjax import config as configs
from gapjax.errors import Interrupted
from gapjax.models.mobilenet import MobileNet
from gapjax.models.resnet import ResNet
from gapjax.training.evaluate import open_run
from gapjax.training.train import train
from gapjax.weights import files as weights
from gapjax.weights import names

draw = np.random.default_rng(0)
GOLDEN = {'resnet18': (4, None), 'resnet50': (2, 8)}  # width and output stride


def resnet(variant='resnet10', width=4, output_stride=None):
  """A ResNet without a head and the shapes of its variables, as zeros."""
  network = ResNet(variant, 0, width, 'imagenet', head=None, output_stride=output_stride)
  shapes = jax.eval_shape(
    lambda: network.init(jax.random.key(0), jnp.zeros((1, 32, 48, 3)), train=False))
  return network, jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)


def random_weights(variables, variant):
  """Weights by torchvision's names, of the shapes that fit `variables`."""
  leaves = flatten_dict(variables, sep='/')
  return {name: draw.uniform(0.5, 1.5, weights.torch_shape(leaves[path].shape)).astype(np.float32)
          for name, path in names.backbone_names(variant).items()}


# ---- Names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize('variant', ['resnet34', 'resnet101'])
def test_every_variable_of_a_backbone_has_one_name(variant):
  """Of resnet18, resnet50 and MobileNetV2 torchvision's own files tell."""
  paths = flatten_dict(resnet(variant)[1], sep='/')
  assert sorted(names.backbone_names(variant).values()) == sorted(paths)


def test_names_of_a_backbone_that_is_none():
  refused(lambda: names.backbone_names('resnet500'), 'resnet50')


@pytest.mark.parametrize(('variant', 'form'), [
  ('resnet18', '{}'), ('resnet18', 'module.{}'), ('resnet50', 'backbone.{}')])
def test_features_are_torchvisions(variant, form, tmp_path):
  """stage4 of narrow ResNets with random weights and BatchNorm statistics, one of them dilated;
  from the file of a classifier, of one trained in parallel, and of a segmentation net."""
  golden = weights.read(ROOT / f'tests/golden/torchvision_{variant}.npz')
  image, expected = (golden.pop(name).astype(np.float32) for name in ('image', 'stage4'))
  known = names.backbone_names(variant)
  others = {name for name in golden if not name.endswith('num_batches_tracked')} - set(known)
  assert others == {'fc.weight', 'fc.bias'} and set(known) <= set(golden)
  inside = form.startswith('backbone')
  np.savez(tmp_path / 'weights.npz', **{
    form.format(name): golden[name] for name in (known if inside else golden)}, **(
      {'classifier.4.weight': np.ones(2), 'aux_classifier.0.weight': np.ones(2)} if inside else {}))
  width, output_stride = GOLDEN[variant]
  network, variables = resnet(variant, width, output_stride)
  before = jax.tree.map(np.copy, variables)
  found = weights.load_backbone(variables, tmp_path / 'weights.npz', variant=variant)
  assert same(variables, before)
  features = network.apply(found, image, train=False)[1]['stage4']
  np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-5 * expected.max())


@pytest.mark.parametrize('form', ['{}', 'backbone.{}_level_{}'])
def test_mobilenets_weights_come_from_a_classifier_and_a_segmentation_net(form, tmp_path):
  """Of an eighth of MobileNetV2; what it computes with them: tests/test_mobilenet.py."""
  golden = weights.read(ROOT / 'tests/golden/torchvision_mobilenetv2.npz')
  arrays = {name: golden[name] for name in golden if name.startswith('features.')}
  parts = {name: 'low' if int(name.split('.')[1]) < 4 else 'high' for name in arrays}
  np.savez(tmp_path / 'w.npz', **{
    form.format(parts[name], name) if '_' in form else name: x for name, x in arrays.items()},
    **{'classifier.1.weight': np.ones((2, 3))},
    **({} if '_' in form else {'features.18.0.weight': np.ones((2, 3, 1, 1))}))
  shapes = jax.eval_shape(
    lambda: MobileNet('mobilenetv2', 0, 8, head=None).init(
      jax.random.key(0), jnp.zeros((1, 32, 48, 3)), train=False))
  found = weights.load_backbone(shapes, tmp_path / 'w.npz', variant='mobilenetv2')
  expected = weights.convert(shapes, arrays, names.backbone_names('mobilenetv2'), what='golden')
  assert same(found, expected)


def test_a_backbones_stem_decides_its_names(tmp_path):
  """A file of torchvision's holds no backbone for a canvas, though its shapes fit one."""
  network = ResNet('resnet10', 0, 4, 'canvas', head=None)
  shapes = jax.eval_shape(
    lambda: network.init(jax.random.key(0), jnp.zeros((1, 32, 48, 3)), train=False))
  paths = names.backbone_names('resnet10', stem='canvas')
  leaves = flatten_dict(shapes, sep='/')
  own = {name: draw.uniform(.5, 1.5, weights.torch_shape(leaves[path].shape)).astype(np.float32)
         for name, path in paths.items()}
  of_path = {path: own[name] for name, path in paths.items()}
  np.savez(tmp_path / 'own.npz', **own)
  np.savez(tmp_path / 'torchvision.npz', **{
    name: of_path[path] for name, path in names.backbone_names('resnet10').items()})
  found = weights.load_backbone(shapes, tmp_path / 'own.npz', variant='resnet10', stem='canvas')
  for path, x in flatten_dict(found, sep='/').items():
    np.testing.assert_array_equal(x, weights.to_jax(of_path[path]))
  refused(lambda: weights.load_backbone(shapes, tmp_path / 'torchvision.npz', variant='resnet10',
                                        stem='canvas'), 'of stem `canvas`')


def test_which_of_several_networks_is_read_is_said(tmp_path, caplog):
  torch = pytest.importorskip('torch')
  first, second = ({'w': torch.full((2,), float(i))} for i in range(2))
  state = {'model': first, 'model_ema': second, 'optimizer': {'state': {}}, 'epoch': 3}
  torch.save(state, tmp_path / 'w.pth')
  assert weights.read(tmp_path / 'w.pth')['w'].tolist() == [0, 0]
  [said] = [record.message for record in caplog.records]
  assert 'read is `model`, and not `model_ema`' in said


# ---- Files ---------------------------------------------------------------------------------------


def save(path, arrays):
  if path.suffix == '.npz':
    np.savez(path, **arrays)
  else:
    save_file({name: np.ascontiguousarray(x) for name, x in arrays.items()}, path)


@pytest.mark.parametrize('suffix', weights.SUFFIXES)
def test_what_is_written_is_read(suffix, tmp_path):
  """Every type and shape, also where the memory is not in order; only .pth and .pt are wrapped."""
  if suffix.startswith('.p'):
    pytest.importorskip('torch')
  arrays = {'conv.weight': draw.normal(size=(5, 4, 3, 2)).astype(np.float32).transpose(3, 2, 1, 0),
            'double': draw.normal(size=3), 'bn.num_batches_tracked': np.array(7, np.int64)}
  path = weights.write(tmp_path / f'new/w{suffix}', arrays)
  found = weights.read(path)
  assert path.parent.name == 'new' and list(path.parent.iterdir()) == [path]
  assert sorted(found) == sorted(arrays)
  for name, x in arrays.items():
    assert found[name].dtype == x.dtype
    np.testing.assert_array_equal(found[name], x, strict=True)
  before = path.read_bytes()
  refused(lambda: weights.write(path, {}), 'is there already')
  assert path.read_bytes() == before
  wrapped = tmp_path / f'wrapped{suffix}'
  if suffix.startswith('.p'):
    weights.write(wrapped, arrays, wrap='net')
    assert list(__import__('torch').load(wrapped, weights_only=True)) == ['net']
    assert sorted(weights.read(wrapped)) == sorted(arrays)
  else:
    refused(lambda: weights.write(wrapped, arrays, wrap='net'), f'a {suffix} file is not wrapped')


@pytest.mark.parametrize(('name', 'wrap', 'words'), [
  ('w.h5', None, 'weights are written to .npz, .safetensors, .pth, .pt files'),
  ('w.pth', 'nets', 'unknown wrapper `nets` (did you mean `net`?)')])
def test_files_that_are_not_written(name, wrap, words, tmp_path):
  refused(lambda: weights.write(tmp_path / name, {'x': np.ones(2)}, wrap=wrap), re.escape(words))
  assert not any(tmp_path.iterdir())


def test_bfloat16_is_read_as_float32(tmp_path):
  save(tmp_path / 'w.safetensors', {'x': np.array([1.5, 2], jnp.bfloat16)})
  x = weights.read(tmp_path / 'w.safetensors')['x']
  assert x.dtype == np.float32 and x.tolist() == [1.5, 2]


def test_a_name_map_that_is_not_the_networks_is_a_mistake_of_ours():
  with pytest.raises(ValueError, match='layer4_0'):
    weights.convert(resnet()[1], {}, names.conv_names('conv1', 'conv1'), what='x')
  with pytest.raises(ValueError, match='layer4_0'):
    weights.export(resnet()[1], names.conv_names('conv1', 'conv1'), unread={})
  assert names.conv_names('fc', 'head/dense', bias=True) == {
    'fc.weight': 'params/head/dense/kernel', 'fc.bias': 'params/head/dense/bias'}


@pytest.mark.parametrize(('name', 'content', 'words'), [
  ('w.h5', b'', 'read from .npz, .safetensors, .pth, .pt files'), ('none.npz', None, 'no file'),
  ('w.npz', b'', 'cannot be read'), ('w.npz', b'PK\x03\x04 broken', 'cannot be read'),
  ('w.npz', b'words', 'cannot be read'), ('w.safetensors', b'words', 'cannot be read')])
def test_files_that_hold_no_weights(name, content, words, tmp_path):
  if content is not None:
    (tmp_path / name).write_bytes(content)
  refused(lambda: weights.read(tmp_path / name), re.escape(words))


def test_a_zip_whose_directory_is_damaged(tmp_path):
  save(tmp_path / 'w.npz', {'x': np.ones(2)})
  content = bytearray((tmp_path / 'w.npz').read_bytes())
  content[content.index(b'PK\1\2') + 6] = 231  # the version that is needed to unpack it: 23.1
  (tmp_path / 'w.npz').write_bytes(content)
  refused(lambda: weights.read(tmp_path / 'w.npz'), 'cannot be read')


def test_every_cut_of_an_old_file_of_pytorch_is_told(tmp_path):
  torch = pytest.importorskip('torch')
  torch.save({'x': torch.ones(2)}, tmp_path / 'w.pth', _use_new_zipfile_serialization=False)
  whole = (tmp_path / 'w.pth').read_bytes()
  for size in range(0, len(whole), 5):
    (tmp_path / 'w.pth').write_bytes(whole[:size])
    refused(lambda: weights.read(tmp_path / 'w.pth'), 'cannot be read')


def test_an_npz_of_objects_and_one_that_is_a_single_array(tmp_path):
  """The first would be unpickled, the second has no names."""
  np.savez(tmp_path / 'objects.npz', x=np.array([{}], object))
  with open(tmp_path / 'array.npz', 'wb') as file:
    np.save(file, np.ones(3))
  for name in ('objects', 'array'):
    refused(lambda name=name: weights.read(tmp_path / f'{name}.npz'), 'cannot be read')


def says(shape):
  """The bytes of a .npy file of such a shape, which end soon."""
  file = io.BytesIO()
  np.lib.format.write_array_header_1_0(
    file, {'descr': '<f8', 'fortran_order': False, 'shape': shape})
  return file.getvalue() + bytes(80)


@pytest.mark.parametrize('shape', [(10 ** 13,), (10 ** 30,)])
def test_a_size_that_a_header_says_is_not_believed(shape, tmp_path):
  (tmp_path / 'alone.npz').write_bytes(says(shape))
  with zipfile.ZipFile(tmp_path / 'inside.npz', 'w') as file:
    file.writestr('x.npy', says(shape))
  for name in ('alone', 'inside'):
    refused(lambda name=name: weights.read(tmp_path / f'{name}.npz'), 'cannot be read')


def test_weights_larger_than_the_memory_are_refused_unread(tmp_path, monkeypatch):
  """Packed zeros, and one number that stands for many."""
  np.savez_compressed(tmp_path / 'zeros.npz', x=np.zeros(10 ** 5))
  monkeypatch.setattr(weights.os, 'sysconf', lambda name: 800)
  monkeypatch.setattr(np, 'load', None)
  refused(lambda: weights.read(tmp_path / 'zeros.npz'), r'zeros\.npz take .* GiB')
  monkeypatch.undo()
  torch = pytest.importorskip('torch')
  torch.save({'x': torch.zeros(1).expand(10 ** 13)}, tmp_path / 'one.pth')
  refused(lambda: weights.read(tmp_path / 'one.pth'), r'one\.pth take 37,253 GiB')


def test_files_that_are_encrypted_empty_or_not_real(tmp_path):
  save(tmp_path / 'locked.npz', {'x': np.ones(2)})
  content = bytearray((tmp_path / 'locked.npz').read_bytes())
  for signature, flag in ((b'PK\3\4', 6), (b'PK\1\2', 8)):
    content[content.index(signature) + flag] |= 1
  (tmp_path / 'locked.npz').write_bytes(content)
  refused(lambda: weights.read(tmp_path / 'locked.npz'), 'encrypted')
  for suffix in ('.npz', '.safetensors'):
    save(tmp_path / f'none{suffix}', {})
    refused(lambda suffix=suffix: weights.read(tmp_path / f'none{suffix}'), 'holds no array')
  refused(lambda: weights.convert({'params': {'x': np.zeros(2)}}, {'x': np.full(2, 1 + 2j)},
                                  {'x': 'params/x'}, what='these'),
          '1 not of finite real numbers: x;')


def test_pth_without_pytorch(tmp_path, monkeypatch):
  (tmp_path / 'w.pth').write_bytes(b'')
  monkeypatch.setitem(sys.modules, 'torch', None)  # as if it were not installed
  refused(lambda: weights.read(tmp_path / 'w.pth'), 'pip install torch')
  refused(lambda: weights.write(tmp_path / 'new.pth', {}), r'writing .*new\.pth needs PyTorch')
  assert not (tmp_path / 'new.pth').exists()


def test_pth_of_pytorch(tmp_path):
  """With torch, where it is installed: a state dict as projects wrap it, and what is refused."""
  torch = pytest.importorskip('torch')
  path = tmp_path / 'w.pth'
  state = {'conv1.weight': torch.arange(6.0).reshape(2, 3), 'half': torch.ones(2).bfloat16(),
           'bn1.num_batches_tracked': torch.tensor(3)}
  for content in (state, {name: x.float().requires_grad_() for name, x in state.items()},
                  {'model': {f'module.{name}': x for name, x in state.items()}},
                  {f'module.{name}': x for name, x in state.items()},
                  {'net': state, 'acc': 1.0, 'epoch': 3}, {'state_dict': state},
                  {'model_state': state, 'optimizer_state': {}},
                  *({'model_state': state, 'best_score': scalar} for scalar in (
                    np.float64(0.8), np.float32(0.8), np.int64(3), np.bool_(True)))):
    torch.save(content, path)
    read = weights.read(path)
    assert list(read) == list(state)
    np.testing.assert_array_equal(read['conv1.weight'], np.arange(6.0).reshape(2, 3))
  for content, words in (([state], 'something else than tensors'),
                         ({'conv1.weight': 1.0}, 'something else than tensors'),
                         ({3: torch.ones(2)}, 'something else than tensors'),
                         ({}, 'holds no array'), ({'x': torch.eye(2).to_sparse()}, 'Sparse'),
                         ({'x': torch.ones(2).to(torch.float8_e5m2)}, 'Float8_e5m2'),
                         (torch.nn.Linear(2, 3), r'refused: torch\.nn.*state_dict\(\)'),
                         ({'model_state': state, 'scores': np.ones(2)},
                          r'refused: numpy.*_reconstruct'),
                         ({'net': state, 'more': types.SimpleNamespace()},
                          'or holds more than.*refused: types.SimpleNamespace')):
    torch.save(content, path)
    refused(lambda: weights.read(path), words)
  path.write_bytes(b'words')
  refused(lambda: weights.read(path), 'cannot be read')


def test_pth_with_numpy_scalars(tmp_path):
  """The best score beside the weights, as NumPy 2 and NumPy 1 pickle it; what is allowed for one
  file stays refused elsewhere."""
  torch = pytest.importorskip('torch')
  path = tmp_path / 'w.pth'
  torch.save({'net': {'conv1.weight': torch.ones(2, 3)}, 'best_score': np.float64(0.8)}, path)
  assert list(weights.read(path)) == ['conv1.weight']
  with pytest.raises(pickle.UnpicklingError, match='scalar'):
    torch.load(path, weights_only=True)
  with zipfile.ZipFile(path) as file:
    entries = {name: file.read(name) for name in file.namelist()}
  with zipfile.ZipFile(path, 'w') as file:
    for name, content in entries.items():
      file.writestr(name, content.replace(b'numpy._core.multiarray', b'numpy.core.multiarray'))
  assert list(weights.read(path)) == ['conv1.weight']


# ---- Runs ----------------------------------------------------------------------------------------


class Stopped(contextlib.nullcontext):
  """In place of StopSignals: SIGTERM came at once, so that a run saves its first state and ends."""
  requested, code, check = True, 0, print

  def __enter__(self):
    return self


def test_a_run_starts_from_them_and_goes_on_without(data_dir, tmp_path, monkeypatch):
  """Also when the file is gone, a run goes on and is evaluated; a file that does not fit leaves the
  workdir free for another."""
  monkeypatch.setattr('gapjax.training.train.StopSignals', Stopped)
  config = tiny_config(**{**SCENES, 'model.stem': 'imagenet'})

  def start(file):
    config.model.pretrained = str(tmp_path / file)
    train(config, workdir=tmp_path / 'run', data_dir=data_dir, devices=jax.local_devices()[:1],
          progress=False)

  _, variables = resnet()
  theirs = random_weights(variables, 'resnet10')
  save(tmp_path / 'wrong.npz', {**theirs, 'stray': np.ones(1)})
  save(tmp_path / 'right.npz', theirs)
  expected = weights.load_backbone(variables, tmp_path / 'right.npz', variant='resnet10')
  refused(lambda: start('wrong.npz'), '1 left over: stray')
  with pytest.raises(Interrupted, match='step 0'):
    start('right.npz')
  step, state = newest(tmp_path / 'run')
  for name in ('params', 'batch_stats'):
    assert step == 0 and same(state[name]['backbone'], expected[name])
  (tmp_path / 'right.npz').unlink()
  assert same(open_run(tmp_path / 'run', data_dir=data_dir).state.params, state['params'])
  with pytest.raises(Interrupted, match='step 0'):
    start('right.npz')


def test_pretrained_is_deeplabs_alone():
  refused(lambda: configs.validate(tiny_config(**{'model.pretrained': 'resnet50.pth'})),
          r'model\.pretrained is the backbone')
  refused(lambda: configs.validate(tiny_config(**{'optimizer.backbone_factor': 0.5})),
          r'optimizer\.backbone_factor is for the backbone')
