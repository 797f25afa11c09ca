"""Ranks channels by the position they encode (section 5 of the paper).

Let z = GAP(f(x)) for a feature map f of an image x, and z' = GAP(f(mirrored x)). A channel that
does not care where things are has z = z'. *Overall*, channels are ranked by the mean |z - z'| over
a set of images; for a *region* by the signed mean z - z' over images whose object of interest
stands in that region only. Works on any network and any images:

    from gapjax import rank
    from gapjax.neurons.rank import choose, save
    features = jax.jit(lambda images: my_network(images))      # (b, h, w, 3) -> (b, h', w', c)
    overall = rank(features, images)                           # images: any iterable
    at_left = choose(scenes, region='left', classes=[24])      # scenes: dicts with 'label'
    left = rank(features, (scenes[i]['image'] for i in at_left), region='left')
    save('left.json', left=left)                               # the authors' format
"""

import json
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from gapjax import paths
from gapjax.errors import UsageError, check_choice, nearest
from gapjax.models.layers import global_average_pool
from gapjax.neurons.network import maps_of
from gapjax.tasks import segmentation

# name -> the axis of (b, h, w, 3) that the mirror reverses
AXES = {'horizontal': 2, 'vertical': 1}
BATCH = 64  # images of one array that go through a network together


def rank(features: Callable, images: Iterable, *,
         region: str | Sequence[float] | None = None) -> Int[np.ndarray, ' c']:
  """The channels (c,), first the one that a mirror changes most (section 5); by region, if one is
  given.

  Overall by the mean over images of |z - z'|, by region by the signed mean (`overall`,
  `by_region`): what yardstick.py measures the worth of.

  Args:
    features: images (b, h, w, c) -> feature maps (b, h', w', c'), or their averages (b, c'), as in
      testing, of any framework.
    images: one array (n, h, w, c), or any iterable of images (h, w, c) or batches (b, h, w, c), as
      `features` takes them.
    region: 'left', 'right', 'top', ..., or (top, left, bottom, right) in fractions of the image;
      the images are then those whose object stands there only (`choose`).

  Raises:
    UsageError: there is no image, an image or a map has other axes, a value is not finite, or the
      region is unknown or centred.
  """
  return order(overall(features, images) if region is None
               else by_region(features, images, region=region))


def differences(features: Callable, images: Iterable, *, axis: str = 'horizontal') -> Iterator:
  """z - z' of every image.

  Args:
    features: images (b, h, w, 3) -> feature maps (b, h', w', c), or their averages (b, c). What jax
      multiplies in it in float32 is not rounded to a GPU's or TPU's coarser default; a network
      whose dtype is bfloat16 computes in bfloat16.
    images: one array (n, h, w, c), taken BATCH at a time, or any iterable of images (h, w, c) or
      batches (b, h, w, c), as `features` takes them. Every new shape makes a jitted `features`
      compile anew.
    axis: the mirror, 'horizontal' (left to right) or 'vertical' (top to bottom).

  Yields:
    (b, c), b = 1 for a single image: a difference in float64 of what `features` gives, averaged in
    float32.

  Raises:
    UsageError: an image or a feature map has another number of axes, or there is no such mirror.
  """
  check_choice(axis, AXES, what='mirror')
  return changes(features, images, change=lambda batch: _mirrored(batch, AXES[axis]))


def _mirrored(batch, axis):
  """The batch reversed, of its own kind: torch.from_numpy takes no array of jax's, and none that
  runs backwards; and jax makes float64 float32."""
  if isinstance(batch, jax.Array):
    return jnp.flip(batch, axis)
  return np.ascontiguousarray(np.flip(batch, axis))


def changes(features: Callable, images: Iterable, *, change: Callable) -> Iterator:
  """z less z of the changed image, of every image; `change` maps batches (b, h, w, 3) to such.

  The other arguments, what it yields and what it raises: as `differences`.
  """
  for batch in _batches(images):
    yield _average(features, batch) - _average(features, change(batch))


def _batches(images):
  """Batches (b, h, w, c) of one array, or of an iterable of images or batches."""
  if isinstance(images, Mapping):
    raise UsageError("images are a dict; give them alone, such as batch['images']")
  if getattr(images, 'ndim', None) == 4:
    return (_batch(images[i:i + BATCH]) for i in range(0, len(images), BATCH))
  return map(_batch, images)


def _batch(images):
  if isinstance(images, tuple | list | Mapping):
    raise UsageError(f'a batch is a {type(images).__name__}; give its images alone, such as '
                     "(batch['images'] for batch in batches)")
  images = images if isinstance(images, jax.Array) else np.asarray(images)
  images = images[None] if images.ndim == 3 else images
  if images.ndim != 4:
    raise UsageError(f'images have shape {images.shape}; pass images (h, w, c) or batches '
                     '(b, h, w, c)')
  return images


