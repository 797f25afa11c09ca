"""Which cells a suite has, how seeds are gathered, and what a recipe differs in."""

import dataclasses
import datetime
import json

import numpy as np
import pytest

from gapjax import config
from gapjax.errors import UsageError
from gapjax.neurons.attack import Sweep
from gapjax.report import page as report
from gapjax.reproduce import cells, suites
from gapjax.training import workdirs


def test_table2_is_the_papers_and_more():
  both = cells.table2('full')
  assert [cell.name for cell in both[:7]] == [
    f'{name}/cifar10' for name in ('resnet18', 'blurpool', 'aps', 'two_crops', 'augshift',
                                   'augshift_blurpool', 'augshift_aps')]
  assert [cell.name.split('/')[1] for cell in both] == ['cifar10'] * 7 + ['cifar100'] * 7
  paper = {cell.name: cell.paper for cell in both if cell.paper}
  assert paper == {
    'resnet18/cifar10': {'image_accuracy': .931, 'consistency': .908},
    'blurpool/cifar10': {'image_accuracy': .925, 'consistency': .925},
    'augshift/cifar10': {'image_accuracy': .921, 'consistency': .948},
    'resnet18/cifar100': {'image_accuracy': .726, 'consistency': .701},
    'blurpool/cifar100': {'image_accuracy': .724, 'consistency': .782},
    'augshift/cifar100': {'image_accuracy': .726, 'consistency': .856}}


@pytest.mark.parametrize('scale', ['full', 'small'])
def test_cells_differ_in_their_method_alone(scale):
  """The control in nothing but the weight and its warm-up, the baseline in crops and SGD's equal
  step."""
  found = {cell.name.split('/')[0]: cell.config for cell in cells.table2(scale)[:7]}
  pair = found['augshift'].augshift
  assert config.difference(found['two_crops'], config.as_json(found['augshift'])) == [
    f'augshift.warm_up 0.0 (there: {pair.warm_up})',
    f'augshift.weight 0.0 (there: {pair.weight})']
  fields = {line.split()[0] for line in config.difference(
    found['two_crops'], config.as_json(found['resnet18']))}
  one, two = found['resnet18'].optimizer, found['two_crops'].optimizer
  if scale == 'full':
    assert fields == {'augshift.crops', 'optimizer.lr', 'optimizer.weight_decay'}
    assert two.lr == one.lr / 2 and two.weight_decay == 2 * one.weight_decay
  else:  # Adam's step does not depend on the loss's scale
    assert fields == {'augshift.crops'}
  for name, changed in (('blurpool', {'model.downsample'}),
                        ('aps', {'model.downsample', 'model.blur_size'})):  # APS does not blur
    assert {line.split()[0] for line in config.difference(
      found[name], config.as_json(found['resnet18']))} == changed


def test_every_suites_cells_are_valid_and_named_once():
  for suite, of_scale in cells.SUITES.items():
    for scale in cells.SCALES[suite]:
      found = of_scale(scale)
      assert len({cell.name for cell in found}) == len(found)
      for cell in found:
        config.validate(cell.config)


def test_chosen_cells():
  found = cells.table2('small')
  names = [cell.name for cell in suites.chosen(found, 'augshift*/cifar10 resnet18/*')]
  assert names == ['resnet18/cifar10', 'augshift/cifar10', 'augshift_blurpool/cifar10',
                   'augshift_aps/cifar10', 'resnet18/cifar100']
  assert suites.chosen(found, None) == found
  for only in ('augshift', 'resnet18/* resnet50/*', ''):
    with pytest.raises(UsageError, match='no cell is named'):
      suites.chosen(found, only)


