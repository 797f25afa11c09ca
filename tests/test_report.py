"""Reports: numbers against the JSON, bytes against a rebuild."""

import base64
import json
import re
import shutil

import numpy as np
import pytest
from conftest import refused
from PIL import Image

from gapjax import config, paths
from gapjax.data.sheet import Sheet
from gapjax.errors import UsageError
from gapjax.records import runs
from gapjax.report import page as report
from gapjax.report import render
from gapjax.report.plots import base as plots

TWIN = {'values': [.771], 'seeds': [0], 'mean': .771, 'std': None, 'n': 1}
PAPER = {'gapnet/location/3x3': 1.0, 'permutenet/location/3x3': .788, 'gapnet/image/3x3': .826}


def _detail(k, accuracy, chance, steps=80):
  falling = 2.2 * np.exp(-np.arange(steps) / 9) + .01
  return {
    'per_location': np.full((k, k), accuracy).tolist(), 'chance': chance,
    'curves': {'train_loss': [[i * 5, float(v)] for i, v in enumerate(falling)],
               'eval_accuracy': [[29, accuracy / 2], [400, accuracy]]},
    'wall_seconds': [14.0, 15.0], 'images_per_second': 2400.4, 'train_images': 1397,
    'test_images': 400, 'epochs': 24, 'steps': 700, 'batch_size': 48, 'input_size': 48,
    'model': 'resnet10 width 16', 'parameters': 310000}


def _records(torch=None, grids=(3,)):
  """A suite's records in a wrong order: the report has one of its own."""
  rng, records = np.random.default_rng(0), []
  for target in ('image', 'location'):
    for k in reversed(grids):
      for network in ('permutenet_fixed', 'permutenet', 'gapnet'):
        name = f'{network}/{target}/{k}x{k}'
        for suffix in ('', '_best_random'):
          values = rng.uniform(.3, .99, 2).round(4)
          records.append({
            'schema': 2, 'suite': 'quickstart', 'scale': 'digits', 'cell': name,
            'task': 'canvas', 'network': network, 'target': target, 'grid': k,
            'dataset': 'cifar10',
            'metric': f'{target}_accuracy{suffix}',
            'torch': torch if suffix and network != 'permutenet_fixed' else None,
            'paper': PAPER.get(name) if suffix else None, 'values': values.tolist(),
            'seeds': [0, 1], 'mean': float(values.mean()), 'std': float(values.std(ddof=1)),
            'n': 2, 'config': {}})
          if not suffix:
            chance = k ** -2 if target == 'location' else .1
            records[-1]['detail'] = _detail(k, float(values.mean()), chance)
  return records


def _write(path, value):
  path.write_text(json.dumps(value), encoding='utf-8')


def save_samples(path, grid, value=.4):
  """A picture of two training inputs."""
  pixels = np.full((8, 8, 3), round(255 * value), np.uint8)
  Sheet([(name, pixels) for name in 'ab'], 2, grid=grid).save(path)


