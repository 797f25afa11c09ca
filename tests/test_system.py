"""The machine and the process."""

import sys

import pytest
from conftest import python

# Two allocations of 256 MB, one after the other, in a thread of its own, as XLA's are.
ALLOCATE = """
import resource, sys, threading
import numpy as np
from gapjax.training.system import keep_freed_memory

if sys.argv[1] == 'keep':
  assert keep_freed_memory()
faults = []

def work():
  for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(2 ** 25)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

thread = threading.Thread(target=work)
thread.start()
thread.join()
print(*faults)
"""


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='glibc alone is told')
def test_freed_memory_is_kept():
  """The second allocation faults no page in, unless glibc is left as it is."""
  for how in ('keep', 'leave'):
    first, second = map(int, python(ALLOCATE, how).stdout.split())
    assert first > 100
    assert (second < first / 10) == (how == 'keep')
