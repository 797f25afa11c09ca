"""The verb `rank` of any PyTorch network: a function that returns it, and a folder of images.

    gapjax rank --torch=my_networks:resnet50 --images=photos --workdir=ranked
"""

import importlib
import logging
import os
import pathlib
import sys
from collections.abc import Callable, Iterator

import numpy as np
from PIL import ExifTags, ImageOps

from gapjax import paths
from gapjax.data.pictures import as_rgb, open_image
from gapjax.errors import UsageError, check_choice, first_line, nearest
from gapjax.models import IMAGENET
from gapjax.neurons import rank
from gapjax.neurons.network import in_last_axes
from gapjax.neurons.run import Ranking, check_regions, rank_subject
from gapjax.tasks.images import normalise
from gapjax.weights.files import require_torch

log = logging.getLogger(__name__)

SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.webp', '.ppm', '.tif', '.tiff')
SIDE = 224  # what images of several sizes become: ImageNet's networks were trained on it


def rank_network(function: str, folder, *, workdir, layer: str | None = None,
                 ids: dict | None = None) -> Ranking:
  """Ranks the channels of a layer, overall, and by regions where `ids` says whose images.

  Writes `ranking.json` and `ranking_yardstick.json`, as `neurons.run.rank_run` does, and logs which
  layer it took, how images were sized and normalised, and whether eval() had to be set.

  Args:
    function: 'MODULE:FUNCTION', without arguments, returns a torch.nn.Module that takes images
      (b, 3, h, w) normalised as ImageNet's are. MODULE is looked for in the current folder, too.
    folder: images; those in folders below it, too.
    workdir: a folder for what is written, which is made.
    layer: a name of network.named_modules(); None is the last whose output is (b, c, h', w') with
      more than one pixel.
    ids: {region: list of file names relative to the folder}.

  Raises:
    UsageError: PyTorch is not installed; the function, the layer or a file is no good; the workdir
      is a run's.
  """
  require_torch('--torch', 'rank a run of gapjax: --workdir alone')
  workdir = paths.of(workdir)
  if (workdir / 'config.json').exists():
    raise UsageError(f'{workdir} is the workdir of a run of gapjax, whose ranking would be lost; '
                     'name a new folder for what --torch writes')
  ids = ids or {}
  check_regions(list(ids), ids)
  subject = Folder(folder)
  subject.features = cut(load_network(function), next(subject.batches([0])), layer=layer)
  paths.make(workdir)
  paths.check_writable(workdir)
  return rank_subject(subject, workdir, list(ids), ids)


def load_network(function: str):
  """The torch.nn.Module that 'MODULE:FUNCTION' returns, in evaluation mode. Raises UsageError
  where PyTorch or the function is not there, the function fails, or returns something else."""
  torch = require_torch('--torch', 'leave it out')
  name, _, called = function.partition(':')
  if not name or not called:
    raise UsageError(f'--torch={function} is not MODULE:FUNCTION, such as my_networks:resnet50')
  if os.getcwd() not in sys.path:
    sys.path.insert(0, os.getcwd())
  try:
    module = importlib.import_module(name)
  except (Exception, SystemExit) as error:
    raise UsageError(f'--torch={function}: module `{name}` cannot be imported '
                     f'({type(error).__name__}: {first_line(error)}); run this where {name}.py '
                     'lies, or set PYTHONPATH, and see that it can be imported') from error
  if not callable(make := getattr(module, called, None)):
    there = [key for key, value in vars(module).items() if callable(value)]
    raise UsageError(f'--torch={function}: module `{name}` has no function `{called}`'
                     f'{nearest(called, there)}; name one that returns the network')
  try:
    network = make()
  except (Exception, SystemExit) as error:
    raise UsageError(f'--torch={function} fails ({type(error).__name__}: {first_line(error)}); see '
                     'that it runs here: it is called without arguments') from error
  if not isinstance(network, torch.nn.Module):
    raise UsageError(f'--torch={function} returns {type(network).__name__}, not a torch.nn.Module; '
                     'return the network itself')
  if any(part.training for part in network.modules()):
    log.info('the network was in training mode: eval() is set, so BatchNorm takes its running '
             'statistics and dropout does nothing')
  return network.eval()


