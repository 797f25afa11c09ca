"""`gapjax bench`: its counts and figures against definitions; the verb; PyTorch in turns."""

import itertools
import json
import sys
import types

import flax.linen as nn
import jax
import numpy as np
import pytest
from conftest import ROOT, SCENES, refused, tiny_config

from gapjax import cli, models
from gapjax import config as configs
from gapjax.errors import CheckFailed
from gapjax.models.layers import Conv, Dense, SeparableConv
from gapjax.speed import bench, flops, inputs
from gapjax.training.devices import Devices

TINY = [f'--config={ROOT}/configs/digits.py', '--config.model.name=resnet10',
        '--config.model.width=4', '--config.canvas.grid=2', '--config.data.image_size=8',
        '--config.data.train_images=64', '--config.batch_size=16']


# ---- What is computed, and what could be ---------------------------------------------------------


class Small(nn.Module):
  """Every kind of layer that counts."""

  @nn.compact
  def __call__(self, x, train):
    x = Conv(8, 3, stride=2, use_bias=True)(x)  # (1, 10, 12, 3) -> (1, 5, 6, 8)
    x = Conv(4, 3, padding='none', dilation=2, groups=2)(x[:, :, :5])  # (1, 5, 5, 8) -> 1x1x4
    x = SeparableConv(6)(x)
    return Dense(7)(x.mean((1, 2)))


def test_flops_of_a_small_network():
  by_hand = 2 * (5 * 6 * 8 * 3 * 3 * 3 + 1 * 1 * 4 * 3 * 3 * 4 + (9 * 4 + 4 * 6) + 6 * 7)
  assert flops.forward_flops(Small(), (10, 12, 3)) == by_hand


@pytest.mark.parametrize(('name', 'published'), [('resnet18', 1.814), ('resnet50', 4.089)])
def test_flops_of_imagenet_resnets(name, published):
  """torchvision's documentation gives these, in billions of multiplications."""
  config = configs.default().model
  config.update(name=name, stem='imagenet', head='linear')
  model = models.create_network(config, num_classes=1000, axis_name=None)
  assert flops.forward_flops(model, (224, 224, 3)) / 2e9 == pytest.approx(published, abs=5e-4)


def test_flops_of_a_step_are_the_networks_on_a_cpu_too(shallow, data_dir):
  """MobileNetV2's depthwise convolutions, which on CPU are sums of products, count as elsewhere."""
  config = tiny_config(**{**SCENES, 'model.backbone': 'mobilenetv2', 'model.stem': 'imagenet',
                          'model.width': 8, 'steps_per_call': 4, 'checkpoint.every_epochs': 0.01})
  program = inputs.Program(config, Devices(), data_dir)
  # Every call makes all of its batches, also where training would stop to evaluate.
  assert next(program.feed.plan.calls(0)) == range(config.steps_per_call)
  plain = models.create_network(config.model, num_classes=11, platform=None)
  assert program.flops == 3 * 8 * flops.forward_flops(plain, (*config.segmentation.crop, 3))


def gpu(kind):
  return types.SimpleNamespace(platform='gpu', device_kind=kind)


@pytest.mark.parametrize(('kind', 'dtype', 'count', 'expected'), [
  ('NVIDIA H100 80GB HBM3', 'bfloat16', 1, 989e12),
  ('NVIDIA H100 80GB HBM3', 'float32', 2, 989e12),  # TF32: half the rate, two devices
  ('NVIDIA H100 PCIe', 'bfloat16', 1, 756e12),
  ('NVIDIA A100-SXM4-40GB', 'bfloat16', 1, 312e12),
  ('NVIDIA A100 80GB PCIe', 'bfloat16', 1, 312e12),
  ('Tesla V100-SXM2-16GB', 'bfloat16', 1, 125e12),
  ('NVIDIA L4', 'bfloat16', 1, 121e12),
  ('TPU v4', 'bfloat16', 4, 1100e12),
  ('TPU v5 lite', 'bfloat16', 1, 197e12),
  ('TPU v5', 'float32', 1, 459e12),
  ('TPU v6 lite', 'bfloat16', 1, 918e12),
])
def test_peaks_of_known_devices(kind, dtype, count, expected):
  found, what = flops.peak([gpu(kind)] * count, dtype)
  assert found == pytest.approx(expected) and kind in what


