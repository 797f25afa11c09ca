"""The paper's networks in plain PyTorch, under the authors' names: for parity and for timing.

Written from the description of the networks, not from their code, and of gapjax's it takes not
even a table, since it is what these are checked against. Images are (b, 3, h, w);
every network is a torch.nn.Module called as network(images, permutation=None), and returns
(logits, features) with the same named features as gapjax's. Needs PyTorch (`.[torch]`).
"""


import torch
import torch.nn.functional as F
from torch import nn

from gapjax.pytorch import tables
from gapjax.pytorch.twin_backbones import VGG, EfficientNet, MobileNetV2, ResNet
from gapjax.pytorch.twin_layers import Conv, SeparableConv


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
