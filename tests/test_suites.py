"""Which cells a suite has, how seeds are gathered, and what a recipe differs in."""

import dataclasses
import functools
import json
import threading

import jax
import numpy as np
import pytest
from conftest import ROOT, refused

from gapjax import cli, config, recipes
from gapjax.errors import UsageError
from gapjax.neurons import sweeps
from gapjax.records import schema
from gapjax.report import page as report
from gapjax.reproduce import loop, records, suites
from gapjax.training import workdirs

ABOUT = dict(suite='table2', scale='small')
LINES = [{'step': 1, 'split': 'train', 'loss': 2.0},
         {'step': 5, 'split': 'eval', 'accuracy': .5, 'consistency': .7, 'loss': 1.0}]


def test_table1_is_the_papers():
  """Of 5x5 nothing was published."""
  cells = suites.table1('full')
  assert len(cells) == 12
  for target, published in (
      ('location', {'gapnet/location/3x3': 1., 'gapnet/location/7x7': 1.,
                    'permutenet/location/3x3': .788, 'permutenet/location/7x7': .214}),
      ('image', {'gapnet/image/3x3': .826, 'gapnet/image/7x7': .821,
                 'permutenet/image/3x3': .736, 'permutenet/image/7x7': .699})):
    assert published == {
      cell.name.removesuffix('/cifar10'): cell.paper[f'{target}_accuracy_best_random']
      for cell in cells if cell.paper and cell.config.canvas.target == target}


def test_table2_is_the_papers_and_more():
  both = suites.table2('full')
  names = list(recipes.SHIFT_NETWORKS)
  assert names[0] == 'resnet18' and set(recipes.SHIFT_TITLES) == {*names[1:]}
  assert set(recipes.SHIFT_OTHERS) | {'two_crops'} == {
    name for name in names[1:] if not name.startswith('augshift')}  # what the lead introduces
  page = (ROOT / 'docs/use.md').read_text()
  assert all(f'`{name}`' in page for name in names)
  assert [cell.name for cell in both] == [
    f'{name}/{dataset}' for dataset in ('cifar10', 'cifar100') for name in names]
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
  found = {cell.name.split('/')[0]: cell.config for cell in suites.table2(scale)
           if cell.name.endswith('/cifar10')}
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
  for name, changed in (('unshifted', {'augshift.max_shift'}), ('circular', {'model.padding'}),
                        ('full_padding', {'model.padding'}),
                        ('blurpool', {'model.downsample'}),
                        ('blurpool_4', {'model.downsample', 'model.blur_size'}),
                        ('aps', {'model.downsample', 'model.blur_size'}),  # APS does not blur
                        ('lps', {'model.downsample', 'model.blur_size'})):
    assert {line.split()[0] for line in config.difference(
      found[name], config.as_json(found['resnet18']))} == changed


def test_every_suites_cells_are_valid_and_named_once():
  for suite, of_scale in suites.SUITES.items():
    for scale in suites.SCALES[suite]:
      found = of_scale(scale)
      assert len({cell.name for cell in found}) == len(found)
      for cell in found:
        config.validate(cell.config)


def test_chosen_cells():
  found = suites.table2('small')
  names = [cell.name for cell in suites.chosen(found, 'augshift*/cifar10 resnet18/*')]
  assert names == ['augshift/cifar10', 'augshift_blurpool/cifar10', 'augshift_aps/cifar10',
                   'resnet18/cifar10', 'resnet18/cifar100']  # in the order of the patterns
  assert suites.chosen(found, None) == found
  for only in ('augshift', 'resnet18/* resnet50/*', ''):
    refused(lambda only=only: suites.chosen(found, only), 'no cell is named')


PNG = b'\x89PNG\r\n\x1a\n' + bytes(32)


