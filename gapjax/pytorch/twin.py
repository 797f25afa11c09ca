"""The paper's networks in plain PyTorch, under the authors' names: for parity and for timing.

Written from the description of the networks, not from their code, and of gapjax's it takes not
even a table, since it is what these are checked against. Images are (b, 3, h, w);
every network is a torch.nn.Module called as network(images, permutation=None), and returns
(logits, features) with the same named features as gapjax's. Needs PyTorch (`.[torch]`).
"""

import re
from collections import OrderedDict
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from gapjax.pytorch import tables


def create_twin(model_config, *, num_classes: int) -> nn.Module:
  """The network of a `config.model` (gapjax/config.py), as models.create_network builds it."""
  c = model_config
  how = dict(padding=c.padding, downsample=c.downsample, blur_size=c.blur_size)
  if c.name.startswith('deeplab'):
    return DeepLab(c, num_classes, how)
  kinds = {**dict.fromkeys(tables.VGGS, VGG), 'efficientnet_lite0': EfficientNet}
  network = kinds.get(c.name, ResNet)(c, how)
  network.add_head(c, num_classes)
  return network


# ---- Layers --------------------------------------------------------------------------------------


class Conv(nn.Conv2d):
  """nn.Conv2d padded by (k - 1) // 2 a side, or k - 1 if 'full', in one of gapjax's ways."""

  def __init__(self, channels, features, kernel_size, stride=1, *, padding='zero', bias=False,
               dilation=1, groups=1):
    size = 0 if padding == 'none' else dilation * (kernel_size - 1) // 2
    size = dilation * (kernel_size - 1) if padding == 'full' else size
    mode = padding if padding in ('reflect', 'replicate', 'circular') else 'zeros'
    super().__init__(channels, features, kernel_size, stride, size, dilation, groups, bias,
                     padding_mode=mode)
    self.partial = padding == 'partial' and size > 0

  def forward(self, x):
    if not self.partial:
      return super().forward(x)
    # Kernel area over the part of it inside the image (Liu et al. 2018), before the bias.
    ones = x.new_ones(1, 1, *x.shape[2:])
    window = x.new_ones(1, 1, *self.kernel_size)
    inside = F.conv2d(ones, window, None, self.stride, self.padding, self.dilation)
    y = F.conv2d(x, self.weight, None, self.stride, self.padding, self.dilation, self.groups)
    y = y * (self.kernel_size[0] ** 2 / inside)
    return y if self.bias is None else y + self.bias[:, None, None]


