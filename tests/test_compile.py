"""`gapjax compile`: its arithmetic and its reading of programs; and real compilations for TPUs,
which need libtpu: `pytest -m tpu_compile`."""

import json
import math
import os

import jax
import numpy as np
import pytest
from conftest import ROOT, tiny_config

from gapjax.speed import compile_tpu, flops, inputs
from gapjax.training import build
from gapjax.training.plan import Plan

TINY = [f'--config={ROOT}/configs/digits.py', '--config.model.name=resnet10',
        '--config.model.width=4', '--config.canvas.grid=2', '--config.data.image_size=8',
        '--config.model.stem=cifar', '--config.data.train_images=160', '--config.batch_size=32']

# As libtpu writes it, shortened: a gathering that overlaps computation stands there where it starts
# and where it ends; two reductions of other arrays share a channel; names alone are no operation.
HLO = '''HloModule jit__fun, is_scheduled=true

%async_collective_fusion (param_0: f32[2,128]) -> f32[2,512] {
  %all-gather.126 = f32[2,512]{1,0:T(2,128)} all-gather(%param_0), channel_id=7, replica_groups={{0,1,2,3}}, dimensions={1}, metadata={op_name="bn/all_gather"}
  ROOT %custom-call.14 = f32[2,512]{1,0:T(2,128)S(1)} custom-call(%all-gather.126), custom_call_target="AsyncCollectiveStart"
}
%body (x: f32[4]) -> f32[4] {
  ROOT %all-gather.130 = f32[2,512]{1,0:T(2,128)S(1)} all-gather(%param_0), channel_id=7, replica_groups={{0,1,2,3}}, dimensions={1}
  %all-gather.45 = bf16[4,64,2]{1,2,0:T(2,128)S(1)} all-gather(%fusion.10), channel_id=2, dimensions={0}
  %copy.591 = f32[4,64,2]{1,0,2:T(4,128)S(1)} copy(%all-gather.45), metadata={op_name="all_gather"}
  %all-reduce.1 = (f32[64]{0:T(128)S(1)}, f32[7,7,3,64]{3,2,1,0:T(4,128)}, /*index=2*/f32[]{:T(128)}) all-reduce(%a, %b, %c), channel_id=9, to_apply=%add
  %all-reduce.2 = (s32[]{:T(128)}, s32[]{:T(128)}) all-reduce(%d, %e), channel_id=1, to_apply=%add.1
  %all-reduce.3 = (f32[32]{0:T(128)}, f32[32]{0:T(128)}) all-reduce(%f, %g), channel_id=1, to_apply=%add.2
  %all-to-all.1 = pred[8]{0} all-to-all(%h), replica_groups={{0,1}}
  %all-to-all.2 = pred[8]{0} all-to-all(%i), replica_groups={{0,1}}
}
'''  # noqa: E501


# ---- Reading and arithmetic ----------------------------------------------------------------------


def test_collectives_of_a_program():
  assert compile_tpu.collectives(HLO) == {
    'all-gather': {'count': 2, 'bytes': 2 * 512 * 4 + 4 * 64 * 2 * 2},
    'all-reduce': {'count': 3, 'bytes': (64 + 7 * 7 * 3 * 64 + 1) * 4 + 2 * 4 + 2 * 32 * 4},
    'all-to-all': {'count': 2, 'bytes': 2 * 8}}
  assert compile_tpu.collectives('%add = f32[2]{0} add(%all-reduce.1, %b)') == {}


@pytest.mark.parametrize(('message', 'expected'), [
  ('RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries '
   '(113.56G) exceeds available HBM (15.75G).', 113.56 * 2 ** 30),
  ('RESOURCE_EXHAUSTED: CompileTimeHbmOom: Ran out of memory in memory space hbm. Used 1.5T of '
   '95.74G hbm. Exceeded hbm capacity.', 1.5 * 2 ** 40),
  ('RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm.', math.inf),
  ('RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 130M of 128M vmem.', None),
  ('INTERNAL: hbm 5G', None)])
def test_what_the_compiler_refuses(message, expected):
  assert compile_tpu.bytes_wanted(message) == expected


class Program:
  """Stands in for a compiled program."""

  def cost_analysis(self):
    return {'flops': 2e12, 'bytes accessed': 3e9, 'optimal_seconds': -43.0}

  def memory_analysis(self):
    return type('Stats', (), dict(
      argument_size_in_bytes=900, output_size_in_bytes=650, alias_size_in_bytes=600,
      temp_size_in_bytes=5000, generated_code_size_in_bytes=70))

  def as_text(self):
    return HLO


