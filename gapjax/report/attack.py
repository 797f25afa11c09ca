"""The report's third claim (the paper's section 5): channels that hold position can be removed."""

import functools

import numpy as np

from gapjax.neurons import sweeps, yardstick
from gapjax.records.schema import is_plain
from gapjax.report.parts import (
  DASH,
  detail_curves,
  drawn,
  learned,
  number,
  ours,
  picture,
  several_seeds,
  suite,
)
from gapjax.report.plots import base as plots
from gapjax.report.plots import neurons as pictures
from gapjax.report.render import Picture, Section, Table

HEADING = 'Third claim: position channels can be found and removed'
# Pictures that training and the attack leave, and what they show.
LEFT = [('predictions.png', 'Predictions', 'Evaluated scenes, their labels, and the classes that '
         'the network gives every pixel. Void is grey.'),
        ('activations.png', 'Mean activations of the top left and right channels',
         'The top channels of the left and the right ranking: mean activation over scenes with the '
         'object on either side only, with its standard error.'),
        ('attack_scenes.png', 'Predictions before and after removing channels',
         'Evaluated scenes: predictions of the whole network, and without its first left or right '
         'channels (or those of left_centred and right_centred), as many as tell the two halves of '
         'the image furthest apart in this network.')]
# How many values of N the table shows of a sweep.
SHOWN = 3
# A classifier's metrics, and what it got right.
CLASSIFIED = {'location_accuracy': 'places', 'image_accuracy': 'images'}


def match(record):
  """Whether a record is of an attack, or of a network that can only be attacked."""
  return 'N' in record or is_plain(record, 'segmentation')


def place(record):
  """Sort key: suite, cell, what is removed, how much."""
  known, order = [sweeps.CLEAN, *pictures.LOOKS], record.get('order')
  return (suite(record), record['cell'], 'N' in record, record.get('N', 0),
          known.index(order) if order in known else len(known))


def cells(source):
  """The learning curves of every network."""
  return [plots.Panel(record['network'], record['dataset'], **detail_curves(record['detail']))
          for record in source.records if record.get('detail')]


def title(_):
  return 'Which channels know where things are, and what is lost without them?'


def lead(source):
  """The claim and how it is tested, in paragraphs."""
  return [
    'The paper claims that some channels of a network encode position, that a mirror is enough to '
    'find them, and that removing them damages segmentation, in a chosen half of the image if one '
    'wants. A channel is ranked by how much its mean changes when the image is '
    'mirrored: overall by the mean size of the change over all images, left and right by its '
    'signed mean over images whose object of interest stands on that side only, left_centred and '
    'right_centred by that less its mean over all images. Then the first N channels of a '
    'ranking are set to zero, and as a baseline N channels drawn at random. If the claim holds, '
    'the overall ranking costs more mIoU than chance does, left channels cost more in the left '
    'half than right channels do, and the other way round.',
    *(['Networks that classify lose channels, too: one that names the place of an image on its '
       'canvas, and one that names the image. Left and right are then the columns of the canvas on '
       'that side, and every test image is evaluated at every place.']
      if any(record['metric'] in CLASSIFIED for record in source.records) else [])]


def subject(record):
  """What a network is called: 'GAPNet, 3 x 3' for those of both targets; others by their cell."""
  if record.get('task') != 'canvas':
    return record['cell']
  return f'{plots.network_name(record["network"])}, {record["grid"]}{plots.TIMES}{record["grid"]}'


def _removed(source):
  """The records of what was removed."""
  return [record for record in source.records if 'N' in record]


def _attacks(source):
  """[(what was attacked, Sweep, {metric: chance})]; a classifier's targets side by side if they
  were asked for the same N."""
  by_cell, attacks = {}, {}
  for record in _removed(source):
    by_cell.setdefault(record['cell'], []).append(record)
  for records in by_cell.values():
    sweep = sweeps.from_records(records)
    metrics, chance = attacks.setdefault((subject(records[0]), sweep.counts), ({}, {}))
    metrics.update(sweep.metrics)
    chance.update({r['metric']: r['chance'] for r in records if r.get('chance') is not None})
  return [(name, sweeps.Sweep(counts, dict(sorted(metrics.items(), key=_column))), chance)
          for (name, counts), (metrics, chance) in attacks.items()]


def _column(item):
  """Sort key of (metric, ...): the pictures' order, rectangles last."""
  known = list(pictures.METRICS)
  return known.index(item[0]) if item[0] in known else len(known)


def shown(counts):
  """SHOWN of the numbers of removed channels, in about equal distances, none of them 0; all, if no
  more are there."""
  counts = [n for n in counts if n]
  if len(counts) <= SHOWN:
    return counts
  return [counts[i] for i in np.unique(np.linspace(0, len(counts) - 1, SHOWN + 1).round()
                                       .astype(int))[:-1]]


def told(records):
  """A sentence on one network, for a terminal."""
  name = plots.network_name(records[0]['network'])
  removed = [record for record in records if 'N' in record]
  if not removed:
    miou = next(record['mean'] for record in records if record['metric'] == 'miou')
    return f'{name}: mIoU {number(miou)}%'
  sweep = sweeps.from_records(removed)
  facts = ', '.join(f'{value} {words}' for value, words in _facts(sweep))
  return f'{name}: {facts or _beside(sweep).strip()}'


