"""What the paper compares, as a difference for every seed: which way, by how much, how surely."""

import dataclasses
import itertools
import statistics
from collections.abc import Sequence

import numpy as np
import scipy.stats

from gapjax.records.schema import is_plain
from gapjax.report.parts import DASH
from gapjax.report.plots.base import TIMES
from gapjax.report.render import Section, Table

LOCATION, IMAGE = (f'{target}_accuracy_best_random' for target in ('location', 'image'))
# (more consistent, less): networks of the paper's table 2; '' is the one without a remedy.
ORDER = {'AugShift is more consistent than the network alone': ('augshift', ''),
         'AugShift is more consistent than BlurPool': ('augshift', 'blurpool'),
         'BlurPool is more consistent than the network alone': ('blurpool', '')}
HALVES = {'left': 'right', 'right': 'left'}
LEAST_SEEDS = 3


@dataclasses.dataclass(frozen=True)
class Comparison:
  """What should be positive, `where`; the paper's, a fraction or None; ours, {seed: fraction}."""
  claim: str
  where: str
  paper: float | None
  found: dict[int, float]

  @property
  def holds(self) -> str:
    """'yes' or 'no' where Student's 95% interval of the seeds' mean is on one side of 0, else
    'undecided'; of fewer than LEAST_SEEDS, which chance too often puts on one side, a dash."""
    values = np.array(list(self.found.values()))
    if len(values) < LEAST_SEEDS:
      return DASH
    half = scipy.stats.t.ppf(.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    low, high = values.mean() + half * np.array([-1, 1])
    return 'yes' if low > 0 else 'no' if high < 0 else 'undecided'


def compared(records) -> list[Comparison]:
  """The comparisons of the paper that a suite's records allow, in the paper's order.

  On a canvas (section 3) by the paper's protocol, the best epoch under random placement; shift
  consistency (section 4); mIoU lost by removing channels (section 5), the mean over all N. A seed
  counts where both sides have it.
  """
  comparisons = [*_canvas(records), *_shifts(records), *_removed(records)]
  return [comparison for comparison in comparisons if comparison.found]


def section(source, _) -> Section:
  """A suite's section of them."""
  comparisons = compared(source.records)
  return Section('What the paper compares', tables=[table(comparisons)] if comparisons else [])


def table(comparisons: Sequence[Comparison]) -> Table:
  """A row each, in points."""
  rows = [[c.claim, c.where, c.holds, DASH if c.paper is None else _points(c.paper),
           _mean(list(c.found.values())), ', '.join(map(_points, c.found.values()))]
          for c in comparisons]
  return Table(
    ['the paper says', 'where', 'here', 'paper', 'gapjax', 'by seed'], rows, text=3,
    breaks=frozenset(i for i in range(1, len(rows)) if rows[i][0] != rows[i - 1][0]),
    strong=frozenset({4}), caption='Differences in percentage points. gapjax: mean '
    f'\N{PLUS-MINUS SIGN} sample standard deviation (seeds). Yes or no, from {LEAST_SEEDS} seeds '
    'on, where Student\'s 95% interval of the differences lies on one side of zero.'
    + (' On the canvas by the best epoch under random placement, as in the paper, on '
       'CIFAR-10 there.'
       if any(TIMES in c.where for c in comparisons) else '')
    + (' What is missed is mIoU, the mean over all numbers of removed channels.'
       if any('missed' in c.claim for c in comparisons) else ''))


def _points(value):
  return f'{100 * value:+.1f}'


def _mean(values):
  spread = (f' \N{PLUS-MINUS SIGN} {100 * statistics.stdev(values):.1f}' if len(values) > 1 else '')
  return f'{_points(statistics.fmean(values))}{spread} ({len(values)})'


def _of(records, metric):
  """{seed: value} of a cell's metric, of the records of that cell; random orders of a seed are
  averaged."""
  for r in records:
    if r['metric'] == metric and r.get('seeds') and None not in r['values']:
      return dict(zip(r['seeds'], np.reshape(r['values'], (len(r['seeds']), -1)).mean(1).tolist(),
                      strict=True))
  return {}


def _minus(a, b):
  return {seed: a[seed] - b[seed] for seed in sorted(a) if seed in b}


def _where(records, **fields):
  """The records with these fields."""
  return [r for r in records if fields.items() <= r.items()]


def _difference(metric, more, less):
  """(the paper's, ours) of two cells' records."""
  paper = [next((r.get('paper') for r in records if r['metric'] == metric), None)
           for records in (more, less)]
  return (None if None in paper else paper[0] - paper[1],
          _minus(*(_of(records, metric) for records in (more, less))))


def _canvas(records):
  plain = [r for r in records if is_plain(r, 'canvas')]
  grids = sorted({r['grid'] for r in plain})
  losses = {(metric, k): _difference(metric, *(
    _where(plain, network=network, target=target, grid=k) for network in ('gapnet', 'permutenet')))
    for metric, target in ((LOCATION, 'location'), (IMAGE, 'image')) for k in grids}
  for k in grids:
    yield Comparison('GAPNet finds places that PermuteNet does not', f'{k}{TIMES}{k}',
                     *losses[LOCATION, k])
  for k in grids:
    (paper, ours), (image_paper, image) = losses[LOCATION, k], losses[IMAGE, k]
    yield Comparison('permuting costs location more than the class', f'{k}{TIMES}{k}',
                     None if None in (paper, image_paper) else paper - image_paper,
                     _minus(ours, image))


def _shifts(records):
  plain = [r for r in records if is_plain(r, 'classification') and 'weight' not in r]
  datasets = sorted({r['dataset'] for r in plain}, key=lambda name: (len(name), name))
  for (claim, pair), dataset in itertools.product(ORDER.items(), datasets):
    here = _where(plain, dataset=dataset)
    more, less = (_where(here, network=network) if network else
                  [r for r in here if r['network'].startswith('resnet')] for network in pair)
    yield Comparison(claim, dataset, *_difference('consistency', more, less))


def _removed(records):
  cut = [r for r in records if 'N' in r]
  cells = dict.fromkeys(r['cell'] for r in cut if r['metric'] == 'miou')

  def over_counts(cell, metric, spared, removed):
    """The mean over N of what is left without `spared` less what is left without `removed`."""
    here = _where(cut, cell=cell)
    counts = {r['N'] for r in _where(here, order=removed)}
    by_count = [_minus(*(_of(_where(here, order=order, N=n), metric)
                         for order in (spared, removed))) for n in counts]
    seeds = set.intersection(*map(set, by_count)) if by_count else ()
    return {seed: statistics.fmean(values[seed] for values in by_count) for seed in sorted(seeds)}

  for cell in cells:
    yield Comparison('position channels are missed more than random ones', cell, None,
                     over_counts(cell, 'miou', 'random', 'overall'))
  for cell in cells:
    for side, other in HALVES.items():
      yield Comparison(f'{side} channels are missed more in the {side} half than {other} ones',
                       cell, None, over_counts(cell, f'miou_{side}', other, side))
