"""AugShift on CIFAR-10, and what it is compared with (section 4, table 2).

    gapjax train --config=configs/augshift_cifar10.py --workdir=runs/augshift
    gapjax train --config=configs/augshift_cifar10.py:network=resnet18 --workdir=runs/baseline

Networks: those of recipes.SHIFT_NETWORKS; docs/use.md says what they are. With two crops the loss
is a sum over both, so the rate is half of the baseline's and the decay twice: choose by network=,
not by --config.augshift.crops.

Steps: 2,540 of batch 512 (26 epochs).
Time: in bfloat16 on one H200 ResNet-18 and BlurPool took 204 and 149 s, most of them to
  compile; on a TPU v5e:2x2 a step of AugShift took 18.1 ms at least, with an earlier version
  (compiled for it, not run; results/compile).
Paper (top-1 / consistency, percent, no spread published): ResNet-18 93.1 / 90.8,
  BlurPool 92.5 / 92.5, AugShift 92.1 / 94.8.
Measured: in bfloat16 (results/table2_full), ResNet-18 93.1 / 96.0, BlurPool 93.7 / 96.9, one seed;
  AugShift has not ended yet at this scale. At scale small (results/table2; 1,563 steps of width
  12, 3 to 12 minutes on 1 or 2 CPU cores): ResNet-18 61.7 +- 1.4 / 79.5 +- 1.3, BlurPool 66.0 +-
  0.5 / 85.1 +- 1.0, AugShift 63.2 +- 1.1 / 85.4 +- 1.2, three seeds.
"""

from gapjax import config as configs
from gapjax import recipes
from gapjax.errors import check_choice


def get_config(arg=None):
  variant = configs.parse_arg(arg, network='augshift')
  check_choice(variant.network, recipes.SHIFT_NETWORKS, what='network')
  return recipes.shifted(variant.network, recipes.cifar('cifar10'))
