"""One training step of parity's networks on whatever jax finds, in float32; its results as .npz.

    JAX_PLATFORMS=cuda python tests/gpu/one_step.py OUT.npz 'GAPNet' 'GAPNet, width 64'
"""

import sys

import jax
import numpy as np

from gapjax.pytorch import parity

if __name__ == '__main__':
  out, *wanted = sys.argv[1:]
  with jax.default_matmul_precision('highest'):  # no TensorFloat-32
    found = {f'{case.name}|{quantity}|{name}': array for case in parity.cases()
             if case.name in wanted
             for quantity, arrays in parity.Candidate(case, 'float32').one_step().items()
             for name, array in arrays.items()}
  np.savez(out, platform=jax.default_backend(), **found)
