"""GAPNet on a canvas of CIFAR-10, as the authors train it (section 3, table 1).

    gapjax train --config=configs/gapnet_cifar10.py --workdir=runs/gapnet
    gapjax train --config=configs/gapnet_cifar10.py:grid=7,target=image --workdir=runs/gapnet_7x7

Steps: 20,834 of batch 48 (20 epochs).
Time: in bfloat16 on one H200 two minutes at 3x3, a quarter to compile. A step took 2.1 s on 2
  cores of an AMD EPYC with an earlier version (results/bench), which makes 12 hours without
  evaluations; on a TPU v5e:2x2 an earlier version took 6.1 ms at least (compiled for it, not
  run; results/compile).
Paper: location 100 at 3x3 and 7x7; image 82.6 at 3x3, 82.1 at 7x7 (percent, best of 20 epochs, no
  spread published).
Measured: in bfloat16 (results/table1_full), image 81.7 at 3x3, one seed. At scale small
  (results/table1; 2,084 steps of width 16 in 2 to 14 minutes on 1 or 2 CPU cores): location
  100.0 +- 0.0, image 54.1 +- 1.6 at 3x3, two seeds.
"""

from gapjax import config as configs


def get_config(arg=None):
  variant = configs.parse_arg(arg, grid=3, target='location')
  config = configs.default()
  config.canvas.update(variant)
  return config