@pytest.fixture(scope='module')
def suite(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('suite')
  _write(workdir / 'results.json', _records())
  _write(workdir / 'run.json', {
    'command': 'gapjax quickstart <script>alert(1)</script>',
    'device': 'cpu x 1 (<i>fast</i> & | loud)',
    'versions': {'gapjax': '0.1.0', 'jax': '0.10.2'}, 'wall_seconds': 180.3,
    'began': '2026-11-25', 'ended': '2026-11-26'})
  run = workdir / 'cells/gapnet/location/3x3/seed1'  # the first seed's may be lost
  run.mkdir(parents=True)
  save_samples(run / 'samples.png', 3)
  report.build(workdir)
  return workdir


def _html(workdir):
  return (workdir / 'report/report.html').read_text(encoding='utf-8')


def _markdown(workdir):
  return (workdir / 'report/README.md').read_text(encoding='utf-8')


def _rows(markdown):
  """The cells of a Markdown table: head, then rows."""
  lines = [line for line in markdown.splitlines() if line.startswith('|')]
  rows = [[cell.strip() for cell in re.split(r'(?<!\\)\|', line)[1:-1]] for line in lines]
  return [rows[0], *rows[2:]]


def test_rebuilding_changes_no_byte(suite):
  folder = suite / 'report'
  before = {path.name: path.read_bytes() for path in folder.iterdir()}
  assert set(before) == {'README.md', 'report.html', 'locations.png', 'curves.png'}
  assert report.build(str(suite)) == folder / 'report.html'
  assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
  assert not any(b'Software' in data for data in before.values())


def test_every_suite_and_run_of_a_folder_is_reported(suite, tmp_path):
  """And what is neither, such as a results.json of something else, is left alone."""
  shutil.copytree(suite, tmp_path / 'b', ignore=shutil.ignore_patterns('report'))
  (tmp_path / 'c').mkdir()
  (tmp_path / 'a').mkdir()
  _run(tmp_path / 'c', final={'location_accuracy': 0.5})
  _write(tmp_path / 'a/results.json', {'networks': {}})
  (tmp_path / 'notes.txt').write_text('')
  pages = [tmp_path / f'{name}/report/report.html' for name in 'bc']
  assert report.build_all(tmp_path) == pages
  assert pages[0].read_bytes() == (suite / 'report/report.html').read_bytes()
  assert not (tmp_path / 'a/report').exists() and '50.0' in pages[1].read_text()
  assert report.build_all(suite) == [suite / 'report/report.html']
  (tmp_path / 'b/results.json').write_text('[')  # one that is broken does not keep the others back
  shutil.rmtree(tmp_path / 'c/report')
  refused(lambda: report.build_all(tmp_path), 'b/results.json line 1')
  assert pages[1].exists()
  shutil.rmtree(tmp_path / 'b')
  shutil.rmtree(tmp_path / 'c')
  refused(lambda: report.build_all(tmp_path), 'holds neither')


def test_html_loads_nothing_from_elsewhere(suite):
  page = _html(suite)
  loads = re.findall(r'(?:src|srcset|href|data|action)\s*=\s*["\']?([^"\'\s>]{0,20})', page)
  assert len(loads) == 3 and all(load.startswith('data:image/png;base64'[:20]) for load in loads)
  assert not re.search(r'https?://|url\(|@import|<script|<link|<iframe', page)
  assert 'prefers-color-scheme:dark' in page and 'name="viewport"' in page


def test_embedded_pictures_are_the_pngs_on_a_card_of_their_own(suite):
  links = re.findall(r'!\[[^\]]+\]\(([^)]+)\)', _markdown(suite))
  assert links == ['../cells/gapnet/location/3x3/seed1/samples.png', 'locations.png', 'curves.png']
  found = re.findall(r'base64,([A-Za-z0-9+/=]+)" width="(\d+)"', _html(suite))
  for (text, width), link in zip(found, links, strict=True):
    path = suite / 'report' / link
    assert base64.b64decode(text, validate=True) == path.read_bytes()
    with Image.open(path) as image:
      assert 400 < image.width < 3000 and 200 < image.height < 6000
      assert int(width) == round(.6 * image.width)  # 160 dots an inch, of which CSS has 96
      # A contact sheet is transparent, with grey letters; what is drawn here has a card.
      card = (0, 0, 0, 0) if link.endswith('samples.png') else (255, 255, 255, 255)
      assert image.convert('RGBA').getpixel((0, 0)) == card


def test_days_are_told(suite):
  assert ['date', '2026-11-25 to 2026-11-26'] in _rows(_markdown(suite).split('How it was made')[1])


def test_text_is_escaped(suite):
  page, markdown = _html(suite), _markdown(suite)
  assert '<pre>gapjax quickstart &lt;script&gt;alert(1)&lt;/script&gt;</pre>' in page
  assert '(&lt;i&gt;fast&lt;/i&gt; &amp; | loud)' in page and '<i>' not in page
  assert r'cpu x 1 (&lt;i&gt;fast&lt;/i&gt; &amp; \| loud)' in markdown


def test_every_heading_and_number_is_in_both_renderings(suite):
  page, markdown = _html(suite), _markdown(suite)
  headings = re.findall(r'<h2>(.*?)</h2>', page)
  assert headings == re.findall(r'^## (.*)$', markdown, re.M) == [
    'Results', 'What the paper compares', 'What the network sees', 'Where it succeeds',
    'How it learned', 'How it was made']
  in_html = re.findall(r'<td[^>]*>(.*?)</td>', page)
  in_markdown = [cell.replace(r'\|', '|') for row in _rows(markdown) for cell in row
                 if row[0] not in ('network', 'the paper says', '')
                 and not row[0].startswith('---')]
  assert len(in_html) > 60 and in_html == in_markdown
  assert '<tr><td class="w k">duration</td><td class="w">3 min 0 s</td></tr>' in page
  assert '<td class="w">310,000</td>' in page and '<td class="w">14.5 s</td>' in page
  assert page.count('<tr class="break">') == 2
  exact = next(r for r in _records() if r['metric'] == 'location_accuracy'
               and r['cell'].startswith('gapnet'))
  assert f'<dt>{100 * exact["mean"]:.1f}%</dt><dd>location accuracy of GAPNet' in page


def test_markdown_is_protected_from_its_own_marks():
  table = render.Table(['a_b', '*c*'], [['permutenet_fixed', '`x` [y] _z_']])
  assert render.markdown_table(table).splitlines()[-1].endswith(r'\`x\` \[y\] \_z\_ |')
  assert 'permutenet_fixed' in render.markdown_table(table)


# --- the table -------------------------------------------------------------------------------


@pytest.mark.parametrize('torch', [None, TWIN])
def test_table_parses_back_to_the_json(torch):
  records = _records(torch, grids=(3, 7))
  head, *rows = _rows(report.table(records))
  assert ('PyTorch' in head) == (torch is not None)
  names = {name: key for key, name in plots.NETWORKS.items()}
  order = [(row[1], row[2], names[row[0]]) for row in rows]
  assert order == [(target, f'{k}\N{MULTIPLICATION SIGN}{k}', network)
                   for target in ('location', 'image') for k in (3, 7)
                   for network in ('gapnet', 'permutenet', 'permutenet_fixed')]
  by_name = {(r['cell'], r['metric']): r for r in records}
  for (target, grid, network), row in zip(order, rows, strict=True):
    cell = f'{network}/{target}/{grid[0]}x{grid[0]}'
    said, dash = dict(zip(head, row, strict=True)), '\N{EN DASH}'
    paper = PAPER.get(cell)
    assert said['paper'] == (dash if paper is None else f'{100 * paper:.1f}')
    assert torch is None or said['PyTorch'] == (dash if 'fixed' in network else '77.1 (1)')
    assert float(said['chance']) == pytest.approx(
      10 if target == 'image' else 100 / int(grid[0]) ** 2, abs=.05)
    for column, metric in (('gapjax: best epoch, random placement', '_best_random'),
                           ('gapjax: every location, final weights', '')):
      mean, std, n = re.fullmatch(r'([\d.]+) . ([\d.]+) \((\d+)\)', said[column]).groups()
      record = by_name[cell, f'{target}_accuracy{metric}']
      assert float(mean) == pytest.approx(100 * record['mean'], abs=.051)
      assert float(std) == pytest.approx(100 * record['std'], abs=.051)
      assert int(n) == 2


def test_table_of_one_seed_and_an_unfinished_cell():
  record = {**_records()[-1], 'metric': 'location_accuracy', 'mean': .5, 'std': None, 'n': 1,
            'paper': None, 'detail': {'chance': 1 / 9}}
  (row,) = _rows(report.table([record]))[1:]
  assert row[3:] == ['\N{EN DASH}', '\N{EN DASH}', '50.0 (1)', '11.1']


def test_other_suites_get_a_plain_table(tmp_path):
  records = [{'schema': 2, 'suite': 'mine', 'scale': 'full', 'cell': 'a/b', 'metric': metric,
              'paper': .948, 'mean': mean, 'std': .0123, 'n': 3}
             for metric, mean in (('miou', .951), ('loss', 1.23456))]
  head, first, second = _rows(report.table(records))
  assert head == ['cell', 'metric', 'paper', 'gapjax']
  assert first == ['a/b', 'miou', '94.8', '95.1 \N{PLUS-MINUS SIGN} 1.2 (3)']
  assert second[-1].startswith('1.235')
  _write(tmp_path / 'results.json', records)
  assert 'a/b' in report.build(tmp_path).read_text(encoding='utf-8')
  assert 'How it was made' not in _html(tmp_path)  # nothing is known
  mixed = report.table([*records, {**records[0], 'suite': 'other', 'torch': TWIN}, *_records()])
  assert mixed.count('| best epoch') + mixed.count('gapjax: best epoch') == 1
  assert 'other, full' in mixed and '77.1 (1)' in mixed


def _run(workdir, *fields, points=(), **summary):
  """A run's files, of a default config with fields of its own ('model.head=permuted')."""
  c = config.with_fields(config.default(), [f'--config.{field}' for field in fields])
  _write(workdir / 'summary.json', {
    'config': config.as_json(c), 'step': 1700, 'final': {}, 'best': {}, 'wall_seconds': 3725.0,
    'images_per_second': 1234.5, 'sizes': {'chance': .1, 'train_images': 1397},
    'device': 'cpu x 1', 'versions': {'jax': '0.10.2'}, 'commit': '0123456789ab', **summary})
  (workdir / 'metrics.jsonl').write_text(''.join(json.dumps(point) + '\n' for point in points))
  save_samples(workdir / 'samples.png', 3)
  return workdir


@pytest.fixture
def run(tmp_path):
  points = [{'step': s, 'split': 'train', 'loss': 2 - s / 100, 'accuracy': .2} for s in (9, 19)]
  points += [{'step': 19, 'split': 'eval', 'accuracy': a, 'loss': 1.} for a in (.1, .4)]
  points += [{'step': 19, 'split': 'final', 'accuracy': .4}]
  return _run(
    tmp_path, 'model.head=permuted', 'model.permutation=fixed', 'canvas.target=location',
    'canvas.grid=3', points=points, final={'location_accuracy': .4321, 'loss': 1.23456},
    best={'location_accuracy_best_random': .5555, 'step': 29}, per_location=[[.1, .5, None]] * 3,
    sizes={'chance': 1 / 9, 'train_images': 1397})


def test_a_run_is_reported_as_the_suite_with_one_cell(run):
  page = report.build(run).read_text(encoding='utf-8')
  for text in ('<h1>PermuteNet, fixed order: location, 3', '>43.2 (1)<', '>55.5 (1)<', '>11.1<',
               '>1 h 2 min<', '>1,234<', '>0123456789ab<', '>optimizer.lr<', '>0.001<', '>1,700<',
               'canvas.'):
    assert text in page
  assert page.count('<img') == 3 and 'mean over seeds' not in page
  assert 'a single run' in page and 'first seed' not in page


def test_a_resumed_run_counts_the_last_value_of_a_step(run):
  curves = runs.curves(paths.read_lines(run / 'metrics.jsonl'))
  assert curves == {'eval_accuracy': [[19, .4]], 'train_loss': [[9, 1.91], [19, 1.81]]}


# --- mistakes --------------------------------------------------------------------------------


def _refused(workdir, *words):
  with pytest.raises(UsageError) as error:
    report.build(workdir)
  assert '\n' not in str(error.value)
  for word in words:
    assert word in str(error.value)
  assert not (workdir / 'report/report.html').exists()


def test_nothing_there(tmp_path):
  _refused(tmp_path, 'results.json', 'summary.json')
  _refused(tmp_path / 'nowhere', 'results.json')


@pytest.mark.parametrize(('text', 'words'), [
  (b'[\n{"cell": "a",\n]', ['results.json line 3']), (b'{}', ['results.json', 'list']),
  (b'[]', ['results.json', 'empty']),
  (b'[{"schema": 2, "cell": "a", "mean": 1}]', ['entry 0', '`metric`']),
  (b'[{"cell": "a", "metric": "b", "mean": 1}]', ['entry 0', 'schema 2', 'move the file away']),
  (b'[{"schema": 2, "cell": "a", "metric": "b", "mean": 1, "values": 3}]',
   ['entry 0', '`values` is 3']),
  (b'[3]', ['entry 0']), (b'\xff\xfe[', ['results.json', 'UTF-8']),
  (b'[' * 100_000, ['results.json', 'too deep']),
  (b'[' + b'9' * 5_000 + b']', ['results.json', 'too long a number'])])
def test_broken_results(tmp_path, text, words):
  (tmp_path / 'results.json').write_bytes(text)
  _refused(tmp_path, *words)


@pytest.mark.parametrize(('key', 'value', 'words'), [
  ('final', None, 'no `final`'), ('sizes', [1], '`sizes` is [1]'), ('step', '9', '`step` is "9"')])
def test_a_summary_with_a_wrong_field(run, key, value, words):
  summary = json.loads((run / 'summary.json').read_text())
  changed = {**summary, key: value} if value else {k: v for k, v in summary.items() if k != key}
  (run / 'summary.json').write_text(json.dumps(changed))
  _refused(run, f'{run}/summary.json is not as gapjax writes it: {words}')


@pytest.mark.parametrize(('line', 'words'), [
  ({'split': 'eval'}, 'no `step`'), ({'step': 3}, 'no `split`'),
  ({'step': '3', 'split': 'eval'}, '`step` is "3"')])
def test_a_line_of_metrics_without_its_step_or_split(run, line, words):
  with (run / 'metrics.jsonl').open('a') as file:
    file.write(json.dumps(line) + '\n')
  _refused(run, f'{run}/metrics.jsonl line 6 is not as gapjax writes it: {words}')


def test_broken_metrics_and_pictures(run):
  with (run / 'metrics.jsonl').open('a') as file:
    file.write('{"step": 29, "spl')
  shutil.rmtree(report.build(run).parent)  # what a killed process leaves is no mistake
  with (run / 'metrics.jsonl').open('a') as file:
    file.write('\n')
  _refused(run, 'metrics.jsonl line 6')
  (run / 'metrics.jsonl').unlink()
  (run / 'samples.png').write_bytes(b'GIF89a')
  _refused(run, 'samples.png')
