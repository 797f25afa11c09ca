"""Every field with its default, reading a config from file and flags, and its validation."""

import json
import math
import re

from absl import flags
from ml_collections import ConfigDict, config_flags

from gapjax.errors import UsageError, check_choice, nearest
from gapjax.models import BACKBONES, DEEPLABS, DTYPES, MODELS, OUTPUT_STRIDES, VGGS
from gapjax.models.downsample import DOWNSAMPLINGS
from gapjax.models.heads import HEADS, PERMUTATIONS
from gapjax.models.layers import PAD_MODES, PADDINGS
from gapjax.models.mobilenet import MOBILENETS
from gapjax.models.resnet import STEMS

TARGETS = ('location', 'image')
FILLS = ('zero', 'black')
LOSSES = ('cross_entropy', 'focal')
OPTIMIZERS = ('adam', 'sgd')
SCHEDULES = ('constant', 'cosine', 'poly', 'step')
TASKS = ('canvas', 'classification', 'segmentation')
# Beginnings of the fields that a task does not read, and that only deeplab networks do.
_DEEPLAB = ('model.backbone', 'model.pretrained', 'model.output_stride', 'model.dropout',
            'model.separable', 'model.early_padding', 'optimizer.backbone')
_SHIFTS = ('augshift.', 'eval.shift', 'eval.max_shift', 'eval.map_step')
_SCENES = ('segmentation.', 'eval.padded', *_DEEPLAB)
NOT_READ = {
  'canvas': (*_SHIFTS, *_SCENES, 'neurons.classes', 'neurons.split'),
  'classification': ('canvas.', *_SCENES, 'neurons.'),
  'segmentation': ('canvas.', *_SHIFTS, 'data.flip', 'model.head', 'model.permut')}


