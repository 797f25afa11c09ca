"""PyTorch's weights: files, names, layouts, torchvision's own features, and runs that start from
them. tests/golden/torchvision_resnets.py made the golden files with torch and torchvision."""

import builtins
import contextlib
import pickle
import re
import sys
import types
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, SCENES, newest, same, tiny_config
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from gapjax import config as configs
from gapjax.errors import Interrupted, UsageError
from gapjax.models.mobilenet import MobileNetV2
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


@pytest.mark.parametrize(('variant', 'blocks', 'convs', 'downsampled'), [
  ('resnet18', [2, 2, 2, 2], 2, [2, 3, 4]), ('resnet34', [3, 4, 6, 3], 2, [2, 3, 4]),
  ('resnet50', [3, 4, 6, 3], 3, [1, 2, 3, 4]), ('resnet101', [3, 4, 23, 3], 3, [1, 2, 3, 4])])
def test_every_name_of_torchvision_and_every_variable_is_mapped_once(variant, blocks, convs,
                                                                     downsampled):
  layers = ['conv1', 'bn1', *(
    f'layer{s}.{b}.{kind}{k}' for s, count in enumerate(blocks, 1) for b in range(count)
    for kind in ('conv', 'bn') for k in range(1, convs + 1))]
  layers += [f'layer{s}.0.downsample.{i}' for s in downsampled for i in (0, 1)]
  expected = []
  for layer in layers:
    norm = '.bn' in layer or layer in ('bn1',) or layer.endswith('downsample.1')
    parts = ('weight', 'bias', 'running_mean', 'running_var') if norm else ('weight',)
    expected += [f'{layer}.{part}' for part in parts]
  found = names.backbone_names(variant)
  assert sorted(found) == sorted(expected)
  paths = flatten_dict(resnet(variant)[1], sep='/')
  assert sorted(found.values()) == sorted(paths)


def test_names_of_a_backbone_that_is_none():
  with pytest.raises(UsageError, match='resnet50'):
    names.backbone_names('resnet500')


@pytest.mark.parametrize('variant', GOLDEN)
def test_features_are_torchvisions(variant, tmp_path):
  """stage4 of narrow ResNets with random weights and BatchNorm statistics, one of them dilated."""
  golden = weights.read(ROOT / f'tests/golden/torchvision_{variant}.npz')
  image, expected = (golden.pop(name).astype(np.float32) for name in ('image', 'stage4'))
  known = names.backbone_names(variant)
  others = {name for name in golden if not name.endswith('num_batches_tracked')} - set(known)
  assert others == {'fc.weight', 'fc.bias'} and set(known) <= set(golden)
  np.savez(tmp_path / 'weights.npz', **golden)
  width, output_stride = GOLDEN[variant]
  network, variables = resnet(variant, width, output_stride)
  found = weights.load_backbone(variables, tmp_path / 'weights.npz', variant=variant)
  features = network.apply(found, image, train=False)[1]['stage4']
  np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-5 * expected.max())


@pytest.mark.parametrize('form', ['{}', 'backbone.{}_level_{}'])
def test_mobilenets_features_are_torchvisions(form, tmp_path):
  """Of an eighth of MobileNetV2, dilated, from a classifier's file and a segmentation net's."""
  golden = weights.read(ROOT / 'tests/golden/torchvision_mobilenetv2.npz')
  arrays = {name: golden[name] for name in golden if name.startswith('features.')}
  assert set(names.backbone_names('mobilenetv2')) == set(arrays)
  expected = golden['16/stage4']
  parts = {name: 'low' if int(name.split('.')[1]) < 4 else 'high' for name in arrays}
  np.savez(tmp_path / 'w.npz', **{
    form.format(parts[name], name) if '_' in form else name: x for name, x in arrays.items()},
    **{'classifier.1.weight': np.ones((2, 3))},
    **({} if '_' in form else {'features.18.0.weight': np.ones((2, 3, 1, 1))}))
  network = MobileNetV2(8, output_stride=16)
  shapes = jax.eval_shape(
    lambda: network.init(jax.random.key(0), jnp.zeros((1, 32, 48, 3)), train=False))
  found = weights.load_backbone(jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes),
                                tmp_path / 'w.npz', variant='mobilenetv2')
  image = golden['image'].astype(np.float32)
  features = network.apply(found, image, train=False)[1]['stage4']
  np.testing.assert_allclose(features, expected, atol=1e-4 * np.abs(expected).max())  # 52 layers


