"""Eight CPU devices, quick compilation, and one cache of compiled programs for all tests and their
child processes."""

import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jaxtyping
import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
os.environ['JAX_PLATFORMS'] = 'cpu'
XLA_FLAGS = ('--xla_force_host_platform_device_count={} --xla_backend_optimization_level=2 '
             '--xla_llvm_disable_expensive_passes=true')
os.environ['XLA_FLAGS'] = XLA_FLAGS.format(8)
# On CPUs whose widest vectors are AVX2's, torch 2.13 corrupts its memory ("corrupted double-linked
# list") in the backward pass of some of the tests' tiny networks; with older kernels it does not.
os.environ.setdefault('ONEDNN_MAX_CPU_ISA', 'SSE41')
# Tests started with & from a script ignore Ctrl-C, and so would the processes that they interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


# The shapes in these modules' signatures are checked wherever a test calls them.
jaxtyping.install_import_hook(
  ['gapjax.models.heads', 'gapjax.models.resnet', 'gapjax.models.vgg', 'gapjax.neurons.rank',
   'gapjax.neurons.yardstick'],
  'typechecker.check')


# The files that take longest: they begin, in this order, and so both workers end together.
LONGEST = ('test_parity', 'test_processes', 'test_neurons_run', 'test_train', 'test_gs',
           'test_kill', 'test_chaos', 'test_convert', 'test_devices', 'test_consistency',
           'test_wild', 'test_configs', 'test_downsample', 'test_twin', 'test_segmentation',
           'test_launch_tpu', 'test_bench', 'test_launch', 'test_cli', 'test_suites',
           'test_examples', 'test_suites_minutes', 'test_augshift', 'test_attack')


def pytest_collection_modifyitems(items):
  items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else 99)


@pytest.fixture(scope='session')
def shared(tmp_path_factory):
  """A folder of the test session, the same for all of its workers; empty at its start."""
  base = tmp_path_factory.getbasetemp()
  folder = (base.parent if 'PYTEST_XDIST_WORKER' in os.environ else base) / 'shared'
  folder.mkdir(exist_ok=True)
  return folder


@pytest.fixture(scope='session', autouse=True)
def shared_compilations(shared):
  """One compilation cache a test session."""
  import jax
  folder = str(shared / 'compilations')
  os.environ['JAX_COMPILATION_CACHE_DIR'] = folder
  os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.2'
  jax.config.update('jax_compilation_cache_dir', folder)
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.2)


@pytest.fixture
def unchecked():
  """jaxtyping's checks are the tests' alone: this test sees what a caller sees without them."""
  jaxtyping.config.update('jaxtyping_disable', True)
  yield
  jaxtyping.config.update('jaxtyping_disable', False)


@pytest.fixture(scope='session')
def data_dir(shared):
  """Where the tests' datasets are: digits prepare themselves there."""
  return shared / 'data'


