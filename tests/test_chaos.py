"""A few faults of the chaos script on a real training, and the losses that its judge must see."""

import random
import shutil
import sys
import types

import chaos
import chaos_judge as judge
import numpy as np
import orbax.checkpoint as ocp
import pytest

KINDS = ('sigkill', 'during a checkpoint', 'truncated checkpoint', 'no data')


@pytest.mark.slow
def test_a_disturbed_run_ends_as_the_undisturbed_one(tmp_path):
  (tmp_path / 'ground').mkdir()
  ground = chaos.Ground(tmp_path / 'ground', epochs=16)
  record = chaos.run_round(ground, 0, seed=27, kinds=KINDS)
  assert record['outcome'] in ('equal', 'repaired') and not record['wrong'], record
  for fault in ('SIGKILL after', 'tmp', 'truncated', 'no data for'):
    assert fault in '\n'.join(record['faults']), record
  assert record['restarts'] >= 3
  chaos.write(tmp_path / 'results', [record], command='python tests/chaos.py', ground=ground,
              began=0)
  page = (tmp_path / 'results' / 'README.md').read_text()
  assert ground.summary['device'] in page and '    python tests/chaos.py\n' in page
  assert str(tmp_path) not in page + (tmp_path / 'results' / 'results.json').read_text()


def save(workdir, step, value):
  with ocp.CheckpointManager((workdir / 'checkpoints').absolute()) as manager:
    manager.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave({'w': value})))


@pytest.fixture
def copied(tmp_path):
  """(a run's folder that equals the undisturbed run's, that one's)."""
  whole = tmp_path / 'undisturbed'
  for step in (5, 10):
    save(whole, step, np.arange(4.0) * step)
  (whole / 'metrics.jsonl').write_text(
    '{"split": "train", "step": 10, "loss": 0.5, "images_per_second": 7.0}\n'
    '{"split": "final", "step": 10, "loss": 0.25}\n')
  (whole / 'summary.json').write_text('{"step": 10, "final": {"loss": 0.25}, "best": {}}')
  return shutil.copytree(whole, tmp_path / 'run'), whole


def change(run, step):
  """One parameter of a checkpoint, by one bit."""
  value = judge.state(run, step)['w']
  shutil.rmtree(run / 'checkpoints' / str(step))
  save(run, step, np.nextafter(value, np.inf))


def cut_newest(run):
  for path in (run / 'checkpoints' / '10').rglob('*'):
    if path.is_file():
      path.write_bytes(path.read_bytes()[:10])


def edit(name, old, new):
  return lambda run: (run / name).write_text((run / name).read_text().replace(old, new))


@pytest.mark.parametrize(('spoil', 'said'), [
  (lambda run: change(run, 10), 'the final checkpoint is not'),
  (cut_newest, 'the final checkpoint is not'),
  (lambda run: shutil.rmtree(run / 'checkpoints' / '10'), 'the final checkpoint is not'),
  (edit('metrics.jsonl', '0.25', '0.250000001'), 'metrics.jsonl is not'),
  (edit('metrics.jsonl', '0.25}\n', '0.25}\n{"step": 4'), 'metrics.jsonl is missing or not JSON'),
  (lambda run: (run / 'summary.json').unlink(), 'summary.json is missing'),
  (edit('summary.json', '0.25', '0.5'), 'summary.json is not')])
def test_the_judge_sees_a_loss(copied, spoil, said):
  run, whole = copied
  edit('metrics.jsonl', '7.0', '8.0')(run)  # the clock's, not the run's
  assert judge.differs(run, whole) == []
  spoil(run)
  [wrong] = judge.differs(run, whole)
  assert said in wrong


def test_the_judge_sees_that_no_good_checkpoint_is_left(copied):
  run, whole = copied
  assert judge.not_intact(run, whole, least=10) == []
  change(run, 10)
  assert judge.not_intact(run, whole, least=5) == []
  assert judge.not_intact(run, whole, least=10) != []
  assert judge.not_intact(run / 'nothing', whole, least=0) == []


def test_what_a_clear_error_is():
  assert judge.not_clear('3 steps\ngapjax: there is no disk\n') == []
  assert judge.not_clear('gapjax: there is no disk\nException ignored in: f\n')
  assert judge.not_clear('gapjax: a\ngapjax: b\n')


@pytest.mark.parametrize(('code', 'wrong'), [
  ('sys.exit(1)', ['ended with exit code 1']),
  ('raise ValueError', ['its output holds a traceback', 'ended with exit code 1']),
  ('sys.exit(2)', ['the error is not one line at the end']),
  ('print("stopped at step 3")', ['has not ended after 12 starts'])])
def test_a_failure_that_is_no_clear_error_is_a_loss(tmp_path, code, wrong):
  ground = types.SimpleNamespace(
    reference=tmp_path, lines=1, start=lambda _, output: chaos.subprocess.Popen(
      [sys.executable, '-c', f'import sys; {code}'], stdout=output, stderr=output))
  run = chaos.Run(ground, tmp_path, random.Random(0))
  while run.go_on():
    pass
  assert run.wrong == wrong


def test_a_number_draws_the_same_kind_and_a_block_of_numbers_each_kind_once():
  kinds = [chaos.kind_of(number, 5) for number in range(14)]
  assert kinds == [chaos.kind_of(number, 5) for number in range(14)]
  assert sorted(kinds[:7]) == sorted(kinds[7:]) == sorted(chaos.KINDS)
  assert kinds != [chaos.kind_of(number, 6) for number in range(14)]


def test_the_table_counts_by_kind():
  counts = chaos.totals([{'kind': 'sigkill', 'outcome': 'equal', 'restarts': 2},
                         {'kind': 'sigkill', 'outcome': 'loss', 'restarts': 1},
                         {'kind': 'full disk', 'outcome': 'skipped', 'reason': 'no mount'}])
  assert list(counts) == ['sigkill', 'full disk', 'all']
  assert counts['sigkill'] == {'rounds': 2, 'equal': 1, 'repaired': 0, 'loss': 1, 'missed': 0,
                               'skipped': 0, 'restarts': 3}
  assert counts['all']['rounds'] == 3 and counts['all']['skipped'] == 1
