"""Does gapjax compute what PyTorch computes? From the same weights, batches and permutations.

Compared are logits, loss, every gradient and BatchNorm's running statistics after one step, and all
parameters after 20 steps of Adam and of SGD, these in float64 (in float32 rounding alone grows to
1e-3 in five steps of SGD). gapjax runs its own pmap'd training step, its tasks' losses and its
optimisers. PyTorch, the reference, runs the twin, or has run it: tests/golden/parity.npz. Arrays
have PyTorch's names and layouts.
"""

import dataclasses
import functools
import types
import zlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from gapjax import config as configs
from gapjax import models
from gapjax.data.images import ImageDataset
from gapjax.models.downsample import Gumbel
from gapjax.models.heads import Permute
from gapjax.models.layers import PADDINGS
from gapjax.report.render import Table
from gapjax.tasks import TASKS
from gapjax.tasks.segmentation import VOID
from gapjax.training import build, optimizer, steps
from gapjax.training.devices import AXIS, Devices
from gapjax.weights import files as weights
from gapjax.weights import names

STEPS = 20
# The largest relative difference (`difference`) that counts as rounding.
TOLERANCES = {'float32': 1e-5, 'float64': 1e-9}
KINKS = 1e-2
OPTIMIZERS = {'Adam': dict(name='adam', lr=1e-3, b1=0.5, weight_decay=0.0),
              'SGD': dict(name='sgd', lr=0.005, weight_decay=5e-4)}

QUANTITIES = ('logits', 'loss', 'gradients', 'statistics')
COLUMNS = (*(f'{quantity}, {dtype}' for dtype in TOLERANCES for quantity in QUANTITIES),
           *(f'{rule}, {STEPS} steps, float64' for rule in OPTIMIZERS))


# ---- What is compared ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
  """A network and its task. size: (b, h, w) of a batch."""
  name: str
  config: ConfigDict
  num_classes: int
  size: tuple[int, int, int]


def case(name: str, changes: dict, *, size=(8, 24, 24)) -> Case:
  """A case by the changes that make it from a narrow GAPNet, fields by their full names."""
  c = configs.replaced(configs.default(), model=dict(name='resnet10', width=4))
  c.update_from_flattened_dict(changes)
  configs.validate(c)
  return of_config(name, c, size=size)


def of_config(name: str, config: ConfigDict, *, size: tuple[int, int, int] | None = None,
              num_classes: int = 10) -> Case:
  """A case of any config; without a size, of at most eight of CIFAR's images or the config's crops.

  num_classes: the dataset's. Dropout is off, since its masks are no part of what can be compared,
  and so is the clipping of gradients, in which PyTorch divides by the norm + 1e-6.
  """
  config = configs.replaced(config, model=dict(dropout=0.0, dtype='float32'),
                            optimizer=dict(clip_norm=0.0), augshift=dict(warm_up=0.0))
  train_set = stand_in(config, num_classes)
  task = build.create_task(config, train_set)
  return Case(name, config, task.num_classes,
              size or (min(config.batch_size, 8), *task.input_shape(train_set)))


