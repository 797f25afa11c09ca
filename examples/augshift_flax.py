"""AugShift in a plain Flax loop: python examples/augshift_flax.py

A small network names scikit-learn's digits. Two random shifts of every image pass through it as one
batch, and their pooled features are drawn together. Takes less than a minute on a CPU.
"""

import flax.linen as nn
import jax
import numpy as np
import optax
from sklearn.datasets import load_digits

from gapjax import augshift_loss, consistency, random_shifts


class Network(nn.Module):
  """(b, h, w, 1) -> logits (b, 10) and pooled features (b, 64)."""

  @nn.compact
  def __call__(self, images):
    x = nn.relu(nn.Conv(32, (3, 3), strides=2)(images))
    z = nn.relu(nn.Conv(64, (3, 3), strides=2)(x)).mean((1, 2))
    return nn.Dense(10)(z), z


digits = load_digits()
images = np.float32((digits.images - digits.images.mean()) / digits.images.std())
images = np.pad(images, ((0, 0), (4, 4), (4, 4)))[..., None]  # (1797, 16, 16, 1), 0 is the mean
train, test = slice(0, 1397), slice(1397, None)
network, optimizer = Network(), optax.adam(3e-3)


@jax.jit
def train_step(params, state, key, images, labels):
  pairs = random_shifts(key, images, max_shift=4)  # (2, b, h, w, 1)

  def loss_of(params):
    logits, features = network.apply(params, pairs.reshape(-1, *images.shape[1:]))
    return augshift_loss(logits, features, labels, weight=1.0)

  (loss, parts), gradients = jax.value_and_grad(loss_of, has_aux=True)(params)
  updates, state = optimizer.update(gradients, state)
  return optax.apply_updates(params, updates), state, loss, parts


params = network.init(jax.random.key(0), images[:1])
state, draw = optimizer.init(params), np.random.default_rng(0)
for step in range(600):
  batch = draw.integers(0, train.stop, 64)
  params, state, loss, parts = train_step(params, state, jax.random.key(step), images[batch],
                                          digits.target[batch])
  if step % 200 == 199:
    print(f'step {step + 1}: loss {loss:.2f}, distance over variance '
          f'{parts["relative_distance"]:.3f}')

predict = jax.jit(lambda images: network.apply(params, images)[0])
accuracy = (predict(images[test]).argmax(1) == digits.target[test]).mean()
same = consistency(predict, images[test], jax.random.key(0), max_shift=4, protocol='pad')
print(f'accuracy {accuracy:.3f}, shift consistency {same.value:.3f}')
