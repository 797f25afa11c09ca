"""Files that say of themselves how large they are: none is believed before it is checked."""

import io
import json
import pathlib
import struct
import tarfile
import zipfile
import zlib

import numpy as np
import pytest
from conftest import refused
from prepared_files import encoded, write_images, write_scenes

from gapjax import cli, data
from gapjax.data import scenes_sources, sources

PIXELS = np.zeros((8, 8, 3), np.uint8)
BATCH = 'cifar-10-batches-bin/data_batch_1.bin'


def png(side, *, colour):
  """A PNG whose header says side x side pixels, of which it has some."""
  header = struct.pack('>IIBBBBB', side, side, 8, 2 if colour else 0, 0, 0, 0)
  return b'\x89PNG\r\n\x1a\n' + b''.join(
    struct.pack('>I', len(part)) + kind + part + struct.pack('>I', zlib.crc32(kind + part))
    for kind, part in ((b'IHDR', header), (b'IDAT', zlib.compress(bytes(99))), (b'IEND', b'')))


@pytest.mark.parametrize('side', [60_000, 2 ** 31 - 1])
def test_pixels_of_a_header(tmp_path, side):
  images = write_images(tmp_path / 'images', [encoded(PIXELS), png(side, colour=True)])
  refused(lambda: data.load_images(images, split='train'), 'holds what is no image')
  scenes = data.load_scenes(write_scenes(tmp_path / 'scenes', [png(side, colour=False)]),
                            split='train')
  refused(lambda: scenes[0], 'is damaged')


@pytest.mark.parametrize(('image', 'words'), [
  (png(60_000, colour=True), 'pixels'), (encoded(PIXELS) + bytes(1 << 20), 'more than 0 MiB')],
  ids=['pixels', 'bytes'])
def test_images_of_a_zip(tmp_path, monkeypatch, image, words):
  """The second ends in zeros, which take no space in the archive."""
  monkeypatch.setattr(scenes_sources, '_LARGEST', 1 << 19)
  for folder, kind, content in (('leftImg8bit', 'leftImg8bit', image),
                                ('gtFine', 'gtFine_labelIds', encoded(PIXELS[..., 0] + 7))):
    with zipfile.ZipFile(tmp_path / f'{folder}_trainvaltest.zip', 'w',
                         zipfile.ZIP_DEFLATED) as file:
      for split in ('train', 'val'):
        file.writestr(f'{folder}/{split}/city/a_{kind}.png', content)
  refused(lambda: data.prepare('cityscapes', source=tmp_path, data_dir=tmp_path / 'data'),
          f'a_leftImg8bit.png is damaged.*{words}')


@pytest.mark.parametrize('size', [10 ** 13, 10 ** 25])
@pytest.mark.parametrize('kind', [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_bytes_of_a_tar_member(tmp_path, kind, size):
  member = tarfile.TarInfo(BATCH)
  member.type, member.size = kind, size
  (tmp_path / 'a.tar').write_bytes(member.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
  refused(lambda: sources.read_cifar('cifar10', tmp_path / 'a.tar'), 'is not a whole tar archive')
  refused(lambda: data.prepare('voc2012', source=tmp_path / 'a.tar', data_dir=tmp_path),
          'is not a whole tar archive|no folder VOC2012')


def test_files_larger_than_any_of_cifars(tmp_path):
  """A hole of a terabyte, and zeros that take no space in an archive."""
  (tmp_path / BATCH).parent.mkdir()
  with (tmp_path / BATCH).open('wb') as file:
    file.truncate(10 ** 12)
  refused(lambda: sources.read_cifar('cifar10', tmp_path), 'data_batch_1.bin has more than')
  with tarfile.open(tmp_path / 'a.tar.gz', 'w:gz') as archive:
    member = tarfile.TarInfo(BATCH)
    member.size = 100_000_000
    archive.addfile(member, io.BytesIO(bytes(member.size)))
  refused(lambda: sources.read_cifar('cifar10', tmp_path / 'a.tar.gz'),
          'data_batch_1.bin has more than')


@pytest.mark.parametrize('write', [
  lambda root: write_images(root, [encoded(PIXELS)] * 3),
  lambda root: write_scenes(root, [encoded(PIXELS[..., 0])] * 3)])
def test_records_of_a_folder(tmp_path, write):
  folder = pathlib.Path(write(tmp_path))
  about = json.loads((folder / 'dataset_info.json').read_text())
  about['splits'][0]['shardLengths'] = [str(10 ** 13)]
  (folder / 'dataset_info.json').write_text(json.dumps(about))
  load = data.load_images if 'Class' in (folder / 'features.json').read_text() else data.load_scenes
  refused(lambda: load(folder, split='train'), 'lacks records')


def test_classes_of_a_folder(tmp_path):
  folder = pathlib.Path(write_images(tmp_path, [encoded(PIXELS)]))
  features = folder / 'features.json'
  features.write_text(features.read_text().replace('"2"', f'"{10 ** 13}"'))
  refused(lambda: data.load_images(folder, split='train'), 'says 10000000000000 classes')


def test_too_little_memory_is_one_line(monkeypatch, capsys):
  monkeypatch.setitem(cli.VERBS, 'report', lambda argv: np.empty(10 ** 15))
  assert cli.main(['report']) == 2
  [line] = capsys.readouterr().err.splitlines()
  assert 'this machine has too little memory (Unable to allocate' in line
