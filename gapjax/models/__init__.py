"""Networks by name. Every one returns (logits, features), features a dict of named stages."""

import flax.linen as nn

from gapjax.models import convolution, on_cpu
from gapjax.models.deeplab import DEEPLABS, RATES, DeepLab
from gapjax.models.heads import Permute
from gapjax.models.layers import DTYPES
from gapjax.models.mobilenet import MOBILENETS, MobileNet
from gapjax.models.resnet import RESNETS, ResNet
from gapjax.models.vgg import VGG, VGGS

MODELS = (*RESNETS, *VGGS, 'efficientnet_lite0', *DEEPLABS)  # MobileNetV2 is a backbone alone
OUTPUT_STRIDES, BACKBONES = tuple(RATES), (*RESNETS, *MOBILENETS)
# (mean, standard deviation) by which published weights expect images to be normalised, red green
# blue on [0, 1]. EfficientNet-Lite's are 127 and 128 of 255.
IMAGENET = ((.485, .456, .406), (.229, .224, .225))
NORMALISATIONS = {**dict.fromkeys(BACKBONES, IMAGENET),
                  'efficientnet_lite0': ((127 / 255,) * 3, (128 / 255,) * 3)}


def stages(name: str) -> tuple[str, ...]:
  """The names of a network's stages, in order."""
  return tuple(f'stage{s}' for s in range(1, 6 if name in (*VGGS, *MOBILENETS) else 5))


def create_network(model_config, *, num_classes: int, axis_name: str | None = None,
           total_steps: int = 0, platform: str | None = None) -> nn.Module:
  """Builds the network of a `config.model` (fields: gapjax/config.py).

  Args:
    model_config: the ConfigDict under `model`, already validated (config.validate).
    num_classes: K, the number of logits.
    axis_name: the pmap axis that BatchNorm synchronises over; None for one device.
    total_steps: of its training, over which LPS' temperature falls.
    platform: jax's name of where it runs; on 'cpu' convolutions are on_cpu.py's.
  """
  c = model_config
  arguments = dict(
    variant=c.name, num_classes=num_classes, width=c.width, padding=c.padding,
    downsample=c.downsample, blur_size=c.blur_size, total_steps=total_steps, axis_name=axis_name,
    dtype=DTYPES[c.dtype],
    convolve=(on_cpu if platform == 'cpu' else convolution).convolve)
  if c.name in DEEPLABS:
    return DeepLab(backbone_name=c.backbone, output_stride=c.output_stride, stem=c.stem,
                   dropout=c.dropout, backbone_momentum=c.backbone_momentum,
                   separable=c.separable, early_padding=c.early_padding, **arguments)
  arguments.update(
    head=c.head, permute_at=c.permute_at,
    permute=Permute(c.permutation, c.permutation_seed) if c.head == 'permuted' else None)
  if c.name in RESNETS:
    return ResNet(stem=c.stem, **arguments)
  return (VGG if c.name in VGGS else MobileNet)(**arguments)
