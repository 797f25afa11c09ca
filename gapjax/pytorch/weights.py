"""PyTorch's weights by name: files of them, our name of each, and their layouts.

A name map is a dict {PyTorch's name: ours}, ours being a path such as 'params/conv1/kernel' or
'batch_stats/bn1/mean'. Maps of layers (`conv_names`, `norm_names`) make those of networks
(`backbone_names`), and `convert` reads weights by any of them: all of it or none.
"""

import logging
import pathlib
import pickle
import re
import zipfile
import zlib

import jax.numpy as jnp
import numpy as np

from gapjax.errors import UsageError, check_choice
from gapjax.models.resnet import RESNETS

log = logging.getLogger(__name__)

# Where training scripts put the weights beside other things: the authors' two, and a common third.
WRAPPERS = ('net', 'model_state', 'state_dict')
# What a file of a backbone may hold beside it: ImageNet's classifier, a segmentation net's heads.
HEADS, SEGMENTATION_HEADS = ('fc.',), ('classifier.', 'aux_classifier.')


# ---- Files ---------------------------------------------------------------------------------------


def read(path) -> dict[str, np.ndarray]:
  """The arrays in a file by their names, as PyTorch lays them out.

  Args:
    path: a .npz or .safetensors file, or a .pth or .pt file, which needs PyTorch and is read
      without executing what a pickle may hold. Of {'net': ...}, {'model_state': ...} and
      {'state_dict': ...} the inner dict is taken; `module.` before every name (DataParallel's) is
      removed.

  Raises UsageError when the file is not there, of another kind, broken, or holds anything else.
  """
  path = pathlib.Path(path).expanduser()
  readers = {'.npz': _read_npz, '.safetensors': _read_safetensors, '.pth': _read_torch,
             '.pt': _read_torch}
  if path.suffix not in readers:
    raise UsageError(f'weights are read from {", ".join(readers)} files, which {path} is not; '
                     'save them in one of these')
  if not path.is_file():
    raise UsageError(f'no file of weights `{path}`; download or save it there, or correct the path')
  weights = readers[path.suffix](path)
  if weights and all(name.startswith('module.') for name in weights):
    weights = {name.removeprefix('module.'): value for name, value in weights.items()}
  return weights


def _read_npz(path):
  try:
    with path.open('rb') as file, np.load(file, allow_pickle=False) as arrays:
      return dict(arrays)
  except (ValueError, EOFError, zipfile.BadZipFile, zlib.error, TypeError) as error:
    raise _unreadable(path, error) from None


def _read_safetensors(path):
  from safetensors import SafetensorError, safe_open
  try:
    with safe_open(path, framework='numpy') as file:
      arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
  except SafetensorError as error:
    raise _unreadable(path, error) from None
  return {name: x.astype(np.float32) if x.dtype == jnp.bfloat16 else x
          for name, x in arrays.items()}


def _read_torch(path):
  try:
    import torch
  except ImportError:
    raise UsageError(f'reading {path} needs PyTorch: pip install torch, or save the weights as '
                     '.npz or .safetensors where it is installed') from None
  try:
    found = torch.load(path, weights_only=True, map_location='cpu')
  except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
    raise _unreadable(path, error) from None
  if isinstance(found, dict):
    found = next((found[key] for key in WRAPPERS if isinstance(found.get(key), dict)), found)
  if not isinstance(found, dict) or not all(isinstance(x, torch.Tensor) for x in found.values()):
    raise UsageError(f'{path} holds something else than tensors by their names; save it with '
                     'torch.save(network.state_dict(), PATH)')
  return {name: (x.float() if x.dtype == torch.bfloat16 else x).numpy()
          for name, x in found.items()}