# ---- Files ---------------------------------------------------------------------------------------


def save(path, arrays):
  if path.suffix == '.npz':
    np.savez(path, **arrays)
  else:
    save_file({name: np.ascontiguousarray(x) for name, x in arrays.items()}, path)


@pytest.mark.parametrize('suffix', ['.npz', '.safetensors'])
@pytest.mark.parametrize('form', ['classifier', 'parallel', 'segmentation'])
def test_round_through_files(suffix, form, tmp_path):
  _, variables = resnet()
  theirs = random_weights(variables, 'resnet10')
  more = {'bn1.num_batches_tracked': np.array(7)}
  head = np.ones((2, 3), np.float32)
  arrays = {'classifier': {**theirs, **more, 'fc.weight': head},
            'parallel': {f'module.{name}': x for name, x in {**theirs, **more}.items()},
            'segmentation': {f'backbone.{name}': x for name, x in {**theirs, **more}.items()}
            | {'classifier.4.weight': head, 'aux_classifier.0.weight': head}}[form]
  save(tmp_path / f'weights{suffix}', arrays)
  before = jax.tree.map(np.copy, variables)
  found = weights.load_backbone(variables, str(tmp_path / f'weights{suffix}'), variant='resnet10')
  assert same(variables, before)
  assert jax.tree.structure(found) == jax.tree.structure(variables)
  np.testing.assert_array_equal(found['params']['layer2_0']['shortcut_conv']['kernel'][0, 0].T,
                                theirs['layer2.0.downsample.0.weight'][:, :, 0, 0])
  leaves = flatten_dict(found, sep='/')
  for name, path in names.backbone_names('resnet10').items():
    assert leaves[path].dtype == np.float32
    back = leaves[path].transpose(3, 2, 0, 1) if leaves[path].ndim == 4 else leaves[path]
    np.testing.assert_array_equal(back, theirs[name])


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
  with pytest.raises(UsageError, match='is there already'):
    weights.write(path, {})
  assert path.read_bytes() == before
  wrapped = tmp_path / f'wrapped{suffix}'
  if suffix.startswith('.p'):
    weights.write(wrapped, arrays, wrap='net')
    assert list(__import__('torch').load(wrapped, weights_only=True)) == ['net']
    assert sorted(weights.read(wrapped)) == sorted(arrays)
  else:
    with pytest.raises(UsageError, match=f'a {suffix} file is not wrapped'):
      weights.write(wrapped, arrays, wrap='net')


@pytest.mark.parametrize(('name', 'wrap', 'words'), [
  ('w.h5', None, 'weights are written to .npz, .safetensors, .pth, .pt files'),
  ('w.pth', 'nets', 'unknown wrapper `nets` (did you mean `net`?)')])
def test_files_that_are_not_written(name, wrap, words, tmp_path):
  with pytest.raises(UsageError, match=re.escape(words)):
    weights.write(tmp_path / name, {'x': np.ones(2)}, wrap=wrap)
  assert not any(tmp_path.iterdir())


def test_bfloat16_is_read_as_float32(tmp_path):
  save(tmp_path / 'w.safetensors', {'x': np.array([1.5, 2], jnp.bfloat16)})
  x = weights.read(tmp_path / 'w.safetensors')['x']
  assert x.dtype == np.float32 and x.tolist() == [1.5, 2]