def _average(features, images):
  with jax.default_matmul_precision('highest'):  # z - z' is a small difference of large numbers
    maps = maps_of(features, images)
  return np.asarray(maps if maps.ndim == 2 else global_average_pool(maps), np.float64)


def overall(features: Callable, images: Iterable, *,
            axis: str = 'horizontal') -> Float[np.ndarray, ' c']:
  """The mean of |z - z'| over all images, (c,): how much position each channel encodes.

  Arguments as for `differences`. Raises UsageError when there is no image.
  """
  return _mean(np.abs(d) for d in differences(features, images, axis=axis))


def by_region(features: Callable, images: Iterable, *,
              region: str | Sequence[float]) -> Float[np.ndarray, ' c']:
  """The signed mean of z - z' over the region's images, (c,): large where a channel is high when
  the object is there, and low when it is mirrored away.

  Args:
    features: as for `differences`.
    images: those with the object of interest in the region only (`choose`).
    region: a name or rectangle as `segmentation.region` reads it; it decides the mirror alone.

  Raises:
    UsageError: there is no image, or the region is centred (`mirror_axis`).
  """
  return _mean(differences(features, images, axis=mirror_axis(region)))


def mean_activations(features: Callable, images: Iterable) -> Float[np.ndarray, 'n c']:
  """z of all images, (n, c) float64, for the picture of activations.

  Arguments as for `differences`. Raises UsageError when there is no image.
  """
  activations = [_average(features, batch) for batch in _batches(images)]
  if not activations:
    raise UsageError('there is no image to average channels over; pass at least one')
  return np.concatenate(activations)


def _mean(parts):
  total, count = 0, 0
  for part in parts:
    total, count = total + part.sum(0), count + len(part)
  if not count:
    raise UsageError('there is no image to rank channels by; pass at least one')
  return total / count


def mirror_axis(rectangle: str | Sequence[float]) -> str:
  """The mirror that moves the rectangle's centre furthest: 'horizontal' or 'vertical'.

  rectangle: a name or (top, left, bottom, right) in fractions of the image. Equal moves, as for a
  quarter of the image, are 'horizontal', the mirror of the paper. Raises UsageError for a centred
  rectangle, which no mirror moves.
  """
  top, left, bottom, right = segmentation.region(rectangle)
  down, across = abs(1 - top - bottom), abs(1 - left - right)  # how far each moves the centre
  if max(down, across) < 1e-9:
    raise UsageError(f'region `{rectangle}` is centred: no mirror moves it, so nothing can be '
                     'ranked by it; use one that is off the centre, such as left or 0,0.5,1,1')
  return 'vertical' if down > across + 1e-9 else 'horizontal'


def order(scores) -> Int[np.ndarray, ' c']:
  """Channels (c,) by score, largest first; equal scores in the channels' own order.

  Raises UsageError unless scores are (c,) and finite.
  """
  scores = np.asarray(scores, np.float64)
  if scores.ndim != 1 or not np.isfinite(scores).all():
    raise UsageError(f'scores {scores.shape} must be (c,) and finite, and those of channels '
                     f'{np.flatnonzero(~np.isfinite(scores))[:5].tolist()} are not; rank a '
                     'checkpoint that did not diverge')
  return np.argsort(-scores, kind='stable')


def correlation(a, b) -> float:
  """Pearson's of two rows of scores (c,), from -1 to 1; 0 where one of them is constant."""
  a, b = (np.asarray(x, np.float64) - np.mean(x) for x in (a, b))
  norm = np.linalg.norm(a) * np.linalg.norm(b)
  return float(a @ b / norm) if norm else 0.0


# --- a region's images -----------------------------------------------------------------------


def choose(scenes: Iterable[Mapping], *, region: str | Sequence[float], classes: Sequence[int],
           least_area: float = 0.005, purity: float = 0.9, limit: int | None = None) -> list[int]:
  """The scenes whose object of interest stands in a region only, by their masks.

  Args:
    scenes: any iterable of dicts with 'label' (h, w) integers; 'size' (2,), if there, is the
      image's own height and width in the top left corner of a larger array.
    region: a name or rectangle as `segmentation.region` reads it.
    classes: the object of interest is every pixel with one of these labels.
    least_area: how large it must be inside the region, as a fraction of the image.
    purity: how much of it must be inside, as a fraction of the object; 1 is all of it.
    limit: stop after so many; None is no limit.

  Returns:
    Indices into `scenes`, ascending.

  Raises:
    UsageError: a setting is out of range, a mask has other axes, or no scene qualifies.
  """
  rectangle = segmentation.region(region)
  numbers = np.asarray(classes)
  if numbers.ndim != 1 or (numbers.size and numbers.dtype.kind not in 'iu'):
    raise UsageError(f'classes={classes!r}: give numbers of classes in a list, such as [24, 25]')
  classes = numbers.tolist()
  if not classes:
    raise UsageError('there is no class to choose images by; name at least one, such as 24')
  if not 0 <= least_area <= 1 or not 0 < purity <= 1:
    raise UsageError(f'least_area {least_area} and purity {purity} are fractions; use 0 <= '
                     'least_area <= 1 and 0 < purity <= 1')
  if limit is not None and limit < 1:
    raise UsageError(f'limit {limit} leaves no image; use 1 or more, or None for all')
  chosen, seen = [], 0
  for index, scene in enumerate(scenes):
    seen += 1
    within, everywhere, area = _object(scene, rectangle, classes)
    if within and within >= purity * everywhere and within >= least_area * area:
      chosen.append(index)
      if len(chosen) == limit:
        break
  if not chosen:
    raise UsageError(f'none of {seen} images has classes {classes} in region `{region}` only; '
                     f'lower least_area ({least_area:g}) or purity ({purity:g}), or name other '
                     'classes')
  return chosen


