"""Every field: its default, what it may be, what it decides; and a config from a file and flags."""

import functools
import json
import math
import re
from typing import Any, NamedTuple

from absl import flags
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict, config_flags

from gapjax.config_files import from_file
from gapjax.errors import UsageError, check_choice, nearest
from gapjax.models import BACKBONES, DEEPLABS, DTYPES, MODELS, OUTPUT_STRIDES, stages
from gapjax.models.downsample import DOWNSAMPLINGS
from gapjax.models.heads import HEADS, PERMUTATIONS
from gapjax.models.layers import PAD_MODES, PADDINGS
from gapjax.models.mobilenet import MOBILENETS
from gapjax.models.resnet import RESNETS, STEMS

TARGETS = ('location', 'image')
TASKS = ('canvas', 'classification', 'segmentation')
# Beginnings of the fields that a task does not read, and that only deeplab networks do.
_DEEPLAB = ('model.backbone', 'model.pretrained', 'model.output_stride', 'model.dropout',
            'model.separable', 'model.early_padding', 'optimizer.backbone')
_SHIFTS = ('augshift.', 'eval.shift', 'eval.pairs', 'eval.max_shift', 'eval.map_step')
_SCENES = ('segmentation.', 'eval.padded', *_DEEPLAB)
NOT_READ = {
  'canvas': (*_SHIFTS, *_SCENES, 'neurons.classes', 'neurons.split'),
  'classification': ('canvas.', *_SCENES, 'neurons.'),
  'segmentation': ('canvas.', *_SHIFTS, 'data.flip', 'model.head', 'model.permut')}

# What a field decides: the weights that a run ends with; the numbers of its evaluations, from the
# same weights; those of ranking and attack; or no number at all.
TRAINS, EVALUATES, ATTACKS, NEITHER = 'trains', 'evaluates', 'attacks', 'neither'
RUN, EVALUATION, RECORD = (TRAINS,), (TRAINS, EVALUATES), (TRAINS, EVALUATES, ATTACKS)


class Range(NamedTuple):
  """What a number may be; of a tuple, each of its numbers, `count` of them unless that is 0."""
  above: float = -math.inf
  least: float = -math.inf
  below: float = math.inf
  most: float = math.inf
  count: int = 0


POSITIVE, NATURAL, DECAY = Range(above=0), Range(least=0), Range(least=0, below=1)
SHARE, PART = Range(least=0, most=1), Range(above=0, most=1)
KEY = Range(least=0, below=2 ** 32)  # what a threefry key holds
ALL_FIELDS = 'gapjax/config.py has all fields'  # of messages


class Field(NamedTuple):
  """A field of a config."""
  default: Any  # where nobody sets it; it says the type, too
  allowed: Range | tuple | None = None  # a tuple of choices; None: any value of that type
  decides: str = TRAINS
  absent: Any = None  # what a config on disk without it was trained with; None: it was always there


evaluates, attacks = (functools.partial(Field, decides=x) for x in (EVALUATES, ATTACKS))

