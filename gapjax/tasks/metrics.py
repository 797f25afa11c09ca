"""Metrics of training as (sum, count), which add over devices and batches."""

from clu.metrics import Average


def averages(mask=None, **values) -> dict[str, Average]:
  """The mean of each of the values (n,) by its name, over those where mask (n,) is true."""
  return {name: Average.from_model_output(x, mask=mask) for name, x in values.items()}
