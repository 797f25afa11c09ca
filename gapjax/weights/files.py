"""PyTorch's weights by name: files of them, and their layouts.

`convert` takes our variables from weights by a name map (names.py), and `export` gives them back:
all of it or none.
"""

import contextlib
import io
import logging
import os
import pathlib
import pickle
import re
import zipfile
import zlib
from collections.abc import Collection

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from gapjax import paths
from gapjax.errors import UsageError, check_choice, first_line
from gapjax.weights.names import backbone_names

log = logging.getLogger(__name__)

# Where training scripts put the weights beside other things: the authors' two, and common others.
WRAPPERS = ('net', 'model_state', 'state_dict', 'model', 'model_state_dict')
SUFFIXES = ('.npz', '.safetensors', '.pth', '.pt')
# What a file of a backbone may hold beside it: ImageNet's classifier, of MobileNetV2 and
# EfficientNet-Lite0 with the convolution before it; a segmentation net's heads.
HEADS = ('fc.', 'classifier.', 'features.18.', '_fc.', '_conv_head.', '_bn1.')
SEGMENTATION_HEADS = ('classifier.', 'aux_classifier.')


# ---- Files ---------------------------------------------------------------------------------------


def read(path) -> dict[str, np.ndarray]:
  """The arrays in a file by their names, as PyTorch lays them out.

  Args:
    path: a .npz or .safetensors file, or a .pth or .pt file, which needs PyTorch and is read
      without executing what a pickle may hold: tensors, plain values and NumPy's scalars. Of
      {'net': ...} and the other WRAPPERS the inner dict is taken; `module.` before every name
      (DataParallel's) is removed.

  Raises UsageError when the file is not there, of another kind, broken, or holds anything else, no
  array at all, or more than this machine's memory.
  """
  path = pathlib.Path(path).expanduser()
  if path.suffix not in SUFFIXES:
    raise UsageError(f'weights are read from {", ".join(SUFFIXES)} files, which {path} is not; '
                     'save them in one of these')
  if not path.is_file():
    raise UsageError(f'no file of weights `{path}`; download or save it there, or correct the path')
  readers = {'.npz': _read_npz, '.safetensors': _read_safetensors}
  unpacked = 0
  # What is no zip, or a damaged one, is the reader's to tell.
  with contextlib.suppress(zipfile.BadZipFile, NotImplementedError, ValueError), \
      zipfile.ZipFile(path) as file:
    unpacked = sum(member.file_size for member in file.infolist())
  _check_size(path, unpacked)
  weights = readers.get(path.suffix, _read_torch)(path)
  _check_size(path, sum(x.nbytes for x in weights.values()))  # an expanded tensor takes no memory
  if not weights:
    raise UsageError(f'{path} holds no array; save the weights again: '
                     'torch.save(network.state_dict(), PATH)')
  if all(name.startswith('module.') for name in weights):
    weights = {name.removeprefix('module.'): value for name, value in weights.items()}
  return weights