def test_commands_for_some_cells_add_up(monkeypatch, tmp_path, data_dir):
  """Each keeps what the others of the same workdir trained, and the report names them all."""

  def train(config, *, workdir, **_):
    workdir.mkdir(parents=True)
    (workdir / 'samples.png').write_bytes(b'\x89PNG\r\n\x1a\n' + bytes(32))
    lines = [{'step': 5, 'split': 'eval', 'accuracy': .5, 'consistency': .7, 'loss': 1.0}]
    (workdir / 'metrics.jsonl').write_text(json.dumps(lines[0]) + '\n')
    cell = next(c for c in cells.quickstart('tiny') if not config_differs(c, config))
    trained.append(cell.name)
    return {**_summary(cell, config.seed), 'device': f'cpu x {len(trained)}'}

  def config_differs(cell, config_):
    return [f for f in config.difference(cell.config, config.as_json(config_)) if 'seed' not in f]

  trained = []
  monkeypatch.setattr(suites, 'train', train)
  (tmp_path / 'run.json').write_text(json.dumps({'began': '2026-01-31', 'ended': '2026-01-31'}))
  for only in ('resnet10/*', 'augshift/*', '*/digits'):
    suites.run('quickstart', scale='tiny', seeds=1, workdir=tmp_path, data_dir=data_dir,
               command=f'only {only}', only=only)
  assert trained == ['resnet10/digits', 'augshift/digits']
  found = json.loads((tmp_path / 'results.json').read_text())
  assert [r['cell'] for r in found] == ['resnet10/digits'] * 4 + ['augshift/digits'] * 4
  run = json.loads((tmp_path / 'run.json').read_text())
  assert run['command'] == 'only resnet10/*\nonly augshift/*'
  assert (run['began'], run['ended']) == ('2026-01-31', datetime.date.today().isoformat())
  assert run['device'] == 'cpu x 1; cpu x 2'  # each machine that trained some of them
  page = (tmp_path / 'report' / 'README.md').read_text()
  assert '    only resnet10/*\n    only augshift/*' in page


def test_cells_of_another_folder_come_with_what_made_them(tmp_path, data_dir, monkeypatch):
  """Its run.json and its pictures: the report says which machine trained them."""
  theirs, mine = tmp_path / 'theirs', tmp_path / 'mine'
  cell = suites.chosen(cells.quickstart('tiny'), 'resnet10/*')[0]
  (theirs / 'samples').mkdir(parents=True)
  picture = b'\x89PNG\r\n\x1a\n' + bytes(32)
  (theirs / 'samples/1x1.png').write_bytes(picture)
  suites.write_records(theirs / 'results.json',
                       suites.add([], 'quickstart', 'tiny', cell, 0, _summary(cell, 0), [
                         {'step': 5, 'split': 'eval', 'accuracy': .5, 'consistency': .7}]))
  said = {'began': '2026-01-31', 'ended': '2026-02-01', 'command': 'their command',
          'device': 'their machine', 'versions': {'jax': '1'}, 'wall_seconds': 60.0}
  (theirs / 'run.json').write_text(json.dumps(said))
  monkeypatch.setattr(suites, 'train', None)
  for _ in range(2):
    page = suites.run('quickstart', scale='tiny', seeds=1, workdir=mine, data_dir=data_dir,
                      command='mine', only='resnet10/*', published=theirs / 'results.json')
    assert json.loads((mine / 'run.json').read_text()) == said
    assert (mine / 'samples/1x1.png').read_bytes() == picture
    assert 'their machine' in page.with_name('README.md').read_text()


def test_a_change_is_of_every_cell_and_told(tmp_path):
  """And the records of changed cells are not those of the suite's own."""
  own = cells.table2('small')
  found = suites.changed(own, ['--config.num_epochs=20', '--config.model.width=8'])
  assert [cell.name for cell in found] == [cell.name for cell in own]
  for old, new in zip(own, found, strict=True):
    assert config.difference(new.config, config.as_json(old.config)) == [
      'model.width 8 (there: 12)', 'num_epochs 20 (there: 5)']
    assert old.changes == () and new.paper == old.paper
  for cell in suites.changed(cells.table1('small'), ['--config.num_epochs=2'], only='*/3x3'):
    assert cell.config.num_epochs == 2  # those with the same value may be changed
  records = suites.add([], 'table2', 'small', found[0], 0, _summary(found[0], 0), [
    {'step': 5, 'split': 'eval', 'accuracy': .5, 'consistency': .7}])
  assert suites.holds(records[0], found[0]) and not suites.holds(records[0], own[0])
  suites.write_records(tmp_path / 'results.json', records)
  page = report.build(tmp_path).with_name('README.md').read_text()
  assert 'gapjax: table2, small, num_epochs=20, model.width=8.' in page
  assert 'trained with num_epochs=20, model.width=8, other than' in page


