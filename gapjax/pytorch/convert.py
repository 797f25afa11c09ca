"""The verb `convert`: a file of PyTorch's weights to a run, and a run to such a file.

Neither needs the dataset. What decides which array is which is the run's config (names.py).
"""

import logging
import os
import pathlib
import re
import shlex
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from gapjax import config as configs
from gapjax import data, models, paths
from gapjax.errors import UsageError
from gapjax.tasks import TASKS
from gapjax.training import build, optimizer, workdirs
from gapjax.training.checkpoint import Checkpoints, newest
from gapjax.training.devices import Devices
from gapjax.training.log import METRICS
from gapjax.training.steps import TrainState
from gapjax.weights import files as weights
from gapjax.weights import names

log = logging.getLogger(__name__)


def convert(source, target, *, config: ConfigDict | None = None,
            wrap: str | None = None) -> pathlib.Path:
  """A file of weights to a new workdir, or the newest checkpoint of a workdir to a new file.

  Args:
    source: a file as weights.read takes it, or the workdir of a run.
    target: the workdir, or the file as weights.write takes it.
    config: of the run that the new workdir is to hold; a workdir to be read has its own.
    wrap: what weights.write wraps the file's weights in.

  Returns:
    The path of what was made.

  Raises UsageError when one of them is not what it should be, or the weights are not those of the
  config's network. Nothing is written then.
  """
  source, target = (pathlib.Path(path).expanduser() for path in (source, target))
  if not source.exists():
    raise UsageError(f'there is no `{source}`; give the workdir of a run, or a file of weights '
                     f'({", ".join(weights.SUFFIXES)})')
  if source.is_dir():
    return to_file(source, target, wrap=wrap)
  if wrap is not None:
    raise UsageError(f'--wrap is for writing a file of weights; {target} is to be a workdir: leave '
                     'it out')
  if config is None:
    raise UsageError(f'which network are the weights in {source}? give --config=FILE, such as '
                     'configs/gapnet_cifar10.py')
  return to_workdir(source, target, config=config)


def to_workdir(source, target, *, config: ConfigDict) -> pathlib.Path:
  """A file of weights to a new workdir: config.json, and a checkpoint at step 0 with a fresh state
  of the optimiser. Arguments and errors as `convert`'s."""
  if target.suffix in weights.SUFFIXES or target.is_file():
    raise UsageError(f'{source} and {target} are both files; give a workdir in place of one')
  if target.exists() and any(target.iterdir()):
    raise UsageError(f'{target} is not empty; remove it, or give another workdir')
  arrays, name_map = weights.read(source), names.names(config.model)
  layer = names.LINEAR[config.model.stem]
  theirs = [name for name in ('linear.weight', 'linear_location.weight') if name in arrays]
  if config.model.head == 'linear' and f'{layer}.weight' not in arrays and len(theirs) == 1:
    arrays = {re.sub(r'^linear(_location)?\.', f'{layer}.', name): x for name, x in arrays.items()}
  num_classes = expected_classes(config)
  if num_classes is None:
    bias = arrays.get(list(name_map)[-1], np.zeros(1))
    num_classes = bias.size
    log.info('%s is not on this machine: its number of classes is the file\'s, %d',
             config.data.name, num_classes)
  state = initial_state(config, num_classes)
  variables = weights.convert(
    {'params': state.params, 'batch_stats': state.batch_stats}, arrays, name_map,
    unread=names.unread(config.model), what=f'the weights in {source} and the network of this '
    f'config ({describe(config)}, {num_classes} classes)')
  # In a folder of our own, renamed into place: whole or not at all.
  target.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=target.parent, prefix='incomplete.') as temporary:
    workdir = pathlib.Path(temporary) / 'run'
    workdir.mkdir()
    with Checkpoints(workdir) as checkpoints:
      checkpoints.save(0, state.replace(**variables), {'wall_seconds': 0.0})
      checkpoints.wait()
    workdirs.claim(workdir, workdirs.settled(config, platform=Devices().platform))
    workdir.rename(target)
  log.warning('%s; if that is right, `gapjax evaluate --workdir=%s` gives the accuracy that its '
              'authors found', untold(source, config), shlex.quote(str(target)))
  return target


