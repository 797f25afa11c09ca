"""What the report tells of classifiers that lose channels: both targets side by side."""

import json
import re

import numpy as np
import pytest
from conftest import refused
from pixels import pixels, row

from gapjax.neurons.sweeps import Sweep
from gapjax.neurons.yardstick import Yardstick, write_json
from gapjax.report import attack as report_attack
from gapjax.report import page as report
from gapjax.report.plots import base as plots
from gapjax.report.plots import neurons as pictures
from gapjax.reproduce import records as rows
from gapjax.reproduce import suites

COUNTS = (0, 10, 20, 30, 40)
CHANCE = {'location': 1 / 9, 'image': .1}
# By rank and at random, two orders, at every N; the last N shown is 30, the third of four.
FALLS = {'location': ([.9, .8, .7, .35, .2], [[.9, .9, .88, .84, .6], [.9, .9, .86, .82, .5]]),
         'image': ([.8, .7, .6, .45, .3], [[.8, .8, .78, .74, .7], [.8, .8, .76, .72, .5]])}


@pytest.fixture(scope='module')
def records():
  found = []
  for cell in suites.attack('small'):
    target = cell.config.canvas.target
    if not cell.name.startswith('gapnet'):
      continue
    ranked, drawn = FALLS[target]
    sweep = Sweep(COUNTS, {f'{target}_accuracy': {'overall': np.array([ranked]),
                                                  'random': np.array(drawn)}})
    found = add_attack(found, cell, sweep, chance=CHANCE[target])
  return found


def add_attack(records, cell, sweep, *, chance=None):
  return rows.add_attack(records, cell, seed=0, summary={'sizes': {'chance': chance}}, sweep=sweep,
                         suite='attack', scale='small')


def _rows(markdown):
  return [[cell.strip() for cell in line.split('|')[1:-1]] for line in markdown.splitlines()
          if line.startswith('|')]


def test_location_stands_beside_image_accuracy(records):
  head, _, *rows = _rows(report.table(records))
  assert head == ['network', 'N removed', 'by', 'location accuracy', 'image accuracy']
  assert {row[0] for row in rows} == {f'GAPNet, 3{plots.TIMES}3'}
  dash = '\N{EN DASH}'
  assert [row[1:3] for row in rows] == [
    ['0', dash], *([n, by] for n in ('10', '20', '30') for by in ('overall', 'random')),
    [dash, 'guessing']]
  assert rows[0][3:] == ['90.0 (1)', '80.0 (1)'] and rows[-1][3:] == ['11.1', '10.0']
  assert rows[5][3:] == ['35.0 (1)', '45.0 (1)']
  for column, target in ((3, 'location'), (4, 'image')):
    values = np.array(FALLS[target][1])[:, 3]
    assert rows[6][column] == (f'{100 * values.mean():.1f} \N{PLUS-MINUS SIGN} '
                               f'{100 * values.std(ddof=1):.1f} (2)')


def test_networks_that_mark_pixels_keep_a_table_of_their_own(records):
  scenes = suites.attack('small')[0]
  sweep = Sweep(COUNTS, {'miou': {'overall': np.full((1, 5), .4), 'random': np.full((2, 5), .3)}})
  both = add_attack(records, scenes, sweep)
  first, second = report.table(both).split('\n\n')
  assert second == report.table(records)
  assert _rows(first)[0] == ['network', 'N removed', 'by', 'mIoU, all pixels']
  assert 'guessing' not in first


def test_the_facts_are_where_random_channels_leave_half(tmp_path):
  """Of the whole network's 60%: the mean of two orders is 30.5 at N = 20 and 29 at N = 30."""
  sweep = Sweep(COUNTS, {'miou': {'overall': np.array([[.6, .5, .2, .1, .1]]), 'random': np.array(
    [[.6, .6, .33, .31, .1], [.6, .6, .28, .27, .1]])}})
  rows.write(tmp_path / 'results.json', add_attack([], suites.attack('small')[0], sweep))
  text = report.build(tmp_path).with_name('README.md').read_text()
  for fact in ('**60.0%** mIoU of the whole network', '**20.0%** without the first 20 position',
               '**30.5%** without 20 random'):
    assert fact in text


def test_the_page_shows_two_panels_and_says_what_is_in_them(records, tmp_path):
  (tmp_path / 'results.json').write_text(json.dumps(records))
  text = report.build(tmp_path).with_name('README.md').read_text()
  assert ('The whole network, that without its first 30 position channels, and that without 30 '
          'random ones get right: 90.0, 35.0 and 83.0% of places; 80.0, 45.0 and 73.0% of images.'
          ) in text
  assert 'Networks that classify lose channels, too' in text and 'dotted line is guessing' in text
  assert re.findall(r'!\[[^\]]+\]\(([^)]+)\)', text) == ['attack.png']


