"""The public names: by their definitions, with any framework, and as the pages print them."""

import importlib
import os
import re
import shutil
import subprocess
import sys
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from conftest import ROOT, python, refused

import gapjax
from gapjax import (
  AdaptivePolyphase,
  BlurPool,
  GAPHead,
  PermuteHead,
  attack,
  augshift_loss,
  config,
  consistency,
  pair_distance,
  random_shifts,
  rank,
)
from gapjax.models.heads import Permute
from gapjax.neurons.attack import random_orders

draw = np.random.default_rng(0)
KEY = jax.random.key(0)
IMAGES = draw.normal(size=(6, 8, 10, 3)).astype(np.float32)

# --- importing -----------------------------------------------------------------------------------

COSTLY = {'orbax', 'matplotlib', 'tensorflow', 'tensorflow_datasets', 'grain', 'ml_collections',
          'sklearn', 'torch', 'beartype'}


def loaded(code):
  """The top-level modules that a process has after the code."""
  code += '; import sys; print(*{name.partition(".")[0] for name in sys.modules})'
  return set(python(code).stdout.splitlines()[-1].split())


def test_importing_gapjax_loads_nothing_and_a_name_nothing_costly():
  assert not loaded('import gapjax; dir(gapjax)') & {'jax', 'flax', 'numpy', 'optax', *COSTLY}
  names = ', '.join(gapjax.__all__)
  assert not loaded(f'from gapjax import {names}') & COSTLY
  assert not loaded('from gapjax import data') & {'jax', 'PIL', *COSTLY}
  assert not loaded('import gapjax.cli; gapjax.cli.main(["--help"])') & {'jax', *COSTLY}


def test_names_are_found_and_the_functions_do_not_hide_the_modules():
  assert {*gapjax.__all__} <= {*dir(gapjax)} and callable(gapjax.rank) and callable(gapjax.attack)
  modules = [importlib.import_module(f'gapjax.neurons.{name}') for name in ('rank', 'attack')]
  assert modules == [gapjax.neurons.rank, gapjax.neurons.attack]
  assert (modules[0].rank, modules[1].attack) == (gapjax.rank, gapjax.attack)
  with pytest.raises(AttributeError, match='has no attribute `ranks`'):
    _ = gapjax.ranks


# --- AugShift ------------------------------------------------------------------------------------


def test_both_crops_in_one_batch_are_the_same_as_in_pairs():
  pairs = draw.normal(size=(2, 6, 5)), draw.normal(size=(2, 6, 7))
  labels = draw.integers(0, 5, 6)
  flat = [x.reshape(12, -1) for x in pairs]
  for a, b in zip(*(jax.tree.leaves(augshift_loss(*x, labels, weight=2.0)) for x in (pairs, flat)),
                  strict=True):
    np.testing.assert_array_equal(a, b)
  np.testing.assert_allclose(pair_distance(flat[1]), ((pairs[1][0] - pairs[1][1]) ** 2).mean(),
                             rtol=1e-6)


def test_shifts_are_in_the_order_that_the_loss_takes():
  """Features that say which image it is: the distance is 0 for true pairs alone."""
  images = np.arange(6, dtype=np.float32)[:, None, None, None] * np.ones((1, 4, 4, 1), np.float32)
  batch = random_shifts(jax.random.key(0), images, max_shift=1).reshape(-1, 4, 4, 1)
  assert float(pair_distance(batch.max((1, 2)))) == 0 < float(batch.max((1, 2)).var())


