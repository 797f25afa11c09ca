"""The real loop on a tiny network: what it leaves behind, devices, resuming, faults."""

import json
import logging
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from clu import metrics as clu_metrics
from conftest import event_values, newest, python, refused, same, tiny_config
from ml_collections import ConfigDict
from test_devices import assert_close

from gapjax import config as configs
from gapjax import data
from gapjax.errors import Interrupted, TrainingFailed, UsageError
from gapjax.paths import read_lines
from gapjax.tasks.canvas import random_locations
from gapjax.training import build, optimizer, workdirs
from gapjax.training import train as train_module
from gapjax.training.checkpoint import Checkpoints
from gapjax.training.devices import Devices
from gapjax.training.evaluate import evaluate
from gapjax.training.log import Writer
from gapjax.training.plan import Plan
from gapjax.training.system import Clock
from gapjax.training.train import train


@pytest.fixture(scope='module')
def run(tmp_path_factory, data_dir):
  """One finished run: its config, workdir and summary."""
  workdir = tmp_path_factory.mktemp('run')
  config = tiny_config(num_epochs=4, **{'checkpoint.every_epochs': 1.0, 'checkpoint.keep': 3})
  return config, workdir, train(config, workdir=workdir, data_dir=data_dir,
                                devices=jax.local_devices()[:1], progress=False)


def test_what_a_run_leaves(run):
  _, workdir, summary = run
  assert json.loads((workdir / 'config.json').read_text())['model']['width'] == 4
  assert json.loads((workdir / 'summary.json').read_text()) == summary
  assert summary['step'] == 20 and summary['config']['num_epochs'] == 4
  assert {'location_accuracy', 'loss'} == set(summary['final'])
  lines = read_lines(workdir / 'metrics.jsonl')
  evals = [line for line in lines if line['split'] == 'eval']
  assert [line['step'] for line in evals] == [5, 10, 15, 20]
  best = max(evals, key=lambda line: line['accuracy'])
  assert summary['best'] == {'location_accuracy_best_random': best['accuracy'],
                             'step': best['step']}
  losses = [line['loss'] for line in lines if line['split'] == 'train']
  assert losses[-1] < losses[0]
  assert sorted(p.name for p in (workdir / 'checkpoints').iterdir()) == ['10', '15', '20']
  assert list(workdir.glob('events.out.tfevents.*'))
  assert (workdir / 'samples.png').read_bytes().startswith(b'\x89PNG')
  assert summary['sizes'] == {'train_images': 160, 'test_images': 30, 'input_size': 16,
                              'chance': 0.25, 'parameters': sum(
                                x.size for x in jax.tree.leaves(newest(workdir)[1]['params']))}


def test_event_files_hold_the_same_numbers(run):
  _, workdir, _ = run
  [path] = workdir.glob('events.out.tfevents.*')
  found = event_values(path)
  for line in read_lines(workdir / 'metrics.jsonl'):
    np.testing.assert_allclose(found[f'{line["split"]}/loss', line['step']], line['loss'],
                               rtol=1e-6)


def test_exact_evaluation_is_every_image_at_every_location(run, data_dir):
  """Counted here one canvas at a time, with batches that do not fit the number of images."""
  config, workdir, summary = run
  train_set, test_set, task = build.load_data(config, data_dir=data_dir)
  plan = Plan.of(workdirs.settled(config, platform='cpu'), num_images=160)
  model, state, *_ = build.create_learner(config, task, train_set, plan)
  with Checkpoints(workdir, keep=3) as checkpoints:
    _, state, _ = checkpoints.restore(Devices.to_host(state))
  variables = {'params': state.params, 'batch_stats': state.batch_stats}
  forward = jax.jit(lambda x: model.apply(variables, x, train=False)[0])
  grid = np.zeros((2, 2))
  for location in range(4):
    canvases = task.canvases(test_set.images, np.full(30, location))
    predicted = np.concatenate([forward(canvases[i:i + 1]) for i in range(30)]).argmax(1)
    grid[divmod(location, 2)] = (predicted == location).mean()
  np.testing.assert_allclose(summary['per_location'], grid, atol=1e-12)
  np.testing.assert_allclose(summary['final']['location_accuracy'], grid.mean(), atol=1e-12)

  here = Devices(jax.local_devices()[:4])
  other = tiny_config(seed=1, **{'eval.batch_size': 28})
  evaluation = build.create_evaluation(other, model, task, test_set, here)
  count, numbers = evaluation.counter.step, []
  evaluation.counter.step = lambda *a: (numbers.append(int(a[4]['number'])), count(*a))[1]
  exact = evaluation.exact(here.replicate(state))
  assert numbers == [*range(5)]  # each batch has a permutation of its own
  np.testing.assert_allclose(exact['per_location'], grid, atol=1e-12)
  assert exact['canvases'] == 120
  passes = evaluation.random(here.replicate(state), passes=3)
  assert passes['canvases'] == 90
  index, location = random_locations(30, 4, passes=3, seed=(1, 20))
  canvases = task.canvases(test_set.images[index], location)
  predicted = np.concatenate([forward(canvas[None]) for canvas in canvases]).argmax(1)
  assert passes['accuracy'] == (predicted == location).mean()
  by_authors = evaluation.report(here.replicate(state))['location_accuracy_random']
  assert by_authors == evaluation.random(here.replicate(state), passes=4)['accuracy']


