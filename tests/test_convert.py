"""`gapjax convert`: PyTorch's names of every network, round trips to the bit, runs that go on."""

import re
import shutil

import jax
import numpy as np
import pytest
from conftest import ROOT, SCENES, newest, refused, same, tiny_config

from gapjax import cli
from gapjax import config as configs
from gapjax.data import CLASSES, NAMES, labels, sources
from gapjax.data.digit_scenes import digit_scenes
from gapjax.pytorch import convert
from gapjax.training import build, evaluate
from gapjax.training.plan import Plan
from gapjax.training.train import train
from gapjax.weights import files as weights
from gapjax.weights import names

draw = np.random.default_rng(0)
DIGITS = f'--config={ROOT}/configs/digits.py'
DEEPLAB = {**SCENES, 'model.stem': 'imagenet'}
MOBILENET = {**DEEPLAB, 'model.backbone': 'mobilenetv2'}
LITE = {**DEEPLAB, 'model.backbone': 'efficientnet_lite0'}
PLUS = {'model.name': 'deeplabv3plus'}
# Every network of models.create_network, and every name that its layers can have.
NETWORKS = {
  **{f'{head}, {stem}': {'model.head': head, 'model.stem': stem}
     for head in ('gap', 'permuted', 'linear') for stem in ('canvas', 'cifar', 'imagenet')},
  'resnet50': {'model.name': 'resnet50'},
  'lps': {'task': 'classification', 'model.head': 'linear', 'model.blur_size': 1,
          'model.downsample': 'learned_polyphase'},
  **{f'vgg11, {head}': {'model.name': 'vgg11', 'model.head': head}
     for head in ('gap', 'permuted', 'linear')},
  'vgg16': {'model.name': 'vgg16'},
  **{f'efficientnet_lite0, {head}': {'model.name': 'efficientnet_lite0', 'model.head': head}
     for head in ('gap', 'permuted', 'linear')},
  'v3': DEEPLAB, 'v3 on a canvas stem': SCENES, 'v3+': {**DEEPLAB, **PLUS},
  'v3+, resnet50': {**DEEPLAB, **PLUS, 'model.backbone': 'resnet50'},
  'v3, separable': {**DEEPLAB, 'model.separable': True},
  'v3+, separable': {**DEEPLAB, **PLUS, 'model.separable': True},
  'v3, mobilenetv2': MOBILENET, 'v3+, efficientnet_lite0': {**LITE, **PLUS},
  'v3+, mobilenetv2, separable': {**MOBILENET, **PLUS, 'model.separable': True}}


def network_config(name):
  config = tiny_config(**NETWORKS[name])
  configs.validate(config)
  return config


def variables(state):
  return {name: state[name] if isinstance(state, dict) else getattr(state, name)
          for name in ('params', 'batch_stats')}


def their_arrays(config, num_classes, **more):
  """Random arrays by PyTorch's names, also where nothing reads them."""
  known = names.names(config.model)
  zeros = weights.export(variables(convert.initial_state(config, num_classes)), known,
                         unread=names.unread(config.model))
  return {name: draw.normal(size=x.shape).astype(x.dtype) if x.dtype == np.float32
          else np.full_like(x, 7) for name, x in zeros.items()} | more


@pytest.fixture(autouse=True)
def traced_once(monkeypatch):
  """The state that the several conversions of a test start from."""
  kept, trace = {}, convert.initial_state

  def initial_state(config, num_classes):
    key = config.to_json(), num_classes
    return kept[key] if key in kept else kept.setdefault(key, trace(config, num_classes))

  monkeypatch.setattr(convert, 'initial_state', initial_state)


# ---- Round trips ---------------------------------------------------------------------------------


@pytest.mark.parametrize('name', ['gap, canvas', 'permuted, cifar', 'linear, imagenet',
                                  'vgg11, gap', 'lps', 'efficientnet_lite0, linear',
                                  'v3, separable', 'v3+, mobilenetv2, separable',
                                  'v3+, efficientnet_lite0'])
