"""TFDS builders that need no TensorFlow: encoded images go in, array_record comes out.

The CIFAR builders have the names, versions, features, keys and (hashed) order of TFDS' own, so a
folder that either prepared serves both.
"""

import contextlib
import functools
import io
import logging
import os
import pathlib
import signal
import tempfile
import threading
import unittest.mock

import requests
import tensorflow_datasets as tfds
from tensorflow_datasets.core import shuffle
from tensorflow_datasets.core.download import checksums, resource
from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError

from gapjax import errors, paths
from gapjax.data import digit_scenes, prepared, scenes_sources, sources
from gapjax.data.labels import ORIGINS
from gapjax.data.pictures import png

log = logging.getLogger(__name__)

_KRIZHEVSKY = '''@techreport{krizhevsky2009learning,
  author = {Alex Krizhevsky},
  title = {Learning multiple layers of features from tiny images},
  institution = {University of Toronto},
  year = {2009}
}'''

_ALPAYDIN = 'Alpaydin, E., Kaynak, C.: Optical Recognition of Handwritten Digits. UCI (1998).'

# What TFDS keeps of each dataset beside its records. Their order is hashed, so that the first are a
# sample of all classes or cities; the digits keep the order of their file.
ABOUT = {
    'cifar10': dict(
        description='CIFAR-10: 50,000 training and 10,000 test images, 32x32, 10 classes.',
        homepage='https://www.cs.toronto.edu/~kriz/cifar.html', citation=_KRIZHEVSKY),
    'cifar100': dict(
        description='CIFAR-100: 50,000 training and 10,000 test images, 32x32, 100 classes in 20 '
                    'groups.',
        homepage='https://www.cs.toronto.edu/~kriz/cifar.html', citation=_KRIZHEVSKY),
    'digits': dict(
        description="scikit-learn's 1,797 handwritten digits, 8x8, in the order of its file.",
        homepage='https://archive.ics.uci.edu/dataset/80', disable_shuffling=True,
        citation=_ALPAYDIN),
    'voc2012': dict(
        description='Pascal VOC 2012 segmentation: 1,464 training and 1,449 validation images, 21 '
                    'classes.',
        homepage='http://host.robots.ox.ac.uk/pascal/VOC/voc2012/',
        citation='Everingham, M., et al.: The Pascal Visual Object Classes Challenge. IJCV '
                 '(2010).'),
    'cityscapes': dict(
        description='Cityscapes: 2,975 training and 500 validation street scenes, 19 classes.',
        homepage='https://www.cityscapes-dataset.com',
        citation='Cordts, M., et al.: The Cityscapes Dataset for Semantic Urban Scene '
                 'Understanding. CVPR (2016).'),
    'camvid': dict(
        description='CamVid: 367 training, 101 validation and 233 test street scenes, 11 classes.',
        homepage='http://mi.eng.cam.ac.uk/research/projects/VideoRec/CamVid/',
        citation='Brostow, G., Fauqueur, J., Cipolla, R.: Semantic Object Classes in Video. '
                 'Pattern Recognition Letters (2009).'),
    'digit_scenes': dict(
        description='Handwritten digits scattered over scenes of 64 x 96 pixels, a class for every '
                    'pixel.',
        homepage='https://archive.ics.uci.edu/dataset/80',
        citation=_ALPAYDIN),
}

# TFDS tries ten times with growing pauses, three minutes in all: without a network, say so at once.
_CONNECT_SECONDS = 10


# Unregistered, because TFDS has its own `cifar10` and allows a name only once.
class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """Writes `sources.Arrays` or a `scenes_sources.SceneSet` as the dataset `name` of ABOUT.

  Of scenes it writes the publisher's images as they are, and masks of our labels. TFDS needs no
  TensorFlow as long as images come as files.
  """

  # Where TFDS would look for a builder's checksums and texts; ours has none, and the look needs
  # importlib_resources, which TFDS uses without requiring it.
  code_path = None

  def __init__(self, name, content, *, data_dir):
    self.name, self._content = name, content
    self.VERSION = tfds.core.Version('3.0.2' if name in sources.CIFAR else '1.0.0')
    super().__init__(data_dir=data_dir)

  def _info(self):
    if isinstance(self._content, sources.Arrays):
      metadata, shape = None, self._content.images['train'].shape[1:]
      labels = {feature: tfds.features.ClassLabel(names=names)
                for feature, names in self._content.class_names.items()}
    else:
      shape = (None, None, 3)
      labels = {'label': tfds.features.Image(shape=(None, None, 1), encoding_format='png')}
      metadata = tfds.core.MetadataDict(class_names=list(self._content.class_names),
                                        palette=self._content.palette.tolist())
    return tfds.core.DatasetInfo(
        builder=self, supervised_keys=('image', 'label'), metadata=metadata, **ABOUT[self.name],
        features=tfds.features.FeaturesDict({
            'id': tfds.features.Text(), 'image': tfds.features.Image(shape=shape), **labels}))

  def _split_generators(self, dl_manager):
    del dl_manager  # the arrays are in memory, the files here
    images = isinstance(self._content, sources.Arrays)
    return {split: self._generate_examples(split)
            for split in (self._content.images if images else self._content.splits)}

  def _generate_examples(self, split):
    if isinstance(self._content, sources.Arrays):
      for i, image in enumerate(self._content.images[split]):
        labels = {key: int(values[i]) for key, values in self._content.labels[split].items()}
        yield i, {'id': f'{split}_{i:05d}', 'image': io.BytesIO(png(image)), **labels}
    else:
      for scene in self._content.splits[split]:
        yield scene.id, {'id': scene.id, 'image': io.BytesIO(scene.image()),
                         'label': io.BytesIO(png(scene.label()))}