@pytest.mark.parametrize(('changes', 'only', 'message'), [
  (['--config.num_epoch=2'], None, 'did you mean `num_epochs`'),
  (['--config.num_epochs=two'], None, 'num_epochs=two'),
  (['--config.num_epochs=0'], None, 'num_epochs must be a number above 0'),
  (['--config=configs/digits.py'], None, 'unexpected argument `--config=configs/digits.py`'),
  (['--config.seed=3'], None, 'use --seeds'),
  (['--config.canvas.grid=4'], '*/3x3', 'the names of the cells say it'),
  (['--config.num_epochs=2'], None, r'the cells differ in it \(10, 6, 4\)'),
  (['--config.num_epochs=2'], '*/3x3 */5x5', r'the cells differ in it \(10, 6\)')])
def test_a_change_that_cannot_be(changes, only, message):
  """Also of what the cells are there to compare."""
  with pytest.raises(UsageError, match=message):
    suites.changed(cells.table1('small'), changes, only=only)


def test_an_unknown_scale_is_none(tmp_path):
  with pytest.raises(UsageError, match='unknown scale of table1 `smal`'):
    suites.run('table1', scale='smal', seeds=1, workdir=tmp_path, command='')


def test_results_of_another_suite_are_not_overwritten(tmp_path, data_dir):
  path = tmp_path / 'results.json'
  path.write_text(json.dumps([{'cell': 'resnet18/cifar10', 'metric': 'consistency', 'seeds': [0],
                               'config': config.as_json(config.default())}]))
  before = path.read_bytes()
  with pytest.raises(UsageError, match=r'resnet18/cifar10.*another suite, scale or config'):
    suites.run('quickstart', scale='tiny', seeds=1, workdir=tmp_path, data_dir=data_dir,
               command='', only='augshift/*')
  assert path.read_bytes() == before


def _summary(cell, seed):
  """A finished run of a shift cell, its numbers drawn by the seed."""
  draw = np.random.default_rng(seed)
  return {
    'config': config.as_json(cell.config), 'step': 10,
    'final': {'image_accuracy': draw.uniform(), 'consistency': draw.uniform(),
              'feature_distance': draw.uniform(), 'loss': 1.0},
    'best': {'image_accuracy_best': draw.uniform(), 'step': 5},
    'shifts': {'protocol': 'pad, s = 4', 'images': 7, 'offsets': [-1, 0, 1],
               'protocols': {'pad': draw.uniform(size=3).tolist()},
               'accuracy_map': draw.uniform(size=(3, 3)).tolist()},
    'wall_seconds': 10.0 + seed, 'images_per_second': 100.0, 'device': 'cpu x 1',
    'sizes': {'test_images': 7}}


def test_seeds_are_gathered():
  cell = cells.table2('small')[0]
  lines = [{'step': 1, 'split': 'train', 'loss': 2.0},
           {'step': 5, 'split': 'eval', 'accuracy': .5, 'consistency': .7, 'loss': 1.0}]
  summaries, records = [_summary(cell, seed) for seed in range(3)], []
  for seed, summary in enumerate(summaries):
    records = suites.add(records, 'table2', 'small', cell, seed, summary, lines)
  assert [r['metric'] for r in records] == ['image_accuracy', 'consistency', 'feature_distance',
                                            'image_accuracy_best']
  for record in records[:3]:
    values = [summary['final'][record['metric']] for summary in summaries]
    assert record['values'] == values and record['seeds'] == [0, 1, 2] and record['n'] == 3
    np.testing.assert_allclose(record['mean'], np.mean(values), rtol=1e-12)
    np.testing.assert_allclose(record['std'], np.std(values, ddof=1), rtol=1e-12)
  assert [r.get('protocol') for r in records] == [None, 'pad, s = 4', None, None]
  assert [r['paper'] for r in records] == [.931, .908, None, None]
  detail = records[0]['detail']
  assert detail['wall_seconds'] == [10.0, 11.0, 12.0]
  assert detail['curves'] == {'train_loss': [[1, 2.0]], 'eval_accuracy': [[5, .5]],
                              'eval_consistency': [[5, .7]]}
  maps = [summary['shifts']['accuracy_map'] for summary in summaries]
  np.testing.assert_allclose(detail['shifts']['accuracy_map'], np.mean(maps, 0), rtol=1e-12)
  assert detail['shifts']['offsets'] == [-1, 0, 1] and detail['shifts']['images'] == 7


def _attack_records(cell, at, *, chance=None):
  """What a made-up sweep left of a cell: two orders, two N."""
  metric = 'miou' if chance is None else f'{cell.config.canvas.target}_accuracy'
  found = Sweep((0, 5, 9), {metric: {'overall': np.array([[at, .5, .3]]),
                                     'random': np.array([[at, .8, .6], [at, .7, .4]])}})
  return suites.add_attack([], 'attack', 'small', cell, 0, found, chance=chance)