@pytest.mark.parametrize(('kind', 'dtype'), [
  ('NVIDIA L40S', 'bfloat16'), ('NVIDIA H100 80GB HBM3 MIG 1g.10gb', 'bfloat16'),
  ('NVIDIA H100 NVL', 'bfloat16'), ('NVIDIA H200', 'float64'), ('TPU v2', 'bfloat16')])
def test_no_peak_is_made_up(kind, dtype):
  assert flops.peak([gpu(kind)], dtype) == (None, f'no peak is known of {kind} in {dtype}')


def test_measured_peak_is_of_the_fastest_product(monkeypatch):
  ticks = iter([0, 4, 10, 11, 20, 22])  # seconds at the start and end of three products
  monkeypatch.setattr(flops.time, 'perf_counter', lambda: next(ticks))
  assert flops.matmul_peak('float32', size=8, rounds=3) == 2 * 8 ** 3 / 1


# ---- Figures and turns ---------------------------------------------------------------------------


def test_figures_of_rounds():
  found = bench.figures([{'seconds': 2.0, 'input_seconds': 0.5},
                          {'seconds': 4.0, 'input_seconds': 0.0},
                          {'seconds': 10.0, 'input_seconds': 1.5}], steps_taken=5, batch_size=8)
  assert found == {
    'steps_per_round': 5, 'by_round': [20.0, 10.0, 4.0], 'input_share': 2.0 / 16.0,
    'images_per_second': {'median': 10.0, 'min': 4.0, 'max': 20.0},
    'step_seconds': {'median': 0.8, 'min': 0.4, 'max': 2.0}}
  assert bench.figures([{'seconds': 1.0, 'input_seconds': None}], steps_taken=1,
                        batch_size=1)['input_share'] is None


class Side:
  """Stands in for both sides: so many seconds a step in each round."""

  def __init__(self, name, turns, seconds):
    self.name, self.turns, self.seconds = name, turns, iter(seconds)
    self.config, self.images, self.flops = tiny_config(), 'nothing', 6e9
    self.step_seconds = 0.1

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.turns.append('end')

  def whole_calls(self, steps):
    return round(steps)

  def run(self, steps):
    self.turns.append(self.name)
    return {'seconds': next(self.seconds) * steps, 'input_seconds': None}

  def facts(self):
    return {'compile_seconds': None, 'memory_bytes': 2e9, 'memory': 'of the process',
            'mode': 'compiled', 'version': '2', 'device': 'a CPU',
            'dtype': 'bfloat16' if self.name == 'torch' else 'float32'}


def test_turns_and_ratio(monkeypatch):
  """The order alternates; the ratio is the median of the rounds' own ratios."""
  turns = []
  monkeypatch.setattr(bench, 'Trainer', lambda *_: Side('gapjax', turns, [0.1, 0.2, 0.4]))
  monkeypatch.setattr(bench, 'TorchProcess', lambda *_: Side('torch', turns, [0.2, 0.2, 1.6]))
  monkeypatch.setattr(flops, 'matmul_peak', lambda dtype: 60e9)
  monkeypatch.setenv('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')  # and put back what there was
  found = bench.bench(tiny_config(), rounds=3, against='torch')
  assert found['device'].startswith('cpu x 1 ')  # of eight: PyTorch uses one
  assert turns == ['gapjax', 'torch', 'torch', 'gapjax', 'gapjax', 'torch', 'end']
  assert found['ratio'] == {'median': pytest.approx(2), 'min': pytest.approx(1),
                            'max': pytest.approx(4)}
  assert found['gapjax']['steps_per_round'] == 50  # of 0.1 s, about ROUND_SECONDS
  assert found['gapjax']['utilisation'] == pytest.approx(0.5)  # 6 GFLOP in 0.2 s, of 60 GFLOP/s
  assert found['torch']['utilisation'] is None  # the peak is float32's
  lines = bench.lines(found)
  assert lines[-1] == 'ratio 2.00' and lines[-2].endswith('2.00 (1.00 to 4.00)')


