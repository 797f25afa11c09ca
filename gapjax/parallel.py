"""The only file that names pmap: wrap a step, place its arguments, bring its results home.

State, data and metrics are replicated and carry no device axis (`in_axes` and `out_axes` None);
batches are split along a leading device axis.
"""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gapjax.errors import UsageError

AXIS = 'devices'


class Devices:
  """The devices of a run. `Devices()` takes all local ones."""

  def __init__(self, devices=None):
    self.devices = list(devices or jax.local_devices())
    mesh = Mesh(np.asarray(self.devices), (AXIS,))
    self._replicated = NamedSharding(mesh, PartitionSpec())
    self._split = NamedSharding(mesh, PartitionSpec(AXIS))

  def __len__(self):
    return len(self.devices)

  @property
  def platform(self) -> str:
    return self.devices[0].platform

  def check_batch(self, batch_size: int) -> None:
    """Raises UsageError unless the devices can share a global batch equally."""
    n, over = len(self), batch_size % len(self)
    if over:
      below, above = batch_size - over, batch_size - over + n
      choice = f'{below} or {above}' if below else f'{above}'
      raise UsageError(f'batch_size {batch_size} cannot be shared by {n} devices; '
                       f'use {choice} (--config.batch_size={above})')

  def pmap(self, step, *, split: tuple[bool, ...], donate: int):
    """pmap of step(*args): split[i] says whether args[i] has a leading device axis.

    Results are replicated, so the step must have reduced whatever it returns over AXIS. Argument
    `donate` is given up.
    """
    return jax.pmap(step, axis_name=AXIS, in_axes=tuple(0 if s else None for s in split),
                    out_axes=None, devices=self.devices, donate_argnums=donate)

  def replicate(self, tree):
    """Host arrays -> the same arrays on every device."""
    return jax.device_put(tree, self._replicated)

  def split(self, tree, *, axis: int = 0):
    """Cuts the batch axis of arrays, one part for each device.

    (batch, ...) -> (devices, batch / devices, ...), and with axis 1 (steps, batch) -> (devices,
    steps, batch / devices).
    """
    def put(x):
      return jax.device_put(np.stack(np.split(x, len(self), axis)), self._split)
    return jax.tree.map(put, tree)

  @staticmethod
  def to_host(tree):
    """Replicated device arrays -> numpy arrays (also what orbax can save from any process).

    Copies: on CPU a view would be overwritten once the state is donated to the next step.
    """
    return jax.tree.map(lambda x: np.array(x.addressable_data(0)), tree)
