"""The networks in PyTorch, their training and evaluation."""

import ast
import copy
import json
import signal
import types

import jax
import numpy as np
import pytest
from conftest import ROOT, refused, tiny_config, trained
from reference import entropies, moved
from test_convert import LITE, MOBILENET, NETWORKS, PLUS, network_config, their_arrays

from gapjax import config as configs
from gapjax import models
from gapjax.errors import Interrupted, TrainingFailed
from gapjax.training import build
from gapjax.training.evaluate import evaluate
from gapjax.training.plan import Plan
from gapjax.weights import files as weights
from gapjax.weights import names

torch = pytest.importorskip('torch')

from gapjax.pytorch import convert, recipe, train, twin  # noqa: E402

F = torch.nn.functional
PAIRS = {'task': 'classification', 'augshift.crops': 2, 'augshift.max_shift': 2,
         'model.head': 'linear', 'eval.shift': 2, 'eval.max_shift': 0}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
  """Threads that wait for each other are slow where other work goes on."""
  monkeypatch.setattr(train, 'usable_cores', lambda: 1)


def task_of(data_dir, **changes):
  """Config, training set, test set and task of a tiny run."""
  config = tiny_config(**changes)
  return config, *build.load_data(config, data_dir=data_dir)


# ---- Networks ------------------------------------------------------------------------------------


def test_it_takes_nothing_from_what_it_checks():
  names, files = set(), ('twin', 'twin_backbones', 'twin_layers', 'tables')
  for file in files:
    for node in ast.walk(ast.parse((ROOT / f'gapjax/pytorch/{file}.py').read_text())):
      names |= {f'{getattr(node, "module", "")}.{alias.name}'
                for alias in getattr(node, 'names', ())}
  assert '.torch' in names
  ours = {name for name in names if 'gapjax' in name}
  assert 'gapjax.pytorch.tables' in ours
  assert all(name.startswith(('gapjax.pytorch.tables', 'gapjax.pytorch.twin_')) for name in ours)


@pytest.mark.parametrize('name', NETWORKS)
def test_weights_fit_strictly(name):
  """What `export` writes has every name and shape of the twin's state dict."""
  config = network_config(name)
  theirs = their_arrays(config, 4)
  network = twin.create_twin(config.model, num_classes=4)
  network.load_state_dict({key: torch.as_tensor(x) for key, x in theirs.items()}, strict=True)


def of_twin(c, variables, images):
  """(logits, features) of the twin of a `config.model` with our variables, 5 classes, float64."""
  arrays = weights.export(variables, names.names(c), unread=names.unread(c))
  network = twin.create_twin(c, num_classes=5).double().eval()
  network.load_state_dict({key: torch.as_tensor(x) for key, x in arrays.items()}, strict=True)
  with torch.inference_mode():
    return network(torch.as_tensor(images).movedim(-1, 1))


def same_logits(c, images):
  """Checks that a `config.model` and its twin have the same logits; (our features, the twin's)."""
  with jax.enable_x64(True):
    model = models.create_network(c, num_classes=5)
    variables = jax.tree.map(np.float64, trained(model, images))
    expected, stages = jax.jit(lambda v, x: model.apply(v, x, train=False))(variables, images)
  logits, features = of_twin(c, variables, images)
  np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-9 * np.abs(expected).max())
  return stages, features


@pytest.mark.parametrize(('kind', 'changes'), [
  (MOBILENET, {}), (LITE, {}), *(pytest.param(*both, marks=pytest.mark.slow) for both in (
    (MOBILENET, {'model.early_padding': True, 'model.output_stride': 16,
                 'model.padding': 'replicate'}),
    (MOBILENET, {'model.downsample': 'blur', 'model.padding': 'partial'}),
    (MOBILENET, {'model.downsample': 'polyphase', 'model.blur_size': 2}),
    (LITE, {'model.output_stride': 16, 'model.padding': 'partial'}),
    (LITE, {'model.downsample': 'blur', 'model.padding': 'replicate'})))], ids=str)
