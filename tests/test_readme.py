"""What the README says is what the repository holds."""

import re

import flax.linen as nn
import jax
import numpy as np
import pytest
from conftest import ROOT

from gapjax import cells, config, report, suites
from gapjax.pytorch import parity
from gapjax.render import markdown_table
from gapjax.workdirs import read_json

README = (ROOT / 'README.md').read_text()


@pytest.mark.parametrize(('suite', 'scale', 'printed'), [
  ('quickstart', 'digits', 'README.md'), ('table2', 'small', 'README.md'),
  ('attack', 'small', 'README.md'),
  ('augshift_sweep', 'small', 'results/README.md')])
def test_tables_are_what_the_command_printed(suite, scale, printed):
  records = suites.read_records(ROOT / 'results' / suite / 'results.json')
  shown = (ROOT / printed).read_text().split(f'<!-- table: {suite} -->\n')[1]
  shown = re.match(r'(?:(?:\|.*)?\n)+', shown)[0].strip().split('\n\n')
  everything = report.table(records).split('\n\n')
  assert shown[0] and not [table for table in shown if table not in map(str.strip, everything)]
  trained = {cell.name: cell for cell in cells.SUITES[suite](scale)}
  for record in records:  # and the code still trains what was measured
    assert suites.holds(record, trained[suites.trained_cell(record)])


def test_the_table_of_parity_is_what_the_command_printed():
  """As `gapjax convert --check` prints it, and every difference is rounding."""
  found = read_json(ROOT / 'results/parity/results.json')['networks']
  assert list(found) == [case.name for case in parity.cases()]
  for table in parity.tables(found):
    assert markdown_table(table) in README
  assert not any(parity.too_large(row) for row in found.values())


def test_the_example_of_a_network_of_ones_own_trains():
  """60 steps of it, as it stands in the README: the loss falls."""
  names, draw = {}, np.random.default_rng(0)
  exec(README.split('<!-- example: your own network -->\n```python\n')[1].split('```')[0], names)
  labels = draw.integers(0, 10, 16)
  images = np.float32(draw.normal(size=(16, 12, 12, 3)) + labels[:, None, None, None])
  params = names['network'].init(jax.random.key(0), images)
  opt_state, losses = names['optimizer'].init(params), []
  for step in range(60):
    params, opt_state, loss, distance = names['train_step'](params, opt_state, jax.random.key(step),
                                                            images, labels)
    losses.append(float(loss))
    assert 0 < float(distance) < 2
  assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


def test_the_example_of_ranking_and_attack_runs(tmp_path, monkeypatch):
  """With networks of one's own in place of `body` and `head`: 20 N, two orders, a CSV file."""
  draw = np.random.default_rng(0)
  body = nn.Sequential([nn.Conv(2048, (1, 1)), nn.relu])
  head = nn.Dense(3)
  images = draw.normal(size=(2, 4, 6, 3)).astype(np.float32)
  variables = {**body.init(jax.random.key(0), images)}
  last = head.init(jax.random.key(1), np.zeros((1, 2048), np.float32))
  names = {'body': body, 'variables': variables, 'images': images,
           'head': type('Head', (), {'apply': staticmethod(lambda v, x: head.apply(last, x))}),
           'batches': [{'images': images, 'labels': draw.integers(0, 3, (2, 4, 6))}]}
  monkeypatch.chdir(tmp_path)
  exec(README.split('<!-- example: ranking and attack -->\n```python\n')[1].split('```')[0], names)
  assert sorted(names['overall']) == list(range(2048))
  assert len((tmp_path / 'attack.csv').read_text().splitlines()) == 1 + 4 * (1 + 20 * 6)


def test_files_and_links_exist():
  targets = re.findall(r'\]\((?!http|#)([^)]+)\)', README) + re.findall(r'configs/\w+\.py', README)
  assert len(targets) > 8
  assert [t for t in targets if not (ROOT / t.partition('#')[0]).exists()] == []


def test_configs_and_variants_that_it_names_are_read():
  variants = re.findall(r'configs/\w+\.py(?::[\w=,]+)?', README)
  assert len(variants) > 4
  for variant in variants:
    config.from_flags([f'--config={ROOT}/{variant}'])


def test_continuous_integration_runs_the_readmes_test_command():
  block = README.split('<!-- tests -->\n')[1].split('```')[1]
  [command] = block.splitlines()[1:]
  assert command.startswith('python3 -m venv') and command.endswith('pytest -q')
  assert "sed -n '/^<!-- tests -->$/,/^```$/p' README.md" in (ROOT / '.ci' / 'run').read_text()