def cut(network, example: np.ndarray, *, layer: str | None = None) -> Callable:
  """The function from images (b, h, w, 3) to a layer's feature maps (b, h', w', c), NumPy arrays.

  Args:
    network: a torch.nn.Module; its last run of the layer counts.
    example: images (b, h, w, 3) that it takes.
    layer: as `rank_network` has it.

  Raises:
    UsageError: there is no such layer, it returns no feature maps or their channels last, or the
      network fails.
  """
  import torch
  layers = {name: part for name, part in network.named_modules() if name}
  if layer is not None:
    check_choice(layer, layers, what='layer')
  # Whose device and dtype images are given: a half or a double network takes no others.
  weights = next((x for x in network.parameters() if x.dtype.is_floating_point), None)
  like = () if weights is None else (weights.device, weights.dtype)

  def run(images):
    batch = torch.tensor(np.asarray(images)).permute(0, 3, 1, 2)
    try:
      with torch.no_grad():
        network(batch.to(*like) if like else batch)
    except Exception as error:
      raise UsageError(f'the network cannot take images {(*batch.shape,)} ({type(error).__name__}: '
                       f'{first_line(error)}); give images of a size that it takes, and a network '
                       'that takes any number of them, again and again') from error

  shapes, size = _maps_of(layers, lambda: run(example)), (1, 3, *example.shape[1:3])
  if layer is None:
    layer = next((name for name in reversed(shapes) if shapes[name][1:].numel() > 1), None)
  if layer not in shapes:
    where = f'layer `{layer}` returns no' if layer else 'no layer returns'
    raise UsageError(f'{where} feature maps (b, c, h, w) of images {size}; these do: '
                     f'{", ".join(shapes) or "none"}')
  c, h, w = shapes[layer]
  if in_last_axes((1, w, h, c), (1, *size[:1:-1], 3)):  # of (h, w, c), all axes turned round
    raise UsageError(f'layer `{layer}` returns maps {(c, h, w)} that look like (h, w, c); name one '
                     f'that returns (c, h, w) by layer: {", ".join(shapes)}')
  log.info('layer `%s`: %d channels, maps of %dx%d', layer, c, h, w)
  found = []
  # A copy: what follows may work in place, as `out += x` and ReLU in a residual block do.
  layers[layer].register_forward_hook(lambda _, __, output: found.append(
    output.permute(0, 2, 3, 1).float().cpu().numpy().copy()))

  def features(images):
    found.clear()
    run(images)
    return found[-1]

  return features


def _maps_of(layers, run):
  """{name: (c, h, w)} of the layers that return feature maps in `run`, in the order of their
  ends."""
  import torch
  shapes = {}

  def note(name):
    def hook(_, __, output):
      shapes.pop(name, None)
      if isinstance(output, torch.Tensor) and output.ndim == 4:
        shapes[name] = output.shape[1:]
    return hook

  hooks = [part.register_forward_hook(note(name)) for name, part in layers.items()]
  run()
  for one in hooks:
    one.remove()
  return shapes


def _size(picture):
  """(width, height) of a picture as it is shown: a camera held upright writes down a turn."""
  turned = picture.getexif().get(ExifTags.Base.Orientation, 1) >= 5
  return picture.size[::-1] if turned else picture.size


class Folder:
  """A folder of images, as `neurons.run.rank_subject` ranks the channels of `features` by them.

  Attributes:
    images: {'id': file name} of each.
    size: (width, height) that the network sees, pixels.

  Raises UsageError where it is no folder, or holds no image or a file that cannot be read.
  """
  limit = step = features = None  # all images; a network on its own has no step

  def __init__(self, folder):
    self.folder = pathlib.Path(folder)
    if not self.folder.is_dir():
      raise UsageError(f'--images={folder} is no folder; give one with images')
    names = sorted(path.relative_to(self.folder).as_posix() for path in self.folder.rglob('*')
                   if path.suffix.lower() in SUFFIXES and path.is_file())
    if not names:
      raise UsageError(f'--images={folder} holds no image ({", ".join(SUFFIXES)}); give a folder '
                       'with some')
    self.images = [{'id': name} for name in names]
    sizes = {self._opened(name, _size) for name in names}
    if len(sizes) == 1:
      [self.size] = sizes
      log.info('%d images of %dx%d pixels', len(names), *self.size)
    else:
      self.size = SIDE, SIDE
      log.info('%d images of %d sizes: each is scaled, and cropped around its centre, to %dx%d '
               'pixels', len(names), len(sizes), *self.size)
    log.info("images are normalised by ImageNet's mean and standard deviation")

  def _opened(self, name, read):
    """What `read` makes of an image, which Pillow decodes only then."""
    path = self.folder / name
    try:
      return read(open_image(path.read_bytes()))
    except (OSError, SyntaxError, ValueError) as error:  # Pillow's, of a file that is no image
      raise UsageError(f'{path} cannot be read as an image of 8 bits a channel '
                       f'({first_line(error)}); remove it, or save it again') from error

  def image(self, name) -> np.ndarray:
    """(h, w, 3) float32, normalised."""
    picture = self._opened(name, lambda picture: as_rgb(ImageOps.exif_transpose(picture)))
    if picture.size != self.size:
      picture = ImageOps.fit(picture, self.size)
    mean, std = IMAGENET
    return np.asarray(normalise(np.asarray(picture), mean=mean, std=std, dtype=np.float32))

  def batches(self, indices, size: int = 8) -> Iterator[np.ndarray]:
    """Images (b, h, w, 3), `size` at a time."""
    for start in range(0, len(indices), size):
      yield np.stack([self.image(self.images[i]['id']) for i in indices[start:start + size]])

  def choose(self, region, *, limit, ids) -> list[int]:
    return rank.with_ids(self.images, ids)
