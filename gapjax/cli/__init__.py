"""The command line: `main`, and the verbs by name."""

from gapjax.cli.flags import VERBS
from gapjax.cli.verbs import main

__all__ = ['VERBS', 'main']