def test_evaluate_a_workdir(run, data_dir, tmp_path):
  _, workdir, summary = run
  result = evaluate(workdir, data_dir=data_dir, devices=jax.local_devices()[:1])
  assert result['location_accuracy'] == summary['final']['location_accuracy']
  assert result['per_location'] == summary['per_location']
  assert abs(result['location_accuracy_random'] - result['location_accuracy']) < 0.2
  assert json.loads((workdir / 'evaluation.json').read_text()) == result
  refused(lambda: evaluate(tmp_path, data_dir=data_dir), 'holds no run')


def test_metrics_are_fetched_while_the_device_has_more_to_do(data_dir, tmp_path, monkeypatch):
  """Where a line is due, the next call is dispatched first; before an evaluation there is none."""
  dispatched, fetched = [], []
  split, summarise = Devices.split, train_module.summarise

  def counted(self, tree, *, axis=0, local=False):
    dispatched.extend([1] * (axis == 1))  # a training step's batch
    return split(self, tree, axis=axis, local=local)

  def noted(pending, *args):
    fetched.append((pending[-1][0].stop, len(dispatched)))
    return summarise(pending, *args)

  monkeypatch.setattr(Devices, 'split', counted)
  monkeypatch.setattr(train_module, 'summarise', noted)
  train(tiny_config(num_epochs=1, log_every=2), workdir=tmp_path, data_dir=data_dir,
        devices=jax.local_devices()[:1], progress=False)
  assert fetched == [(1, 2), (2, 3), (4, 5), (5, 5)]
  lines = read_lines(tmp_path / 'metrics.jsonl')
  assert [line['step'] for line in lines if line['split'] == 'train'] == [1, 2, 4, 5]


def test_a_stop_waits_for_two_calls_at_most(data_dir, tmp_path, monkeypatch):
  """When a call is dispatched, of the earlier ones the last alone may still be at work."""
  create, results, at_work = build.create_train_steps, [], []

  @jax.jit
  def late(metrics):
    work = jax.lax.fori_loop(0, 800, lambda _, y: jnp.tanh(y @ y), jnp.ones((128, 128))).sum()
    return jax.tree.map(lambda x: x + 0 * work, metrics)

  def create_slow(*args):
    steps = create(*args)

    def slowed(*inputs):
      at_work.append(sum(not r['grad_norm'].is_ready() for r in results))
      state, metrics = steps(*inputs)
      results.append(late(metrics))
      return state, results[-1]
    return slowed

  monkeypatch.setattr(build, 'create_train_steps', create_slow)
  train(tiny_config(num_epochs=2, log_every=100, **{'eval.every_epochs': 2, 'steps_per_call': 1}),
        workdir=tmp_path, data_dir=data_dir, devices=jax.local_devices()[:1], progress=False)
  assert len(at_work) == 10 and max(at_work) == 1


def test_a_finished_run_is_not_trained_again(run, data_dir, monkeypatch):
  config, workdir, summary = run
  before = (workdir / 'metrics.jsonl').read_bytes()
  monkeypatch.setattr(build, 'load_data', None)  # not even its data is asked for
  assert train(config, workdir=workdir, data_dir=data_dir, progress=False) == summary
  assert (workdir / 'metrics.jsonl').read_bytes() == before