def cases() -> list[Case]:
  """Each head, padding, downsampling and kind of network, varied one at a time."""
  def model(title, *, size=(8, 24, 24), **changes):
    return case(title, {f'model.{field}': value for field, value in changes.items()}, size=size)

  scenes = {'task': 'segmentation', 'model.name': 'deeplabv3', 'model.backbone': 'resnet10',
            'model.stem': 'imagenet', 'model.output_stride': 8}
  return [
    model('GAPNet'), model('GAPNet, width 64', width=64, size=(8, 64, 64)),
    model('PermuteNet', head='permuted'),
    model('PermuteNet, fixed order', head='permuted', permutation='fixed'),
    model('PermuteNet, at stage 3', head='permuted', permute_at='stage3'),
    *(model(f'padding {padding}', padding=padding)
      for padding in PADDINGS if padding not in ('zero', 'none')),
    model('padding none', padding='none', head='linear', size=(8, 102, 102)),
    model('BlurPool', downsample='blur'),
    model('BlurPool, 4 taps', downsample='blur', blur_size=4),
    model('APS', downsample='polyphase', blur_size=1, head='linear', size=(8, 32, 32)),
    model('LPS', downsample='learned_polyphase', blur_size=1, head='linear', stem='cifar',
          size=(8, 16, 16)),
    model('ResNet-50', name='resnet50', stem='cifar', head='linear', width=2),
    model('VGG-11', name='vgg11', head='linear', size=(8, 64, 64)),
    case('AugShift', {'task': 'classification', 'augshift.crops': 2, 'model.stem': 'cifar',
                      'model.head': 'linear'}, size=(8, 16, 16)),
    case('DeepLabv3', scenes, size=(16, 24, 32)),
    case('DeepLabv3+, focal loss', {**scenes, 'model.name': 'deeplabv3plus',
                                    'segmentation.loss': 'focal'}, size=(16, 24, 32))]


def draw(name: str) -> np.random.Generator:
  """Random numbers that depend on a name alone."""
  return np.random.default_rng(zlib.crc32(name.encode()))


def draw_weights(case: Case) -> dict[str, np.ndarray]:
  """A value for every weight, by PyTorch's names, float32; BatchNorm's statistics are other than
  at the start."""
  def value(name, shape):
    kind, normal = name.rsplit('.', 1)[-1], draw(name).standard_normal(shape)
    if kind == 'running_var' or (kind == 'weight' and len(shape) == 1):
      # The last of a bottleneck is small: 50 layers make much of rounding else.
      return (1 + np.tanh(normal) / 2) * (0.2 if name.endswith('bn3.weight') else 1)
    return normal / (np.sqrt(np.prod(shape[1:]) / 2) if kind == 'weight' else 10)

  leaves = flatten_dict(shapes(network_and_task(case, 'float32')[0], case), sep='/')
  return {name: value(name, weights.torch_shape(leaves[path].shape)).astype(np.float32)
          for name, path in names.names(case.config.model).items()}


def draw_batch(case: Case, step: int) -> dict[str, np.ndarray]:
  """The batch of a step, as the task's loss takes it: noise, and any target at all."""
  rng, (b, h, w) = draw(f'{case.name} {step}'), case.size
  if TASKS[case.config.task].dense:
    labels = rng.integers(case.num_classes, size=case.size)
    return {'images': rng.standard_normal((b, h, w, 3)),
            'labels': np.where(rng.random(case.size) < 0.1, VOID, labels)}
  targets = rng.integers(case.num_classes, size=b)
  if case.config.task == 'canvas':
    return {'canvases': rng.standard_normal((b, h, w, 3)), 'targets': targets}
  return {'images': rng.standard_normal((case.config.augshift.crops, b, h, w, 3)),
          'labels': targets}


# ---- gapjax --------------------------------------------------------------------------------------


def with_given_batches(task):
  """A task of which a batch is what the step is given, and metrics are the loss and the logits."""
  def loss(network, batch, step):
    logits = []

    def kept(images):
      outputs = network(images)
      logits.append(outputs[0])
      return outputs

    value, _ = task.loss(kept, batch, step)
    return value, {'loss': value, 'logits': logits[0]}

  return types.SimpleNamespace(train_batch=lambda keys, data, examples: examples, loss=loss)


def stand_in(config: ConfigDict, num_classes: int) -> ImageDataset:
  """One image of CIFAR's normalisation, in the config's size: all that a task is made from."""
  side = config.data.image_size or 32
  return ImageDataset('cifar10', np.zeros((1, side, side, 3), np.uint8), np.zeros(1, np.int32),
                      tuple(map(str, range(num_classes))))


def network_and_task(case: Case, dtype: str):
  """The network and the task of a case in a dtype."""
  config = configs.replaced(case.config, model=dict(dtype=dtype))
  task = build.create_task(config, stand_in(config, case.num_classes))
  return models.create_network(config.model, num_classes=case.num_classes, axis_name=AXIS,
                               total_steps=STEPS, platform=jax.default_backend()), task


