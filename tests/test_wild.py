"""Files and machines as people have them: each test stands for a kind of fault."""

import contextlib
import errno
import functools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
import scene_files
from conftest import ROOT, SCENES, XLA_FLAGS, python, refused, tiny_config
from prepared_files import encoded, write_images, write_scenes
from scene_files import cityscapes_files, write

from gapjax import config as configs
from gapjax import data, paths
from gapjax.cli import flags, verbs
from gapjax.errors import TrainingFailed, UsageError
from gapjax.models.layers import BatchNorm
from gapjax.neurons.run import attack_run, rank_run
from gapjax.tasks.segmentation import REGIONS, SegmentationTask, measures, object_classes
from gapjax.training import evaluate, workdirs
from gapjax.training.checkpoint import Checkpoints
from gapjax.training.train import check_finite, train

draw = np.random.default_rng(0)


def test_masks_with_a_palette_are_read_as_indices(tmp_path):
  indices = draw.integers(0, 2, (24, 32)).astype(np.uint8)
  folder = write_scenes(tmp_path, [encoded(indices, palette=[0, 0, 0, 128, 64, 128])])
  np.testing.assert_array_equal(data.load_scenes(folder, split='train')[0]['label'], indices)


def test_masks_in_colour_are_refused(tmp_path):
  colours = draw.integers(0, 255, (24, 32, 3)).astype(np.uint8)
  scenes = data.load_scenes(write_scenes(tmp_path, [encoded(colours)]), split='train')
  with pytest.raises(UsageError, match='is no mask: its pixels are RGB'):
    _ = scenes[0]


@pytest.mark.parametrize('linked', ['leftImg8bit/train/bochum', 'leftImg8bit/train'])
def test_links_of_a_source_are_followed(tmp_path, linked):
  """Also where one leads back to where it lies."""
  files, masks = scene_files.cityscapes_files([7])
  source = scene_files.write(tmp_path / 'city', files)
  (source / linked).rename(tmp_path / 'elsewhere')
  (source / linked).symlink_to(tmp_path / 'elsewhere')
  (source / 'gtFine/train/aachen/back').symlink_to(source / 'gtFine')
  data.prepare('cityscapes', source=source, data_dir=tmp_path / 'data')
  scenes = data.load_scenes('cityscapes', split='train', data_dir=tmp_path / 'data')
  assert sorted(scene['id'] for scene in scenes) == [id for id in masks if 'lindau' not in id]


@pytest.mark.parametrize('file', [encoded(draw.integers(0, 256, (8, 8, 3)).astype(np.uint8),
                                          kind='JPEG')[:-150], b'<html>not found</html>', b''])
def test_images_that_do_not_decode_are_refused(tmp_path, file):
  whole = encoded(draw.integers(0, 256, (8, 8, 3)).astype(np.uint8))
  folder = write_images(tmp_path, [whole, file])
  refused(lambda: data.load_images(folder, split='train'), 'holds what is no image')


def test_images_of_sixteen_bits_are_not_cut(tmp_path):
  deep = encoded(draw.integers(0, 65536, (8, 8)).astype(np.uint16))
  refused(lambda: data.load_images(write_images(tmp_path, [deep]), split='train'),
          'more than 8 bits a channel')


@pytest.mark.parametrize(('name', 'value'), [
  ('JAX_PLATFORMS', 'cuda'), ('JAX_PLATFORMS', 'cup'), ('JAX_ENABLE_X64', 'maybe'),
  ('JAX_DEFAULT_MATMUL_PRECISION', 'high-ish'), ('MPLBACKEND', 'aggg')])
def test_variables_of_the_environment_that_cannot_be_had(gapjax, tiny_file, tmp_path, data_dir,
                                                         name, value):
  done = gapjax('train', f'--config={tiny_file()}', f'--workdir={tmp_path}',
                f'--data_dir={data_dir}', env={name: value})
  assert done.returncode == 2
  assert f'{name}={value}' in done.stderr.splitlines()[-1]
  assert 'Traceback' not in done.stderr


