"""Suites in limited time, several in one command, and one in several."""

import dataclasses
import functools
import sys

import jax
import pytest
from conftest import ROOT, refused
from test_suites import ABOUT, LINES, _stub, _summary

from gapjax import cli, config
from gapjax.errors import UsageError
from gapjax.paths import read_json, write_json
from gapjax.records import schema
from gapjax.reproduce import loop, records, suites
from gapjax.training import build

sys.path.append(str(ROOT / 'benchmarks'))
import merge_results


def test_minutes_begin_what_ends_in_time(monkeypatch, tmp_path, data_dir):
  """By the seconds that those before took for an operation: of the same work as one that took 300
  of 400 s no other ends in time, of a tenth of it one does. One that was begun before takes less
  than that, which tells nothing."""
  now = [0.0]
  monkeypatch.setattr(loop.time, 'monotonic', lambda: now[0])
  base = suites.quickstart('tiny')[0]
  items = [(n, (0, dataclasses.replace(base, identity={'network': name}, config=config.replaced(
    base.config, num_epochs=epochs)), {'trained'})) for n, (name, epochs) in enumerate(
      (('resumed', 20), ('first', 20), ('same', 20), ('tenth', 2), ('another', 2), ('long', 80)))]
  resumed = tmp_path / 'cells' / items[0][1][1].name / 'seed0'
  resumed.mkdir(parents=True)
  (resumed / 'config.json').write_text('{}')
  pace, begun = loop.Pace(401 / 60, data_dir), []
  for _, (_, cell, _) in pace.in_time(items, tmp_path):
    begun.append(cell.fields['network'])
    now[0] += 1 if begun == ['resumed'] else 15 * cell.config.num_epochs
  assert begun == ['resumed', 'first', 'tenth', 'another']
  assert len([*loop.Pace(None, data_dir).in_time(items, tmp_path)]) == 6


def test_no_attack_begins_when_the_minutes_are_over(monkeypatch, tmp_path, data_dir, caplog):
  """What was trained is kept, and the same command attacks it."""
  cell = suites.attack('small')[1]
  monkeypatch.setitem(suites.SUITES, 'quickstart', lambda scale: [cell])
  monkeypatch.setattr(loop.TASKS['canvas'], 'check_data', lambda *_, **__: None)
  monkeypatch.setattr(loop.Pace, '_work', lambda *_: 1.0)
  trained, now, attacked = _stub(monkeypatch, [cell]), [0.0], []
  made_up = loop.train

  def train(*args, **how):
    now[0] += 100
    return {**made_up(*args, **how), 'final': {'location_accuracy': .5}, 'best': {}}

  def attack_run(folder, **_):
    attacked.append(folder)
    raise UsageError('an attack has begun, after all')

  monkeypatch.setattr(loop.time, 'monotonic', lambda: now[0])
  monkeypatch.setattr(loop, 'train', train)
  monkeypatch.setattr(loop, 'attack_run', attack_run)
  monkeypatch.setattr(loop.report, 'build', lambda workdir: workdir)
  how = dict(scale='tiny', seeds=1, workdir=tmp_path, data_dir=data_dir, command='',
             progress=False)
  loop.run('quickstart', pace=loop.Pace(1, data_dir), **how)
  assert len(trained) == 1 and not attacked
  assert caplog.messages[-1].startswith('not finished in time: gapnet/location/3x3 seed 0;')
  assert [r['metric'] for r in schema.read(tmp_path / 'results.json')] == ['location_accuracy']
  refused(lambda: loop.run('quickstart', pace=loop.Pace(9, data_dir), **how), 'has begun')
  assert len(attacked) == 1


@pytest.mark.slow
def test_what_minutes_cut_off_is_gone_on_with(tmp_path, data_dir, capfd, caplog, monkeypatch):
  """To the same numbers as one that was not."""
  monkeypatch.setattr(loop, 'train', functools.partial(loop.train,
                                                      devices=jax.local_devices()[:1]))

  def reproduce(workdir, *flags):
    assert cli.main(['reproduce', 'ablations', '--scale=small', f'--workdir={tmp_path / workdir}',
                     f'--data_dir={data_dir}', '--cells=permute_at=never/location/3x3 '
                     'permute_at=fixed/location/3x3', '--config.model.width=4',
                     '--config.data.image_size=8', '--config.num_epochs=2',
                     '--config.data.train_images=96', '--config.eval.images=50', *flags]) == 0
    return capfd.readouterr().err

  reproduce('mine', '--minutes=0.05')
  assert caplog.messages[-1] == (
    'not finished in time: permute_at=never/location/3x3 seed 0, '
    'permute_at=fixed/location/3x3 seed 0; the same command goes on')
  assert not (tmp_path / 'mine/results.json').exists()
  reproduce('mine', '--minutes=100')
  reproduce('other')
  mine, other = ([(r['cell'], r['metric'], r['values']) for r in schema.read(
    tmp_path / name / 'results.json')] for name in ('mine', 'other'))
  assert mine == other and len({cell for cell, *_ in mine}) == 2


