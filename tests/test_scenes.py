"""Loading scenes, the digits' scenes, and training batches: a function of (seed, step) alone."""

import io
import itertools
import shutil
import zlib

import numpy as np
import PIL.Image
import PIL.ImageFile
import pytest
import scene_files
from cifar_files import fails
from prepared_files import encoded, write_scenes

from gapjax import data
from gapjax.data import digit_scenes, sources

FILL = (1, 2, 3)


@pytest.fixture(scope='module')
def scenes_dir(data_dir):
  return data_dir


@pytest.fixture(scope='module')
def digits(scenes_dir):
  """The training scenes; the fixture prepares them."""
  return data.load_scenes('digit_scenes', split='train', data_dir=scenes_dir)


# ---- Loading. ----


def test_limit(digits, scenes_dir):
  some = data.load_scenes('digit_scenes', split='train', data_dir=scenes_dir, limit=7)
  assert (len(digits), len(some)) == (400, 7)
  for i in range(2, 5):
    assert some[i]['id'] == digits[i]['id']
    np.testing.assert_array_equal(some[i]['image'], digits[i]['image'])
  with pytest.raises(IndexError):
    some[7]
  for limit in (None, 0, 999):
    assert len(data.load_scenes('digit_scenes', split='test', data_dir=scenes_dir,
                                limit=limit)) == 100


def test_resize_is_of_the_shorter_side(tmp_path):
  """Bilinear; of the label, the nearest pixel."""
  files, _ = scene_files.voc_files()
  data.prepare('voc2012', source=scene_files.write(tmp_path / 'VOC2012', files), data_dir=tmp_path)
  whole, small = (data.load_scenes('voc2012', split='train', data_dir=tmp_path, image_size=size)
                  for size in (None, 9))
  for i, (a, b) in enumerate(zip(whole, small, strict=True)):
    h, w = a['label'].shape
    assert b['image'].shape == (9, round(w * 9 / h), 3) and b['label'].shape == b['image'].shape[:2]
    assert whole.size(i) == (h, w) and small.size(i) == b['label'].shape
    for name, how in (('image', 'BILINEAR'), ('label', 'NEAREST')):
      np.testing.assert_array_equal(b[name], PIL.Image.fromarray(a[name]).resize(
        b['label'].shape[::-1], PIL.Image.Resampling[how]))


def test_a_size_is_read_without_decoding(digits, monkeypatch):
  monkeypatch.setattr(PIL.ImageFile.ImageFile, 'load', None)
  assert digits.size(399) == (64, 96)
  with pytest.raises(TypeError):
    digits[399]
  with pytest.raises(IndexError):
    digits.size(400)


def test_refusals(digits, scenes_dir, tmp_path):
  del digits  # prepared
  load = data.load_scenes
  fails(lambda: load('camvid', split='train', data_dir=tmp_path),
        f'`gapjax prepare camvid --source=PATH --data_dir={tmp_path}`')
  fails(lambda: load('digit_scenes', split='val', data_dir=scenes_dir), 'unknown split', 'test')
  fails(lambda: load('digit_scene', split='test'), 'did you mean `digit_scenes`?')
  fails(lambda: load('digits', split='test', data_dir=tmp_path), 'digits holds images with one',
        'a class for every pixel', 'digit_scenes')
  fails(lambda: data.load_images('digit_scenes', split='test', data_dir=scenes_dir),
        'digit_scenes holds scenes with a class for every pixel', 'cifar10')
  fails(lambda: data.check('camvid'), 'camvid holds scenes')
  plain = data.prepare('digits', data_dir=tmp_path)
  fails(lambda: load(plain, split='test'), f'{plain} does not hold scenes', 'palette')


def test_any_prepared_folder(digits, scenes_dir):
  folder = scenes_dir / 'digit_scenes'
  for path in (folder, folder / '1.0.0'):
    scene = data.load_scenes(path, split='train')[3]
    np.testing.assert_array_equal(scene['label'], digits[3]['label'])


