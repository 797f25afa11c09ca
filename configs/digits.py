"""The quickstart's networks: scikit-learn's digits on a canvas, a minute each on a laptop CPU.

    gapjax train --config=configs/digits.py --workdir=runs/digits
    gapjax train --config=configs/digits.py:network=permutenet,target=image --workdir=runs/permute

Networks: gapnet, permutenet, permutenet_fixed. What to expect: the table in the README.
"""

from gapjax import config as configs
from gapjax.errors import check_choice
from gapjax.reproduce import cells


def get_config(arg=None):
  variant = configs.parse_arg(arg, network='gapnet', grid=3, target='location')
  check_choice(variant.network, cells.NETWORKS, what='network')
  return cells.canvas_cell(variant.network, variant.target, variant.grid, cells.digits()).config
