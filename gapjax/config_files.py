"""Config files: Python files with a get_config, a person's own or those that come with gapjax."""

import contextlib
import os
import pathlib
import runpy
import sys

from ml_collections import ConfigDict

from gapjax.errors import UsageError, nearest


def find_file(name: str) -> str:
  """The path of a config file: `name`, or where that config is that comes with gapjax.

  'gapnet_cifar10', and also 'configs/gapnet_cifar10.py' where there is no such file.

  Raises UsageError with the nearest name.
  """
  here, named = pathlib.Path(__file__).parent, pathlib.Path(name).expanduser()
  if named.is_file():
    return str(named)
  folders = (here / 'configs', here.parent / 'configs')  # installed from a wheel, a clone
  folder = next(filter(pathlib.Path.is_dir, folders))
  shipped = {path.stem: str(path) for path in sorted(folder.glob('*.py'))}
  if named.stem not in shipped or str(named.parent) not in ('.', 'configs'):
    raise UsageError(f'no config file `{name}`{nearest(named.stem, shipped)}; with gapjax come '
                     f'{", ".join(shipped)}')
  return shipped[named.stem]


def from_file(name: str) -> ConfigDict:
  """What `get_config` of a config 'FILE[:variant]' (`find_file`) returns, not validated.

  Raises UsageError when the file is missing, fails, or makes no ConfigDict.
  """
  path, _, variant = name.partition(':')
  path = find_file(path)
  try:
    with _importable(os.path.dirname(os.path.abspath(path))):
      get_config = runpy.run_path(path).get('get_config', lambda arg=None: None)
      made = get_config(*filter(None, [variant]))
  except UsageError:
    raise
  except Exception as error:  # whatever the person's own file raises
    raise UsageError(f'--config={name} fails: {type(error).__name__}: {error}') from error
  if not isinstance(made, ConfigDict):
    raise UsageError(f'{path} has no function get_config that returns a ConfigDict; begin it with '
                     'gapjax.config.default(), as the files in configs/ do')
  return ConfigDict(made.to_dict())


@contextlib.contextmanager
def _importable(folder):
  """Inside, what lies in the folder can be imported, as a script's neighbours can; and after it
  those of another folder, by the same names."""
  modules, places = set(sys.modules), list(sys.path)
  sys.path.insert(0, folder)
  try:
    yield
  finally:
    sys.path[:] = places
    for name in set(sys.modules) - modules:
      if os.path.dirname(getattr(sys.modules[name], '__file__', None) or '') == folder:
        del sys.modules[name]