def default() -> ConfigDict:
  """GAPNet's location task on a 3x3 canvas of CIFAR-10, as the authors train it (section 3)."""
  c = ConfigDict()
  c.task = 'canvas'  # canvas (section 3), classification of shifted images (4), segmentation (5)
  c.seed = 0  # initialisation, order of the data, augmentation, placement, permutations
  c.num_epochs = 20  # passes over the training images
  c.batch_size = 48  # global: shared by all devices
  c.steps_per_call = 0  # training steps in one dispatch; 0: 1 on CPU, 32 on GPU and TPU
  c.sync_batch_norm = True  # BatchNorm statistics over the global batch, not a device's share
  c.log_every = 50  # steps between two lines of training metrics (rounded up to whole calls)

  c.data = data = ConfigDict()
  data.name = 'cifar10'  # a dataset that `gapjax prepare` knows, or a folder that TFDS prepared
  data.train_split = 'train'  # what is trained on
  data.eval_split = 'test'  # what is evaluated
  data.image_size = 0  # resize to so many pixels a side (segmentation: the shorter one); 0: leave
  data.train_images = 0  # train on the first so many images; 0: on all
  data.held_out = 0  # evaluate on so many training images, left out of training; 0: on test images
  data.flip = True  # horizontal flips of the training images

  c.canvas = canvas = ConfigDict()
  canvas.grid = 3  # k: the canvas has k x k locations
  canvas.target = 'location'  # classify the 'location' (k * k classes) or the 'image'
  canvas.fill = 'zero'  # around the image: 'zero' after normalising (the authors), true 'black'

  # Task 'classification'. The paper's weight and range are not in our sources: `gapjax reproduce
  # augshift_sweep --scale=small` chose weight 10, shift 4 and a warm-up over half of the training,
  # as results/README.md shows.
  c.augshift = augshift = ConfigDict()
  augshift.crops = 1  # shifts of each training image: 1, or 2 for the pairwise loss
  augshift.max_shift = 4  # each uniform in [-max_shift, max_shift]^2 pixels, zero-filled
  augshift.weight = 10.0  # of the squared distance of the two crops' pooled features; 0: control
  augshift.warm_up = 0.5  # the share of the training over which the weight rises linearly from 0
  augshift.stacked = True  # both crops in one batch and BatchNorm statistic; False: one by one

  # Task 'segmentation'; training crops of randomly scaled scenes.
  c.segmentation = segmentation = ConfigDict()
  segmentation.crop = (513, 513)  # height and width
  segmentation.scale = (0.5, 2.0)  # of the scene before the crop, uniform between these
  segmentation.flip = True  # left to right, with probability 1/2
  segmentation.loss = 'cross_entropy'  # cross_entropy, focal (Lin et al. 2017)
  segmentation.gamma = 2.0  # focal: the exponent

  # Position channels (`gapjax rank`, `gapjax attack`), measured on what the run is evaluated on.
  c.neurons = neurons = ConfigDict()
  neurons.classes = ()  # names of the object of interest's classes, for rankings by region
  neurons.split = 'train'  # segmentation: the scenes that rank the channels
  neurons.images = 0  # rank with at most so many images a region; 0: all
  neurons.least_area = 0.005  # the object's pixels in the region, over the image's
  neurons.purity = 0.9  # the share of the object's pixels that lie in the region
  neurons.counts = 20  # attack: so many N, equally spaced up to `largest`
  neurons.largest = 0.95  # the largest N, over the number of channels
  neurons.random_orders = 5  # attack: the baseline's

  c.model = model = ConfigDict()
  model.name = 'resnet18'  # resnet10/18/34/50/101, vgg11/16, deeplabv3, deeplabv3plus
  model.width = 64  # channels of a resnet's first stage; 64 is every network's usual width
  model.stem = 'canvas'  # resnets: 'canvas' (7x7, stride 2), 'cifar' (3x3), 'imagenet' (stride 4)
  model.padding = 'zero'  # zero, reflect, replicate, circular, partial, none
  model.downsample = 'stride'  # stride, blur (Zhang 2019), polyphase (Chaman & Dokmanic 2021)
  model.blur_size = 3  # taps of the filter: blur 2 to 5; polyphase 1 (no blur) to 5
  model.head = 'gap'  # 'gap': GAPNet, 'permuted': PermuteNet, 'linear': GAP and a linear layer
  model.permutation = 'batch'  # head 'permuted': drawn anew every 'batch', or 'fixed' for ever
  model.permute_at = 'pooled'  # head 'permuted': after GAP, or before 'stage1', 'stage2', ...
  model.permutation_seed = 0  # which permutation 'fixed' is
  model.backbone = 'resnet50'  # deeplab: a resnet, mobilenetv2
  model.early_padding = False  # mobilenetv2: pad before a block's expansion, as the authors do
  model.pretrained = ''  # deeplab: a file of the backbone's weights, torchvision's names; '': none
  model.output_stride = 16  # deeplab: 8 or 16 pixels of the image are one of stage 4
  model.separable = False  # deeplab: the head's 3x3 convolutions depthwise, then 1x1
  model.dropout = 0.1  # deeplab: after ASPP
  model.backbone_momentum = 0.01  # deeplab: BatchNorm's in the backbone
  model.dtype = 'float32'  # computation: float32, bfloat16, or float64 (needs JAX_ENABLE_X64=1)

  c.optimizer = optimizer = ConfigDict()
  optimizer.name = 'adam'  # adam, sgd (with momentum)
  optimizer.lr = 1e-3  # peak learning rate
  optimizer.b1 = 0.5  # adam: decay of the first moment
  optimizer.b2 = 0.999  # adam: decay of the second moment
  optimizer.momentum = 0.9  # sgd
  optimizer.nesterov = False  # sgd: Nesterov's momentum
  optimizer.weight_decay = 0.0  # added to the gradient of every parameter, as PyTorch does
  optimizer.backbone_factor = 1.0  # deeplab: the backbone's rate over the head's
  optimizer.clip_norm = 0.0  # clip the gradient's global norm to this; 0: never

  c.schedule = schedule = ConfigDict()
  schedule.name = 'constant'  # constant, cosine (to 0), poly (to 0), step
  schedule.warmup_epochs = 0.0  # linear from 0 to the peak
  schedule.power = 0.9  # poly: (1 - progress) ** power
  schedule.step_epochs = (10, 15)  # step: multiply the rate by `step_factor` at these epochs
  schedule.step_factor = 0.1

  c.eval = evaluation = ConfigDict()
  evaluation.batch_size = 100  # canvases; rounded up to a multiple of the devices
  evaluation.padded = False  # segmentation: all images filled up to one shape (for TPU)
  evaluation.images = 0  # evaluate on the first so many test images; 0: on all
  evaluation.every_epochs = 1  # between evaluations with random placement (the authors' protocol)

  # Task 'classification', shift consistency; the protocols stand in gapjax/tasks/consistency.py:
  evaluation.shift = 4  # s of the headline, under protocol `pad`; the final evaluation adds `crop`
  evaluation.max_shift = 8  # curves for s = 1 .. max_shift and a map of +-max_shift; 0: none
  evaluation.shift_images = 0  # curves and map of the first so many test images; 0: as `images`
  evaluation.map_step = 1  # pixels between two points of the accuracy map

  c.checkpoint = checkpoint = ConfigDict()
  checkpoint.every_epochs = 1.0  # between checkpoints
  checkpoint.keep = 2  # how many stay on disk
  return c