def to_file(source, target, *, wrap: str | None = None) -> pathlib.Path:
  """The newest checkpoint of a workdir to a file. Arguments and errors as `convert`'s."""
  config = workdirs.read_config(source)
  step, state = newest(source, initial_state(config, 1), any_shape=True)
  arrays = weights.export({'params': state.params, 'batch_stats': state.batch_stats},
                          names.names(config.model), unread=names.unread(config.model))
  evaluated = [line for line in paths.read_lines(source / METRICS)
               if line['split'] == 'eval' and line['step'] <= step]
  # What the authors' scripts print and go on from: percent, and how many epochs are done.
  beside = {'acc': 100 * evaluated[-1]['accuracy'] if evaluated else 0.0,
            'epoch': min(int(len(evaluated) * config.eval.every_epochs), config.num_epochs)}
  target = weights.write(target, arrays, wrap=wrap, beside=beside)
  log.info('%s, step %d', describe(config), step)
  log.warning('%s: the network that reads it must be built with them', untold(target, config))
  return target


def untold(path, config: ConfigDict) -> str:
  """What a file of weights does not say, since no array depends on it, and a config does."""
  m, dense = config.model, TASKS[config.task].dense
  mobilenet = dense and m.backbone == 'mobilenetv2'
  permuted = not dense and m.head == 'permuted'
  fields = ['padding', 'downsample', *['blur_size'] * (m.downsample != 'stride'),
            *['output_stride'] * dense, *['early_padding'] * mobilenet,
            *['permutation', 'permute_at'] * permuted,
            *['permutation_seed'] * (permuted and m.permutation == 'fixed')]
  notes = [
    *["the authors' networks of padding `none` enlarge the input of every convolution, and so "
      'compute something else'] * (m.padding == 'none'),
    *["the authors' MobileNetV2 has early_padding=True, torchvision's False"] * mobilenet,
    *[f"images are normalised by {config.data.name}'s own mean and std"] * (not dense)]
  return f'{path} does not say ' + '; '.join([
    ', '.join(f'model.{field}={m[field]}' for field in fields), *notes])


def describe(config: ConfigDict) -> str:
  """The network of a config, in a few words."""
  m = config.model
  return f'{m.name}, ' + (m.backbone if TASKS[config.task].dense else f'head {m.head}') + (
    f', width {m.width}')


def expected_classes(config: ConfigDict) -> int | None:
  """How many classes the network of a config tells apart; None when its dataset is a folder that
  is not on this machine."""
  if config.task == 'canvas' and config.canvas.target == 'location':
    return config.canvas.grid ** 2
  name = config.data.name
  if name in data.CLASSES:
    return data.CLASSES[name]
  if os.sep in name and not os.path.exists(os.path.expanduser(name)):
    return None
  return len(TASKS[config.task].load_split(name, split=config.data.train_split,
                                           limit=1).class_names)


def initial_state(config: ConfigDict, num_classes: int) -> TrainState:
  """The state that a run of a config starts from, with zeros in place of parameters.

  Needs no images: parameters depend neither on their size nor on what a small map would be
  refused for, the padding and, but for LPS, which has some of its own, the downsampling.
  """
  model = configs.replaced(config.model, padding='zero')
  if model.downsample != 'learned_polyphase':
    model.downsample = 'stride'
  build.image_dtype(config)
  network = models.create_network(model, num_classes=num_classes)
  rule = optimizer.create_optimizer(config, optimizer.create_schedule(config, steps_per_epoch=1,
                                                            total_steps=1))

  def init():
    variables = network.init(jax.random.key(0), jnp.zeros((1, 64, 64, 3)), train=False)
    return variables, rule.init(variables['params'])

  variables, opt_state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), jax.eval_shape(init))
  return TrainState(np.zeros((), np.int32), variables['params'], variables['batch_stats'],
                    opt_state)