class _Shuffler(shuffle.Shuffler):
  """TFDS' own order, of examples that wait in a file: of each, memory holds where it is.

  TFDS holds a split in memory, and one of more than 1,000 MiB in files opened by TensorFlow.
  """

  def __init__(self, file, **how):
    super().__init__(**how)
    self._file = file
    file.seek(0)
    file.truncate()  # of the split before

  def _add_to_mem_buffer(self, hkey, data):
    self._mem_buffer.append((hkey, self._file.tell(), len(data)))
    self._file.write(data)

  def _iter_mem(self):
    for hkey, start, size in sorted(self._mem_buffer):
      self._file.seek(start)
      yield hkey, self._file.read(size)


def prepare(name, *, source=None, data_dir=None, quiet=False):
  """Builds the dataset `name` unless it is there already.

  Args:
    name: one of ABOUT.
    source: the publisher's folder or archive (see sources.py and scenes_sources.py). None
      downloads CIFAR; the digits and their scenes come from scikit-learn.
    data_dir: the folder of all datasets, TFDS' default when None.
    quiet: no progress bars.

  Returns:
    The path of the prepared version folder.

  Raises:
    UsageError: the source is missing or damaged, cannot be downloaded, or a folder that cannot be
      read is in the way. Nothing half-built is left.
  """
  root = prepared.data_root(data_dir)
  folder, problem = prepared.newest(root / name)
  if folder:
    if source:
      log.warning('%s is prepared already, and nothing is taken from %s; to build it from there, '
                  'remove %s and run this again', name, source, folder)
    return folder
  if problem:
    raise errors.UsageError(prepared.explain(name, data_dir, problem=problem))
  with _open_source(name, source, root) as content:
    return _build(name, content, root=root, quiet=quiet)


@contextlib.contextmanager
def _open_source(name, source, root):
  """What the builder of `name` takes: sources.Arrays, or a scenes_sources.SceneSet."""
  if name in prepared.EMBEDDED:
    if source:
      raise errors.UsageError(f'{name} comes with scikit-learn: run `gapjax prepare {name}` '
                              'without --source')
    yield sources.read_digits() if name == 'digits' else digit_scenes.digit_scenes()
  elif name in sources.CIFAR:
    yield sources.read_cifar(name, source or _download(name, root))
  elif source:
    with scenes_sources.open_scenes(name, source) as scenes:
      yield scenes
  else:
    raise errors.UsageError(f'gapjax does not download {name}: get '
                            f'{ORIGINS[name]}, then run '
                            f'`gapjax prepare {name} --source=PATH`')


def _build(name, content, *, root, quiet):
  """Builds in a folder of our own and renames it into place, whole or not at all.

  TFDS renames too, but names its temporary folder with `random`: two processes with the same
  seed would write into one. It also leaves empty folders behind when it fails.
  """
  root.mkdir(parents=True, exist_ok=True)
  with (_ended_by_signals(), paths.full_disk(root),
        tempfile.TemporaryDirectory(dir=root, prefix='incomplete.') as temporary,
        tempfile.TemporaryFile(dir=temporary) as examples,
        # TFDS' writer makes its own shuffler, and takes no other.
        unittest.mock.patch.object(shuffle, 'Shuffler', functools.partial(_Shuffler, examples)),
        # What TFDS prints names the temporary folder; its progress bars go to stderr.
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()) if quiet else contextlib.nullcontext()):
    builder = Builder(name, content, data_dir=temporary)
    builder.download_and_prepare(file_format='array_record')
    folder = root / name / str(builder.version)
    folder.parent.mkdir(exist_ok=True)
    try:
      os.rename(builder.data_dir, folder)
    except OSError:
      # Another process was first: its dataset is the same. Anything else is a real error.
      if prepared.newest(folder.parent)[0] != folder:
        raise
  return folder


@contextlib.contextmanager
def _ended_by_signals():
  """Inside, SIGTERM and SIGHUP end the process as Ctrl-C does: what is half-built is removed.

  The exit code is a shell's for the signal, 143 and 129. Where somebody handles or ignores them,
  as training does and nohup, that stays.
  """
  main = threading.current_thread() is threading.main_thread()  # no other may set a handler
  ours = [number for number in (signal.SIGTERM, signal.SIGHUP)
          if main and signal.getsignal(number) is signal.SIG_DFL]

  def end(number, _):
    for each in ours:  # a terminal that closes sends two
      signal.signal(each, signal.SIG_IGN)
    raise SystemExit(128 + number)

  for number in ours:
    signal.signal(number, end)
  try:
    yield
  finally:
    for number in ours:
      signal.signal(number, signal.SIG_DFL)


def _download(name, root):
  """The publisher's archive in TFDS' folder of downloads, checked against TFDS' checksums."""
  url = sources.CIFAR[name].url
  downloads = root / 'downloads'
  cached = resource.get_dl_fname(url, checksums.get_all_url_infos()[url].checksum)
  try:
    if not any(downloads.rglob(cached)):
      requests.head(url, timeout=_CONNECT_SECONDS).raise_for_status()
    manager = tfds.download.DownloadManager(download_dir=downloads, dataset_name=name,
                                            force_checksums_validation=True)
    return pathlib.Path(manager.download(url))
  except (requests.RequestException, tfds.download.DownloadError,
          NonMatchingChecksumError) as error:
    why = ('what came has the wrong checksum' if isinstance(error, NonMatchingChecksumError)
           else type(error).__name__)
    raise errors.UsageError(f'cannot download {url} ({why}): download it elsewhere and pass '
                            '--source=PATH') from error