def test_damaged_shard(digits, scenes_dir, tmp_path):
  del digits  # prepared
  path = shutil.copytree(scenes_dir / 'digit_scenes', tmp_path / 'digit_scenes') / '1.0.0'
  shard = path / 'digit_scenes-test.array_record-00000-of-00001'
  whole = shard.read_bytes()
  middle = len(whole) // 3
  shard.write_bytes(whole[:middle] + bytes(5000) + whole[middle + 5000:])
  scenes = data.load_scenes('digit_scenes', split='test', data_dir=tmp_path)
  fails(lambda: list(scenes), str(path), 'is damaged')
  fails(lambda: list(map(scenes.size, range(len(scenes)))), str(path), 'is damaged')
  batches = data.training_batches(scenes, batch_size=20, seed=0, crop_size=(8, 8), scale=(1, 1),
                                  flip=False, fill=FILL)
  fails(lambda: list(itertools.islice(batches.iterate(), 5)), str(path), 'is damaged')


def test_a_broken_png(tmp_path):
  """Its second chunk of pixels has no name."""
  mask = encoded(np.random.default_rng(0).integers(0, 256, (300, 300), np.uint8))
  second = mask.rindex(b'IDAT')
  assert second > mask.index(b'IDAT')
  folder = write_scenes(tmp_path, [mask[:second] + bytes(4) + mask[second + 4:]])
  fails(lambda: data.load_scenes(folder, split='train')[0], f'{folder} is damaged (broken PNG file')


def test_a_label_of_another_size_and_a_chunk_that_is_too_short(tmp_path):
  folder = write_scenes(tmp_path / 'small', [encoded(np.eye(10, dtype=np.uint8))])
  fails(lambda: data.load_scenes(folder, split='train')[0], f'the label of scene 0 in {folder}',
        'another size than its image')
  mask = encoded(np.zeros((24, 32), np.uint8))
  after = mask.index(b'IHDR') + 17  # its 13 bytes, and their checksum
  short = b'pHYs\0'
  chunk = (1).to_bytes(4) + short + zlib.crc32(short).to_bytes(4)
  folder = write_scenes(tmp_path / 'short', [mask[:after] + chunk + mask[after:]])
  fails(lambda: data.load_scenes(folder, split='train')[0], f'{folder} is damaged')


# ---- digit_scenes. ----


def test_digit_scenes_hold_what_was_prepared(digits):
  """Drawn again, every scene is the same; ids say which it is."""
  again = {scene.id: scene for scene in digit_scenes.digit_scenes().splits['train']}
  assert digits.class_names == ('background', *'0123456789')
  for i in range(0, 400, 40):
    scene = digits[i]
    np.testing.assert_array_equal(scene['label'], again.pop(scene['id']).label())
    assert scene['image'].shape == (64, 96, 3)


def test_digit_scenes_can_be_ranked_by_region(digits):
  """Every digit stands in one half only in enough scenes, and so do all digits of a scene."""
  labels = np.stack([scene['label'] for scene in digits])  # (400, 64, 96)
  classes = [set(np.unique(label)) - {0, 255} for label in labels]
  assert set().union(*classes) == set(range(1, 11))
  assert np.mean([len(found) for found in classes]) > 3

  def one_sided(where):
    left, right = where[..., :48].any((1, 2)), where[..., 48:].any((1, 2))
    return (left & ~right).sum(), (right & ~left).sum()

  assert min(one_sided((labels > 0) & (labels < 255))) >= 80
  for digit in range(1, 11):
    assert min(one_sided(labels == digit)) >= 30


def test_digit_scenes_place_and_split(monkeypatch):
  """With scans of ink all over: whole squares, apart, of one colour; no scan in both splits."""
  scans = {split: np.full((1, 8, 8, 3), 255, np.uint8) for split in ('train', 'test')}
  monkeypatch.setattr(sources, 'read_digits', lambda: sources.Arrays(
      images=scans, labels={'train': {'label': np.array([3])}, 'test': {'label': np.array([7])}},
      class_names={'label': tuple('0123456789')}))
  splits = digit_scenes.digit_scenes().splits
  for split, label in (('train', 4), ('test', 8)):
    for scene in splits[split][:20]:
      mask = scene.label()
      image = np.asarray(PIL.Image.open(io.BytesIO(scene.image())))
      assert set(np.unique(mask)) == {0, label}
      free, squares = mask > 0, 0
      while free.any():
        top, left = np.argwhere(free)[0]
        # The row may run on into a neighbour: the colour tells where this one ends.
        size = next(n for n in range(16, 21) if left + n == 96 or not free[top, left + n]
                    or (image[top, left + n] != image[top, left]).any())
        square = (slice(top, top + size), slice(left, left + size))
        assert free[square].all() and np.ptp(image[square], axis=(0, 1)).max() == 0
        free[square] = False
        squares += 1
      assert 2 <= squares <= 6


