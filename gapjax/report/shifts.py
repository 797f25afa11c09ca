"""The report's second claim (the paper's section 4): AugShift makes CNNs translation invariant."""

import dataclasses
import statistics

from gapjax import recipes
from gapjax.records.schema import SETTINGS, is_plain
from gapjax.report.parts import (
  DASH,
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
from gapjax.report.plots import shifts as plots_shifts
from gapjax.report.render import Picture, Section, Table

# Consistency by the headline's protocol, and by those that only the final evaluation counts.
CONSISTENCIES = ('consistency', 'consistency_crop', 'consistency_circular')
HEADING = 'Second claim: AugShift makes networks translation invariant'
PROTOCOLS = {'pad': 'each shift uniform in \N{PLUS-MINUS SIGN}s pixels down and across, zero '
                    'filled',
             'crop': 'two random windows, of the old size, of the image enlarged by 2s pixels',
             'circular': 'each shift uniform in \N{PLUS-MINUS SIGN}s pixels down and across, '
                         'rolled'}
PYTORCH = (' PyTorch: the same networks in plain PyTorch, on the same batches of images, by the '
           'same protocol.')
DISTANCE = ('the mean squared distance of the pooled features of two random shifts of an image '
            'over the features\' variance')


def match(record):
  """Whether a record is of a network that classifies shifted images."""
  return is_plain(record, 'classification')


def place(record):
  """Sort key: suite, dataset, network, settings."""
  return suite(record), *plots.order(_panel(record))


def _panel(record, **more):
  """A record's network, its settings and its dataset as the pictures see them."""
  return plots_shifts.ShiftPanel(
    record['network'], record['dataset'], **more,
    settings={key: record[key] for key in SETTINGS if key in record})


def cells(source):
  """What the pictures need."""
  panels = []
  for metrics in by_cell(source.records).values():
    detail, record = first(metrics.values(), 'detail') or {}, next(iter(metrics.values()))
    accuracy, consistency = (metrics.get(name, {}).get('mean')
                             for name in ('image_accuracy', 'consistency'))
    panels.append(_panel(
      record, chance=detail.get('chance'), accuracy=accuracy, consistency=consistency,
      **_shifts(detail.get('shifts')), **detail_curves(detail)))
  return panels


def _shifts(shifts):
  shifts = shifts or {}
  several = len(shifts.get('offsets') or []) > 1  # eval.max_shift=0 leaves a map of one point
  return {'protocols': shifts.get('protocols') or {}, 'offsets': shifts.get('offsets'),
          'accuracy_map': shifts.get('accuracy_map') if several else None}


def _is_sweep(source):
  return any(cell.settings for cell in source.cells)


def title(source):
  if _is_sweep(source):
    return 'AugShift: how strong a loss, how far a shift?'
  return 'Can a loss make a network translation invariant?'


def lead(source):
  """The claim, what is compared and what is measured, in paragraphs."""
  protocols = dict.fromkeys(r['protocol'] for r in source.records if r.get('protocol'))
  measure = ('Consistency is how often the top-1 class is the same for two random shifts of the '
             f'same image{"" if protocols else "."}')
  if protocols:
    measure += '; protocol ' + ', and '.join(
      f'{name} ({PROTOCOLS[kind]})' if (kind := name.split(',')[0]) in PROTOCOLS else name
      for name in protocols) + '.'
  claim = (
    'Where an object stands should not change what a network calls it, yet moving an image by a '
    'few pixels often does. The paper\'s second claim is that a loss can mend this without any '
    'change to the network. AugShift shows it two random shifts of each training image and adds '
    'to the cross entropy of both, times a weight, the mean squared distance of their features '
    'after global average pooling. ')
  if _is_sweep(source):
    claim += ('Our sources give neither the weight nor the range of the shifts, so this page '
              'tries several: a larger weight should buy consistency, at some point for accuracy.')
  else:
    claim += ('If the claim holds, AugShift is more consistent than the network alone, at nearly '
              'the same accuracy.')
  return [claim, ' '.join([*_compared(source), measure]), *_here(source)]


def _here(source):
  """A sentence for each dataset on AugShift beside the network alone and the control, each number
  over the seeds that both have."""
  found = {(r['dataset'], r['network'], r['metric']):
           dict(zip(r['seeds'], r['values'], strict=True))
           for r in source.records if r.get('seeds')}
  for dataset, alone in dict.fromkeys(key[:2] for key in found if key[1].startswith('resnet')):
    pairs = [[found.get((dataset, network, metric), {}) for network in ('augshift', other)]
             for other, metric in ((alone, 'consistency'), ('two_crops', 'consistency'),
                                   ('two_crops', 'feature_distance'))]
    seeds = [one.keys() & other.keys() for one, other in pairs]
    if not all(seeds) or _is_sweep(source):
      continue
    over_alone, over_control, (near, far) = (
      [statistics.fmean(values[seed] for seed in both) for values in pair]
      for pair, both in zip(pairs, seeds, strict=True))
    over_alone, over_control = (f'{100 * (one - other):+.1f}'
                                for one, other in (over_alone, over_control))
    n = [f'({len(both)} seed{"s" * (len(both) > 1)})' for both in seeds]
    share = f'{100 * near / far:.0f}% of' if far else 'equal to'  # 0 where all images are alike
    yield (f'On {dataset} AugShift is {over_alone} points {n[0]} more consistent than the network '
           f'alone and {over_control} {n[1]} than two crops without the loss, and the squared '
           f'distance of its features of two shifts is {share} theirs {n[2]}.')


def _compared(source):
  """Sentences on the networks beside AugShift, as far as they are there."""
  networks = {cell.network for cell in source.cells}
  others = [words for name, words in recipes.SHIFT_OTHERS.items() if name in networks]
  if others and any(name.startswith('resnet') for name in networks):
    yield f'It is compared with the plain network and with {", and with ".join(others)}.'
  if 'two_crops' in networks:
    yield ('AugShift sees each image twice, so the fair control is two crops at weight 0: the same '
           'training without the pairwise loss.')
  elif any(cell.settings.get('weight') == 0 for cell in source.cells):
    yield 'Weight 0, which sees each image twice too, is the fair control.'


def told(records):
  """A sentence on one network, for a terminal."""
  found = {r['metric']: r for r in records}
  accuracy, consistency = found['image_accuracy'], found['consistency']
  return (f'{_panel(consistency).network_name} names {number(accuracy["mean"])}% of the images; '
          f'two shifts of an image ({consistency["protocol"]}) get the same name in '
          f'{number(consistency["mean"])}% of the cases')


def tables(records):
  """One row a network and dataset; heads of consistencies, or a column, name the protocol."""
  metrics_by_cell = by_cell(records)
  several = len({group for group, _ in metrics_by_cell}) > 1
  torch, paper = (any(r.get(who) is not None for r in records) for who in ('torch', 'paper'))
  protocols = {metric: list(dict.fromkeys(
    r.get('protocol') for r in records if r['metric'] == metric)) for metric in CONSISTENCIES}
  apart = len(protocols['consistency']) > 1
  others = [metric for metric in CONSISTENCIES[1:] if protocols[metric]]
  blocks, rows = [], []
  for (group, _), metrics in metrics_by_cell.items():
    record = next(iter(metrics.values()))
    blocks.append((group, record['dataset']))
    row = [*([group] if several else []), _panel(record).network_name, record['dataset']]
    accuracy, consistency = (metrics.get(name) for name in ('image_accuracy', 'consistency'))
    if apart:
      row.append((consistency or {}).get('protocol') or DASH)
    for record in (accuracy, consistency):
      row += [*([number(first([record], 'paper'))] if paper else []),
              *([pytorch([record])] if torch else []), ours(record)]
    rows.append([*row, *(ours(metrics.get(name)) for name in (*others, 'feature_distance'))])
  unstated = ' The protocol behind the paper\'s consistency is not known to gapjax.' \
    if paper else ''
  names = {metric: f' ({" or ".join(map(str, said))})' if said and said[0] else ''
           for metric, said in protocols.items()}
  head = [*(['suite'] if several else []), 'network', 'dataset', *(['protocol'] if apart else [])]
  for what, protocol in (('top-1', ''), ('consistency', '' if apart else names['consistency'])):
    head += [*([f'paper: {what}'] if paper else []), *([f'PyTorch: {what}'] if torch else []),
             f'gapjax: {what}{protocol}']
  return [Table(
    [*head, *(f'gapjax: consistency{names[metric]}' for metric in others),
     'gapjax: feature distance'], rows, text=2 + several + apart,
    strong=frozenset({len(head) - 2 - torch - paper, len(head) - 1}),
    breaks=frozenset(i for i in range(1, len(rows)) if blocks[i] != blocks[i - 1]),
    caption='Top-1 and consistency in percent. gapjax: mean \N{PLUS-MINUS SIGN} sample standard '
    f'deviation (seeds), final weights.{unstated} Feature distance: {DISTANCE}; lower is '
    f'more invariant.{PYTORCH if torch else ""}')]


# --- sections: (Source, folder for pictures) -> Section ---------------------------------------


def results(source, _):
  """Facts and the table of a suite."""
  groups = plots.rows_of([cell for cell in source.cells if cell.consistency is not None])
  return Section('Results', facts=[_fact(cell) for group in groups for cell in _told(group)],
                 tables=tables(source.records))


def _told(group):
  """The plain network, its fair control and AugShift; of a sweep, the most consistent setting."""
  best = max((cell for cell in group if cell.settings), key=lambda cell: cell.consistency,
             default=None)
  return [cell for cell in group if cell is best or (not cell.settings and (
    cell.network.startswith('resnet') or cell.network in ('two_crops', 'augshift')))]


def _fact(cell):
  best = ', the most consistent setting' if cell.settings else ''
  accuracy = '' if cell.accuracy is None else f' (top-1 {number(cell.accuracy)}%)'
  return (f'{number(cell.consistency)}%',
          f'consistency on {cell.target}: {cell.network_name}{best}{accuracy}')


def samples(source, _):
  """The training's inputs; of a suite those of a network that sees pairs, if there is one."""
  pairs = [r for r in source.records if r['network'].startswith(('augshift', 'two_crops'))]
  path = picture(source, 'samples.png', pairs) or picture(source, 'samples.png')
  return Section('What the network sees', pictures=[Picture(
    path, 'Training images', 'Training images as the network sees them; with two crops, pairs '
    'stand one above the other.')] if path else [])


def consistency(source, folder):
  panels = [cell for cell in source.cells if any(map(len, cell.protocols.values()))]
  return pictured(
    'How far the image moves', plots_shifts.consistency_curves, panels, folder / 'consistency.png',
    alt='Consistency against the size of the shift, one panel a protocol',
    caption='How often the top-1 class is the same for two random shifts of up to s pixels'
    f'{_counted(source)}. The vertical axis does not begin at zero.')


def at_accuracy(source, folder):
  """Consistency changes with accuracy: what a network gains beyond that, at any accuracy."""
  panels = [cell for cell in source.cells if len(cell.learned) > 1 and not _is_sweep(source)]
  seed = ' (the first seed)' if several_seeds(source) else ''
  section = pictured(
    'At the same accuracy', plots_shifts.at_accuracy, panels, folder / 'at_accuracy.png',
    alt='Consistency against accuracy as networks learn, one line a network',
    caption='Consistency changes with accuracy, so compare networks at the same accuracy. '
    f'A line is a network through its evaluations while it learned{seed}; the dot is the end, to '
    'which alone the schedule\'s lowest rates belong. Neither axis begins at zero.')
  return dataclasses.replace(section, tables=_beyond(panels, seed))


def _beyond(panels, seed):
  """What networks have beyond the plain one of their dataset: at the end, and where both were as
  accurate as the less accurate of the two is at the end. No table where there are no two."""
  rows = []
  for group in plots.rows_of(panels):
    plain = next((cell for cell in group if cell.network.startswith('resnet')), None)
    for cell in group if plain else ():
      accuracy = min(plain.learned[-1][0], cell.learned[-1][0])
      here, there = (plots_shifts.consistency_at(x, accuracy) for x in (cell, plain))
      if cell is not plain and None not in (here, there):
        end = cell.learned[-1][1] - plain.learned[-1][1]
        rows.append([cell.network_name, cell.target, f'{100 * end:+.1f}',
                     f'{100 * (here - there):+.1f}', number(accuracy)])
  return [Table(
    ['network', 'dataset', 'at the end', 'at the same accuracy', 'which is'], rows, text=2,
    caption='Percentage points of consistency beyond the network alone, and the accuracy in '
    f'percent{seed}: that of the less accurate of the two at the end. Between evaluations both are '
    'taken to change linearly; where a network passed the accuracy more than once, the last time '
    'counts. A network that is trained to that accuracy and no further can be more or less '
    'consistent by a point or two.')] if rows else []


def maps(source, folder):
  panels = [cell for cell in source.cells if cell.accuracy_map is not None]
  return pictured(
    'Where accuracy is lost', plots_shifts.accuracy_maps, panels, folder / 'accuracy_maps.png',
    alt='Accuracy for every shift of the image, one map a network',
    caption='Top-1 accuracy when every test image is moved by the same dx and dy, zero filled'
    f'{_counted(source)}. The colours span the values of a dataset, not 0 to 100%.')


def _counted(source):
  """', on 500 test images, mean over seeds', as far as it is known."""
  measured = [r for r in source.records if (r.get('detail') or {}).get('shifts')]
  images = {r['detail']['shifts'].get('images') for r in measured} - {None}
  images = [f'{n:,}' for n in sorted(images)]
  held_out = any(r.get('config', {}).get('data', {}).get('held_out') for r in measured)
  kind = 'training images that were left out' if held_out else 'test images'
  counted = f', on {" or ".join(images)} {kind}' if images else ''
  return counted + (', mean over seeds' if several_seeds(source) else '')


def sweep(source, folder):
  panels = [cell for cell in source.cells if _is_sweep(source)
            and cell.accuracy is not None and cell.consistency is not None]
  return pictured(
    'Weight and shift', plots_shifts.sweep, panels, folder / 'sweep.png',
    alt='Consistency against accuracy, one point a setting of AugShift',
    caption='One point a setting: the number above it and its colour are the weight, its marker '
    'the largest shift in training. Crosses: networks without the pairwise loss. Neither axis '
    'begins at zero.')


def curves(source, folder):
  summed = any(cell.network.startswith(('augshift', 'two_crops')) for cell in source.cells)
  return learned(source, folder / 'shift_curves.png', remark=' With two crops the loss is the sum '
                 'over both, with the pairwise term.' if summed else '')


SECTIONS = [samples, sweep, consistency, at_accuracy, maps, curves]
