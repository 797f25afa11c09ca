"""gapjax: where position hides after global average pooling, in JAX/Flax.

Islam*, Kowal*, Jia, Derpanis, Bruce: *Global Pooling, More than Meets the Eye: Position Information
is Encoded Channel-Wise in CNNs*, ICCV 2021, arXiv 2108.07884.

For networks of your own, docs/your_own_network.md has an example of each:

    from gapjax import augshift_loss, pair_distance, random_shifts, consistency   # section 4
    from gapjax import BlurPool, AdaptivePolyphase, GAPHead, PermuteHead          # sections 3, 4
    from gapjax import rank, attack                                               # section 5
"""

import importlib

__version__ = '0.2.0'

# The module that holds each public name. It is loaded when the name is first used, so that
# `import gapjax` costs nothing.
_MODULES = {
  'augshift_loss': 'tasks.augshift', 'pair_distance': 'tasks.augshift',
  'random_shifts': 'tasks.augshift', 'consistency': 'tasks.consistency',
  'BlurPool': 'models.downsample', 'AdaptivePolyphase': 'models.downsample',
  'GAPHead': 'models.heads', 'PermuteHead': 'models.heads',
  'rank': 'neurons.rank', 'attack': 'neurons.attack', 'UsageError': 'errors'}
__all__ = [*_MODULES]  # noqa: PLE0604 (they are strings)


def __getattr__(name):
  if name not in _MODULES:
    raise AttributeError(f'module `gapjax` has no attribute `{name}`')
  value = getattr(importlib.import_module(f'gapjax.{_MODULES[name]}'), name)
  globals()[name] = value
  return value


def __dir__():
  return [*globals(), *_MODULES]
