"""The publishers' files: every form is read, every damage is named, nothing unsafe is run.

The files have the true format with fewer records; downloads come from this machine.
"""

import dataclasses
import gzip
import hashlib
import http.server
import lzma
import os
import pickle
import shutil
import socket
import tarfile
import threading
import time

import numpy as np
import pytest
import tensorflow_datasets as tfds
from cifar_files import (
    BINARY,
    RECORDS,
    fails,
    make_truth,
    tar,
    write_binary,
    write_python,
)
from tensorflow_datasets.core.download import checksums

from gapjax import data
from gapjax.data import builders, sources


@pytest.fixture(autouse=True)
def few_records(monkeypatch):
  """The publishers' formats with a few records a file."""
  for name, cifar in sources.CIFAR.items():
    monkeypatch.setitem(sources.CIFAR, name, dataclasses.replace(cifar, records=RECORDS[name]))


def records_by_id(folder, split):
  """{publisher's index: TFDS record}, decoded by TFDS itself."""
  source = tfds.builder_from_directory(folder).as_data_source(split)
  prefix = f'{split}_'
  return {int(record['id'].decode().removeprefix(prefix)): record for record in source}


def fails_cleanly(source, data_dir, *parts, name='cifar10'):
  """Preparing fails, and data_dir is as if nothing had been tried."""
  fails(lambda: data.prepare(name, source=source, data_dir=data_dir), *parts)
  assert not list(data_dir.rglob('*'))


@pytest.fixture
def binary(tmp_path):
  return write_binary(tmp_path / 'source', 'cifar10', make_truth('cifar10'))


@pytest.fixture
def python(tmp_path):
  return write_python(tmp_path / 'source', 'cifar10', make_truth('cifar10'))


@pytest.fixture
def data_dir(tmp_path):
  return tmp_path / 'data'


# ---- The formats. ----


@pytest.mark.parametrize('name', ['cifar10', 'cifar100'])
@pytest.mark.parametrize('version', ['binary', 'python'])
@pytest.mark.parametrize('given', ['folder', 'parent', 'archive'])
def test_every_form_of_source_gives_the_written_arrays(tmp_path, data_dir, name, version, given):
  truth = make_truth(name)
  write = write_binary if version == 'binary' else write_python
  folder = write(tmp_path / 'source', name, truth)
  source = {'folder': folder, 'parent': folder.parent}.get(given)
  if given == 'archive':
    source = tar(folder, tmp_path / 'source.tar.gz')
    shutil.rmtree(folder)
  path = data.prepare(name, source=str(source), data_dir=str(data_dir))
  assert path == data_dir / name / '3.0.2'
  assert [child.name for child in data_dir.iterdir()] == [name]
  for split in ('train', 'test'):
    loaded = data.load_images(name, split=split, data_dir=data_dir)
    records = records_by_id(path, split)
    n = len(truth.images[split])
    assert sorted(records) == list(range(n))
    for i, record in records.items():
      np.testing.assert_array_equal(record['image'], truth.images[split][i])
      assert record['label'] == truth.label[split][i]
      if name == 'cifar100':
        assert record['coarse_label'] == truth.coarse[split][i]
    order = list(records)  # TFDS' order on disk
    np.testing.assert_array_equal(loaded.images, truth.images[split][order])
    np.testing.assert_array_equal(loaded.labels, truth.label[split][order])
    assert loaded.images.dtype == np.uint8 and loaded.labels.dtype == np.int32
    assert loaded.name == name
    assert len(loaded.class_names) == (10 if name == 'cifar10' else 100)
    assert (loaded.class_names[0], loaded.class_names[-1]) == (
      ('airplane', 'truck') if name == 'cifar10' else ('apple', 'worm'))
  if name == 'cifar100':
    coarse = tfds.builder_from_directory(path).info.features['coarse_label'].names
    assert (len(coarse), coarse[0], coarse[-1]) == (20, 'aquatic_mammals', 'vehicles_2')


@pytest.mark.parametrize('protocol', [2, 4, 5])
def test_pickles_written_again_by_this_python(tmp_path, data_dir, protocol):
  truth = make_truth('cifar10')
  folder = write_python(tmp_path, 'cifar10', truth, lambda c: pickle.dumps(c, protocol=protocol))
  path = data.prepare('cifar10', source=folder, data_dir=data_dir)
  np.testing.assert_array_equal(records_by_id(path, 'train')[3]['image'],
                                truth.images['train'][3])


def test_prepare_again_does_nothing(binary, data_dir, caplog):
  """And says so where another source is given."""
  path = data.prepare('cifar10', source=binary, data_dir=data_dir)
  assert data.prepare('cifar10', data_dir=data_dir) == path and not caplog.messages
  before = (path / 'dataset_info.json').stat().st_mtime_ns
  assert data.prepare('cifar10', source='no such source', data_dir=data_dir) == path
  assert (path / 'dataset_info.json').stat().st_mtime_ns == before
  assert caplog.messages == ['cifar10 is prepared already, and nothing is taken from no such '
                             f'source; to build it from there, remove {path} and run this again']