def test_figures_of_a_program():
  """2 TFLOP at 100 TFLOP/s take 20 ms, 3 GB at 1 TB/s 3 ms; at 100 GB/s, 30 ms."""
  found = compile_tpu.figures(Program(), peak=100e12, bandwidth=1e12, batch_size=48,
                               model_flops=1e12)
  assert found['memory'] == {'state': 600, 'inputs': 300, 'outputs': 50, 'temporaries': 5000,
                             'program': 70}
  assert found['step_seconds'] == pytest.approx(0.020)
  assert found['images_per_second'] == pytest.approx(2400)
  assert found['utilisation'] == pytest.approx(0.5)
  assert found['collectives']['all-gather']['count'] == 2
  slow = compile_tpu.figures(Program(), peak=100e12, bandwidth=1e11, batch_size=48,
                              model_flops=1e12)
  assert slow['step_seconds'] == pytest.approx(0.030)
  assert slow['images_per_second'] == pytest.approx(1600)


@pytest.mark.parametrize(('memory', 'asked', 'expected', 'most'), [
  (lambda b: 10 + 3 * b, 100, 63, 3),  # (200 - 10) / 3 = 63.3; two for the line, one to verify
  (lambda b: 10 + 3 * b, 64, 63, 3),
  (lambda b: 190 + b, 5000, 10, 7),  # proportion says far too much at first
  (lambda b: 150.0 if b < 8 else 300.0, 40, 7, 7),  # a step: the line says nothing
  (lambda b: 150 + 30 * b, 2, 1, 1),
  (lambda b: 201 + b, 1000, 0, 8),
  (lambda b: b if b <= 200 else math.inf, 1000, 200, 20),  # the compiler names no figure
  (lambda b: 201 + b, 1, 0, 0)])
def test_largest_batch(memory, asked, expected, most):
  tried = []

  def trial(share):
    tried.append(share)
    return memory(share), memory(share) <= 200

  found = compile_tpu.largest(trial, asked, needed=memory(asked), available=200)
  assert found == expected and len(tried) <= most
  assert found == 0 or found in tried  # it has been compiled


def test_where_memory_grows_faster_than_the_line():
  """What the line says does not fit; what is named does."""
  def trial(share):
    memory = 50 + 20 * 1.05 ** share  # 200 at 41.3
    return memory, memory <= 200

  found = compile_tpu.largest(trial, 99, needed=trial(99)[0], available=200)
  assert 20 < found <= 41


def result(**changes):
  return {'config': {'batch_size': 512}, 'topology': 'v5e:2x2', 'chips': 4, 'largest_batch': 128,
          'needed_bytes': 40 * 2 ** 30, 'available_bytes': 15.75 * 2 ** 30, **changes}


@pytest.mark.parametrize(('changes', 'expected'), [
  ({}, 'batch_size 512 does not fit v5e:2x2: it needs 40.00 GiB a chip, of 15.75; the largest that '
   'fits is 128 (--config.batch_size=128)'),
  ({'needed_bytes': None},
   'batch_size 512 does not fit v5e:2x2: it needs more a chip than 15.75'),
  ({'largest_batch': 0}, 'nor does 4, one example a chip')])
def test_refusal(changes, expected):
  assert expected in compile_tpu.refusal(result(**changes))


# ---- The verb ------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def environment(monkeypatch):
  """What the verb sets in it is undone."""
  for name in ('JAX_PLATFORMS', 'TPU_SKIP_MDS_QUERY', 'ALLOW_MULTIPLE_LIBTPU_LOAD',
               'TPU_ACCELERATOR_TYPE', 'TPU_WORKER_HOSTNAMES'):
    monkeypatch.setenv(name, os.environ.get(name, ''))


@pytest.mark.parametrize(('argv', 'expected'), [
  (['--topology=v5e:3x3'], 'unknown topology `v5e:3x3`; give CHIP:SHAPE, such as v5e:2x2; '
   'v5e and v6e: 1x1, 2x2, 2x4,'),
  (['--topology=v4:2x2'], 'v4 and v5p: 1x1x1, 2x2x1, 2x2x2,'),
  (['--topology=v9'], 'unknown topology `v9`'),
  ([], 'arguments are required: --topology'),
  (['--topology=v5e:2x2', '--config.model.dtype=float64'], 'float64 is not for TPUs'),
  (['--topology=v5e:2x2', '--output=nowhere/compile.json'], 'there is no such folder'),
  (['--topology=v5e:2x2', '--config.model.widht=8'], '(did you mean `model.width`?)')])
def test_mistakes(complaint, argv, expected):
  assert expected in complaint('compile', *TINY, *argv)


