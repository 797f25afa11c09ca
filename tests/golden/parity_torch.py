"""Makes parity.npz: what PyTorch computes for every case of gapjax.pytorch.parity, in float64.

    pip install torch==2.13.0
    python tests/golden/parity_torch.py

Of each array of a quantity, in the order of their names, it keeps two sums with random signs and
the norm (parity.project): rows of an array (arrays, 3), by 'case|quantity'. The permutations and
the noise that gapjax drew are kept too ('case|permutation', 'case|noise'), so that a change of them
is not taken for one of the networks. Made with torch 2.13.0 on CPU.
"""

import pathlib

import jax
import numpy as np

from gapjax.pytorch import parity, reference


def quantities(case):
  run = parity.Candidate(case, 'float64')
  torch = reference.Reference(case, 'float64', run.draws)
  found = torch.one_step() | {rule: torch.train(rule) for rule in parity.OPTIMIZERS}
  yield from ((quantity, rows(arrays)) for quantity, arrays in found.items())
  for name, values in run.draws.items():
    yield name, values.astype(np.uint16) if name == 'permutation' else values


def rows(arrays):
  projected = parity.project(arrays)
  return np.stack([projected[name] for name in sorted(projected)])


if __name__ == '__main__':
  with jax.enable_x64(True):
    golden = {f'{case.name}|{quantity}': values for case in parity.cases()
              for quantity, values in quantities(case)}
  np.savez_compressed(pathlib.Path(__file__).parent / 'parity.npz', **golden)