# ---- Batches: shuffling, hosts, resuming. ----


def coordinates(n, height, width):
  """n scenes whose pixels say (row + 1, column + 1, scene) and whose labels follow from them."""
  rows, columns = np.mgrid[:height, :width]
  return [{'image': np.stack([rows + 1, columns + 1, np.full_like(rows, i)], -1).astype(np.uint8),
           'label': ((rows * 7 + columns * 3 + i) % 200).astype(np.uint8), 'id': str(i)}
          for i in range(n)]


def make(scenes, **changes):
  arguments = dict(batch_size=4, seed=0, crop_size=(6, 8), scale=(1, 1), flip=False, fill=FILL)
  return data.training_batches(scenes, **{**arguments, **changes})


def same(a, b):
  assert sorted(a) == sorted(b) == ['images', 'labels']
  for key in a:
    assert a[key].dtype == b[key].dtype == np.uint8
    np.testing.assert_array_equal(a[key], b[key])


def test_every_epoch_is_a_new_order_of_all_scenes():
  """Seven scenes in batches of four: batches cross epochs, none is left out."""
  def epochs(seed):
    batches = make(coordinates(7, 6, 8), seed=seed)
    drawn = [batches.at(step)['images'][:, 0, 0, 2] for step in range(21)]
    return np.concatenate(drawn).reshape(12, 7)

  first = epochs(0)
  np.testing.assert_array_equal(np.sort(first, axis=1), np.tile(np.arange(7), (12, 1)))
  assert len({tuple(epoch) for epoch in first}) > 8
  # Nor does the next seed only begin an epoch later, as Grain's own seeds would.
  assert (first[1:] != epochs(1)[:-1]).any(axis=1).sum() > 8
  assert len(make(coordinates(1, 6, 8)).at(0)['images']) == 4  # fewer scenes than a batch


RANDOM = dict(scale=(0.5, 2), flip=True, crop_size=(24, 32), batch_size=4)


def test_hosts_share_one_hosts_batch(digits):
  alone = make(digits, **RANDOM)
  shares = [make(digits, **RANDOM, num_hosts=2, host=host) for host in range(2)]
  for step in (0, 5, 203):  # 203: in the third epoch
    parts = [share.at(step) for share in shares]
    assert parts[0]['images'].shape == (2, 24, 32, 3) and parts[0]['labels'].shape == (2, 24, 32)
    same(alone.at(step), {key: np.concatenate([part[key] for part in parts]) for key in parts[0]})
  single = [make(digits, **RANDOM, num_hosts=4, host=host).at(9) for host in range(4)]
  same(alone.at(9), {key: np.concatenate([part[key] for part in single]) for key in single[0]})


def test_iterating_from_any_step_is_indexing(digits):
  batches = make(digits, **RANDOM)
  for start in (0, 3, 98):
    iterator = batches.iterate(start)
    for step in range(start, start + 5):
      same(next(iterator), batches.at(step))
    iterator.close()
    with pytest.raises(StopIteration):
      next(iterator)
  same(next(make(digits, **RANDOM).iterate(100)), batches.at(100))


def test_seeds_differ_in_order_and_augmentation(digits):
  one, other = make(digits, **RANDOM).at(0), make(digits, **RANDOM, seed=1).at(0)
  assert (one['images'] != other['images']).any()
  single = coordinates(1, 30, 40)
  crops = [make(single, seed=seed, batch_size=1).at(0)['images'][0, 0, 0] for seed in range(6)]
  assert len({tuple(crop) for crop in crops}) > 3
  # The same scene again, a step later, is augmented anew.
  crops = [make(single, batch_size=1).at(step)['images'][0, 0, 0] for step in range(6)]
  assert len({tuple(crop) for crop in crops}) > 3


# ---- Augmentation. ----


