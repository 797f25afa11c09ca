"""The report's third claim (the paper's section 5): channels that hold position can be removed."""

import functools

import numpy as np

from gapjax.neurons import sweeps
from gapjax.report.parts import (
  DASH,
  detail_curves,
  drawn,
  learned,
  number,
  ours,
  picture,
  suite,
)
from gapjax.report.plots import base as plots
from gapjax.report.plots import neurons as pictures
from gapjax.report.render import Picture, Section, Table
from gapjax.report.schema import is_plain

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
         'the image furthest apart in the curves above.')]
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
    f'removed channels{", every test image at every place" if chance else ""}; the band of the '
    'random orders is from the lowest to the highest'
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


SECTIONS = [removed, scenes, classes, curves]
