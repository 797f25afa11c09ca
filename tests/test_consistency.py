"""Views of images against numpy and Pillow, and every number of the evaluation counted by hand."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import reference
from conftest import refused, tiny_config

from gapjax import paths
from gapjax.tasks.consistency import PROTOCOLS, shifted_views
from gapjax.training import build, workdirs
from gapjax.training.devices import Devices
from gapjax.training.evaluate import evaluate as evaluate_workdir
from gapjax.training.plan import Plan
from gapjax.training.train import train

draw = np.random.default_rng(0)


def by_hand(image, protocol, offset, s):
  """The image (h, w, c) moved by (dy, dx), content down and right, in float64."""
  (h, w, c), (dy, dx) = image.shape, offset
  if protocol == 'circular':
    return np.roll(image, offset, (0, 1))
  if protocol == 'pad':
    return reference.moved(image, *offset)
  size = (w + 2 * s, h + 2 * s)
  large = [PIL.Image.fromarray(np.float32(image[..., i])).resize(size, PIL.Image.BILINEAR)
           for i in range(c)]
  large = np.stack([np.asarray(channel) for channel in large], -1)
  return large[s - dy:s - dy + h, s - dx:s - dx + w]


@pytest.mark.parametrize('protocol', PROTOCOLS)
@pytest.mark.parametrize('s', [1, 4])
def test_views(protocol, s):
  images = draw.normal(size=(5, 6, 9, 2)).astype(np.float32)
  offsets = draw.integers(-s, s + 1, (5, 3, 2))
  offsets[0, :2] = [[-s, s], [s, -s]]  # the corners
  views = jax.jit(shifted_views)(images, offsets, protocol=PROTOCOLS.index(protocol), max_shift=s)
  expected = [by_hand(images[i], protocol, offsets[i, v], s) for v in range(3) for i in range(5)]
  np.testing.assert_allclose(views, expected, atol=1e-5)


def test_crops_of_bfloat16_images_are_where_those_of_float32_are():
  """A scale of 208 / 200 rounds, and so does the place of a column: bfloat16 has 8 bits."""
  images = jnp.asarray(draw.normal(size=(2, 9, 200, 1)), jnp.bfloat16)
  offsets = np.array([[[4, -4]], [[-1, 3]]])
  views = jax.jit(shifted_views)(images, offsets, protocol=PROTOCOLS.index('crop'), max_shift=4)
  expected = [by_hand(np.asarray(images[i], float), 'crop', offsets[i, 0], 4) for i in range(2)]
  assert views.dtype == jnp.bfloat16
  np.testing.assert_allclose(views.astype(float), expected, atol=.05)


# ---- The evaluation -----------------------------------------------------------------------------


def moving_config(**changes):
  return tiny_config(seed=1, **{'task': 'classification', 'model.head': 'linear', 'eval.shift': 2,
                        'eval.max_shift': 3, 'eval.map_step': 2, 'eval.shift_images': 20,
                        **changes})


@pytest.fixture(scope='module')
def network(data_dir):
  """A network with random weights, in float64, so that no near tie depends on the batch."""
  with jax.enable_x64(True):
    config = moving_config(**{'model.dtype': 'float64'})
    train_set, test_set, task = build.load_data(config, data_dir=data_dir)
    plan = Plan.of(workdirs.settled(config, platform='cpu'), num_images=160)
    model, state, *_ = build.create_learner(config, task, train_set, plan)
    state = Devices.to_host(state)
    variables = {'params': state.params, 'batch_stats': state.batch_stats}

    @jax.jit
    def forward(images):
      logits, features = model.apply(variables, images, train=False)
      return logits, features['pooled']

    # Random weights alone would give one class to all images.
    logits, _ = forward(task.normalised(train_set.images))
    state.params['head']['classifier']['bias'] -= np.asarray(logits).mean(0)
    return config, model, state, task, test_set, forward


@pytest.fixture(scope='module')
def result(network):
  """The final evaluation, on one device."""
  with jax.enable_x64(True):
    return evaluate(network, devices=1, batch_size=32)


def evaluate(network, *, devices, batch_size, **changes):
  _, model, state, task, test_set, _ = network
  here = Devices(jax.local_devices()[:devices])
  config = moving_config(**{'eval.batch_size': batch_size, **changes})
  evaluation = build.create_evaluation(config, model, task, test_set, here)
  return evaluation.final(here.replicate(state))


def views_by_hand(network, protocol, s, count, *, times=1):
  """Classes and features (2, times * count, ...) of the pairs that seed 1 draws."""
  *_, task, test_set, forward = network
  rng = np.random.default_rng((1, PROTOCOLS.index(protocol), s))
  offsets = rng.integers(-s, s, endpoint=True, size=(times, 30, 2, 2))
  images = np.asarray(task.normalised(test_set.images), np.float64)
  views = np.stack([[by_hand(images[i], protocol, offsets[j, i, v], s)
                     for j in range(times) for i in range(count)] for v in range(2)])
  logits, features = forward(views.reshape(-1, *images.shape[1:]))
  return (np.asarray(logits).argmax(-1).reshape(2, times * count),
          np.asarray(features).reshape(2, times * count, -1))


def test_headline_by_hand(network, result):
  with jax.enable_x64(True):
    *_, task, test_set, forward = network
    classes, z = views_by_hand(network, 'pad', 2, 30)
    rolled, _ = views_by_hand(network, 'circular', 3, 30)
    cropped, _ = views_by_hand(network, 'crop', 2, 30)  # in Pillow's float32: one may differ
    still = np.asarray(forward(task.normalised(test_set.images))[0])
  shares = np.bincount(still.argmax(1), minlength=10) / 30
  assert shares.max() < 0.9  # it is no constant
  assert result['consistency'] == (classes[0] == classes[1]).mean()
  assert 0 < result['consistency'] < 1
  assert result['consistency_circular'] == (rolled[0] == rolled[1]).mean()
  assert result['consistency_crop'] == pytest.approx((cropped[0] == cropped[1]).mean(), abs=.034)
  assert result['accuracy'] == (still.argmax(1) == test_set.labels).mean()
  np.testing.assert_allclose(result['loss'],
                             reference.entropies(still, test_set.labels).mean())
  distance = ((z[0] - z[1]) ** 2).mean() / z.reshape(60, -1).var(0).mean()
  np.testing.assert_allclose(result['feature_distance'], distance, rtol=1e-9)


def test_every_image_is_moved_many_times(network):
  with jax.enable_x64(True):
    result = evaluate(network, devices=2, batch_size=8, **{'eval.pairs': 3, 'eval.max_shift': 0})
    classes, z = views_by_hand(network, 'pad', 2, 30, times=3)
  assert result['consistency'] == (classes[0] == classes[1]).mean() and z.shape[1] == 90
  distance = np.square(z[0] - z[1]).mean() / z.reshape(180, -1).var(0).mean()
  np.testing.assert_allclose(result['feature_distance'], distance, rtol=1e-9)


@pytest.mark.parametrize('protocol', ['pad', 'circular'])
def test_curves_by_hand(network, result, protocol):
  """On the first 20 images; `crop`'s views are compared above, in Pillow's float32."""
  with jax.enable_x64(True):
    curve = []
    for s in (1, 2, 3):
      classes, _ = views_by_hand(network, protocol, s, 20)
      curve.append((classes[0] == classes[1]).mean())
  assert result['shifts']['protocols'][protocol] == curve
  assert len(result['shifts']['protocols']['crop']) == 3 and result['shifts']['images'] == 20


def test_accuracy_map_by_hand(network, result):
  *_, task, test_set, forward = network
  assert result['shifts']['offsets'] == [-2, 0, 2]
  with jax.enable_x64(True):
    images = np.asarray(task.normalised(test_set.images[:20]), np.float64)
    for row, dy in enumerate((-2, 0, 2)):
      for column, dx in enumerate((-2, 0, 2)):
        moved = np.stack([by_hand(image, 'pad', (dy, dx), 0) for image in images])
        right = np.asarray(forward(moved)[0]).argmax(1) == test_set.labels[:20]
        np.testing.assert_allclose(result['shifts']['accuracy_map'][row][column], right.mean())


def test_devices_and_batches_change_nothing(network, result):
  """Three batches of four devices, the last of which is not full."""
  with jax.enable_x64(True):
    other = evaluate(network, devices=4, batch_size=12)
  result = dict(result)
  for name in ('loss', 'feature_distance'):
    np.testing.assert_allclose(other.pop(name), result.pop(name), rtol=1e-9)
  assert other == result


def test_a_distance_that_would_cancel():
  """Features far from 0 with a small spread: the variance does not drown in float32."""
  from gapjax.tasks.consistency import counts
  z = (1000 + 1e-2 * draw.normal(size=(2, 50, 3))).astype(np.float32)
  batch = {'mask': np.arange(50) < 45, 'cell': np.zeros(50, int)}
  found = counts(jnp.zeros((100, 4)), z.reshape(100, 3), np.zeros(50, int), batch,
                 centre=np.float32([1000, 1000, 1000]), num_cells=1)
  kept = z[:, :45].astype(np.float64)
  variance = found['square'] / 90 - np.square(found['deviation'] / 90)
  np.testing.assert_allclose(variance, kept.reshape(90, 3).var(0), rtol=1e-3)
  np.testing.assert_allclose(found['distance'], ((kept[0] - kept[1]) ** 2).sum(), rtol=1e-3)
  assert int(found['count'][0]) == 45 and int(found['agree']) == 45


def test_a_run_and_its_evaluation(data_dir, tmp_path):
  """What a run of two crops leaves behind, and that `gapjax evaluate` finds the same again."""
  config = moving_config(**{'augshift.crops': 2, 'augshift.max_shift': 2})
  device = jax.local_devices()[:1]
  summary = train(config, workdir=tmp_path, data_dir=data_dir, devices=device, progress=False)
  assert json.loads((tmp_path / 'summary.json').read_text()) == summary
  assert set(summary['final']) == {'image_accuracy', 'consistency', 'consistency_crop',
                                   'consistency_circular', 'feature_distance', 'loss'}
  assert set(summary['best']) == {'image_accuracy_best', 'step'}
  assert summary['shifts']['protocol'] == 'pad, s = 2' and 'per_location' not in summary
  lines = {line['split']: line for line in paths.read_lines(tmp_path / 'metrics.jsonl')}
  assert lines['eval']['consistency'] == summary['final']['consistency']
  assert 0 < lines['train']['relative_distance'] < 2
  found = evaluate_workdir(tmp_path, data_dir=data_dir, devices=device)
  assert {name: found[name] for name in summary['final']} == summary['final']
  assert {**found['shifts'], 'protocol': found['protocol']} == summary['shifts']
  assert json.loads((tmp_path / 'evaluation.json').read_text()) == found


@pytest.mark.parametrize(('field', 'value'), [
  ('augshift.max_shift', 8), ('eval.shift', 9), ('eval.max_shift', 8)])
def test_a_shift_larger_than_the_image(data_dir, field, value):
  config = moving_config(**{field: value})
  refused(lambda: build.load_data(config, data_dir=data_dir),
          rf'{field}={value}.*8x8; choose one from 0 to 7')
