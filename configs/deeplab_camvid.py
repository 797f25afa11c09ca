"""DeepLabv3-ResNet-50 on CamVid, from scratch, to be attacked (section 5).

    gapjax prepare camvid --source=PATH
    gapjax train --config=configs/deeplab_camvid.py --workdir=runs/camvid
    gapjax train --config=configs/deeplab_camvid.py:scale=small --workdir=runs/camvid_small
    gapjax attack --workdir=runs/camvid_small

CamVid (701 street scenes, 11 classes) stands in for Cityscapes: the paper has no numbers for it.
"""

from gapjax import config as configs
from gapjax import recipes
from gapjax.errors import check_choice


def get_config(arg=None):
  variant = configs.parse_arg(arg, scale='full')
  check_choice(variant.scale, ('full', 'small'), what='scale')
  return recipes.camvid(variant.scale)
