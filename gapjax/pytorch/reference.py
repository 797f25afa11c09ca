"""The quantities of gapjax.pytorch.parity as PyTorch computes them, and their differences."""

import logging

import jax
import numpy as np
import torch

from gapjax import paths
from gapjax.config import replaced
from gapjax.errors import CheckFailed
from gapjax.pytorch import parity, recipe, twin, twin_layers
from gapjax.report.render import markdown_table
from gapjax.training.system import describe_devices, versions
from gapjax.weights import names

log = logging.getLogger(__name__)


class Reference:
  """A case in PyTorch, from the same weights and batches; draws: a Candidate's, of this dtype."""

  def __init__(self, case: parity.Case, dtype: str, draws: dict[str, np.ndarray]):
    self.case, self.dtype = case, getattr(torch, dtype)
    self.draws = draws
    # Small networks, and often another process beside: threads would wait for one another, up to
    # a hundred times longer than they compute.
    torch.set_num_threads(1)

  def network(self):
    network = twin.create_twin(self.case.config.model, num_classes=self.case.num_classes)
    missing, _ = network.load_state_dict(
      {name: torch.as_tensor(x) for name, x in parity.draw_weights(self.case).items()},
      strict=False)
    if unmapped := set(missing) - set(names.unread(self.case.config.model)):
      raise ValueError(f'the name map does not have {sorted(unmapped)}')
    return network.to(self.dtype).train()

  def backward(self, network, number: int):
    """Loss and logits of the batch of that number; gradients stand in the network."""
    batch = {name: torch.as_tensor(x).to(self.dtype if x.dtype == float else torch.int64)
             for name, x in parity.draw_batch(self.case, number).items()}
    for name in ('canvases', 'images'):
      if name in batch:
        batch[name] = batch[name].movedim(-1, -3).contiguous()
    drawn = {name: torch.as_tensor(values[number].astype(np.int64) if name == 'permutation' else
                                   values[number]) for name, values in self.draws.items()}
    twin_layers.anneal(network, number / parity.STEPS, drawn.get('noise'))
    network.zero_grad()
    loss, logits = recipe.loss_of(network, batch, self.case.config, drawn.get('permutation'))
    loss.backward()
    return loss, logits

  def one_step(self) -> dict[str, dict[str, np.ndarray]]:
    network = self.network()
    loss, logits = self.backward(network, 0)
    return {
      'logits': {'logits': logits.detach().numpy()}, 'loss': {'loss': loss.detach().numpy()},
      'gradients': {name: p.grad.numpy() for name, p in network.named_parameters()
                    if p.grad is not None},
      'statistics': {name: x.numpy() for name, x in network.named_buffers()
                     if not name.endswith('num_batches_tracked')}}

  def train(self, rule: str) -> dict[str, np.ndarray]:
    network = self.network()
    optimizer = recipe.create_optimizer(network, replaced(self.case.config,
                                                          optimizer=parity.OPTIMIZERS[rule]))
    for number in range(parity.STEPS):
      self.backward(network, number)
      optimizer.step()
    return {name: p.detach().numpy() for name, p in network.named_parameters()
            if p.grad is not None}


def measure(case: parity.Case) -> dict[str, tuple[float, float]]:
  """The largest absolute and relative difference of each of parity.COLUMNS."""
  differences = {}
  for dtype in parity.TOLERANCES:
    # An accelerator would else multiply in TensorFloat-32 or bfloat16.
    with jax.enable_x64(dtype == 'float64'), jax.default_matmul_precision('highest'):
      candidate = parity.Candidate(case, dtype)
      reference = Reference(case, dtype, candidate.draws)
      ours, theirs = candidate.one_step(), reference.one_step()
      differences |= {f'{quantity}, {dtype}': parity.difference(ours[quantity], theirs[quantity])
                      for quantity in parity.QUANTITIES}
      if dtype == 'float64':
        differences |= {f'{rule}, {parity.STEPS} steps, float64': parity.difference(
          candidate.train(rule), reference.train(rule)) for rule in parity.OPTIMIZERS}
  return differences


def check(config, *, output=None) -> None:
  """Prints the tables of differences, and writes them to `output`, a path of JSON, if it is given.

  config: of one network, or None for parity.cases(). Raises CheckFailed where one is more than
  rounding; nothing is written then.
  """
  differences = {}
  for case in [parity.of_config('config', config)] if config else parity.cases():
    log.info('%s', case.name)
    differences[case.name] = measure(case)
  print('\n\n'.join(map(markdown_table, parity.tables(differences))))
  bad = {name: columns for name, row in differences.items()
         if (columns := parity.too_large(row, kinks=config is not None))}
  if bad:
    raise CheckFailed('more than rounding: ' + '; '.join(
      f'{name}: {", ".join(columns)}' for name, columns in bad.items()))
  if output:
    paths.write_json(output, {
      'device': describe_devices(jax.local_devices()[:1]),
      'versions': {**versions(), 'torch': torch.__version__}, 'networks': differences})
