"""TrainState and the pure training and evaluation steps: no pmap, no input or output here.

Training's randomness is a function of (seed, step, position in the global batch) alone, so that a
resumed run repeats itself and the number of devices changes nothing but rounding.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import lax

# Streams folded into the run's key.
INIT, ORDER, TRAIN, EVAL = range(4)
# Rng streams of a network in training.
STREAMS = ('permutation', 'dropout', 'gumbel')


@struct.dataclass
class TrainState:
  """Everything that training changes."""
  step: jax.Array  # int32 (), steps taken
  params: Any
  batch_stats: Any
  opt_state: Any


def stream(seed: int, name: int) -> jax.Array:
  """The key of one stream (INIT, ORDER, TRAIN, EVAL) of a run."""
  return jax.random.fold_in(jax.random.key(seed), name)


def create_state(model: nn.Module, optimizer: optax.GradientTransformation, *, seed: int,
                 image_shape: tuple[int, int, int], dtype) -> TrainState:
  """Initialises the network for (h, w, 3) inputs, under jit (pmap needs a mapped argument)."""

  def init(key):
    variables = model.init(key, jnp.zeros((1, *image_shape), dtype), train=True)
    params = variables['params']
    return TrainState(jnp.zeros((), jnp.int32), params, variables['batch_stats'],
                      optimizer.init(params))

  # On CPU, LLVM takes seconds over the random bits of a small ResNet, at level 1 a third of them,
  # at level 0 a sixth; drawing ResNet-50's takes 2 s then, not 0.4.
  options = {'xla_backend_optimization_level': 0} if jax.default_backend() == 'cpu' else None
  return jax.jit(init, compiler_options=options)(stream(seed, INIT))


class TrainingNetwork:
  """A model as a task's loss calls it: network(images) -> (logits, features), in training mode.

  Each call moves BatchNorm's running averages, `batch_stats`, on from where the last one left them.
  All calls of a step share its permutation, its dropout and its noise. What depends on the step
  itself reads it in the variables `step` (layers.of_step): its number, and the place of every image
  in the global batch.

  Args:
    draws: the key of all rng streams.
    number: steps taken before, ().
    places: of this device's examples (b,) in the global batch, of `batch_size` examples. Where
      images are several views of them, all of one view come before the next one's.
  """

  def __init__(self, model, params, batch_stats, draws, *, number, places, batch_size):
    self._apply = lambda batch_stats, images, places: model.apply(
      {'params': params, 'batch_stats': batch_stats, 'step': {'number': number, 'places': places}},
      images, train=True, mutable=['batch_stats'], rngs=dict.fromkeys(STREAMS, draws))
    self.batch_stats, self._places, self._batch_size = batch_stats, places, batch_size

  def __call__(self, images):
    views = jnp.arange(len(images) // len(self._places))[:, None]
    outputs, updates = self._apply(self.batch_stats, images,
                                   (views * self._batch_size + self._places).ravel())
    self.batch_stats = updates['batch_stats']
    return outputs


def make_train_step(model, task, optimizer, *, axis_name: str):
  """A function (state, key, data, examples) -> (state, metrics) for one device's share of a batch.

  key is the run's TRAIN stream (an argument, so that runs of all seeds are one program); data
  is what of the training set lies on the device (Task.resident); examples (b, ...) are this
  device's: their indices, or a tree of the examples themselves. Gradients, metrics and, when the
  model does not synchronise them itself, BatchNorm's running statistics are averaged over
  `axis_name`. metrics: {'batch': task's metrics, 'grad_norm': ()}.
  """

  def train_step(state, key, data, examples):
    b = jax.tree.leaves(examples)[0].shape[0]
    augment, draws = jax.random.split(jax.random.fold_in(key, state.step))
    places = lax.axis_index(axis_name) * b + jnp.arange(b)  # in the global batch
    keys = jax.vmap(jax.random.fold_in, (None, 0))(augment, places)
    batch = task.train_batch(keys, data, examples)

    def loss_of(params):
      network = TrainingNetwork(model, params, state.batch_stats, draws, number=state.step,
                        places=places, batch_size=b * lax.axis_size(axis_name))
      loss, metrics = task.loss(network, batch, state.step)
      return loss, (metrics, network.batch_stats)

    gradients, (metrics, batch_stats) = jax.grad(loss_of, has_aux=True)(state.params)
    gradients, batch_stats = lax.pmean((gradients, batch_stats), axis_name)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    state = TrainState(state.step + 1, optax.apply_updates(state.params, updates), batch_stats,
                       opt_state)
    return state, {'batch': lax.psum(metrics, axis_name),
                   'grad_norm': optax.tree.norm(gradients)}

  return train_step


def many(train_step):
  """Takes `count` of K steps in one dispatch: examples (K, b, ...), metrics with a leading axis K,
  whose rows from `count` on are zeros.

  `count`, int32 (), is an argument of one program: a call that ends early, at an evaluation, needs
  no other one and computes nothing in vain, and a step is the same instructions in whichever call
  it falls, so that where a run stops and goes on changes no bit. K = 1 is no loop: on CPU the
  gradients of convolutions are many times slower inside one.
  """

  def train_steps(state, key, data, examples, count):
    k = jax.tree.leaves(examples)[0].shape[0]

    def step(state, i):
      return train_step(state, key, data, jax.tree.map(lambda x: x[i], examples))

    if k == 1:
      state, metrics = step(state, 0)
      return state, jax.tree.map(lambda x: x[None], metrics)

    def body(i, carry):
      state, rows = carry
      state, metrics = step(state, i)
      return state, jax.tree.map(lambda row, x: row.at[i].set(x), rows, metrics)

    rows = jax.tree.map(lambda x: jnp.zeros((k, *x.shape), x.dtype),
                        jax.eval_shape(step, state, 0)[1])
    return lax.fori_loop(0, count, body, (state, rows))

  return train_steps


def make_eval_step(model, task, *, axis_name: str):
  """A function (totals, state, key, data, common, batch) -> totals for one device's share.

  key is the run's EVAL stream; common holds what the whole batch shares, among it 'number' (), the
  batch's, which with the state's step decides the permutation of PermuteNet; batch holds
  what the task's eval_inputs and eval_counts read, (b, ...) each.
  """

  def eval_step(totals, state, key, data, common, batch):
    key = jax.random.fold_in(jax.random.fold_in(key, state.step), common['number'])
    logits, features = model.apply(
      {'params': state.params, 'batch_stats': state.batch_stats},
      task.eval_inputs(data, common, batch), train=False, rngs={'permutation': key})
    counts = task.eval_counts(logits, features, data, common, batch)
    return jax.tree.map(jnp.add, totals, lax.psum(counts, axis_name))

  return eval_step
