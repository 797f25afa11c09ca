"""examples/: the scripts as they are, and the notebook from top to bottom."""

import json
import re
import runpy
import sys

import numpy as np
import pytest
from conftest import ROOT

EXAMPLES = ROOT / 'examples'


def test_ranking_and_attack_of_a_torch_network():
  """By the definition, in torch: mirrored images, and nothing but the classifier's bias at last."""
  torch = pytest.importorskip('torch')
  found = runpy.run_path(str(EXAMPLES / 'rank_torch.py'))
  x = torch.tensor(found['images']).permute(0, 3, 1, 2)
  with torch.no_grad():
    z, mirrored = (found['body'](y[:1397]).mean((2, 3)).numpy() for y in (x, x.flip(3)))
    predicted = found['pool'](found['body'](x[1397:])).argmax(1).numpy()
  scores = np.abs(z - mirrored).mean(0, dtype=float)
  assert (np.diff(scores[found['order']]) <= 1e-6).all() and scores.max() > 0
  ours, random = (found['accuracy'][name].mean(0) for name in ('position', 'random'))
  sides = found['sides'][1397:]
  assert ours[0] == random[0] == (predicted == sides).mean() > 0.9
  assert ours[-1] == (found['pool'][2].bias.argmax().item() == sides).mean()
  assert ours.mean() < random.mean() - 0.1


@pytest.mark.parametrize('given', [True, False])
def test_consistency_of_a_file(given, tmp_path, monkeypatch, capsys):
  """Weights of zeros name one class for all."""
  torch = pytest.importorskip('torch')
  network = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), *[torch.nn.Identity()] * 3,
                                torch.nn.Linear(16, 10))
  torch.save({name: 0 * x for name, x in network.state_dict().items()}, tmp_path / 'zeros.pth')
  script = str(EXAMPLES / 'consistency_pth.py')
  monkeypatch.setattr(sys, 'argv', [script, *[str(tmp_path / 'zeros.pth')] * given])
  torch.manual_seed(0)
  value = runpy.run_path(script)['found'].value
  assert value == 1 if given else 0.5 < value < 1
  assert capsys.readouterr().out.startswith(f'{value:.1%} of 400 images')


@pytest.mark.slow
def test_augshift_in_a_flax_loop(capsys):
  runpy.run_path(str(EXAMPLES / 'augshift_flax.py'))
  *distances, last = capsys.readouterr().out.splitlines()
  distances = [float(line.split()[-1]) for line in distances]
  assert len(distances) == 3 and distances[-1] < 0.9 * distances[0]
  accuracy, consistency = map(float, re.findall(r'0\.\d+', last))
  assert accuracy > 0.8 and consistency > 0.8


def notebook():
  import nbformat
  return nbformat.read(EXAMPLES / 'tour.ipynb', as_version=4)


@pytest.mark.slow
def test_the_notebook_from_top_to_bottom(data_dir, monkeypatch):
  import nbformat
  from nbclient import NotebookClient
  tour, values = notebook(), nbformat.v4.new_code_cell(
    'import json; print(json.dumps([*map(float, [right["GAPNet"].mean(), '
    'right["PermuteNet"].mean(), *found.values(), *(curves[name].mean() for name in curves)])]))')
  tour.cells.append(values)
  monkeypatch.setenv('TFDS_DATA_DIR', str(data_dir))
  monkeypatch.setenv('XLA_FLAGS', '')
  NotebookClient(tour, timeout=1800).execute()
  [printed] = [output.text for output in values.outputs if output.get('name') == 'stdout']
  knows, permuted, plain, control, augshift, ours, random = json.loads(printed)
  assert knows > 0.95 and permuted < 0.5  # guessing: 0.11
  assert plain < 0.5 and min(control, augshift) > 0.8
  assert ours < random - 0.05


def test_the_notebook_has_its_pictures():
  kinds = [kind for cell in notebook().cells for output in cell.get('outputs', ())
           for kind in output.get('data', ())]
  assert kinds.count('image/png') == 4
  assert (EXAMPLES / 'tour.ipynb').stat().st_size < 200_000