def _stub(monkeypatch, cells):
  """Training that is made up: returns the list of the cells and seeds that it is asked for."""
  trained = []

  def train(config_, *, workdir, **_):
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / 'samples.png').write_bytes(PNG)
    (workdir / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in LINES))
    cell = next(c for c in cells if not [f for f in config.difference(
      c.config, config.as_json(config_)) if 'seed' not in f])
    trained.append(f'{cell.name} {config_.seed}')
    return {**_summary(cell, config_.seed), 'device': f'cpu x {len(trained)}'}

  monkeypatch.setattr(loop, 'train', train)
  monkeypatch.setattr(loop, 'commit', lambda: '0')  # as its summaries say
  return trained


def test_cells_that_are_trained_at_the_same_time(monkeypatch, tmp_path, data_dir, caplog):
  """Two at once: the second begins before the first has ended; both stop on one signal; the records
  are those of one after the other."""
  cells = suites.quickstart('tiny')
  trained, both = _stub(monkeypatch, cells), threading.Barrier(2, timeout=60)
  one, stops = loop.train, set()

  def train(config_, *, stop=None, **how):
    if stop:
      stops.add(stop)
      both.wait()
    return one(config_, **how)

  monkeypatch.setattr(loop, 'train', train)
  monkeypatch.setattr(loop.jax, 'device_count', lambda: 1)
  for at_once in (1, 2):
    loop.run('quickstart', scale='tiny', seeds=1, workdir=tmp_path / str(at_once), command='',
             data_dir=data_dir, only='resnet10/* augshift/*', at_once=at_once)
  assert len(trained) == 4 and len(stops) == 1
  first, second = (sorted((r['cell'], r['metric'], r['mean']) for r in json.loads(
    (tmp_path / name / 'results.json').read_text())) for name in '12')
  assert first == second
  assert sum('AugShift names' in line for line in caplog.messages) == 2


def test_reproduce_trains_in_a_clone_that_holds_results(monkeypatch, tmp_path, capsys):
  """results/table1 holds two seeds of each of these cells; none of them is one's own."""
  trained = _stub(monkeypatch, suites.table1('small'))
  monkeypatch.setattr(loop.TASKS['canvas'], 'check_data', lambda *_, **__: None)
  monkeypatch.chdir(ROOT)
  assert (ROOT / 'results/table1/results.json').exists()
  assert cli.main(['reproduce', 'table1', '--scale=small', '--seeds=2', f'--workdir={tmp_path}',
                   '--cells=gapnet/location/3x3']) == 0
  assert trained == ['gapnet/location/3x3 0', 'gapnet/location/3x3 1']
  assert {r['cell'] for r in schema.read(tmp_path / 'results.json')} == {'gapnet/location/3x3'}
  assert 'PermuteNet' not in capsys.readouterr().out


def test_a_seed_must_share_the_data_of_those_it_is_averaged_with(monkeypatch, tmp_path, data_dir):
  _stub(monkeypatch, suites.quickstart('tiny'))
  made_up, told = loop.train, {}

  def train(config_, *, workdir, alike, **rest):
    told[workdir] = alike
    return made_up(config_, workdir=workdir, **rest)

  monkeypatch.setattr(loop, 'train', train)
  loop.run('quickstart', scale='tiny', workdir=tmp_path, data_dir=data_dir, command='', seeds=3,
           only='resnet10/*')
  first, second, third = (tmp_path / f'cells/resnet10/digits/seed{seed}' for seed in range(3))
  assert told == {first: [], second: [first], third: [first, second]}


def test_a_change_is_of_every_cell_and_told(tmp_path):
  """And the records of changed cells are not those of the suite's own."""
  own = suites.table2('small')
  found = suites.changed(own, ['--config.num_epochs=20', '--config.model.width=8'])
  assert [cell.name for cell in found] == [cell.name for cell in own]
  for old, new in zip(own, found, strict=True):
    assert config.difference(new.config, config.as_json(old.config)) == [
      'model.width 8 (there: 12)', 'num_epochs 20 (there: 5)']
    assert old.changes == () and new.paper == old.paper
  for cell in suites.changed(suites.table1('small'), ['--config.num_epochs=2'], only='*/3x3'):
    assert cell.config.num_epochs == 2  # those with the same value may be changed
  made = records.add([], found[0], seed=0, summary=_summary(found[0], 0), lines=LINES, **ABOUT)
  assert records.holds(made[0], found[0]) and not records.holds(made[0], own[0])
  records.write(tmp_path / 'results.json', made)
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
  (['--config.augshift.weight=3'], None, '`augshift.weight` is not read in the task canvas'),
  (['--config.num_epochs=2'], None, r'the cells differ in it \(10, 6, 4\)'),
  (['--config.num_epochs=2'], '*/3x3 */5x5', r'the cells differ in it \(10, 6\)')])
