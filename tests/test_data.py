"""Prepared folders, the embedded digits, resizing, normalisation. Nothing needs the network."""

import errno
import itertools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import textwrap

import numpy as np
import PIL.Image
import pytest
import tensorflow_datasets as tfds
from cifar_files import fails
from conftest import ROOT, python
from disks import mount_tmpfs
from prepared_files import encoded, write
from sklearn import datasets as sklearn_datasets

from gapjax import cli, data, paths
from gapjax.data import builders, prepared, sources


@pytest.fixture
def data_dir(tmp_path):
  return tmp_path / 'data'


def tiny_cifar10(data_dir):
  """A prepared CIFAR-10 of ten images a split."""
  arrays = sources.Arrays(
      images={split: np.zeros((10, 32, 32, 3), np.uint8) for split in ('train', 'test')},
      labels={split: {'label': np.arange(10)} for split in ('train', 'test')},
      class_names={'label': tuple('abcdefghij')})
  return builders._build('cifar10', arrays, root=data_dir, quiet=True)


def run(script, *, check=True):
  return python(textwrap.dedent(script), check=check, PYTHONWARNINGS='error')


def test_rename_onto_what_another_process_built(data_dir):
  arrays = sources.read_digits()
  first = builders._build('digits', arrays, root=data_dir, quiet=True)
  assert builders._build('digits', arrays, root=data_dir, quiet=True) == first
  shutil.rmtree(first)
  first.write_text('in the way')
  with pytest.raises(OSError):
    builders._build('digits', arrays, root=data_dir, quiet=True)
  assert [child.name for child in data_dir.iterdir()] == ['digits']


def test_default_data_dir(monkeypatch, tmp_path):
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path / 'env'))
  assert data.prepare('digits') == tmp_path / 'env' / 'digits' / '1.0.0'
  monkeypatch.setenv('TFDS_DATA_DIR', 'gs://bucket/data')
  fails(lambda: data.prepare('digits'), 'TFDS_DATA_DIR is gs://bucket/data', 'this machine')
  monkeypatch.delenv('TFDS_DATA_DIR')
  assert prepared.data_root(None) == pathlib.Path('~/tensorflow_datasets').expanduser()


@pytest.mark.parametrize('size', ['64k', '600k'])
def test_full_disk(tmp_path, capsys, size):
  """One line, whether it is we, or array_record, that cannot write; nothing half-built is left."""
  if refused := mount_tmpfs(tmp_path, f'size={size}'):
    pytest.skip(f'cannot mount a tmpfs here: {refused}')
  try:
    assert cli.main(['prepare', 'digits', f'--data_dir={tmp_path}']) == 2
    said = capsys.readouterr().err
    assert f'gapjax: No space left on device `{tmp_path}`\n' in said
    assert 'Traceback' not in said and not list(tmp_path.iterdir())
  finally:
    subprocess.run(['umount', '-l', tmp_path], check=True)


def test_a_full_quota_is_told_as_what_it_is():
  """In the words of array_record."""
  with pytest.raises(OSError, match='quota exceeded') as error, paths.full_disk('here'):
    raise RuntimeError(f'INTERNAL: write() failed: {os.strerror(errno.EDQUOT)}')
  assert (error.value.errno, error.value.filename) == (errno.EDQUOT, 'here')


# ---- Prepared folders. ----


def test_not_prepared_names_the_command(data_dir):
  fails(lambda: data.load_images('cifar10', split='train', data_dir=data_dir),
        f'`gapjax prepare cifar10 --source=PATH --data_dir={data_dir}`')
  spaced = data_dir / 'my data'
  fails(lambda: data.load_images('cifar100', split='train', data_dir=spaced),
        f"--data_dir='{spaced}'`")


def test_not_prepared_in_the_default_folder(monkeypatch, tmp_path):
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path))
  fails(lambda: data.load_images('cifar10', split='train'),
        '`gapjax prepare cifar10 --source=PATH`')


def test_unknown_names(tmp_path, data_dir):
  fails(lambda: data.load_images('cifar1000', split='train'), 'did you mean `cifar100`?', 'digits')
  fails(lambda: data.prepare('cifra10'), 'did you mean `cifar10`?')
  fails(lambda: data.load_images(str(tmp_path / 'none'), split='train'), 'there is no folder')
  fails(lambda: data.load_images(str(tmp_path), split='train'), 'not a folder prepared by TFDS')
  fails(lambda: data.load_images('digits', split='tset', data_dir=data_dir), 'did you mean `test`?')
  fails(lambda: data.prepare('digits', source=tmp_path, data_dir=tmp_path), 'without --source')