# ---- Data ----------------------------------------------------------------------------------------


def test_random_images_stand_in_for_what_is_not_prepared(tmp_path):
  config = configs.default()
  config.data.update(name='cifar100', train_images=20)
  train_set, task, what = inputs.training_set(config, tmp_path)
  assert what == 'random images of the size of cifar100, which is not prepared'
  assert train_set.images.shape == (20, 32, 32, 3) and task.grid == 3
  config.update(task='segmentation')
  config.data.update(name='camvid', image_size=180, train_images=2)
  scenes, task, _ = inputs.training_set(config, tmp_path)
  assert [scene['image'].shape for scene in scenes] == [(180, 240, 3)] * 2
  assert scenes.size(1) == (180, 240)
  assert task.num_classes == 11 and scenes[0]['label'].max() < 11


def test_prepared_data_is_taken_and_what_is_damaged_refused(data_dir, tmp_path):
  train_set, _, what = inputs.training_set(tiny_config(), data_dir)
  assert what == 'digits' and len(train_set) == 160
  (tmp_path / 'cifar10' / '1.0.0').mkdir(parents=True)
  (tmp_path / 'cifar10' / '1.0.0' / 'dataset_info.json').write_text('{')
  refused(lambda: inputs.training_set(configs.default(), tmp_path), 'incomplete')


# ---- The verb ------------------------------------------------------------------------------------


def test_whole_calls_are_taken():
  """Five steps in calls of four are eight."""
  trainer = object.__new__(bench.Trainer)
  trainer.config, trainer.devices = tiny_config(steps_per_call=4), Devices(jax.local_devices()[:2])
  trainer.batches = itertools.repeat(np.zeros((4, 6)))
  trainer.state, trainer.key, trainer.data, trainer.count = np.zeros(()), None, None, 4
  trainer.train_steps = lambda state, key, data, batch, count: (state + count, None)
  found = trainer.run(5)
  assert trainer.state == 8 == trainer.whole_calls(5) == trainer.whole_calls(8)
  assert trainer.whole_calls(0.1) == 4
  assert 0 < found['input_seconds'] < found['seconds']


def test_the_verb(capsys, data_dir, tmp_path):
  """On eight devices: table, JSON and trace; the figures agree with each other."""
  output = tmp_path / 'bench.json'
  assert cli.main(['bench', *(x for x in TINY if 'canvas' not in x), '--config.task=classification',
                   '--config.augshift.crops=2', '--config.augshift.max_shift=2',
                   '--config.eval.shift=2', '--config.eval.max_shift=2', '--steps=2', '--rounds=2',
                   f'--data_dir={data_dir}', f'--output={output}',
                   f'--profile={tmp_path / "trace"}']) == 0
  found = json.loads(output.read_text())
  assert {'device', 'load', 'versions', 'config', 'data', 'rounds', 'model_flops', 'peak',
          'profile', 'gapjax', 'torch', 'ratio'} == set(found)
  assert found['torch'] is found['ratio'] is None and found['versions']['jax'] == jax.__version__
  ours = found['gapjax']
  assert len(ours['by_round']) == found['rounds'] == 2 and ours['steps_per_round'] == 2
  assert ours['images_per_second']['max'] * ours['step_seconds']['min'] == pytest.approx(16)
  assert ours['utilisation'] == pytest.approx(
    found['model_flops'] / ours['step_seconds']['median'] / found['peak']['flops_per_second'])
  assert 0 < ours['input_share'] < 1 and ours['compile_seconds'] > 0
  assert ours['memory_bytes'] > ours['temporary_bytes'] > 0
  # Two crops of 16 images, forward and backward.
  config = configs.default()
  config.update(found['config'])
  model = models.create_network(config.model, num_classes=10, axis_name=None)
  assert found['model_flops'] == 3 * 2 * 16 * flops.forward_flops(model, (8, 8, 3))
  folder = tmp_path / 'trace'
  assert list(folder.rglob('*.xplane.pb')) and str(folder) in found['profile']
  printed = capsys.readouterr().out
  assert found['profile'] in printed and f'{ours["utilisation"]:.1%}' in printed


