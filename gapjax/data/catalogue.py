"""The datasets by name, and how many classes each has."""

IMAGES = ('cifar10', 'cifar100', 'digits')  # one label an image
SCENES = ('voc2012', 'cityscapes', 'camvid', 'digit_scenes')  # a class for every pixel
NAMES = IMAGES + SCENES

# How many classes each has, where it need not be on this machine to say so.
CLASSES = {'cifar10': 10, 'cifar100': 100, 'digits': 10, 'voc2012': 21, 'cityscapes': 19,
           'camvid': 11, 'digit_scenes': 11}
VOID = 255  # the label of pixels that count nowhere