# GAPNet's location task on a 3x3 canvas of CIFAR-10, as the authors train it (section 3).
FIELDS = {
  'task': Field('canvas', TASKS),  # section 3; classification: shifted images (4); segmentation (5)
  'seed': Field(0, KEY),  # initialisation, order of the data, augmentation, placement, permutations
  'num_epochs': Field(20, POSITIVE),  # passes over the training images
  'batch_size': Field(48, POSITIVE),  # global: shared by all devices
  'steps_per_call': Field(0, NATURAL, NEITHER),  # at most, in one dispatch; 0: CPU 1, others 32
  'sync_batch_norm': Field(True),  # statistics over the global batch, not a device's share
  'log_every': Field(50, POSITIVE, NEITHER),  # steps between two lines of training metrics

  'data.name': Field('cifar10'),  # what `gapjax prepare` knows, or a folder that TFDS prepared
  'data.train_split': Field('train', absent='train'),  # what is trained on
  'data.eval_split': evaluates('test', absent='test'),  # what is evaluated
  'data.image_size': Field(0, NATURAL),  # pixels a side (scenes: the shorter); 0: as it is
  'data.train_images': Field(0, NATURAL),  # train on the first so many images; 0: on all
  'data.held_out': Field(0, NATURAL, absent=0),  # evaluate on so many training images, left out
  'data.flip': Field(True),  # horizontal flips of the training images

  'canvas.grid': Field(3, POSITIVE),  # k: the canvas has k x k locations
  'canvas.target': Field('location', TARGETS),  # classify the location (k * k classes) or the image
  'canvas.fill': Field('zero', ('zero', 'black')),  # zero: after normalising (the authors)

  # Task 'classification'. The paper's weight and range are not in our sources: `gapjax reproduce
  # augshift_sweep --scale=small` chose weight 10, shift 4 and a warm-up over half of the training,
  # as results/README.md shows.
  'augshift.crops': Field(1, Range(least=1, below=3)),  # an image: 1, or 2 for the pairwise loss
  'augshift.max_shift': Field(4, NATURAL),  # pixels, uniform in +-max_shift, zero-filled
  'augshift.weight': Field(10.0, NATURAL),  # of the crops' squared distance, pooled; 0: control
  'augshift.warm_up': Field(0.5, SHARE),  # of the training, over which the weight rises from 0
  'augshift.stacked': Field(True),  # both crops in one batch and BatchNorm statistic, or one by one

  # Task 'segmentation'; training crops of randomly scaled scenes.
  'segmentation.crop': Field((513, 513), Range(least=1, count=2)),  # pixels, height and width
  'segmentation.scale': Field((0.5, 2.0), Range(least=0.01, count=2)),  # uniform between these
  'segmentation.flip': Field(True),  # left to right, with probability 1/2
  'segmentation.loss': Field('cross_entropy', ('cross_entropy', 'focal')),  # Lin et al. 2017
  'segmentation.gamma': Field(2.0, NATURAL),  # focal: the exponent

  # Position channels (`gapjax rank`, `gapjax attack`), measured on what the run is evaluated on.
  'neurons.classes': attacks(()),  # names of the object of interest's, for rankings by region
  'neurons.split': attacks('train'),  # segmentation: the scenes that rank the channels
  'neurons.images': attacks(0, NATURAL),  # rank with at most so many images a region; 0: all
  'neurons.least_area': attacks(0.005, NATURAL),  # the object's pixels there, over the image's
  'neurons.purity': attacks(0.9, PART),  # the share of the object's pixels that lie in the region
  'neurons.counts': attacks(20, POSITIVE),  # attack: so many N, equally spaced up to `largest`
  'neurons.largest': attacks(0.95, PART),  # the largest N, over the number of channels
  'neurons.random_orders': attacks(5, POSITIVE),  # attack: the baseline's

  'model.name': Field('resnet18', MODELS),  # resnet..., vgg..., efficientnet_lite0, deeplabv3(plus)
  'model.width': Field(64, POSITIVE),  # channels of the first stage; 64 is every network's usual
  'model.stem': Field('canvas', tuple(STEMS)),  # of a ResNet: 7x7, 3x3 or 7x7 and a pool
  'model.padding': Field('zero', PADDINGS),  # zero, reflect, circular ...; full: F-Conv's
  'model.downsample': Field('stride', DOWNSAMPLINGS),  # blur, polyphase (APS), learned_polyphase
  'model.blur_size': Field(3, Range(least=1, below=6)),  # taps; polyphase 1: no blur; blur: from 2
  'model.head': Field('gap', HEADS),  # gap: GAPNet, permuted: PermuteNet, linear: the usual one
  'model.permutation': Field('batch', PERMUTATIONS),  # anew every batch, or 'fixed' for ever
  'model.permute_at': Field('pooled'),  # after GAP ('pooled'), or before 'stage1', 'stage2', ...
  'model.permutation_seed': Field(0, KEY),  # which permutation 'fixed' is
  'model.backbone': Field('resnet50', BACKBONES),  # a resnet, mobilenetv2, efficientnet_lite0
  'model.early_padding': Field(False, absent=False),  # mobilenetv2: before a block's expansion
  'model.pretrained': Field('', absent=''),  # deeplab: the backbone's file, or efficientnet_lite0
  'model.output_stride': Field(16, OUTPUT_STRIDES),  # deeplab: pixels of the image to one of stage4
  'model.separable': Field(False, absent=False),  # deeplab: the head's 3x3 depthwise, then 1x1
  'model.dropout': Field(0.1, DECAY),  # deeplab: after ASPP
  'model.backbone_momentum': Field(0.01, SHARE),  # deeplab: BatchNorm's in the backbone
  'model.dtype': Field('float32', tuple(DTYPES)),  # bfloat16; float64 needs JAX_ENABLE_X64=1

  'optimizer.name': Field('adam', ('adam', 'sgd')),  # sgd: with momentum
  'optimizer.lr': Field(1e-3, POSITIVE),  # peak learning rate
  'optimizer.b1': Field(0.5, DECAY),  # adam: decay of the first moment
  'optimizer.b2': Field(0.999, DECAY),  # adam: decay of the second moment
  'optimizer.momentum': Field(0.9, DECAY),  # sgd
  'optimizer.nesterov': Field(False, absent=False),  # sgd: Nesterov's momentum
  'optimizer.weight_decay': Field(0.0, NATURAL),  # added to every parameter's gradient (PyTorch's)
  'optimizer.backbone_factor': Field(1.0, POSITIVE, absent=1.0),  # deeplab: over the head's rate
  'optimizer.clip_norm': Field(0.0, NATURAL),  # clip the gradient's global norm to this; 0: never

  'schedule.name': Field('constant', ('constant', 'cosine', 'poly', 'step')),  # cosine, poly: to 0
  'schedule.warmup_epochs': Field(0.0, NATURAL),  # linear from 0 to the peak
  'schedule.power': Field(0.9, POSITIVE),  # poly: (1 - progress) ** power
  'schedule.step_epochs': Field((10, 15), NATURAL),  # step: multiply the rate at these epochs ...
  'schedule.step_factor': Field(0.1, POSITIVE),  # ... by this

  'eval.batch_size': evaluates(100, POSITIVE),  # PermuteNet draws one permutation a batch
  'eval.padded': evaluates(False, absent=False),  # segmentation: all filled to one shape (for TPU)
  'eval.images': evaluates(0, NATURAL),  # evaluate on the first so many test images; 0: on all
  'eval.every_epochs': evaluates(1, POSITIVE),  # between evaluations, whose best is reported
  # Task 'classification', shift consistency; the protocols stand in gapjax/tasks/consistency.py:
  'eval.shift': evaluates(4, NATURAL),  # pixels, s of the headline, protocol `pad`, and of `crop`
  'eval.pairs': evaluates(1, POSITIVE, absent=1),  # of shifts of every image, for the headline
  'eval.max_shift': evaluates(8, NATURAL),  # curves for s = 1 .. max_shift and a map; 0: none
  'eval.shift_images': evaluates(0, NATURAL),  # for curves and map, the first so many; 0: `images`
  'eval.map_step': evaluates(1, POSITIVE),  # pixels between two points of the accuracy map

  'checkpoint.every_epochs': Field(1.0, Range(least=0.001), NEITHER),  # between checkpoints
  'checkpoint.keep': Field(2, POSITIVE, NEITHER),  # how many stay on disk
}


