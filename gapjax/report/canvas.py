"""The report's first claim (the paper's section 3): position survives global pooling."""

from gapjax.records.schema import is_plain
from gapjax.report.parts import (
  by_cell,
  detail_curves,
  first,
  learned,
  number,
  ours,
  picture,
  pictured,
  pytorch,
  several_seeds,
  suite,
)
from gapjax.report.plots import base as plots
from gapjax.report.plots import locations
from gapjax.report.render import Picture, Section, Table

PYTORCH = (' PyTorch: the same networks in plain PyTorch, on the same batches of images, under the '
           'paper\'s protocol.')
HEADING = 'First claim: position survives global pooling'


def match(record):
  """Whether a record is of a network on a canvas."""
  return is_plain(record, 'canvas')


def place(record):
  """Sort key: the paper's order."""
  return suite(record), *plots.order(
    plots.Panel(record['network'], record['target'], record['grid']))


def cells(source):
  """What the pictures need, from the records that carry a detail."""
  panels = {r['cell']: plots.Panel(
    r['network'], r['target'], r['grid'], detail.get('chance'), detail.get('per_location'),
    **detail_curves(detail))
            for r in source.records if (detail := r.get('detail'))}
  return list(panels.values())


def title(_):
  return 'Does global average pooling forget where things are?'


def lead(source):
  """The claim and how it is tested, in paragraphs."""
  text = (
    'Global average pooling is believed to erase where things are. The paper claims the '
    'opposite: position survives, written in the order of the channels. The test pastes a small '
    f'image at one of {plots.square("k")} places on an empty canvas and asks a network for the '
    'place. GAPNet pools and answers. PermuteNet gets the pooled channels in a new random order '
    'at every forward pass, so that nothing but their order is lost. If the claim holds, GAPNet '
    'finds nearly every place and PermuteNet falls towards guessing. Naming the image falls too, '
    'since shuffled channels leave the classifier little more than their mean; in the paper, '
    'with 512 channels and 20,000 steps, it falls by less.')
  if any(record['network'] == 'permutenet_fixed' for record in source.records):
    text += (' As a control, a third network shuffles in one order fixed for the whole run, '
             'which its linear layer can learn to undo.')
  return [text]


def told(records):
  """A sentence on one network, for a terminal."""
  record = next(r for r in records if r['metric'] in ('location_accuracy', 'image_accuracy'))
  does, what = ('finds', 'places') if record['target'] == 'location' else ('names', 'images')
  return (f'{plots.network_name(record["network"])} {does} {number(record["mean"])}% of the '
          f'{what}; guessing {does} {number(record["detail"]["chance"])}%')


def tables(records):
  """One row a cell; the paper's number stands next to its protocol."""
  metrics_by_cell = by_cell(records)
  torch = any(r.get('torch') is not None for r in records)
  several = len({name for name, _ in metrics_by_cell}) > 1
  blocks, rows = [], []
  for (group, _), metrics in metrics_by_cell.items():
    network, target, grid = (first(metrics.values(), key) for key in ('network', 'target', 'grid'))
    exact, best = (metrics.get(f'{target}_accuracy{which}') for which in ('', '_best_random'))
    chance = (first((exact, best), 'detail') or {}).get('chance')
    blocks.append((group, target, grid))
    rows.append([*([group] if several else []), plots.network_name(network), target,
                 f'{grid}{plots.TIMES}{grid}', number(first((best, exact), 'paper')),
                 *([pytorch((best, exact))] if torch else []),
                 ours(best), ours(exact), number(chance)])
  breaks = frozenset(i for i in range(1, len(rows)) if blocks[i] != blocks[i - 1])
  # The paper has no other images on a canvas.
  paper = 'paper' if {r['dataset'] for r in records} == {'cifar10'} else 'paper (CIFAR-10)'
  head = [*(['suite'] if several else []), 'network', 'target', 'grid', paper,
          *(['PyTorch'] if torch else []), 'gapjax: best epoch, random placement',
          'gapjax: every location, final weights', 'chance']
  return [Table(
    head, rows, text=3 + several, breaks=breaks, strong=frozenset({len(head) - 3, len(head) - 2}),
    caption='In percent. gapjax: mean \N{PLUS-MINUS SIGN} sample standard deviation (seeds). The '
    'paper quotes the best epoch under random placement; the stricter column places every test '
    f'image at every location with the final weights.{PYTORCH if torch else ""}')]


# --- sections: (Source, folder for pictures) -> Section ---------------------------------------


def results(source, _):
  """Facts and the table of a suite."""
  exact, facts = {}, []
  chance = {cell.grid: cell.chance for cell in source.cells if cell.target == 'location'}
  for record in source.records:
    if record['metric'] == 'location_accuracy' and record['mean'] is not None:
      exact[record['grid'], record['network']] = record['mean']
  for k in sorted({k for k, _ in exact}):
    there = [name for grid, name in exact if grid == k]
    for network in [name for name in ('gapnet', 'permutenet') if name in there] or there:
      facts.append((f'{number(exact[k, network])}%', 'location accuracy of '
                    f'{plots.network_name(network)}, {plots.square(k)}'))
    facts.append((f'{number(chance.get(k))}%', f'location accuracy of guessing, {plots.square(k)}'))
  return Section('Results', facts=facts, tables=tables(source.records))


def samples(source, _):
  """The training's inputs, one picture a grid."""
  named = {f'Samples of the {plots.square(k)} canvas': picture(
    source, 'samples.png', [r for r in source.records if r['grid'] == k])
           for k in sorted({record['grid'] for record in source.records})}
  return Section('What the network sees', text=[
    'Each image stands at one random place on an otherwise empty canvas. The location networks '
    'must name the place, the image networks what stands there.'],
                 pictures=[Picture(path, name, f'{name}. Thin lines mark the locations.')
                           for name, path in named.items() if path])


def heatmaps(source, folder):
  panels = [cell for cell in source.cells if cell.per_location is not None]
  return pictured(
    'Where it succeeds', locations.heatmaps, panels, folder / 'locations.png',
    alt='Accuracy at every location of the canvas, one map a network',
    caption='Accuracy in percent of every test image at every location'
    f'{", mean over seeds" if several_seeds(source) else ""}; beside each name the mean.')


def curves(source, folder):
  return learned(source, folder / 'curves.png')


SECTIONS = [samples, heatmaps, curves]
