"""The twin's networks that classify, which are DeepLab's backbones too."""

import re
from collections import OrderedDict
from itertools import pairwise

import jax
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from gapjax.pytorch import tables
from gapjax.pytorch.twin_layers import (
  Conv,
  SameConv,
  centred,
  component,
  dense,
  halved,
  pad,
  padded,
)


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
    if self.fixed is None:
      return torch.randperm(n)
    # Weights belong to the order that they were trained with, which is jax's by this definition.
    key = jax.random.fold_in(jax.random.key(self.fixed), n)
    return torch.tensor(np.asarray(jax.random.permutation(key, n)))


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
      y = padded(x, [self.border] * 4, self.how['padding'])
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