def test_several_suites_take_turns_by_worth(monkeypatch, tmp_path, capsys):
  """Table 1 at 3x3, then CIFAR-10's networks, then the rest; a workdir each."""
  trained = _stub(monkeypatch, [*suites.table1('small'), *suites.table2('small')])
  for task in ('canvas', 'classification'):
    monkeypatch.setattr(loop.TASKS[task], 'check_data', lambda *_, **__: None)
  argv = ['reproduce', 'table2', 'table1', '--scale=small', f'--workdir={tmp_path}']
  assert cli.main(argv) == 0
  names = [line.removesuffix(' 0') for line in trained]
  assert names[:6] == ['permutenet/location/3x3', 'gapnet/image/3x3', 'permutenet/image/3x3',
                       'gapnet/location/3x3', 'resnet18/cifar10', 'augshift/cifar10']
  assert names[8:10] == ['gapnet/location/7x7', 'permutenet/location/7x7']
  assert len(names) == len({*names}) == 12 + 24
  assert capsys.readouterr().out.count('\nreport: ') == 2
  assert {r['suite'] for r in schema.read(tmp_path / 'table1/results.json')} == {'table1'}
  refused(lambda: suites.by_worth(['table1', 'table2'], 'small', 'gapnet/* augshfit/*'), 'augshfit')
  assert suites.by_worth(['table1', 'table2'], 'small', '*/3x3 aps/* */7x7') == [
    ('table1', '*/3x3 */7x7'), ('table2', 'aps/*')]


def test_several_suites_refuse_before_the_first_is_trained(monkeypatch, tmp_path, complaint):
  """What only the second suite lacks, and fields in which a later cell differs."""
  trained = _stub(monkeypatch, suites.table1('small'))
  argv = ['reproduce', 'table1', 'table2', '--scale=small', f'--workdir={tmp_path}/w',
          f'--data_dir={tmp_path}']
  monkeypatch.setattr(loop.TASKS['canvas'], 'check_data', lambda *_, **__: None)
  assert 'gapjax prepare cifar10' in complaint(*argv)
  assert 'the cells differ in it' in complaint(*argv, '--config.num_epochs=2')
  monkeypatch.setattr(loop.TASKS['classification'], 'check_data', lambda *_, **__: None)
  (tmp_path / 'w/table2').mkdir(parents=True)
  (tmp_path / 'w/table2/results.json').write_text(
    (ROOT / 'results/table2_full/results.json').read_text())
  assert 'of another suite, scale or config' in complaint(*argv)
  cell = suites.table2('small')[0]
  records.write(tmp_path / 'w/table2/results.json', records.add(
    [], cell, seed=0, summary=_summary(cell, 0), lines=LINES, **ABOUT))
  monkeypatch.setattr(loop, 'commit', lambda: 'b')
  assert 'resnet18/cifar10 was trained by commit 0' in complaint(*argv, '--seeds=2')
  assert not trained


def test_a_suite_reads_a_dataset_once(monkeypatch, data_dir):
  c, load, calls = suites.quickstart('tiny')[0].config, build.TASKS['canvas'].load_split, []
  monkeypatch.setattr(build.TASKS['canvas'], 'load_split', staticmethod(
    lambda *args, **how: calls.append(how) or load(*args, **how)))
  with build.datasets_kept():
    sets = [build.load_data(c, data_dir=data_dir) for _ in range(3)]
    assert len(calls) == 2 and sets[0][0] is sets[2][0]  # training and test
    build.load_data(config.replaced(c, data=dict(image_size=4)), data_dir=data_dir)
    assert len(calls) == 4
  build.load_data(c, data_dir=data_dir)
  assert len(calls) == 6


def test_workdirs_of_one_suite_are_joined(tmp_path):
  """To what they were before they were parted; nothing is counted twice, and nothing half."""
  whole = schema.read(ROOT / 'results/table1_full/results.json')
  about = read_json(ROOT / 'results/table1_full/run.json')
  for name in sorted({record['cell'] for record in whole}):
    folder = tmp_path / name.replace('/', '-')
    picture = folder / 'cells' / name / 'seed0/samples.png'
    picture.parent.mkdir(parents=True)
    picture.write_bytes(name.encode())
    records.write(folder / 'results.json', [r for r in whole if r['cell'] == name])
    write_json(folder / 'run.json', {**about, 'command': f'train {name}', 'wall_seconds': 2.5})
  first, *others = sorted(tmp_path.iterdir())
  merge_results.main(tmp_path / 'out', first)
  merge_results.main(tmp_path / 'out', *others)
  found = schema.read(tmp_path / 'out/results.json')
  assert sorted(map(str, found)) == sorted(map(str, whole))
  run = read_json(tmp_path / 'out/run.json')
  assert run['wall_seconds'] == 7.5 and run['device'] == about['device']
  assert sorted(run['command'].splitlines()) == sorted({f'train {r["cell"]}' for r in whole})
  assert {record['cell'] for record in whole} == {
    str(picture.relative_to(tmp_path / 'out/cells').parents[1]) if picture.read_text() else ''
    for picture in (tmp_path / 'out').glob('cells/**/samples.png')}
  for name in ('alone', 'longer'):
    (tmp_path / name).mkdir()
  records.write(tmp_path / 'alone/results.json', schema.read(first / 'results.json'))
  records.write(tmp_path / 'longer/results.json', [
    {**r, 'cell': 'another', 'changes': ['num_epochs=9']} for r in whole])
  write_json(tmp_path / 'longer/run.json', about)
  for wrong, message in ((first, 'is in two of them'), (ROOT / 'results/table2', 'several suites'),
                         (tmp_path / 'none', 'holds no results.json'),
                         (tmp_path / 'alone', 'alone holds no run.json'),
                         (tmp_path / 'longer', 'scales or changes.*num_epochs=9')):
    refused(lambda wrong=wrong: merge_results.main(tmp_path / 'out', wrong), message)
  assert schema.read(tmp_path / 'out/results.json') == found