def test_all_that_does_not_fit_is_listed(tmp_path):
  _, variables = resnet()
  arrays = random_weights(variables, 'resnet10')
  for name in ('layer1.0.bn2.running_var', 'layer4.0.conv1.weight'):
    del arrays[name]
  arrays.update({'layer1.1.conv1.weight': np.ones((4, 4, 3, 3)), 'stray': np.ones(2),
                 'conv1.weight': np.ones((4, 3, 3, 3)), 'bn1.bias': np.ones(5)})
  arrays['bn1.weight'][1] = np.nan
  save(tmp_path / 'w.npz', arrays)
  with pytest.raises(UsageError) as error:
    weights.load_backbone(variables, tmp_path / 'w.npz', variant='resnet10')
  line = str(error.value)
  assert '\n' not in line
  for part in ('2 missing: layer1.0.bn2.running_var, layer4.0.conv1.weight;',
               '2 left over: layer1.1.conv1.weight, stray;',
               '2 of another shape: conv1.weight (4, 3, 3, 3) (here: (4, 3, 7, 7)), '
               'bn1.bias (5,) (here: (4,));', '1 not of finite numbers: bn1.weight;'):
    assert part in line


def test_a_name_map_that_is_not_the_networks_is_a_mistake_of_ours():
  with pytest.raises(ValueError, match='layer4_0'):
    weights.convert(resnet()[1], {}, names.conv_names('conv1', 'conv1'), what='x')
  with pytest.raises(ValueError, match='layer4_0'):
    weights.export(resnet()[1], names.conv_names('conv1', 'conv1'), unread={})
  assert names.conv_names('fc', 'head/dense', bias=True) == {
    'fc.weight': 'params/head/dense/kernel', 'fc.bias': 'params/head/dense/bias'}


def test_layouts():
  """Entry by entry: a kernel (o, i, h, w) of PyTorch is ours at (h, w, i, o)."""
  theirs = draw.normal(size=(2, 3, 4, 5))
  ours = weights.to_jax(theirs)
  assert ours.shape == (4, 5, 3, 2) and weights.torch_shape(ours.shape) == theirs.shape
  for (o, i, h, w), value in np.ndenumerate(theirs):
    assert ours[h, w, i, o] == value
  linear, vector = theirs[0, :, :, 0], theirs[0, 0, 0]
  np.testing.assert_array_equal(weights.to_jax(linear), [[x[j] for x in linear] for j in range(4)])
  assert weights.torch_shape((4, 3)) == (3, 4)
  for x in (theirs, linear, vector, np.array(3)):
    np.testing.assert_array_equal(weights.to_torch(weights.to_jax(x)), x, strict=True)


@pytest.mark.parametrize(('name', 'content', 'words'), [
  ('w.h5', b'', 'read from .npz, .safetensors, .pth, .pt files'), ('none.npz', None, 'no file'),
  ('w.npz', b'', 'cannot be read'), ('w.npz', b'PK\x03\x04 broken', 'cannot be read'),
  ('w.npz', b'words', 'cannot be read'), ('w.safetensors', b'words', 'cannot be read')])
def test_files_that_hold_no_weights(name, content, words, tmp_path):
  if content is not None:
    (tmp_path / name).write_bytes(content)
  with pytest.raises(UsageError, match=re.escape(words)) as error:
    weights.read(tmp_path / name)
  assert '\n' not in str(error.value)


def test_an_npz_of_objects_and_one_that_is_a_single_array(tmp_path):
  """The first would be unpickled, the second has no names."""
  np.savez(tmp_path / 'objects.npz', x=np.array([{}], object))
  with open(tmp_path / 'array.npz', 'wb') as file:
    np.save(file, np.ones(3))
  for name in ('objects', 'array'):
    with pytest.raises(UsageError, match='cannot be read'):
      weights.read(tmp_path / f'{name}.npz')


def test_pth_without_pytorch(tmp_path, monkeypatch):
  (tmp_path / 'w.pth').write_bytes(b'')
  real = builtins.__import__

  def without(name, *rest):
    if name == 'torch':
      raise ImportError(name)
    return real(name, *rest)

  monkeypatch.setattr(builtins, '__import__', without)
  with pytest.raises(UsageError, match='pip install torch'):
    weights.read(tmp_path / 'w.pth')
  with pytest.raises(UsageError, match=r'writing .*new\.pth needs PyTorch'):
    weights.write(tmp_path / 'new.pth', {})
  assert not (tmp_path / 'new.pth').exists()


class Tensor:
  """In place of torch.Tensor, where torch is not installed."""
  dtype = 'float32'

  def __init__(self, values):
    self.values = values

  def numpy(self):
    return self.values


