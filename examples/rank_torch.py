"""Position channels of a PyTorch network: python examples/rank_torch.py

A small network says whether a digit stands left or right on a canvas. For gapjax it is two
functions, images to feature maps and maps to logits: put those of your own network in their place.
The channels are ranked by the position they encode, and removed. Takes less than a minute on a CPU.
"""

import numpy as np
import torch
from sklearn.datasets import load_digits

from gapjax import attack, rank
from gapjax.neurons.attack import random_orders

draw = np.random.default_rng(0)
grey = load_digits().images
sides = draw.integers(0, 2, len(grey))  # 0: left, 1: right
images = np.zeros((len(grey), 16, 16, 3), np.float32)
for image, digit, side in zip(images, (grey - grey.mean()) / grey.std(), sides, strict=True):
  image[4:12, 8 * side:8 * side + 8] = digit[..., None]

torch.manual_seed(0)
body = torch.nn.Sequential(
  torch.nn.Conv2d(3, 16, 3, 2, padding=1), torch.nn.ReLU(),
  torch.nn.Conv2d(16, 32, 3, 2, padding=1), torch.nn.ReLU(),
  torch.nn.Conv2d(32, 32, 3, 2, padding=1), torch.nn.ReLU())
pool = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(),
                           torch.nn.Linear(32, 2))
optimizer = torch.optim.Adam([*body.parameters(), *pool.parameters()], 3e-3)
for _ in range(200):
  batch = draw.integers(0, 1397, 64)
  logits = pool(body(torch.tensor(images[batch]).permute(0, 3, 1, 2)))
  optimizer.zero_grad()
  torch.nn.functional.cross_entropy(logits, torch.tensor(sides[batch])).backward()
  optimizer.step()


@torch.no_grad()
def features(images):
  """(b, h, w, 3) -> maps (b, h / 8, w / 8, 32), of jax's arrays and NumPy's."""
  return body(torch.tensor(np.asarray(images)).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).numpy()


@torch.no_grad()
def head(maps):
  """Maps (b, h / 8, w / 8, 32) -> logits (b, 2)."""
  return pool(torch.tensor(np.asarray(maps)).permute(0, 3, 1, 2)).numpy()


order = rank(features, images[:1397])  # (32,), first the channel that encodes most position
print('most position:', *order[:8])
result = attack(features, head, [{'images': images[1397:], 'labels': sides[1397:]}],
                counts=range(2, 33, 2),
                orders={'position': order, 'random': random_orders(32, 5, seed=0)})
accuracy = result.metrics['accuracy']  # {order: (repeats, 17)}
for n, ours, random in zip(result.counts, accuracy['position'][0], accuracy['random'].mean(0),
                           strict=True):
  print(f'{n:3} channels removed: accuracy {ours:.3f}, random channels {random:.3f}')
