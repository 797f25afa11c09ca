"""PermuteNet on a canvas of CIFAR-10, as the authors train it (section 3, table 1).

    gapjax train --config=configs/permutenet_cifar10.py --workdir=runs/permutenet
    gapjax train --config=configs/permutenet_cifar10.py:permutation=fixed --workdir=runs/control

With a fixed permutation, the control, it should do as well as without any.

Steps: 20,834 of batch 48 (20 epochs).
Time: as long as GAPNet's (configs/gapnet_cifar10.py); on a TPU v5e:2x2 a step of an earlier
  version took 6.1 ms at least (compiled for it, not run; results/compile).
Paper: location 78.8 at 3x3, 21.4 at 7x7; image 73.6 at 3x3, 69.9 at 7x7 (percent, best of 20
  epochs, no spread published).
Measured: in bfloat16 (results/table1_full), location 67.0, six of the nine places, and image 47.5
  at 3x3, one seed. At scale small (results/table1; 2,084 steps of width 16 in 2 to 14 minutes on 1
  or 2 CPU cores): location 37.2 +- 0.3, image 21.2 +- 4.5 at 3x3, two seeds.
"""

from gapjax import config as configs


def get_config(arg=None):
  variant = configs.parse_arg(arg, grid=3, target='location', permutation='batch',
                              permute_at='pooled')
  config = configs.default()
  config.canvas.update(grid=variant.grid, target=variant.target)
  config.model.update(head='permuted', permutation=variant.permutation,
                      permute_at=variant.permute_at)
  return config
