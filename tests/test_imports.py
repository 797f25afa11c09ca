"""gapjax runs where TensorFlow is not, and does not load it where it is."""

import subprocess
import sys

from conftest import ROOT

# Python's finder of installed modules no longer finds TensorFlow: as good as not installed.
BLOCKED = """
import importlib.machinery, importlib.util, sys

finder = importlib.machinery.PathFinder
find = finder.find_spec
finder.find_spec = lambda name, *rest: None if name.startswith('tensorflow.') or (
  name == 'tensorflow') else find(name, *rest)
assert importlib.util.find_spec('tensorflow') is None
import gapjax.cli
code = gapjax.cli.main(sys.argv[1:])
assert not [name for name in sys.modules if name.partition('.')[0] == 'tensorflow']
sys.exit(code)
"""


def test_training_without_tensorflow(tmp_path, data_dir):
  done = subprocess.run(
    [sys.executable, '-c', BLOCKED, 'train', f'--config={ROOT}/configs/digits.py',
     f'--workdir={tmp_path}', f'--data_dir={data_dir}', '--config.num_epochs=1',
     '--config.data.train_images=96', '--config.model.width=4', '--config.eval.images=10'],
    capture_output=True, text=True, check=False, cwd=ROOT, timeout=240)
  assert done.returncode == 0, done.stderr
  assert (tmp_path / 'summary.json').exists()


def test_help_is_quick():
  """The command line's help loads neither jax nor TFDS."""
  code = ('import sys, gapjax.cli; gapjax.cli.main(["--help"]); '
          'assert not {"jax", "tensorflow_datasets"} & set(sys.modules)')
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=False,
                        cwd=ROOT, timeout=60)
  assert done.returncode == 0, done.stderr
