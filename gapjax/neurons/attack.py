"""Removes position channels from a network and measures what is lost (section 5 of the paper).

The channels of an order are zeroed, the first N of them for every N of a sweep, and the predictions
are counted: mIoU by region (`sweep`) or accuracy (`accuracy_sweep`). For any network:

    from gapjax import attack
    from gapjax.neurons.attack import random_orders
    from gapjax.neurons.sweeps import write_csv
    orders = {'overall': overall, 'left': left, 'right': right,    # from gapjax.rank, (c,) each
              'random': random_orders(2048, 5, seed=0)}            # five orders: mean and band
    result = attack(features, head, batches, orders=orders, counts=range(100, 2001, 100))
    write_csv('attack.csv', result)

One pass serves all N. Everything between the cut and the head's first BatchNorm is linear in the
channels: an order is split into blocks between consecutive N, each block is convolved once, and
their running sums, from the last block backwards, are the convolutions for every N. The features
and the whole network's convolutions are shared by all orders; only the rest runs for every N.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from gapjax.errors import UsageError
from gapjax.neurons.network import Network, maps_of
from gapjax.neurons.sweeps import CLEAN, Sweep
from gapjax.tasks import segmentation
from gapjax.tasks.images import as_array

ATTACK_REGIONS = ('all', 'left', 'right', 'center')
# A block's convolution costs about as much as this many channels more than it has: what its result
# costs to write and to add.
OVERHEAD = 16


def attack(features: Callable, head: Callable, batches: Iterable[Mapping], *,
           orders: Mapping[str, Any], counts: Sequence[int], layer: Callable | None = None,
           regions: Sequence[str] = ATTACK_REGIONS) -> Sweep:
  """Removes channels between two functions of arrays, and measures what is lost (section 5).

  Both are called as they are, so that they may be of any framework; jit those that are jax's. What
  jax multiplies in them in float32 is not rounded to a GPU's or TPU's coarser default; a network
  whose dtype is bfloat16 computes in bfloat16.

  Args:
    features: images (b, h, w, c) -> maps (b, h', w', c') or (b, c'), whose channels are removed.
    head: maps -> logits: (b, h, w, K), of every pixel of labels (b, h, w), or (b, K) for labels
      (b,).
    batches: an iterable of dicts of 'images' (b, h, w, c) and 'labels', integers from 0; more keys
      as for `sweep` and `accuracy_sweep`.
    orders: {name: (n,) or (repeats, n) channels}, the first to be removed first.
    counts: N_1, ..., N_m, whole numbers: how many to remove.
    layer: makes one pass serve all counts, where the head begins with something linear: (maps of
      some channels (b, h', w', k), which they are (k,)) -> what they add to its output, biases left
      out. `head` is then what follows: that output -> logits.
    regions: where mIoU is measured; for labels (b, h, w) alone.

  Returns:
    A Sweep whose metrics are 'miou' and 'miou_REGION', or 'accuracy': fractions by order,
    (repeats, m + 1), the first of them without removal (N = 0).

  Raises:
    UsageError: an order, a count or a region is no good, shapes do not fit, there is no batch, or
      `layer` is not linear.
  """
  regions = (regions,) if isinstance(regions, str) else tuple(regions)
  if not regions:
    raise UsageError('there is no region to measure mIoU in; name some, such as all, left')
  for name in regions:
    segmentation.region(name)

  def encode(_, images):
    return {'maps': maps_of(features, images)}

  def logits(x):
    return as_array(head(x), of='head', wanted='logits')

  def branches(_, maps, channels):  # of one array or several
    return jax.tree.map(functools.partial(as_array, of='layer', wanted='arrays'),
                        layer(maps, channels), is_leaf=lambda x: x is None)

  after = dict(head=lambda _, found: logits(found['maps'])) if layer is None else dict(
    branches=branches, rest=lambda _, output, found: logits(output))
  network = Network(None, encode, stage='maps', compiled=False, **after)
  batches = iter([batches] if isinstance(batches, Mapping) else batches)
  first = [*map(_checked, itertools.islice(batches, 1))]
  how = dict(batches=itertools.chain(first, batches), orders=orders, counts=counts)
  axes = {np.ndim(batch['labels']) for batch in first}
  if axes - {1, 3}:
    raise UsageError('labels are (b,), a class number an image, or (b, h, w), one a pixel, not '
                     f'{np.shape(first[0]["labels"])}')
  return accuracy_sweep(network, **how) if 1 in axes else sweep(network, regions=regions, **how)


# --- what is removed ---------------------------------------------------------------------------


def random_orders(num_channels: int, repeats: int, *,
                  seed: int) -> Int[np.ndarray, 'repeats channels']:
  """(repeats, num_channels): permutations of the channels, the first ones the same for any
  `repeats`. Raises UsageError unless repeats >= 1."""
  if repeats < 1:
    raise UsageError(f'{repeats} random orders are no baseline; use 1 or more')
  return np.stack([np.random.default_rng([seed, i]).permutation(num_channels)
                   for i in range(repeats)])


def check_orders(orders: Mapping[str, Any], counts: Iterable[int], *,
                 num_channels: int) -> tuple[dict[str, np.ndarray], tuple[int, ...]]:
  """Orders as {name: (repeats, n)} and counts ascending, without 0 and doubles.

  Args:
    orders: {name: (n,) or (repeats, n)} distinct channels, the first to be removed first.
    counts: how many to remove.

  Raises:
    UsageError: there is no count or order; a count is negative or beyond an order's end; an order
      is none of the network's, or is called 'clean'.
  """
  try:
    counts = [*counts]
  except TypeError:
    counts = [counts]
  if any(n != int(n) for n in counts):
    raise UsageError(f'counts {counts} are numbers of channels to remove, no fractions; use whole '
                     'ones such as 100, 200, 300')
  counts = tuple(sorted({int(n) for n in counts} - {0}))
  if not counts or counts[0] < 0:
    raise UsageError('counts must be numbers of channels to remove, such as 100, 200, 300, not '
                     f'{list(counts)}')
  if not isinstance(orders, Mapping):
    raise UsageError(f'orders is a {type(orders).__name__}; give a dict of channels by name, such '
                     "as {'overall': rank(features, images)}")
  if not orders or CLEAN in orders:
    raise UsageError(f'name the orders of channels, such as overall, and none of them `{CLEAN}`, '
                     'which is N = 0')
  checked = {}
  for name, channels in orders.items():
    channels = np.atleast_2d(np.asarray(channels))
    if channels.shape[1] < counts[-1]:
      raise UsageError(f'order `{name}` has {channels.shape[1]} channels, fewer than the '
                       f'{counts[-1]} to be removed; remove at most {channels.shape[1]}')
    if channels.dtype.kind in 'fb':
      raise UsageError(f'order `{name}` holds {channels.dtype}, no numbers of channels; of scores '
                       'take gapjax.neurons.rank.order(scores)')
    for row in channels:
      if (row.dtype.kind not in 'iu' or len(np.unique(row)) < len(row) or row.min() < 0
          or row.max() >= num_channels):
        raise UsageError(f'order `{name}` is no list of distinct channels in '
                         f'[0, {num_channels}), which the network has; rank this network')
    checked[name] = channels.astype(np.int64)
  return checked, counts


# --- the sweep -----------------------------------------------------------------------------------


def predictions(network: Network, features: dict, *, orders: Mapping[str, Any],
                counts: Sequence[int]) -> Iterator:
  """The classes predicted after removing the first N channels, for every order and N.

  Args:
    network: cut where channels are removed. With `branches` all N take one pass; with `head` alone
      everything behind the cut is run again for every N, the slow way to the same numbers.
    features: network.features of a batch.
    orders, counts: as `check_orders` takes them.

  Yields:
    (name, repeat, N), (b, ...) integers on the device; first ('clean', 0, 0) and each order's N in
    falling order.

  Raises:
    UsageError: what `check_orders` raises, or the network's branches are not linear.
  """
  orders, counts = check_orders(orders, counts,
                                num_channels=features[network.stage].shape[-1])
  rows = [(name, i, row) for name, rows in orders.items() for i, row in enumerate(rows)]
  if network.branches is None:
    yield (CLEAN, 0, 0), network.without(features)
    for name, i, row in rows:
      for count in reversed(counts):
        yield (name, i, count), network.without(features, row[:count])
    return
  channels = features[network.stage].shape[-1]
  whole = network.contribution(features, np.arange(channels), channels)
  yield (CLEAN, 0, 0), network.complete(features, whole)
  for k, (name, i, row) in enumerate(rows):
    # What N = 0 leaves is `whole` already: the first order computes it again, as a check.
    for count, branches in remaining(network, features, row, counts=counts if k else (0, *counts)):
      if count:
        yield (name, i, count), network.complete(features, branches)
      else:
        _check_linear(branches, whole)


def remaining(network: Network, features: dict, channels: np.ndarray, *,
              counts: Sequence[int]) -> Iterator:
  """The branches that are left after removing the first N of `channels`, each block convolved once.

  counts: ascending; 0 may be one. Yields (N, branches), N in falling order, so that one sum is held
  at a time. Sums hold what is left alone: taking the removed from the whole would cancel.
  """
  total = features[network.stage].shape[-1]
  removed = channels[:counts[-1]]
  ordered = np.concatenate([removed, np.setdiff1d(np.arange(total), removed)])
  # Sizes are those with 0 left out, so that the program is the same with it and without.
  size = piece_size(np.diff([*(n for n in counts if n), total]))
  branches = None
  for end, start in itertools.pairwise((total, *reversed(counts))):
    for at in range(start, max(end, start + 1), size):  # an empty block contributes zeros
      part = network.contribution(features, ordered[at:min(at + size, end)], size)
      branches = part if branches is None else jax.tree.map(jnp.add, branches, part)
    yield start, branches


def _check_linear(total, whole):
  """Raises UsageError unless the blocks' sum is the whole."""
  for a, b in zip(jax.tree.leaves(total), jax.tree.leaves(whole), strict=True):
    if not np.isfinite(scale := float(jnp.abs(b).max())):
      raise UsageError('the network computes infinities or NaN; attack a checkpoint that did not '
                       'diverge')
    eps = jnp.finfo(b.dtype).eps if jnp.issubdtype(b.dtype, jnp.floating) else 0
    if not float(jnp.abs(a - b).max()) <= max(1e-3, 8 * float(eps)) * scale:  # bfloat16: 6%
      raise UsageError('`layer` (`branches` of a Network) is not a sum over channels: blocks of '
                       'channels do not add up to the whole; leave biases and activations to '
                       '`head` (`rest`), or leave it out')


