"""What tasks do alike: normalise and flip a batch, cut examples into batches."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from gapjax.errors import UsageError, first_line


def normalise(images: jax.Array, *, mean, std, dtype) -> jax.Array:
  """uint8 (..., 3) -> (images / 255 - mean) / std in `dtype`; mean and std are (3,)."""
  return (images.astype(dtype) / 255 - jnp.asarray(mean, dtype)) / jnp.asarray(std, dtype)


def random_flips(keys: jax.Array, images: jax.Array) -> jax.Array:
  """Flips each of images (b, h, w, c) left to right with probability 1/2, by its own key (b,)."""
  flips = jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, 1)))(keys)
  return jnp.where(flips[:, None, None, None], images[:, :, ::-1], images)


def check_images(images) -> None:
  """Raises UsageError unless images are (b, h, w, c); of (b, c, h, w), too."""
  if jnp.ndim(images) != 4:
    raise UsageError(f'images must be (b, h, w, c), not {jnp.shape(images)}')
  check_channels_last(images)


def check_channels_last(images) -> None:
  """Raises UsageError for images whose second axis is the one of colours."""
  shape = jnp.shape(images)
  if shape[1] in (1, 3) and shape[3] > 4:
    raise UsageError(f'images {shape} look like (b, c, h, w); give (b, h, w, c), such as '
                     'images.transpose(0, 2, 3, 1) of an array')


def as_keys(key) -> jax.Array:
  """A random key of jax's, or an array of them, of either kind: of the newer. Raises UsageError
  on anything else."""
  if not isinstance(key, jax.Array | np.ndarray):
    raise UsageError(f'key is {key!r}; give one of jax\'s, such as jax.random.key(0)')
  if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
    return key
  words = jax.random.key_data(jax.random.key(0)).shape
  if key.dtype != np.uint32 or key.shape[-1:] != words:
    raise UsageError(f'key is an array {key.shape} of {key.dtype}; give a key of jax\'s, such as '
                     'jax.random.key(0)')
  return jax.random.wrap_key_data(key)  # from the older jax.random.PRNGKey


def as_array(value, *, of: str, wanted: str) -> jax.Array:
  """What the function `of` returned. Raises UsageError where that is nothing, several values in
  place of an array, or a tensor of PyTorch's that NumPy cannot read: with a gradient, of bfloat16,
  or on a GPU.
  """
  if value is None:
    raise UsageError(f'`{of}` returns None; it should return {wanted}')
  if isinstance(value, tuple | list | Mapping):
    raise UsageError(f'`{of}` returns a {type(value).__name__} of {len(value)}; it should return '
                     f'{wanted} alone, such as lambda images: network(images)[0]')
  if hasattr(value, 'detach'):
    try:
      np.asarray(value)
    except (RuntimeError, TypeError) as error:
      raise UsageError(f'`{of}` returns a tensor that is no array ({first_line(error)}); return '
                       'tensor.detach().float().cpu().numpy()') from error
  return jnp.asarray(value)


def check_shift(what: str, max_shift: int, height: int, width: int) -> None:
  """Raises UsageError unless max_shift is whole and 0 <= max_shift < both sizes, in pixels."""
  if not isinstance(max_shift, int | np.integer):
    raise UsageError(f'{what} of {max_shift!r} pixels is no whole number; give one such as 4')
  if not 0 <= max_shift < min(height, width):
    raise UsageError(f'{what} of {max_shift} pixels does not fit images of {height}x{width}; '
                     f'choose one from 0 to {min(height, width) - 1}')


def index_batches(examples: Mapping[str, np.ndarray], size: int):
  """Cuts examples, arrays (n, ...) with 'index' among them, into batches for a Counter.

  Yields (int32 arrays (size, ...), how many examples these hold). No example is dropped or counted
  twice: the last batch is filled up, and 'mask' (size,) is false there.
  """
  n = len(examples['index'])
  for start in range(0, n, size):
    rows = np.arange(start, start + size)
    batch = {name: values[np.minimum(rows, n - 1)].astype(np.int32)
             for name, values in examples.items()}
    yield {**batch, 'mask': rows < n}, min(size, n - start)
