"""The column PyTorch of a suite: its twins trained, added up and shown."""

import json
import sys

import numpy as np
import pytest
from conftest import tiny_config
from test_twin import PAIRS, one_thread  # noqa: F401 - a fixture

from gapjax import cli
from gapjax import config as configs
from gapjax.report import page as report
from gapjax.reproduce import loop, suites

torch = pytest.importorskip('torch')

from gapjax.pytorch import train  # noqa: E402


def found_in(path):
  return json.loads((path / 'results.json').read_text())


def test_a_suite_with_torch(tmp_path, data_dir, monkeypatch):
  """First without, then the twin alone of what is trained, then another seed of both, then nothing.
  gapjax's own training is made up."""
  both = [suites.Cell(tiny_config(), {'network': 'gapnet'}),
          suites.Cell(tiny_config(**PAIRS), {'network': 'augshift'})]
  monkeypatch.setitem(suites.SUITES, 'table1', lambda scale: both)
  trained = []

  def ours(config, *, workdir, **_):
    workdir.mkdir(parents=True)
    (workdir / 'samples.png').write_bytes(b'\x89PNG\r\n\x1a\n' + bytes(32))
    (workdir / 'metrics.jsonl').write_text(
      '{"step": 5, "split": "eval", "accuracy": 0.5, "loss": 1.0}\n')
    trained.append(('gapjax', config.task, config.seed))
    metrics = ({'location_accuracy': .5} if config.task == 'canvas' else
               {'image_accuracy': .5, 'consistency': .5, 'feature_distance': .5})
    best = 'location_accuracy_best_random' if config.task == 'canvas' else 'image_accuracy_best'
    return {'config': configs.as_json(config), 'step': 5, 'final': {**metrics, 'loss': 1.0},
            'best': {best: .5, 'step': 5}, 'shifts': {'protocol': 'pad, s = 2'},
            'wall_seconds': 1.0, 'images_per_second': 1.0, 'device': 'cpu x 1', 'sizes': {},
            'commit': None}

  def theirs(config, **rest):
    trained.append(('torch', config.task, config.seed))
    return train_twin(config, **rest)

  train_twin = train.train
  monkeypatch.setattr(loop, 'train', ours)
  monkeypatch.setattr(loop, 'commit', lambda: None)
  monkeypatch.setattr(train, 'train', theirs)

  def reproduce(*more):
    trained.clear()
    assert cli.main(['reproduce', 'table1', '--scale=small', f'--workdir={tmp_path}',
                     f'--data_dir={data_dir}', *more]) == 0
    return list(trained), (tmp_path / 'report/README.md').read_text()

  runs, page = reproduce()
  assert runs == [('gapjax', 'canvas', 0), ('gapjax', 'classification', 0)]
  assert 'PyTorch' not in page and {r['torch'] for r in found_in(tmp_path)} == {None}
  runs, page = reproduce('--with_torch')
  assert runs == [('torch', 'canvas', 0), ('torch', 'classification', 0)]
  assert 'PyTorch |' in page and '--seeds=1 --with_torch' in page
  runs, page = reproduce('--with_torch', '--seeds=2')
  assert runs == [(which, task, 1) for task in ('canvas', 'classification')
                  for which in ('gapjax', 'torch')]
  records = found_in(tmp_path)
  assert len(records) == 6
  for record in records:
    assert record['seeds'] == record['torch']['seeds'] == [0, 1] and record['mean'] == .5
    values = []
    for seed in (0, 1):
      summary = json.loads(
        (tmp_path / f'cells/{record["cell"]}/seed{seed}/torch/summary.json').read_text())
      assert summary['config']['seed'] == seed
      values.append({**summary['final'], **summary['best']}[record['metric']])
    assert record['torch']['values'] == values and record['torch']['n'] == 2
    assert record['torch']['mean'] == pytest.approx(np.mean(values))
    assert record['torch']['std'] == pytest.approx(np.std(values, ddof=1))
  said = json.loads((tmp_path / 'run.json').read_text())
  assert said['versions']['torch'] == torch.__version__
  assert reproduce('--with_torch', '--seeds=2') == ([], page)
  assert found_in(tmp_path) == records


def test_tables_show_the_twin():
  """Mean, standard deviation and number, worked out by hand; a dash where it was not trained."""
  torch = {'values': [.4, .6], 'seeds': [0, 1], 'mean': .5, 'std': .1414, 'n': 2}
  known = {'suite': 'table1', 'scale': 'full', 'paper': .8, 'values': [.7], 'seeds': [0],
           'mean': .7, 'std': None, 'n': 1}
  place = {'task': 'canvas', 'target': 'location', 'grid': 3, 'dataset': 'cifar10',
           'metric': 'location_accuracy_best_random'}
  table = report.table([
    {**known, **place, 'cell': 'gapnet/location/3x3', 'network': 'gapnet', 'torch': torch},
    {**known, **place, 'cell': 'permutenet/location/3x3', 'network': 'permutenet', 'torch': None},
    *({**known, 'task': 'classification', 'network': 'augshift', 'dataset': 'cifar10',
       'cell': 'augshift/cifar10', 'metric': metric, 'torch': torch}
      for metric in ('image_accuracy', 'consistency')),
    {**known, 'cell': 'something', 'metric': 'feature_distance', 'torch': torch}])
  rows = [[cell.strip() for cell in line.strip('|').split('|')] for line in table.splitlines()]
  said = {row[0]: row for row in rows}
  assert said['GAPNet'][3:6] == ['80.0', '50.0 \N{PLUS-MINUS SIGN} 14.1 (2)', '70.0 (1)']
  assert said['PermuteNet'][3:6] == ['80.0', '\N{EN DASH}', '70.0 (1)']
  assert said['AugShift'][2:8] == 2 * ['80.0', '50.0 \N{PLUS-MINUS SIGN} 14.1 (2)', '70.0 (1)']
  assert said['something'][2:] == ['0.800', '0.500 \N{PLUS-MINUS SIGN} 0.141 (2)', '0.700 (1)']


@pytest.mark.parametrize(('suite', 'words'), [
  ('ablations', '--with_torch: the tables of ablations have no column for PyTorch; '
   'those of table1, table2, augshift_sweep do'),
  ('table1', '--with_torch needs PyTorch: pip install torch, or leave it out'),
  ('attack', '--with_torch: the tables of attack have no column for PyTorch')])
def test_no_twin_is_said_before_anything_is_trained(suite, words, tmp_path, monkeypatch, capsys):
  if suite == 'table1':
    monkeypatch.setitem(sys.modules, 'torch', None)  # as if it were not installed
  assert cli.main(['reproduce', suite, f'--workdir={tmp_path}/w', '--with_torch']) == 2
  [line] = capsys.readouterr().err.splitlines()
  assert words in line and not (tmp_path / 'w').exists()