def test_without_libtpu(complaint, monkeypatch):
  find = compile_tpu.importlib.util.find_spec
  monkeypatch.setattr(compile_tpu.importlib.util, 'find_spec',
                      lambda name, *rest: None if name == 'libtpu' else find(name, *rest))
  assert complaint('compile', *TINY, '--topology=v5e:2x2') == (
    "gapjax: compiling for a TPU needs libtpu: pip install 'jax[tpu]'")


# ---- For real ------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def tiny(data_dir):
  """The network of TINY as it is trained, on the CPU: (model, state)."""
  config = tiny_config(**{'data.name': 'digits', 'data.train_images': 160})
  train_set, task, _ = inputs.training_set(config, data_dir)
  config.steps_per_call = 1
  model, state, _, _ = build.create_learner(config, task, train_set,
                                    Plan.of(config, num_images=len(train_set)))
  return model, state


def size(tree):
  return sum(x.size for x in jax.tree.leaves(tree))


@pytest.fixture
def compiled(gapjax, data_dir, tmp_path):
  def run(*argv, code=0):
    path = tmp_path / 'compile.json'
    done = gapjax('compile', *TINY, *argv, f'--data_dir={data_dir}', f'--output={path}',
                  timeout=900)
    assert done.returncode == code, done.stderr
    return json.loads(path.read_text()), done

  return run


@pytest.mark.tpu_compile
@pytest.mark.parametrize(('topology', 'chips', 'kind'), [
  ('v5e:1x1', 1, 'TPU v5 lite'), ('v4:2x2x2', 8, 'TPU v4'), ('v6e:2x2', 4, 'TPU v6 lite')])
def test_compiled_for_a_slice(compiled, tiny, topology, chips, kind):
  """Memory, flops and collectives of the program are those of the network."""
  model, state = tiny
  found, done = compiled(f'--topology={topology}')
  assert found['fits'] and found['chips'] == chips and found['device'] == kind
  assert found['config']['steps_per_call'] == 32 and found['largest_batch'] is None
  # At least what the arrays take: on the device they are padded to tiles.
  assert 4 * size((state.params, state.batch_stats, state.opt_state)) <= found['memory']['state']
  assert 160 * (8 * 8 * 3 + 4) <= found['memory']['inputs'] < found['available_bytes']
  assert found['needed_bytes'] == sum(found['memory'].values()) < found['available_bytes']
  expected = 3 * 32 / chips * flops.forward_flops(model, (16, 16, 3))
  assert found['model_flops'] == pytest.approx(expected)
  # Few images a chip: what is no convolution weighs much.
  assert 0.7 < found['flops'] / expected < 2
  if chips == 1:
    assert found['collectives'] == {}
  else:
    norms = [path for path, _ in jax.tree_util.tree_leaves_with_path(state.batch_stats)
             if 'mean' in jax.tree_util.keystr(path)]
    # Every BatchNorm gathers its moments; the gradients are summed, whether joined or one by one.
    assert found['collectives']['all-gather']['count'] == len(norms)
    reduced = 4 * size((state.params, state.batch_stats))
    assert reduced <= found['collectives']['all-reduce']['bytes'] < 1.5 * reduced
  # The figures that are printed.
  peak, bandwidth = (found['peak'][name] for name in ('flops_per_second', 'bytes_per_second'))
  assert found['step_seconds'] == max(found['flops'] / peak, found['bytes'] / bandwidth)
  assert f'{32 / found["step_seconds"]:,.0f}' in done.stdout and topology in done.stdout
  assert all(line.startswith('compiling for') for line in done.stderr.splitlines())


@pytest.mark.tpu_compile
def test_a_call_of_many_steps_is_counted_as_one(compiled):
  one, many = (compiled('--topology=v5e:2x2', f'--config.steps_per_call={steps}')[0]
               for steps in (1, 32))
  assert np.isclose(one['flops'], many['flops'], rtol=0.01)
  assert np.isclose(one['bytes'], many['bytes'], rtol=0.05)


@pytest.mark.tpu_compile
def test_a_batch_that_does_not_fit(compiled):
  """Large images, so that few of them do not fit."""
  large = ['--topology=v5e:1x1', '--config.data.image_size=64', '--config.canvas.grid=8',
           '--config.data.train_images=8', '--config.steps_per_call=1']
  found, done = compiled(*large, '--config.batch_size=4000', code=1)
  best = found['largest_batch']
  assert not found['fits'] and found['needed_bytes'] > found['available_bytes'] and best < 4000
  assert f'the largest that fits is {best} (--config.batch_size={best})' in done.stderr
  assert f'compiling for batch_size {best} ' in done.stderr  # it was, and nothing refused
