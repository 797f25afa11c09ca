"""AugShift on CIFAR-100, and what it is compared with (section 4, table 2).

    gapjax train --config=configs/augshift_cifar100.py --workdir=runs/augshift
    gapjax train --config=configs/augshift_cifar100.py:network=resnet18 --workdir=runs/baseline

Networks: those of recipes.SHIFT_NETWORKS; docs/use.md says what they are. With two crops the loss
is a sum over both, so the rate is half of the baseline's and the decay twice: choose by network=,
not by --config.augshift.crops.

Steps: 4,883 of batch 512 (50 epochs).
Time: not run as a whole; on a TPU v5e:2x2 a step of AugShift took 18.1 ms at least, with an
  earlier version (compiled for it, not run; results/compile).
Paper (top-1 / consistency, percent, no spread published): ResNet-18 72.6 / 70.1,
  BlurPool 72.4 / 78.2, AugShift 72.6 / 85.6.
Measured: not run at this scale. At scale small (results/table2; 1,563 steps of width 12, 5 to 20
  minutes on 1 or 2 CPU cores): ResNet-18 18.7 +- 0.2 / 60.6 +- 0.6, BlurPool 19.5 +- 1.6 /
  63.9 +- 1.8, AugShift 16.1 +- 0.7 / 75.0 +- 0.5, two seeds.
"""

from gapjax import config as configs
from gapjax import recipes
from gapjax.errors import check_choice


def get_config(arg=None):
  variant = configs.parse_arg(arg, network='augshift')
  check_choice(variant.network, recipes.SHIFT_NETWORKS, what='network')
  return recipes.shifted(variant.network, recipes.cifar('cifar100'))