@pytest.mark.parametrize('changes', [
  {'steps_per_call': 2, 'log_every': 7, 'checkpoint.keep': 5, 'checkpoint.every_epochs': 0.5},
  {'neurons.counts': 3}])
def test_what_decides_nothing_of_a_run_may_change(run, changes):
  """Also what its attack is measured with, which goes into config.json for it."""
  config, workdir, summary = run
  other = ConfigDict(config.to_dict())
  other.update_from_flattened_dict(changes)
  assert workdirs.finished(workdir, other) == summary
  assert workdirs.read_config(workdir) == other
  workdirs.claim(workdir, config)


def test_a_run_may_be_evaluated_otherwise_until_it_is(run, tmp_path):
  config, workdir, _ = run
  other = tiny_config(num_epochs=4, **{'eval.batch_size': 7})
  refused(lambda: workdirs.finished(workdir, other),
          r'another config: eval\.batch_size 7 \(there: 32\)')
  workdirs.claim(tmp_path, config)
  (tmp_path / 'metrics.jsonl').write_text('{"step": 1, "split": "train", "loss": 2.0}\n')
  assert workdirs.finished(tmp_path, other) is None


def test_a_config_from_disk_is_checked(tmp_path):
  path, whole = tmp_path / 'config.json', configs.as_json(tiny_config())
  for broken in ({'model': 3}, {'depth': 3}, {'model': {**whole['model'], 'width': 'wide'}}, [1],
                 {'task': ['canvas']}):
    path.write_text(json.dumps({**whole, **broken} if isinstance(broken, dict) else broken))
    refused(lambda: workdirs.read_config(tmp_path))
  for broken in ('{', '{"seed": 3, "model": {"width": 8}}'):
    path.write_text(broken)
    refused(lambda: workdirs.read_config(tmp_path))


def test_a_line_averages_over_what_counts_and_void_is_nothing():
  """Pixels of all steps alike; batches of void pixels alone do not stop a run."""
  def metrics(totals, counts):
    totals, counts, norms = (jax.numpy.float32(x) for x in (totals, counts, [1, 3]))
    mean = clu_metrics.Average(totals, counts)
    batch = {'loss': mean, 'accuracy': mean}
    return {'batch': batch, 'grad_norm': norms}

  def line(*pending):
    return train_module.summarise(list(pending), lambda step: 0.5, Clock(0.0), 8)

  found = line((range(2), metrics([6, 0], [3, 0])), (range(2, 4), metrics([1, 2], [2, 4])))
  assert found['loss'] == pytest.approx(9 / 9) and found['grad_norm'] == 2
  nothing = line((range(2), metrics([0, 0], [0, 0])))
  assert nothing['loss'] == nothing['accuracy'] == 0
  json.dumps(nothing, allow_nan=False)


def test_the_final_line_of_a_run_killed_before_its_summary_is_written_again(tmp_path):
  with Writer(tmp_path, step=0) as writer:
    writer.write(5, 'train', loss=1.0)
    writer.write(5, 'eval', accuracy=0.5)
    writer.write(5, 'final', accuracy=0.5)
  with Writer(tmp_path, step=5) as writer:
    assert writer.evaluated(5) and [line['split'] for line in writer.lines] == ['train', 'eval']
    writer.write(5, 'final', accuracy=0.5)
  splits = [line['split'] for line in read_lines(tmp_path / 'metrics.jsonl')]
  assert splits == ['train', 'eval', 'final']


# ---- Checkpoints and faults ---------------------------------------------------------------------


def test_resume_on_another_number_of_devices(run, data_dir, tmp_path, caplog):
  """Saved on one device, continued on two: the same training up to rounding."""
  config, workdir, _ = run
  step, complete = newest(workdir)
  (tmp_path / 'checkpoints').mkdir()
  (workdir / 'checkpoints' / '15').rename(tmp_path / 'checkpoints' / '15')
  caplog.set_level(logging.INFO, 'gapjax.training.train')
  train(config, workdir=tmp_path, data_dir=data_dir, devices=jax.local_devices()[:2],
        progress=False)
  (tmp_path / 'checkpoints' / '15').rename(workdir / 'checkpoints' / '15')
  assert 'resumed from step 15 of 20' in caplog.text
  again, resumed = newest(tmp_path)
  assert step == again == 20
  assert_close(complete['params'], resumed['params'], relative=0.02)