class SameConv(Conv):
  """A Conv without bias whose border is TensorFlow's SAME: an axis of n pixels becomes one of
  ceil(n / stride), and of an odd number of padded pixels the larger part stands at its end."""

  def __init__(self, *arguments, padding, **more):
    super().__init__(*arguments, padding=padding, **more)
    self.way = padding

  def forward(self, x):
    if self.way in ('none', 'full'):
      return super().forward(x)
    (stride, _), (dilation, _), (kernel, _) = self.stride, self.dilation, self.kernel_size
    border = []
    for n in (x.shape[3], x.shape[2]):  # F.pad begins with the last axis
      size = max((-(-n // stride) - 1) * stride + dilation * (kernel - 1) + 1 - n, 0)
      border += [size // 2, size - size // 2]
    mode = self.way if self.way in ('reflect', 'replicate', 'circular') else 'constant'
    y = F.conv2d(F.pad(x, border, mode), self.weight, None, stride, 0, dilation, self.groups)
    if self.way == 'partial':
      ones = F.pad(x.new_ones(1, 1, *x.shape[2:]), border)
      y = y * kernel ** 2 / F.conv2d(ones, x.new_ones(1, 1, kernel, kernel), None, stride, 0,
                                     dilation)
    return y


class SeparableConv(nn.Module):
  """`body`: a convolution of every channel alone, then a 1x1 across them."""

  def __init__(self, channels, features, kernel_size, *, padding='zero', dilation=1):
    super().__init__()
    self.body = nn.Sequential(
      Conv(channels, channels, kernel_size, padding=padding, dilation=dilation, groups=channels),
      Conv(channels, features, 1))

  def forward(self, x):
    return self.body(x)


def pad(x, border, mode):
  """numpy.pad's modes on maps of any size: (b, c, h, w) -> (b, c, h + before + after, ...)."""
  rows, columns = (torch.as_tensor(np.pad(np.arange(n), border, mode), device=x.device)
                   for n in x.shape[2:])
  return x[:, :, rows][..., columns]


def dense(stride, how):
  """The stride that is left to what strides: 1 where a map is halved otherwise."""
  return stride if how['downsample'] == 'stride' else 1


def halved(x, stride, component=None, *, downsample, blur_size, padding, learned=None):
  """(b, c, h, w) -> (b, c, h / 2, w / 2) by a blur, or its strongest polyphase component, and that
  component (b,); x itself where the stride is 1, or was taken. learned: the Component that chooses
  instead, by weights (b, 4) in training."""
  if stride == 1 or downsample == 'stride':
    return x, None
  taps = torch.tensor(tables.BINOMIAL[blur_size], dtype=x.dtype, device=x.device)
  taps = taps / taps.sum()
  window = torch.outer(taps, taps).expand(x.shape[1], 1, blur_size, blur_size)
  mode = 'circular' if padding == 'circular' else 'reflect'
  x = pad(x, ((blur_size - 1) // 2, blur_size // 2), tables.NUMPY_MODES[mode])
  if downsample == 'blur':
    return F.conv2d(x, window, stride=2, groups=x.shape[1]), None
  if blur_size > 1:
    x = F.conv2d(x, window, groups=x.shape[1])
  parts = torch.stack([x[..., i::2, j::2] for i in (0, 1) for j in (0, 1)], 1)  # (b, 4, c, h, w)
  if component is None:
    component = learned(parts) if learned else parts.square().sum((2, 3, 4)).argmax(1)
  if component.ndim == 2:
    return torch.einsum('bpchw,bp->bchw', parts, component), component
  return parts[torch.arange(len(x), device=x.device), component], component


class Component(nn.Module):
  """LPS (Rojas-Gomez et al. 2022): parts (b, 4, c, h, w) -> which one, (b,); in training weights
  (b, 4), a softmax of logits and Gumbel noise at a temperature. `anneal` sets the two."""
  temperature, noise = 1.0, None

  def __init__(self, channels):
    super().__init__()
    self.conv = Conv(channels, channels, 3, padding='circular', bias=True)
    self.linear = Conv(channels, 1, 1)

  def forward(self, parts):
    z = self.linear(F.relu(self.conv(parts.flatten(0, 1))))
    logits = z.mean((1, 2, 3)).view(len(parts), 4)
    if not self.training:
      return logits.argmax(1)
    noise = self.noise
    if noise is None:
      noise = -torch.empty_like(logits).exponential_().log()
    return F.softmax((logits + noise) / self.temperature, 1)


def component(channels, stride, how):
  """A Component where one chooses what a stride of 2 keeps, else None."""
  return Component(channels) if stride == 2 and how['downsample'] == 'learned_polyphase' else None


def anneal(network, progress, noise=None):
  """Sets a network's Components to the step of training at `progress`, from 0 to 1: a temperature
  from 1 to 0.025, and noise for each of them in their order, or None for PyTorch's own."""
  layers = [layer for layer in network.modules() if isinstance(layer, Component)]
  for i, layer in enumerate(layers):
    layer.temperature = 1 + (0.025 - 1) * min(progress, 1)
    layer.noise = None if noise is None else noise[i]


def centred(x, shape):
  """x (b, c, h, w) cropped to (b, c, *shape), or padded with zeros, around its centre."""
  (top, more), (left, wider) = ((-((a - b) // 2), b - a)
                                for a, b in zip(x.shape[2:], shape, strict=True))
  return F.pad(x, (left, wider - left, top, more - top))  # below 0 it crops


# ---- Backbones -----------------------------------------------------------------------------------


class Block(nn.Module):
  """A residual block; `shortcut` is what the projection is called."""

  def __init__(self, channels, width, stride, bottleneck, how, dilation, momentum, shortcut):
    super().__init__()
    self.how, self.projection = how, None
    out = width * (4 if bottleneck else 1)
    path = [(width, 1, 1), (width, 3, stride), (out, 1, 1)] if bottleneck else [
      (width, 3, stride), (out, 3, 1)]
    self.strides = [stride for _, _, stride in path]
    self.component = component(width, stride, how)
    before = channels
    for i, (features, kernel, step) in enumerate(path, 1):
      setattr(self, f'conv{i}', Conv(
        before, features, kernel, dense(step, how), padding=how['padding'],
        dilation=dilation if kernel > 1 else 1))
      setattr(self, f'bn{i}', nn.BatchNorm2d(features, momentum=momentum))
      before = features
    if stride != 1 or channels != out:
      self.projection = shortcut
      setattr(self, shortcut, nn.Sequential(
        Conv(channels, out, 1, dense(stride, how)),
        nn.BatchNorm2d(out, momentum=momentum)))

  def forward(self, x):
    y = x
    for i, stride in enumerate(self.strides, 1):
      y = getattr(self, f'bn{i}')(getattr(self, f'conv{i}')(y))
      if i < len(self.strides):
        y = F.relu(y)
      y, kept = halved(y, stride, learned=self.component, **self.how)
      x, _ = halved(x, stride, kept, **self.how)
    x = getattr(self, self.projection)(x) if self.projection else x
    return F.relu(centred(x, y.shape[2:]) + y)


class Backbone(nn.Module):
  """Stages, `stages(images, permute)` -> features by name, and a head if one was added.

  permute: None, or the name of the stage before which channels are put in an order, and the order.
  """
  head = None

  def add_head(self, c, num_classes):
    """'gap' (GAPNet), 'permuted' (PermuteNet) or 'linear'."""
    self.head, self.at = c.head, c.permute_at
    self.fixed = c.permutation_seed if c.permutation == 'fixed' else None
    if c.head == 'gap':
      self.pre_classifier = Conv(self.channels, num_classes, 3, padding=c.padding, bias=True)
    # The authors' GAPNet has a linear layer too that its forward never uses.
    name = {'imagenet': 'fc', 'cifar': 'linear'}.get(c.stem, 'linear_location')
    name = name if c.head == 'linear' else 'linear_location'
    name = 'classifier' if c.name in tables.VGGS else name
    name = '_fc' if c.name == 'efficientnet_lite0' and c.head == 'linear' else name
    if c.head != 'gap' or c.name in tables.RESNETS:
      setattr(self, name, nn.Linear(self.channels, num_classes))

  def forward(self, x, permutation=None):
    """(b, 3, h, w) -> logits (b, k), features; a permutation that is not given is drawn anew."""
    if self.head == 'permuted' and permutation is None:
      permutation = self.draw()
    early = self.head == 'permuted' and self.at != 'pooled'
    features = self.stages(x, (self.at, permutation) if early else None)
    x = list(features.values())[-1]
    features['pooled'] = z = x.mean((2, 3))  # (b, c)
    if self.head == 'gap':
      return self.pre_classifier(x).mean((2, 3)), features
    if self.head == 'permuted' and self.at == 'pooled':
      z = z[:, permutation]
    linear = next(layer for layer in self.children() if isinstance(layer, nn.Linear))
    return linear(z), features

  def draw(self):
    """A permutation of as many channels as there are where it is applied."""
    n = {**self.inputs, 'pooled': self.channels}[self.at]
    generator = None if self.fixed is None else torch.Generator().manual_seed(self.fixed)
    return torch.randperm(n, generator=generator)


class ResNet(Backbone):
  """Stem and four stages, as gapjax.models.resnet.ResNet."""

  def __init__(self, c, how, *, variant=None, output_stride=None, momentum=0.1):
    super().__init__()
    counts, bottleneck = tables.RESNETS[variant or c.name]
    kernel, self.stride, self.pools = tables.STEMS[c.stem]
    self.how = how
    self.conv1 = Conv(3, c.width, kernel, dense(self.stride, how), padding=how['padding'])
    self.bn1 = nn.BatchNorm2d(c.width, momentum=momentum)
    self.component = component(c.width, self.stride, how)
    self.pool_component = component(c.width, 2 if self.pools else 1, how)
    whole, dilation, channels = self.stride * (2 if self.pools else 1), 1, c.width
    self.inputs = {}  # channels before each stage
    for s, (count, stride) in enumerate(zip(counts, tables.STRIDES, strict=True), 1):
      first = dilation
      if output_stride and whole * stride > output_stride:
        stride, dilation = 1, dilation * stride
      whole *= stride
      self.inputs[f'stage{s}'] = channels
      blocks = []
      for i in range(count):
        blocks.append(Block(channels, c.width * 2 ** (s - 1), 1 if i else stride, bottleneck, how,
                            dilation if i else first, momentum,
                            'downsample' if c.stem == 'imagenet' else 'shortcut'))
        channels = c.width * 2 ** (s - 1) * (4 if bottleneck else 1)
      setattr(self, f'layer{s}', nn.Sequential(*blocks))
    self.channels, self.low_channels = channels, c.width * (4 if bottleneck else 1)

  def stages(self, x, permute=None):
    x, _ = halved(F.relu(self.bn1(self.conv1(x))), self.stride, learned=self.component, **self.how)
    if self.pools:
      circular = self.how['padding'] == 'circular'
      x = F.max_pool2d(F.pad(x, [1] * 4, 'circular') if circular else x, 3, dense(2, self.how),
                       padding=0 if circular else 1)
      x, _ = halved(x, 2, learned=self.pool_component, **self.how)
    features = {'stem': x}
    for s in range(1, 5):
      if permute and permute[0] == f'stage{s}':
        x = x[:, permute[1]]
      features[f'stage{s}'] = x = getattr(self, f'layer{s}')(x)
    return features


class VGG(Backbone):
  """Five stages of convolutions, BatchNorm and ReLU, each ended by a max-pool."""

  def __init__(self, c, how):
    super().__init__()
    self.how, layers, self.ends, channels, self.inputs = how, [], [], 3, {}
    stages = zip(tables.VGGS[c.name], tables.MULTIPLES, strict=True)
    for s, (count, multiple) in enumerate(stages, 1):
      self.inputs[f'stage{s}'] = channels
      for _ in range(count):
        out = c.width * multiple
        layers += [Conv(channels, out, 3, padding=how['padding'], bias=True), nn.BatchNorm2d(out),
                   nn.ReLU()]
        channels = out
      layers.append(nn.MaxPool2d(2, dense(2, how)))
      self.ends.append(len(layers))
    self.features, self.channels = nn.Sequential(*layers), channels

  def stages(self, x, permute=None):
    features, start = {}, 0
    for s, end in enumerate(self.ends, 1):
      if permute and permute[0] == f'stage{s}':
        x = x[:, permute[1]]
      for layer in self.features[start:end - 1]:
        x = layer(x)
      if self.how['downsample'] == 'polyphase':  # a dense pool would lose a row and a column
        mode = 'circular' if self.how['padding'] == 'circular' else 'replicate'
        x = pad(x, (0, 1), tables.NUMPY_MODES[mode])
      x, _ = halved(self.features[end - 1](x), 2, **self.how)
      features[f'stage{s}'], start = x, end
    return features


class InvertedResidual(nn.Module):
  """`conv`: expansion (a Sequential, as the next), depthwise convolution, linear 1x1."""

  def __init__(self, inputs, features, stride, expansion, how, *, dilation, momentum,
               early_padding):
    super().__init__()
    self.how, self.stride = how, stride
    self.shortcut = stride == 1 and inputs == features
    self.border = dilation if early_padding else 0
    hidden, norm = inputs * expansion, lambda n: nn.BatchNorm2d(n, momentum=momentum)
    layers = [] if expansion == 1 else [
      nn.Sequential(Conv(inputs, hidden, 1), norm(hidden), nn.ReLU6())]
    depthwise = Conv(hidden, hidden, 3, dense(stride, how), dilation=dilation,
                     padding='none' if early_padding else how['padding'], groups=hidden)
    layers.append(nn.Sequential(depthwise, norm(hidden), nn.ReLU6()))
    self.conv = nn.Sequential(*layers, Conv(hidden, features, 1), norm(features))

  def forward(self, x):
    y = x
    if self.border:
      mode = self.how['padding']
      y = F.pad(x, [self.border] * 4, 'constant' if mode == 'zero' else mode)
    y, _ = halved(self.conv[:-2](y), self.stride, **self.how)
    y = self.conv[-2:](y)
    return x + y if self.shortcut else y


class MobileNetV2(nn.Module):
  """Stem and blocks, numbered through: the first four items are the low-level features."""

  def __init__(self, c, how):
    super().__init__()
    momentum, self.how = c.backbone_momentum, how
    last = tables.mobile_channels(32, c.width)
    stem = Conv(3, last, 3, dense(2, how),
                padding='none' if c.early_padding else how['padding'])
    items = [nn.Sequential(stem, nn.BatchNorm2d(last, momentum=momentum), nn.ReLU6())]
    whole, dilation, self.ends = 2, 1, []
    for expansion, usual, count, stride in tables.INVERTED:
      first = dilation
      if whole * stride > c.output_stride:
        stride, dilation = 1, dilation * stride
      whole *= stride
      out = tables.mobile_channels(usual, c.width)
      for i in range(count):
        items.append(InvertedResidual(
          last, out, 1 if i else stride, expansion, how, dilation=dilation if i else first,
          momentum=momentum, early_padding=c.early_padding))
        last = out
      if usual in tables.STAGE_ENDS:
        self.ends.append(len(items) - 1)
    numbered = [(str(i), item) for i, item in enumerate(items)]
    self.low_level_features = nn.Sequential(OrderedDict(numbered[:4]))
    self.high_level_features = nn.Sequential(OrderedDict(numbered[4:]))
    self.channels = last
    self.low_channels = tables.mobile_channels(tables.STAGE_ENDS[0], c.width)

  def stages(self, x):
    features = {}
    for i, layer in enumerate([*self.low_level_features, *self.high_level_features]):
      x = layer(x)
      if i == 0:
        features['stem'] = x = halved(x, 2, **self.how)[0]
      if i in self.ends:
        features[f'stage{self.ends.index(i) + 1}'] = x
    return features


class MBConv(nn.Module):
  """An inverted residual under the names of efficientnet_lite_pytorch."""

  def __init__(self, inputs, features, kernel, stride, expansion, how, *, dilation, momentum):
    super().__init__()
    self.how, self.stride, self.expands = how, stride, expansion > 1
    self.shortcut = stride == 1 and inputs == features
    hidden = inputs * expansion
    if self.expands:
      self._expand_conv = Conv(inputs, hidden, 1)
      self._bn0 = lite_norm(hidden, momentum)
    self._depthwise_conv = SameConv(hidden, hidden, kernel, dense(stride, how), groups=hidden,
                                    padding=how['padding'], dilation=dilation)
    self._bn1 = lite_norm(hidden, momentum)
    self._project_conv = Conv(hidden, features, 1)
    self._bn2 = lite_norm(features, momentum)

  def forward(self, x):
    y = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
    y, _ = halved(F.relu6(self._bn1(self._depthwise_conv(y))), self.stride, **self.how)
    y = self._bn2(self._project_conv(y))
    return centred(x, y.shape[2:]) + y if self.shortcut else y


def lite_norm(channels, momentum):
  return nn.BatchNorm2d(channels, eps=1e-3, momentum=momentum)


class EfficientNet(Backbone):
  """EfficientNet-Lite0: stem, blocks, and before a head one more convolution, stage5."""

  def __init__(self, c, how, *, output_stride=None, momentum=0.1):
    super().__init__()
    self.how, self.width = how, c.width
    last = tables.mobile_channels(32, c.width)
    self._conv_stem = SameConv(3, last, 3, dense(2, how), padding=how['padding'])
    self._bn0 = lite_norm(last, momentum)
    whole, dilation, blocks, self.starts = 2, 1, [], [0]
    self.inputs = {'stage1': last}  # channels before each stage
    for string in tables.LITE:
      count, kernel, stride, expansion, _, usual = map(int, re.findall(r'\d+', string))
      first = dilation
      if output_stride and whole * stride > output_stride:
        stride, dilation = 1, dilation * stride
      whole *= stride
      out = tables.mobile_channels(usual, c.width)
      for i in range(count):
        blocks.append(MBConv(last, out, kernel, 1 if i else stride, expansion, how,
                             dilation=dilation if i else first, momentum=momentum))
        last = out
      if usual in tables.LITE_ENDS:
        self.starts.append(len(blocks))
        self.inputs[f'stage{len(self.starts)}'] = last
    self._blocks, self.channels = nn.ModuleList(blocks), last
    self.low_channels = tables.mobile_channels(tables.LITE_ENDS[0], c.width)

  def add_head(self, c, num_classes):
    before, self.channels = self.channels, tables.mobile_channels(1280, c.width)
    self._conv_head = Conv(before, self.channels, 1)
    self._bn1 = lite_norm(self.channels, 0.1)
    super().add_head(c, num_classes)

  def stages(self, x, permute=None):
    x, _ = halved(F.relu6(self._bn0(self._conv_stem(x))), 2, **self.how)
    features = {'stem': x}
    for s, (start, end) in enumerate(pairwise(self.starts), 1):
      x = x[:, permute[1]] if permute and permute[0] == f'stage{s}' else x
      for block in self._blocks[start:end]:
        x = block(x)
      features[f'stage{s}'] = x
    if self.head:
      x = x[:, permute[1]] if permute and permute[0] == 'stage5' else x
      features['stage5'] = F.relu6(self._bn1(self._conv_head(x)))
    return features


# ---- Segmentation --------------------------------------------------------------------------------


def conv_norm_relu(channels, features, kernel_size, *, separable=False, **conv):
  kind = SeparableConv if separable and kernel_size > 1 else Conv
  return [kind(channels, features, kernel_size, **conv), nn.BatchNorm2d(features), nn.ReLU()]


class ASPP(nn.Module):
  """Five branches, among them the image's mean, and their projection."""

  def __init__(self, channels, features, c):
    super().__init__()
    wide = dict(padding=c.padding, separable=c.separable)
    pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), *conv_norm_relu(channels, features, 1))
    self.convs = nn.ModuleList([
      nn.Sequential(*conv_norm_relu(channels, features, 1)),
      *(nn.Sequential(*conv_norm_relu(channels, features, 3, dilation=rate, **wide))
        for rate in tables.RATES[c.output_stride]), pooled])
    self.project = nn.Sequential(*conv_norm_relu(5 * features, features, 1), nn.Dropout(c.dropout))

  def forward(self, x):
    y = [branch(x) for branch in self.convs]
    y[4] = y[4].expand(-1, -1, *x.shape[2:])
    return self.project(torch.cat(y, 1))


class Head(nn.Module):
  """`classifier.*` of DeepLabv3 and, with a decoder, of v3+."""

  def __init__(self, channels, low_channels, num_classes, c):
    super().__init__()
    features, plus = 4 * c.width, c.name == 'deeplabv3plus'
    few = max(3 * c.width // 4, 1) if plus else 0
    aspp = ASPP(channels, features, c)
    last = [*conv_norm_relu(features + few, features, 3, padding=c.padding, separable=c.separable),
            Conv(features, num_classes, 1, bias=True)]
    if plus:
      self.project = nn.Sequential(*conv_norm_relu(low_channels, few, 1))
      self.aspp = aspp
    self.classifier = nn.Sequential(*([] if plus else [aspp]), *last)

  def forward(self, features):
    if not hasattr(self, 'aspp'):
      return self.classifier(features['stage4'])
    low = self.project(features['stage1'])
    y = resize(self.aspp(features['stage4']), low.shape[2:])
    return self.classifier(torch.cat([low, y], 1))


class DeepLab(nn.Module):
  """(b, 3, h, w) -> logits (b, k, h, w), features."""

  def __init__(self, c, num_classes, how):
    super().__init__()
    if c.backbone == 'mobilenetv2':
      self.backbone = MobileNetV2(c, how)
    else:
      more = dict(output_stride=c.output_stride, momentum=c.backbone_momentum)
      self.backbone = (EfficientNet(c, how, **more) if c.backbone == 'efficientnet_lite0' else
                       ResNet(c, how, variant=c.backbone, **more))
    self.classifier = Head(self.backbone.channels, self.backbone.low_channels, num_classes, c)

  def forward(self, x, permutation=None):
    features = self.backbone.stages(x)
    return resize(self.classifier(features), x.shape[2:]), features


def resize(x, size):
  return F.interpolate(x, size=tuple(size), mode='bilinear', align_corners=False)