def test_tfrecord_says_what_to_run(data_dir):
  path = tiny_cifar10(data_dir)
  info = path / 'dataset_info.json'
  info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
  for call in (lambda: data.load_images('cifar10', split='train', data_dir=data_dir),
               lambda: data.prepare('cifar10', data_dir=data_dir)):
    fails(call, 'stored as tfrecord', 'gapjax prepare cifar10 --source=PATH --data_dir=OTHER',
          f'tfds convert_format --dataset_version_dir={path} --out_file_format=array_record')
  fails(lambda: data.load_images(path, split='train'), 'stored as tfrecord',
        "download_and_prepare(file_format='array_record')",
        'tensorflow apache-beam mlcroissant array-record`, then `tfds convert_format')
  # What convert_format leaves: both formats in one folder.
  content = json.loads(info.read_text())
  info.write_text(json.dumps(content | {'alternativeFileFormats': ['array_record']}))
  assert len(data.load_images('cifar10', split='test', data_dir=data_dir).labels) == 10


@pytest.mark.parametrize('damage', ['no info', 'half info', 'no features', 'no shard'])
def test_partial_folder_is_not_a_data_set(data_dir, damage):
  path = tiny_cifar10(data_dir)
  info = path / 'dataset_info.json'
  if damage == 'half info':
    info.write_text(info.read_text()[:100])
  else:
    shard = 'cifar10-train.array_record-00000-of-00001'
    (path / {'no info': info.name, 'no features': 'features.json'}.get(damage, shard)).unlink()
  for call in (lambda: data.load_images('cifar10', split='train', data_dir=data_dir),
               lambda: data.prepare('cifar10', data_dir=data_dir)):
    fails(call, f'{path} is incomplete', 'remove it, then run `gapjax prepare cifar10')


@pytest.mark.parametrize(('file', 'content'), [
  ('dataset_info.json', '[]'), ('dataset_info.json', 'null'), ('dataset_info.json', '{}'),
  ('dataset_info.json', '{"name": "cifar10", "of a newer TFDS": 1}'), ('features.json', 'null'),
  ('features.json', '{"type": "no.such.Feature"}')])
def test_json_that_is_not_tfds(data_dir, file, content):
  path = tiny_cifar10(data_dir)
  (path / file).write_text(content)
  for call in (lambda: data.load_images('cifar10', split='train', data_dir=data_dir),
               lambda: data.prepare('cifar10', data_dir=data_dir)):
    fails(call, f'{path} cannot be read by TFDS (', 'move it away, then run `gapjax prepare')