@pytest.mark.parametrize('call', [
  lambda: pair_distance(np.zeros((3, 4))), lambda: pair_distance(np.zeros((3, 2, 4))),
  lambda: random_shifts(jax.random.key(0), np.zeros((4, 4, 3)), max_shift=1),
  lambda: consistency(len, np.zeros((4, 4, 3)), jax.random.key(0)),
  lambda: consistency(lambda x: x, np.zeros((2, 9, 9, 3)), jax.random.key(0)),
  lambda: consistency(len, np.zeros((2, 4, 9, 3)), jax.random.key(0), max_shift=4),
  lambda: consistency(len, np.zeros((2, 9, 9, 3)), jax.random.key(0), protocol='rol'),
  lambda: BlurPool().apply({}, np.zeros((4, 4, 3))), lambda: BlurPool(0).apply({}, IMAGES),
  lambda: BlurPool(stride=0).apply({}, IMAGES), lambda: BlurPool(padding='zero').apply({}, IMAGES),
  lambda: AdaptivePolyphase(padding='zero').apply({}, IMAGES),
  lambda: AdaptivePolyphase().apply({}, IMAGES[:, 1:])])
def test_mistakes_are_told_in_one_line(call, unchecked):
  refused(call)


@pytest.mark.parametrize(('call', 'message'), [
  (lambda: augshift_loss(np.zeros((4, 3)), np.zeros((4, 2)), [0, 1], weight=1.), 'jnp.asarray'),
  (lambda: consistency(len, IMAGES[:0], KEY), 'no image'),
  (lambda: consistency(lambda x: None, IMAGES, KEY), '`predict` returns None'),
  (lambda: consistency(len, IMAGES, np.array([0, 1])), 'jax.random.key'),
  (lambda: random_shifts(jnp.uint32(0), IMAGES, max_shift=1), 'jax.random.key'),
  (lambda: rank(len, {'images': IMAGES}), r"batch\['images'\]"),
  (lambda: rank(lambda x: x.mean(3)[:, None], IMAGES), r'transpose\(0, 2, 3, 1\)'),
  (lambda: rank(lambda x: np.zeros((6, 5, 4, 5)), IMAGES), r'transpose\(0, 2, 3, 1\)'),
  (lambda: GAPHead(3).init(KEY, IMAGES[0]), r'x\[None\]'),
  (lambda: PermuteHead(3).init(KEY, IMAGES[0]), r'x\[None\]'),
  (lambda: PermuteHead(3).init(KEY, IMAGES[:, 0, 0]), r'\(b, h, w, c\)')])
def test_what_would_be_wrong_or_fail_inside_is_told(call, message, unchecked):
  refused(call, message)


# --- consistency ---------------------------------------------------------------------------------


def corner(images):
  """Two classes: is the brightness in the top left quarter above 0?"""
  value = images[:, :4, :5].sum((1, 2, 3))
  return jnp.stack([value, -value], 1)


@pytest.mark.parametrize('protocol', ['pad', 'circular'])
def test_consistency_by_its_definition(protocol):
  """With every offset that the key can draw: the share is that of pairs with equal classes."""
  s, classes = 2, {}
  for dy in range(-s, s + 1):
    for dx in range(-s, s + 1):
      moved = (np.roll(IMAGES, (dy, dx), (1, 2)) if protocol == 'circular' else
               reference.moved(IMAGES, dy, dx))
      classes[dy, dx] = np.asarray(corner(moved)).argmax(1)
  first = np.stack([*classes.values()])  # (25, 6)
  expected = (first[:, None] == first[None]).mean((0, 1))  # of each image
  found = sum(consistency(jax.jit(corner), IMAGES.repeat(400, 0), jax.random.key(i), s, protocol)
              for i in range(2))
  assert found.count == 4800 and 0.55 < expected.mean() < 0.95
  assert found.value == pytest.approx(expected.mean(), abs=4 * np.sqrt(.25 / 4800))
  np.testing.assert_array_equal(found.agree / found.count, found.value)


