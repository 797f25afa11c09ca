"""PermuteNet on a canvas of CIFAR-10, as the authors train it (section 3, table 1).

    gapjax train --config=configs/permutenet_cifar10.py --workdir=runs/permutenet
    gapjax train --config=configs/permutenet_cifar10.py:permutation=fixed --workdir=runs/control

Paper: location 78.8 at 3x3, 21.4 at 7x7; image 73.6 at 3x3, 69.9 at 7x7 (percent, best of 20
epochs). With a fixed permutation, the control, it should do as well as without any.
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
