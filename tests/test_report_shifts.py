"""Reports of the second claim: numbers against the JSON, pixels against what was drawn."""

import json
import re

import numpy as np
import pytest
from pixels import pixels, where
from test_report import TWIN, _html, _markdown, _records, _rows, _run, _write, save_samples

from gapjax.report import page as report
from gapjax.report.plots import base as plots
from gapjax.report.plots import shifts as plots_shifts
from gapjax.report.plots.shifts import ShiftPanel

PAPER = {'resnet18': (.931, .908), 'augshift': (.921, .948)}
NETWORKS = ('resnet18', 'blurpool', 'aps', 'two_crops', 'augshift', 'augshift_blurpool',
            'augshift_aps')
OFFSETS = [-2, 0, 2]


def _detail(network, accuracy, consistency):
  curve = [1 - (1 - consistency) * s / 4 for s in (1, 2, 3)]
  return {
    'shifts': {'protocols': {'pad': curve, 'crop': curve, 'circular': [1., 1., 1.]},
               'offsets': OFFSETS, 'images': 1500,
               'accuracy_map': (accuracy - .1 * np.random.default_rng(1).random((3, 3))).tolist()},
    'curves': {'train_loss': [[0, 2.3], [50, 1.]], 'eval_accuracy': [[50, accuracy - .2],
                                                                        [90, accuracy]],
               'eval_consistency': [[50, consistency - .1], [90, consistency]]},
    'wall_seconds': [14.0, 15.0], 'images_per_second': 900.4, 'epochs': 8, 'steps': 700,
    'batch_size': 64, 'model': f'{network} width 16', 'train_images': 1000, 'test_images': 200,
    'input_size': 32, 'chance': .1, 'parameters': 310000}


def _shift_records(networks=NETWORKS, datasets=('cifar10',), *, suite='table2', scale='small',
                   protocol='pad, s = 4', torch=None):
  """In a wrong order: the report has one of its own."""
  rng, records = np.random.default_rng(0), []
  for dataset in reversed(datasets):
    for network in reversed(networks):
      for metric in ('image_accuracy_best', 'feature_distance', 'consistency', 'image_accuracy'):
        values = rng.uniform(.6, .98, 2).round(4) / (10 if metric == 'feature_distance' else 1)
        record = {'schema': 2, 'suite': suite, 'scale': scale, 'cell': f'{network}/{dataset}',
                  'task': 'classification', 'network': network.split(',')[0], 'dataset': dataset,
                  **{key: float(value) for key, value in re.findall(r'(\w+)=([\d.]+)', network)},
                  'metric': metric,
                  'paper': None, 'torch': None, 'values': values.tolist(), 'seeds': [0, 1],
                  'mean': float(values.mean()), 'std': float(values.std(ddof=1)), 'n': 2,
                  'config': {}}
        if metric in ('image_accuracy', 'consistency'):
          record |= {'torch': torch, 'paper': PAPER.get(network, (None, None))[
            metric == 'consistency']}
        if metric == 'consistency':
          record['protocol'] = protocol
          consistency = record['mean']
        if metric == 'image_accuracy':
          record['detail'] = _detail(network, record['mean'], consistency)
        records.append(record)
  return records


def _picture(run, value=.4, grid=1):
  run.mkdir(parents=True)
  save_samples(run / 'samples.png', grid, value)