def test_consistency_is_of_two_views_of_the_same_image_and_adds_up():
  found = [consistency(lambda x: x.mean((1, 2)), IMAGES[:n], jax.random.key(0), max_shift=0)
           for n in (2, 4)]
  assert [tuple(map(int, x)) for x in (*found, sum(found))] == [(2, 2), (4, 4), (6, 6)]
  calls = []

  def alternate(images):  # the second call's answer is another
    calls.append(images.shape)
    return np.eye(2)[np.full(len(images), len(calls) % 2)]

  assert tuple(consistency(alternate, IMAGES, jax.random.key(0))) == (0, 6)
  assert calls == [IMAGES.shape] * 2
  for images in (IMAGES.astype(float), jnp.asarray(IMAGES)):  # each is shown its own kind
    assert consistency(lambda x: np.asarray(x).mean((1, 2)) if isinstance(x, type(images))  # noqa: B023
                       and x.dtype == images.dtype else None, images, KEY).count == 6  # noqa: B023
  broken = consistency(lambda x: np.full((len(x), 3), np.nan), IMAGES, jax.random.key(0))
  assert broken.value == 0  # a network that computes NaN is not consistent


# --- downsampling and heads ----------------------------------------------------------------------


def test_blur_pool_halves_and_leaves_a_constant_map():
  y = BlurPool().apply({}, np.ones((2, 7, 8, 3), np.float32))
  np.testing.assert_allclose(y, np.ones((2, 4, 4, 3)), rtol=1e-6)
  x = np.zeros((1, 4, 4, 1), np.float32)
  x[0, 2, 2] = 16  # [1, 2, 1] / 4 along both axes, every second pixel
  np.testing.assert_array_equal(BlurPool().apply({}, x)[0, :, :, 0], [[0, 0], [0, 4]])
  np.testing.assert_array_equal(BlurPool(2, padding='circular').apply({}, x)[0, :, :, 0],
                                [[0, 0], [0, 4]])
  assert BlurPool(stride=3).apply({}, x).shape == (1, 2, 2, 1)


def test_gap_head_averages_a_3x3_convolution():
  head = GAPHead(4)
  variables = head.init(jax.random.key(0), IMAGES)
  logits, pooled = head.apply(variables, IMAGES)
  [layer] = variables['params'].values()
  expected = reference.conv(IMAGES, layer['kernel'], bias=layer['bias']).mean((1, 2))
  np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(pooled, IMAGES.mean((1, 2)), rtol=1e-4, atol=1e-6)


def test_permute_head_permutes_anew_for_every_key():
  head = PermuteHead(3)
  variables = head.init(jax.random.key(0), IMAGES)
  assert set(variables['params']['classifier']) == {'kernel', 'bias'}
  variables['params']['classifier'] = {'kernel': np.eye(3), 'bias': np.zeros(3)}
  seen = set()
  for seed in range(20):
    logits, z = head.apply(variables, IMAGES, rngs={'permutation': jax.random.key(seed)})
    np.testing.assert_allclose(z, IMAGES.mean((1, 2)), rtol=1e-4, atol=1e-6)
    order = tuple(int(np.argmax(np.abs(z[:, None] - logits[:, :, None]).max(0)[k] < 1e-7))
                  for k in range(3))
    np.testing.assert_array_equal(logits, z[:, list(order)])
    seen.add(order)
  assert len(seen) == 6  # every order of three channels
  with pytest.raises(Exception, match='permutation'):
    head.apply(variables, IMAGES)
  fixed = PermuteHead(3, permute=Permute('fixed', seed=1))
  np.testing.assert_array_equal(*(fixed.apply(variables, IMAGES)[0] for _ in range(2)))


# --- position channels ---------------------------------------------------------------------------


def test_rank_is_the_order_of_the_scores():
  weights = np.linspace(0, 1, 10)[None, :, None] * [0, 3, 1, 2]  # columns weigh by channel
  features = lambda images: images.mean(-1, keepdims=True) * weights  # noqa: E731
  z = np.einsum('bhwc,xwk->bk', IMAGES, weights)
  mirrored = np.einsum('bhwc,xwk->bk', IMAGES[:, :, ::-1], weights)
  assert rank(features, IMAGES).tolist() == [1, 3, 2, 0]
  expected = np.argsort(-(z - mirrored).mean(0), kind='stable').tolist()
  assert rank(features, IMAGES, region='left').tolist() == expected