def test_there_and_back(name, tmp_path):
  """PyTorch -> gapjax -> PyTorch -> gapjax. What nothing reads comes back as zeros."""
  suffix = '.safetensors' if 'v3' in name else '.npz'
  config = network_config(name)
  theirs = their_arrays(config, convert.expected_classes(config))
  first = weights.write(tmp_path / f'first{suffix}', theirs)
  assert convert.convert(first, tmp_path / 'a/run', config=config) == tmp_path / 'a/run'
  assert [x.name for x in (tmp_path / 'a').iterdir()] == ['run']
  back = weights.read(convert.convert(tmp_path / 'a/run', tmp_path / f'back{suffix}'))
  assert set(back) == set(theirs)
  for key, x in theirs.items():
    expected = np.zeros_like(x) if key in names.unread(config.model) else x
    np.testing.assert_array_equal(back[key], expected, strict=True)
  convert.convert(tmp_path / f'back{suffix}', str(tmp_path / 'b'), config=config)
  (step, one), (_, other) = newest(tmp_path / 'a/run'), newest(tmp_path / 'b')
  assert step == 0 and same(one, other)
  assert one['params'].keys() == convert.initial_state(config, 1).params.keys()


@pytest.mark.parametrize('changes', [
  {'optimizer.name': 'sgd', 'schedule.name': 'poly', 'schedule.warmup_epochs': 0.5,
   'optimizer.clip_norm': 1.0}, DEEPLAB])
def test_the_state_of_the_optimiser_is_fresh(changes, data_dir, tmp_path):
  """As a run begins with it: structure, types and values."""
  config = tiny_config(**changes, **{
    'optimizer.backbone_factor': 0.1 if changes is DEEPLAB else 1.0})
  config.steps_per_call = 1
  train_set, _, task = build.load_data(config, data_dir=data_dir)
  plan = Plan.of(config, num_images=len(train_set))
  expected = build.create_learner(config, task, train_set, plan)[1]
  found = convert.initial_state(config, task.num_classes)
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  assert same(found.opt_state, expected.opt_state) and same(found.step, expected.step)
  for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
    assert (one.shape, one.dtype) == (other.shape, other.dtype)


def test_a_run_goes_on_from_a_file_and_a_file_from_a_run(data_dir, tmp_path):
  """Through the command line: training starts from the weights in a file, and what it made
  evaluates the same when it has been to another file and back."""
  (tmp_path / 'config.py').write_text('from conftest import tiny_config\n'
                                      'def get_config():\n  return tiny_config()\n')
  still = [f'--config={tmp_path}/config.py', '--config.optimizer.lr=1e-9']
  theirs = their_arrays(tiny_config(), 4)
  theirs |= {name: abs(x) / 10 for name, x in theirs.items() if x.dtype == np.float32}
  weights.write(tmp_path / 'w.npz', theirs)
  devices = jax.local_devices()[:1]
  first, second = tmp_path / 'first', tmp_path / 'second'
  assert cli.main(['convert', f'{tmp_path}/w.npz', str(first), *still]) == 0
  summary = train(configs.from_flags(still), workdir=first, data_dir=data_dir, devices=devices,
                  progress=False)
  step, state = newest(first)
  assert step == summary['step'] == 5
  np.testing.assert_allclose(state['params']['conv1']['kernel'].transpose(3, 2, 0, 1),
                             theirs['conv1.weight'], atol=1e-7)
  expected = evaluate.evaluate(first, data_dir=data_dir, devices=devices)
  assert cli.main(['convert', str(first), f'{tmp_path}/new.safetensors']) == 0
  assert cli.main(['convert', f'{tmp_path}/new.safetensors', str(second), *still]) == 0
  found = evaluate.evaluate(second, data_dir=data_dir, devices=devices)
  assert found.pop('step') == 0 and expected.pop('step') == 5
  assert found.pop('per_location') == expected.pop('per_location')
  for result in (found, expected):
    del result['location_accuracy_random']  # places drawn by the step
  assert found == expected