def test_pth_is_unwrapped(tmp_path, monkeypatch):
  """Against a stand-in of torch, whose `load` must be asked for weights only."""
  (tmp_path / 'w.pth').write_bytes(b'')
  found = {}

  def load(path, *, weights_only, map_location):
    assert path == tmp_path / 'w.pth' and weights_only and map_location == 'cpu'
    return found['is']

  monkeypatch.setitem(sys.modules, 'torch', types.SimpleNamespace(
    load=load, Tensor=Tensor, bfloat16='bfloat16', serialization=types.SimpleNamespace(
      safe_globals=lambda _: contextlib.nullcontext())))
  plain = {'module.conv1.weight': Tensor(np.ones(3))}
  for found['is'] in (plain, {'net': plain, 'acc': 1.0, 'epoch': 3},
                      {'model_state': plain, 'optimizer_state': {}}, {'state_dict': plain}):
    assert list(weights.read(tmp_path / 'w.pth')) == ['conv1.weight']
  for found['is'] in ([plain], {'conv1.weight': 1.0}):
    with pytest.raises(UsageError, match='something else than tensors'):
      weights.read(tmp_path / 'w.pth')


def test_pth_of_pytorch(tmp_path):
  """With torch, where it is installed: a state dict, and a pickle that is refused."""
  torch = pytest.importorskip('torch')
  state = {'conv1.weight': torch.arange(6.0).reshape(2, 3), 'half': torch.ones(2).bfloat16(),
           'bn1.num_batches_tracked': torch.tensor(3)}
  torch.save({'net': {f'module.{name}': x for name, x in state.items()}}, tmp_path / 'w.pth')
  read = weights.read(tmp_path / 'w.pth')
  assert list(read) == list(state)
  np.testing.assert_array_equal(read['conv1.weight'], np.arange(6.0).reshape(2, 3))
  torch.save({'net': state, 'more': types.SimpleNamespace()}, tmp_path / 'w.pt')
  (tmp_path / 'broken.pth').write_bytes(b'words')
  for name, words in (('w.pt', 'refused: types.SimpleNamespace'), ('broken.pth', '')):
    with pytest.raises(UsageError, match=f'cannot be read, or holds more than.*{words}') as error:
      weights.read(tmp_path / name)
    assert '\n' not in str(error.value)


def test_pth_with_numpy_scalars(tmp_path):
  """The best score or the epoch beside the weights, as NumPy 2 and NumPy 1 pickle them, and nothing
  else of NumPy's; what is allowed for one file stays refused elsewhere."""
  torch = pytest.importorskip('torch')
  path = tmp_path / 'w.pth'
  state = {'conv1.weight': torch.ones(2, 3)}
  for scalar in (np.float64(0.8), np.float32(0.8), np.int64(3), np.bool_(True)):
    torch.save({'model_state': state, 'best_score': scalar}, path)
    assert list(weights.read(path)) == ['conv1.weight']
    with pytest.raises(pickle.UnpicklingError, match='scalar'):
      torch.load(path, weights_only=True)
  with zipfile.ZipFile(path) as file:
    entries = {name: file.read(name) for name in file.namelist()}
  with zipfile.ZipFile(path, 'w') as file:
    for name, content in entries.items():
      file.writestr(name, content.replace(b'numpy._core.multiarray', b'numpy.core.multiarray'))
  assert list(weights.read(path)) == ['conv1.weight']
  torch.save({'model_state': state, 'scores': np.ones(2)}, path)
  with pytest.raises(UsageError, match=r'refused: numpy.*_reconstruct'):
    weights.read(path)


# ---- Runs ----------------------------------------------------------------------------------------


class Stopped(contextlib.nullcontext):
  """In place of StopSignals: SIGTERM came at once, so that a run saves its first state and ends."""
  requested, code = True, 0

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
  with pytest.raises(UsageError, match='1 left over: stray'):
    start('wrong.npz')
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
  with pytest.raises(UsageError, match=r'model\.pretrained is the backbone'):
    configs.validate(tiny_config(**{'model.pretrained': 'resnet50.pth'}))
  with pytest.raises(UsageError, match=r'optimizer\.backbone_factor is for the backbone'):
    configs.validate(tiny_config(**{'optimizer.backbone_factor': 0.5}))
