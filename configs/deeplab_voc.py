"""DeepLabv3-ResNet-50 on VOC 2012, 30,000 steps, by the authors' schedule (section 5).

    gapjax prepare voc2012 --source=PATH
    gapjax train --config=configs/deeplab_voc.py --workdir=runs/voc
    gapjax train --config=configs/deeplab_voc.py:train=train_aug --workdir=runs/voc_aug
    gapjax attack --workdir=runs/voc

The backbone starts from random weights; `--config.model.pretrained=resnet50.pth` starts it from a
file of torchvision's (.pth, which needs PyTorch, .safetensors or .npz). train=train_aug needs
SegmentationClassAug and its list when the set is prepared.

Steps: 30,012 of batch 16 (328 epochs); train=train_aug 29,762 (45 epochs).
Time: not run; on a TPU v5e:2x2 a step takes at least 102 ms (compiled for it, not run;
  results/compile).
Paper: curves without values.
Measured: not run.
"""

from gapjax import config as configs
from gapjax import recipes
from gapjax.errors import check_choice

# 30,000 steps of batch 16, in whole passes over 1,464 or 10,582 images.
EPOCHS = {'train': 328, 'train_aug': 45}


def get_config(arg=None):
  variant = configs.parse_arg(arg, train='train')
  check_choice(variant.train, EPOCHS, what='train')
  config = recipes.deeplab('voc2012')
  config.data.train_split = variant.train
  config.optimizer.lr = 0.01  # the default of the authors' script, whose run of Cityscapes has 0.1
  config.num_epochs = EPOCHS[variant.train]
  config.neurons.update(split=variant.train, classes=('person',))
  return config
