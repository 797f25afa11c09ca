"""What the paper compares, as a difference for every seed: which way, by how much, how surely."""

import dataclasses
import itertools
import statistics
from collections.abc import Sequence

import numpy as np

from gapjax.report.parts import CANVAS, DASH
from gapjax.report.plots.base import TIMES
from gapjax.report.render import Section, Table

LOCATION, IMAGE = (f'{target}_accuracy_best_random' for target in ('location', 'image'))
# (more consistent, less): networks of the paper's table 2; '' is the one without a remedy.
ORDER = {'AugShift is more consistent than the network alone': ('augshift', ''),
         'AugShift is more consistent than BlurPool': ('augshift', 'blurpool'),
         'BlurPool is more consistent than the network alone': ('blurpool', '')}
HALVES = {'left': 'right', 'right': 'left'}


@dataclasses.dataclass(frozen=True)
class Comparison:
  """What should be positive, `where`; the paper's, a fraction or None; ours, {seed: fraction}."""
  claim: str
  where: str
  paper: float | None
  found: dict[int, float]

  @property
  def holds(self) -> str:
    """What all seeds say; 'undecided' if they do not agree."""
    signs = {np.sign(value) for value in self.found.values()}
    said = {(1,): 'yes', (-1,): 'no'}.get(tuple(signs), 'undecided')
    return said if len(self.found) > 1 else f'{said} (one seed)'


def compared(records) -> list[Comparison]:
  """The comparisons of the paper that a suite's records allow, in the paper's order.

  On a canvas (section 3) by the paper's protocol, the best epoch under random placement; shift
  consistency (section 4); mIoU lost by removing channels (section 5), the mean over all N. A seed
  counts where both sides have it.
  """
  found = [*_canvas(records), *_shifts(records), *_removed(records)]
  return [comparison for comparison in found if comparison.found]


def section(source, _) -> Section | None:
  """A suite's section of them."""
  found = compared(source.records)
  return Section('What the paper compares', tables=[table(found)]) if found else None


def table(comparisons: Sequence[Comparison]) -> Table:
  """A row each, in points."""
  rows = [[c.claim, c.where, c.holds, DASH if c.paper is None else _points(c.paper),
           _mean(list(c.found.values())), ', '.join(map(_points, c.found.values()))]
          for c in comparisons]
  return Table(
    ['the paper says', 'where', 'here', 'paper', 'gapjax', 'by seed'], rows, text=3,
    breaks=frozenset(i for i in range(1, len(rows)) if rows[i][0] != rows[i - 1][0]),
    strong=frozenset({4}), caption='Differences in percentage points. gapjax: mean '
    '\N{PLUS-MINUS SIGN} sample standard deviation (seeds); yes or no where all seeds say so.'
    + (' On the canvas by the best epoch under random placement, as in the paper.'
       if any(TIMES in c.where for c in comparisons) else '')
    + (' What is missed is mIoU, the mean over all numbers of removed channels.'
       if any('missed' in c.claim for c in comparisons) else ''))


def _points(value):
  return f'{100 * value:+.1f}'


def _mean(values):
  spread = (f' \N{PLUS-MINUS SIGN} {100 * statistics.stdev(values):.1f}' if len(values) > 1 else '')
  return f'{_points(statistics.fmean(values))}{spread} ({len(values)})'


def _of(records, cell, metric, network=None):
  """{seed: value} of a cell's metric; random orders of a seed are averaged."""
  for r in records:
    if (r['cell'], r['metric'], r.get('network')) == (cell, metric, network) and r.get('seeds') \
        and None not in r['values']:
      return dict(zip(r['seeds'], np.reshape(r['values'], (len(r['seeds']), -1)).mean(1).tolist(),
                      strict=True))
  return {}


def _published(records, cell, metric):
  return next((r.get('paper') for r in records if (r['cell'], r['metric']) == (cell, metric)), None)


def _minus(a, b):
  return {seed: a[seed] - b[seed] for seed in sorted(a) if seed in b}


def _difference(records, metric, more, less):
  """(the paper's, ours) of two cells."""
  paper = [_published(records, cell, metric) for cell in (more, less)]
  return (None if None in paper else paper[0] - paper[1],
          _minus(*(_of(records, cell, metric) for cell in (more, less))))


def _canvas(records):
  grids = sorted({int(m[3]) for r in records if (m := CANVAS.fullmatch(r['cell']))})
  losses = {(metric, k): _difference(records, metric, *(
    f'{network}/{target}/{k}x{k}' for network in ('gapnet', 'permutenet')))
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
  names = {r['cell'] for r in records if r['metric'] == 'consistency'}
  datasets = sorted({name.split('/')[1] for name in names}, key=lambda name: (len(name), name))
  for (claim, pair), dataset in itertools.product(ORDER.items(), datasets):
    plain = next((name for name in names if name.endswith(f'/{dataset}')
                  and name.split('/')[0].startswith('resnet')), '')
    more, less = (f'{network}/{dataset}' if network else plain for network in pair)
    yield Comparison(claim, dataset, *_difference(records, 'consistency', more, less))


def _removed(records):
  networks = dict.fromkeys(r['network'] for r in records
                           if 'network' in r and r['metric'] == 'miou')

  def over_counts(network, metric, spared, removed):
    """The mean over N of what is left without `spared` less what is left without `removed`."""
    counts = {r['cell'].split('/N=')[1] for r in records if r.get('network') == network
              and r['cell'].startswith(f'{removed}/')}
    found = [_minus(*(_of(records, f'{order}/N={n}', metric, network)
                      for order in (spared, removed))) for n in counts]
    seeds = set.intersection(*map(set, found)) if found else ()
    return {seed: statistics.fmean(values[seed] for values in found) for seed in sorted(seeds)}

  for network in networks:
    yield Comparison('position channels are missed more than random ones', network, None,
                     over_counts(network, 'miou', 'random', 'overall'))
  for network in networks:
    for side, other in HALVES.items():
      yield Comparison(f'{side} channels are missed more in the {side} half than {other} ones',
                       network, None, over_counts(network, f'miou_{side}', other, side))