# ---- Bad sources: named, refused, and nothing left behind. ----


def test_missing_sources(binary, data_dir, tmp_path):
  fails_cleanly(tmp_path / 'nowhere', data_dir, 'nowhere does not exist', '.tar.gz')
  fails_cleanly(tmp_path, data_dir, 'does not hold this dataset', BINARY['cifar10'])
  fails_cleanly(binary, data_dir, 'does not hold this dataset', 'cifar-100-binary/train.bin',
                name='cifar100')
  (binary / 'data_batch_3.bin').unlink()
  fails_cleanly(binary, data_dir, 'data_batch_3.bin is missing')
  archive = tar(binary, tmp_path / 'some.tar.gz')
  fails_cleanly(archive, data_dir, 'some.tar.gz', 'data_batch_3.bin is missing')
  fails_cleanly(archive, data_dir, 'does not hold this dataset', name='cifar100')


def test_truncated_and_out_of_range_binary(binary, data_dir):
  file = binary / 'data_batch_2.bin'
  whole = file.read_bytes()
  file.write_bytes(whole[:-1])
  fails_cleanly(binary, data_dir, 'data_batch_2.bin', f'{len(whole) - 1} bytes', str(len(whole)))
  file.write_bytes(whole[:2 * 3073] + b'\x0a' + whole[2 * 3073 + 1:])
  fails_cleanly(binary, data_dir, 'data_batch_2.bin', 'label 10 of record 2')


def test_a_file_in_place_of_another(binary, data_dir):
  """A batch that is there twice, a test file of other images: each is whole, the classes are not
  even."""
  third, test = (binary / f'{name}_batch{i}.bin' for name, i in (('data', '_3'), ('test', '')))
  whole = third.read_bytes()
  third.write_bytes((binary / 'data_batch_1.bin').read_bytes())
  fails_cleanly(binary, data_dir, f'{binary}/train has', 'images of class', 'instead of 3')
  third.write_bytes(whole)
  content = bytearray(test.read_bytes())
  content[0] = (content[0] + 1) % 10  # the first record's label
  test.write_bytes(content)
  fails_cleanly(binary, data_dir, f'{binary}/test has', 'images of class', 'instead of 1')


