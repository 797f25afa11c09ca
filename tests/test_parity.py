"""gapjax against PyTorch: golden values that tests/golden/parity_torch.py made with it, and PyTorch
itself, array by array, where it is installed."""

import functools
import importlib.util

import jax
import numpy as np
import pytest
from conftest import ROOT, tiny_config

from gapjax import cli
from gapjax.pytorch import parity

GOLDEN = np.load(ROOT / 'tests/golden/parity.npz')
CASES = {case.name: case for case in parity.cases()}
needs_torch = pytest.mark.skipif(importlib.util.find_spec('torch') is None,
                                 reason='torch is not installed')


@functools.lru_cache(maxsize=1)  # one case's tests stand together
def ours(name, dtype):
  """A case's run in gapjax, {quantity: arrays}, trained too in float64."""
  with jax.enable_x64(dtype == 'float64'):
    run = parity.Candidate(CASES[name], dtype)
    found = run.one_step()
    if dtype == 'float64' and name in TRAINED:
      found |= {rule: run.train(rule) for rule in parity.OPTIMIZERS}
    return run.draws, found


def check(found, expected, dtype):
  for quantity, arrays in found.items():
    _, relative = parity.difference(arrays, expected(quantity, arrays))
    assert relative <= parity.TOLERANCES[dtype], f'{quantity}: {relative:.1e}'


# One of each kind of thing that differs, in float32, and some in float64; the others are slow. In
# float32 rounding is all that can differ besides: some large networks, and noise, are enough.
# results/parity has all of both.
QUICK = {'float32': {'PermuteNet', 'padding circular', 'BlurPool', 'DeepLabv3'},
         'float64': {'GAPNet', 'AugShift'}}
SLOW = {'float32': {'GAPNet, width 64', 'ResNet-50', 'LPS'}, 'float64': {*CASES}}
# Which are trained, too, in float64: 20 steps add nothing to one but the rules, and what is drawn.
TRAINED = {'GAPNet', 'PermuteNet', 'LPS', 'AugShift', 'DeepLabv3'}


@pytest.fixture(autouse=True)
def drawn_once(monkeypatch):
  """Every network of a case has the same weights, whose shapes are traced to draw them."""
  kept, draw = {}, parity.draw_weights
  monkeypatch.setattr(parity, 'draw_weights', lambda case: kept[case.name] if case.name in kept
                      else kept.setdefault(case.name, draw(case)))


@pytest.mark.parametrize(('name', 'dtype'), [
  pytest.param(name, dtype, marks=[] if name in QUICK[dtype] else [pytest.mark.slow])
  for name in CASES for dtype in parity.TOLERANCES if name in QUICK[dtype] | SLOW[dtype]])
def test_gapjax_computes_what_pytorch_computes(name, dtype):
  assert any(key.startswith(f'{name}|') for key in GOLDEN), 'run tests/golden/parity_torch.py'
  draws, found = ours(name, dtype)
  for drawn, values in draws.items():
    np.testing.assert_array_equal(values, GOLDEN[f'{name}|{drawn}'])

  def golden(quantity, projected):
    return dict(zip(sorted(projected), GOLDEN[f'{name}|{quantity}'], strict=True))

  check({quantity: parity.project(arrays) for quantity, arrays in found.items()}, golden, dtype)
  if importlib.util.find_spec('torch'):
    from gapjax.pytorch.reference import Reference
    torch = Reference(CASES[name], dtype, draws)
    theirs = torch.one_step()
    check(found, lambda quantity, _: theirs.get(quantity) or torch.train(quantity), dtype)


@needs_torch
def test_a_network_may_draw_a_permutation_and_noise():
  from gapjax.pytorch.reference import Reference
  case = parity.case('both', {
    'model.downsample': 'learned_polyphase', 'model.blur_size': 1, 'model.head': 'permuted',
    'model.stem': 'cifar'}, size=(8, 16, 16))
  with jax.enable_x64(True):
    run = parity.Candidate(case, 'float64')
    found, draws = run.one_step(), run.draws
  assert set(draws) == {'permutation', 'noise'}
  theirs = Reference(case, 'float64', draws).one_step()
  check(found, lambda quantity, _: theirs[quantity], 'float64')


