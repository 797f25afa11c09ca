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
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Shaped
from optax.losses import softmax_cross_entropy_with_integer_labels as cross_entropy

from gapjax.errors import UsageError, check_choice
from gapjax.tasks.images import (
  as_array,
  as_keys,
  check_images,
  check_shift,
  index_batches,
)
from gapjax.tasks.protocol import Evaluation, evaluated

PROTOCOLS = ('pad', 'crop', 'circular')
# s of protocol `circular`, as Chaman & Dokmanic 2021 measure APS: rolls of up to 3 pixels.
CIRCULAR_SHIFT = 3


def protocols(shift: int) -> dict[str, str]:
  """{metric: how it is measured}, for tables; shift: eval.shift."""
  return {'consistency': f'pad, s = {shift}', 'consistency_crop': f'crop, s = {shift}',
          'consistency_circular': f'circular, s = {CIRCULAR_SHIFT}'}


class Consistency(NamedTuple):
  """How many of `count` images got one class twice: `agree`. Batches add up: sum(batches).value."""
  agree: ArrayLike
  count: ArrayLike

  @property
  def value(self) -> float:
    """The share, in [0, 1]."""
    return float(self.agree / self.count)

  def __str__(self):
    return f'{self.value:.1%} of {self.count} images'

  def __add__(self, other):
    return Consistency(self.agree + other.agree, self.count + other.count)

  def __radd__(self, zero):
    return self  # sum() begins with 0


def consistency(predict: Callable, images: Float[ArrayLike, 'b h w c'],
                key: Shaped[Array, '*key'], max_shift: int = 4,
                protocol: str = 'pad') -> Consistency:
  """Shift consistency (Zhang 2019): is the top-1 class the same for two random shifts of an image?

      found = sum(consistency(predict, images, jax.random.fold_in(key, i))
                  for i, images in enumerate(batches))
      print(found.value)

  Args:
    predict: images (b, h, w, c) -> logits (b, k), called twice, as in testing; jit it. Of any
      framework: where `images` are NumPy's, it gets NumPy's, of their own dtype.
    images: (b, h, w, c) floats, normalised, so that the zeros that fill the border are the mean
      colour.
    key: one key; another for every batch.
    max_shift: s, pixels, below both sizes of the image; both shifts of an image are uniform in
      [-s, s]^2.
    protocol: 'pad', the image moved on zeros (it is what training's padding by s and random crops
      do); 'crop', a window of the image enlarged to h + 2s; or 'circular', rolled.

  Returns:
    A Consistency of integers. Logits that are NaN agree with nothing.

  Raises:
    UsageError: `images` or what `predict` returns has another shape or type, the shift does not fit
      the images, or there is no such protocol.
  """
  check_choice(protocol, PROTOCOLS, what='protocol')
  key = as_keys(key)
  if key.shape:
    raise UsageError(f'keys {key.shape} are several; give one, and another for every batch')
  images = images if isinstance(images, jax.Array) else np.asarray(images)
  check_images(images)
  if not jnp.issubdtype(images.dtype, jnp.floating):
    raise UsageError(f'images are {images.dtype}; give them normalised, as floats: what moves in '
                     'is zero, which should be the mean colour')
  b, h, w, _ = jnp.shape(images)
  check_shift('max_shift', max_shift, h, w)
  if not b:
    raise UsageError('there is no image to measure consistency by; pass at least one')
  offsets = jax.random.randint(key, (b, 2, 2), -max_shift, max_shift + 1)
  views = _views(images, offsets, protocol=PROTOCOLS.index(protocol), max_shift=max_shift)
  if not isinstance(images, jax.Array):
    views = np.asarray(views).astype(images.dtype)
  logits = [as_array(predict(view), of='predict', wanted='logits (b, k)')
            for view in (views[:b], views[b:])]
  if any(x.ndim != 2 or len(x) != b for x in logits):
    raise UsageError(f'`predict` maps images {views[:b].shape} to {logits[0].shape}; it should '
                     'return logits (b, k)')
  if logits[0].shape[1] < 2:
    raise UsageError('`predict` returns one column of logits or none, so one class alone; '
                     'return two classes, such as np.concatenate([-x, x], 1) of logits x (b, 1)')
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
  exact = jnp.promote_types(images.dtype, jnp.float32)  # bfloat16 counts to 256

  def move(image, offset):
    # The enlarged image's pixel max_shift - offset becomes the first of the window.
    return jax.image.scale_and_translate(image, image.shape, (0, 1), scale.astype(exact),
                                         (offset - max_shift).astype(exact), 'linear')

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