@pytest.mark.parametrize('jitted', [False, True])
def test_functions_compute_in_float32_on_every_device(jitted):
  """What a caller multiplies is multiplied at HIGHEST precision, which a CPU does not show."""
  seen = []

  def watch(function):
    def watched(x):
      seen.extend(equation.params['precision']
                  for equation in jax.make_jaxpr(function)(x).eqns)
      return function(x)
    return jax.jit(watched) if jitted else watched

  features, head = watch(lambda x: jnp.dot(x, np.eye(3))), watch(lambda x: jnp.dot(x, np.eye(3)))
  order = rank(features, IMAGES)
  batches = [{'images': IMAGES, 'labels': np.zeros((6, 8, 10), int)}]
  attack(features, head, batches, orders={'overall': order}, counts=[1])
  highest = (jax.lax.Precision.HIGHEST,) * 2
  assert len(seen) > 1 and {*seen} == {highest}


def test_attack_by_its_definition_and_in_one_pass():
  """A classifier's accuracy and a segmentation network's counts, of functions in plain NumPy."""
  mix, kernel = draw.normal(size=(3, 8)), draw.normal(size=(8, 4))
  bias = np.array([.1, 0, -.1, .2])
  features = lambda images: np.asarray(images) @ mix  # noqa: E731
  head = lambda maps: np.maximum(np.asarray(maps) @ kernel, 0) + bias  # noqa: E731
  pixels = [{'images': IMAGES, 'labels': draw.integers(0, 4, (6, 8, 10))}]
  images = [{'images': part, 'labels': draw.integers(0, 4, 3)} for part in (IMAGES[:3], IMAGES[3:])]
  orders = {'overall': rank(features, IMAGES), 'random': random_orders(8, 2, seed=0)}
  how = dict(orders=orders, counts=[2, 5, 8])
  found = attack(features, head, pixels, **how)
  once = attack(features, lambda y: np.maximum(y, 0) + bias, iter(pixels), **how,
                layer=lambda maps, channels: np.asarray(maps) @ kernel[channels])
  for name in orders:
    np.testing.assert_array_equal(found.matrices[name], once.matrices[name])
  classes = attack(features, lambda maps: head(maps).mean((1, 2)), images, **how)
  maps = IMAGES @ mix
  for i, count in enumerate((0, 2, 5, 8)):
    keep = np.ones(8)
    keep[orders['overall'][:count]] = 0
    logits = head(maps * keep)
    hits = logits.mean((1, 2)).argmax(1) == np.concatenate([b['labels'] for b in images])
    assert classes.metrics['accuracy']['overall'][0, i] == pytest.approx(hits.mean())
    whole = found.matrices['overall'][0, i, 0]
    assert np.trace(whole) == (logits.argmax(-1) == pixels[0]['labels']).sum()


@pytest.mark.parametrize(('features', 'message'), [
  (lambda x: x.sum((1, 2, 3)), '`features` maps images'), (lambda x: x[:1], '`features` maps')])
def test_what_cannot_be_attacked(features, message):
  batches = [{'images': IMAGES, 'labels': np.zeros(6, int)}]
  refused(lambda: attack(features, lambda x: x, batches, orders={'a': [0, 1, 2]}, counts=[1]),
          message)


@pytest.mark.parametrize(('batch', 'how', 'message'), [
  ({'labels': np.zeros(6)}, {}, 'labels are float64'),
  ({'mask': np.ones((6, 1))}, {}, 'one an image'), ({'mask': np.zeros(6)}, {}, 'no image'),
  ({'labels': np.zeros((6, 8, 10), int), 'size': [8, 10]}, {}, r'give \(b, 2\)'),
  ({}, {'regions': ()}, 'no region'), ({}, {'layer': lambda *_: None}, '`layer` returns None')])
def test_batches_that_would_be_counted_wrong(batch, how, message):
  batches = [{'images': IMAGES, 'labels': np.zeros(6, int), **batch}]
  refused(lambda: attack(lambda x: x, lambda x: x if 'size' in batch else x.mean((1, 2)), batches,
                         orders={'a': [0, 1, 2]}, counts=[1], **how), message)


