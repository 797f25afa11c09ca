"""`gapjax rank --torch`: a network from a module, images from a folder; what is refused."""

import json
import logging
import sys

import numpy as np
import pytest
from conftest import refused
from PIL import Image

from gapjax import cli
from gapjax.models import IMAGENET
from gapjax.neurons import yardstick

torch = pytest.importorskip('torch')
from gapjax.pytorch.rank import Folder, cut, load_network  # noqa: E402

MODULE = """
import torch
from torch import nn

class Block(nn.Module):
  def __init__(self):
    super().__init__()
    self.conv, self.norm = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
    self.relu = nn.ReLU(inplace=True)

  def forward(self, x):
    y = self.norm(self.conv(x))
    y += x
    return self.relu(y)

def network():
  torch.manual_seed(0)
  body = nn.Sequential(nn.Conv2d(3, 6, 3, 2, padding=1), Block(), nn.Dropout(.5))
  return nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2))

def fails():
  raise RuntimeError('no weights here')

def flat():
  return nn.Sequential(nn.Flatten(), nn.LazyLinear(2))

def large():
  return nn.Sequential(nn.Conv2d(3, 2, 40), nn.Flatten())

class Once(nn.Conv2d):
  def forward(self, x):
    if len(x) > 1:
      raise ValueError('one image alone')
    return super().forward(x)

def once():
  return nn.Sequential(Once(3, 2, 3))

number = lambda: 3
"""
draw = np.random.default_rng(0)