get_config = default  # what makes this file a config too: the one that `gapjax bench` takes alone


def parse_arg(arg: str | None, **defaults) -> ConfigDict:
  """The variant after a config file's colon, 'grid=7,target=image', over its defaults.

  Raises UsageError on an unknown name or a value of another type than the default's.
  """
  variant = dict(defaults)
  for item in (arg or '').split(','):
    if not item:
      continue
    name, equals, value = item.partition('=')
    if name not in defaults or not equals:
      raise UsageError(f'unknown variant `{item}`{nearest(name, defaults)}; '
                       f'known: {", ".join(f"{k}={v}" for k, v in defaults.items())}')
    try:
      variant[name] = type(defaults[name])(value)
    except ValueError:
      raise UsageError(f'variant `{item}`: {name} must be a number') from None
  return ConfigDict(variant)


def from_flags(argv: list[str]) -> ConfigDict:
  """Reads `--config=FILE[:variant]` and `--config.FIELD=VALUE` flags; validates the result.

  Raises UsageError on an unknown flag or field (with the nearest known name), a value of a wrong
  type, or a config file that is missing or fails.
  """
  overrides = [a for a in argv if re.match(r'--?config\.', a)]
  files = [a for a in argv if re.match(r'--?config=', a)]
  if not files:
    raise UsageError('which config? give --config=FILE, such as configs/gapnet_cifar10.py')
  values = flags.FlagValues()
  config_flags.DEFINE_config_file('config', flag_values=values, sys_argv=['gapjax', *argv])
  try:
    known = _parse(files).to_dict()
    fields = _flatten(known)
    for name in named_fields(overrides):
      if name not in fields:
        raise UsageError(f'unknown config field `{name}`{nearest(name, fields)}')
    left = values(['gapjax', *argv])[1:]
    config = values.config
  except flags.Error as error:
    lines = str(error).strip().splitlines()
    raise UsageError(re.sub(r'^gapjax\.errors\.UsageError: ', '', lines[-1])) from None
  except OSError:
    raise UsageError(f'no config file `{files[-1].partition("=")[2].partition(":")[0]}`; '
                     'the configs that come with gapjax lie in configs/') from None
  except UsageError:
    raise
  except Exception as error:  # whatever the person's own file raises
    raise UsageError(f'{files[-1].lstrip("-")} fails: {type(error).__name__}: {error}') from error
  if left:
    raise UsageError(f'unexpected argument `{left[0]}`')
  validate(config)
  return config


def with_fields(c: ConfigDict, argv: list[str], *, of: str = '') -> ConfigDict:
  """A config with `--config.FIELD=VALUE` flags.

  Args:
    of: 'neurons.' for those of a run that is trained, whose other fields are what it is.

  Raises UsageError on any other flag, a field that is unknown or not one of those, or a value that
  cannot be.
  """
  c = ConfigDict(c.to_dict())
  fields = [name for name in _flatten(c.to_dict()) if name.startswith(of)]
  for name in named_fields(argv):
    if name not in fields:
      raise UsageError(f'config field `{name}` cannot be set for a run that is trained; these can: '
                       f'{", ".join(fields)}' if of else
                       f'unknown config field `{name}`{nearest(name, fields)}')
  values = flags.FlagValues()
  config_flags.DEFINE_config_dict('config', c, flag_values=values, sys_argv=['gapjax', *argv])
  try:
    values(['gapjax', *argv])
  except flags.Error as error:
    raise UsageError(str(error).strip().splitlines()[-1]) from None
  validate(c)
  return c


def named_fields(argv: list[str]) -> list[str]:
  """The fields that `--config.FIELD=VALUE` flags set. Raises UsageError on any other flag."""
  for argument in argv:
    if not re.match(r'--?config\.\w', argument):
      raise UsageError(f'unexpected argument `{argument}`')
  return [re.sub(r'^--?config\.', '', argument).partition('=')[0] for argument in argv]


def _parse(argv):
  values = flags.FlagValues()
  config_flags.DEFINE_config_file('config', flag_values=values, sys_argv=['gapjax', *argv])
  values(['gapjax', *argv])
  return values.config


def _flatten(tree, prefix=''):
  """{'model': {'width': 64}} -> {'model.width': 64}."""
  flat = {}
  for name, value in tree.items():
    if isinstance(value, dict):
      flat.update(_flatten(value, f'{prefix}{name}.'))
    else:
      flat[f'{prefix}{name}'] = value
  return flat