@pytest.mark.parametrize('wrap', ['net', 'model_state'])
def test_wrapped_as_the_authors_scripts_read_it(wrap, tmp_path, capsys):
  torch = pytest.importorskip('torch')
  config = tiny_config(**{'num_epochs': 2, 'eval.every_epochs': 3})  # evaluated at the end
  theirs = their_arrays(config, 4)
  state = {f'module.{name}': torch.tensor(x) for name, x in theirs.items()}
  torch.save({wrap: state, 'acc': np.float64(0.9), 'epoch': 3}, tmp_path / 'w.pth')
  convert.convert(tmp_path / 'w.pth', tmp_path / 'run', config=config)
  (tmp_path / 'run/metrics.jsonl').write_text(
    '{"step": 0, "split": "eval", "accuracy": 0.25}\n'
    '{"step": 5, "split": "eval", "accuracy": 0.5}\n')  # after the checkpoint
  assert cli.main(['convert', str(tmp_path / 'run'), str(tmp_path / 'new.pth'),
                   f'--wrap={wrap}']) == 0
  assert capsys.readouterr().out == f'{tmp_path}/new.pth\n'
  written = torch.load(tmp_path / 'new.pth', weights_only=True)
  assert (written['acc'], written['epoch']) == (25, 2)  # which they print, in percent
  found = written[wrap]
  assert found['bn1.num_batches_tracked'].dtype == torch.int64
  for name in names.names(config.model):
    assert torch.equal(found[name], state[f'module.{name}'])


@pytest.mark.parametrize(('stem', 'read', 'written'), [
  ('canvas', 'linear_location', 'linear_location'), ('canvas', 'linear', 'linear_location'),
  ('cifar', 'linear_location', 'linear')])
def test_the_authors_linear_heads_of_either_name(stem, read, written, tmp_path):
  """Their networks for a canvas load linear_location alone; kuangliu's, from which they come,
  linear."""
  config = tiny_config(**{'model.head': 'linear', 'model.padding': 'circular', 'model.stem': stem})
  theirs = {re.sub('^linear(_location)?', read, name): x
            for name, x in their_arrays(config, 4).items()}
  weights.write(tmp_path / 'w.npz', theirs)
  convert.convert(tmp_path / 'w.npz', tmp_path / 'run', config=config)
  back = weights.read(convert.convert(tmp_path / 'run', tmp_path / 'back.npz'))
  for part in ('weight', 'bias'):
    np.testing.assert_array_equal(back[f'{written}.{part}'], theirs[f'{read}.{part}'])
  assert len(back) == len(theirs)
  both = theirs | {name.replace(read, other): x for name, x in theirs.items()
                   for other in {'linear', 'linear_location'} - {read}}
  weights.write(tmp_path / 'both.npz', both)
  refused(lambda: convert.convert(tmp_path / 'both.npz', tmp_path / 'other', config=config),
          'left over')


@pytest.mark.parametrize(('changes', 'told'), [
  ({'model.padding': 'none'}, "model.padding=none, model.downsample=stride; the authors' networks"),
  ({'model.head': 'permuted', 'model.downsample': 'blur'},
   'model.padding=zero, model.downsample=blur, model.blur_size=3, model.permutation=batch, '
   'model.permute_at=pooled'),
  ({'model.head': 'permuted', 'model.permutation': 'fixed'},
   'model.permutation=fixed, model.permute_at=pooled, model.permutation_seed=0'),
  (MOBILENET, 'model.output_stride=8, model.early_padding=False; the authors')])
def test_what_no_file_says_is_said(changes, told, tmp_path, caplog):
  """Weights of other such fields fit as well, and make a network that computes something else."""
  config = tiny_config(**changes)
  path = weights.write(tmp_path / 'w.npz', their_arrays(config, convert.expected_classes(config)))
  convert.convert(path, tmp_path / 'run', config=config)
  convert.convert(tmp_path / 'run', tmp_path / 'back.npz')
  said = [record.message for record in caplog.records
          if record.levelname == 'WARNING' and record.name.startswith('gapjax')]
  assert len(said) == 2 and all(told in message for message in said)
  assert 'w.npz does not say' in said[0] and f'evaluate --workdir={tmp_path}/run' in said[0]
  assert 'back.npz does not say' in said[1]


# ---- The number of classes -----------------------------------------------------------------------


def test_classes_are_those_of_the_data_sets():
  known = {name: len(cifar.class_names['label']) for name, cifar in sources.CIFAR.items()}
  known |= {name: len(meaning.classes) for name, meaning in labels.LABELS.items()}
  known |= {'digits': len(sources.read_digits().class_names['label']),
            'digit_scenes': len(digit_scenes().class_names)}
  assert known == CLASSES and set(known) == set(NAMES)