def test_mobilenets_and_separable_heads_are_gapjaxs(kind, changes):
  config = tiny_config(**{**kind, **PLUS, 'model.separable': True, 'model.dtype': 'float64',
                          **changes})
  images = np.random.default_rng(0).normal(size=(2, 32, 48, 3))
  with jax.enable_x64(True):
    model = models.create_network(config.model, num_classes=5)
    variables = jax.tree.map(np.float64, trained(model, images))
    expected, stages = model.apply(variables, images, train=False)
  logits, features = of_twin(config.model, variables, images)
  np.testing.assert_allclose(logits.movedim(1, -1), expected, rtol=0,
                             atol=1e-9 * np.abs(expected).max())
  for stage in ('stem', 'stage1', 'stage2', 'stage3', 'stage4'):
    assert features[stage].movedim(1, -1).shape == stages[stage].shape


@pytest.mark.parametrize('padding', ['zero', 'full'])
def test_efficientnets_logits_are_gapjaxs(padding):
  """As a classifier; padding `full`, which no DeepLab has, enlarges the shortcuts."""
  config = tiny_config(**{'model.name': 'efficientnet_lite0', 'model.dtype': 'float64',
                          'model.padding': padding, 'model.head': 'linear'})
  images = np.random.default_rng(0).normal(size=(1, 35, 46, 3))
  stages, features = same_logits(config.model, images)
  assert {name: x.movedim(1, -1).shape for name, x in features.items()} == {
    name: x.shape for name, x in stages.items()}


@pytest.mark.parametrize('permutation', ['batch', 'fixed'])
def test_a_permutation_is_drawn_for_every_pass(permutation):
  config = tiny_config(**{'model.head': 'permuted', 'model.permutation': permutation})
  network = twin.create_twin(config.model, num_classes=4).eval()
  x = torch.randn(2, 3, 8, 8)
  with torch.inference_mode():
    first, second = network(x)[0], network(x)[0]
  assert torch.equal(first, second) == (permutation == 'fixed')


def test_a_fixed_order_is_gapjaxs():
  """Weights belong to the order that they were trained with, which the seed alone says."""
  config = tiny_config(**{'model.head': 'permuted', 'model.permutation': 'fixed',
                          'model.permutation_seed': 3, 'model.permute_at': 'stage3',
                          'model.dtype': 'float64'})
  images = np.random.default_rng(0).normal(size=(2, 24, 24, 3))
  same_logits(config.model, images)


# ---- Batches and losses --------------------------------------------------------------------------


@pytest.mark.parametrize('fill', ['zero', 'black'])
@pytest.mark.parametrize('target', ['location', 'image'])
def test_canvases(fill, target, data_dir):
  """Each image, or its mirror image, at one of all places, as gapjax puts it there."""
  _, train_set, _, task = task_of(data_dir, **{
    'canvas.grid': 3, 'canvas.fill': fill, 'canvas.target': target, 'data.flip': True})
  images, labels = recipe.on_device(train_set.part(0, 90), 'cpu')
  torch.manual_seed(0)
  batch = recipe.training_batch(images, labels, task)
  found = batch['canvases'].movedim(1, -1).numpy()
  made = {(place, flip): np.asarray(task.canvases(train_set.images[:90, :, ::1 - 2 * flip],
                                                  np.full(90, place)))
          for place in range(9) for flip in (0, 1)}
  fits = [[key for key, pictures in made.items() if np.allclose(pictures[i], found[i], atol=1e-5)]
          for i in range(90)]
  places, flips = np.array(fits).reshape(90, 2).T  # one each
  expected = places if target == 'location' else train_set.labels[:90]
  np.testing.assert_array_equal(batch['targets'], expected)
  assert set(places) == set(range(9)) and 0.3 < np.mean(flips) < 0.7


def test_images_are_normalised_in_the_networks_type():
  values = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
  task = types.SimpleNamespace(dtype=np.float64, mean=[.3, .4, .5], std=[.2, .3, .4])
  found = recipe.normalised(torch.tensor(values).movedim(-1, 1), task).movedim(1, -1)
  np.testing.assert_allclose(found, (values / 255 - task.mean) / task.std, rtol=0, atol=1e-15)


