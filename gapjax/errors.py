"""The one exception that means "the person made a mistake", not "the program did"."""

import difflib
import os


class UsageError(ValueError):
  """Bad input: the command line prints it as one line, without a traceback, and exits with 2.

  The message is one sentence that says what is wrong and what to do instead.
  """


def nearest(word, known):
  """' (did you mean `x`?)' when `word` resembles one of `known`, else ''."""
  match = difflib.get_close_matches(str(word), [str(k) for k in known], n=1)
  return f' (did you mean `{match[0]}`?)' if match else ''


def check_choice(value, known, *, what):
  """Raises UsageError with the nearest known name unless `value` is one of `known`."""
  if value not in known:
    raise UsageError(f'unknown {what} `{value}`{nearest(value, known)}; '
                     f'known: {", ".join(str(k) for k in known)}')


def first_line(error):
  """The first line of an exception's text, or its type: tarfile's and others' have several."""
  return str(error).partition('\n')[0].rstrip(':') or type(error).__name__


def refused_variable(error):
  """The variable of the environment that jax or Matplotlib cannot be imported with, or None."""
  said = str(error) if isinstance(error, ValueError) else ''
  return next((name for name, value in os.environ.items()
               if name.startswith(('JAX_', 'MPLBACKEND')) and value
               and any(f'{quote}{value}{quote}' in said for quote in '\'"')), None)


class TrainingFailed(Exception):
  """Training cannot go on: one line, exit code 1, checkpoints kept."""


class Diverged(TrainingFailed):
  """A loss, gradient or parameter is not finite: `found` says which. Exit code 3: the same command
  would find the same again."""

  def __init__(self, found: str):
    super().__init__(f'{found}: try a lower optimizer.lr, more schedule.warmup_epochs or an '
                     'optimizer.clip_norm, in a new workdir')


class CheckFailed(Exception):
  """What was to be shown does not hold: one line, exit code 1."""


class Interrupted(Exception):
  """SIGTERM, Ctrl-C or no time left: one line on what is saved; exit code 0 or 130."""

  def __init__(self, message, *, code):
    super().__init__(message)
    self.code = code
