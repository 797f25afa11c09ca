"""Shift consistency (Zhang 2019): does the top-1 class stay when the image is moved?

Published figures cannot be compared without their protocol, so each has a name here. A view of an
image is the image moved by an offset (dy, dx), content down and right by so many pixels:

- `pad`: moved on a background of zeros, after normalising. Equal to padding by s and taking two
  random crops, as training does.
- `crop`: the image is enlarged bilinearly to h + 2s and a window of the old size taken.
- `circular`: rolled; nothing leaves the image.

Consistency at s is the share of images whose two views, with independent uniform offsets in
[-s, s]^2, get the same top-1 class. The headline is `pad` with s = 4, on CIFAR. `consistency`
measures it of any network.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Shaped
from optax.losses import softmax_cross_entropy_with_integer_labels as cross_entropy

from gapjax.errors import UsageError, check_choice
from gapjax.tasks.images import check_images, check_shift

PROTOCOLS = ('pad', 'crop', 'circular')


class Consistency(NamedTuple):
  """How many of `count` images got one class twice: `agree`. Batches add up: sum(batches).value."""
  agree: ArrayLike
  count: ArrayLike

  @property
  def value(self) -> float:
    """The share, in [0, 1]."""
    return float(self.agree / self.count)

  def __add__(self, other):
    return Consistency(self.agree + other.agree, self.count + other.count)

  def __radd__(self, zero):
    return self  # sum() begins with 0


def consistency(predict: Callable, images: Float[ArrayLike, 'b h w c'],
                key: Shaped[Array, '*key'], max_shift: int = 4,
                protocol: str = 'pad') -> Consistency:
  """Shift consistency of a network: is the top-1 class the same for two random shifts of an image?

      found = sum(consistency(predict, images, jax.random.fold_in(key, i))
                  for i, images in enumerate(batches))
      print(found.value)

  Args:
    predict: images (b, h, w, c) -> logits (b, k), called twice; jit it. Any framework's.
    images: (b, h, w, c), normalised, so that the zeros that fill the border are the mean colour.
    key: one key; another for every batch.
    max_shift: s, pixels; both shifts of an image are uniform in [-s, s]^2.
    protocol: 'pad', 'crop' or 'circular', as above.

  Returns:
    Consistency(agree, count): integers. Logits that are NaN agree with nothing.

  Raises:
    UsageError: `images` or what `predict` returns has another shape, the shift does not fit the
      images, or there is no such protocol.
  """
  check_choice(protocol, PROTOCOLS, what='protocol')
  check_images(images)
  b, h, w, _ = jnp.shape(images)
  check_shift('max_shift', max_shift, h, w)
  offsets = jax.random.randint(key, (b, 2, 2), -max_shift, max_shift + 1)
  views = _views(images, offsets, protocol=PROTOCOLS.index(protocol), max_shift=max_shift)
  logits = [jnp.asarray(predict(view)) for view in (views[:b], views[b:])]
  if any(x.ndim != 2 or len(x) != b for x in logits):
    raise UsageError(f'`predict` maps images {views[:b].shape} to {logits[0].shape}; it should '
                     'return logits (b, k)')
  first, second = (jnp.where(jnp.isnan(x).any(1), -1 - i, x.argmax(1))
                   for i, x in enumerate(logits))
  return Consistency((first == second).sum(dtype=jnp.int32), jnp.int32(b))


def shifted_views(images: jax.Array, offsets: jax.Array, *, protocol: jax.Array,
                  max_shift: jax.Array) -> jax.Array:
  """Moves every image by each of its offsets.

  Args:
    images: (b, h, w, c), normalised.
    offsets: (b, v, 2) integers, (dy, dx) of each view, in [-max_shift, max_shift].
    protocol: (), an index into PROTOCOLS.
    max_shift: (), s, which under `crop` decides by how much the image is enlarged.

  Returns:
    (v * b, h, w, c), all first views before all second ones.
  """
  views = jax.vmap(lambda offset: lax.switch(
    protocol, (_pad, _crop, _roll), images, offset, max_shift), 1)(offsets)  # (v, b, h, w, c)
  return views.reshape(-1, *images.shape[1:])


_views = jax.jit(shifted_views)


def _pad(images, offsets, _):
  h, w, _ = images.shape[1:]
  padded = jnp.pad(images, ((0, 0), (h, h), (w, w), (0, 0)))  # any offset up to the image's size

  def move(image, offset):
    y, x = h - offset[0], w - offset[1]
    return lax.dynamic_slice(image, (y, x, jnp.zeros_like(y)), images.shape[1:])

  return jax.vmap(move)(padded, offsets)


def _crop(images, offsets, max_shift):
  h, w, _ = images.shape[1:]
  sizes = jnp.array([h, w])
  scale = (sizes + 2 * max_shift) / sizes

  def move(image, offset):
    # The enlarged image's pixel max_shift - offset becomes the first of the window.
    return jax.image.scale_and_translate(image, image.shape, (0, 1), scale.astype(image.dtype),
                                         (offset - max_shift).astype(image.dtype), 'linear')

  return jax.vmap(move)(images, offsets)


def _roll(images, offsets, _):
  return jax.vmap(lambda image, offset: jnp.roll(image, offset, (0, 1)))(images, offsets)


def counts(logits: jax.Array, features: jax.Array, labels: jax.Array, batch, *, centre: jax.Array,
           num_cells: int) -> dict[str, jax.Array]:
  """Sums over a batch of v views of b images, which add up over batches and devices.

  Args:
    logits, features: (v * b, k) and (v * b, c), in the order of shifted_views.
    labels: (b,).
    batch: 'mask' (b,), false for padding; 'cell' (b,), the cell of the accuracy map that the first
      view counts for.
    centre: (c,), near the features' mean; the sums are taken of deviations from it, so that their
      variance does not come out of a cancellation.
    num_cells: cells of the map.

  Returns:
    'count' and 'correct' by cell, (num_cells,) integers, of the first views; 'agree' (), of the
    first two; 'loss' (), summed over the first views; 'distance' (), summed squares of the first
    two views' difference, over images and channels; 'deviation' and 'square', (c,) sums over all
    views.
  """
  mask = batch['mask']
  views = logits.shape[0] // mask.shape[0]
  z = features.reshape(views, *mask.shape, -1) - centre  # (v, b, c)
  classes = logits.argmax(-1).reshape(views, *mask.shape)
  first, last = 0, min(1, views - 1)  # a single view agrees with itself
  here = jax.nn.one_hot(batch['cell'], num_cells, dtype=jnp.int32) * mask[:, None]  # (b, cells)
  z = jnp.where(mask[:, None], z, 0)
  loss = cross_entropy(logits[:len(mask)], labels)
  return {'count': here.sum(0), 'correct': (classes[first] == labels).astype(jnp.int32) @ here,
          'agree': ((classes[first] == classes[last]) & mask).sum(dtype=jnp.int32),
          'loss': jnp.where(mask, loss, 0).sum(),
          'distance': jnp.square(z[first] - z[last]).sum(),
          'deviation': z.sum((0, 1)), 'square': jnp.square(z).sum((0, 1))}