def _object(scene, rectangle, classes):
  """The object's pixels inside the rectangle and everywhere, and the image's pixels."""
  label = np.asarray(scene['label'])
  if label.ndim != 2:
    raise UsageError(f'masks are (h, w), a class number a pixel, not {label.shape}')
  size = np.asarray(scene.get('size', label.shape))
  whole = np.asarray(segmentation.inside((0, 0, 1, 1), size[None], label.shape))[0]
  mask = np.isin(label, classes) & whole
  here = np.asarray(segmentation.inside(rectangle, size[None], label.shape))[0]
  return int((mask & here).sum()), int(mask.sum()), int(size.prod())


def with_ids(scenes: Iterable[Mapping], ids: Sequence) -> list[int]:
  """Indices of the scenes whose 'id' is in `ids`, in the order of `ids`.

  An id may be the name of Cityscapes' file, as in the authors' list: ID_leftImg8bit.

  Raises UsageError on an id that no scene has, on one that is there twice, or on none.
  """
  if not len(ids):
    raise UsageError('the list of ids is empty; name at least one image')
  places, found = {}, {}
  for index, scene in enumerate(scenes):
    places.setdefault(str(scene['id']), index)
  for name in (str(one).removesuffix('_leftImg8bit') for one in ids):
    if name not in places:
      raise UsageError(f'no image has the id `{name}`{nearest(name, places)}; ids look like '
                       f'`{next(iter(places), "")}`')
    if name in found:
      raise UsageError(f'the list of ids names `{name}` twice; an image counts once, so name it '
                       'once')
    found[name] = places[name]
  return [*found.values()]


# --- the authors' JSON -----------------------------------------------------------------------


def save(path, **orders) -> None:
  """Writes orders as the authors' code does: {"overall": [channel, ...]} on one line.

  save('left.json', left=channels) is one of their files; several orders may share one.
  """
  lists = {name: [int(c) for c in channels] for name, channels in orders.items()}
  paths.write_bytes(path, json.dumps(lists).encode())


def load(path, *, num_channels: int, called: str | None = None) -> dict[str, np.ndarray]:
  """Reads orders, {name: (n,) channels}, from a file in the authors' format.

  called: what the file's one list is called, whatever its key: the authors' file of the right has
  the key "left".

  Raises UsageError naming the file unless each is a list of distinct channels in [0, num_channels),
  and where one list's key and the file's name disagree about its side.
  """
  orders = paths.read_json(path)
  if not orders:
    raise UsageError(f'{path} holds no list of channels; it should look like '
                     '{"overall": [5, 0, 3]}')
  if called is not None:
    if len(orders) > 1:
      raise UsageError(f'{path} holds {len(orders)} lists ({", ".join(orders)}), which cannot all '
                       f'be `{called}`; leave the name out')
    orders = {called: next(iter(orders.values()))}
  elif len(orders) == 1:
    [key], words = orders, re.findall('[a-z]+', pathlib.PurePath(path).stem.lower())
    sides = [side for side in ('left', 'right') if side in words]
    if key in ('left', 'right') and sides and key not in sides:
      raise UsageError(f'{path} is named after the {sides[0]}, and its list is `{key}`; say which '
                       f'it is: --ranking={sides[0]}={path}, or --ranking={key}={path} (called= of '
                       'rank.load)')
  for name, channels in orders.items():
    if not isinstance(channels, list) or any(type(c) is not int for c in channels) or not channels:
      raise UsageError(f'{path}: `{name}` is not a list of channel numbers; it should look like '
                       '{"overall": [5, 0, 3]}')
    outside = next((c for c in channels if not 0 <= c < num_channels), None)
    if outside is not None:
      raise UsageError(f'{path}: `{name}` names channel {outside}, but the network has '
                       f'{num_channels}; rank the channels of this network')
    if len(set(channels)) < len(channels):
      twice = next(c for c in channels if channels.count(c) > 1)
      raise UsageError(f'{path}: `{name}` names channel {twice} twice; rank the channels again')
  return {name: np.array(channels, np.int64) for name, channels in orders.items()}
