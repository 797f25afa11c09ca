"""Scikit-learn's digits on a canvas of 48 pixels, half a minute a network on 2 CPU cores.

    gapjax train --config=configs/digits.py --workdir=runs/digits
    gapjax train --config=configs/digits.py:network=permutenet,target=image --workdir=runs/permute

Networks: gapnet, permutenet, permutenet_fixed.

Steps: 583 of batch 48 (20 epochs).
Time: 21 to 25 s on 2 cores of an AMD EPYC.
Measured: results/ablations, one seed, so no spread; percent at every location with the final
  weights. Location: gapnet 100.0, permutenet 27.5, permutenet_fixed 100.0. Image: permutenet 21.9,
  permutenet_fixed 96.0. Another CPU rounds otherwise, which moves permutenet by a few points.
"""

from gapjax import config as configs
from gapjax import recipes
from gapjax.errors import check_choice


def get_config(arg=None):
  variant = configs.parse_arg(arg, network='gapnet', grid=3, target='location')
  check_choice(variant.network, recipes.NETWORKS, what='network')
  return recipes.on_canvas(variant.network, recipes.digits(), target=variant.target,
                           grid=variant.grid)