def test_a_difference_is_over_the_norm_of_its_layer():
  theirs = {'a.weight': np.array([3.0, -4.0]), 'a.bias': np.array([0.0]), 'b.weight': np.ones(4)}
  ours = {'a.weight': np.array([3.0, -4.0]), 'a.bias': np.array([2.0]),
          'b.weight': np.array([1.0, 2.0, 1.0, 1.0])}
  assert parity.difference(ours, theirs) == (2.0, 0.5)  # 1 / 2 of b, and 2 / 5 of a
  with pytest.raises(ValueError, match=r"other names: \['c'\]"):
    parity.difference({**ours, 'c': np.ones(1)}, theirs)
  unknown = {**ours, 'b.weight': np.array([1.0, np.nan, 1.0, 1.0])}
  assert np.isnan(parity.difference(unknown, theirs)).all()  # wherever it stands
  assert parity.too_large({'logits, float64': parity.difference(unknown, theirs)})
  zeros = {name: 0 * x for name, x in theirs.items()}
  assert parity.difference(zeros, zeros) == (0.0, 0.0)
  assert parity.difference(ours, zeros) == (4.0, np.inf)


def test_a_projection_sees_every_element():
  x = np.arange(1.0, 7.0).reshape(2, 3)
  before = parity.project({'x': x})['x']
  assert before[2] == pytest.approx(np.sqrt(91))
  for i in range(6):
    changed = x.copy()
    changed.flat[i] += 0.25
    np.testing.assert_allclose(np.abs(parity.project({'x': changed})['x'] - before)[:2], 0.25)


def test_every_way_of_a_field_is_a_case():
  from gapjax.models.downsample import DOWNSAMPLINGS
  from gapjax.models.heads import HEADS
  from gapjax.models.layers import PADDINGS
  models = [case.config.model for case in CASES.values()]
  assert {m.padding for m in models} == set(PADDINGS)
  assert {m.downsample for m in models} == set(DOWNSAMPLINGS)
  assert {m.head for m in models} == set(HEADS)
  assert {'deeplabv3', 'deeplabv3plus'} <= {m.name for m in models}


def test_what_cannot_be_compared_is_off():
  case = parity.of_config('mine', tiny_config(**{'optimizer.clip_norm': 0.1, 'model.dropout': 0.5}))
  assert case.config.optimizer.clip_norm == case.config.model.dropout == 0


@needs_torch
def test_check_prints_the_table(capsys, monkeypatch):
  from gapjax.pytorch import reference
  monkeypatch.setattr(parity, 'cases', lambda: [CASES['GAPNet']])
  measured = reference.measure(CASES['GAPNet'])
  monkeypatch.setattr(reference, 'measure', lambda case: measured)
  assert cli.main(['convert', '--check']) == 0
  out = capsys.readouterr().out
  assert 'GAPNet' in out and 'gradients' in out and 'Adam' in out
  monkeypatch.setattr(parity, 'TOLERANCES', {'float32': 1e-12, 'float64': 1e-9})
  assert cli.main(['convert', '--check']) == 1
  assert 'gradients, float32' in capsys.readouterr().err


def test_a_kink_of_a_large_network_is_no_fault_and_a_wrong_gradient_is():
  row = dict.fromkeys(parity.COLUMNS, (0.0, 0.0))
  kink, wrong = ({**row, 'gradients, float32': (1.0, x)} for x in (1e-3, 2e-2))
  assert parity.too_large(kink) == ['gradients, float32'] and not parity.too_large(kink, kinks=True)
  assert parity.too_large(wrong, kinks=True) == ['gradients, float32']
  exact = {**row, 'gradients, float64': (1.0, 1e-3)}
  assert parity.too_large(exact, kinks=True) == ['gradients, float64']
