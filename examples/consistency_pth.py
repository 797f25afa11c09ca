"""Shift consistency of a PyTorch network from a file: python examples/consistency_pth.py [FILE.pth]

FILE.pth is a state dict of the network below; put your own network and images in their place.
Without a file the network has random weights, saved and read as a file would be.
"""

import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
import torch
from sklearn.datasets import load_digits

from gapjax import consistency

network = torch.nn.Sequential(
  torch.nn.Conv2d(3, 16, 3, padding=1), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1),
  torch.nn.Flatten(), torch.nn.Linear(16, 10))


@torch.no_grad()
def predict(images):
  """(b, h, w, 3) -> logits (b, 10), of jax's arrays and NumPy's."""
  return network(torch.tensor(np.asarray(images)).permute(0, 3, 1, 2)).numpy()


with tempfile.TemporaryDirectory() as folder:
  path = Path(sys.argv[1] if len(sys.argv) > 1 else f'{folder}/network.pth')
  if len(sys.argv) == 1:
    torch.save(network.state_dict(), path)
  network.load_state_dict(torch.load(path, map_location='cpu', weights_only=True))
network.eval()  # BatchNorm and dropout as in testing

grey = load_digits().images[1397:, ..., None]
images = np.float32((grey - grey.mean()) / grey.std()).repeat(3, -1)  # normalised: zeros are filled
images = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)))  # (400, 16, 16, 3)
found = sum(consistency(predict, images[i:i + 100], jax.random.key(i), max_shift=4, protocol='pad')
            for i in range(0, len(images), 100))
of = sys.argv[1] if len(sys.argv) > 1 else 'random weights, which see little but one class'
print(f'{found.value:.1%} of {found.count} images have the same class for two random shifts ({of})')
