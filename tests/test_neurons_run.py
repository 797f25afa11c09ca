"""Ranking and attacking a run on disk: its own data, weights and settings; the verbs."""

import json
import shutil

import jax
import numpy as np
import pytest
from conftest import SCENES, newest, refused, tiny_config

from gapjax import cli, paths
from gapjax import models as networks
from gapjax.data import load_scenes
from gapjax.neurons import rank, yardstick
from gapjax.neurons import run as neurons
from gapjax.neurons.sweeps import Sweep, from_records
from gapjax.report import page as report
from gapjax.tasks.segmentation import check_sizes
from gapjax.training import evaluate
from gapjax.training.train import train


@pytest.fixture(scope='module')
def attacked(scene_run, data_dir, tmp_path_factory):
  """A copy of the run, ranked and attacked by the verb."""
  workdir = tmp_path_factory.mktemp('attacked') / 'run'
  shutil.copytree(scene_run[1], workdir)
  assert cli.main(['attack', f'--workdir={workdir}', f'--data_dir={data_dir}']) == 0
  return workdir


def test_channels_are_ranked_by_the_mirror(scene_run, attacked, data_dir):
  """Overall over all training scenes; left over those with their digits on the left."""
  config, _, _ = scene_run
  state = newest(attacked)[1]
  model = networks.create_network(config.model, num_classes=11)
  variables = {'params': state['params'], 'batch_stats': state['batch_stats']}

  @jax.jit
  def pooled(image):
    return model.apply(variables, image[None], train=False, method='encode')['stage4'].mean((1, 2))

  scenes = load_scenes('digit_scenes', split='train', data_dir=data_dir)
  mean, std = networks.IMAGENET
  found = {'overall': [], 'left': [], 'signed': []}
  for scene in scenes:
    image = ((scene['image'] / 255 - mean) / std).astype(np.float32)
    z, mirrored = (np.float64(pooled(x)[0]) for x in (image, image[:, ::-1]))
    found['overall'].append(np.abs(z - mirrored))
    found['signed'].append(z - mirrored)
    digit = (scene['label'] >= 1) & (scene['label'] <= 10)
    left = digit[:, :digit.shape[1] // 2].sum()
    if left >= max(0.6 * digit.sum(), config.neurons.least_area * digit.size, 1):
      found['left'].append(z - mirrored)
  orders = json.loads((attacked / 'ranking.json').read_text())
  assert set(orders) == {'overall', *neurons.SIDES, *neurons.CENTRED}
  found['left_centred'] = np.array(found['left']) - np.mean(found['signed'], 0)
  for name in ('overall', 'left', 'left_centred'):
    differences = found[name]
    scores = np.mean(differences, 0)
    ranked = scores[orders[name]]
    assert sorted(orders[name]) == list(range(len(scores)))
    assert (np.diff(ranked) <= 1e-6 * np.abs(scores).max()).all()
  assert orders['left'] != orders['overall']


def test_an_attack_begins_where_the_evaluation_ended(scene_run, attacked):
  """N = 0 is the run's own mIoU; N and the orders are those of the config."""
  final = scene_run[2]['final']
  sweep = from_records(json.loads((attacked / 'attack.json').read_text()))
  assert sweep.counts == (0, 10, 20, 30)  # up to 95% of 32 channels
  for metric in ('miou', 'miou_left', 'miou_right', 'miou_center'):
    assert {name: len(v) for name, v in sweep.metrics[metric].items()} == {
      'overall': 1, 'left': 1, 'left_centred': 1, 'right': 1, 'right_centred': 1, 'random': 2}
    for values in sweep.metrics[metric].values():
      np.testing.assert_allclose(values[:, 0], final[metric], atol=1e-3)
  assert (attacked / 'attack.csv').read_text().startswith('order,N,repeat,metric,value\n')
  for picture in ('attack.png', 'attack_scenes.png', 'activations.png'):
    assert (attacked / picture).stat().st_size > 5000


def test_a_ranking_is_measured(attacked, data_dir, tmp_path, capsys):
  """On disk, in the page and in what `rank` prints; not in the page of a run that went on, nor of
  one that was ranked before."""
  path, step = attacked / neurons.YARDSTICK, newest(attacked)[0]
  found, orders = yardstick.read_json(path, step=step), rank.load(
    attacked / 'ranking.json', num_channels=32)
  assert [*found] == [*orders]
  for name, one in found.items():
    ranked = one.mean[orders[name]]
    assert (np.diff(ranked) <= 1e-5 * np.abs(ranked).max()).all() and (one.half > 0).all()
    assert (one.shift is not None) == (name == 'overall') == (one.threshold is None)
  assert found['left'].images == found['left_centred'].images < found['overall'].images == 400
  np.testing.assert_allclose(found['left'].mean - found['left_centred'].mean,
                             found['right'].mean - found['right_centred'].mean, atol=1e-4)
  assert 0 < found['overall'].shift_share < 2 and (attacked / 'yardstick.png').exists()

  workdir = shutil.copytree(attacked, tmp_path / 'run')
  words = "## Is a channel's position real?"
  text = report.build(workdir).with_name('README.md').read_text()
  assert words in text and 'yardstick.png' in text and 'A shift by one pixel changes' in text
  records = json.loads(path.read_text())
  (workdir / neurons.YARDSTICK).write_text(json.dumps([{**r, 'step': 1} for r in records]))
  assert words not in report.build(workdir).with_name('README.md').read_text()
  (workdir / neurons.YARDSTICK).unlink()
  before = report.build(workdir).with_name('README.md').read_text()
  assert words not in before and 'What removing channels costs' in before

  scenes = load_scenes('digit_scenes', split='train', data_dir=data_dir)
  # One image has no halves. As an editor of Windows saves it.
  (tmp_path / 'one.txt').write_text(str(scenes[0]['id']), encoding='utf-8-sig')
  assert cli.main(['rank', f'--workdir={workdir}', f'--data_dir={data_dir}', '--regions', 'left',
                   f'--ids=left={tmp_path}/one.txt', '--config.neurons.images=50']) == 0
  assert [*yardstick.read_json(workdir / neurons.YARDSTICK)] == ['overall']
  printed = capsys.readouterr().out
  assert '| halves agree |' in printed and '| overall | ' in printed
  assert cli.main(['rank', f'--workdir={workdir}', f'--data_dir={data_dir}', '--regions', 'left',
                   f'--ids=left={tmp_path}/one.txt', '--config.neurons.images=1']) == 0
  assert not yardstick.read_json(workdir / neurons.YARDSTICK)
  assert 'halves agree' not in capsys.readouterr().out
  assert cli.main(['rank', f'--workdir={workdir}', f'--data_dir={data_dir}', '--regions', 'left',
                   '--config.neurons.split=test']) == 0
  assert yardstick.read_json(workdir / neurons.YARDSTICK)['overall'].images == 100


def test_a_runs_report_tells_of_its_attack(attacked):
  text = report.build(attacked).with_name('README.md').read_text()
  for words in ('## What removing channels costs', '## Class by class', 'attack_scenes.png',
                'predictions.png', 'activations.png'):
    assert words in text


def test_only_an_attack_on_the_last_checkpoint_is_reported(attacked, data_dir, tmp_path):
  """Not one of a run that went on; and no picture of an earlier attack beside a later one."""
  workdir = tmp_path / 'run'
  shutil.copytree(attacked, workdir, ignore=shutil.ignore_patterns('report'))
  records = json.loads((workdir / 'attack.json').read_text())
  assert {record['step'] for record in records} == {newest(workdir)[0]}
  (workdir / 'attack.json').write_text(json.dumps([{**r, 'step': 1} for r in records]))
  text = report.build(workdir).with_name('README.md').read_text()
  assert 'What removing channels costs' not in text and 'attack_scenes.png' not in text
  (tmp_path / 'mine.json').write_text(json.dumps({'mine': list(range(32))}))
  assert cli.main(['attack', f'--workdir={workdir}', f'--data_dir={data_dir}',
                   f'--ranking={tmp_path}/mine.json', '--config.neurons.counts=1',
                   '--config.neurons.random_orders=1', '--regions', 'all', 'left', 'right',
                   '0.5,0,1,1']) == 0
  sweep = from_records(json.loads((workdir / 'attack.json').read_text()))
  assert sweep.counts == (0, 30) and len(sweep.metrics['miou']['random']) == 1
  assert set(sweep.metrics) == {'miou', 'miou_left', 'miou_right', 'miou_0.5,0,1,1'}
  assert not (workdir / 'attack_scenes.png').exists()
  assert 'What removing channels costs' in (workdir / 'report/README.md').read_text()


def test_the_picture_never_removes_nothing(attacked, data_dir):
  """Where no N tells the sides apart, it shows the one that comes nearest, not N = 0."""
  subject = neurons.SceneSubject(evaluate.open_run(attacked, data_dir=data_dir), data_dir)
  halves = {f'miou_{side}': {name: np.array([[.5, .4, .2 if name == side else .1]])
                             for name in neurons.SIDES} for side in neurons.SIDES}
  sweep = Sweep((0, 10, 20), halves)  # each side's channels spare its own half
  rows = subject.lost(sweep, {name: np.arange(32) for name in neurons.SIDES})
  assert [title for title in rows[0] if 'without' in title] == ['without 10 left',
                                                                 'without 10 right']


def test_other_regions_and_lists_of_ids(attacked, data_dir, tmp_path, capsys, caplog):
  """And how far the sides are told apart: two lists of the same scenes correlate fully; less what
  is common to all, still."""
  scenes = load_scenes('digit_scenes', split='train', data_dir=data_dir)
  same = [scenes[i]['id'] for i in (3, 5)]
  (tmp_path / 'ids.json').write_text(json.dumps(dict.fromkeys(('left', 'right', 'top'), same)))
  workdir = shutil.copytree(attacked, tmp_path / 'run')
  caplog.set_level('INFO')
  assert cli.main(['rank', f'--workdir={workdir}', f'--data_dir={data_dir}', '--regions', 'left',
                   'right', 'top', f'--ids={tmp_path}/ids.json',
                   '--config.neurons.images=50']) == 0
  assert capsys.readouterr().out.splitlines()[-1] == f'{workdir}/ranking.json'
  orders = json.loads((workdir / 'ranking.json').read_text())
  assert set(orders) == {'overall', *(side + centred for side in ('left', 'right', 'top')
                                      for centred in ('', '_centred'))}
  assert 'correlate by +1.00, centred by +1.00 (+1.00 by chance' in caplog.text
  (tmp_path / 'Person.txt').write_text('\n'.join(same) + '\n')  # the authors' list: one a line
  assert cli.main(['rank', f'--workdir={workdir}', f'--data_dir={data_dir}', '--regions', 'left',
                   f'--ids=left={tmp_path}/Person.txt', '--config.neurons.images=50']) == 0
  assert json.loads((workdir / 'ranking.json').read_text())['left'] == orders['left']


@pytest.fixture(scope='module')
def opened_once():
  """Copies of a run are opened once for each of their configs."""
  kept, open_run = {}, neurons.open_run

  def opened(workdir, **where):
    text = paths.of(workdir).joinpath('config.json').read_text()
    return kept[text] if text in kept else kept.setdefault(text, open_run(workdir, **where))

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(neurons, 'open_run', opened)
    yield


@pytest.mark.parametrize(('change', 'argv', 'words'), [
  ({}, ['attack', '--ranking={tmp}/other.json'], 'names channel 32, but the network has 32'),
  ({}, ['attack', '--ranking={tmp}/none.json'], 'none.json'),
  ({}, ['attack', '--regions', 'middle'], 'unknown region `middle`'),
  ({}, ['rank', '--regions', 'center'], 'is centred'),
  ({'classes': ['11']}, ['rank'], '11'),
  ({'classes': []}, ['rank'], 'names no object of interest'),
  ({}, ['attack', '--ranking={tmp}/random.json'], 'rename that list'),
  ({}, ['rank', '--ids={tmp}/ids.json'], 'lefty'),
  ({}, ['rank', '--ids=left={tmp}/none.txt'], 'none.txt'),
  ({}, ['attack', '--ranking={tmp}/my_right.json'], '--ranking=right={tmp}/my_right.json'),
  ({}, ['rank', '--ids={tmp}/one.json'], 'not a list of image ids'),
  ({}, ['rank', '--config.neurons.image=1'], '`neurons.image` cannot be set for a run that is'),
  ({}, ['attack', '--config.model.width=8'], 'these can: neurons.classes'),
  ({}, ['attack', '--config.neurons.counts=x'], 'counts'),
  ({}, ['attack', '--config.neurons.counts=0'], 'neurons.counts must be a number above 0'),
  ({}, ['attack', '--rankings=a.json'], 'unexpected argument `--rankings=a.json`'),
  ({}, ['rank', "--config.neurons.classes=('eleven',)"], '`eleven`'),
  ({'least_area': 0.9}, ['rank'], 'lower least_area')])
def test_mistakes_are_one_line(attacked, data_dir, tmp_path, capsys, opened_once, change, argv,
                               words):
  workdir = tmp_path / 'run'
  shutil.copytree(attacked, workdir, ignore=shutil.ignore_patterns('report'))
  settings = json.loads((workdir / 'config.json').read_text())
  settings['neurons'].update(change)
  (workdir / 'config.json').write_text(json.dumps(settings))
  for name, text in (('other', '{"overall": [32]}'), ('ids', '{"lefty": ["a"]}'),
                     ('one', '{"left": "abc"}'), ('my_right', '{"left": [3]}'),
                     ('random', json.dumps({'random': list(range(32))}))):
    (tmp_path / f'{name}.json').write_text(text)
  before = (workdir / 'ranking.json').read_bytes()
  argv, words = [part.format(tmp=tmp_path) for part in argv], words.format(tmp=tmp_path)
  assert cli.main([*argv, f'--workdir={workdir}', f'--data_dir={data_dir}']) == 2
  error = capsys.readouterr().err.strip().splitlines()
  assert len([line for line in error if line.startswith('gapjax: ')]) == 1 and words in error[-1]
  assert (workdir / 'ranking.json').read_bytes() == before


@pytest.mark.parametrize(('changes', 'words'), [
  ({'neurons.classes': ('3', 'eleven')}, 'class of digit_scenes in neurons.classes `eleven`'),
  ({'model.downsample': 'polyphase', 'model.stem': 'canvas', 'data.image_size': 50},
   r'50x75 pixels: polyphase downsampling needs even sizes, not a 50x75 feature map'),
  ({'model.padding': 'circular', 'model.stem': 'canvas', 'model.output_stride': 16,
    'segmentation.crop': (320, 320)},
   r'64x96 pixels: padding `circular` by .* needs a larger .*, or use model.padding=zero')])
def test_what_would_fail_later_is_found_before_training(data_dir, tmp_path, changes, words):
  refused(lambda: train(tiny_config(**{**SCENES, **changes}), workdir=tmp_path, data_dir=data_dir,
                        devices=jax.local_devices()[:1], progress=False), words)
  assert not (tmp_path / 'config.json').exists()  # the workdir is still free


class Sizes(list):
  """Scenes of which nothing but the size can be read."""
  size = list.__getitem__


def test_every_size_is_checked_or_the_shape_that_all_are_filled_up_to():
  c = tiny_config(**SCENES, **{'model.downsample': 'polyphase', 'model.stem': 'canvas'})
  model = networks.create_network(c.model, num_classes=11)
  even, odd = (32, 48), (32, 44)
  check_sizes(model, Sizes([even, even]), padded=False, way='')
  check_sizes(model, Sizes([even, odd]), padded=True, way='')
  refused(lambda: check_sizes(model, Sizes([even, odd]), padded=False, way='another'),
          '32x44 pixels.*or use another')


def test_a_canvas_run_is_attacked_too(data_dir, tmp_path, monkeypatch):
  """What is drawn for it depends on the run's seed."""
  seeds, config = [], tiny_config(seed=1)

  def noting(call):
    return lambda *args, seed: (seeds.append(seed), call(*args, seed=seed))[1]

  for module, name in ((neurons.network, 'classifier'), (neurons.attack, 'random_orders')):
    monkeypatch.setattr(module, name, noting(getattr(module, name)))
  config.neurons.update(counts=2, random_orders=1)
  summary = train(config, workdir=tmp_path, data_dir=data_dir, devices=jax.local_devices()[:1],
                  progress=False)
  _, sweep, _ = neurons.attack_run(tmp_path, data_dir=data_dir)
  assert seeds == [1, 1]
  orders = json.loads((tmp_path / 'ranking.json').read_text())
  assert set(orders) == {'overall', *neurons.SIDES, *neurons.CENTRED}
  assert len(orders['left']) == 32
  for values in sweep.metrics['location_accuracy'].values():
    np.testing.assert_allclose(values[:, 0], summary['final']['location_accuracy'], atol=0.02)
  refused(lambda: neurons.attack_run(tmp_path, data_dir=data_dir, regions=['left']),
          '--regions: a network that classifies')
  text = report.build(tmp_path).with_name('README.md').read_text()
  assert 'What removing channels costs' in text
  last = [line for line in text.splitlines() if 'guessing' in line and line.startswith('|')]
  assert last[0].split('|')[-2].strip() == '25.0'  # one of four places
  subject = neurons.CanvasSubject(evaluate.open_run(tmp_path, data_dir=data_dir), data_dir)
  np.testing.assert_array_equal(subject.locations,
                                np.random.default_rng(1).integers(4, size=160))
  columns = subject.locations % 2
  for region, column in (('left', 0), ('right', 1)):
    indices = subject.choose(region, limit=None)
    np.testing.assert_array_equal(indices, np.flatnonzero(columns == column))
    assert subject.choose(region, limit=7) == indices[:7]
    # By the masks themselves, as for any other run.
    assert indices == subject.chosen([{'label': subject.mask(p)} for p in subject.locations], [1],
                                     region=region)
  parts = list(subject.batches(range(50, 150), size=32))
  assert [len(part) for part in parts] == [32, 32, 32, 1, 1, 1, 1]
  np.testing.assert_array_equal(np.concatenate(parts),
                                subject.canvases(subject.images[50:150],
                                                 subject.locations[50:150]))