def test_broken_checkpoints_are_reported_and_the_newest_good_one_used(
    run, data_dir, tmp_path, caplog):
  """One of them by a single byte, which no reader of files complains of."""
  config, workdir, _ = run
  shutil.copytree(workdir / 'checkpoints', tmp_path / 'checkpoints')
  for step, damaged in ((20, lambda raw: raw[:len(raw) // 2]),
                        (15, lambda raw: raw[:(i := len(raw) // 2)] + bytes([raw[i] ^ 255])
                         + raw[i + 1:])):
    files = [p for p in (tmp_path / f'checkpoints/{step}').rglob('*') if p.is_file()]
    largest = max(files, key=lambda p: p.stat().st_size)
    largest.write_bytes(damaged(largest.read_bytes()))
  train(config, workdir=tmp_path, data_dir=data_dir, devices=jax.local_devices()[:1],
        progress=False)
  assert 'checkpoint 20 is broken' in caplog.text and 'checkpoint 15 is broken' in caplog.text
  assert {p.name for p in (tmp_path / 'checkpoints_broken').iterdir()} == {'15', '20'}
  step, state = newest(tmp_path)
  assert step == 20 and same(state, newest(workdir)[1])  # bit-equal, from step 10 on


def test_evaluation_moves_no_checkpoint(run, data_dir, tmp_path):
  """Reading leaves a broken checkpoint where it is; training sets it aside."""
  _, workdir, _ = run
  shutil.copytree(workdir, tmp_path / 'copy')
  shutil.rmtree(tmp_path / 'copy' / 'checkpoints' / '20' / 'state')
  result = evaluate(tmp_path / 'copy', data_dir=data_dir, devices=jax.local_devices()[:1])
  assert result['step'] == 15
  assert (tmp_path / 'copy' / 'checkpoints' / '20').exists()


def test_the_log_survives_a_disk_that_is_full_when_a_run_goes_on(tmp_path):
  """The log is replaced as a whole: a writer that fails leaves the lines that were there."""
  with Writer(tmp_path, step=0) as writer:
    for step in range(1, 400):
      writer.write(step, 'eval', accuracy=0.5)
  limited = ('import resource, sys; from gapjax.training.log import Writer; '
             'resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)); '
             'import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); '
             f'Writer({str(tmp_path)!r}, step=300)')
  done = python(limited, check=False)
  assert done.returncode == 1 and 'OSError' in done.stderr
  assert len(read_lines(tmp_path / 'metrics.jsonl')) == 399


@pytest.mark.parametrize('dtype', [
  'float64', pytest.param('bfloat16', marks=pytest.mark.slow)])
def test_steps_per_call_change_the_run_by_rounding_alone(data_dir, tmp_path, monkeypatch, dtype):
  """Five steps an epoch, four a call: in the same steps the same evaluations, checkpoints and
  rates, and (float64) the same weights. Stopped amid an epoch, a run goes on to the same bits."""
  changes = {'model.dtype': dtype, 'num_epochs': 2, 'schedule.name': 'cosine', 'log_every': 3,
             'checkpoint.every_epochs': 1.5, 'eval.images': 8}
  arguments = dict(data_dir=data_dir, devices=jax.local_devices()[:2], progress=False)

  def run(name, k):
    with jax.enable_x64(dtype == 'float64'):
      train(tiny_config(**changes, steps_per_call=k), workdir=tmp_path / name, **arguments)
      return newest(tmp_path / name), read_lines(tmp_path / name / 'metrics.jsonl')

  (step, one), lines = run('one', 1)
  (step_4, four), lines_4 = run('four', 4)
  assert step == step_4 == 10
  for split in ('eval', 'final'):
    ours, theirs = ([(x['step'], x['loss']) for x in found if x['split'] == split]
                    for found in (lines_4, lines))
    assert [s for s, _ in ours] == [s for s, _ in theirs]
    np.testing.assert_allclose(ours, theirs, rtol=1e-9 if dtype == 'float64' else 0.1)
  logged = [(x['step'], x['learning_rate']) for x in lines_4 if x['split'] == 'train']
  np.testing.assert_allclose(logged, [
    (s, 1e-3 * (1 + np.cos(np.pi * (s - 1) / 10)) / 2) for s in (4, 5, 8, 10)], rtol=1e-5)
  if dtype == 'float64':
    assert_close(one['params'], four['params'], relative=1e-9)
  assert sorted(p.name for p in (tmp_path / 'four/checkpoints').iterdir()) == ['10', '8']

  calls, split = [], Devices.split

  def stopping(self, tree, *, axis=0, local=False):
    calls.extend([1] * (axis == 1))
    if len(calls) == 1:  # after the call under way: four steps
      signal.raise_signal(signal.SIGTERM)
    return split(self, tree, axis=axis, local=local)

  monkeypatch.setattr(Devices, 'split', stopping)
  with pytest.raises(Interrupted, match='stopped at step 4 of 10'):
    run('stopped', 4)
  calls.append(1)
  (_, stopped), _ = run('stopped', 4)
  assert same(stopped, four)


def test_a_checkpoint_of_another_optimiser_is_left_there(run, data_dir, tmp_path, monkeypatch):
  """It is not called broken."""
  config, workdir, _ = run
  shutil.copytree(workdir / 'checkpoints', tmp_path / 'checkpoints')
  create = optimizer.create_optimizer
  another = lambda *a: optax.chain(create(*a), optax.trace(0.9))  # noqa: E731
  monkeypatch.setattr(optimizer, 'create_optimizer', another)
  with pytest.raises(UsageError, match=r'another optax.*written with optax .*another --workdir'):
    train(config, workdir=tmp_path, data_dir=data_dir, devices=jax.local_devices()[:1],
          progress=False)
  assert sorted(p.name for p in (tmp_path / 'checkpoints').iterdir()) == ['10', '15', '20']
  assert not (tmp_path / 'checkpoints_broken').exists()


def test_not_a_number_stops_the_run_and_keeps_the_last_good_checkpoint(data_dir, tmp_path):
  """The rate explodes after epoch 1: by then one checkpoint is there, and it stays the newest."""
  config = tiny_config(num_epochs=4, log_every=100, **{
    'optimizer.name': 'sgd', 'optimizer.lr': 1e-3, 'optimizer.momentum': 0.0,
    'schedule.name': 'step', 'schedule.step_epochs': (1.2,), 'schedule.step_factor': 1e38})
  with pytest.raises(TrainingFailed, match=r'not finite at step ([6-9]|1\d)\b'):
    train(config, workdir=tmp_path, data_dir=data_dir, devices=jax.local_devices()[:1],
          progress=False)
  step, state = newest(tmp_path)
  assert step == 5
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize(('epochs', 'said'), [(1, True), (2, False)])
def test_a_rate_that_rises_to_the_end_is_told(
    data_dir, tmp_path, monkeypatch, caplog, epochs, said):
  """As where a recipe of 26 epochs is tried for two."""
  def stop(*_):
    raise Interrupted('before the first step', code=1)
  monkeypatch.setattr(build, 'create_train_steps', stop)
  config = tiny_config(num_epochs=epochs, **{'schedule.warmup_epochs': 1.0})
  with pytest.raises(Interrupted):
    train(config, workdir=tmp_path, data_dir=data_dir, progress=False)
  assert ('schedule.warmup_epochs=1 of num_epochs=1' in caplog.text) == said


def test_held_out_images_are_evaluated_and_not_trained_on(data_dir):
  config = tiny_config(**{'data.held_out': 40, 'eval.images': 0})
  train_set, held_out, _ = build.load_data(config, data_dir=data_dir)
  images = data.load_images('digits', split='train', data_dir=data_dir).images
  np.testing.assert_array_equal(train_set.images, images[:160])
  np.testing.assert_array_equal(held_out.images, images[160:200])
  config.data.train_images = 0
  train_set, held_out, _ = build.load_data(config, data_dir=data_dir)
  np.testing.assert_array_equal(np.concatenate([train_set.images, held_out.images]), images)
  config.data.train_images = len(images) - 39
  refused(lambda: build.load_data(config, data_dir=data_dir), 'smaller')
