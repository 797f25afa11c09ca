"""A few faults of the chaos script on a real training, and the losses that its judge must see."""

import json
import re
import shutil
import types

import chaos
import chaos_judge as judge
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

KINDS = ('during a checkpoint', 'truncated checkpoint', 'no data')


@pytest.fixture(scope='module')
def chaotic(tmp_path_factory):
  """(exit code, the script's folder, its results' folder) after one round of three faults."""
  folder, output = (tmp_path_factory.mktemp(name) for name in ('chaos', 'results'))
  code = chaos.main(['--rounds=1', '--epochs=16', '--seed=27', f'--folder={folder}',
                     f'--output={output}', '--kinds', *KINDS])
  return code, folder, output


@pytest.fixture
def copied(chaotic, tmp_path):
  """(a copy of the undisturbed run with its last checkpoints, the run itself)."""
  _, folder, _ = chaotic
  early = {str(step) for step in judge.complete(folder / 'undisturbed')[:-2]}
  shutil.copytree(folder / 'undisturbed', tmp_path / 'run',
                  ignore=lambda path, names: early & set(names))
  return tmp_path / 'run', folder / 'undisturbed'


@pytest.mark.slow
def test_a_disturbed_run_ends_as_the_undisturbed_one(chaotic):
  code, folder, output = chaotic
  results = json.loads((output / 'results.json').read_text())
  [record] = results['rounds']
  assert code == 0 and record['outcome'] in ('equal', 'repaired') and not record['wrong'], record
  for fault in ('SIGKILL with .*tmp', 'files of .* truncated', 'no data for'):
    assert re.search(fault, '\n'.join(record['faults'])), record
  assert record['restarts'] >= 2
  assert results['kinds']['all'] == {'rounds': 1, 'equal': 0, 'repaired': 0, 'loss': 0, 'missed': 0,
                                     'skipped': 0, record['outcome']: 1,
                                     'restarts': record['restarts']}
  assert not (folder / 'round_0').exists() and (folder / 'scenes').exists()
  page = (output / 'README.md').read_text()
  assert results['device'] in page and 'python tests/chaos.py --rounds=1' in page
  assert str(folder) not in page + (output / 'results.json').read_text()


def change_parameter(run, step):
  """One parameter of a checkpoint, by one bit."""
  state = judge.states(run)[step]
  shutil.rmtree(run / 'checkpoints' / str(step))
  leaf = next(leaf for leaf in jax.tree.leaves(state['params']) if leaf.ndim)
  leaf.flat[0] = np.nextafter(leaf.flat[0], np.float32(np.inf))
  with ocp.CheckpointManager((run / 'checkpoints').absolute()) as manager:
    manager.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(state)))


def edit_log(run, change):
  path = run / 'metrics.jsonl'
  lines = path.read_text().splitlines(keepends=True)
  change(lines)
  path.write_text(''.join(lines))


def other_value(lines):
  number = next(i for i, line in enumerate(lines) if '"eval"' in line)
  value = json.loads(lines[number])
  lines[number] = json.dumps({**value, 'loss': value['loss'] + 1e-9}) + '\n'


def cut_newest(run):
  for path in (run / 'checkpoints' / str(max(judge.complete(run)))).rglob('*'):
    if path.is_file():
      path.write_bytes(path.read_bytes()[:10])


LOSSES = {
  'is not the undisturbed': lambda run: change_parameter(run, max(judge.complete(run))),
  'cannot be read': cut_newest,
  'the newest checkpoint is of step': lambda run: shutil.rmtree(
    run / 'checkpoints' / str(max(judge.complete(run)))),
  'is logged 2 times': lambda run: edit_log(run, lambda lines: lines.insert(3, lines[2])),
  'is not logged': lambda run: edit_log(run, lambda lines: lines.pop(2)),
  'should not be logged': lambda run: edit_log(
    run, lambda lines: lines.append('{"split": "train", "step": 1000}\n')),
  'has other values': lambda run: edit_log(run, other_value),
  'not whole lines': lambda run: edit_log(run, lambda lines: lines.append('{"step": 4')),
  'summary.json is missing': lambda run: (run / 'summary.json').unlink(),
  'final of summary.json differs': lambda run: (run / 'summary.json').write_text(
    (run / 'summary.json').read_text().replace('"final": {', '"final": {"more": 1,')),
}


