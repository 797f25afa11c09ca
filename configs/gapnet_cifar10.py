"""GAPNet on a canvas of CIFAR-10, as the authors train it (section 3, table 1).

    gapjax train --config=configs/gapnet_cifar10.py --workdir=runs/gapnet
    gapjax train --config=configs/gapnet_cifar10.py:grid=7,target=image --workdir=runs/gapnet_7x7

Paper: location 100 at 3x3 and 7x7; image 82.6 at 3x3, 82.1 at 7x7 (percent, best of 20 epochs).
"""

from gapjax import config as configs


def get_config(arg=None):
  variant = configs.parse_arg(arg, grid=3, target='location')
  config = configs.default()
  config.canvas.update(variant)
  return config