def test_classes_of_a_config(data_dir, tmp_path):
  """k * k places; else those of the dataset, a folder's too; unknown without the folder."""
  assert convert.expected_classes(tiny_config(**{'canvas.grid': 3})) == 9
  image = tiny_config(**{'canvas.target': 'image'})
  assert convert.expected_classes(image) == 10
  build.load_data(image, data_dir=data_dir)  # prepares the digits
  image.data.name = str(data_dir / 'digits')
  assert convert.expected_classes(image) == 10
  image.data.name = str(tmp_path / 'elsewhere')
  assert convert.expected_classes(image) is None
  path = weights.write(tmp_path / 'w.npz', their_arrays(image, 17))
  convert.convert(path, tmp_path / 'run', config=image)
  assert newest(tmp_path / 'run')[1]['params']['head']['pre_classifier']['bias'].shape == (17,)
  image.data.name = 'cifar11'
  refused(lambda: convert.expected_classes(image), 'cifar10')


# ---- Mistakes ------------------------------------------------------------------------------------


def test_all_that_does_not_fit_is_listed_and_nothing_is_written(tmp_path, complaint):
  config = tiny_config(**{'canvas.grid': 3})
  theirs = their_arrays(config, 9, stray=np.ones(2))
  for name in ('conv1.weight', 'bn1.bias'):
    del theirs[name]
  theirs['bn1.weight'][1] = np.nan
  path = weights.write(tmp_path / 'w.npz', theirs)
  line = complaint('convert', path, tmp_path / 'run', DIGITS, '--config.canvas.grid=5',
                   '--config.model.name=resnet10', '--config.model.width=4',
                   '--config.model.stem=canvas')
  for part in ('(resnet10, head gap, width 4, 25 classes)', '2 missing: conv1.weight, bn1.bias;',
               '1 left over: stray;', '2 of another shape: '
               'pre_classifier.weight (9, 32, 3, 3) (here: (25, 32, 3, 3)), '
               'pre_classifier.bias (9,) (here: (25,));',
               '1 not of finite real numbers: bn1.weight;'):
    assert part in line
  assert [x.name for x in tmp_path.iterdir()] == ['w.npz']


def test_a_disk_that_fails_leaves_nothing(tmp_path, monkeypatch):
  config = tiny_config()
  path = weights.write(tmp_path / 'w.npz', their_arrays(config, 4))

  def full(*_):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr('gapjax.training.workdirs.claim', full)
  with pytest.raises(OSError, match='No space'):
    convert.convert(path, tmp_path / 'runs/a', config=config)
  assert not any((tmp_path / 'runs').iterdir())


def test_mistakes_are_one_line_with_the_way_out(tmp_path, complaint):
  config = tiny_config()
  path = weights.write(tmp_path / 'w.npz', their_arrays(config, 4))
  run = convert.convert(path, tmp_path / 'run', config=config)
  (tmp_path / 'empty').mkdir()
  before = path.read_bytes()
  for argv, words in (
      ([tmp_path / 'nowhere', path], 'there is no `'),
      ([path, tmp_path / 'new'], 'give --config=FILE'),
      ([path, tmp_path / 'new', DIGITS, '--wrap=net'], '--wrap is for writing'),
      ([path, tmp_path / 'new.pth', DIGITS], 'are both files; give a workdir'),
      ([path, path, DIGITS], 'are both files; give a workdir'),
      ([path, run, DIGITS], 'is not empty; remove it, or give another workdir'),
      ([run, path], 'is there already; remove it, or give another name'),
      ([run, tmp_path / 'new'], 'weights are written to .npz'),
      ([run, tmp_path / 'new.npz', '--wrap=net'], 'leave --wrap out'),
      ([run, tmp_path / 'new.npz', DIGITS], f'is a workdir, whose config.json says the network; '
       f'leave {DIGITS} out'),
      ([run, tmp_path / 'new.npz', 'more'], 'leave more out'),
      ([tmp_path / 'empty', tmp_path / 'new.npz'], 'holds no run'),
      ([run, 'gs://bucket/w.npz'], 'remote folders are not supported'),
      ([path, tmp_path / 'new', DIGITS, '--config.model.dtype=float64'], 'JAX_ENABLE_X64=1')):
    assert words in complaint('convert', *argv)
  assert sorted(x.name for x in tmp_path.iterdir()) == ['empty', 'run', 'w.npz']
  assert path.read_bytes() == before
  shutil.rmtree(run / 'checkpoints')
  assert 'holds no checkpoint; train first' in complaint('convert', run, tmp_path / 'n.npz')
