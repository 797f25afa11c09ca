"""What PyTorch calls the arrays of each network: the authors' names, torchvision's, kuangliu's.

A name map is a dict {PyTorch's name: ours}, ours being a path such as 'params/conv1/kernel' or
'batch_stats/bn1/mean'. Maps of layers (`conv_names`, `norm_names`) make those of networks.
"""

from ml_collections import ConfigDict

from gapjax.errors import check_choice
from gapjax.models import BACKBONES, mobilenet
from gapjax.models.deeplab import DEEPLABS
from gapjax.models.resnet import RESNETS, STEMS, STRIDES
from gapjax.models.vgg import VGGS

# What the linear layer behind GAP is called by each stem's authors.
LINEAR = {'canvas': 'linear_location', 'cifar': 'linear', 'imagenet': 'fc'}

# ---- Layers --------------------------------------------------------------------------------------


def conv_names(theirs: str, ours: str, *, bias: bool = False) -> dict[str, str]:
  """The name map of a convolution or a linear layer."""
  names = {f'{theirs}.weight': f'params/{ours}/kernel'}
  return {**names, f'{theirs}.bias': f'params/{ours}/bias'} if bias else names


def norm_names(theirs: str, ours: str) -> dict[str, str]:
  """The name map of a BatchNorm; num_batches_tracked has no counterpart (`unread`)."""
  return {f'{theirs}.weight': f'params/{ours}/scale', f'{theirs}.bias': f'params/{ours}/bias',
          f'{theirs}.running_mean': f'batch_stats/{ours}/mean',
          f'{theirs}.running_var': f'batch_stats/{ours}/var'}


def _pair(theirs: str, first: int, *, conv: str, norm: str, separable: bool = False):
  """The name map of a convolution and its BatchNorm, in PyTorch items `first` and `first` + 1 of a
  Sequential."""
  theirs, behind = f'{theirs}.{first}', norm_names(f'{theirs}.{first + 1}', norm)
  if separable:
    return {**conv_names(f'{theirs}.body.0', f'{conv}/depthwise'),
            **conv_names(f'{theirs}.body.1', f'{conv}/pointwise'), **behind}
  return conv_names(theirs, conv) | behind


# ---- Networks ------------------------------------------------------------------------------------


def names(model_config: ConfigDict) -> dict[str, str]:
  """The name map of the network of a `config.model`, every array of it once.

  ResNets on a canvas have the authors' names, those with the stem 'imagenet' torchvision's, with
  the stem 'cifar' kuangliu's, which are the authors' too but for the linear layer's; VGGs and
  DeepLabs the authors', EfficientNet-Lite0 efficientnet_lite_pytorch's. The last name is that of
  the bias before the logits, (K,).
  """
  c = model_config
  if c.name in DEEPLABS:
    return _inside_deeplab(backbone_names(c.backbone, stem=c.stem)) | _deeplab_head_names(c)
  body = _vgg_names(c.name) if c.name in VGGS else backbone_names(c.name, stem=c.stem)
  return body | _component_names(c) | _head_names(c)


def backbone_names(variant: str, *, stem: str = 'imagenet') -> dict[str, str]:
  """The name map of a network without its head, to paths in the variables of ours: torchvision's
  names, such as layer1.0.downsample.0.weight, for EfficientNet-Lite0 efficientnet_lite_pytorch's.

  With another stem than 'imagenet' what torchvision calls downsample is shortcut.

  Raises UsageError on another network.
  """
  check_choice(variant, BACKBONES, what='backbone')
  if variant in mobilenet.MOBILENETS:
    return _mobilenet_names(variant)
  blocks, bottleneck = RESNETS[variant]
  shortcut = 'downsample' if stem == 'imagenet' else 'shortcut'
  names = conv_names('conv1', 'conv1') | norm_names('bn1', 'bn1')
  for stage, count in enumerate(blocks, 1):
    for i in range(count):
      theirs, ours = f'layer{stage}.{i}', f'layer{stage}_{i}'
      for k in range(1, 4 if bottleneck else 3):
        names |= conv_names(f'{theirs}.conv{k}', f'{ours}/conv{k}')
        names |= norm_names(f'{theirs}.bn{k}', f'{ours}/bn{k}')
      if i == 0 and (stage > 1 or bottleneck):  # where the number of channels changes
        names |= conv_names(f'{theirs}.{shortcut}.0', f'{ours}/shortcut_conv')
        names |= norm_names(f'{theirs}.{shortcut}.1', f'{ours}/shortcut_bn')
  return names


def _component_names(c):
  """What chooses polyphase components (LPS), wherever a ResNet strides; no project's names."""
  if c.downsample != 'learned_polyphase':
    return {}
  _, stride, pool = STEMS[c.stem]
  places = [('component', 'component')] * (stride == 2) + [('pool_component',) * 2] * pool
  places += [(f'layer{stage}.0.component', f'layer{stage}_0/component')
             for stage, stride in enumerate(STRIDES, 1) if stride == 2]
  return {name: path for theirs, ours in places for layer in ('conv', 'linear') for name, path in
          conv_names(f'{theirs}.{layer}', f'{ours}/{layer}', bias=layer == 'conv').items()}