def test_a_change_that_cannot_be(changes, only, message):
  """Also of what the cells are there to compare."""
  refused(lambda: suites.changed(suites.table1('small'), changes, only=only), message)


def test_a_change_must_be_read_by_a_chosen_cell():
  field = ['--config.model.separable=true']
  assert suites.changed(suites.attack('small'), field)[0].config.model.separable
  refused(lambda: suites.changed(suites.attack('small'), field, only='*/3x3'),
          '`model.separable` is not read in the task canvas')


@pytest.mark.parametrize(('only', 'change'), [
  ('deeplabv3/camvid', 'optimizer.backbone_factor=0.1'), ('gapnet/*', 'batch_size=1')])
def test_a_change_may_be_none_for_cells_that_are_not_chosen(only, change):
  """A classifier has no backbone, DeepLab's BatchNorm needs two images."""
  every = suites.attack('small')
  refused(lambda: suites.changed(every, [f'--config.{change}']))
  found = suites.changed(every, [f'--config.{change}'], only=only)
  assert [cell.name for cell in found] == [cell.name for cell in every]
  assert all(cell.changes == (change,) for cell in suites.chosen(found, only))
  left = [cell for cell in found if not cell.changes]
  assert left and all(cell in every for cell in left)


@pytest.mark.parametrize(('suite', 'only', 'field'), [
  ('table1', 'gapnet/*/3x3', 'model.head=permuted'),
  ('table1', 'permutenet/*/3x3', 'model.permutation=fixed'),
  ('table1', 'permutenet/*/3x3', 'model.permute_at=stage2'),
  ('table2', 'resnet18/*', 'model.downsample=blur'), ('table2', 'aps/*', 'model.name=resnet34'),
  ('table2', 'augshift/*', 'augshift.crops=1'), ('table2', 'augshift/*', 'augshift.weight=0.0'),
  ('attack', 'deeplabv3/*', 'model.name=deeplabv3plus'),
  ('ablations', 'padding=zero/*', 'model.padding=circular')])
def test_a_row_is_called_what_it_is(suite, only, field):
  """What the names of cells say cannot be changed, though these cells do not differ in it."""
  refused(lambda: suites.changed(suites.SUITES[suite]('small'), [f'--config.{field}'], only=only),
          'names of the cells say it, so a row would be called what')


def test_results_of_another_suite_are_not_overwritten(tmp_path, data_dir):
  path = tmp_path / 'results.json'
  path.write_text(json.dumps([{'schema': 2, 'cell': 'resnet18/cifar10', 'metric': 'consistency',
                               'mean': .5, 'seeds': [0],
                               'config': config.as_json(config.default())}]))
  before = path.read_bytes()
  with pytest.raises(UsageError, match=r'resnet18/cifar10.*another suite, scale or config'):
    loop.run('quickstart', scale='tiny', seeds=1, workdir=tmp_path, data_dir=data_dir,
               command='', only='augshift/*')
  assert path.read_bytes() == before