def test_a_config_stands_once_a_cell_and_is_read_for_all(tmp_path):
  found = cells.attack('small')[:3]
  assert [cell.name for cell in found] == [
    'deeplabv3/camvid', 'gapnet/location/3x3', 'permutenet/location/3x3']
  records = [*_attack_records(found[0], .9), *_attack_records(found[1], .8, chance=1 / 9)]
  path = tmp_path / 'results.json'
  suites.write_records(path, records)
  there = [i for i, record in enumerate(json.loads(path.read_text())) if 'config' in record]
  assert there == [0, 5]
  assert suites.read_records(path) == json.loads(json.dumps(records))
  for record in suites.read_records(path):
    assert [suites.holds(record, cell) for cell in found].index(True) == (
      record['network'] == found[1].name)
  path.write_text(json.dumps(records))  # as it was written before: a config a record
  assert suites.read_records(path) == json.loads(json.dumps(records))
  assert suites.read_records(tmp_path / 'none.json') == []


def test_attacks_of_two_networks_do_not_hide_each_other(tmp_path):
  """Their cells and metrics have the same names."""
  location, image = (cell for cell in cells.quickstart('digits') if cell.attack
                     and cell.config.task == 'canvas')
  other = cells.canvas_cell('permutenet', 'location', 3, cells.digits())
  every = [location, image, other]
  for name, records in (('a', _attack_records(location, .9, chance=1 / 9)),
                        ('b', [*_attack_records(location, .1, chance=1 / 9),
                               *_attack_records(other, .2, chance=1 / 9)])):
    suites.write_records(tmp_path / name, records)
  found = suites.known_records([tmp_path / 'a', tmp_path / 'b'], every)
  clean = {r['network']: r['values'] for r in found if r['cell'] == 'clean/N=0'}
  assert clean == {location.name: [.9], other.name: [.2]}  # an earlier file has precedence


@pytest.mark.slow
def test_a_trained_cell_is_attacked_without_training_it_again(monkeypatch, tmp_path, data_dir):
  """Results from before its attack belonged to the suite stay, and are not counted twice."""
  monkeypatch.setitem(cells.SUITES, 'quickstart', lambda scale: [cell])
  cell = cells.quickstart('tiny')[0]
  assert cell.name == 'gapnet/location/3x3' and cell.attack
  for attacked in (False, True, True):
    cell = dataclasses.replace(cell, attack=attacked)
    suites.run('quickstart', scale='tiny', seeds=1, workdir=tmp_path, data_dir=data_dir,
               command='', progress=False)
    records = suites.read_records(tmp_path / 'results.json')
    own = [r for r in records if 'network' not in r]
    assert [r['n'] for r in own] == [1, 1]
    removed = [r for r in records if 'network' in r]
    assert len(removed) == (1 + 6 * 3 if attacked else 0)  # clean, and six orders at three N
    assert {r['chance'] for r in removed} <= {1 / 9}
  (clean,) = (r for r in removed if r['cell'] == 'clean/N=0')
  assert clean['values'] == pytest.approx(own[0]['values'], abs=.02)
  page = (tmp_path / 'report' / 'README.md').read_text()
  assert 'This page tells the first and the third.' in page


def test_a_suite_in_use_is_left_alone(tmp_path, data_dir):
  """Two processes would write each other's results.json."""
  with workdirs.lock(tmp_path), pytest.raises(UsageError, match='in use by another process'):
    suites.run('quickstart', scale='tiny', seeds=1, workdir=tmp_path, data_dir=data_dir, command='')
  assert [path.name for path in tmp_path.iterdir()] == ['.lock']


def test_classes_that_the_dataset_lacks_are_found_before_training(monkeypatch, tmp_path, data_dir):
  wrong = cells.quickstart('tiny')[-1]
  wrong.config.neurons.classes = ('0', 'ten')
  monkeypatch.setitem(cells.SUITES, 'quickstart', lambda scale: [wrong])
  with pytest.raises(UsageError, match=r'neurons\.classes `ten`'):
    suites.run('quickstart', scale='tiny', seeds=1, workdir=tmp_path / 'w', data_dir=data_dir,
               command='')
  assert not (tmp_path / 'w').exists()
