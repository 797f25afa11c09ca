"""The twin's tables (twin.py), written out: gapjax's own are what they are checked against."""

# He et al. 2016: (blocks a stage, is the block a bottleneck). Strides of the four stages.
RESNETS = {'resnet10': ((1, 1, 1, 1), False), 'resnet18': ((2, 2, 2, 2), False),
           'resnet34': ((3, 4, 6, 3), False), 'resnet50': ((3, 4, 6, 3), True),
           'resnet101': ((3, 4, 23, 3), True)}
STRIDES = (1, 2, 2, 2)
# (kernel, stride, is a 3x3 max-pool with stride 2 behind it).
STEMS = {'canvas': (7, 2, False), 'cifar': (3, 1, False), 'imagenet': (7, 2, True)}
# Simonyan & Zisserman 2015: convolutions a stage, and its channels over the first stage's.
VGGS = {'vgg11': (1, 1, 2, 2, 2), 'vgg16': (2, 2, 3, 3, 3)}
MULTIPLES = (1, 2, 4, 8, 8)
# Sandler et al. 2018, table 2: (expansion, channels, blocks, stride); which end a stage here.
INVERTED = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1),
            (6, 160, 3, 2), (6, 320, 1, 1))
STAGE_ENDS = (24, 32, 96, 320)
# Tan & Le 2019, table 1, by their strings: blocks, kernel, stride, expansion, channels in and out.
LITE = ('r1_k3_s1_e1_i32_o16', 'r2_k3_s2_e6_i16_o24', 'r2_k5_s2_e6_i24_o40',
        'r3_k3_s2_e6_i40_o80', 'r3_k5_s1_e6_i80_o112', 'r4_k5_s2_e6_i112_o192',
        'r1_k3_s1_e6_i192_o320')
LITE_ENDS = (24, 40, 112, 320)
# Chen et al. 2017: output stride -> dilations of ASPP's 3x3 branches.
RATES = {8: (12, 24, 36), 16: (6, 12, 18)}
# Zhang 2019: rows of Pascal's triangle.
BINOMIAL = {1: (1,), 2: (1, 1), 3: (1, 2, 1), 4: (1, 3, 3, 1), 5: (1, 4, 6, 4, 1)}
# Paddings that copy pixels -> numpy.pad's names; the others write zeros.
NUMPY_MODES = {'reflect': 'reflect', 'replicate': 'edge', 'circular': 'wrap'}


def mobile_channels(usual, width):
  """torchvision's: the nearest multiple of 8, and the next where that is over a tenth too few."""
  exact = usual * width / 64
  nearest = max(8, 8 * int(exact / 8 + 0.5))
  return nearest if nearest >= 0.9 * exact else nearest + 8
