"""Learning-rate schedules and optimisers, with PyTorch's meaning of weight decay."""

import jax
import optax
from ml_collections import ConfigDict


def create_schedule(config: ConfigDict, *, steps_per_epoch: float, total_steps: int):
  """The learning rate as a function of the step: linear warm-up, then config.schedule.name."""
  c, peak = config.schedule, config.optimizer.lr
  warmup = round(c.warmup_epochs * steps_per_epoch)
  rest = max(total_steps - warmup, 1)
  boundaries = [round(epoch * steps_per_epoch) - warmup for epoch in c.step_epochs]
  schedule = {
    'constant': lambda: optax.constant_schedule(peak),
    'cosine': lambda: optax.cosine_decay_schedule(peak, rest),
    'poly': lambda: optax.polynomial_schedule(peak, 0.0, c.power, rest),
    'step': lambda: optax.piecewise_constant_schedule(
      peak, {step: c.step_factor ** boundaries.count(step) for step in boundaries})}[c.name]()
  if not warmup:
    return schedule
  return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), schedule], [warmup])


def create_optimizer(config: ConfigDict, schedule) -> optax.GradientTransformation:
  """Clipping, then PyTorch's L2 decay (before the moments, on all parameters), then the rule."""
  c = config.optimizer
  rule = optax.scale_by_adam(c.b1, c.b2) if c.name == 'adam' else optax.trace(
    c.momentum, nesterov=c.nesterov)
  rules = [
    optax.clip_by_global_norm(c.clip_norm) if c.clip_norm else optax.identity(),
    optax.add_decayed_weights(c.weight_decay) if c.weight_decay else optax.identity(),
    rule, optax.scale_by_learning_rate(schedule)]
  if c.backbone_factor != 1:
    rules.append(optax.masked(optax.scale(c.backbone_factor), backbone))
  return optax.chain(*rules)


def backbone(params):
  """Which parameters are the backbone's: a tree of bools."""
  return {name: jax.tree.map(lambda _, name=name: name == 'backbone', tree)
          for name, tree in params.items()}