def test_damaged_archives(binary, data_dir, tmp_path):
  archive = tar(binary, tmp_path / 'some.tar.gz')
  whole = archive.read_bytes()
  for bad in (whole[:len(whole) // 2], whole[:1000] + b'garbage' + whole[1007:], whole[:-4],
              b'not an archive'):
    archive.write_bytes(bad)
    fails_cleanly(archive, data_dir, 'some.tar.gz', 'not a whole tar archive')
  packed = bytearray(lzma.compress(gzip.decompress(whole)))
  packed[len(packed) // 2] ^= 1
  archive = tmp_path / 'some.tar.xz'
  archive.write_bytes(packed)
  fails_cleanly(archive, data_dir, 'some.tar.xz', 'not a whole tar archive')


@pytest.mark.parametrize('content, part', [
    ([1, 2], 'no dictionary'),
    ({'labels': [0] * 6}, 'under `data`'),
    ({'labels': [0] * 6, 'data': np.zeros((5, 3072), np.uint8)}, '6 images'),
    ({'labels': [0] * 6, 'data': np.zeros((6, 3072), np.float32)}, '6 images'),
    ({'labels': [0] * 5, 'data': np.zeros((6, 3072), np.uint8)}, '6 integers under `labels`'),
    ({'labels': ['0'] * 6, 'data': np.zeros((6, 3072), np.uint8)}, '6 integers'),
    ({'labels': [0, -1] * 3, 'data': np.zeros((6, 3072), np.uint8)}, 'label -1 of record 1'),
])
def test_pickles_with_wrong_content(python, data_dir, content, part):
  (python / 'data_batch_4').write_bytes(pickle.dumps(content))
  fails_cleanly(python, data_dir, 'data_batch_4', part)


def test_damaged_pickles(python, data_dir):
  file = python / 'data_batch_4'
  file.write_bytes(file.read_bytes()[:500])
  fails_cleanly(python, data_dir, 'data_batch_4', 'not a whole pickle')
  file.write_bytes(b'\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x04\x00\x00\x00zlib\x86R.')
  fails_cleanly(python, data_dir, 'data_batch_4', 'codec zlib')


def test_unsafe_pickle_is_not_run(python, data_dir, tmp_path):
  marker = tmp_path / 'marker'

  class Evil:
    def __reduce__(self):
      return os.system, (f'touch {marker}',)

  attack = pickle.dumps({'data': Evil()})
  pickle.loads(attack)
  assert marker.exists()  # the attack is real
  marker.unlink()
  (python / 'data_batch_1').write_bytes(attack)
  fails_cleanly(python, data_dir, f'data_batch_1 refers to `{os.system.__module__}.system`',
                'refused')
  assert not marker.exists()


@pytest.mark.parametrize('name, link', [
    ('../escaped', None), ('cifar-10-batches-bin/../../escaped', None), ('/tmp/escaped', None),
    ('cifar-10-batches-bin/data_batch_1.bin', '/etc/passwd'),
    ('cifar-10-batches-bin/link', '../../escaped')])
def test_archive_that_points_outside_reaches_nothing(binary, data_dir, tmp_path, name, link):
  path = tmp_path / 'evil.tar.gz'
  with tarfile.open(path, 'w:gz') as archive:
    archive.add(binary, binary.name)
    member = tarfile.TarInfo(name)
    if link:
      member.type, member.linkname = tarfile.SYMTYPE, link
    archive.addfile(member)
  data.prepare('cifar10', source=path, data_dir=data_dir)
  assert len(data.load_images('cifar10', split='train', data_dir=data_dir)) == 30
  assert {child.name for child in tmp_path.iterdir()} == {'source', 'evil.tar.gz', 'data'}


def test_failure_while_building_leaves_nothing(binary, data_dir, monkeypatch):
  whole = builders.Builder._generate_examples

  def disk_full(self, split):
    yield next(whole(self, split))
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(builders.Builder, '_generate_examples', disk_full)
  with pytest.raises(OSError, match='No space left'):  # the command line's to print
    data.prepare('cifar10', source=binary, data_dir=data_dir)
  assert not list(data_dir.rglob('*'))


# ---- Downloading. ----


def test_official_archives_have_a_checksum():
  known = checksums.get_all_url_infos()
  cifar10, cifar100 = (known[sources.CIFAR[name].url] for name in ('cifar10', 'cifar100'))
  assert cifar10.checksum == 'c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd'
  assert cifar100.checksum == '58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec'


def expect_download(monkeypatch, url, content):
  """Makes `url` the publisher's, with the checksum of `content`."""
  monkeypatch.setenv('NO_PROXY', '127.0.0.1')
  info = checksums.UrlInfo(size=len(content), filename='cifar.tar.gz',
                           checksum=hashlib.sha256(content).hexdigest())
  monkeypatch.setitem(checksums.get_all_url_infos(), url, info)
  cifar = dataclasses.replace(sources.CIFAR['cifar10'], url=url)
  monkeypatch.setitem(sources.CIFAR, 'cifar10', cifar)


def test_no_network_fails_at_once(monkeypatch, data_dir):
  with socket.socket() as closed:
    closed.bind(('127.0.0.1', 0))  # bound, never listening: connections are refused
    url = f'http://127.0.0.1:{closed.getsockname()[1]}/cifar.tar.gz'
    expect_download(monkeypatch, url, b'')
    start = time.monotonic()
    fails_cleanly(None, data_dir, f'cannot download {url}', 'pass --source=PATH')
    assert time.monotonic() - start < 5


@pytest.fixture
def server(tmp_path):
  """(folder, url) of a web server on this machine."""
  folder = tmp_path / 'www'
  folder.mkdir()

  class Handler(http.server.SimpleHTTPRequestHandler):
    def __init__(self, *args):
      super().__init__(*args, directory=str(folder))

    def log_message(self, *args):
      pass

  with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as httpd:
    thread = threading.Thread(target=httpd.serve_forever)
    thread.start()
    yield folder, f'http://127.0.0.1:{httpd.server_port}'
    httpd.shutdown()
    thread.join()


def test_download_checks_and_keeps_the_archive(monkeypatch, server, binary, tmp_path):
  folder, url = server
  archive = tar(binary, folder / 'cifar.tar.gz')
  url = f'{url}/cifar.tar.gz'
  expect_download(monkeypatch, url, b'another archive')
  fails(lambda: data.prepare('cifar10', data_dir=tmp_path / 'a'), url, 'wrong checksum',
        '--source=PATH')
  assert not (tmp_path / 'a' / 'cifar10').exists()
  expect_download(monkeypatch, url, archive.read_bytes())
  path = data.prepare('cifar10', data_dir=tmp_path / 'b')
  assert len(data.load_images('cifar10', split='test', data_dir=tmp_path / 'b').labels) == 10
  # A second time the archive comes from TFDS' folder of downloads, network or not.
  shutil.rmtree(path)
  archive.unlink()
  assert data.prepare('cifar10', data_dir=tmp_path / 'b') == path