@pytest.mark.parametrize('stderr', ['2>&-', '2> >(head -c 10 >/dev/null)'])
def test_training_ends_well_without_anybody_to_read_its_bar(tiny_file, tmp_path, data_dir, stderr):
  command = (f'{sys.executable} -m gapjax train --config={tiny_file(num_epochs=1)} '
             f'--workdir={tmp_path} --data_dir={data_dir} {stderr}')
  subprocess.run(['bash', '-c', command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL,
                 env={**os.environ, 'XLA_FLAGS': XLA_FLAGS.format(1)})
  assert (tmp_path / 'summary.json').exists()


def test_output_that_a_terminal_cannot_show_costs_nothing():
  code = ('from gapjax import cli; cli.VERBS["report"] = lambda argv: print("3\\u00d73 \\u00b1"); '
          'raise SystemExit(cli.main(["report"]))')
  assert python(code, PYTHONIOENCODING='ascii').stdout == '3?3 ?\n'


# ---- A run and its data --------------------------------------------------------------------------


ALONE = {'devices': jax.local_devices()[:1], 'progress': False}
PICTURES = [encoded(draw.integers(0, 256, (8, 8, 3)).astype(np.uint8)) for _ in range(8)]


def small(folder):
  return tiny_config(batch_size=4, **{'data.name': str(folder), 'data.train_images': 0,
                                      'canvas.target': 'image', 'eval.images': 0})


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """A run on eight pictures of two classes, but for its summary: it can go on."""
  folder = tmp_path_factory.mktemp('trained')
  pictures = write_images(folder / 'data', PICTURES)
  train(small(pictures), workdir=folder / 'run', **ALONE)
  (folder / 'run/summary.json').unlink()
  return folder


@pytest.mark.parametrize(('files', 'names', 'told'), [
  (PICTURES, 'abc', r'class 2 c \(there: none\)'), (PICTURES, 'ba', r'class 0 b \(there: a\)'),
  (PICTURES[:-2], 'ab', r'6 examples \(there: 8\)'),
  ([*PICTURES[:-1], PICTURES[0]], 'ab', 'other images or labels')])
def test_a_run_refuses_other_data(trained, tmp_path, files, names, told):
  write_images(tmp_path / 'data', files, names=names)
  shutil.copytree(trained / 'run', tmp_path / 'run')
  config = small(tmp_path / 'data/own/1.0.0')
  workdirs.claim(tmp_path / 'run', config)
  for use in (lambda: evaluate.open_run(tmp_path / 'run'),
              lambda: train(config, workdir=tmp_path / 'run', **ALONE),
              lambda: train(config, workdir=tmp_path / 'seed1', alike=[tmp_path / 'run'], **ALONE)):
    with pytest.raises(UsageError, match=f'was trained on other data: {told}'):
      use()
  (tmp_path / 'run/data.json').unlink()  # as of a run of before
  if names == 'abc':
    with pytest.raises(UsageError, match='another number of classes'):
      evaluate.open_run(tmp_path / 'run')
  elif files == PICTURES:
    assert evaluate.open_run(tmp_path / 'run').step == 2


def test_scenes_with_other_masks_are_others(tmp_path):
  """Also where a file has the same size."""
  masks = [encoded(np.repeat(np.eye(24, dtype=np.uint8)[[i]], 32, 0).T) for i in range(20)]
  sets = [data.load_scenes(write_scenes(tmp_path / name, files), split='train') for name, files in
          (('a', masks), ('again', masks), ('swapped', masks[1:] + masks[:1]))]
  first, again, swapped = (scenes.identity() for scenes in sets)
  assert first == again != swapped and first['examples'] == swapped['examples'] == 20


def test_images_with_another_label_are_others():
  images, labels = np.zeros((3, 4, 4, 3), np.uint8), np.int32([0, 1, 1])
  first, again, other = (data.ImageDataset('own', images, found, ('a', 'b')).identity()
                         for found in (labels, labels.copy(), labels[::-1].copy()))
  assert first == again != other and first['classes'] == other['classes'] == ['a', 'b']


def test_other_data_to_evaluate_is_refused_once_a_run_was_evaluated(tmp_path):
  one, other = ({'examples': n, 'classes': ['a'], 'digest': ''} for n in (3, 4))
  workdirs.claim(tmp_path, tiny_config(), {'trained': one, 'evaluated': one})
  found = {'trained': one, 'evaluated': other}
  workdirs.check_data(tmp_path, found)
  (tmp_path / 'metrics.jsonl').write_text('{"step": 1, "split": "eval", "loss": 2.0}\n')
  refused(lambda: workdirs.check_data(tmp_path, found),
          r'was evaluated on other data: 4 examples \(there: 3\)')


def test_a_run_finds_its_data_from_elsewhere(tmp_path, monkeypatch, caplog):
  """Trained with a relative path, moved since, or both."""
  write_images(tmp_path / 'p/pics', PICTURES[:2])
  for name, data_dir in (('./pics/own', 'p'), ('own', 'p/pics'), ('/gone/own', 'p/pics')):
    monkeypatch.chdir(tmp_path)
    assert len(data.load_images(name, split='train', data_dir=data_dir)) == 2
    said = 'there is no folder /gone/own; p/pics/own is read instead'
    assert (said in caplog.text) == name.startswith('/gone')
    with pytest.raises(UsageError, match='--data_dir the folder' if '/' in name else 'unknown'):
      data.load_images(name, split='train', data_dir=tmp_path / 'empty')


def test_a_config_imports_its_neighbours(tmp_path):
  """And another config its own, of the same name."""
  for width in (8, 16):
    folder = tmp_path / str(width)
    folder.mkdir()
    (folder / 'base_cfg.py').write_text('from gapjax import config\ndef get_config(arg=None):\n'
                                        f'  c = config.default()\n  c.model.width = {width}\n'
                                        '  return c\n')
    (folder / 'mine.py').write_text('from base_cfg import get_config\n')
    assert configs.from_file(f'{folder / "mine.py"}').model.width == width
  assert str(folder) not in sys.path


@pytest.mark.parametrize('text', ['', 'def get_config(arg=None):\n  pass\n', 'get_config = dict\n'])
def test_a_config_without_a_config(tmp_path, text):
  (tmp_path / 'mine.py').write_text(text)
  with pytest.raises(UsageError, match='no function get_config that returns a ConfigDict'):
    configs.from_file(str(tmp_path / 'mine.py'))


@pytest.mark.parametrize('file', ['evaluation.json', 'ranking.json'])
def test_results_that_cannot_be_written_are_printed(trained, tmp_path, capsys, file):
  shutil.copytree(trained / 'run', tmp_path / 'run')
  (tmp_path / 'run' / file).mkdir()  # in the way
  with pytest.raises(OSError, match=file):
    if file == 'ranking.json':
      rank_run(tmp_path / 'run', neurons=['--config.neurons.purity=0.5'])
    else:
      evaluate.evaluate(tmp_path / 'run', devices=ALONE['devices'])
  printed = json.loads(capsys.readouterr().out.splitlines()[-1])
  assert printed['step'] == 2 if file == 'evaluation.json' else len(printed['overall']) == 32


def test_a_folder_that_takes_no_files_is_told_before_the_work(monkeypatch, tmp_path):
  def refused(*_, **__):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))

  monkeypatch.setattr(paths.tempfile, 'TemporaryFile', refused)
  for verb in (evaluate.evaluate, rank_run, attack_run,
               lambda folder: flags.check_output(str(folder / 'o.json'))):
    with pytest.raises(UsageError, match=r'cannot be written to \(Read-only file system\)'):
      verb(tmp_path)


