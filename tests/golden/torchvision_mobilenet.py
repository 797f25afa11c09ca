"""Makes tests/golden/torchvision_mobilenetv2.npz: torchvision's MobileNetV2 at an eighth of its
width with random weights, and its features; also dilated, and padded early.

    python tests/golden/torchvision_mobilenet.py      # where torch and torchvision are installed

torchvision has neither dilation nor early padding. Both are what DeepLabV3Plus-Pytorch
(network/backbone/mobilenetv2.py), which the authors' code builds on, makes of that network.
"""

import pathlib

import numpy as np
import torch

# Output stride -> {block: (stride, dilation)}, where these differ from torchvision's.
DILATED = {
  16: {14: (1, 1), 15: (1, 2), 16: (1, 2), 17: (1, 2)},
  8: {7: (1, 1), **dict.fromkeys(range(8, 15), (1, 2)), 15: (1, 4), 16: (1, 4), 17: (1, 4)},
}
STAGES = {'stem': 0, 'stage1': 3, 'stage2': 6, 'stage3': 13, 'stage4': 17}  # their last blocks


def depthwise(block):
  """The convolution of a block that has a group for each channel."""
  return next(m for m in block.modules() if isinstance(m, torch.nn.Conv2d) and m.groups > 1)


def dilate(network, output_stride):
  for i, (stride, dilation) in DILATED.get(output_stride, {}).items():
    block, conv = network.features[i], depthwise(network.features[i])
    conv.stride, conv.dilation, conv.padding = (stride,) * 2, (dilation,) * 2, (dilation,) * 2
    # There, a block has a shortcut whenever nothing stands against it.
    block.use_res_connect = stride == 1 and block.conv[0][0].in_channels == block.out_channels


def features(network, image, *, early_padding):
  """Image (b, h, w, 3) -> {stage: (b, h', w', c)}, in evaluation mode."""
  network.eval()
  x, found = torch.from_numpy(image).permute(0, 3, 1, 2), {}
  for i, block in enumerate(network.features[:-1]):
    if not early_padding:
      x = block(x)
    elif i == 0:
      block[0].padding = (0, 0)
      x = block(x)
    else:
      conv = depthwise(block)
      padded = torch.nn.functional.pad(x, (conv.dilation[0],) * 4)
      conv.padding = (0, 0)
      x = x + block.conv(padded) if block.use_res_connect else block.conv(padded)
    found |= {name: x.permute(0, 2, 3, 1).numpy() for name, last in STAGES.items() if last == i}
  return found


def randomise(network, draw):
  """Random weights of 15 values a layer, which pack well and are exact in float16; BatchNorm
  statistics unlike those it starts with."""
  for name, x in network.state_dict().items():
    if x.dtype.is_floating_point:
      levels = draw.integers(-7, 8, x.shape)
      if x.ndim > 1:
        levels = levels * 2.0 ** np.round(np.log2(1.5 / np.sqrt(np.prod(x.shape[1:])) / 4.3))
      elif name.endswith(('weight', 'running_var')):
        levels = 1 + levels / 16
      else:
        levels = levels / 16
      x.copy_(torch.from_numpy(levels))


def build():
  from torchvision.models import mobilenet_v2  # not for `randomise`, which others take
  network = mobilenet_v2(width_mult=1 / 8).double()
  randomise(network, np.random.default_rng(0))
  return network


def main():
  image = np.random.default_rng(1).integers(-8, 9, (1, 33, 49, 3)) / 4
  arrays = {'image': image.astype(np.float16)}
  with torch.no_grad():
    for output_stride, early_padding in ((32, False), (16, False), (8, False), (16, True)):
      network = build()
      dilate(network, output_stride)
      kind = f'{output_stride}{"_early" if early_padding else ""}'
      for name, x in features(network, image, early_padding=early_padding).items():
        if kind == '32' or name == 'stage4':
          arrays[f'{kind}/{name}'] = x.astype(np.float32)
        print(kind, name, x.shape, f'|x| to {np.abs(x).max():.3g}, {x.std():.3g} off its mean')
  weights = {key: x.numpy().astype(np.float16) for key, x in build().state_dict().items()
             if key.startswith('features') and not key.startswith('features.18')
             and x.dtype.is_floating_point}
  path = pathlib.Path(__file__).parent / 'torchvision_mobilenetv2.npz'
  np.savez_compressed(path, **arrays, **weights)
  print(len(weights), 'weights,', path.stat().st_size, 'bytes')


if __name__ == '__main__':
  main()