@pytest.fixture
def at(tmp_path, monkeypatch):
  """The current folder, with the module and two folders of images: of one size and of several."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.syspath_prepend(tmp_path)  # and what is imported is forgotten again
  monkeypatch.delitem(sys.modules, 'tiny_networks', raising=False)
  (tmp_path / 'tiny_networks.py').write_text(MODULE)
  (tmp_path / 'broken.py').write_text('import nothing_of_this_name\n')
  for folder, sizes in (('same', [(20, 16)] * 9), ('mixed', [(20, 16), (30, 40), (250, 240)])):
    (tmp_path / folder / 'in').mkdir(parents=True)
    for i, (width, height) in enumerate(sizes):
      pixels = draw.integers(0, 256, (height, width, 3)).astype(np.uint8)
      name = f'in/{i}.JPG' if i % 2 else f'{i}.png'
      Image.fromarray(pixels).save(tmp_path / folder / name, 'JPEG' if i % 2 else 'PNG')
  (tmp_path / 'same' / 'notes.txt').write_text('no image')
  (tmp_path / 'empty').mkdir()
  return tmp_path


def averages(network, images):
  """z of the first block, (n, 6)."""
  mean, std = IMAGENET
  x = torch.tensor((images / 255. - mean) / std, dtype=torch.float32).permute(0, 3, 1, 2)
  with torch.no_grad():
    return network[0](x).mean((2, 3)).numpy().astype(float)


def test_a_networks_channels_are_ranked_by_a_folder(at, caplog, capsys):
  """By the definition in torch, on the files as Pillow reads them; left by a list of files."""
  caplog.set_level(logging.INFO)
  (at / 'left.json').write_text(json.dumps({'left': ['0.png', 'in/3.JPG', '8.png']}))
  assert cli.main(['rank', '--torch=tiny_networks:network', '--images=same', '--workdir=out',
                   '--ids=left.json']) == 0
  names = ['0.png', '2.png', '4.png', '6.png', '8.png', *(f'in/{i}.JPG' for i in (1, 3, 5, 7))]
  images = np.stack([np.asarray(Image.open(at / 'same' / name)) for name in names])
  network = load_network('tiny_networks:network')
  z, mirrored, moved = (averages(network, x) for x in (images, images[:, :, ::-1], np.pad(
    images, ((0, 0), (0, 0), (0, 1), (0, 0)), 'edge')[:, :, 1:]))
  left = [names.index(name) for name in ('0.png', 'in/3.JPG', '8.png')]
  expected = {'overall': np.abs(z - mirrored).mean(0), 'left': (z - mirrored)[left].mean(0)}
  expected['left_centred'] = expected['left'] - (z - mirrored).mean(0)
  orders = json.loads((at / 'out/ranking.json').read_text())
  measured = yardstick.read_json(at / 'out/ranking_yardstick.json', step=None)
  assert [*orders] == [*measured] == ['overall', 'left', 'left_centred']
  for name, scores in expected.items():
    np.testing.assert_array_equal(orders[name], np.argsort(-scores))
    np.testing.assert_allclose(measured[name].mean, scores, atol=1e-5)
  np.testing.assert_allclose(measured['overall'].shift, np.abs(z - moved).mean(0), atol=1e-5)
  assert (at / 'out/yardstick.png').exists()
  assert capsys.readouterr().out.splitlines()[-1] == 'out/ranking.json'
  for words in ('9 images of 20x16 pixels', 'layer `0`: 6 channels, maps of 8x10',
                'was in training mode: eval() is set', "ImageNet's mean"):
    assert words in caplog.text


def test_a_centred_region_needs_two_other_images(at):
  """With less its channels are in order, and nothing says what they are measured by."""
  names = ['0.png', '2.png', '4.png', '6.png', '8.png', *(f'in/{i}.JPG' for i in (1, 3, 5, 7))]
  (at / 'ids.json').write_text(json.dumps({'left': names[:8], 'right': names[:7]}))
  assert cli.main(['rank', '--torch=tiny_networks:network', '--images=same', '--workdir=out',
                   '--ids=ids.json']) == 0
  assert 'left_centred' in json.loads((at / 'out/ranking.json').read_text())
  measured = yardstick.read_json(at / 'out/ranking_yardstick.json')
  assert [*measured] == ['overall', 'left', 'right', 'right_centred']
  assert measured['right_centred'].images == 7


def test_images_of_several_sizes_become_one(at, caplog):
  caplog.set_level(logging.INFO)
  assert cli.main(['rank', '--torch=tiny_networks:network', '--images=mixed', '--workdir=out',
                   '--layer=0.0']) == 0
  assert '3 images of 3 sizes: each is scaled, and cropped' in caplog.text
  assert 'layer `0.0`: 6 channels, maps of 112x112' in caplog.text


def test_images_are_turned_as_their_exif_says(at):
  """By the standard's table: on which side of the scene the first row and the first column lie."""
  scene = draw.integers(0, 256, (20, 16, 3)).astype(np.uint8)
  upright = [scene, scene[:, ::-1], scene[::-1, ::-1], scene[::-1]]  # top left, top right, ...
  on_side = [stored.swapaxes(0, 1) for stored in (scene, scene[:, ::-1], scene[::-1, ::-1],
                                                  scene[::-1])]  # left top, right top, ...
  (at / 'turned').mkdir()
  for orientation, stored in enumerate([*upright, *on_side], 1):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(at / f'turned/{orientation}.png', exif=exif)
  folder = Folder(at / 'turned')
  assert folder.size == (16, 20)
  [images] = folder.batches(range(8))
  mean, std = IMAGENET
  np.testing.assert_allclose(images, np.broadcast_to((scene / 255 - mean) / std, images.shape),
                             atol=1e-6)


def test_names_of_files_may_have_spaces(at):
  (at / 'mixed/0.png').rename(at / 'mixed/a street.png')
  (at / 'left.txt').write_text('a street.png\r\n\n  2.png  \n')
  assert cli.main(['rank', '--torch=tiny_networks:network', '--images=mixed', '--workdir=out',
                   '--ids=left=left.txt']) == 0
  assert yardstick.read_json(at / 'out/ranking_yardstick.json')['left'].images == 2


