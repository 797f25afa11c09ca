"""Writes the layouts of VOC 2012, Cityscapes and SegNet's CamVid with tiny scenes, independently of
gapjax' reader."""

import io
import pathlib
import tarfile
import zipfile

import numpy as np
import PIL.Image
from prepared_files import encoded

VOC_SPLITS = {'train': ['2007_000032', '2007_000039', '2008_000015'], 'val': ['2007_000033']}
PALETTE = np.random.default_rng(0).integers(0, 256, 768).tolist()
AUGMENTED = [*VOC_SPLITS['train'], '2011_003276']
CITIES = {'train': ['aachen', 'bochum'], 'val': ['lindau']}


def picture(seed, size):
  """(h, w, 3) uint8, smooth enough that a JPEG keeps it."""
  small = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), np.uint8)
  return np.asarray(PIL.Image.fromarray(small).resize(size[::-1], PIL.Image.Resampling.BICUBIC))


def write(root, files):
  for name, content in files.items():
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
  return root


def voc_files(*, aug=None):
  """({path in VOC2012: bytes}, {id: (h, w) uint8 mask}); aug: the name of the augmented list."""
  files, masks = {}, {}
  for i, id in enumerate(dict.fromkeys([
      *VOC_SPLITS['train'], *VOC_SPLITS['val'], *(AUGMENTED if aug else [])])):
    size = (12 + i, 17)
    masks[id] = np.random.default_rng(i).choice([*range(21), 255], size).astype(np.uint8)
    files[f'JPEGImages/{id}.jpg'] = encoded(picture(i, size), kind='JPEG')
    files[f'SegmentationClass/{id}.png'] = encoded(masks[id], palette=PALETTE)
    if aug:
      files[f'SegmentationClassAug/{id}.png'] = encoded(20 - np.minimum(masks[id], 20))
  for split, part in VOC_SPLITS.items():
    files[f'ImageSets/Segmentation/{split}.txt'] = '\n'.join([*part, '']).encode()
  if aug:
    files[f'ImageSets/Segmentation/{aug}.txt'] = '\n'.join(AUGMENTED).encode()
  return files, masks


def cityscapes_files(numbers, *, test=None):
  """({path: bytes}, {id: (h, w) uint8}) with masks that hold all of `numbers`.

  test: the number that fills the masks of the test split; None leaves that split out.
  """
  files, masks = {}, {}
  cities = CITIES if test is None else {**CITIES, 'test': ['berlin']}
  for split, names in cities.items():
    for city in names:
      for i in range(2):
        id, size = f'{city}_{i:06d}_000019', (10, 16)
        draw = np.random.default_rng(len(masks))
        mask = draw.permutation(np.resize(np.array(numbers, np.uint8), size).ravel()).reshape(size)
        masks[id] = np.full(size, test, np.uint8) if split == 'test' else mask
        files[f'leftImg8bit/{split}/{city}/{id}_leftImg8bit.png'] = encoded(
          picture(len(masks), size))
        label = f'gtFine/{split}/{city}/{id}_gtFine'
        files[f'{label}_labelIds.png'] = encoded(masks[id])
        files[f'{label}_instanceIds.png'] = files[f'{label}_color.png'] = b'not to be read'
  return files, masks


def segnet_files(numbers):
  """({path in CamVid: bytes}, {name: (h, w) uint8}) with masks that hold all of `numbers`."""
  files, masks = {}, {}
  for split in ('train', 'val', 'test'):
    files[f'{split}.txt'] = b'not to be read'
    for i in range(2):
      mask = np.resize(np.array(numbers, np.uint8), 160)
      masks[f'{split}_{i}'] = np.random.default_rng(len(masks)).permutation(mask).reshape(10, 16)
      files[f'{split}/{split}_{i}.png'] = encoded(picture(len(masks), (10, 16)))
      files[f'{split}annot/{split}_{i}.png'] = encoded(masks[f'{split}_{i}'])
  return files, masks


def tar(files, path, mode='w'):
  """VOCtrainval's layout."""
  with tarfile.open(path, mode) as archive:
    for name, content in files.items():
      member = tarfile.TarInfo(f'VOCdevkit/VOC2012/{name}')
      member.size = len(content)
      archive.addfile(member, io.BytesIO(content))
  return path


def zips(files, folder):
  """Cityscapes' two archives."""
  for part in ('leftImg8bit', 'gtFine'):
    with zipfile.ZipFile(pathlib.Path(folder) / f'{part}_trainvaltest.zip', 'w') as archive:
      archive.writestr('README', 'terms')
      for name, content in files.items():
        if name.startswith(f'{part}/'):
          archive.writestr(name, content)
  return folder