@pytest.fixture(scope='session')
def gapjax():
  """Runs the command line in a process of its own: gapjax('train', ...) -> CompletedProcess."""

  def run(*argv, code=None, devices=1, env=(), timeout=600, start=False):
    environment = {**os.environ, 'PYTHONWARNINGS': 'error::DeprecationWarning:gapjax',
                   'XLA_FLAGS': XLA_FLAGS.format(devices), **dict(env)}
    command = [sys.executable, *(['-c', code] if code else ['-m', 'gapjax']), *map(str, argv)]
    if start:
      return subprocess.Popen(command, cwd=ROOT, env=environment, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return subprocess.run(command, cwd=ROOT, env=environment, text=True, check=False,
                          capture_output=True, timeout=timeout)

  return run


def python(code, *argv, check=True, **environment):
  """Runs code in a process of its own, on one device."""
  done = subprocess.run(
    [sys.executable, '-c', code, *map(str, argv)], cwd=ROOT, check=False, capture_output=True,
    text=True, timeout=300, env={**os.environ, 'XLA_FLAGS': XLA_FLAGS.format(1), **environment})
  assert done.returncode == 0 or not check, done.stderr
  return done


def wait_until(condition, *processes, seconds=300):
  """Or until one of the processes has ended."""
  end = time.time() + seconds
  while not condition() and all(p.poll() is None for p in processes) and time.time() < end:
    time.sleep(0.01)


def refused(call, message=None):
  """`call` raises a UsageError of one line, which matches; returns it."""
  from gapjax.errors import UsageError
  with pytest.raises(UsageError, match=message) as error:
    call()
  said = str(error.value)
  assert '\n' not in said and len(said) > 20
  return said


@pytest.fixture
def complaint(capsys):
  """The one line of a command that is refused: complaint('train', ...)."""
  from gapjax import cli

  def refused(*argv):
    assert cli.main([*map(str, argv)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith('gapjax: ')
    return line

  return refused


def tiny_config(**changes):
  """Digits as they are (8x8) on a 2x2 canvas, the smallest ResNet; seconds to compile and train.

  changes: fields by their full names, such as **{'model.head': 'permuted'}.
  """
  from gapjax import config as configs
  c = configs.default()
  c.num_epochs = 1
  c.batch_size = 32
  c.log_every = 5
  c.data.update(name='digits', train_images=160, flip=False)
  c.canvas.grid = 2
  c.model.update(name='resnet10', width=4, stem='cifar')
  c.eval.update(images=30, batch_size=32)
  c.update_from_flattened_dict(changes)
  return c


# Changes of tiny_config that make it the smallest DeepLabv3 on scattered digits.
SCENES = {'task': 'segmentation', 'data.name': 'digit_scenes', 'data.train_images': 24,
          'model.name': 'deeplabv3', 'model.backbone': 'resnet10', 'model.output_stride': 8,
          'segmentation.crop': (24, 32), 'eval.images': 6, 'eval.batch_size': 4, 'batch_size': 8}


@pytest.fixture(scope='session')
def scene_run(shared, data_dir):
  """A finished run of the smallest DeepLabv3: its config, workdir and summary. Leave it as it is:
  what another worker has trained is found finished.
  """
  import jax

  from gapjax.training.train import train
  workdir = shared / 'scenes'
  config = tiny_config(**SCENES, num_epochs=2, **{'checkpoint.every_epochs': 1.0})
  config.neurons.update(classes=tuple(map(str, range(10))), purity=0.6, counts=3, random_orders=2)
  with open(shared / 'scenes.lock', 'w') as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    return config, workdir, train(config, workdir=workdir, data_dir=data_dir,
                                  devices=jax.local_devices()[:2], progress=False)


def config_file(path, config):
  """Writes a config for processes; returns the path."""
  path.write_text('import json\nfrom gapjax import config\n\ndef get_config(arg=None):\n'
                  f'  c = config.default()\n  c.update(json.loads({config.to_json()!r}))\n'
                  '  return c\n')
  return path


@pytest.fixture(scope='session')
def tiny_file(tmp_path_factory):
  """Writes a config file for processes: 10 steps an epoch, saved every 5."""

  def write(**changes):
    return config_file(tmp_path_factory.mktemp('configs') / 'tiny.py', tiny_config(**{
      'data.train_images': 320, 'model.head': 'permuted', 'eval.every_epochs': 2,
      'checkpoint.every_epochs': 0.5, **changes}))

  return write


def newest(workdir):
  """(step, state as nested dicts) of the newest checkpoint, read with orbax alone."""
  import jax
  import orbax.checkpoint as ocp
  with ocp.CheckpointManager((workdir / 'checkpoints').absolute()) as manager:
    step = manager.latest_step()
    found = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore()))
  return step, jax.tree.map(np.asarray, found.state)


def make_shallow(patch):
  """MobileNetV2 and EfficientNet-Lite0 of one block a stage: 17 compile for half a minute."""
  from gapjax.models import mobilenet
  for name, stages in mobilenet.MOBILENETS.items():
    patch.setitem(mobilenet.MOBILENETS, name, tuple(
      tuple(run._replace(blocks=1) for run in stage[:1]) for stage in stages))


@pytest.fixture
def shallow(monkeypatch):
  """As `make_shallow` says."""
  make_shallow(monkeypatch)


def event_values(path):
  """{(tag, step): value} of an event file, whose records are whole."""
  from tensorboardX.proto.event_pb2 import Event
  found, raw = {}, path.read_bytes()
  while raw:  # length (8), its checksum (4), the event, its checksum (4)
    size = int.from_bytes(raw[:8], 'little')
    event = Event.FromString(raw[12:12 + size])
    found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
    raw = raw[16 + size:]
  return found


def trained(model, images):
  """Variables as if trained: no mean is 0, no scale or variance 1. Drawn by NumPy: no program."""
  import jax
  noise = np.random.default_rng(1)

  def one(path, x):
    name = path[-1].key
    if name == 'kernel':
      return noise.normal(0, np.sqrt(2 / np.prod(x.shape[:-1])), x.shape).astype(np.float32)
    low, high = (.5, 1.5) if name in ('scale', 'var') else (-.2, .2)
    return noise.uniform(low, high, x.shape).astype(np.float32)

  shapes = jax.eval_shape(lambda key: model.init(key, images, train=False), jax.random.key(0))
  return jax.tree_util.tree_map_with_path(one, shapes)


def same(a, b):
  """Whether two trees of arrays are equal to the bit, leaf by leaf."""
  import jax
  return jax.tree.all(jax.tree.map(np.array_equal, a, b))


@pytest.fixture(scope='session')
def checkout(tmp_path_factory):
  from launch_desk import make_checkout
  return make_checkout(tmp_path_factory.mktemp('checkout'))


@pytest.fixture
def desk(checkout, tmp_path):
  from launch_desk import Desk
  desk = Desk(checkout, tmp_path)
  yield desk
  desk.clean_up()
