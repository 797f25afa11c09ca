"""Checkpoints by themselves: what is written, refused and left over."""

import errno
import os

import numpy as np
import pytest
from conftest import newest

from gapjax.errors import TrainingFailed
from gapjax.training.checkpoint import Checkpoints, digest
from gapjax.training.train import check_finite

STATE = {'w': np.float32([1, 2]), 'step': np.int32(1)}


def test_digest_sees_every_change():
  tree = {'a': np.float32([1, 2]), 'b': {'c': np.int32(3)}}
  seen = {digest(tree), digest({'a': np.float32([1, 3]), 'b': {'c': np.int32(3)}}),
          digest({'a': np.float32([1, 2]), 'b': {'d': np.int32(3)}}),
          digest({'a': np.float64([1, 2]), 'b': {'c': np.int32(3)}}),
          digest({'a': np.float32([[1, 2]]), 'b': {'c': np.int32(3)}})}
  assert len(seen) == 5
  assert digest(tree) == digest({'b': {'c': np.int32(3)}, 'a': np.float32([1, 2])})


@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_parameters_that_are_not_finite_are_not_saved(tmp_path, value):
  """A loss may still be finite when its update no longer is."""
  good, bad = ({'w': np.float32([1, x]), 'step': np.int32(1)} for x in (2, value))
  with Checkpoints(tmp_path, keep=2) as checkpoints:
    checkpoints.save(5, good, {})
    checkpoints.wait()
    with pytest.raises(TrainingFailed, match='not finite after step 10'):
      checkpoints.save(10, bad, {})
  assert newest(tmp_path)[0] == 5
  with pytest.raises(TrainingFailed, match='evaluation after step 10'):
    check_finite(value, 10)
  check_finite(1.0, 10)


def test_what_a_kill_left_amid_a_save_is_removed_by_who_trains(tmp_path):
  """Not by who reads: the run may be saving just then."""
  left = tmp_path / 'checkpoints' / '7.orbax-checkpoint-tmp'
  left.mkdir(parents=True)
  (left / 'array').write_bytes(b'half')
  with Checkpoints(tmp_path, read_only=True):
    pass
  assert left.exists()
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(9, STATE, {})
    checkpoints.wait()
  assert [path.name for path in left.parent.iterdir()] == ['9'] and newest(tmp_path)[0] == 9


@pytest.mark.parametrize('full', [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_or_quota_is_called_so(tmp_path, monkeypatch, full):
  """tensorstore raises a ValueError, with the status that a bucket out of reach has, too."""
  with Checkpoints(tmp_path) as checkpoints:
    def save(*_, **__):
      raise ValueError(f'RESOURCE_EXHAUSTED: Failed to write: {os.strerror(full)} [...]')
    monkeypatch.setattr(checkpoints.manager, 'save', save)
    with pytest.raises(OSError, match=os.strerror(full)) as raised:
      checkpoints.save(5, STATE, {})
  assert (raised.value.errno, raised.value.filename) == (full, str(tmp_path / 'checkpoints'))
