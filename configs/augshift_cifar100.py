"""AugShift on CIFAR-100, and what it is compared with (section 4, table 2).

    gapjax train --config=configs/augshift_cifar100.py --workdir=runs/augshift
    gapjax train --config=configs/augshift_cifar100.py:network=resnet18 --workdir=runs/baseline

Networks: resnet18 (the baseline), blurpool, aps, two_crops (AugShift's two crops at weight 0),
augshift, augshift_blurpool, augshift_aps. With two crops the loss is a sum over both, so the rate
is half of the baseline's and the decay twice: choose by network=, not by --config.augshift.crops.
Paper (top-1 / consistency, percent): ResNet-18 72.6 / 70.1, BlurPool 72.4 / 78.2,
AugShift 72.6 / 85.6.
"""

from gapjax import config as configs
from gapjax import recipes
from gapjax.errors import check_choice


def get_config(arg=None):
  variant = configs.parse_arg(arg, network='augshift')
  check_choice(variant.network, recipes.SHIFT_NETWORKS, what='network')
  return recipes.shifted(variant.network, recipes.cifar('cifar100'))