class ShiftEvaluation(Evaluation):
  """Top-1 accuracy and shift consistency; see protocol.Evaluation."""

  @property
  def protocol(self) -> str:
    """Of the headline, for tables."""
    return protocols(self.config.eval.shift)['consistency']

  def during(self, state) -> dict:
    """Top-1 of the images as they are, and the headline consistency."""
    n = len(self.test_set)
    with evaluated(2 * n, progress=False) as bar:
      return self._headline(state, n, bar=bar)

  def final(self, state, *, progress=False, brief=False) -> dict:
    """The same and, unless `brief`, consistency by the other protocols and the curves and the map
    of _shifts."""
    if brief:
      return {**self.during(state), 'shifts': {}}
    n = len(self.test_set)
    few = min(self.config.eval.shift_images or n, n)
    cells = len(self.task.map_offsets) ** 2
    curves = len(PROTOCOLS) * self.config.eval.max_shift
    others = {'crop': self.config.eval.shift, 'circular': CIRCULAR_SHIFT}
    views = (1 + self.config.eval.pairs + len(others)) * n + few * (curves + cells)
    with evaluated(views, progress=progress) as bar:
      return {**self._headline(state, n, bar=bar), **{
        f'consistency_{protocol}': _agreement(self._pairs(state, n, protocol, s, bar=bar))
        for protocol, s in others.items()}, 'shifts': self._shifts(state, few, bar=bar)}

  def _headline(self, state, n: int, **rest) -> dict:
    still = self._moved(state, np.arange(n), np.zeros((n, 1, 2)), 'pad', 0, **rest)
    centre = still['deviation'] / n
    count = self.config.eval.pairs
    pairs = self._pairs(state, n, 'pad', self.config.eval.shift, count=count, centre=centre, **rest)
    # Variance of the moved images' features over images and views: their mean is near `centre`.
    views = 2 * count * n
    variance = pairs['square'] / views - np.square(pairs['deviation'] / views)  # (c,)
    distance = 2 * pairs['distance'] / (views * len(centre))
    return {'accuracy': float(still['correct'].sum() / still['count'].sum()),
            'loss': float(still['loss'] / still['count'].sum()),
            'consistency': _agreement(pairs),
            'feature_distance': float(distance / max(variance.mean(), np.finfo(np.float32).tiny))}

  def _shifts(self, state, few: int, **rest) -> dict:
    """On the first `few` test images: consistency by protocol for s = 1 .. eval.max_shift, and
    accuracy as a function of (dy, dx)."""
    curves = {protocol: [_agreement(self._pairs(state, few, protocol, s, **rest))
                         for s in range(1, self.config.eval.max_shift + 1)]
              for protocol in PROTOCOLS}
    offsets = np.array(self.task.map_offsets)
    side = len(offsets)
    cell, index = np.divmod(np.arange(side * side * few), few)
    moves = offsets[np.stack(np.divmod(cell, side), -1)]  # (side * side * few, 2): dy, dx
    totals = self._moved(state, index, moves[:, None], 'pad', 0, cell=cell, **rest)
    return {'protocols': curves, 'images': few, 'offsets': offsets.tolist(),
            'accuracy_map': (totals['correct'] / totals['count']).reshape(side, side).tolist()}

  def _pairs(self, state, few, protocol, s, *, count=1, **rest):
    """Counts of two views of each of the first `few` images, `count` times, with offsets that
    depend on (seed, protocol, s, image) alone; from the second time on, on how many there are, too.
    """
    draw = np.random.default_rng((self.config.seed, PROTOCOLS.index(protocol), s))
    offsets = draw.integers(-s, s, endpoint=True, size=(count, len(self.test_set), 2, 2))
    return self._moved(state, np.tile(np.arange(few), count), np.concatenate(offsets[:, :few]),
                       protocol, s, **rest)

  def _moved(self, state, index, offset, protocol, s, *, centre=None, cell=None, **rest):
    """Counts of the images index (n,), each moved by offset (n, v, 2)."""
    dtype, width = self.task.dtype, self.counter.num_channels
    cells = np.zeros(len(self.task.map_offsets) ** 2, np.int32)
    zero, channels = np.zeros((), dtype), np.zeros(width, dtype)
    zeros = {'count': cells, 'correct': cells.copy(), 'agree': np.zeros((), np.int32),
             'loss': zero, 'distance': zero.copy(), 'deviation': channels,
             'square': channels.copy()}
    common = {'protocol': np.int32(PROTOCOLS.index(protocol)), 'max_shift': np.int32(s),
              'centre': np.zeros(width, dtype) if centre is None else centre.astype(dtype)}
    examples = {'index': index, 'offset': offset,
                'cell': np.zeros(len(index), int) if cell is None else cell}
    return self.counter.count(state, zeros, index_batches(examples, self.counter.batch_size),
                              common=common, **rest)

  def summary(self, final: dict, evaluations: list[dict]) -> dict:
    best = max(evaluations, key=lambda line: line['accuracy'])
    return {'final': _named(final),
            'best': {'image_accuracy_best': best['accuracy'], 'step': best['step']},
            'shifts': {**final['shifts'], 'protocol': self.protocol}}

  def report(self, state) -> dict:
    """All metrics of a checkpoint."""
    final = self.final(state, progress=True)
    return {**_named(final), 'protocol': self.protocol, 'shifts': final['shifts']}


def _named(line):
  """The numbers of an evaluation by the names that summaries and tables give them."""
  names = {'accuracy': 'image_accuracy', **{name: name for name in (
    'consistency', 'consistency_crop', 'consistency_circular', 'feature_distance', 'loss')}}
  return {new: line[old] for old, new in names.items() if old in line}


def _agreement(pairs) -> float:
  """The share of images whose two views get the same class."""
  return float(pairs['agree'] / pairs['count'].sum())
