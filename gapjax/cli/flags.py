"""How verbs are declared: types of arguments, the flags that they share, `verb`."""

import argparse
import math
import os

from gapjax import paths
from gapjax.errors import UsageError


class Parser(argparse.ArgumentParser):
  """argparse whose mistakes are one line."""

  def error(self, message):
    raise UsageError(f'{message} ({self.prog} --help)')


def local(path):
  """A file or folder on this machine, `~` expanded."""
  if not path:  # such as of an unset variable; pathlib takes it for the current folder
    raise argparse.ArgumentTypeError('is empty; name a file or folder, such as `.`, the current '
                                     'folder')
  if '://' in path:
    raise argparse.ArgumentTypeError(f'{path}: remote folders are not supported here; give a local '
                                     'path')
  return os.path.expanduser(path)


def folder(path):
  """A folder on this machine, as `local` has it, or in a bucket."""
  try:
    return os.fspath(paths.of(path)) if '://' in path else local(path)
  except UsageError as error:  # a ValueError, of which argparse would not give the words
    raise argparse.ArgumentTypeError(str(error)) from None


def positive(text):
  """A whole number from 1 on."""
  number = int(text)
  if number < 1:
    raise argparse.ArgumentTypeError(f'must be at least 1, not {number}')
  return number


def duration(text):
  """Minutes, more than none."""
  number = float(text)
  if not 0 < number < math.inf:
    raise argparse.ArgumentTypeError(f'must be above 0, not {text}')
  return number


def given(text):
  """Words that are there: those of an unset variable would count as a flag that is left out."""
  if not text:
    raise argparse.ArgumentTypeError('is empty; give a value, or leave it out')
  return text


def flag(*names, **how):
  """What argparse's add_argument takes."""
  return names, how if 'action' in how else {'type': given, **how}


WORKDIR = flag('--workdir', required=True, type=folder,
               help='folder of the run, or gs://BUCKET/FOLDER')
DATA = flag('--data_dir', type=local, help='folder of all datasets (default: TFDS_DATA_DIR, '
            'else ~/tensorflow_datasets)')
OUTPUT = flag('--output', metavar='FILE', type=local, help='write everything as JSON')
CONFIG = flag('--config', metavar='FILE[:variant]', help='such as '
              'configs/gapnet_cifar10.py:grid=7; set any field of it with --config.FIELD=VALUE '
              '(all fields: gapjax/config.py)')
# Flags that only gapjax/config.py knows, as --help tells of them: a verb gets them unparsed.
NEURONS = ('--config.neurons.FIELD=VALUE sets how channels are ranked and removed, other than the '
           "run's config.json says (fields: gapjax/config.py)")
VERBS = {}  # name -> what runs it with a list of arguments


def verb(*flags, fields=None):
  """Makes a function the verb of its name, and its first argument what these flags say.

  fields: None, or what --help says of the --config.FIELD=VALUE flags, with --config=FILE itself the
  function's second argument.
  """
  def register(run):
    def parse_and_run(argv):
      parser = Parser(prog=f'gapjax {run.__name__}', allow_abbrev=False, epilog=fields)
      for names, how in flags:
        parser.add_argument(*names, **how)
      if fields is None:
        return run(parser.parse_args(argv))
      # argparse takes an unknown flag with a space in its value for one more value of a list.
      set_here = [argument for argument in argv if argument.startswith('--config.')]
      arguments, others = parser.parse_known_args([x for x in argv if x not in set_here])
      chosen = [*set_here, *others]
      if getattr(arguments, 'config', None):
        chosen = [f'--config={arguments.config}', *chosen]
      return run(arguments, chosen)

    VERBS[run.__name__] = parse_and_run
    return run
  return register


def check_output(path):
  """Raises UsageError where --output cannot be written in the end, before what takes minutes."""
  if path and not os.path.isdir(os.path.dirname(path) or '.'):
    raise UsageError(f'--output={path}: there is no such folder; make it first')
  if path and os.path.isdir(path):
    raise UsageError(f'--output={path} is a folder; name a file in it')
  if path:
    paths.check_writable(os.path.dirname(path) or '.')
