"""The quickstart's networks: scikit-learn's digits on a canvas, a minute each on a laptop CPU.

    gapjax train --config=configs/digits.py --workdir=runs/digits
    gapjax train --config=configs/digits.py:network=permutenet,target=image --workdir=runs/permute

Networks: gapnet, permutenet, permutenet_fixed. What to expect: the table in the README.
"""

from gapjax import config as configs
from gapjax import recipes
from gapjax.errors import check_choice


def get_config(arg=None):
  variant = configs.parse_arg(arg, network='gapnet', grid=3, target='location')
  check_choice(variant.network, recipes.NETWORKS, what='network')
  return recipes.on_canvas(variant.network, recipes.digits(), target=variant.target,
                           grid=variant.grid)