def test_damaged_shard(data_dir):
  path = data.prepare('digits', data_dir=data_dir)
  shard = path / 'digits-train.array_record-00000-of-00001'
  whole = shard.read_bytes()
  middle = len(whole) // 3
  for bad in (whole[:len(whole) // 2], whole[:middle] + bytes(50) + whole[middle + 50:]):
    shard.write_bytes(bad)
    fails(lambda: data.load_images('digits', split='train', data_dir=data_dir), str(path),
          'is damaged')


def test_newest_readable_version(data_dir, caplog):
  path = tiny_cifar10(data_dir)
  for version in ('3.0.10', '3.0.9', '3.1.0'):
    shutil.copytree(path, path.parent / version)
    info = path.parent / version / 'dataset_info.json'
    info.write_text(info.read_text().replace('"3.0.2"', f'"{version}"'))
  (path.parent / '3.1.0' / 'features.json').unlink()
  assert pathlib.Path(prepared.open_named('cifar10', data_dir).data_dir).name == '3.0.10'
  assert data.prepare('cifar10', data_dir=data_dir).name == '3.0.10'
  assert caplog.messages == [f'{path.parent}/3.1.0 is incomplete (no features.json): remove it; '
                             f'{path.parent}/3.0.10 is read instead']
  assert data.load_images(data_dir / 'cifar10', split='test').name == 'cifar10'


def any_data(root, images, labels, feature=None, *, supervised=('picture', 'kind')):
  rows = [{'picture': encoded(image.squeeze()), 'kind': label}
          for image, label in zip(images, labels, strict=True)]
  return write(root, rows, {
    'picture': tfds.features.Image(shape=(None, None, images[0].shape[-1])),
    'kind': feature or tfds.features.ClassLabel(names=['a', 'b'])}, supervised=supervised)


def test_any_prepared_folder(tmp_path):
  rng = np.random.default_rng(1)
  images = [rng.integers(0, 256, (6, 4, 1), np.uint8) for _ in range(3)]
  folder = any_data(tmp_path, images, [1, 0, 1])
  for path in (folder, pathlib.Path(folder).parent):
    loaded = data.load_images(path, split='test')
    np.testing.assert_array_equal(loaded.images, np.repeat(np.stack(images), 3, axis=-1))
    np.testing.assert_array_equal(loaded.labels, [1, 0, 1])
    assert (loaded.name, loaded.class_names) == ('own', ('a', 'b'))
  fails(lambda: data.load_images(folder, split='validation'), 'unknown split', 'test')


def test_folders_that_do_not_fit(tmp_path):
  small, large = np.zeros((4, 4, 3), np.uint8), np.ones((6, 4, 3), np.uint8)
  mixed = any_data(tmp_path / 'mixed', [small, large], [0, 1])
  fails(lambda: data.load_images(mixed, split='train'), 'differ in size')
  assert data.load_images(mixed, split='train', image_size=5).images.shape == (2, 5, 5, 3)
  assert data.load_images(mixed, split='train', limit=1).images.shape == (1, 4, 4, 3)
  unlabelled = any_data(tmp_path / 'unlabelled', [small], [-1])
  fails(lambda: data.load_images(unlabelled, split='train'), 'without a label')
  text = any_data(tmp_path / 'text', [small], ['words'], tfds.features.Text())
  fails(lambda: data.load_images(text, split='train'), 'one label each',
        'kind (Text), picture (Image)')
  keyless = any_data(tmp_path / 'keyless', [small], [0], supervised=None)
  fails(lambda: data.load_images(keyless, split='train'), 'one label each')


# ---- Digits, resizing, limits, normalisation. ----


@pytest.fixture(scope='module')
def digits_dir(tmp_path_factory):
  return tmp_path_factory.mktemp('digits')


def test_digits_are_scikit_learns(digits_dir, capfd):
  truth = sklearn_datasets.load_digits()
  parts = [data.load_images('digits', split=split, data_dir=digits_dir)
           for split in ('train', 'test')]
  assert capfd.readouterr() == ('', '')  # prepared silently
  assert [len(part.labels) for part in parts] == [1397, 400]
  images = np.concatenate([part.images for part in parts])
  assert images.shape == (1797, 8, 8, 3) and images.max() == 255
  for channel in range(3):
    np.testing.assert_array_equal(np.rint(images[..., channel] * (16 / 255)), truth.images)
  np.testing.assert_array_equal(np.concatenate([part.labels for part in parts]), truth.target)
  assert parts[0].class_names == tuple('0123456789')


def test_limit(digits_dir):
  whole = data.load_images('digits', split='test', data_dir=digits_dir)
  some = data.load_images('digits', split='test', data_dir=digits_dir, limit=7)
  np.testing.assert_array_equal(some.images, whole.images[:7])
  np.testing.assert_array_equal(some.labels, whole.labels[:7])
  for limit in (None, 0, 9999):
    assert len(data.load_images('digits', split='test', data_dir=digits_dir, limit=limit)) == 400


def test_resize(digits_dir):
  def load(size):
    return data.load_images('digits', split='test', data_dir=digits_dir, limit=5,
                            image_size=size).images

  whole = load(None)
  np.testing.assert_array_equal(load(8), whole)
  blocks = whole.reshape(5, 4, 2, 4, 2, 3).mean(axis=(2, 4))
  assert np.abs(load(4) - blocks).max() <= 1  # block means; Pillow rounds twice
  for image, found in zip(whole, load(32), strict=True):
    np.testing.assert_array_equal(found, PIL.Image.fromarray(image).resize(
      (32, 32), PIL.Image.Resampling.BILINEAR))
  assert load(5).shape == (5, 5, 5, 3)


def test_normalisation():
  mean, std = data.normalisation('cifar10')
  np.testing.assert_allclose(mean, [.4914, .4822, .4465])
  np.testing.assert_allclose(std, [.2023, .1994, .2010])
  mean, std = data.normalisation('cifar100', np.zeros((1, 2, 2, 3), np.uint8))
  np.testing.assert_allclose(mean, [.5071, .4865, .4409])
  np.testing.assert_allclose(std, [.2673, .2564, .2762])
  images = np.random.default_rng(0).integers(0, 200, (50, 9, 7, 3), np.uint8)
  images[..., 2] = 7  # a channel that never changes is centred alone
  mean, std = data.normalisation('digits', images)
  assert mean.dtype == std.dtype == np.float32
  scaled = images.astype(np.float64) / 255
  np.testing.assert_allclose(mean, scaled.mean(axis=(0, 1, 2)), rtol=1e-6)
  np.testing.assert_allclose(std, [*scaled[..., :2].std(axis=(0, 1, 2)), 1], rtol=1e-6)
  with pytest.raises(ValueError, match='training images'):
    data.normalisation('digits')


# ---- Other processes. ----


def test_killed_prepare_is_not_taken_for_a_data_set(data_dir):
  script = f'''
      import os, signal
      from gapjax.data import builders
      whole = builders.Builder._generate_examples
      def killed(self, split):
        for i, example in enumerate(whole(self, split)):
          if split == 'test' and i == 5:
            os.kill(os.getpid(), signal.SIGKILL)
          yield example
      builders.Builder._generate_examples = killed
      builders.prepare('digits', data_dir={str(data_dir)!r})'''
  assert run(script, check=False).returncode == -9
  assert [child.name.partition('.')[0] for child in data_dir.iterdir()] == ['incomplete']
  assert len(data.load_images('digits', split='test', data_dir=data_dir).labels) == 400


@pytest.mark.parametrize(('name', 'code'), [('SIGTERM', 143), ('SIGHUP', 129), ('SIGINT', 130)])
def test_a_signal_that_ends_prepare_leaves_nothing(data_dir, name, code):
  """Sent a second time while that is removed, as by a terminal that closes."""
  script = f'''
      import signal, sys
      from gapjax import cli
      from gapjax.data import builders
      whole = builders.Builder._generate_examples
      def stopped(self, split):
        for i, example in enumerate(whole(self, split)):
          if split == 'test' and i == 5:
            signal.raise_signal(signal.{name})
          yield example
      builders.Builder._generate_examples = stopped
      rmdir = builders.os.rmdir
      def removed(*args, **how):
        if {name!r} != 'SIGINT':
          signal.raise_signal(signal.{name})
        rmdir(*args, **how)
      builders.os.rmdir = removed
      sys.exit(cli.main(['prepare', 'digits', {f'--data_dir={data_dir}'!r}]))'''
  done = run(script, check=False)
  assert done.returncode == code and 'Traceback' not in done.stderr, done.stderr
  assert not list(data_dir.iterdir())


def test_an_ignored_signal_stays_ignored():
  """Under nohup a dataset is built though the terminal closes."""
  before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
  try:
    with builders._ended_by_signals():
      signal.raise_signal(signal.SIGHUP)
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
  finally:
    signal.signal(signal.SIGHUP, before)


def test_two_processes_prepare_the_digits_at_once(data_dir, tmp_path):
  start = tmp_path / 'start'
  script = textwrap.dedent(f'''
      import os, random, time
      from gapjax import data
      from gapjax.data import builders
      random.seed(0)  # TFDS names its temporary folder with `random`
      print('ready', flush=True)
      while not os.path.exists({str(start)!r}):
        time.sleep(.001)
      digits = data.load_images('digits', split='train', data_dir={str(data_dir)!r})
      print(digits.images.sum(dtype=int), digits.labels.sum())''')
  workers = [subprocess.Popen([sys.executable, '-c', script], stdout=subprocess.PIPE, text=True,
                              cwd=ROOT) for _ in range(2)]
  for worker in workers:
    assert worker.stdout.readline() == 'ready\n'
  start.touch()
  outputs = [worker.communicate(timeout=60)[0] for worker in workers]
  assert [worker.returncode for worker in workers] == [0, 0]
  assert outputs[0] == outputs[1] != ''
  assert [child.name for child in data_dir.iterdir()] == ['digits']
  assert [child.name for child in (data_dir / 'digits').iterdir()] == ['1.0.0']


@pytest.mark.parametrize('order', list(itertools.permutations(
    ['import gapjax.data.builders as ours',
     'import tensorflow_datasets.image_classification.cifar as theirs'])))
def test_names_do_not_clash_with_tfds(order):
  """TFDS' own cifar10 and ours in one process; name, version, features and keys agree."""
  run('\n'.join(order) + textwrap.dedent('''\

      import tempfile
      import numpy as np
      for name, labels in (('Cifar10', {'label': 10}),
                           ('Cifar100', {'label': 100, 'coarse_label': 20})):
        arrays = ours.sources.Arrays(
            images={'train': np.zeros((1, 32, 32, 3), np.uint8)}, labels={},
            class_names={k: [str(i) for i in range(n)] for k, n in labels.items()})
        with tempfile.TemporaryDirectory() as folder:
          mine = ours.Builder(name.lower(), arrays, data_dir=folder)
          other = getattr(theirs, name)(data_dir=folder)
          assert mine.name == other.name and mine.version == other.version
          assert mine.info.features.to_json() == other.info.features.to_json()
          assert mine.info.supervised_keys == other.info.supervised_keys
          assert mine.info.disable_shuffling == other.info.disable_shuffling'''))