def test_crops_are_windows_and_flips_mirror_both():
  """Each pixel says where in its scene it was, so the label can be looked up."""
  scenes = coordinates(5, 20, 30)
  places, mirrored = [], []
  for step in range(40):
    batch = make(scenes, flip=True).at(step)
    for image, label in zip(batch['images'].astype(int), batch['labels'], strict=True):
      rows, columns, ids = image[..., 0] - 1, image[..., 1] - 1, image[..., 2]
      assert len(np.unique(ids)) == 1
      np.testing.assert_array_equal(label, scenes[ids[0, 0]]['label'][rows, columns])
      left_to_right = np.diff(columns, axis=1)
      assert (np.diff(rows, axis=0) == 1).all() and len(np.unique(left_to_right)) == 1
      assert left_to_right[0, 0] in (-1, 1)
      mirrored.append(left_to_right[0, 0] == -1)
      places.append((rows.min(), columns.min()))
  assert 50 < sum(mirrored) < 110  # of 160, with probability 1/2
  rows, columns = np.array(places).T
  assert (rows.min(), rows.max()) == (0, 14) and (columns.min(), columns.max()) == (0, 22)
  for step in range(10):
    assert (np.diff(make(scenes).at(step)['images'][..., 1].astype(int), axis=2) == 1).all()


def test_small_scenes_stand_in_the_middle_of_fill_and_void():
  for step in range(5):
    batch = make(coordinates(3, 5, 9), crop_size=(8, 15)).at(step)
    for image, label in zip(batch['images'], batch['labels'], strict=True):
      scene = coordinates(3, 5, 9)[image[4, 7, 2]]
      inside = np.zeros((8, 15), bool)
      top = next(i for i in range(8) if (label[i] != 255).any())
      inside[top:top + 5, 3:12] = True
      assert top in (1, 2)  # 1.5 rows above and below
      np.testing.assert_array_equal(label[inside].reshape(5, 9), scene['label'])
      np.testing.assert_array_equal(image[inside].reshape(5, 9, 3), scene['image'])
      assert (label[~inside] == 255).all() and (image[~inside] == FILL).all()


@pytest.mark.parametrize('factor', [0.37, 0.5, 1.7])
def test_a_crop_is_a_window_of_the_whole_scene_resized(factor):
  draw = np.random.default_rng(2)
  scene = {'image': draw.integers(0, 256, (61, 83, 3), np.uint8), 'id': 'a',
           'label': draw.integers(0, 200, (61, 83)).astype(np.uint8)}
  size = round(83 * factor), round(61 * factor)
  image = np.asarray(PIL.Image.fromarray(scene['image']).resize(
    size, PIL.Image.Resampling.BILINEAR)).astype(int)
  label = np.asarray(PIL.Image.fromarray(scene['label']).resize(
    size, PIL.Image.Resampling.NEAREST))
  batches = make([scene], scale=(factor, factor), crop_size=(15, 17), batch_size=1)
  corners = set()
  for step in range(12):
    batch = batches.at(step)
    windows = np.lib.stride_tricks.sliding_window_view(label, (15, 17))
    [[top, left]] = np.argwhere((windows == batch['labels'][0]).all((2, 3)))
    window = image[top:top + 15, left:left + 17]
    assert np.abs(batch['images'][0] - window).max() <= 1  # coefficients are rounded
    corners.add((top, left))
  assert len(corners) > 6


def test_scales_fill_their_range():
  """A plain scene on a wide crop: its size tells its scale, and both sides share it."""
  scene = {'image': np.full((40, 60, 3), 200, np.uint8), 'id': 'a',
           'label': np.zeros((40, 60), np.uint8)}
  factors = []
  for step in range(60):
    batch = make([scene], scale=(0.5, 2), crop_size=(90, 130), batch_size=1).at(step)
    inside = batch['labels'][0] == 0
    assert (batch['images'][0][inside] == 200).all()
    height, width = inside.any(1).sum(), inside.any(0).sum()
    assert abs(height / 40 - width / 60) < 0.02 and inside.sum() == height * width
    factors.append(width / 60)
  assert 0.49 < min(factors) < 0.6 and 1.9 < max(factors) < 2.01
  assert 1.1 < np.mean(factors) < 1.4  # uniform: 1.25


def test_no_scenes():
  fails(lambda: make([]), 'no scenes')
