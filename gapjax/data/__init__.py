"""Data sets as arrays: CIFAR-10, CIFAR-100, the embedded digits, and any folder TFDS prepared.

Importing this costs nothing: TFDS, scikit-learn and Pillow load on first use, TensorFlow never.
"""

from gapjax.data.images import NAMES, ImageDataset, check, load, normalisation, prepare

__all__ = ['NAMES', 'ImageDataset', 'check', 'load', 'normalisation', 'prepare']
