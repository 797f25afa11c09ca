"""Datasets: images with one label, scenes with a class for every pixel, folders TFDS prepared.

Importing this costs nothing: TFDS, Grain, scikit-learn and Pillow load on first use, TensorFlow
never.
"""

from gapjax.data.catalogue import CLASSES, NAMES
from gapjax.data.disk import prepare
from gapjax.data.images import ImageDataset, check, load_images, normalisation
from gapjax.data.scenes import Scenes, load_scenes, training_batches

__all__ = ['CLASSES', 'NAMES', 'ImageDataset', 'Scenes', 'check', 'load_images', 'load_scenes',
           'normalisation', 'prepare', 'training_batches']