def piece_size(sizes: Sequence[int]) -> int:
  """How many channels to convolve at a time, for blocks of these sizes at the least cost.

  One size, so that one program is compiled: a larger block takes several pieces, a smaller one is
  filled up. Equal blocks are their own size.
  """
  sizes = [size for size in sizes if size]
  if not sizes:
    return 1  # everything is removed at once: an empty block alone
  candidates = sorted({-(-size // parts) for size in sizes for parts in range(1, 65)})
  return int(min(candidates, key=lambda c: sum(-(-size // c) for size in sizes) * (c + OVERHEAD)))


def sweep(network: Network, batches: Iterable[Mapping], *, orders: Mapping[str, Any],
          counts: Sequence[int], regions: Sequence[str] = ATTACK_REGIONS) -> Sweep:
  """mIoU of a segmentation network after removing channels, by region.

  Args:
    network: cut where channels are removed; its logits are (b, h, w, K).
    batches: dicts of 'images' (b, h, w, 3) as the network takes them and 'labels' (b, h, w), void
      outside [0, K); 'size' (b, 2), if there, is each image's own height and width in the top left
      corner, which regions are fractions of. Every new shape compiles anew.
    orders: {name: (n,) or (repeats, n)} channels, the first to be removed first.
    counts: N_1, ..., N_m: how many to remove.
    regions: names of segmentation.REGIONS, or rectangles 'TOP,LEFT,BOTTOM,RIGHT' in fractions.

  Returns:
    A Sweep with the metrics 'miou' (region 'all') and 'miou_REGION'.

  Raises:
    UsageError: an order, a count, a region or a batch is no good, or there is no batch.
  """
  rectangles = tuple(segmentation.region(name) for name in regions)
  names = ['miou' if name == 'all' else f'miou_{name}' for name in regions]

  def confusions_of(batch, features):
    labels = jnp.asarray(batch['labels'])
    if labels.ndim != 3:
      raise UsageError(f'labels are (b, h, w), a class number a pixel, not {labels.shape}')
    sizes = jnp.asarray(batch.get('size', [labels.shape[1:]] * len(labels)))
    if sizes.shape != (len(labels), 2):
      raise UsageError(f'size is {sizes.shape}; give (b, 2), height and width of each image')
    classes = network.num_classes(features)
    if classes < 2:
      raise UsageError('logits of one class are right whatever is removed; give (b, h, w, K)')
    regional = _by_region(labels, sizes, rectangles)
    return lambda predicted: _confusions(predicted, regional, classes)

  counts, matrices = _sums(network, batches, confusions_of, orders=orders, counts=counts,
                           advice='resize its logits to the labels')
  metrics = {metric: {name: np.array([[segmentation.iou(m[r])[1] for m in row] for row in rows])
                      for name, rows in matrices.items()}
             for r, metric in enumerate(names)}
  return Sweep(counts, metrics, matrices)


# Regions are cut once a batch, counts are made for every N.
_by_region = jax.jit(segmentation.by_region, static_argnums=2)
_confusions = jax.jit(segmentation.confusions, static_argnums=2)


def accuracy_sweep(network: Network, batches: Iterable[Mapping], *, orders: Mapping[str, Any],
                   counts: Sequence[int], metric: str = 'accuracy') -> Sweep:
  """Top-1 accuracy of a classifier after removing channels.

  To see two networks side by side: Sweep(a.counts, {**a.metrics, **b.metrics}).

  Args:
    network: cut where channels are removed; its logits are (b, K).
    batches: dicts of 'images' (b, h, w, 3) as the network takes them, 'labels' (b,), and 'mask'
      (b,), if there, False where the batch is filled up.
    orders, counts: as for `sweep`.
    metric: its name, such as 'location_accuracy' or 'image_accuracy'.

  Returns:
    A Sweep with that metric.

  Raises:
    UsageError: an order or a count is no good, or there is no batch.
  """
  def hits_of(batch, features):
    labels = np.asarray(batch['labels'])
    mask = np.asarray(batch.get('mask', np.ones(labels.shape, bool)), bool)
    if mask.shape != labels.shape:
      raise UsageError(f'mask is {mask.shape}, and labels are {labels.shape}; give one an image')
    classes = network.num_classes(features)
    if ((labels < 0) | (labels >= classes))[mask].any():
      raise UsageError(f'labels go from {labels[mask].min()} to {labels[mask].max()}; the network '
                       f'has {classes} classes, counted from 0')
    return lambda predicted: (((np.asarray(predicted) == labels) & mask).sum(), mask.sum())

  counts, sums = _sums(network, batches, hits_of, orders=orders, counts=counts,
                       advice='it should return one row of logits an image')
  if not all(rows[..., 1].all() for rows in sums.values()):
    raise UsageError('there is no image to attack the network with: the batches are empty, or '
                     'their mask is False everywhere')
  return Sweep(counts, {metric: {name: rows[..., 0] / rows[..., 1] for name, rows in sums.items()}})


def _checked(batch):
  """The batch; UsageError where it is none."""
  if not isinstance(batch, Mapping) or not {'images', 'labels'} <= set(batch):
    raise UsageError("batches are dicts of 'images' (b, h, w, c) and 'labels' (b,) or (b, h, w), "
                     f'not {sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__}')
  labels = batch['labels']
  labels = labels if isinstance(labels, jax.Array) else np.asarray(labels)
  if not (jnp.issubdtype(labels.dtype, jnp.integer) or labels.dtype == bool):
    raise UsageError(f'labels are {labels.dtype}; give class numbers, integers')
  return batch


def _sums(network, batches, counter, *, orders, counts, advice):
  """Counts (0, ...) and {name: (repeats, counts, ...) int64}, sums over the batches.

  counter: (batch, features) -> a function of the predicted classes, the array that is summed.
  advice: on a network whose logits do not fit the labels.
  """
  tables = {}
  for number, batch in enumerate(batches):
    features = network.features(_checked(batch)['images'], number)
    count = counter(batch, features)
    for key, predicted in predictions(network, features, orders=orders, counts=counts):
      if predicted.shape != np.shape(batch['labels']):
        raise UsageError(f'the network predicts classes {predicted.shape} for labels '
                         f'{np.shape(batch["labels"])}; {advice}')
      tables[key] = tables.get(key, 0) + np.asarray(count(predicted), np.int64)
  if not tables:
    raise UsageError('there is no batch of images to attack the network with; pass at least one')
  clean = tables[CLEAN, 0, 0]
  counts = tuple(sorted({key[2] for key in tables}))
  repeats = {name: i + 1 for name, i, _ in tables if name != CLEAN}
  return counts, {name: np.stack([np.stack([clean, *(tables[name, i, n] for n in counts[1:])])
                                  for i in range(number)])
                  for name, number in repeats.items()}