def tables(records):
  """One table of the networks that mark pixels, one of those that classify."""
  parts = [[r for r in records if (r['metric'] in CLASSIFIED) == classify]
           for classify in (False, True)]
  return [table(part) for part in parts if part]


def table(records):
  """One row for the whole network and for each order at some N: mIoU by region, or accuracy."""
  reported = dict.fromkeys(r['metric'] for r in records if 'N' in r)  # also rectangles'
  reported = reported or dict.fromkeys(r['metric'] for r in records)
  metrics = [*(m for m in pictures.METRICS if m in reported),
             *(m for m in reported if m not in pictures.METRICS and m.startswith('miou_')
               and m != 'miou_best')]
  networks, rows, breaks = {}, [], set()
  for record in records:
    if 'N' in record or record['metric'] in metrics:
      networks.setdefault(subject(record), {}).setdefault(
        (record.get('order'), record.get('N')), {})[record['metric']] = record
  for network, removed in networks.items():
    chosen = shown(sorted({count for _, count in removed if count}))
    whole = next(key for key in ((None, None), (sweeps.CLEAN, 0)) if key in removed)
    if whole == (None, None):  # a run's own metrics, which have no rectangles
      removed[whole] = {**removed.get((sweeps.CLEAN, 0), {}), **removed[whole]}
    for (order, count), values in removed.items():
      if count not in chosen and (order, count) != whole:  # of N = 0, one row says it all
        continue
      if not count or order == next(iter(pictures.LOOKS)):
        breaks.add(len(rows))
      rows.append([network, str(count or 0), order if count else DASH,
                   *(ours(values.get(metric)) for metric in metrics)])
    chance = {r['metric']: r['chance'] for values in removed.values() for r in values.values()
              if r.get('chance') is not None}
    if chance:
      breaks.add(len(rows))
      rows.append([network, DASH, 'guessing', *(number(chance.get(m)) for m in metrics)])
  names = [pictures.metric_name(metric) for metric in metrics]
  return Table(['network', 'N removed', 'by', *names], rows, text=3, breaks=frozenset(breaks - {0}),
               strong=frozenset(range(3, 3 + len(names))),
               caption='In percent. The whole network: mean \N{PLUS-MINUS SIGN} sample '
               'standard deviation (seeds); with channels removed, over seeds and random orders.')


def results(source, _):
  """Facts and the table of a suite."""
  facts = [fact for _, sweep, _ in _attacks(source) for fact in _facts(sweep)]
  return Section('Results', facts=facts, tables=tables(source.records))


def _facts(sweep):
  """mIoU of the whole network, and at the largest N at which random channels leave half of it."""
  orders = sweep.metrics.get('miou') or {}
  if 'overall' not in orders or 'random' not in orders:
    return []
  left = orders['random'].mean(0)
  chosen = max([i for i in range(1, len(left)) if left[i] >= left[0] / 2], default=1)
  n = sweep.counts[chosen]
  return [(f'{number(orders["overall"][:, 0].mean())}%', 'mIoU of the whole network'),
          (f'{number(orders["overall"][:, chosen].mean())}%',
           f'without the first {n} position channels'),
          (f'{number(orders["random"][:, chosen].mean())}%', f'without {n} random channels')]


def removed(source, folder):
  """Also of a single canvas run that was attacked."""
  return Section('What removing channels costs', pictures=[
    _removed_from(name, sweep, chance, folder / f'attack{i or ""}.png')
    for i, (name, sweep, chance) in enumerate(_attacks(source))])


def _removed_from(name, sweep, chance, path):
  what = 'Accuracy' if set(sweep.metrics) <= set(CLASSIFIED) else 'mIoU'
  return drawn(
    functools.partial(pictures.curves, chance=chance), sweep, path,
    alt=f'{what} against the number of removed channels',
    caption=f'{name}: {what} in percent against the number of '
    f'removed channels{", every test image at every place" if chance else ""}; bands are from the '
    'lowest to the highest of seeds and of random orders'
    f'{", the dotted line is guessing" if chance else ""}.{_beside(sweep)}')


def _beside(sweep):
  """A sentence on a classifier: what it gets right by rank beside at random, at the last N shown.
  """
  n, shares = shown(sweep.counts)[-1], []
  for metric, orders in sweep.metrics.items():
    if metric in CLASSIFIED and {'overall', 'random'} <= set(orders):
      i = sweep.counts.index(n)
      whole, ranked, drawn = (number(values.mean()) for values in (
        orders['overall'][:, 0], orders['overall'][:, i], orders['random'][:, i]))
      shares.append(f'{whole}, {ranked} and {drawn}% of {CLASSIFIED[metric]}')
  return (f' The whole network, that without its first {n} position channels, and that without {n} '
          f'random ones get right: {"; ".join(shares)}.') if shares else ''


