"""The examples of the pages run as they are printed."""

import re

import jax
import numpy as np
import pytest
from conftest import ROOT

from gapjax import augshift_loss, consistency, random_shifts, rank

draw = np.random.default_rng(0)
KEY = jax.random.key(0)


def examples(page):
  """{name: code} of a page's examples."""
  return dict(re.findall(r'<!-- example: (.+?) -->\n```python\n(.*?)```',
                         (ROOT / page).read_text(), re.S))


OWN = examples('docs/your_own_network.md')
LABELS = draw.integers(0, 10, 16)
BRIGHT = np.float32(draw.normal(size=(16, 12, 12, 3)) + LABELS[:, None, None, None])
DATA = {'images': BRIGHT, 'labels': LABELS, 'batches': [{'images': BRIGHT, 'labels': LABELS}]}


def test_every_example_is_run():
  assert set(OWN) == {'AugShift', 'BatchNorm', 'NNX', 'consistency', 'linen', 'ranking and attack',
                      'one pass', 'yardstick', 'PyTorch'}
  assert set(examples('README.md')) == {'your own network', 'consistency'}


def test_the_readmes_network_trains_and_is_measured(capsys):
  """60 steps, as it stands there: the loss falls."""
  names = {'images': BRIGHT, 'labels': LABELS}
  exec(examples('README.md')['your own network'], names)
  assert float(names['loss']) > 0
  params, losses = names['network'].init(jax.random.key(0), BRIGHT), []
  opt_state = names['optimizer'].init(params)
  for step in range(60):
    params, opt_state, loss, parts = names['train_step'](params, opt_state, jax.random.key(step),
                                                         BRIGHT, LABELS)
    losses.append(float(loss))
    assert 0 < float(parts['relative_distance']) < 2
  assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
  exec(examples('README.md')['consistency'], {**names, 'params': params, 'images': BRIGHT})
  assert 0 <= float(capsys.readouterr().out) <= 1


def test_examples_of_augshift_and_consistency(capsys):
  names = {'random_shifts': random_shifts, 'augshift_loss': augshift_loss, **DATA,
           'key': jax.random.key(0), 'network': lambda x: (x.mean((1, 2)).repeat(4, 1), x[:, 0, 0])}
  exec(OWN['AugShift'], names)
  assert np.isfinite(names['loss']) and names['logits'].shape == (32, 12)
  predict = lambda images: images.mean((1, 2))  # noqa: E731
  exec(OWN['consistency'], {'consistency': consistency, 'jax': jax, 'key': jax.random.key(0),
                            'predict': predict, 'images': np.concatenate([BRIGHT, BRIGHT[:4]])})
  assert capsys.readouterr().out.endswith('% of 20 images\n')


def test_the_example_of_batchnorm():
  """The statistics move towards those of both crops, and the step can be repeated."""
  names = dict(DATA)
  exec(OWN['BatchNorm'], names)
  first = float(names['loss'])
  mean = names['statistics']['BatchNorm_0']['mean']
  assert mean.shape == (32,) and np.abs(mean).max() > 0
  for step in range(60):
    names['params'], names['statistics'], names['state'], loss, _ = names['train_step'](
      names['params'], names['statistics'], names['state'], jax.random.key(step), BRIGHT, LABELS)
  assert loss < 0.8 * first


def test_the_example_of_pytorch():
  pytest.importorskip('torch')
  names = {}
  exec(OWN['PyTorch'], names)
  assert consistency(names['predict'], BRIGHT, KEY, max_shift=2).count == 16
  assert sorted(rank(names['features'], BRIGHT)) == list(range(16))
  np.testing.assert_allclose(  # the network's own pooling and its last layer
    names['features'](BRIGHT).mean((1, 2)) @ names['network'][3].weight.detach().numpy().T
    + names['network'][3].bias.detach().numpy(), names['predict'](BRIGHT), atol=1e-5)


def test_the_example_of_nnx():
  names = dict(DATA)
  exec(OWN['NNX'], names)
  assert float(names['loss']) < 3.7  # chance: 2 log 10 = 4.6
  assert names['found'].count == 16 and sorted(names['overall']) == list(range(32))


def test_the_examples_of_linen(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  names = dict(DATA)
  exec(OWN['linen'], names)
  assert names['logits'].shape == (16, 10) and names['z'].shape == (16, 64)
  exec(OWN['ranking and attack'], names)
  assert sorted(names['orders']['overall']) == list(range(64))
  assert names['result'].metrics['accuracy']['overall'].shape == (1, 9)
  assert len((tmp_path / 'attack.csv').read_text().splitlines()) == 1 + 1 + 8 * 6
  names['at_left'] = LABELS < 5
  exec(OWN['yardstick'], names)
  assert -1 <= names['agree'] <= 1 and names['beyond'].shape == (64,)
  assert float(capsys.readouterr().out) > 0
  names.update(kernel=draw.normal(size=(64, 16)), bias=draw.normal(size=16),
               classifier=draw.normal(size=(16, 4)),
               batches=[{'images': BRIGHT, 'labels': draw.integers(0, 4, (16, 6, 6))}])
  exec(OWN['one pass'], names)
  assert capsys.readouterr().out == '(1, 9)\n'
