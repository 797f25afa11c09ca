"""AugShift, the pairwise-shift loss (section 4): two shifts of an image should pool to one vector.

The functions take arrays and work with any network. In a training step of one's own:

    pairs = crop_pairs(key, images, max_shift=4)                          # (2, b, h, w, c)
    logits, features = network(pairs.reshape(-1, *images.shape[1:]))      # one batch of both crops
    logits, features = (x.reshape(2, len(images), -1) for x in (logits, features))
    loss, parts = augshift_loss(logits, features, labels, weight=warm_up(step, 1.0, steps=500))

The paper gives the loss as a figure and no code; the weight and the range of the shift are not in
it.
"""

import jax
import jax.numpy as jnp
from jax import lax
from optax.losses import softmax_cross_entropy_with_integer_labels as cross_entropy

from gapjax.errors import UsageError


@jax.jit
def augshift_loss(logits: jax.Array, features: jax.Array, labels: jax.Array, *,
                  weight: float | jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Cross entropy of both crops plus weight * MSE of their pooled features.

  Args:
    logits: (2, b, k), of the two crops of each image by the same classifier.
    features: (2, b, c), their features after global average pooling by the same encoder.
    labels: (b,) integers in [0, k).
    weight: of the pairwise term, at least 0; 0 is the fair baseline that sees two crops too.

  Returns:
    The loss, a scalar: mean over b of the two cross entropies' sum, plus weight times the mean of
    (z1 - z2)^2 over b and c. And its parts, scalars: 'cross_entropy', 'distance' (that mean) and
    'relative_distance', the distance over the features' variance, since shrinking all features
    makes the distance small too.
  """
  entropy = cross_entropy(logits, jnp.broadcast_to(labels, logits.shape[:2])).mean(1).sum()
  distance = jnp.square(features[0] - features[1]).mean()
  spread = features.var((0, 1)).mean()  # over crops and images, then channels
  return entropy + weight * distance, {
    'cross_entropy': entropy, 'distance': distance,
    'relative_distance': distance / jnp.maximum(spread, jnp.finfo(features.dtype).tiny)}


def crop_pairs(key: jax.Array, images: jax.Array, *, max_shift: int) -> jax.Array:
  """Two shifts of each image, independent and uniform in [-max_shift, max_shift]^2, zero-filled.

  Args:
    key: one key (), or one an image (b,).
    images: (b, h, w, c), normalised, so that the filling is the mean colour.
    max_shift: pixels.

  Returns:
    (2, b, h, w, c).

  Raises:
    UsageError: max_shift is negative, or not smaller than the image.
  """
  b, h, w, _ = images.shape
  if not 0 <= max_shift < min(h, w):
    raise UsageError(f'a shift of {max_shift} pixels does not fit images of {h}x{w}; choose one '
                     f'from 0 to {min(h, w) - 1}')
  keys = jax.random.split(key, b) if key.ndim == 0 else key
  offsets = jax.vmap(lambda k: jax.random.randint(k, (2, 2), 0, 2 * max_shift + 1))(keys)
  padded = jnp.pad(images, ((0, 0), (max_shift, max_shift), (max_shift, max_shift), (0, 0)))

  def crop(image, offset):
    return lax.dynamic_slice(image, (offset[0], offset[1], 0), images.shape[1:])

  return jax.vmap(jax.vmap(crop), (None, 1))(padded, offsets)  # the pair is mapped outside


def warm_up(step: jax.Array | int, weight: float, *, steps: int) -> jax.Array:
  """The weight of the pairwise term, linear from 0 to `weight` in `steps` steps (0: at once)."""
  return weight * jnp.clip(step / steps, 0, 1) if steps else jnp.asarray(weight)