def default() -> ConfigDict:
  """The config with the default of every field."""
  return ConfigDict(unflatten_dict({name: field.default for name, field in FIELDS.items()},
                                   sep='.'))


def replaced(c: ConfigDict, **fields) -> ConfigDict:
  """A copy of a config with other fields: replaced(c, batch_size=8, model=dict(width=16))."""
  c = ConfigDict(c.to_dict())
  c.update(fields)
  return c


def parse_arg(arg: str | None, **defaults) -> ConfigDict:
  """The variant after a config file's colon, 'grid=7,target=image', over its defaults.

  Raises UsageError on an unknown name or a value of another type than the default's.
  """
  variant = dict(defaults)
  for item in filter(None, (arg or '').split(',')):
    name, equals, value = item.partition('=')
    if name not in defaults or not equals:
      raise UsageError(f'unknown variant `{item}`{nearest(name, defaults)}; '
                       f'known: {", ".join(f"{k}={v}" for k, v in defaults.items())}')
    try:
      variant[name] = type(defaults[name])(value)
    except ValueError:
      raise UsageError(f'variant `{item}`: {name} must be a number') from None
  return ConfigDict(variant)


# ---- From a file and flags -----------------------------------------------------------------------


def from_flags(argv: list[str]) -> ConfigDict:
  """Reads `--config=FILE[:variant]` and `--config.FIELD=VALUE` flags; validates the result.

  Raises UsageError on an unknown flag or field (with the nearest known name), a field that the task
  does not read, a value of a wrong type, or a config file that is missing or fails.
  """
  files = [argument for argument in argv if re.match(r'--?config=', argument)]
  if not files:
    raise UsageError('which config? give --config=FILE, such as gapnet_cifar10')
  set_here = [argument for argument in argv if argument not in files]
  return with_fields(from_file(files[-1].partition('=')[2]), set_here)