@pytest.fixture(scope='module')
def shifts(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('shifts')
  _write(workdir / 'results.json', _shift_records(('resnet18', 'two_crops', 'augshift')))
  _write(workdir / 'run.json', {'command': 'gapjax reproduce table2'})
  for cell, value in (('resnet18', .9), ('two_crops', .4), ('augshift', .6)):
    _picture(workdir / f'cells/{cell}/cifar10/seed0', value)
  report.build(workdir)
  return workdir


# --- the table -------------------------------------------------------------------------------


@pytest.mark.parametrize('torch', [None, TWIN])
def test_table_parses_back_to_the_json_in_the_papers_order(torch):
  records = _shift_records(datasets=('cifar10', 'cifar100', 'digits'), torch=torch)
  head, *rows = _rows(report.table(records))
  names = {name: key for key, name in plots.NETWORKS.items()}
  cells = [f'{names[row[0]]}/{row[1]}' for row in rows]
  assert cells == [f'{n}/{d}' for d in ('cifar10', 'cifar100', 'digits') for n in NETWORKS]
  by_name = {(r['cell'], r['metric']): r for r in records}
  columns = {'gapjax: top-1': 'image_accuracy', 'gapjax: feature distance': 'feature_distance',
             'gapjax: consistency (pad, s = 4)': 'consistency'}
  for cell, row in zip(cells, rows, strict=True):
    said = dict(zip(head, row, strict=True))
    for column, metric in columns.items():
      mean, std, n = re.fullmatch(r'([\d.]+) . ([\d.]+) \((\d+)\)', said[column]).groups()
      unit = 1 if metric == 'feature_distance' else 100
      record = by_name[cell, metric]
      assert float(mean) == pytest.approx(unit * record['mean'], abs=.00051 * unit)
      assert float(std) == pytest.approx(unit * record['std'], abs=.00051 * unit)
      assert int(n) == 2
    paper = PAPER.get(cell.split('/')[0])
    for what, at in (('top-1', 0), ('consistency', 1)):
      assert said[f'paper: {what}'] == (f'{100 * paper[at]:.1f}' if paper else '\N{EN DASH}')
      assert said.get(f'PyTorch: {what}') == (None if torch is None else '77.1 (1)')


def test_several_protocols_and_suites_are_told_apart():
  records = [*_shift_records(('resnet18',)), *_shift_records(
    ('resnet10', 'augshift'), ('flowers',), suite='other', protocol='circular, s = 2')]
  head, *rows = _rows(report.table(records))
  assert head[:4] == ['suite', 'network', 'dataset', 'protocol']
  assert 'gapjax: consistency' in head
  assert [row[:4] for row in rows] == [
    ['other, small', 'ResNet-10', 'flowers', 'circular, s = 2'],
    ['other, small', 'AugShift', 'flowers', 'circular, s = 2'],
    ['table2, small', 'ResNet-18', 'cifar10', 'pad, s = 4']]


def test_other_protocols_are_columns_where_a_record_has_them():
  """Named by what was done; a dash where a network was not measured so."""
  records = _shift_records(('resnet18', 'augshift'))
  known = {'task': 'classification', 'network': 'augshift', 'dataset': 'cifar10', 'suite': 'table2',
           'scale': 'small', 'cell': 'augshift/cifar10', 'n': 3}
  for name, protocol, value in (('crop', 'crop, s = 4', .876), ('circular', 'circular, s = 3', .5)):
    records.insert(0, {**known, 'metric': f'consistency_{name}', 'protocol': protocol,
                       'mean': value, 'std': .01})
  head, plain, augshift = _rows(report.table(records))
  assert head[5:] == ['gapjax: consistency (pad, s = 4)', 'gapjax: consistency (crop, s = 4)',
                      'gapjax: consistency (circular, s = 3)', 'gapjax: feature distance']
  assert augshift[6:8] == ['87.6 ± 1.0 (3)', '50.0 ± 1.0 (3)']
  assert plain[6:8] == ['\N{EN DASH}'] * 2
  assert len(_rows(report.table(_shift_records(('augshift',))))[0]) == 7


def test_a_table_of_many_columns_may_leave_the_margins(tmp_path):
  for more, wide in (({'paper': None}, False), ({'torch': TWIN}, True)):
    _write(tmp_path / 'results.json', [{**r, 'detail': None, **more} for r in _shift_records()])
    page = report.build(tmp_path).read_text(encoding='utf-8')
    assert ('<div class="scroll wide">' in page) == wide


def test_a_cell_that_is_half_known():
  """The paper's columns are there where it says anything."""
  record, dash = {'cell': 'augshift/cifar10', 'task': 'classification', 'network': 'augshift',
                  'dataset': 'cifar10', 'metric': 'consistency', 'mean': .5}, '\N{EN DASH}'
  row = _rows(report.table([record]))[1]
  assert row == ['AugShift', 'cifar10', dash, '50.0 (1)', dash]
  row = _rows(report.table([{**record, 'paper': .948}]))[1]
  assert row == ['AugShift', 'cifar10', dash, dash, '94.8', '50.0 (1)', dash]


# --- the page --------------------------------------------------------------------------------


def test_a_map_of_one_point_is_not_drawn(tmp_path):
  records = _shift_records(('resnet18',))
  for record in records:
    if 'detail' in record:
      record['detail']['shifts'] |= {'offsets': [0], 'accuracy_map': [[.5]], 'protocols': {}}
  _write(tmp_path / 'results.json', records)
  report.build(tmp_path)
  assert not (tmp_path / 'report' / 'accuracy_maps.png').exists()
  assert 'Where accuracy is lost' not in _html(tmp_path)


def test_what_is_gained_at_the_same_accuracy(tmp_path):
  records = _shift_records(('resnet18', 'augshift', 'blurpool'))
  learned = {'resnet18': ((.6, .7), (.8, .9)), 'augshift': ((.5, .7), (.9, .98)),
             'blurpool': ((.4, .5), (.75, .6), (.65, .8), (.75, .9))}  # twice at .7
  for record in records:
    if 'detail' in record:
      points = learned[record['network']]
      record['detail']['curves'] = {
        name: [[step, point[i]] for step, point in enumerate(points)]
        for i, name in enumerate(('eval_accuracy', 'eval_consistency'))}
  _write(tmp_path / 'results.json', records)
  report.build(tmp_path)
  part = _markdown(tmp_path).split('## At the same accuracy')[1].split('##')[0]
  rows = [re.split(r' *\| *', line)[1:-1] for line in part.splitlines() if line.startswith('|')]
  # At 80% AugShift had .7 + .28 * 3 / 4 = .91; at 75% the plain network .85, BlurPool .9 at last.
  assert rows[2:] == [['BlurPool', 'cifar10', '+0.0', '+5.0', '75.0'],
                      ['AugShift', 'cifar10', '+8.0', '+1.0', '80.0']]


def test_rebuilding_changes_no_byte(shifts):
  folder = shifts / 'report'
  before = {path.name: path.read_bytes() for path in folder.iterdir()}
  assert set(before) == {'README.md', 'report.html', 'consistency.png', 'at_accuracy.png',
                         'accuracy_maps.png', 'shift_curves.png'}
  report.build(shifts)
  assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
  assert not any(b'Software' in data for data in before.values())
  page = before['report.html'].decode()
  assert not re.search(r'https?://|url\(|@import|<script|<link|<iframe', page)
  assert page.count('<img') == 5


def test_the_page_says_what_is_compared_and_measured(shifts):
  mean = {(r['network'], r['metric']): r['mean'] for r in json.loads(
    (shifts / 'results.json').read_text())}
  beyond = 100 * (mean['augshift', 'consistency'] - mean['two_crops', 'consistency'])
  for text in (_html(shifts), _markdown(shifts)):
    assert 'Can a loss make a network translation invariant?' in text
    for words in ('the fair control is two crops at weight 0', 'This run uses a narrow ResNet-18',
                  'same for two random shifts of the same image; protocol pad, s = 4 (each shift',
                  'on 1,500 test images, mean over seeds', 'not 0 to 100%', 'input, pixels',
                  'Training images as the network sees them; with two', 'sum over both'):
      assert words in text
    assert 'GAPNet' not in text and 'BlurPool' not in text
    assert f'{beyond:+.1f} (2 seeds) than two crops without the loss, and the squared ' in text
    assert 'canvas' not in text.replace('samples.png', '')
  records = {(r['cell'], r['metric']): r['mean'] for r in json.loads(
    (shifts / 'results.json').read_text())}
  for network, name in (('resnet18', 'ResNet-18'), ('augshift', 'AugShift')):
    top, consistency = (100 * records[f'{network}/cifar10', metric]
                        for metric in ('image_accuracy', 'consistency'))
    assert (f'<dt>{consistency:.1f}%</dt><dd>consistency on cifar10: {name} (top-1 {top:.1f}%)'
            in _html(shifts).replace('\N{NON-BREAKING HYPHEN}', '-'))


def test_both_claims_on_one_page(tmp_path):
  _write(tmp_path / 'results.json', [
    *_shift_records(('augshift', 'resnet10'), ('digits',), suite='quickstart', scale='digits'),
    *_records(), {'schema': 2, 'cell': 'something', 'metric': 'miou', 'mean': .5}])
  _picture(tmp_path / 'cells/resnet10/digits/seed0')  # that of no pair, where no pair has one
  _picture(tmp_path / 'cells/permutenet/image/3x3/seed0', grid=3)
  page = report.build(tmp_path).read_text(encoding='utf-8')
  assert re.findall(r'!\[.*\]\((.*)\)', _markdown(tmp_path)) == [
    '../cells/permutenet/image/3x3/seed0/samples.png', 'locations.png', 'curves.png',
    '../cells/resnet10/digits/seed0/samples.png', 'consistency.png', 'at_accuracy.png',
    'accuracy_maps.png', 'shift_curves.png']
  assert '<h1>What global average pooling keeps' in page
  headings = re.findall(r'<(h[23])>(.*?)</h', page)
  assert headings == [
    ('h2', 'First claim: position survives global pooling'), ('h3', 'What the paper compares'),
    ('h3', 'What the network sees'), ('h3', 'Where it succeeds'), ('h3', 'How it learned'),
    ('h2', 'Second claim: AugShift makes networks translation invariant'),
    ('h3', 'What the paper compares'), ('h3', 'What the network sees'),
    ('h3', 'How far the image moves'), ('h3', 'At the same accuracy'),
    ('h3', 'Where accuracy is lost'), ('h3', 'How it learned'),
    ('h2', 'Other results'), ('h2', 'How it was made')]
  assert headings == [(f'h{len(marks)}', text) for marks, text in re.findall(
    r'^(##+) (.*)$', _markdown(tmp_path), re.M)]
  assert page.count('small handwritten digits') == 1
  assert page.index('GAPNet pools') < page.index('AugShift shows') < page.index('something')


def test_single_run(tmp_path):
  _run(tmp_path, 'task=classification', 'data.name=digits', 'eval.shift=2', 'augshift.crops=2',
       'augshift.weight=1.',
       final={'image_accuracy': .912, 'consistency': .876, 'feature_distance': .0321, 'loss': .5},
       shifts=_detail('augshift', .912, .876)['shifts'], points=(
         {'step': 9, 'split': 'train', 'loss': 2., 'accuracy': .2, 'relative_distance': .1},
         {'step': 9, 'split': 'eval', 'accuracy': .5, 'consistency': .6, 'loss': 1.}))
  page = report.build(tmp_path).read_text(encoding='utf-8')
  for text in ('>91.2 (1)<', '>87.6 (1)<', '>0.032 (1)<', 'protocol pad, s = 2', 'pairs stand one',
               'consistency; the dotted'):
    assert text in page
  assert page.count('<img') == 4 and 'mean over seeds' not in page


def test_a_network_is_told_in_a_sentence():
  lines = report.told([*_shift_records(('augshift',)), *_records()], headings=True)
  assert [line for line in lines if 'claim:' in line] == [
    'First claim: position survives global pooling',
    'Second claim: AugShift makes networks translation invariant']
  assert len(lines) == 2 + 1 + len({r['cell'] for r in _records()})
  mean = {r['metric']: 100 * r['mean'] for r in _shift_records(('augshift',))}
  top, agree = mean['image_accuracy'], mean['consistency']
  assert f'AugShift names {top:.1f}% of the images' in lines[-1] and f'{agree:.1f}% of' in lines[-1]
  found = next(100 * r['mean'] for r in _records() if (r['network'], r['metric']) == (
    'gapnet', 'location_accuracy'))
  assert f'GAPNet finds {found:.1f}% of the places; guessing finds 11.1%' in lines


# --- pictures --------------------------------------------------------------------------------


def test_consistency_is_drawn_higher_for_the_more_consistent(tmp_path):
  cells = [ShiftPanel(name, 'cifar10', protocols={'circular': [1.], 'pad': [.97, at]})
           for name, at in (('augshift', .94), ('two_crops', .8))]
  plots_shifts.consistency_curves(cells, tmp_path / 'x.png')
  picture = pixels(tmp_path / 'x.png')[120:]  # without the legend
  pad = picture[:, :picture.shape[1] // 2]  # the known order of protocols, not the dict's
  better, worse = (where(pad, plots.LINES[i]) for i in (0, 3))
  assert len(better) and len(worse)
  assert better[:, 0].max() < worse[:, 0].max() - 100
  assert worse[worse[:, 0].argmax(), 1] > worse[:, 1].mean()  # it falls to the right


def test_networks_are_compared_at_the_accuracy_that_both_passed(tmp_path):
  cells = [ShiftPanel(name, 'cifar10', eval_accuracy=[(2, .7), (1, .5), (4, .9)],
                      eval_consistency=[(1, at), (2, at + .1), (3, .1)])
           for name, at in (('augshift', .8), ('two_crops', .7))]
  assert cells[0].learned == [(.5, .8), (.7, .9)]  # at the steps that have both
  found = [plots_shifts.consistency_at(cells[0], accuracy) for accuracy in (.5, .65, .7)]
  np.testing.assert_allclose(found, [.8, .875, .9])
  assert plots_shifts.consistency_at(cells[0], .71) is None
  plots_shifts.at_accuracy(cells, tmp_path / 'x.png')
  picture = pixels(tmp_path / 'x.png')[120:]  # without the legend
  better, worse = (where(picture, plots.LINES[i]) for i in (0, 3))
  for part in (better, worse):  # each rises to the right, where its dot is
    assert part[part[:, 0].argmin(), 1] > part[:, 1].mean()
  assert better[:, 0].min() < worse[:, 0].min() - 50
  assert better[:, 0].max() < worse[:, 0].max() - 50


def test_a_map_is_hot_where_the_accuracy_is(tmp_path):
  hot = np.full((3, 3), .2)
  hot[2, 0] = .6  # dy = 2, down; dx = -2, left
  cells = [ShiftPanel(name, 'cifar10', offsets=OFFSETS, accuracy_map=values.tolist())
           for name, values in (('resnet18', hot), ('augshift', np.full((3, 3), .2)))]
  plots_shifts.accuracy_maps(cells, tmp_path / 'x.png')
  picture = pixels(tmp_path / 'x.png')
  picture = picture[:, :int(.87 * picture.shape[1])]  # without the colour bar
  # The scale ends at the data's own range.
  full, empty = (where(picture, plots.ACCURACY_MAP(value, bytes=True)[:3], 2) for value in (1., 0.))
  assert 15 < len(empty) / len(full) < 19  # one square against eight and nine
  left = empty[empty[:, 1] < picture.shape[1] // 2]
  assert full[:, 0].min() > np.median(left[:, 0]) and full[:, 1].max() < np.median(left[:, 1])


def test_a_sweep_is_one_point_a_setting(tmp_path):
  networks = ['resnet18', *(f'augshift,weight={w},max_shift={s}' for s in (8, 4)
                            for w in ('10', '0.3', '1'))]
  _write(tmp_path / 'results.json', _shift_records(networks, suite='augshift_sweep'))
  page = report.build(tmp_path).read_text(encoding='utf-8')
  assert page.count('<img') == 4 and 'sweep.png' in _markdown(tmp_path)
  assert '<h1>AugShift: how strong' in page and page.count('the most consistent setting') == 1
  names = [row[0] for row in _rows(report.table(_shift_records(networks)))[1:]]
  assert names == ['ResNet-18', *(f'AugShift, weight {w}, shift {s}' for s in (4, 8)
                                  for w in ('0.3', '1', '10'))]
  picture = pixels(tmp_path / 'report/sweep.png')
  assert all(len(where(picture, plots.weight_color(rank, 3))) > 150 for rank in range(3))


def test_a_sweeps_better_setting_stands_up_and_right(tmp_path):
  cells = [ShiftPanel('augshift', 'cifar10', accuracy=at, consistency=at,
                      settings={'weight': w, 'max_shift': 4}) for w, at in ((0, .7), (1, .9))]
  plots_shifts.sweep(cells, tmp_path / 'x.png')
  picture = pixels(tmp_path / 'x.png')
  worse, better = (where(picture, plots.weight_color(rank, 2)).mean(0) for rank in (0, 1))
  assert better[0] < worse[0] - 100 and better[1] > worse[1] + 100


def test_one_look_a_network_and_all_different():
  augshift, *others = (ShiftPanel(name, 'cifar10') for name in (
    'augshift', 'resnet18', 'unshifted', 'circular', 'full_padding', 'blurpool', 'blurpool_4',
    'aps', 'lps', 'two_crops', 'augshift_blurpool', 'augshift_aps', 'mine', 'other'))
  looks = plots.looks([*others, augshift])
  assert len({str(look) for look in looks.values()}) == len(looks) == 14
  assert looks['AugShift'] == plots.looks([augshift])['AugShift']
