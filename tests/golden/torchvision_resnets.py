"""Makes tests/golden/*.npz: narrow ResNets of torchvision with random weights, and their stage 4.

    python tests/golden/torchvision_resnets.py      # where torch and torchvision are installed
"""

import pathlib

import numpy as np
import torch
from torchvision.models import resnet

NETWORKS = {'resnet18': (resnet.BasicBlock, [2, 2, 2, 2], 4, 32),
            'resnet50': (resnet.Bottleneck, [3, 4, 6, 3], 2, 8)}


class Narrow(resnet.ResNet):
  """torchvision's ResNet with `width` channels in stage 1, where it has 64."""

  def __init__(self, block, layers, *, width, output_stride):
    super().__init__(block, layers, num_classes=3)
    self.inplanes, self.dilation = width, 1
    self.conv1 = torch.nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
    self.bn1 = torch.nn.BatchNorm2d(width)
    stride = 4
    for s, count in enumerate(layers):
      dilate = s > 0 and stride * 2 > output_stride
      stride *= 2 if s and not dilate else 1
      setattr(self, f'layer{s + 1}', self._make_layer(
        block, width * 2 ** s, count, stride=2 if s else 1, dilate=dilate))
    self.fc = torch.nn.Linear(8 * width * block.expansion, 3)


def randomise(network, draw):
  """Random weights, and BatchNorm statistics unlike those it starts with; exact in float16."""
  for name, x in network.state_dict().items():
    if x.dtype.is_floating_point:
      if x.ndim > 1:
        new = draw.normal(size=x.shape) * np.sqrt(2 / np.prod(x.shape[1:]))
      elif name.endswith(('weight', 'running_var')):
        new = draw.uniform(0.5, 1.5, x.shape)
      else:
        new = 0.3 * draw.normal(size=x.shape)
      x.copy_(torch.from_numpy(new.astype(np.float16)))


def stage4(network, images):
  """Images (b, h, w, 3) -> layer4's output (b, h', w', c), in evaluation mode."""
  network.eval()
  x = torch.from_numpy(images).permute(0, 3, 1, 2)
  x = network.maxpool(network.relu(network.bn1(network.conv1(x))))
  for s in range(1, 5):
    x = getattr(network, f'layer{s}')(x)
  return x.permute(0, 2, 3, 1).numpy()


def main():
  with torch.no_grad():
    for name, (block, layers, width, output_stride) in NETWORKS.items():
      draw = np.random.default_rng(0)
      network = Narrow(block, layers, width=width, output_stride=output_stride).double()
      randomise(network, draw)
      image = draw.normal(size=(1, 32, 48, 3)).astype(np.float16)
      features = stage4(network, image.astype(np.float64))
      weights = {key: x.numpy().astype(np.float16) if x.dtype.is_floating_point else x.numpy()
                 for key, x in network.state_dict().items()}
      np.savez_compressed(pathlib.Path(__file__).parent / f'torchvision_{name}.npz', image=image,
                          stage4=features.astype(np.float32), **weights)
      print(name, features.shape, np.abs(features).max(), len(weights))


if __name__ == '__main__':
  main()
