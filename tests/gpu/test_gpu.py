"""On a real GPU, in processes of its own: bfloat16, the same bits twice, and a CPU's numbers.

The marker `gpu`: pytest -m gpu tests/gpu. Without a GPU they are skipped.
"""

import json
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import ROOT, newest

from gapjax.pytorch import parity

CASES = ('GAPNet', 'GAPNet, width 64', 'PermuteNet')
FIELDS = {'num_epochs': 2, 'data.train_images': 480, 'canvas.grid': 2, 'model.width': 8,
          'eval.images': 60, 'log_every': 1, 'steps_per_call': 1}


def no_gpu() -> str:
  """Why there is none, or ''."""
  if not shutil.which('nvidia-smi'):
    return 'no nvidia-smi here'
  listed = subprocess.run(['nvidia-smi', '-L'], capture_output=True, text=True, check=False)
  return '' if listed.returncode == 0 and 'GPU' in listed.stdout else 'nvidia-smi lists no GPU'


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(no_gpu()), reason=no_gpu() or 'a GPU')]


def environment(platform, **more):
  # XLA_PYTHON_CLIENT_PREALLOCATE stays: tests may share the GPU.
  mine = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'}
  return {**mine, 'JAX_PLATFORMS': platform, 'CUDA_VISIBLE_DEVICES': '0', **more}


def train(workdir, *fields, command=(sys.executable, '-m', 'gapjax'), **more):
  """A short training of digits through the command line; its summary, and what it said."""
  done = subprocess.run(
    [*command, 'train', '--config=configs/digits.py', f'--workdir={workdir}',
     f'--data_dir={workdir}/data', *(f'--config.{k}={v}' for k, v in FIELDS.items()), *fields],
    cwd=ROOT, env=environment('cuda', **more), capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  return json.loads((workdir / 'summary.json').read_text()), done.stderr


def test_gpu_local_trains_in_bfloat16_and_takes_memory_as_it_needs_it(tmp_path):
  environ = {'PATH': f'{os.path.dirname(sys.executable)}:{os.environ["PATH"]}'}
  summary, said = train(tmp_path, '--config.model.dtype=bfloat16',
                        command=('launch/gpu_local.sh',), **environ)
  assert 'XLA_PYTHON_CLIENT_PREALLOCATE=false' in said
  assert summary['device'].startswith('gpu x 1')
  lines = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
  losses = [line['loss'] for line in lines if line['split'] == 'train']
  assert np.isfinite(losses).all() and np.mean(losses[-3:]) < np.mean(losses[:3])


def test_deterministic_operations_give_the_same_bits_twice(tmp_path):
  states = []
  for name in ('once', 'again'):
    train(tmp_path / name, XLA_FLAGS='--xla_gpu_deterministic_ops=true')
    states.append(newest(tmp_path / name)[1])
  jax.tree.map(np.testing.assert_array_equal, *states)


def test_one_step_is_the_cpus_to_the_precision_of_float32(tmp_path):
  found = {}
  for platform in ('cpu', 'cuda'):
    subprocess.run([sys.executable, ROOT / 'tests/gpu/one_step.py', tmp_path / f'{platform}.npz',
                    *CASES], env=environment(platform), check=True)
    found[platform] = dict(np.load(tmp_path / f'{platform}.npz'))
  assert [str(x.pop('platform')) for x in found.values()] == ['cpu', 'gpu']
  for case in CASES:
    for quantity in parity.QUANTITIES:
      ours, theirs = ({name.rpartition('|')[2]: array for name, array in x.items()
                       if name.startswith(f'{case}|{quantity}|')} for x in found.values())
      assert theirs and parity.difference(ours, theirs)[1] <= parity.TOLERANCES['float32']