# ---- Nothing to count, and what is no number -----------------------------------------------------


def test_scenes_that_are_all_void(tmp_path):
  void, half = np.full((24, 32), 255, np.uint8), np.full((24, 32), 255, np.uint8)
  half[:, :16] = 1
  nothing, left = (data.load_scenes(write_scenes(tmp_path / name, [encoded(mask)] * 2),
                                    split='train') for name, mask in (('v', void), ('l', half)))
  task = SegmentationTask(np.zeros(3), np.ones(3), 2, crop=(8, 8))
  with pytest.raises(UsageError, match='no pixel of the 2 scenes of own has a class'):
    task.host_batches(nothing, batch_size=2, seed=0)
  with pytest.raises(UsageError, match='no pixel of the 2 scenes of own has a class'):
    task.evaluation(configs.default(), nothing, None)
  task.host_batches(left, batch_size=2, seed=0)
  task.evaluation(configs.default(), left, None)


def test_a_region_that_is_void_and_a_loss_that_is_no_number():
  matrix = np.zeros((len(REGIONS), 2, 2), int)
  matrix[[0, 1]] = [[3, 1], [0, 4]]
  found = measures({'matrix': matrix, 'loss': np.float64('nan'), 'count': np.int64(8)})
  assert found['accuracy'] == 7 / 8 and found['miou_right'] is None
  assert found['miou_left'] == found['miou'] == (3 / 4 + 4 / 5) / 2
  with pytest.raises(TrainingFailed, match='has loss nan'):
    check_finite(found['loss'], 1)