def test_an_attack_takes_a_name_generators_and_tensors():
  """One region by its name, counts drawn from a generator, and what torch computes for `layer`."""
  torch = pytest.importorskip('torch')
  kernel = torch.tensor(draw.normal(size=(3, 4)), dtype=torch.float32)

  def layer(maps, channels):
    return torch.tensor(np.asarray(maps)) @ kernel[channels.tolist()]

  batches = [{'images': IMAGES, 'labels': draw.integers(0, 4, (6, 8, 10))}]
  how = dict(orders={'a': [2, 0, 1]}, regions='left')
  once = attack(lambda x: x, lambda y: y, batches, counts=(n for n in (1, 2)), layer=layer, **how)
  whole = attack(lambda x: x, lambda x: np.asarray(x) @ kernel.numpy(), batches, counts=[1, 2],
                 **how)
  assert once.counts == (0, 1, 2) and [*once.metrics] == ['miou_left']
  np.testing.assert_array_equal(once.matrices['a'], whole.matrices['a'])


def test_one_array_of_images_is_taken_in_batches(monkeypatch):
  sizes = []

  def features(images):
    sizes.append(len(images))
    return images

  monkeypatch.setattr('gapjax.neurons.rank.BATCH', 4)
  whole = rank(features, IMAGES)
  assert sizes == [4, 4, 2, 2]  # each and its mirror image
  assert whole.tolist() == rank(lambda x: x, [*IMAGES]).tolist()


# --- configs without a clone, and what is installed ----------------------------------------------


@pytest.mark.parametrize('name', ['gapnet_cifar10', 'gapnet_cifar10.py',
                                  'configs/gapnet_cifar10.py'])
def test_configs_are_found_by_name_from_anywhere(name, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert config.from_flags([f'--config={name}:grid=7']).canvas.grid == 7
  (tmp_path / 'configs').mkdir()
  (tmp_path / name).write_text('from gapjax import config\n\n\ndef get_config(arg=None):\n'
                               '  c = config.default()\n  c.num_epochs = 77\n  return c\n')
  assert config.from_flags([f'--config={name}']).num_epochs == 77  # one's own file comes first


@pytest.mark.slow
def test_a_wheel_has_configs_templates_and_a_description_without_dead_links(tmp_path):
  names = subprocess.run(['git', 'ls-files', '--cached', '--others', '--exclude-standard',
                          'gapjax', 'configs', 'setup.py', 'pyproject.toml', 'README.md',
                          'LICENSE'], cwd=ROOT, capture_output=True, text=True, check=True)
  names = [name for name in names.stdout.split() if (ROOT / name).exists()]
  for name in names:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / name, tmp_path / name)
  subprocess.run([sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '--no-build-isolation',
                  '-w', tmp_path / 'dist', tmp_path], check=True, timeout=300)
  [path] = (tmp_path / 'dist').glob('*.whl')
  with zipfile.ZipFile(path) as wheel:
    inside = {name for name in wheel.namelist() if '.dist-info/' not in name}
    [about] = [wheel.read(name).decode() for name in wheel.namelist() if name.endswith('/METADATA')]
    wheel.extractall(tmp_path / 'installed')
  assert inside == {name.replace('configs/', 'gapjax/configs/', 1) if name.startswith('configs/')
                    else name for name in names if '/' in name}
  assert '![' not in about and not re.findall(r'\]\((?!https?:)', about)
  assert 'https://arxiv.org/abs/2108.07884' in about
  code = ('from gapjax import config; c = config.from_flags(["--config=gapnet_cifar10:grid=7"]); '
          'print(config.__file__, c.canvas.grid)')
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True,
                        cwd=tmp_path / 'dist', timeout=120,
                        env={**os.environ, 'PYTHONPATH': os.pathsep.join(
                          [str(tmp_path / 'installed'), os.environ.get('PYTHONPATH', '')])})
  assert done.stdout.split() == [str(tmp_path / 'installed/gapjax/config.py'), '7']