def _check_size(path, needed):
  """Raises UsageError where `needed` bytes are more than this machine's memory."""
  if needed > (memory := os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')):
    raise UsageError(f'the arrays in {path} take {needed / 2**30:,.0f} GiB, and this machine has '
                     f'{memory / 2**30:,.0f}; the file is damaged, or needs a larger machine')


def _read_npz(path):
  try:
    with path.open('rb') as file, np.load(file, allow_pickle=False) as arrays:
      return {name: np.asanyarray(x) for name, x in arrays.items()}  # bytes of what is no .npy
  except (ValueError, EOFError, zipfile.BadZipFile, zlib.error, TypeError, OverflowError,
          MemoryError, RuntimeError) as error:  # the last is zipfile's, of what is encrypted
    raise _unreadable(path, error) from None


def _read_safetensors(path):
  from safetensors import SafetensorError
  from safetensors.numpy import load_file
  try:
    return {name: x.astype(np.float32) if x.dtype == jnp.bfloat16 else x
            for name, x in load_file(path).items()}
  except (SafetensorError, AttributeError) as error:  # the latter of a type that NumPy lacks
    raise _unreadable(path, error) from None


def _read_torch(path):
  torch = require_torch(f'reading {path}', 'save the weights as .npz or .safetensors where it is '
                   'installed')
  try:
    with torch.serialization.safe_globals(_numpy_scalars()):
      state = torch.load(path, weights_only=True, map_location='cpu')
  except OSError:
    raise
  except Exception as error:  # whatever the reader of a pickle makes of a damaged one
    raise _unreadable(path, error) from None
  if isinstance(state, dict):
    wrapper = next((key for key in WRAPPERS if isinstance(state.get(key), dict)), None)
    others = [str(key) for key, value in state.items() if key != wrapper
              and isinstance(value, dict) and value
              and all(isinstance(x, torch.Tensor) for x in value.values())]
    if wrapper and others:
      log.warning('%s holds several networks: read is `%s`, and not `%s`', path, wrapper,
                  '`, `'.join(others))
    state = state[wrapper] if wrapper else state
  if not isinstance(state, dict) or not all(
      isinstance(name, str) and isinstance(x, torch.Tensor) for name, x in state.items()):
    raise UsageError(f'{path} holds something else than tensors by their names; save it with '
                     'torch.save(network.state_dict(), PATH)')
  try:
    return {name: (x.float() if x.dtype == torch.bfloat16 else x).numpy(force=True)
            for name, x in state.items()}
  except (RuntimeError, TypeError) as error:  # sparse, quantised, of a type that NumPy lacks
    raise UsageError(f'{path} holds a tensor that is no plain array ({first_line(error)}): save it '
                     'dense and in float32') from None


def require_torch(what: str, otherwise: str):
  """The module torch. Raises UsageError where it is not installed: what needs it, and what to do
  otherwise."""
  try:
    import torch
  except ImportError:
    raise UsageError(f'{what} needs PyTorch: pip install torch, or {otherwise}') from None
  return torch


def _numpy_scalars():
  """What the pickle of a NumPy scalar names, such as the best score beside the authors' weights;
  NumPy 1 had its function elsewhere."""
  scalar = np.float64(0).__reduce__()[0]
  kinds = np.typecodes['AllInteger'] + np.typecodes['AllFloat'] + '?'
  return [scalar, (scalar, 'numpy.core.multiarray.scalar'), np.dtype,
          *{type(np.dtype(kind)) for kind in kinds}]


def _unreadable(path, error):
  """A UsageError with the first line of `error`, or with the object that torch.load refused."""
  line = (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip('.')
  if isinstance(error, pickle.UnpicklingError):  # several lines on how to read it all the same
    refused = re.search(r'GLOBAL (\S+)', str(error))
    line = f'refused: {refused[1]}' if refused else 'no tensors'
  return UsageError(f'{path} cannot be read, or holds more than arrays ({line}); download or save '
                    'it again, the weights alone: torch.save(network.state_dict(), PATH)')


def write(path, arrays: dict[str, np.ndarray], *, wrap: str | None = None,
          beside: dict | None = None) -> pathlib.Path:
  """Writes arrays by their names to a new file, all of them or nothing.

  Args:
    path: a .npz, .safetensors, .pth or .pt file; the last two need PyTorch. Its folder is made.
    arrays: as PyTorch lays them out.
    wrap: one of WRAPPERS: the key of a dict around them, in .pth and .pt files.
    beside: what that dict has beside them, plain values by their keys.

  Returns:
    The path, `~` expanded.

  Raises UsageError when the file is there already, of another kind, or cannot be wrapped.
  """
  path = pathlib.Path(path).expanduser()
  if path.suffix not in SUFFIXES:
    raise UsageError(f'weights are written to {", ".join(SUFFIXES)} files, which {path} is not; '
                     'give it one of these endings')
  if path.exists():
    raise UsageError(f'{path} is there already; remove it, or give another name')
  if wrap is not None:
    check_choice(wrap, WRAPPERS, what='wrapper')
    if path.suffix not in ('.pth', '.pt'):
      raise UsageError(f'a {path.suffix} file is not wrapped in `{wrap}`, but a .pth file is; '
                       'leave --wrap out, or name a .pth file')
  arrays = {name: np.asarray(x, order='C') for name, x in arrays.items()}
  data = io.BytesIO()
  if path.suffix == '.npz':
    np.savez(data, **arrays)
  elif path.suffix == '.safetensors':
    from safetensors.numpy import save
    data.write(save(arrays))
  else:
    torch = require_torch(f'writing {path}', 'name a .safetensors or .npz file')
    state = {name: torch.tensor(x) for name, x in arrays.items()}
    torch.save({wrap: state, **(beside or {})} if wrap else state, data)
  path.parent.mkdir(parents=True, exist_ok=True)
  paths.write_bytes(path, data.getvalue())
  return path


# ---- Layouts -------------------------------------------------------------------------------------


def to_jax(x: np.ndarray) -> np.ndarray:
  """Kernels OIHW -> HWIO and (out, in) -> (in, out); vectors as they are."""
  return {4: lambda: x.transpose(2, 3, 1, 0), 2: lambda: x.T}.get(x.ndim, lambda: x)()


def to_torch(x: np.ndarray) -> np.ndarray:
  """Kernels HWIO -> OIHW and (in, out) -> (out, in): the inverse of `to_jax`."""
  return {4: lambda: x.transpose(3, 2, 0, 1), 2: lambda: x.T}.get(x.ndim, lambda: x)()


def torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
  """The shape in PyTorch of an array of ours: the inverse of `to_jax`."""
  return {4: (*shape[:1:-1], *shape[:2]), 2: shape[::-1]}.get(len(shape), shape)


def convert(variables, weights: dict[str, np.ndarray], names: dict[str, str], *,
            what: str, unread: Collection[str] = ()) -> dict:
  """Our variables with every value taken from PyTorch's weights.

  Args:
    variables: {'params': ..., 'batch_stats': ...}, whose shapes and types the result has.
    weights: arrays by PyTorch's names.
    names: PyTorch's names -> paths in `variables`, all of them.
    what: what the weights are and what they are for, for the message.
    unread: names that `weights` may hold too; so may it any num_batches_tracked.

  Returns:
    A new tree of numpy arrays like `variables`, which stay as they are.

  Raises:
    UsageError: it names what is missing or left over, of a wrong shape, or not of finite real
      numbers, of each the first eight and how many there are.
  """
  weights = {name: x for name, x in weights.items()
             if name not in unread and not name.endswith('num_batches_tracked')}
  leaves = _leaves(variables, names)
  shapes = {name: torch_shape(leaves[path].shape) for name, path in names.items()
            if name in weights}
  wrong = [name for name, shape in shapes.items() if weights[name].shape != shape]
  problems = {
    'missing': [name for name in names if name not in weights],
    'left over': [name for name in weights if name not in names],
    'of another shape': [f'{name} {weights[name].shape} (here: {shapes[name]})' for name in wrong],
    'not of finite real numbers': [name for name in shapes
                                   if name not in wrong and not _finite(weights[name])]}
  if any(problems.values()):
    raise UsageError(f'{what} do not fit: ' + '; '.join(
      f'{len(found)} {kind}: {", ".join(found[:8])}{", ..." * (len(found) > 8)}'
      for kind, found in problems.items() if found)
      + '; take the file of that network, or set the model to the file\'s')
  return unflatten_dict({path: np.array(to_jax(weights[name]), leaves[path].dtype, order='C')
                         for name, path in names.items()}, sep='/')


def export(variables, names: dict[str, str], *, unread: dict[str, tuple[str, int]]) -> dict:
  """Our variables as PyTorch's weights: the inverse of `convert`.

  Args:
    variables: {'params': ..., 'batch_stats': ...}.
    names: PyTorch's names -> paths in `variables`, all of them.
    unread: what PyTorch has beside them, as names.unread gives it; filled with zeros.

  Returns:
    New arrays by PyTorch's names, in its layouts.
  """
  leaves = _leaves(variables, names)
  arrays = {name: np.array(to_torch(leaves[path]), order='C') for name, path in names.items()}
  for name, (like, n) in unread.items():
    arrays[name] = np.zeros(arrays[like].shape[:n], arrays[like].dtype if n else np.int64)
  return arrays


def _leaves(variables, names):
  """The arrays by their paths, which must be those that `names` has."""
  leaves = flatten_dict(variables, sep='/')
  if unmapped := set(leaves) ^ set(names.values()):
    raise ValueError(f'the name map does not fit the network: {sorted(unmapped)}')
  return leaves


def _finite(x):
  return x.dtype.kind in 'iuf' and bool(np.isfinite(x.astype(np.float64)).all())


def load_backbone(variables, path, *, variant: str, stem: str = 'imagenet') -> dict:
  """The variables of a backbone without a head, with the weights in a file.

  Args:
    variables: {'params', 'batch_stats'} of the backbone, which stay as they are.
    path: a file as `read` takes it, of backbone_names' names: a classifier, whose last layers are
      left out, or a segmentation net with its backbone under `backbone.`, whose heads are.
    variant: the backbone's name, such as 'resnet50'.
    stem: a ResNet's, which decides its names.

  Returns:
    New {'params', 'batch_stats'} of numpy arrays.

  Raises UsageError as `read` and `convert` do.
  """
  weights = read(path)
  inside = any(name.startswith('backbone.') for name in weights)
  weights = {re.sub(r'^(backbone\.)?((low|high)_level_(?=features))?', '', name): x
             for name, x in weights.items()
             if not name.startswith(SEGMENTATION_HEADS if inside else HEADS)}
  log.info('the backbone %s starts from %s', variant, path)
  return convert(variables, weights, backbone_names(variant, stem=stem),
                 what=f'the weights in {path} and the backbone {variant} of stem `{stem}`')