def shapes(model, case: Case):
  """The shapes and types of a network's variables."""
  image = jnp.zeros((1, *case.size[1:], 3), model.dtype)
  return jax.eval_shape(lambda: model.init(jax.random.key(0), image, train=True))


class Candidate:
  """A case in gapjax, from given weights: what is held against reference.Reference, with the same
  methods. Needs JAX_ENABLE_X64 for float64."""

  def __init__(self, case: Case, dtype: str):
    self.case, self.dtype, self.devices = case, dtype, Devices(jax.local_devices()[:1])
    self.model, task = network_and_task(case, dtype)
    self.names = names.names(case.config.model)
    self.key = steps.stream(0, steps.TRAIN)
    self.variables = weights.convert(shapes(self.model, case), draw_weights(case), self.names,
                                     what='drawn weights')
    # The gradient is kept in place of an optimiser's state, and no parameter moves.
    self.keep = optax.GradientTransformation(
      lambda params: jax.tree.map(jnp.zeros_like, params),
      lambda gradient, _, params: (jax.tree.map(jnp.zeros_like, params), gradient))
    self.step = self.devices.pmap(
      steps.make_train_step(self.model, with_given_batches(task), self.keep, axis_name=AXIS),
      split=(False, False, False, True), donate=())

  def gradients(self, params, batch_stats, number: int):
    """After a step on the batch of that number: the state, whose opt_state is the gradient, and
    {'loss', 'logits'}."""
    state = steps.TrainState(np.int32(number), params, batch_stats, self.keep.init(params))
    batch = jax.tree.map(lambda x: x.astype(self.dtype if x.dtype == float else np.int32),
                         draw_batch(self.case, number))
    state, metrics = self.step(*self.devices.replicate((state, self.key, {})),
                               jax.tree.map(lambda x: x[None], batch))
    return self.devices.to_host(state), self.devices.to_host(metrics['batch'])

  def one_step(self) -> dict[str, dict[str, np.ndarray]]:
    """{'logits', 'loss', 'gradients', 'statistics'}: arrays by PyTorch's names."""
    params, batch_stats = self.variables['params'], self.variables['batch_stats']
    state, metrics = self.gradients(params, batch_stats, 0)
    logits = np.moveaxis(metrics['logits'], -1, 1)  # (b, k) or (b, h, w, k) -> (b, k, ...)
    return {'logits': {'logits': logits}, 'loss': {'loss': metrics['loss']},
            'gradients': self.by_name({'params': state.opt_state}),
            'statistics': self.by_name({'batch_stats': state.batch_stats})}

  def train(self, rule: str) -> dict[str, np.ndarray]:
    """All parameters after STEPS steps of a key of OPTIMIZERS."""
    config = configs.replaced(self.case.config, optimizer=OPTIMIZERS[rule])
    tx = optimizer.create_optimizer(config, optax.constant_schedule(config.optimizer.lr))
    update = jax.jit(tx.update)
    params, batch_stats = self.variables['params'], self.variables['batch_stats']
    opt_state = tx.init(params)
    for number in range(STEPS):
      state, _ = self.gradients(params, batch_stats, number)
      updates, opt_state = update(state.opt_state, opt_state, params)
      params, batch_stats = optax.apply_updates(params, updates), state.batch_stats
    return self.by_name({'params': jax.device_get(params)})

  @functools.cached_property
  def draws(self) -> dict[str, np.ndarray]:
    """What the network draws at each step: {'permutation': (STEPS, c) integers} of PermuteNet's,
    {'noise': (STEPS, layers, b, 4)} of LPS's, both or neither."""
    b = self.case.size[0] * (self.case.config.augshift.crops if
                             self.case.config.augshift.stacked else 1)
    image = jnp.zeros((b, *self.case.size[1:], 3), self.model.dtype)
    alone = self.model.clone(axis_name=None)

    @jax.jit
    def drawn(step):
      permutations, noise = [], []

      def kept(call, arguments, keywords, context):
        """Permutes, in place of features, the numbers of their channels."""
        if isinstance(context.module, Permute):
          x, = arguments
          permutations.append(call(jnp.arange(x.shape[-1])))
          return x
        y = call(*arguments, **keywords)
        if isinstance(context.module, Gumbel):
          noise.append(y)
        return y

      _, key = jax.random.split(jax.random.fold_in(self.key, step))
      with nn.intercept_methods(kept):
        steps.TrainingNetwork(
          alone, self.variables['params'], self.variables['batch_stats'], key, number=step,
          places=jnp.arange(b), batch_size=b)(image)
      return {**({'permutation': permutations[0]} if permutations else {}),
              **({'noise': jnp.stack(noise)} if noise else {})}

    every = [drawn(step) for step in range(STEPS)]
    return {name: np.stack([draws[name] for draws in every]) for name in every[0]}

  def by_name(self, tree) -> dict[str, np.ndarray]:
    """Arrays of a tree like the variables, or a part of it, by PyTorch's names."""
    leaves = flatten_dict(tree, sep='/')
    return {name: weights.to_torch(np.asarray(leaves[path])) for name, path in self.names.items()
            if path in leaves}