@pytest.mark.parametrize('crops', [1, 2])
def test_crops_of_a_pair_share_their_flip(crops, data_dir):
  _, train_set, _, task = task_of(data_dir, **PAIRS, **{'data.flip': True, 'num_epochs': 2})
  task = types.SimpleNamespace(**{**vars(task), 'crops': crops, 'max_shift': 1})
  images, labels = recipe.on_device(train_set.part(0, 40), 'cpu')
  torch.manual_seed(0)
  batch = recipe.training_batch(images, labels, task)
  found = batch['images'].movedim(2, -1).numpy()
  assert found.shape == (crops, 40, 8, 8, 3)
  seen, flips = [], []
  normalised = (train_set.images[:40] / 255.0 - task.mean) / task.std
  for image, views in zip(normalised, found.swapaxes(0, 1), strict=True):
    fits = [{(flip, dy, dx) for flip in (False, True) for dy in (-1, 0, 1) for dx in (-1, 0, 1)
             if np.allclose(moved(image[:, ::-1] if flip else image, dy, dx), view, atol=1e-5)}
            for view in views]
    assert all(fits)
    both = set.intersection(*({flip for flip, _, _ in views} for views in fits))
    assert both
    flips.append(both)
    seen += [next(iter(views))[1:] for views in fits]
  assert len(set(seen)) == 9 and {True} in flips and {False} in flips
  np.testing.assert_array_equal(batch['labels'], train_set.labels[:40])


def test_both_crops_of_a_step_share_a_permutation():
  """As in gapjax, also where they go through PermuteNet one by one."""
  config = tiny_config(**{**PAIRS, 'augshift.stacked': False, 'model.head': 'permuted'})
  network, drawn = twin.create_twin(config.model, num_classes=10), []
  draw = network.draw
  network.draw = lambda: drawn.append(draw()) or drawn[-1]
  batch = {'images': torch.randn(2, 6, 3, 8, 8), 'labels': torch.arange(6)}
  recipe.loss_of(network, batch, config)
  assert len(drawn) == 1


@pytest.mark.parametrize('stacked', [True, False])
def test_the_loss_of_a_pair(stacked):
  """Cross entropies of both crops, and the weight times the mean squared distance."""
  config = tiny_config(**PAIRS, **{'augshift.stacked': stacked})
  network = twin.create_twin(config.model, num_classes=10)
  images, labels = torch.randn(2, 6, 3, 8, 8), torch.arange(6)
  if stacked:  # one BatchNorm statistic
    logits, features = copy.deepcopy(network)(images.flatten(0, 1))
    outputs = [(logits[:6], features['pooled'][:6]), (logits[6:], features['pooled'][6:])]
  else:
    outputs = [(logits, features['pooled'])
               for logits, features in map(copy.deepcopy(network), images)]
  (y1, z1), (y2, z2) = ([x.detach().numpy().astype(float) for x in both] for both in outputs)
  entropy = sum(entropies(y, labels).mean() for y in (y1, y2))
  for weight, given in ((config.augshift.weight, {}), (0.25, {'weight': 0.25})):
    loss, _ = recipe.loss_of(copy.deepcopy(network), {'images': images, 'labels': labels}, config,
                             **given)
    assert loss.item() == pytest.approx(entropy + weight * np.square(z1 - z2).mean(), rel=1e-5)


def test_nesterov_without_momentum_is_sgd_and_not_pytorchs_refusal():
  config = tiny_config(**{'optimizer.name': 'sgd', 'optimizer.lr': .5, 'optimizer.momentum': 0.,
                          'optimizer.nesterov': True})
  network = torch.nn.Linear(1, 1, bias=False)
  before = network.weight.item()
  rule = recipe.create_optimizer(network, config)
  for gradient in (2., 2.):
    network.weight.grad = torch.tensor([[gradient]])
    rule.step()
  assert network.weight.item() == pytest.approx(before - .5 * 4)


def test_rates_and_weights_of_every_step(data_dir):
  """Cosine after a linear warm-up; the pairwise weight rises over its share of the training."""
  config, train_set, _, task = task_of(data_dir, **PAIRS, **{
    'num_epochs': 4, 'schedule.name': 'cosine', 'schedule.warmup_epochs': 1.0,
    'augshift.weight': 3.0, 'augshift.warm_up': 0.5, 'steps_per_call': 1})
  rates, pair = train.schedules(config, task, Plan.of(config, num_images=len(train_set)))
  steps = np.arange(20)  # 5 an epoch
  warm, rest = steps / 5, 0.5 * (1 + np.cos(np.pi * (steps - 5) / 15))
  np.testing.assert_allclose(rates, 1e-3 * np.where(steps < 5, warm, rest), rtol=1e-5)
  np.testing.assert_allclose(pair, 3.0 * np.minimum(steps / 10, 1), rtol=1e-6)


# ---- Training ------------------------------------------------------------------------------------