def _mobilenet_names(variant):
  """torchvision: features.0 is the stem; a block is one Sequential, its expansion and its depthwise
  convolution each a Sequential in it. efficientnet_lite_pytorch counts blocks from 0, and a block's
  BatchNorms by what they stand behind, from 0 or, without an expansion, from 1."""
  lite = variant == 'efficientnet_lite0'
  names = (conv_names('_conv_stem', 'conv1') | norm_names('_bn0', 'bn1') if lite else
           _pair('features.0', 0, conv='conv1', norm='bn1'))
  runs = [run for stage in mobilenet.MOBILENETS[variant] for run in stage]
  expansions = [run.expansion for run in runs for _ in range(run.blocks)]
  for block, expansion in enumerate(expansions, 1):
    layers = ['expand', 'depthwise', 'project'][expansion == 1:]
    for i, layer in enumerate(layers):
      ours = dict(conv=f'features_{block}/{layer}_conv', norm=f'features_{block}/{layer}_bn')
      if lite:
        theirs = f'_blocks.{block - 1}'
        names |= conv_names(f'{theirs}._{layer}_conv', ours['conv'])
        names |= norm_names(f'{theirs}._bn{i + 3 - len(layers)}', ours['norm'])
      elif layer == 'project':
        names |= _pair(f'features.{block}.conv', i, **ours)
      else:
        names |= _pair(f'features.{block}.conv.{i}', 0, **ours)
  return names


def _vgg_names(variant):
  """One Sequential of convolution, BatchNorm, ReLU, ..., and a max-pool after each stage."""
  names, item = {}, 0
  for stage, count in enumerate(VGGS[variant], 1):
    for i in range(count):
      names |= conv_names(f'features.{item}', f'conv{stage}_{i}', bias=True)
      names |= norm_names(f'features.{item + 1}', f'bn{stage}_{i}')
      item += 3
    item += 1
  return names


def _head_names(c):
  lite = c.name == 'efficientnet_lite0'
  names = conv_names('_conv_head', 'conv2') | norm_names('_bn1', 'bn2') if lite else {}
  if c.head == 'gap':
    return names | conv_names('pre_classifier', 'head/pre_classifier', bias=True)
  if c.name in VGGS:
    theirs = 'classifier'
  elif c.head == 'permuted':
    theirs = LINEAR['canvas']
  else:
    theirs = '_fc' if lite else LINEAR[c.stem]
  return names | conv_names(theirs, 'head/classifier', bias=True)


def _inside_deeplab(names):
  """The map of a backbone, as a DeepLab has it. DeepLabV3Plus-Pytorch parts MobileNetV2's features
  in two, whose items keep their numbers."""
  def theirs(name):
    level = 'low' if name.startswith(tuple(f'features.{i}.' for i in range(4))) else 'high'
    return f'backbone.{level}_level_{name}' if name.startswith('features.') else f'backbone.{name}'

  return {theirs(name): path.replace('/', '/backbone/', 1) for name, path in names.items()}


def _deeplab_head_names(c):
  """v3's classifier is one Sequential that begins with ASPP; v3+'s stands beside it."""
  plus = c.name == 'deeplabv3plus'
  aspp, last = ('aspp', 0) if plus else ('classifier.0', 1)
  names = {}
  for i in range(5):
    names |= _pair(f'{aspp}.convs.{i}', int(i == 4),  # the fifth begins with its pooling
                   conv=f'branch_convs_{i}', norm=f'branch_norms_{i}',
                   separable=c.separable and 0 < i < 4)
  names |= _pair(f'{aspp}.project', 0, conv='project/conv', norm='project/bn')
  if plus:
    names |= _pair('project', 0, conv='low_level/conv', norm='low_level/bn')
  names |= _pair('classifier', last, conv='last/conv', norm='last/bn', separable=c.separable)
  names |= conv_names(f'classifier.{last + 3}', 'classifier', bias=True)
  return {f'classifier.{name}': path for name, path in names.items()}


# ---- What PyTorch has beside them ----------------------------------------------------------------


def unread(model_config: ConfigDict) -> dict[str, tuple[str, int]]:
  """What a state dict holds that no forward pass reads: {its name: (a name of `names`, n)}, where
  its shape is that of the first n axes of the named array.

  BatchNorms count batches, num_batches_tracked (), and the authors' GAPNet of a ResNet has a
  linear_location (K, c) that is not used.
  """
  counts = {name.replace('running_mean', 'num_batches_tracked'): (name, 0)
            for name in names(model_config) if name.endswith('.running_mean')}
  if model_config.name not in RESNETS or model_config.head != 'gap':
    return counts
  return {**counts, 'linear_location.weight': ('pre_classifier.weight', 2),
          'linear_location.bias': ('pre_classifier.weight', 1)}