def with_fields(c: ConfigDict, argv: list[str], *, of: str = '', tasks=()) -> ConfigDict:
  """A config with `--config.FIELD=VALUE` flags, validated.

  Args:
    of: 'neurons.' for those of a run that is trained, whose other fields are what it is.
    tasks: one of these must read each field; without any, the config's own.

  Raises UsageError on any other flag, a field that is unknown, not one of those or not read, or a
  value that cannot be.
  """
  c = replaced(c)
  fields = [name for name in flatten_dict(c.to_dict(), sep='.') if name.startswith(of)]
  for name in named_fields(argv):
    if name not in fields:
      raise UsageError(f'config field `{name}` cannot be set for a run that is trained; these can: '
                       f'{", ".join(fields)}' if of else
                       f'unknown config field `{name}`{nearest(name, fields)}; {ALL_FIELDS}')
  values, line = flags.FlagValues(), ['gapjax', *argv]
  config_flags.DEFINE_config_dict('config', c, flag_values=values, sys_argv=line)
  try:
    values(line)
  except flags.Error as error:
    raise UsageError(str(error).strip().splitlines()[-1]) from None
  validate(c)
  tasks = tasks or (c.task,)
  for name in named_fields(argv):
    if all(name.startswith(NOT_READ[task]) for task in tasks):
      raise UsageError(f'config field `{name}` is not read in the task {" or ".join(tasks)}, so it '
                       'would change nothing; leave it out')
    if c.augshift.crops == 1 and name in ('augshift.weight', 'augshift.warm_up',
                                          'augshift.stacked'):
      raise UsageError(f'config field `{name}` is of the pairwise loss of two crops, and '
                       'augshift.crops is 1; set --config.augshift.crops=2, or leave it out')
  return c


def named_fields(argv: list[str]) -> list[str]:
  """The fields that `--config.FIELD=VALUE` flags set. Raises UsageError on any other flag."""
  for argument in argv:
    if not re.match(r'--?config\.\w', argument):
      raise UsageError(f'unexpected argument `{argument}`; --help lists the flags, and a field is '
                       'set by --config.FIELD=VALUE')
  return [re.sub(r'^--?config\.', '', argument).partition('=')[0] for argument in argv]


# ---- On disk -------------------------------------------------------------------------------------


def as_json(c: ConfigDict) -> dict:
  """A config as it reads back from JSON: tuples become lists."""
  return json.loads(json.dumps(c.to_dict()))


def from_json(there: dict) -> ConfigDict:
  """A config from disk, validated.

  A field that was added to gapjax since has the value that it was trained with; one that decides
  nothing of a run, or that its task does not read, has its default.

  Raises UsageError on what is no config, and on any other field that is missing.
  """
  fields = _known(there)
  unread = NOT_READ.get(fields.get('task'), ())
  rest = {name: field.default for name, field in FIELDS.items()
          if field.decides not in EVALUATION or name.startswith(unread)}
  c = ConfigDict(unflatten_dict({name: tuple(value) if isinstance(value, list) else value
                                 for name, value in {**rest, **fields}.items()}, sep='.'))
  validate(c)
  return c


def difference(ours: ConfigDict, theirs: dict, *, deciding: tuple[str, ...] = RECORD) -> list[str]:
  """'model.width 16 (there: 64)' for every field in which a config differs from one on disk.

  Args:
    deciding: what the fields that count decide: RUN for the weights, EVALUATION for what is
      evaluated of them too, RECORD for their attack as well.

  A field that is not on disk counts as what it was before gapjax had it. One that the task does not
  read counts for nothing.
  """
  ours, theirs = _known(as_json(ours)), _known(theirs)
  unread = NOT_READ[ours['task']] if ours['task'] == theirs.get('task') else ()
  return [f'{name} {ours.get(name)} (there: {theirs.get(name)})'
          for name in sorted({*ours, *theirs}) if ours.get(name) != theirs.get(name)
          and not name.startswith(unread)
          and (name not in FIELDS or FIELDS[name].decides in deciding)]


def _known(tree):
  """The fields of a config from disk, by their full names, with those that were added since."""
  added = {name: field.absent for name, field in FIELDS.items() if field.absent is not None}
  return {**added, **flatten_dict(tree, sep='.')}


# ---- What can be ---------------------------------------------------------------------------------


def validate(c: ConfigDict) -> None:
  """Raises UsageError with one line on the first field that cannot be."""
  fields = flatten_dict(c.to_dict(), sep='.')
  for name in sorted(set(fields) - set(FIELDS)):
    raise UsageError(f'unknown config field `{name}`{nearest(name, FIELDS)}; {ALL_FIELDS}')
  for name in sorted(set(FIELDS) - set(fields)):
    raise UsageError(f'config field `{name}` is missing; start from gapjax.config.default()')
  for name, field in FIELDS.items():
    _check(name, fields[name], *field[:2])
  for wrong, message in _conflicts(c, c.model, c.task == 'segmentation'):
    if wrong:
      raise UsageError(message)