@pytest.mark.parametrize(('argv', 'expected'), [
  (['--against=tensorflow'], 'unknown --against `tensorflow`; known: torch'),
  (['--against=torch', '--torch=compile'], '(did you mean `compiled`?)'),
  (['--steps=0'], '--steps: must be at least 1, not 0'),
  (['--rounds=0'], '--rounds: must be at least 1, not 0'),
  (['--config.batch_size=30'], '30 cannot be shared by 8 devices'),
  (['--config.model.widht=8'], '(did you mean `model.width`?)'),
  (['--output=nowhere/bench.json'], 'there is no such folder'),
  (['--profile=file'], 'file'),
  (['--config=nowhere.py'], 'no config file `nowhere.py`'),
])
def test_mistakes(complaint, monkeypatch, tmp_path, argv, expected):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'file').write_text('')
  assert expected in complaint('bench', *argv)


def test_without_pytorch(complaint, monkeypatch):
  find = bench.importlib.util.find_spec
  monkeypatch.setattr(bench.importlib.util, 'find_spec',
                      lambda name, *rest: None if name == 'torch' else find(name, *rest))
  monkeypatch.setitem(sys.modules, 'torch', None)
  monkeypatch.setenv('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
  line = complaint('bench', '--against=torch', '--config.batch_size=48')
  assert '--against=torch needs PyTorch: pip install torch, or leave it out' in line


def test_a_process_of_pytorch_that_fails(monkeypatch):
  pytest.importorskip('torch')
  monkeypatch.setattr(bench.sys, 'executable', '/bin/false')
  with pytest.raises(CheckFailed, match=r'ended \(exit code 1\)'):
    bench.TorchProcess(tiny_config(), 'plain', None)


# ---- PyTorch -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_against_pytorch(gapjax, data_dir, tmp_path):
  pytest.importorskip('torch')
  done = gapjax('bench', *TINY, '--against=torch', '--steps=2', '--rounds=3',
                '--config.model.head=permuted', f'--data_dir={data_dir}',
                f'--output={tmp_path}/bench.json')
  assert done.returncode == 0, f'exit code {done.returncode}: {done.stderr}'
  found = json.loads((tmp_path / 'bench.json').read_text())
  ratios = np.divide(found['gapjax']['by_round'], found['torch']['by_round'])
  assert found['ratio'] == {'median': pytest.approx(np.median(ratios)),
                            'min': pytest.approx(ratios.min()), 'max': pytest.approx(ratios.max())}
  assert done.stdout.splitlines()[-1] == f'ratio {found["ratio"]["median"]:.2f}'
  assert found['torch']['mode'] == 'plain' and found['torch']['memory_bytes'] > 1e7


@pytest.mark.parametrize('changes', [
  {}, {'task': 'classification', 'augshift.crops': 2, 'augshift.max_shift': 2,
       'eval.max_shift': 2, 'optimizer.clip_norm': 1.0},
  {'model.head': 'permuted', 'model.permutation': 'fixed'}])
def test_the_twins_step_trains(data_dir, changes):
  """Every parameter that the loss depends on moves; so many steps are taken."""
  torch = pytest.importorskip('torch')
  from gapjax.pytorch.bench import TimedTwin
  twin = TimedTwin(tiny_config(**changes), 'plain', data_dir)
  before = {name: x.clone() for name, x in twin.network.named_parameters()}
  steps = twin.rule.state[twin.network.conv1.weight]['step'].clone()
  twin.run(2)
  assert twin.rule.state[twin.network.conv1.weight]['step'] == steps + 2
  unmoved = [name for name, x in twin.network.named_parameters() if torch.equal(x, before[name])]
  idle = ['linear_location.weight', 'linear_location.bias']  # GAPNet has them and uses them not
  assert unmoved == ([] if 'model.head' in changes else idle)