def _unreadable(path, error):
  """A UsageError with the first line of `error`, or with the object that torch.load refused."""
  line = (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip('.')
  if isinstance(error, pickle.UnpicklingError):  # several lines on how to read it all the same
    refused = re.search(r'GLOBAL (\S+)', str(error))
    line = f'refused: {refused[1]}' if refused else 'no tensors'
  return UsageError(f'{path} cannot be read, or holds more than arrays ({line}); download or save '
                    'it again, the weights alone: torch.save(network.state_dict(), PATH)')


# ---- Names ---------------------------------------------------------------------------------------


def conv_names(theirs: str, ours: str, *, bias: bool = False) -> dict[str, str]:
  """The name map of a convolution or a linear layer."""
  names = {f'{theirs}.weight': f'params/{ours}/kernel'}
  return {**names, f'{theirs}.bias': f'params/{ours}/bias'} if bias else names


def norm_names(theirs: str, ours: str) -> dict[str, str]:
  """The name map of a BatchNorm; num_batches_tracked has no counterpart."""
  return {f'{theirs}.weight': f'params/{ours}/scale', f'{theirs}.bias': f'params/{ours}/bias',
          f'{theirs}.running_mean': f'batch_stats/{ours}/mean',
          f'{theirs}.running_var': f'batch_stats/{ours}/var'}


def backbone_names(variant: str) -> dict[str, str]:
  """The name map of a ResNet without its head: torchvision's names, such as
  layer1.0.downsample.0.weight, to paths in a `gapjax.models.resnet.ResNet`'s variables.

  Raises UsageError on a network that is no ResNet.
  """
  check_choice(variant, RESNETS, what='backbone')
  blocks, bottleneck = RESNETS[variant]
  names = conv_names('conv1', 'conv1') | norm_names('bn1', 'bn1')
  for stage, count in enumerate(blocks, 1):
    for i in range(count):
      theirs, ours = f'layer{stage}.{i}', f'layer{stage}_{i}'
      for k in range(1, 4 if bottleneck else 3):
        names |= conv_names(f'{theirs}.conv{k}', f'{ours}/conv{k}')
        names |= norm_names(f'{theirs}.bn{k}', f'{ours}/bn{k}')
      if i == 0 and (stage > 1 or bottleneck):  # where the number of channels changes
        names |= conv_names(f'{theirs}.downsample.0', f'{ours}/shortcut_conv')
        names |= norm_names(f'{theirs}.downsample.1', f'{ours}/shortcut_bn')
  return names


# ---- Layouts -------------------------------------------------------------------------------------


def to_jax(x: np.ndarray) -> np.ndarray:
  """Kernels OIHW -> HWIO and (out, in) -> (in, out); vectors as they are."""
  return {4: lambda: x.transpose(2, 3, 1, 0), 2: lambda: x.T}.get(x.ndim, lambda: x)()


def torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
  """The shape in PyTorch of an array of ours: the inverse of `to_jax`."""
  return {4: (*shape[:1:-1], *shape[:2]), 2: shape[::-1]}.get(len(shape), shape)


def convert(variables, weights: dict[str, np.ndarray], names: dict[str, str], *,
            what: str) -> dict:
  """Our variables with every value taken from PyTorch's weights.

  Args:
    variables: {'params': ..., 'batch_stats': ...}, whose shapes and types the result has.
    weights: arrays by PyTorch's names.
    names: PyTorch's names -> paths in `variables`, all of them.
    what: what the weights are and what they are for, for the message.

  Returns:
    A new tree of numpy arrays like `variables`, which stay as they are.

  Raises:
    UsageError: it lists every name that is missing or left over, every wrong shape, and every
      array that is not of finite numbers.
  """
  weights = {name: x for name, x in weights.items() if not name.endswith('num_batches_tracked')}
  leaves = dict(_flatten(variables))
  if unmapped := set(leaves) ^ set(names.values()):
    raise ValueError(f'the name map does not fit the network: {sorted(unmapped)}')
  known = [name for name in names if name in weights]
  shapes = {name: torch_shape(leaves[names[name]].shape) for name in known}
  problems = {
    'missing': [name for name in names if name not in weights],
    'left over': [name for name in weights if name not in names],
    'of another shape': [f'{name} {weights[name].shape} (here: {shapes[name]})' for name in known
                         if weights[name].shape != shapes[name]],
    'not of finite numbers': [name for name in known if not _finite(weights[name])]}
  if any(problems.values()):
    raise UsageError(f'{what} do not fit: ' + '; '.join(
      f'{len(names)} {kind}: {", ".join(names)}' for kind, names in problems.items() if names)
      + '; take the file of that network, or set the model to the file\'s')
  new = {}
  for name, path in names.items():
    *parents, last = path.split('/')
    node = new
    for parent in parents:
      node = node.setdefault(parent, {})
    node[last] = np.array(to_jax(weights[name]), leaves[path].dtype, order='C')
  return new


def _finite(x):
  return np.issubdtype(x.dtype, np.number) and bool(np.isfinite(x.astype(np.float64)).all())


def _flatten(tree, prefix=''):
  """{'params': {'conv1': {'kernel': x}}} -> ('params/conv1/kernel', x), ..."""
  for name, value in tree.items():
    if hasattr(value, 'items'):
      yield from _flatten(value, f'{prefix}{name}/')
    else:
      yield f'{prefix}{name}', value


def load_backbone(variables, path, *, variant: str) -> dict:
  """The variables of a ResNet without a head, with the weights in a file.

  Args:
    variables: {'params', 'batch_stats'} of the ResNet, which stay as they are.
    path: a file as `read` takes it, of torchvision's names: a classifier, whose fc.* is left out,
      or a segmentation net with its ResNet under `backbone.`, whose heads are.
    variant: the ResNet's name, such as 'resnet50'.

  Returns:
    New {'params', 'batch_stats'} of numpy arrays.

  Raises UsageError as `read` and `convert` do.
  """
  weights = read(path)
  inside = any(name.startswith('backbone.') for name in weights)
  weights = {name.removeprefix('backbone.'): x for name, x in weights.items()
             if not name.startswith(SEGMENTATION_HEADS if inside else HEADS)}
  found = convert(variables, weights, backbone_names(variant),
                  what=f'the weights in {path} and the backbone {variant} of this model')
  log.info('the backbone %s starts from %s', variant, path)
  return found