def yardstick_table(found):
  """One row for each ranking of every network; found: {network: {order: Yardstick}}."""
  rows, breaks = [], set()
  for network, by_order in found.items():
    breaks.add(len(rows))
    for name, one in by_order.items():
      signs = one.exceeding
      rows.append([network, name, str(one.images), f'{one.agreement:+.2f}', *(
        DASH if signs is None else f'{(signs == sign).sum()} of {len(signs)}' for sign in (1, -1)),
        *(DASH if share is None else f'{share:.2f}'
          for share in (one.shift_share, one.spread_share))])
  return Table(['network', 'ranking', 'images', 'halves agree', 'rise beyond chance',
                'fall beyond chance', 'shift over mirror', 'mirror over spread'], rows, text=2,
               breaks=frozenset(breaks - {0}), strong=frozenset(range(3, 8)),
               caption='Halves agree: the rank correlation of the scores that two halves of the '
               f'images give, the mean of {yardstick.SPLITS} random splits. Beyond chance: '
               f'{yardstick.DRAWS:,} times the sign of z - z\' was drawn at random for each image, '
               'and for a centred ranking which of all images are the region\'s; these channels '
               'have a larger t than any channel had in 95% of the draws, and rise or fall with '
               'the object there. Shift over mirror: what a shift of the image by one pixel '
               'changes in a channel\'s mean, over what the mirror changes. Mirror over spread: '
               'what the mirror changes over the standard deviation between images, which makes '
               'networks comparable; 1.13 where a mirror image is as unlike as another image. '
               f'These two are of the same images, {yardstick.SHIFTED} at most.')


def measured(source, folder):
  """What the rankings are measured by, of every network's first seed that has been ranked; nothing
  of one that an earlier gapjax ranked, or that was trained on since."""
  found, first = {}, {}
  for record in source.records:
    first.setdefault(record['cell'], record)
  for cell, record in first.items():
    step = (record.get('detail') or {}).get('steps', record.get('step'))
    path = picture(source, 'ranking_yardstick.json', [record])
    if path and (by_order := yardstick.read_json(path, **({'step': step} if step else {}))):
      found[cell] = by_order
  if not found:
    return Section('')
  return Section(
    'Is a channel\'s position real?',
    text=['A ranking is worth as much as other images would give it again. If an image were as '
          'likely as its mirror image, the sign of its z - z\' could as well be the other one: '
          'that is chance here, and a signed score counts if it is beyond it. It may still be no '
          'position, because a mirrored image is another image, whatever stands where. That '
          'change is common to all images; the centred rankings lack it. Chance, for them, is that '
          'any of all images could as well be the region\'s.',
          'The overall score has no sign, and so no such test. That halves agree on it may only '
          'say that some channels are larger than others. It holds that other image, too, and that '
          'a stride takes other pixels of it, as it does after a shift by one pixel. A network '
          'with circular padding, on images whose sizes its strides divide, knows no place but '
          'within a stride. Train one (model.padding=circular), rank it, and compare the last '
          'column: what it scores is not position.',
          'All of this takes images to be drawn independently. Frames of one drive are not, and '
          'CamVid\'s are frames of videos: the intervals are too narrow there, and too many '
          'channels are beyond chance.'],
    tables=[yardstick_table(found)], pictures=[drawn(
      pictures.yardsticks, by_order, folder / f'yardstick{i or ""}.png',
      alt='The score of every channel with its interval, by ranking',
      caption=f'{cell}{" (the first seed)" if several_seeds(source) else ""}: the channels\' '
      'scores from the largest to the smallest, each with Student\'s 95% interval over images. '
      f'Grey: what chance lets any channel reach in 5% of the draws; dots are beyond '
      f'it.{_said(by_order)}')
      for i, (cell, by_order) in enumerate(found.items())])


def _said(by_order):
  """Sentences on a network's rankings."""
  beyond = [f'{name} {int(np.abs(one.exceeding).sum())}' for name, one in by_order.items()
            if one.threshold is not None]
  said = (f' Of {len(next(iter(by_order.values())).mean)} channels are beyond chance: '
          f'{", ".join(beyond)}.') if beyond else ''
  if (share := getattr(by_order.get('overall'), 'shift_share', None)) is not None:
    said += f' A shift by one pixel changes {100 * share:.0f}% of what the mirror does.'
  return said


def classes(source, _):
  """IoU of every class, a column a network."""
  networks = {r['cell']: per_class for r in source.records
              if (per_class := (r.get('detail') or {}).get('per_class'))}
  names = list(dict.fromkeys(name for per_class in networks.values() for name in per_class))
  return Section('Class by class', tables=[Table(
    ['class', *networks], [[name, *(number(per_class.get(name)) for per_class in networks.values())]
                        for name in names], caption='IoU in percent.')] if networks else [])


def scenes(source, _):
  marked = [record for record in source.records if record['task'] == 'segmentation']
  left = [Picture(path, alt, caption) for name, alt, caption in LEFT
          if (path := picture(source, name, marked))
          and (name != 'attack_scenes.png' or _removed(source))]
  return Section('What the network sees, and what is left', pictures=left)


def curves(source, folder):
  return learned(source, folder / 'segmentation.png')


SECTIONS = [removed, measured, scenes, classes, curves]
