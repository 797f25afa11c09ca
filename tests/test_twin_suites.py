"""The column PyTorch of a suite: its twins trained, added up and shown."""

import json
import sys

import numpy as np
import pytest
from conftest import tiny_config
from test_twin import one_thread  # noqa: F401 - a fixture

from gapjax import cli
from gapjax import config as configs
from gapjax.reproduce import loop, suites

torch = pytest.importorskip('torch')

from gapjax.pytorch import train  # noqa: E402


def found_in(path):
  return json.loads((path / 'results.json').read_text())


def test_a_suite_with_torch(tmp_path, data_dir, monkeypatch):
  """First without, then the twin alone of what is trained, then another seed of both, then nothing.
  gapjax's own training is made up."""
  cell = suites.Cell(tiny_config(), {'network': 'gapnet'})
  monkeypatch.setitem(suites.SUITES, 'table1', lambda scale: [cell])
  trained = []

  def ours(config, *, workdir, **_):
    workdir.mkdir(parents=True)
    (workdir / 'samples.png').write_bytes(b'\x89PNG\r\n\x1a\n' + bytes(32))
    (workdir / 'metrics.jsonl').write_text(
      '{"step": 5, "split": "eval", "accuracy": 0.5, "loss": 1.0}\n')
    trained.append(('gapjax', config.seed))
    return {'config': configs.as_json(config), 'step': 5,
            'final': {'location_accuracy': .5, 'loss': 1.0},
            'best': {'location_accuracy_best_random': .5, 'step': 5}, 'wall_seconds': 1.0,
            'images_per_second': 1.0, 'device': 'cpu x 1', 'versions': {'cuda': '12'},
            'sizes': {'chance': .25}, 'commit': loop.commit()}

  def theirs(config, **rest):
    trained.append(('torch', config.seed))
    return train_twin(config, **rest)

  train_twin = train.train
  monkeypatch.setattr(loop, 'train', ours)
  monkeypatch.setattr(train, 'train', theirs)

  def reproduce(*more):
    trained.clear()
    assert cli.main(['reproduce', 'table1', '--scale=small', f'--workdir={tmp_path}',
                     f'--data_dir={data_dir}', *more]) == 0
    return list(trained), (tmp_path / 'report/README.md').read_text()

  runs, page = reproduce()
  assert runs == [('gapjax', 0)]
  assert 'PyTorch' not in page and {r['torch'] for r in found_in(tmp_path)} == {None}
  runs, page = reproduce('--with_torch')
  assert runs == [('torch', 0)]
  assert 'PyTorch |' in page and '--seeds=1 --with_torch' in page
  (tmp_path / 'run.json').unlink()
  runs, page = reproduce('--with_torch', '--seeds=2')
  assert runs == [('gapjax', 1), ('torch', 1)]
  records = found_in(tmp_path)
  assert len(records) == 2
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
  assert said['versions']['torch'] == torch.__version__ and said['versions']['cuda'] == '12'
  assert said['device'] == f'cpu x 1; {summary["device"]}'  # gapjax's and the twin's
  assert reproduce('--with_torch', '--seeds=2') == ([], page)
  assert found_in(tmp_path) == records


@pytest.mark.parametrize(('suite', 'words'), [
  ('ablations', '--with_torch: the tables of ablations have no column for PyTorch; '
   'those of table1, table2, augshift_sweep do'),
  ('table1', '--with_torch needs PyTorch: pip install torch, or leave it out'),
  ('attack', '--with_torch: the tables of attack have no column for PyTorch')])
def test_no_twin_is_said_before_anything_is_trained(suite, words, tmp_path, monkeypatch, complaint):
  if suite == 'table1':
    monkeypatch.setitem(sys.modules, 'torch', None)  # as if it were not installed
  assert words in complaint('reproduce', suite, f'--workdir={tmp_path}/w', '--with_torch')
  assert not (tmp_path / 'w').exists()


def test_a_twin_in_bfloat16_is_refused_at_once(tmp_path, data_dir, monkeypatch, complaint):
  cell = suites.Cell(tiny_config(**{'model.dtype': 'bfloat16'}), {'network': 'gapnet'})
  monkeypatch.setitem(suites.SUITES, 'table1', lambda scale: [cell])
  words = complaint('reproduce', 'table1', f'--workdir={tmp_path}/w', f'--data_dir={data_dir}',
                    '--with_torch')
  assert 'float32 or float64; not in canvas, bfloat16' in words and not (tmp_path / 'w').exists()