def test_the_judge_finds_nothing_wrong_with_a_copy(copied):
  assert judge.not_ended(*copied) == []


@pytest.mark.parametrize('said', LOSSES)
def test_the_judge_sees_a_loss(copied, said):
  run, reference = copied
  LOSSES[said](run)
  [wrong] = judge.not_ended(run, reference)
  assert said in wrong


def test_the_judge_sees_that_no_good_checkpoint_is_left(copied):
  run, reference = copied
  older, newest = judge.complete(run)
  assert judge.not_intact(run, reference, least=newest) == []
  change_parameter(run, newest)
  assert judge.not_intact(run, reference, least=older) == []
  assert judge.not_intact(run, reference, least=newest) != []
  assert judge.not_intact(run / 'nothing', reference, least=0) == []


def test_a_line_cut_in_two_by_a_stop_is_the_mean_of_both():
  whole = {'split': 'train', 'step': 4, 'loss': 2.5, 'accuracy': 0.25, 'grad_norm': 1.0,
           'learning_rate': 0.1, 'images_per_second': 7.0}
  first = {**whole, 'step': 1, 'loss': 4.0, 'learning_rate': 0.4}
  second = {**whole, 'loss': 2.0, 'images_per_second': None}  # 2.5 = (4 + 2 + 2 + 2) / 4
  assert judge.log_differs([first, second], [whole], stopped={1}) == []
  assert judge.log_differs([first, second], [whole]) == ['train 1 should not be logged']
  assert judge.log_differs([first, {**second, 'loss': 2.1}], [whole], stopped={1}) == [
    'train 4 has other values']


def test_what_a_clear_error_is():
  assert judge.not_clear('3 steps\ngapjax: there is no disk\n') == []
  assert judge.not_clear('gapjax: there is no disk\nException ignored in: f\n')
  assert judge.not_clear('gapjax: a\ngapjax: b\n')
  assert judge.not_clear('Traceback (most recent call last):\ngapjax: a\n')


def test_a_failure_that_the_supervisor_gives_up_on_is_a_loss(tmp_path):
  """restart.sh starts the command 3 times; exit code 1 is neither an end nor a clear error."""
  (tmp_path / 'disk').mkdir()
  ground = types.SimpleNamespace(
    data=tmp_path, reference=tmp_path, steps=1, lines=1, argv=['bash', '-c', 'exit 1', 'train'],
    environment={**chaos.os.environ, 'WAIT': '0', 'RESTARTS': '2'})
  run = chaos.Round(ground, tmp_path, None)
  run.follow()
  assert run.wrong == ['ended with exit code 1'] and 'giving up' in run.log.read_text()


def test_a_number_draws_the_same_kind_and_a_block_of_numbers_each_kind_once():
  kinds = [chaos.kind_of(number, 5) for number in range(14)]
  assert kinds == [chaos.kind_of(number, 5) for number in range(14)]
  assert sorted(kinds[:7]) == sorted(kinds[7:]) == sorted(chaos.KINDS)
  assert kinds != [chaos.kind_of(number, 6) for number in range(14)]


def test_the_table_counts_by_kind():
  records = [{'kind': 'sigkill', 'outcome': 'equal', 'restarts': 2},
             {'kind': 'sigkill', 'outcome': 'loss', 'restarts': 1},
             {'kind': 'full disk', 'outcome': 'skipped', 'reason': 'no mount'}]
  rows = [line.strip('| ').split(' | ') for line in chaos.as_table(
    chaos.totals(records)).splitlines()]
  assert rows[0] == ['kind of fault', 'rounds', 'equal', 'repaired', 'loss', 'missed', 'skipped',
                     'restarts']
  assert ['sigkill', '2', '1', '0', '1', '0', '0', '3'] in rows
  assert rows[-1] == ['all', '3', '1', '0', '1', '0', '1', '3']


def test_a_round_that_is_repeated_replaces_the_earlier_one():
  previous = {'command': 'a', 'seconds': 5, 'rounds': [{'round': 0}, {'round': 1, 'old': True}]}
  about, rounds = chaos.merged(previous, {'command': 'b', 'seconds': 2}, [{'round': 1}])
  assert rounds == [{'round': 0}, {'round': 1}]
  assert about == {'command': 'a && b', 'seconds': 7}
  assert chaos.merged(None, {'command': 'b'}, [{'round': 1}]) == ({'command': 'b'}, [{'round': 1}])
