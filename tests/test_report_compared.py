"""The paper's comparisons: differences by seed, against numbers written here."""

import pytest

from gapjax.report import compared as report_compared
from gapjax.report.parts import DASH, Source
from gapjax.report.plots.base import TIMES


def record(metric, values, *, seeds=None, paper=None, **fields):
  return {'metric': metric, 'values': values, 'paper': paper,
          'seeds': list(range(len(values))) if seeds is None else seeds, **fields}


def on_canvas(network, target, metric, values, paper=None):
  return record(metric, values, paper=paper, task='canvas', network=network, target=target, grid=3)


def shifted(network, metric, values, *, seeds=None, **settings):
  return record(metric, values, seeds=seeds, task='classification', network=network,
                dataset='digits', **settings)


def rows(records):
  found = report_compared.table(report_compared.compared(records)).rows
  return [[*row[:2], *row[2:]] for row in found]


def test_permuting_costs_location_and_the_class():
  """By the paper's protocol; the paper's differences are those of its own numbers."""
  best = '{}_accuracy_best_random'
  records = [on_canvas(network, target, best.format(target), values, paper)
             for network, target, values, paper in (
               ('gapnet', 'location', [1., .9], 1.), ('permutenet', 'location', [.3, .4], .788),
               ('gapnet', 'image', [.5, .6], .826), ('permutenet', 'image', [.4, 0.], .736))]
  records.append(on_canvas('gapnet', 'location', 'location_accuracy', [0.0, 0.0]))
  varied = on_canvas('gapnet', 'location', best.format('location'), [0.0, 0.0])
  records.insert(0, {**varied, 'padding': 'circular'})  # an ablation is another network
  places, more = rows(records)
  assert places == ['GAPNet finds places that PermuteNet does not', f'3{TIMES}3', DASH, '+21.2',
                    '+60.0 ± 14.1 (2)', '+70.0, +50.0']
  assert more[2:] == [DASH, '+12.2', '+25.0 ± 49.5 (2)', '+60.0, -10.0']


def test_a_seed_counts_where_both_sides_have_it():
  records = [shifted('resnet10', 'consistency', [.90, .80, .95], seeds=[0, 1, 2]),
             shifted('augshift', 'consistency', [.1, .1, .1], weight=3.0),
             shifted('augshift', 'consistency', [.70, .99], seeds=[2, 0]),
             shifted('blurpool', 'image_accuracy', [.5])]
  [row] = rows(records)
  assert row == ['AugShift is more consistent than the network alone', 'digits', DASH, DASH,
                 '-8.0 ± 24.0 (2)', '+9.0, -25.0']


def test_what_removing_costs_is_the_mean_over_all_n():
  """Random orders of a seed count as one; a half that holds no label counts nowhere."""
  def removed(order, n, values, metric='miou', seeds=(0, 1)):
    return record(metric, values, seeds=list(seeds), cell='deeplabv3/x', order=order, N=n)

  records = [removed('overall', 10, [.4, .3]), removed('overall', 20, [.2, .1]),
             removed('random', 10, [.5, .4, .6, .5]), removed('random', 20, [.3, .3, .3, .3]),
             removed('left', 10, [.1, .1], 'miou_left'),
             removed('right', 10, [.2, .4], 'miou_left'),
             removed('left', 10, [None, None], 'miou_right'),
             removed('right', 10, [.2, .2], 'miou_right')]
  overall, left = rows(records)
  # seed 0: (.45 - .4 + .3 - .2) / 2, seed 1: (.55 - .3 + .3 - .1) / 2
  assert overall[1:3] == ['deeplabv3/x', DASH] and overall[5] == '+7.5, +22.5'
  assert left[0] == 'left channels are missed more in the left half than right ones'
  assert left[5] == '+10.0, +30.0'


# By hand: t(.975, 2) = 4.303, t(.975, 3) = 3.182; the interval is the mean +- t s / sqrt(n).
@pytest.mark.parametrize(('values', 'said'), [
  ([.1], DASH), ([.2, .2], DASH), ([-.1, -.2], DASH),  # chance agrees one time in two, in four
  ([.3, .4, .5], 'yes'),  # .4 +- 4.303 * .1 / 1.732 = .4 +- .248
  ([.1, .2, .3], 'undecided'),  # .2 +- .248: all agree, which chance does one time in four
  ([-.3, -.4, -.5], 'no'), ([.5, .5, -.5], 'undecided'),
  ([.1, .2, .3, .2], 'yes'),  # .2 +- 3.182 * .0816 / 2 = .2 +- .130
  ([.1, .1, .1], 'yes'), ([0.0, 0.0, 0.0], 'undecided')])
def test_a_comparison_holds_by_students_interval_of_three_seeds_and_more(values, said):
  found = report_compared.Comparison('', '', None, dict(enumerate(values)))
  assert found.holds == said


def test_nothing_to_compare_is_no_section(tmp_path):
  assert not report_compared.section(Source(tmp_path), tmp_path).tables
  assert rows([on_canvas('gapnet', 'location', 'location_accuracy_best_random', [1.0])]) == []