def as_json(c: ConfigDict) -> dict:
  """A config as it reads back from JSON: tuples become lists."""
  return json.loads(json.dumps(c.to_dict()))


def difference(ours: ConfigDict, theirs: dict) -> list[str]:
  """'model.width 16 (there: 64)' for every field in which a config differs from one on disk.

  A field that is not on disk was added to gapjax since, and counts as its default. One that the
  task does not read counts for nothing.
  """
  ours, known = _flatten(as_json(ours)), _flatten(as_json(default()))
  theirs = {**known, **_flatten(theirs)}
  unread = NOT_READ[ours['task']] if ours['task'] == theirs['task'] else ()
  return [f'{name} {ours.get(name)} (there: {theirs.get(name)})'
          for name in sorted({*ours, *theirs}) if ours.get(name) != theirs.get(name)
          and not name.startswith(unread)]


def validate(c: ConfigDict) -> None:
  """Raises UsageError with one line on the first field that cannot be."""
  fields = _flatten(c.to_dict())
  _validate_types(fields)
  for value, known, what in (
      (c.task, TASKS, 'task'), (c.canvas.target, TARGETS, 'canvas.target'),
      (c.canvas.fill, FILLS, 'canvas.fill'),
      (c.model.name, MODELS, 'model'), (c.model.stem, STEMS, 'model.stem'),
      (c.model.padding, PADDINGS, 'padding'), (c.model.head, HEADS, 'head'),
      (c.model.permutation, PERMUTATIONS, 'permutation'), (c.model.dtype, DTYPES, 'dtype'),
      (c.model.downsample, DOWNSAMPLINGS, 'model.downsample'),
      (c.model.backbone, BACKBONES, 'model.backbone'), (c.segmentation.loss, LOSSES, 'loss'),
      (c.model.permute_at, ('pooled', *stages(c.model.name)), 'model.permute_at'),
      (c.optimizer.name, OPTIMIZERS, 'optimizer'), (c.schedule.name, SCHEDULES, 'schedule')):
    check_choice(value, known, what=what)
  for name in ('num_epochs', 'batch_size', 'log_every', 'canvas.grid', 'model.width',
               'eval.batch_size', 'eval.every_epochs', 'eval.map_step', 'checkpoint.keep',
               'optimizer.lr', 'optimizer.backbone_factor', 'schedule.power',
               'schedule.step_factor'):
    _check_range(name, fields[name], above=0)
  for name in ('seed', 'steps_per_call', 'data.image_size', 'data.train_images', 'data.held_out',
               'eval.images',
               'model.permutation_seed', 'optimizer.weight_decay', 'optimizer.clip_norm',
               'optimizer.b1', 'optimizer.b2', 'optimizer.momentum', 'schedule.warmup_epochs',
               'model.dropout', 'model.backbone_momentum', 'segmentation.gamma',
               'augshift.max_shift', 'augshift.weight', 'augshift.warm_up', 'eval.shift',
               'eval.max_shift', 'eval.shift_images'):
    _check_range(name, fields[name], least=0)
  for name in ('optimizer.b1', 'optimizer.b2', 'optimizer.momentum', 'model.dropout'):
    _check_range(name, fields[name], below=1)
  for name in ('seed', 'model.permutation_seed'):
    _check_range(name, fields[name], below=2 ** 32)  # what a threefry key holds
  _check_range('model.blur_size', c.model.blur_size,
               least=2 if c.model.downsample == 'blur' else 1, below=6)
  if 0 < c.eval.max_shift < c.eval.map_step:
    raise UsageError(f'eval.map_step={c.eval.map_step} leaves no map within eval.max_shift='
                     f'{c.eval.max_shift}; make it smaller')
  _validate_segmentation(c)
  for name in ('neurons.least_area', 'neurons.images'):
    _check_range(name, fields[name], least=0)
  for name in ('neurons.purity', 'neurons.largest', 'augshift.warm_up'):
    if not 0 <= fields[name] <= 1:
      raise UsageError(f'{name} is a share: a number from 0 to 1, not {fields[name]}')
  for name in ('neurons.counts', 'neurons.random_orders', 'neurons.purity', 'neurons.largest'):
    _check_range(name, fields[name], above=0)
  _check_range('augshift.crops', c.augshift.crops, least=1, below=3)
  _check_range('checkpoint.every_epochs', fields['checkpoint.every_epochs'], least=0.001)
  for epoch in fields['schedule.step_epochs']:
    _check_range('schedule.step_epochs', epoch, least=0)
  if c.model.head != 'permuted' and c.model.permute_at != 'pooled':
    raise UsageError(f'model.permute_at={c.model.permute_at} needs model.head=permuted, '
                     f'not {c.model.head}')