def test_a_network_that_computes_no_numbers(trained, tmp_path):
  """A variance below 0, as a file of weights may have it."""
  run = evaluate.open_run(trained / 'run')
  broken = jax.tree.map(lambda x: -np.abs(x) - 1, run.state.batch_stats)
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(2, run.state.replace(batch_stats=broken), {})
  workdirs.claim(tmp_path, run.config)
  for verb in (functools.partial(evaluate.evaluate, devices=ALONE['devices']),
               functools.partial(rank_run, neurons=['--config.neurons.purity=0.5'])):
    with pytest.raises(UsageError, match=r'infinities or NaN|not finite|and finite'):
      verb(tmp_path)
  (tmp_path / 'order.json').write_text('{"mine": [3, 1, 2]}')
  with pytest.raises(UsageError, match='infinities or NaN'):
    attack_run(tmp_path, ranking=tmp_path / 'order.json',
               neurons=['--config.neurons.largest=0.05', '--config.neurons.counts=1'])


def test_labels_that_are_no_classes(tmp_path):
  scenes = data.load_scenes(write_scenes(tmp_path / 's', [encoded(np.full((24, 32), 7, np.uint8))]),
                            split='train')
  with pytest.raises(UsageError, match='holds 7, and its classes are 0 to 1, void 255'):
    _ = scenes[0]
  folder = write_images(tmp_path / 'i', PICTURES[:3], names='abc')
  (pathlib.Path(folder) / 'label.labels.txt').write_text('a\nb\n')
  features = pathlib.Path(folder) / 'features.json'
  features.write_text(features.read_text().replace('"numClasses": "3"', '"numClasses": "2"'))
  with pytest.raises(UsageError, match='has the label 2 and names 2 classes'):
    data.load_images(folder, split='train')


def test_train_ids_are_not_taken_for_cityscapes_own_labels(tmp_path):
  files, _ = cityscapes_files([*range(19), 255])
  with pytest.raises(UsageError, match=r'holds the label 255, .*not those of train ids'):
    data.prepare('cityscapes', source=write(tmp_path / 'city', files), data_dir=tmp_path / 'data')


def test_a_class_may_be_called_by_a_number():
  config = configs.with_fields(tiny_config(**SCENES), ['--config.neurons.classes=1'])
  assert object_classes(config.neurons.classes, ('0', '1'), dataset='own') == [1]


def test_a_long_message_is_cut_in_its_middle(capsys):
  verbs.complain(f'unknown field {"x, " * 5000}; use another', code=2)
  said = capsys.readouterr().err
  assert said.startswith('gapjax: unknown field x,') and said.endswith('; use another\n')
  assert len(said) < 1100 and ' ... ' in said and said.count('\n') == 1


@pytest.mark.parametrize('dataset', ['cifar10', 'voc2012', 'cityscapes'])
def test_pipes_are_not_waited_for(tmp_path, dataset):
  def late(*_):
    raise TimeoutError

  pipe = tmp_path / 'source'
  if dataset == 'cityscapes':
    pipe = write(pipe, cityscapes_files(range(34))[0]) / 'gtFine/train/aachen/pipe'
  os.mkfifo(pipe)
  before = signal.signal(signal.SIGALRM, late)
  signal.alarm(60)
  refusal = (contextlib.nullcontext() if dataset == 'cityscapes' else
             pytest.raises(UsageError, match='source does not'))
  try:
    with refusal:
      data.prepare(dataset, source=tmp_path / 'source', data_dir=tmp_path / 'data')
  finally:
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def test_batches_of_one_value_a_channel():
  norm, pooled = BatchNorm(), np.ones((1, 1, 1, 3), np.float32)
  variables = norm.init(jax.random.key(0), pooled, train=True)
  with pytest.raises(UsageError, match='the one value that each channel has'):
    norm.apply(variables, pooled, train=True, mutable=['batch_stats'])
  norm.apply(variables, np.ones((2, 1, 1, 3), np.float32), train=True, mutable=['batch_stats'])
  config = tiny_config(**SCENES)
  configs.validate(config)
  config.batch_size = 1
  with pytest.raises(UsageError, match=r'batch_size=1 leaves BatchNorm .* take 2'):
    configs.validate(config)