def test_rankings_are_measured_side_by_side(records, tmp_path):
  """A row a ranking of each network that has the file; a picture a network."""
  mean = np.array([.5, -1.0, 2.0, 0.0])
  signed = Yardstick(9, .25, mean, np.full(4, .1), threshold=np.full(4, .9))
  overall = Yardstick(30, .75, np.ones(4), np.full(4, .1), shift=np.full(4, .25),
                      spread=np.full(4, 2), mirror=np.full(4, .5))
  for target in ('location', 'image'):
    folder = tmp_path / f'cells/gapnet/{target}/3x3/seed0'
    folder.mkdir(parents=True)
    write_json(folder / 'ranking_yardstick.json', {'overall': overall, 'left': signed}, step=7)
  (tmp_path / 'results.json').write_text(json.dumps(records))
  text = report.build(tmp_path).with_name('README.md').read_text()
  _, section = text.split("## Is a channel's position real?")
  head, _, *rows = _rows(section.split('\n## ')[0])
  dash = '\N{EN DASH}'
  assert head[3:] == ['halves agree', 'rise beyond chance', 'fall beyond chance',
                      'shift over mirror', 'mirror over spread']
  assert rows == [row for target in ('image', 'location') for row in (
    [f'gapnet/{target}/3x3', 'overall', '30', '+0.75', dash, dash, '0.50', '0.25'],
    [f'gapnet/{target}/3x3', 'left', '9', '+0.25', '1 of 4', '1 of 4', dash, dash])]
  assert section.count('Of 4 channels are beyond chance: left 2. A shift by one pixel changes 50%'
                       ) == 2
  for words in ('for a centred ranking which of all images are the region\'s', '64 at most',
                'images to be drawn independently'):
    assert words in section
  assert re.findall(r'!\[[^\]]+\]\(([^)]+)\)', section) == ['yardstick.png', 'yardstick1.png']


def test_other_counts_stand_in_a_picture_of_their_own(records, tmp_path):
  """Two networks that lost other numbers of channels share no axis."""
  cell = next(c for c in suites.attack('small') if c.name == 'gapnet/image/3x3')
  fewer = [{**r} for r in records if r['cell'] != cell.name]
  sweep = Sweep((0, 7), {'image_accuracy': {'overall': np.array([[.9, .1]]),
                                            'random': np.array([[.9, .8]])}})
  mixed = add_attack(fewer, cell, sweep, chance=.1)
  (tmp_path / 'results.json').write_text(json.dumps(mixed))
  text = report.build(tmp_path).with_name('README.md').read_text()
  assert re.findall(r'!\[[^\]]+\]\(([^)]+)\)', text) == ['attack.png', 'attack1.png']


def test_chance_is_drawn_where_it_is(tmp_path):
  """In a panel from 0 to about 1: the dotted line's row between those of the curves."""
  sweep = Sweep((0, 10), {'location_accuracy': {'overall': np.array([[.9, .9]]),
                                                'left': np.array([[.1, .1]])}})
  pictures.curves(sweep, tmp_path / 'a.png', chance={'location_accuracy': .5})
  picture = pixels(tmp_path / 'a.png')
  high, low, at = (row(picture, color) for color in (plots.LINES[1], plots.LINES[0], plots.SOFT))
  assert (at - high) / (low - high) == pytest.approx(.5, abs=.02)


def test_the_legend_of_one_panel_is_whole(tmp_path):
  """A single panel is as wide as the page, for which the legend's rows are made."""
  names = [name for name in pictures.LOOKS if name not in ('top', 'bottom')]
  sweep = Sweep((0, 10), {'location_accuracy': {name: np.array([[.9, .5]]) for name in names}})
  pictures.curves(sweep, tmp_path / 'a.png', chance={'location_accuracy': .1})
  assert pixels(tmp_path / 'a.png').shape[1] == round(7.8 * plots.DPI)


def test_curves_are_drawn_where_the_values_are(tmp_path):
  high, low = np.full((1, 3), .9), np.full((1, 3), .2)
  sweep = Sweep((0, 10, 20), {'miou_0,0,1,0.3': {
    'left': high, 'right': low, 'other': (high + low) / 2,
    'random': np.array([[.4] * 3, [.8] * 3])}})
  for name in 'ab':
    pictures.curves(sweep, tmp_path / f'{name}.png')
  assert (tmp_path / 'a.png').read_bytes() == (tmp_path / 'b.png').read_bytes()
  # Rows count from the top; values are .9, .2 and .6.
  picture = pixels(tmp_path / 'a.png')
  left, right, at = (row(picture, color) for color in (plots.LINES[0], plots.LINES[2], plots.SOFT))
  assert left < at < right
  assert (at - left) / (right - left) == pytest.approx(.3 / .7, abs=.02)
  refused(lambda: pictures.curves(Sweep((0, 1), {}), tmp_path / 'a.png'), 'no metric')


def test_orders_in_words():
  found = [pictures.order_name(name) for name in ('overall', 'left_centred', 'left_raw', 'right')]
  assert found == ['position channels, overall', 'left channels, centred', 'left_raw channels',
                   'right channels']


def test_the_whole_network_has_the_regions_that_an_attack_measured():
  """Beside a run's own metrics, which know none of its rectangles."""
  about = {'task': 'segmentation', 'network': 'deeplabv3', 'dataset': 'camvid', 'cell': 'a',
           'values': [.5], 'n': 1, 'std': None}
  removed = [{**about, 'order': order, 'N': count, 'metric': metric, 'mean': mean}
             for order, count, means in (('clean', 0, (.5, .4)), ('overall', 10, (.3, .2)))
             for metric, mean in zip(('miou', 'miou_0.5,0,1,1'), means, strict=True)]
  found = report_attack.table([{**about, 'metric': 'miou', 'mean': .51}, *removed])
  assert [row[3:] for row in found.rows] == [['51.0 (1)', '40.0 (1)'], ['30.0 (1)', '20.0 (1)']]


def test_a_subject_is_a_network_and_its_grid():
  record = {'task': 'canvas', 'network': 'permutenet_fixed', 'target': 'image', 'grid': 7}
  assert report_attack.subject(record) == f'PermuteNet, fixed order, 7{plots.TIMES}7'
  assert report_attack.subject({'cell': 'deeplabv3/camvid'}) == 'deeplabv3/camvid'