def _validate_types(fields):
  known = _flatten(default().to_dict())
  for name in sorted(set(fields) - set(known)):
    raise UsageError(f'unknown config field `{name}`{nearest(name, known)}')
  for name in sorted(set(known) - set(fields)):
    raise UsageError(f'config field `{name}` is missing; start from gapjax.config.default()')
  for name, value in known.items():
    kind = (int, float) if isinstance(value, float) else type(value)
    if isinstance(value, tuple):
      kind = (tuple, list)
    if not isinstance(fields[name], kind) or (
        isinstance(fields[name], bool) and not isinstance(value, bool)):
      raise UsageError(f'{name} must be like {value!r}, not {fields[name]!r}')


def _validate_segmentation(c):
  if (c.task == 'segmentation') != (c.model.name in DEEPLABS):
    raise UsageError(f'task {c.task} and model {c.model.name} do not fit: segmentation needs '
                     f'{" or ".join(DEEPLABS)}, the other tasks any other network')
  if c.model.output_stride not in OUTPUT_STRIDES:
    raise UsageError(f'model.output_stride must be {" or ".join(map(str, OUTPUT_STRIDES))}, '
                     f'not {c.model.output_stride}')
  if c.model.pretrained and c.task != 'segmentation':
    raise UsageError(f'model.pretrained is the backbone\'s of {" or ".join(DEEPLABS)}; '
                     f'{c.model.name} has none: leave it out')
  if c.optimizer.backbone_factor != 1 and c.task != 'segmentation':
    raise UsageError(f'optimizer.backbone_factor is for the backbone of {" or ".join(DEEPLABS)}; '
                     f'{c.model.name} has none: leave it at 1')
  if c.task == 'segmentation' and c.model.padding == 'none':
    raise UsageError('padding `none` leaves the branches of ASPP at different sizes; segmentation '
                     f'needs another padding: {", ".join(p for p in PADDINGS if p != "none")}')
  _validate_mobilenet(c.task, c.model)
  if c.task == 'segmentation' and (c.model.stem, c.model.output_stride) == ('cifar', 16):
    raise UsageError('model.stem=cifar has a stride of 8 in all; use model.output_stride=8, or the '
                     'stem imagenet or canvas')
  if c.task == 'segmentation' and c.data.held_out:
    raise UsageError('data.held_out is for images; segmentation evaluates data.eval_split')
  for name, least in (('crop', 1), ('scale', 0.01)):
    values = c.segmentation[name]
    if len(values) != 2:
      raise UsageError(f'segmentation.{name} must be two numbers, not {values}')
    for value in values:
      _check_range(f'segmentation.{name}', value, least=least)
      if name == 'crop' and not isinstance(value, int):
        raise UsageError(f'segmentation.crop must be whole pixels, not {values}')
  if c.segmentation.scale[0] > c.segmentation.scale[1]:
    raise UsageError(f'segmentation.scale must be (least, largest), not {c.segmentation.scale}')


def _validate_mobilenet(task, model):
  mobilenet = task == 'segmentation' and model.backbone in MOBILENETS
  if mobilenet and model.stem != 'imagenet':
    raise UsageError(f'model.backbone={model.backbone} has one stem, of ImageNet\'s kind: set '
                     f'model.stem=imagenet, not {model.stem}')
  if model.early_padding and not mobilenet:
    raise UsageError('model.early_padding is the padding of model.backbone=mobilenetv2 (task '
                     'segmentation): leave it out, or take that')
  if model.early_padding and model.padding not in PAD_MODES:
    raise UsageError(f'model.early_padding pads; padding must be {", ".join(PAD_MODES)}, not '
                     f'{model.padding}')


def _check_range(name, value, *, above=-math.inf, least=-math.inf, below=math.inf):
  if not isinstance(value, int | float) or not (above < value < below and value >= least):
    bounds = {'above': above, 'at least': least, 'below': below}
    raise UsageError(f'{name} must be a number ' + ' and '.join(
      f'{word} {bound}' for word, bound in bounds.items() if math.isfinite(bound))
      + f', not {value}')


def stages(model_name: str) -> tuple[str, ...]:
  """The names of a network's stages, in order."""
  return tuple(f'stage{s}' for s in range(1, 6 if model_name in VGGS else 5))
