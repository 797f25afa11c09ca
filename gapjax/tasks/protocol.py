"""What a task must offer, and what it is given in return; TASKS in tasks/__init__.py has them all.

A task says which examples are trained on and evaluated, and what is made of them. It works on
arrays: training/ places them on devices, compiles the steps and counts.
"""

import abc
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from gapjax.data.sheet import Sheet
from gapjax.tasks.images import normalise


class Counter(abc.ABC):
  """Counts over evaluated examples: training/evaluator.py's on jax devices, or the PyTorch twin's.

  Attributes:
    batch_size: of the batches that it takes, shared by all devices.
    rows: which rows of a batch are this process' share.
    num_channels: c of the network's features['pooled'], (b, c).
  """
  batch_size: int
  rows: slice = slice(None)
  num_channels: int

  @abc.abstractmethod
  def count(self, state, zeros, batches: Iterable[tuple[Mapping[str, np.ndarray], int]], *,
            bar: tqdm, common=(), local: bool = False) -> Any:
    """`zeros` plus the task's eval_counts of all batches, on the host.

    Args:
      state: the training state; its network is evaluated.
      zeros: a tree of arrays, as eval_counts gives it.
      batches: (what the task's eval_inputs and eval_counts read, arrays (batch_size, ...); how many
        of its examples count) each.
      bar: a progress bar over examples.
      common: a dict of arrays that all batches share.
      local: the arrays hold the batch's `rows` alone.

    Raises Interrupted where the process was told to stop: the answer is no longer wanted.
    """

  def predict(self, state, image: np.ndarray) -> np.ndarray:
    """The class of every pixel of an image (h, w, 3) uint8: (h, w)."""
    raise NotImplementedError


@dataclasses.dataclass
class Evaluation(abc.ABC):
  """How a run is evaluated. All numbers come through a Counter, whose Interrupted passes through.

  `during` and `final` return a line of metrics.jsonl with 'accuracy' and 'loss' in it.
  """
  config: Any
  task: 'Task'
  test_set: Any
  counter: Counter

  @abc.abstractmethod
  def during(self, state) -> dict:
    """Every few epochs of training."""

  @abc.abstractmethod
  def final(self, state, *, progress: bool = False, brief: bool = False) -> dict:
    """Once, of the final weights; `brief`: what tables show, without curves and maps by shift."""

  @abc.abstractmethod
  def summary(self, final: dict, evaluations: list[dict]) -> dict:
    """The task's part of summary.json, from the final line and those during training."""

  @abc.abstractmethod
  def report(self, state) -> dict:
    """All metrics of a checkpoint, for the verb `evaluate`."""

  def pictures(self, state) -> dict[str, Sheet]:
    """What a finished run leaves to look at besides, by file name."""
    return {}


def evaluated(total: int, *, progress: bool) -> tqdm:
  """A progress bar over so many examples."""
  return tqdm(total=total, unit='img', desc='evaluate', leave=False, disable=not progress)


@dataclasses.dataclass(frozen=True, eq=False)
class Task(abc.ABC):
  """A job of the paper, on one dataset.

  Attributes:
    dense: whether every pixel has a class, or an image has one.
    crops: how often a training step sees each of its images.
    num_classes: K, the logits that the network needs.
    mean, std: (3,), normalisation on the [0, 1] scale.
    flip: whether training images are flipped left to right, each with probability 1/2.
    dtype: of the network's inputs.
  """
  dense: ClassVar[bool]
  crops = 1
  mean: np.ndarray
  std: np.ndarray
  _: dataclasses.KW_ONLY
  flip: bool = True
  dtype: jnp.dtype = jnp.float32

  # ---- Data ------------------------------------------------------------------------------------

  @classmethod
  @abc.abstractmethod
  def of(cls, config, train_set, *, dtype, axis_name: str | None) -> 'Task':
    """The task that a config describes. Raises UsageError where the dataset does not fit it."""

  @staticmethod
  @abc.abstractmethod
  def load_split(name: str, *, split: str, data_dir=None, image_size: int | None = None,
                 limit: int | None = None):
    """One split of a dataset, data.ImageDataset or data.Scenes."""

  @staticmethod
  @abc.abstractmethod
  def check_data(config, *, data_dir) -> None:
    """Raises UsageError unless the datasets that a config names are there."""

  @staticmethod
  @abc.abstractmethod
  def describe(config) -> str:
    """What a config trains, in a few words that end before the dataset's name."""

  @abc.abstractmethod
  def input_shape(self, train_set) -> tuple[int, int]:
    """Height and width of what the network is trained on."""

  @abc.abstractmethod
  def resident(self, dataset) -> dict:
    """What of a dataset lies on every device, `data` below."""

  @abc.abstractmethod
  def host_batches(self, train_set, *, batch_size: int, seed: int, num_hosts: int = 1,
                   host: int = 0):
    """data.Batches that the host augments; None where a batch is indices of `resident` images."""

  @abc.abstractmethod
  def samples(self, train_set, *, seed: int) -> Sheet:
    """The first training examples as the network sees them."""

  # ---- On the device, while tracing --------------------------------------------------------------

  def normalised(self, images: jax.Array) -> jax.Array:
    """uint8 images (..., 3) as the network takes them."""
    return normalise(images, mean=self.mean, std=self.std, dtype=self.dtype)

  @abc.abstractmethod
  def train_batch(self, keys: jax.Array, data, examples) -> dict[str, jax.Array]:
    """A batch for `loss`: examples (b,) are indices, or a tree of host_batches' arrays; each is
    augmented by its own key (b,)."""

  @abc.abstractmethod
  def loss(self, network, batch, step: jax.Array):
    """The loss, a scalar, and its metrics; network: images -> (logits, features), in training."""

  @abc.abstractmethod
  def eval_inputs(self, data, common, batch) -> jax.Array:
    """The network's inputs for a batch of `evaluation`."""

  @abc.abstractmethod
  def eval_counts(self, logits, features, data, common, batch):
    """Sums over that batch, which add up over batches and devices; padding counts for nothing."""

  # ---- Evaluation --------------------------------------------------------------------------------

  @abc.abstractmethod
  def evaluation(self, config, test_set, counter: Counter) -> Evaluation:
    """Which examples of test_set are evaluated, and what is made of the counts."""