@pytest.mark.parametrize(('changes', 'metric', 'least'), [
  ({}, 'location_accuracy', 0.7), (PAIRS, 'image_accuracy', 0.3)], ids=['canvas', 'pairs'])
def test_training_learns(changes, metric, least, tmp_path, data_dir, monkeypatch):
  """Guessing is right in 0.25 and 0.1. With the weights in the file gapjax measures the same, and
  a finished run is not trained again."""
  config = tiny_config(**changes, num_epochs=8, **{
    'optimizer.lr': 5e-3, 'data.train_images': 800, 'eval.images': 200, 'eval.every_epochs': 4,
    'schedule.name': 'cosine', 'augshift.weight': 1.0})
  where = dict(workdir=tmp_path / 'torch', data_dir=data_dir, progress=False)
  summary = train.train(config, **where)
  assert summary['final'][metric] > least and summary['step'] == 200
  lines = [json.loads(line) for line in (tmp_path / 'torch/metrics.jsonl').read_text().splitlines()]
  losses = [line['loss'] for line in lines if line['split'] == 'train']
  assert losses[-1] < 0.7 * losses[0]
  assert [line['step'] for line in lines if line['split'] == 'eval'] == [100, 200]
  assert summary['versions']['torch'] == torch.__version__ and summary['images_per_second'] > 0
  assert {'config', 'best', 'wall_seconds', 'device'} < set(summary)

  file = tmp_path / 'torch/weights.pth'
  assert weights.read(file)['bn1.num_batches_tracked'] == 200  # trained after evaluations too
  convert.convert(file, tmp_path / 'run', config=config)
  found = evaluate(tmp_path / 'run', data_dir=data_dir, devices=jax.local_devices()[:1])
  assert {name: found[name] for name in summary['final']} == pytest.approx(
    summary['final'], rel=1e-4)
  assert found.get('per_location') == summary.get('per_location')

  monkeypatch.setattr(twin, 'create_twin', None)
  assert train.train(config, **where) == summary


def test_a_seed_decides_and_batches_are_gapjaxs(tmp_path, data_dir, monkeypatch):
  taken, batch = [], recipe.training_batch

  def training_batch(images, labels, task):
    taken.append(labels.numpy())
    return batch(images, labels, task)

  monkeypatch.setattr(recipe, 'training_batch', training_batch)
  config, train_set, _, _ = task_of(data_dir, steps_per_call=1)
  summaries = [train.train(configs.ConfigDict({**config.to_dict(), 'seed': seed}), progress=False,
                           workdir=tmp_path / name, data_dir=data_dir)
               for name, seed in (('a', 0), ('b', 0), ('c', 1))]
  a, b, c = (summary['final']['loss'] for summary in summaries)
  assert a == b != c
  plan = Plan.of(config, num_images=len(train_set))
  for step in range(5):
    np.testing.assert_array_equal(taken[step], train_set.labels[plan.batch_indices(step)[0]])


def test_what_stops_the_training(tmp_path, data_dir, monkeypatch):
  """SIGTERM, a loss that is not finite, somebody else's workdir, a task without training."""
  config, loss_of = tiny_config(), recipe.loss_of

  def terminated(*arguments, **named):
    signal.raise_signal(signal.SIGTERM)
    return loss_of(*arguments, **named)

  where = dict(workdir=tmp_path / 'run', data_dir=data_dir, progress=False)
  with monkeypatch.context() as patch, pytest.raises(Interrupted, match='at step 1 of 5') as stop:
    patch.setattr(recipe, 'loss_of', terminated)
    train.train(config, **where)
  assert stop.value.code == 0 and not (tmp_path / 'run/summary.json').exists()
  summary = train.train(config, **where)
  assert summary['step'] == 5
  (tmp_path / 'run/summary.json').write_text(json.dumps({**summary, 'versions': {'jax': '0'}}))
  refused(lambda: train.train(config, **where), 'holds a run of gapjax')
  refused(lambda: train.train(tiny_config(**{'optimizer.lr': 0.5}), **where),
          r'another config: optimizer\.lr')
  where['workdir'] = tmp_path / 'nan'
  with pytest.raises(TrainingFailed, match=r'at step [2-5] has loss .*: try a lower'):
    train.train(tiny_config(**{'optimizer.lr': 1e30, 'optimizer.name': 'sgd'}), **where)
  refused(lambda: train.train(network_config('v3'), **where), 'not in segmentation, float32')
