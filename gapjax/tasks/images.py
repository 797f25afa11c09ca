"""What every task does to a batch of images on the device: normalise, flip."""

import jax
import jax.numpy as jnp

# ImageNet's mean and standard deviation, red green blue on [0, 1]: segmentation's normalisation.
IMAGENET = ((.485, .456, .406), (.229, .224, .225))


def normalise(images: jax.Array, *, mean, std, dtype) -> jax.Array:
  """uint8 (..., 3) -> (images / 255 - mean) / std in `dtype`; mean and std are (3,)."""
  return (images.astype(dtype) / 255 - jnp.asarray(mean, dtype)) / jnp.asarray(std, dtype)


def random_flips(keys: jax.Array, images: jax.Array) -> jax.Array:
  """Flips each of images (b, h, w, c) left to right with probability 1/2, by its own key (b,)."""
  flips = jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, 1)))(keys)
  return jnp.where(flips[:, None, None, None], images[:, :, ::-1], images)