def _summary(cell, seed):
  """A finished run of a shift cell, its numbers drawn by the seed."""
  draw = np.random.default_rng(seed)
  return {
    'config': config.as_json(cell.config), 'step': 10,
    'final': {'image_accuracy': draw.uniform(), 'consistency': draw.uniform(),
              'feature_distance': draw.uniform(), 'consistency_crop': draw.uniform(),
              'consistency_circular': draw.uniform(), 'loss': 1.0},
    'best': {'image_accuracy_best': draw.uniform(), 'step': 5},
    'shifts': {'protocol': 'pad, s = 4', 'images': 7, 'offsets': [-1, 0, 1],
               'protocols': {'pad': draw.uniform(size=3).tolist()},
               'accuracy_map': draw.uniform(size=(3, 3)).tolist()},
    'wall_seconds': 10.0 + seed, 'images_per_second': 100.0, 'device': 'cpu x 1',
    'sizes': {'test_images': 7, 'chance': .1}, 'commit': '0'}


def test_seeds_are_gathered():
  cell = suites.table2('small')[0]
  summaries, found = [_summary(cell, seed) for seed in range(3)], []
  for seed, summary in enumerate(summaries):
    found = records.add(found, cell, seed=seed, summary=summary, lines=LINES, **ABOUT)
  assert {r['metric']: r.get('protocol') for r in found} == {
    'image_accuracy': None, 'consistency': 'pad, s = 4', 'feature_distance': None,
    'consistency_crop': 'crop, s = 4', 'consistency_circular': 'circular, s = 3',
    'image_accuracy_best': None}
  for record in found[:5]:
    values = [summary['final'][record['metric']] for summary in summaries]
    assert record['values'] == values and record['seeds'] == [0, 1, 2] and record['n'] == 3
    np.testing.assert_allclose(record['mean'], np.mean(values), rtol=1e-12)
    np.testing.assert_allclose(record['std'], np.std(values, ddof=1), rtol=1e-12)
    assert (record['task'], record['network'], record['dataset'], record['commit']) == (
      'classification', 'resnet18', 'cifar10', '0')
  assert [r['paper'] for r in found[:3]] == [.931, .908, None]
  detail = found[0]['detail']
  assert detail['wall_seconds'] == [10.0, 11.0, 12.0]
  assert detail['curves'] == {'train_loss': [[1, 2.0]], 'eval_accuracy': [[5, .5]],
                              'eval_consistency': [[5, .7]]}
  maps = [summary['shifts']['accuracy_map'] for summary in summaries]
  np.testing.assert_allclose(detail['shifts']['accuracy_map'], np.mean(maps, 0), rtol=1e-12)
  assert detail['shifts']['offsets'] == [-1, 0, 1] and detail['shifts']['images'] == 7


def _attack_records(cell, at, found=(), *, seed=0):
  """What a made-up sweep left of a cell: two orders, two N."""
  metric = 'miou' if cell.config.task == 'segmentation' else f'{cell.config.canvas.target}_accuracy'
  sweep = sweeps.Sweep((0, 5, 9), {metric: {'overall': np.array([[at, .5, .3]]),
                                     'random': np.array([[at, .8, .6], [at, .7, .4]])}})
  return records.add_attack(list(found), cell, seed=seed, summary=_summary(cell, seed),
                            sweep=sweep, **ABOUT)


def test_a_class_is_known_where_it_is_of_every_seed():
  per_class = [{'iou': [.5, None, .25, None]}, {'iou': [.25, .5, None, None]}]
  for one, other in (per_class, per_class[::-1]):
    assert records.mean(one, other, 1) == {'iou': [.375, None, None, None]}


def test_a_config_stands_once_a_cell_and_is_read_for_all(tmp_path):
  cells = suites.attack('small')[:3]
  assert [cell.name for cell in cells] == [
    'deeplabv3/camvid', 'gapnet/location/3x3', 'permutenet/location/3x3']
  found = [*_attack_records(cells[0], .9), *_attack_records(cells[1], .8)]
  path = tmp_path / 'results.json'
  records.write(path, found)
  there = [i for i, record in enumerate(json.loads(path.read_text())) if 'config' in record]
  assert there == [0, 5]
  assert schema.read(path) == json.loads(json.dumps(found))
  for record in schema.read(path):
    assert [records.holds(record, cell) for cell in cells].index(True) == (
      record['cell'] == cells[1].name)
  assert schema.read(tmp_path / 'none.json') == []