def _check(name, value, default, allowed):
  kind = {float: (int, float), tuple: (tuple, list)}.get(type(default), type(default))
  if not isinstance(value, kind) or isinstance(value, bool) != isinstance(default, bool):
    raise UsageError(f'{name} must be like {default!r}, not {value!r}')
  if not isinstance(allowed, Range):
    return check_choice(value, allowed or (value,), what=name)
  numbers = value if isinstance(value, tuple | list) else [value]
  if allowed.count and len(numbers) != allowed.count:
    raise UsageError(f'{name} must be {allowed.count} numbers, not {value}')
  bounds = zip(('above', 'at least', 'below', 'at most'), allowed, strict=False)
  for number in numbers:
    if not isinstance(number, int | float) or not (
        allowed.above < number < allowed.below and allowed.least <= number <= allowed.most):
      raise UsageError(f'{name} must be a number ' + ' and '.join(
        f'{word} {bound}' for word, bound in bounds if math.isfinite(bound)) + f', not {number}')


def _conflicts(c, m, scenes):
  """(whether it is so, what to say of it) of fields that do not go together."""
  deeplabs, crop, scale = ' or '.join(DEEPLABS), c.segmentation.crop, c.segmentation.scale
  places = ('pooled', *stages(m.name))
  mobilenet = scenes and m.backbone in MOBILENETS
  return (
    (m.permute_at not in places, f'model.permute_at={m.permute_at} is no place in {m.name}; known: '
     f'{", ".join(places)}'),
    (m.head != 'permuted' and m.permute_at != 'pooled',
     f'model.permute_at={m.permute_at} needs model.head=permuted, not {m.head}'),
    (m.downsample == 'blur' and m.blur_size < 2,
     f'model.blur_size must be a number at least 2 and below 6, not {m.blur_size}'),
    (m.downsample == 'learned_polyphase' and m.name not in RESNETS, 'model.downsample='
     f'learned_polyphase is for ResNets that classify, not {m.name}: take polyphase'),
    (0 < c.eval.max_shift < c.eval.map_step, f'eval.map_step={c.eval.map_step} leaves no map '
     f'within eval.max_shift={c.eval.max_shift}; make it smaller'),
    (scenes != (m.name in DEEPLABS), f'task {c.task} and model {m.name} do not fit: segmentation '
     f'needs {deeplabs}, the other tasks any other network'),
    (scenes and c.batch_size == 1, 'batch_size=1 leaves BatchNorm behind the image pooling of '
     f'{deeplabs} one value a channel, which it would make 0: take 2 or more'),
    (m.pretrained in BACKBONES and m.pretrained != m.backbone, f'model.pretrained={m.pretrained} '
     f'are the weights of another backbone than {m.backbone}; set model.backbone={m.pretrained}'),
    (m.pretrained and not scenes, f'model.pretrained is the backbone\'s of {deeplabs}; {m.name} '
     'has none: leave it out'),
    (c.optimizer.backbone_factor != 1 and not scenes, 'optimizer.backbone_factor is for the '
     f'backbone of {deeplabs}; {m.name} has none: leave it at 1'),
    (scenes and m.padding in ('none', 'full'), f'padding `{m.padding}` leaves the branches of ASPP '
     'at different sizes; segmentation needs another padding: '
     f'{", ".join(p for p in PADDINGS if p not in ("none", "full"))}'),
    (mobilenet and m.stem != 'imagenet', f'model.backbone={m.backbone} has one stem, of '
     f'ImageNet\'s kind: set model.stem=imagenet, not {m.stem}'),
    (m.early_padding and not (scenes and m.backbone == 'mobilenetv2'),
     'model.early_padding is the padding of '
     'model.backbone=mobilenetv2 (task segmentation): leave it out, or take that'),
    (m.early_padding and m.padding not in PAD_MODES, 'model.early_padding pads; padding must be '
     f'{", ".join(PAD_MODES)}, not {m.padding}'),
    (scenes and (m.stem, m.output_stride) == ('cifar', 16), 'model.stem=cifar has a stride of 8 in '
     'all; use model.output_stride=8, or the stem imagenet or canvas'),
    (scenes and c.data.held_out, 'data.held_out is for images; segmentation evaluates '
     'data.eval_split: leave it at 0'),
    (any(not isinstance(side, int) for side in crop),
     f'segmentation.crop must be whole pixels, not {crop}'),
    (scale[0] > scale[1], f'segmentation.scale must be (least, largest), not {scale}'))

