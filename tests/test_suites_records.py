"""What a suite's files say of its training: when, where and by which code, and how long it took."""

import datetime
import json
import types

import jax
import pytest
from conftest import refused, tiny_config
from test_suites import ABOUT, LINES, _stub, _summary

from gapjax.errors import Interrupted, UsageError
from gapjax.paths import read_json
from gapjax.reproduce import loop, records, suites
from gapjax.training import train as training
from gapjax.training.system import describe_devices, versions


def test_commands_for_some_cells_add_up(monkeypatch, tmp_path, data_dir):
  """Each keeps what the others of the same workdir trained, and the report names them all."""
  trained = _stub(monkeypatch, suites.quickstart('tiny'))
  (tmp_path / 'run.json').write_text(json.dumps({'began': '2026-01-31', 'ended': '2026-01-31'}))
  for only in ('resnet10/*', 'augshift/*', 'resnet10/* augshift/*'):
    loop.run('quickstart', scale='tiny', seeds=1, workdir=tmp_path, data_dir=data_dir,
             command=f'only {only}', only=only)
  assert trained == ['resnet10/digits 0', 'augshift/digits 0']
  found = json.loads((tmp_path / 'results.json').read_text())
  assert [r['cell'] for r in found] == ['resnet10/digits'] * 6 + ['augshift/digits'] * 6
  run = json.loads((tmp_path / 'run.json').read_text())
  assert run['command'] == 'only resnet10/*\nonly augshift/*'
  assert (run['began'], run['ended']) == ('2026-01-31', datetime.date.today().isoformat())
  assert run['device'] == 'cpu x 1; cpu x 2'  # each machine that trained some of them
  page = (tmp_path / 'report' / 'README.md').read_text()
  assert '](../cells/augshift/digits/seed0/samples.png)' in page  # of the first pair
  assert '    only resnet10/*\n    only augshift/*' in page


def test_a_workdir_is_a_runs_or_a_suites(monkeypatch, tmp_path, data_dir):
  """One report would be taken for the other's; nothing is trained and nothing lost."""
  trained = _stub(monkeypatch, suites.quickstart('tiny'))
  for name, what, begin in (
      ('run.json', 'of gapjax reproduce', lambda there: training.train(
        tiny_config(), workdir=there, data_dir=data_dir, progress=False)),
      ('config.json', 'of a run', lambda there: loop.run(
        'quickstart', scale='tiny', seeds=1, workdir=there, data_dir=data_dir, command=''))):
    there = tmp_path / name.removesuffix('.json')
    there.mkdir()
    (there / name).write_text('{}')
    refused(lambda begin=begin, there=there: begin(there), f'is the workdir {what}; use another')
    assert not trained and {path.name for path in there.iterdir()} <= {name, '.lock'}


def test_the_time_of_a_cell_that_is_cut_off_counts(monkeypatch, tmp_path, data_dir):
  """On the machine that trained it until then, and from the day on which it began."""
  _stub(monkeypatch, suites.quickstart('tiny'))
  made_up, clock, today = loop.train, [0.0], ['2026-01-30']

  def train(config_, **how):
    clock[0], today[0] = clock[0] + 40, '2026-01-31'
    if clock[0] == 40:
      raise Interrupted('saved', code=130)
    return {**made_up(config_, **how), 'versions': {'jax': 'of gapjax'}}

  day = types.SimpleNamespace(today=lambda: datetime.date.fromisoformat(today[0]))
  monkeypatch.setattr(loop, 'train', train)
  monkeypatch.setattr(loop.time, 'perf_counter', lambda: clock[0])
  monkeypatch.setattr(loop, 'datetime', types.SimpleNamespace(date=day))
  how = dict(scale='tiny', seeds=1, workdir=tmp_path, data_dir=data_dir, command='again',
             only='resnet10/*', progress=False)
  with pytest.raises(Interrupted):
    loop.run('quickstart', **how)
  here = describe_devices(jax.devices())
  assert not (tmp_path / 'results.json').exists()
  assert read_json(tmp_path / 'run.json') == {
    'began': '2026-01-30', 'ended': '2026-01-31', 'command': 'again', 'device': here,
    'versions': versions(), 'wall_seconds': 40.0}
  loop.run('quickstart', **how)
  run = read_json(tmp_path / 'run.json')
  assert (run['wall_seconds'], run['device']) == (80.0, f'{here}; cpu x 1')


def test_results_are_never_without_their_run(monkeypatch, tmp_path, data_dir):
  """Whatever kills the process after one of the files was written."""
  _stub(monkeypatch, suites.quickstart('tiny'))
  write, kept = loop.write, []

  def seen(path, found):
    kept.append(read_json(path.with_name('run.json')))
    write(path, found)

  monkeypatch.setattr(loop, 'write', seen)
  loop.run('quickstart', scale='tiny', seeds=1, workdir=tmp_path, data_dir=data_dir, command='',
           only='resnet10/* augshift/*', progress=False)
  assert [run['device'] for run in kept] == ['cpu x 1', 'cpu x 1; cpu x 2']