def test_maps_are_a_layers_own_though_what_follows_works_in_place(at):
  network = load_network('tiny_networks:network')
  images = draw.normal(size=(2, 8, 10, 3)).astype(np.float32)
  x, block = torch.tensor(images).permute(0, 3, 1, 2), network[0][1]
  with torch.no_grad():
    expected = block.norm(block.conv(network[0][0](x))).permute(0, 2, 3, 1)
  found = cut(network, images, layer='0.1.norm')
  np.testing.assert_allclose(found(images), expected, atol=1e-6)
  np.testing.assert_allclose(found(images[:1]), expected[:1], atol=1e-6)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_half_and_double_networks_are_given_images_of_their_dtype(dtype):
  """A 1x1 convolution against its definition, of images and weights rounded to the dtype."""
  layer = torch.nn.Conv2d(3, 6, 1, bias=False).to(dtype)
  images = draw.normal(size=(2, 4, 5, 3)).astype(np.float32)
  x = torch.tensor(images).to(dtype).double().numpy()
  kernel = layer.weight.detach().double().numpy()[:, :, 0, 0]
  found = cut(torch.nn.Sequential(layer), images)(images)
  assert found.dtype == np.float32
  np.testing.assert_allclose(found, x @ kernel.T, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_a_layer_with_its_channels_last_is_refused(unchecked):
  class Last(torch.nn.Module):
    def forward(self, x):
      return x.permute(0, 2, 3, 1)

  network = torch.nn.Sequential(torch.nn.Conv2d(3, 6, 1), Last())
  square = np.zeros((2, 8, 8, 3), np.float32)
  refused(lambda: cut(network, square), r'layer `1` returns maps \(8, 8, 6\) .* layer: 0, 1')
  refused(lambda: cut(network, np.zeros((2, 8, 12, 3), np.float32)), r'maps \(8, 12, 6\) that look')
  assert cut(network, square, layer='0')(square).shape == (2, 8, 8, 6)


@pytest.mark.parametrize(('argv', 'words'), [
  (['--torch=tiny_networks'], 'is not MODULE:FUNCTION'),
  (['--torch=tiny_network:network'], 'module `tiny_network` cannot be imported (ModuleNotFound'),
  (['--torch=broken:network'], "No module named 'nothing_of_this_name'"),
  (['--torch=tiny_networks:netwrk'], 'no function `netwrk` (did you mean `network`?)'),
  (['--torch=tiny_networks:fails'], 'fails (RuntimeError: no weights here)'),
  (['--torch=tiny_networks:number'], 'returns int, not a torch.nn.Module'),
  (['--torch=tiny_networks:flat'], 'no layer returns feature maps'),
  (['--torch=tiny_networks:large'], 'the network cannot take images (1, 3, 16, 20)'),
  (['--torch=tiny_networks:once'],
   'cannot take images (8, 3, 16, 20) (ValueError: one image alone); give images of a size that'),
  (['--layer=0.3'], 'unknown layer `0.3` (did you mean `0.'),
  (['--layer=3'], 'layer `3` returns no feature maps (b, c, h, w) of images (1, 3, 16, 20); these'),
  (['--images=empty'], 'holds no image'), (['--images=nowhere'], 'is no folder'),
  (['--images=bad'], 'bad/0.png cannot be read as an image'),
  (['--images=deep'], 'deep/0.png cannot be read as an image of 8 bits'),
  (['--workdir=run'], 'is the workdir of a run'),
  (['--ids=left=list.txt'], 'no image has the id `9.png`'),
  (['--regions', 'left'], 'has no masks to choose images by'),
  (['--config.neurons.images=3'], '--config.neurons.images=3 is for runs of gapjax'),
  (['--data_dir=x'], '--data_dir is for runs'),
])
def test_mistakes_are_one_line(at, capsys, argv, words):
  (at / 'bad').mkdir()
  (at / 'bad/0.png').write_text('no image')
  (at / 'deep').mkdir()
  Image.fromarray(np.zeros((8, 8), np.uint16)).save(at / 'deep/0.png')
  (at / 'run').mkdir()
  (at / 'run/config.json').write_text('{}')
  (at / 'list.txt').write_text('0.png\n9.png')
  assert cli.main(['rank', '--torch=tiny_networks:network', '--images=same', '--workdir=out',
                   *argv]) == 2
  [line] = [x for x in capsys.readouterr().err.splitlines() if x.startswith('gapjax: ')]
  assert words in line
  assert not (at / 'out/ranking.json').exists()


def test_flags_that_lack_each_other(complaint):
  assert '--images=FOLDER' in complaint('rank', '--torch=a:b', '--workdir=out')
  assert '--torch=MODULE:FUNCTION' in complaint('rank', '--images=x', '--workdir=out')


def test_without_pytorch(at, monkeypatch):
  monkeypatch.setitem(sys.modules, 'torch', None)  # as if it were not installed
  refused(lambda: load_network('tiny_networks:network'), 'needs PyTorch: pip install torch')
