"""DeepLabv3-ResNet-50 on Cityscapes, 30,000 steps, by the authors' schedule (section 5).

    gapjax prepare cityscapes --source=PATH
    gapjax train --config=configs/deeplab_cityscapes.py --workdir=runs/cityscapes
    gapjax attack --workdir=runs/cityscapes

The backbone starts from random weights; `--config.model.pretrained=resnet50.pth` starts it from a
file of torchvision's (.pth, which needs PyTorch, .safetensors or .npz).

Steps: 29,936 of batch 16 (161 epochs).
Time: not run; on a TPU v4:2x2x2 a step takes at least 60 ms (compiled for it, not run;
  results/compile).
Paper: curves without values. Removing the top-N position channels hurts mIoU far more than removing
  N random ones does, and left channels hurt the left half more than right ones do.
Measured: not run.
"""

from gapjax import recipes


def get_config():
  config = recipes.deeplab('cityscapes')
  config.num_epochs = 161  # 30,000 steps of batch 16 over 2,975 images
  # 768: of VainF's DeepLabV3Plus-Pytorch, from which the authors' code comes; 513 is its default.
  config.segmentation.update(crop=(768, 768), scale=(1.0, 1.0))
  config.neurons.classes = ('person', 'rider')
  return config