# ---- The difference ------------------------------------------------------------------------------


def difference(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> tuple[float, float]:
  """The largest absolute and relative difference of arrays by PyTorch's names.

  Relative is in norm, over the norm of the layer's arrays together: the gradient of a bias before
  BatchNorm, for one, is 0 but for rounding, that of its kernel is not.
  """
  if set(ours) != set(theirs):
    raise ValueError(f'other names: {sorted(set(ours) ^ set(theirs))}')
  layers = {}
  for name, x in theirs.items():
    layers.setdefault(name.rpartition('.')[0], []).append(np.asarray(x, float).ravel())
  norms = {layer: np.linalg.norm(np.concatenate(arrays)) for layer, arrays in layers.items()}
  differences = {name: np.asarray(ours[name], float) - x for name, x in theirs.items()}
  with np.errstate(divide='ignore'):  # of a layer of zeros, any difference is infinitely large
    relative = [size and size / norms[name.rpartition('.')[0]] for name, size in (
      (name, np.linalg.norm(x)) for name, x in differences.items())]
  # NumPy's max: Python's passes over NaN.
  return float(np.max([np.abs(x).max() for x in differences.values()])), float(np.max(relative))


def project(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Two sums of each array with random signs, and its norm: what a golden file keeps of it.

  A change of an array changes the sums by about as much, in norm.
  """
  def sums(name, x):
    x = np.asarray(x, float).ravel()
    signs = draw(name).choice([-1.0, 1.0], size=(2, x.size))
    return np.append(signs @ x, np.linalg.norm(x))

  return {name: sums(name, x) for name, x in arrays.items()}


def too_large(differences: dict[str, tuple[float, float]], *, kinks: bool = False) -> list[str]:
  """Which of a case's relative differences are more than rounding (TOLERANCES).

  kinks: of a network of any size: rounding decides for some of its many values on which side of a
  ReLU's kink they fall, and one of them changes float32's gradients by 1e-3 (KINKS).
  """
  limits = TOLERANCES | ({'gradients, float32': KINKS} if kinks else {})
  return [column for column, (_, relative) in differences.items()
          if not relative <= limits.get(column, limits[column.rpartition(', ')[2]])]


def tables(differences: dict[str, dict[str, tuple[float, float]]]) -> list[Table]:
  """One table for each type, of the cases' differences by their names."""
  return [Table(
    ['network', *(column.removesuffix(f', {dtype}') for column in COLUMNS if dtype in column)],
    [[name, *('{:.1e} / {:.1e}'.format(*row[column]) for column in COLUMNS if dtype in column)]
     for name, row in differences.items()],
    caption=f'{dtype}: the largest absolute / relative difference')
    for dtype in TOLERANCES]
