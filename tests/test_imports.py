"""gapjax runs where TensorFlow is not, and does not load it where it is."""

from conftest import python

# Python's finder of installed modules no longer finds TensorFlow: as good as not installed.
BLOCKED = """
import importlib.machinery, importlib.util, sys

finder = importlib.machinery.PathFinder
find = finder.find_spec
finder.find_spec = lambda name, *rest: None if name.startswith('tensorflow.') or (
  name == 'tensorflow') else find(name, *rest)
assert importlib.util.find_spec('tensorflow') is None
import gapjax.cli
assert gapjax.cli.main(sys.argv[1:]) == 0
from gapjax import data
scenes = data.load_scenes('digit_scenes', split='test', data_dir=sys.argv[-1])
batches = data.training_batches(scenes, batch_size=2, seed=0, crop_size=(9, 9), scale=(1, 2),
                                flip=True, fill=(0, 0, 0))
assert next(batches.iterate())['images'].any()
assert not [name for name in sys.modules if name.partition('.')[0] == 'tensorflow']
"""


def test_training_and_scenes_without_tensorflow(tiny_file, tmp_path):
  """The digits and their scenes are prepared there, too."""
  python(BLOCKED, 'train', f'--config={tiny_file(num_epochs=1)}', f'--workdir={tmp_path}/run',
         '--data_dir', tmp_path)
  assert (tmp_path / 'run' / 'summary.json').exists()