@pytest.mark.parametrize('order', [1, -1])
def test_two_runs_are_joined_in_either_order(order):
  """As where workdirs are merged: from the first day to the last, with all versions of each."""
  runs = [{'began': f'2026-01-{begin}', 'ended': f'2026-01-{end}', 'command': f'run {begin}',
           'device': 'cpu x 1', 'versions': {'jax': jax_, **more}, 'wall_seconds': 1.5}
          for begin, end, jax_, more in (('02', '09', '0.10.2', {'flax': '1'}),
                                         ('03', '04', '0.11.2', {'flax': '1', 'torch': '2'}))]
  first, second = runs[::order]
  run = records.joined(records.joined({}, first), second)
  assert (run['began'], run['ended'], run['wall_seconds']) == ('2026-01-02', '2026-01-09', 3.0)
  assert run['versions'] == {
    'jax': ', '.join(['0.10.2', '0.11.2'][::order]), 'flax': '1', 'torch': '2'}
  assert records.joined(run, second) == {**run, 'wall_seconds': 4.5}  # nothing is listed twice


def test_seeds_of_two_commits_are_not_averaged(monkeypatch, tmp_path, data_dir):
  """Said before anything is trained; what is there stays, and other cells may be of another one."""
  trained = _stub(monkeypatch, suites.quickstart('tiny'))

  def reproduce(commit, **more):
    monkeypatch.setattr(loop, 'commit', lambda: commit)
    loop.run('quickstart', scale='tiny', workdir=tmp_path, data_dir=data_dir, command='', **more)

  reproduce('0', seeds=1, only='resnet10/*')
  before = (tmp_path / 'results.json').read_bytes()
  with pytest.raises(UsageError, match=r'resnet10/digits was trained by commit 0.*is of b: .* not '
                                       'averaged; take .* or another --workdir'):
    reproduce('b', seeds=2, only='resnet10/*')
  assert (tmp_path / 'results.json').read_bytes() == before and len(trained) == 1
  reproduce('b', seeds=1, only='augshift/*')
  assert len(trained) == 2
  cell = suites.quickstart('tiny')[0]
  found = records.add([], cell, seed=0, summary=_summary(cell, 0), lines=LINES, **ABOUT)
  assert {r['commit'] for r in found} == {'0'}
  with pytest.raises(UsageError, match='commits are not averaged'):
    records.add(found, cell, seed=1, summary={**_summary(cell, 1), 'commit': 'b'}, lines=LINES,
                **ABOUT)


def test_twins_of_two_commits_are_not_averaged(monkeypatch):
  """Said before anything is trained; of an old twin the commit is not known."""
  cell = suites.table2('small')[0]
  summary = _summary(cell, 0)
  found = records.add([], cell, seed=0, summary=summary, lines=LINES, **ABOUT)
  monkeypatch.setattr(loop, 'commit', lambda: '0')
  for then, said in (('a', 'a'), (None, 'unknown')):
    twinned = records.add_torch(found, cell, seed=0, summary={**summary, 'commit': then})
    if then is None:
      for record in twinned:
        del record['torch']['commit']
    message = f'the PyTorch twin of resnet18/cifar10 was trained by commit {said}, .* is of 0'
    refused(lambda there=twinned: loop.to_train(there, [cell], seeds=2, twin=True), message)
    refused(lambda there=twinned: records.add_torch(there, cell, seed=1, summary=summary), message)
    assert loop.to_train(twinned, [cell], seeds=1, twin=True) == []
    assert loop.to_train(twinned, [cell], seeds=2, twin=False) == [(1, cell, {'trained'})]


def test_a_run_that_two_commits_trained_says_both(monkeypatch, tmp_path, data_dir):
  """A checkpoint of before, which does not say whose it is, is gone on with as ever."""
  def run(commit, **how):
    monkeypatch.setattr(training, 'commit', lambda: commit)
    return training.train(tiny_config(), workdir=tmp_path, data_dir=data_dir, progress=False,
                          devices=jax.local_devices()[:1], **how)

  with pytest.raises(Interrupted):
    run('a', until=0.0)
  assert run('b')['commit'] == 'a, b'
  for meta, said in (({}, 'b'), ({'commit': 'b'}, 'b'), ({'commit': 'a, b'}, 'a, b'),
                     ({'commit': None}, 'unknown, b')):
    assert training.commits(meta) == said


def test_no_seed_is_trained_beside_one_that_was_resumed_by_other_code(monkeypatch, tmp_path,
                                                                      data_dir):
  trained = _stub(monkeypatch, suites.quickstart('tiny'))
  made_up = loop.train
  monkeypatch.setattr(loop, 'commit', lambda: 'b')
  monkeypatch.setattr(loop, 'train', lambda *args, **how: {
    **made_up(*args, **how), 'commit': 'a, b'})
  refused(lambda: loop.run('quickstart', scale='tiny', seeds=2, workdir=tmp_path, command='',
                           data_dir=data_dir, only='resnet10/*', progress=False),
          'resnet10/digits was trained by commit a, b, and another seed is of b')
  assert trained == ['resnet10/digits 0']