def test_attacks_of_two_networks_do_not_hide_each_other():
  """Their orders, N and metrics are the same; random orders have two values a seed. A cell's own
  metric is not taken for its attack's."""
  cells = suites.attack('small')[1:3]
  own = {'suite': 'table2', 'cell': cells[0].name, 'metric': 'location_accuracy', 'seeds': [0],
         'values': [.5], 'config': cells[0].config.to_dict()}
  found = [own]
  for seed, at in enumerate((.9, .8)):
    for cell in cells:
      found = _attack_records(cell, at, found, seed=seed)
  assert len(found) == 1 + 2 * 5 and found[0]['values'] == [.5]
  both = sweeps.from_records([r for r in found[1:] if r['cell'] == cells[1].name])  # what is drawn
  np.testing.assert_array_equal(both.metrics['location_accuracy']['random'],
                                [[.9, .8, .6], [.9, .7, .4], [.8, .8, .6], [.8, .7, .4]])
  for record in found[1:]:
    assert record['seeds'] == [0, 1] and record['chance'] == .1
    expected = {('clean', 0): [.9, .8], ('overall', 5): [.5, .5], ('overall', 9): [.3, .3],
                ('random', 5): [.8, .7, .8, .7], ('random', 9): [.6, .4, .6, .4]}
    assert record['values'] == expected[record['order'], record['N']]
    assert record['n'] == len(record['values'])
    assert record['std'] == pytest.approx(np.std(record['values'], ddof=1))


@pytest.mark.slow
def test_a_trained_cell_is_attacked_without_training_it_again(monkeypatch, tmp_path, data_dir):
  """Results from before its attack belonged to the suite stay, and are not counted twice."""
  monkeypatch.setitem(suites.SUITES, 'quickstart', lambda scale: [cell])
  cell = suites.quickstart('tiny')[0]
  assert cell.name == 'gapnet/location/3x3'
  monkeypatch.setattr(loop, 'train', functools.partial(loop.train,
                                                      devices=jax.local_devices()[:1]))
  cell.config.neurons.update(counts=3, random_orders=2)
  for attacked in (False, True, True):
    cell = dataclasses.replace(cell, attack=attacked)
    loop.run('quickstart', scale='tiny', seeds=1, workdir=tmp_path, data_dir=data_dir,
               command='', progress=False)
    found = schema.read(tmp_path / 'results.json')
    own, removed = ([r for r in found if ('N' in r) == cut] for cut in (False, True))
    assert [r['n'] for r in own] == [1, 1]
    assert len(removed) == (1 + 6 * 3 if attacked else 0)  # clean, and six orders at three N
    assert {r['chance'] for r in removed} <= {1 / 9}
  (clean,) = (r for r in removed if r['N'] == 0)
  assert clean['values'] == pytest.approx(own[0]['values'], abs=.02)
  page = (tmp_path / 'report' / 'README.md').read_text()
  assert 'This page tells the first and the third.' in page


def test_a_suite_in_use_is_left_alone(tmp_path, data_dir):
  """Two processes would write each other's results.json."""
  with workdirs.lock(tmp_path), pytest.raises(UsageError, match='in use by another process'):
    loop.run('quickstart', scale='tiny', seeds=1, workdir=tmp_path, data_dir=data_dir, command='')
  assert [path.name for path in tmp_path.iterdir()] == ['.lock']


def test_classes_that_the_dataset_lacks_are_found_before_training(monkeypatch, tmp_path, data_dir):
  [wrong] = [c for c in suites.quickstart('tiny') if c.config.task == 'segmentation']
  wrong.config.neurons.classes = ('0', 'ten')
  monkeypatch.setitem(suites.SUITES, 'quickstart', lambda scale: [wrong])
  with pytest.raises(UsageError, match=r'neurons\.classes `ten`'):
    loop.run('quickstart', scale='tiny', seeds=1, workdir=tmp_path / 'w', data_dir=data_dir,
               command='')
  assert not (tmp_path / 'w').exists()
