"""What reports of the second claim say in words: names of networks, comparisons, notes."""

import dataclasses
import re

import pytest
from conftest import ROOT
from test_report import _markdown, _run
from test_report_shifts import _detail, _shift_records

from gapjax import config, recipes
from gapjax.records import runs, schema
from gapjax.report import page as report
from gapjax.report import shifts
from gapjax.report.parts import Source
from gapjax.reproduce import suites

LABELS = ('test images', 'training images left out, to measure by')


def test_differences_are_over_the_seeds_that_both_have():
  """In whatever order they stand; how many those are is said, and nothing where there are none."""
  values = {('resnet18', 'consistency'): {0: .5, 1: .6, 2: .9},
            ('two_crops', 'consistency'): {2: .7},
            ('augshift', 'consistency'): {2: .95, 1: .7},
            ('two_crops', 'feature_distance'): {0: .2, 2: .09},
            ('augshift', 'feature_distance'): {2: .02, 1: .04}}
  records = [{'dataset': 'cifar10', 'network': network, 'metric': metric, 'seeds': [*of_seed],
              'values': [*of_seed.values()]} for (network, metric), of_seed in values.items()]
  *_, here = shifts.lead(Source(None, records=records))
  assert here == (
    'On cifar10 AugShift is +7.5 points (2 seeds) more consistent than the network alone and +25.0 '
    '(1 seed) than two crops without the loss, and the squared distance of its features of two '
    'shifts is 22% of theirs (1 seed).')
  equal = [{**record, 'values': [0, 0]} for record in records[-2:]]
  *_, here = shifts.lead(Source(None, records=[*records[:-2], *equal]))
  assert here.endswith('its features of two shifts is equal to theirs (1 seed).')
  for i in range(5):  # without one of them
    assert len(shifts.lead(Source(None, records=records[:i] + records[i + 1:]))) == 2


def test_a_comparison_is_said_where_there_are_two():
  for networks, said in ((('blurpool',), False), (('resnet18', 'blurpool'), True)):
    source = Source(None, records=_shift_records(networks))
    lead = shifts.lead(dataclasses.replace(source, cells=shifts.cells(source)))
    assert ('compared with the plain network and with BlurPool' in ' '.join(lead)) == said


@pytest.mark.parametrize(('fields', 'name'), [
  (('augshift.crops=2', 'augshift.weight=1.'), 'AugShift'),
  (('augshift.crops=2', 'augshift.weight=1.', 'model.downsample=blur'), 'AugShift + BlurPool'),
  (('augshift.crops=2', 'augshift.weight=0.'), 'Two crops, weight 0'),
  (('augshift.crops=2', 'augshift.weight=0.', 'model.downsample=blur'), 'two_crops_blurpool'),
  (('augshift.crops=1', 'model.downsample=polyphase', 'model.blur_size=1'), 'APS'),
  (('augshift.crops=1', 'model.name=resnet34'), 'ResNet-34')])
def test_title_of_a_single_run(tmp_path, fields, name):
  _run(tmp_path, 'task=classification', *fields, final={'image_accuracy': .5})
  assert f'<h1>{name}: cifar10</h1>' in report.build(tmp_path).read_text(encoding='utf-8')


def test_a_network_that_has_no_name_of_its_own_is_drawn(tmp_path):
  _run(tmp_path, 'task=classification', 'augshift.max_shift=0', 'model.downsample=blur',
       final={'image_accuracy': .9, 'consistency': .8, 'feature_distance': .1},
       shifts=_detail('blurpool', .9, .8)['shifts'],
       points=[{'step': 9, 'split': 'train', 'loss': 2., 'accuracy': .2}, *(
         {'step': step, 'split': 'eval', 'accuracy': at, 'consistency': at, 'loss': 1.}
         for step, at in ((9, .5), (19, .8)))])
  page = report.build(tmp_path).read_text(encoding='utf-8')
  assert '<h1>blurpool_unshifted: cifar10</h1>' in page and page.count('<img') == 5


def test_images_that_were_left_out_are_no_test_images(tmp_path):
  """Where config.data.held_out leaves some out, networks are measured by those."""
  figure = 'test images', 'training images that were left out'
  for held_out, (said, other), (counted, wrong) in ((0, LABELS, figure),
                                                    (500, LABELS[::-1], figure[::-1])):
    _run(tmp_path, 'task=classification', f'data.held_out={held_out}', final={'image_accuracy': .5},
         shifts=_detail('resnet18', .5, .8)['shifts'], sizes={'chance': .1, 'test_images': 500})
    report.build(tmp_path)
    page = _markdown(tmp_path)
    assert re.search(rf'\| {said} *\| 500 ', page) and f'| {other} ' not in page
    assert f'on 1,500 {counted}' in page and f'on 1,500 {wrong}' not in page


def test_scale_notes_depend_on_the_suite():
  table1, table2, unknown = (report.scale_notes([{'suite': suite, 'scale': 'small'}])
                             for suite in ('table1', 'table2', 'mine'))
  assert '16 x 16' in table1[0] and 'narrow ResNet-18' in table2[0] and len(unknown) == 1
  narrow = [report.scale_notes([{'suite': suite, 'scale': 'narrow'}])
            for suite in ('table1', 'table2', 'augshift_sweep', 'mine')]
  assert all('a quarter of the width' in note for note, in narrow)
  assert 'GAPNet' in narrow[0][0] and 'all training images and 20 epochs' in narrow[1][0]
  assert 'images but those by which it is measured and 20 epochs' in narrow[2][0]
  sweep = {'suite': 'augshift_sweep', 'scale': 'small'}
  assert report.scale_notes([{'suite': 'table2', 'scale': 'small'}, sweep]) == table2
  assert suites.table2('full')[0].config.model.dtype == 'bfloat16'
  of_dtype = [{'suite': 'table2', 'scale': 'full', 'config': {'model': {'dtype': dtype}}}
              for dtype in ('bfloat16', 'float32')]
  full, in_float32, mixed = map(report.scale_notes, (of_dtype[:1], of_dtype[1:], of_dtype))
  assert 'Networks compute in bfloat16' in full[1] and in_float32 == mixed == full[:1]
  epochs = [cell.config.num_epochs for cell in suites.table2('full')[::len(recipes.SHIFT_NETWORKS)]]
  assert '{} epochs on CIFAR-10 and {} on CIFAR-100'.format(*epochs) in full[0]
  longer = next(r for r in schema.read(ROOT / 'results/ablations/results.json') if (
    r['cell'], r['metric']) == ('permute_at=pooled_5x/location/3x3', 'location_accuracy'))
  [note] = report.scale_notes([{'suite': 'quickstart', 'scale': 'digits'}])
  assert f'{longer["detail"]["steps"]:,} steps' in note and f'{100 * longer["mean"]:.1f}%' in note


@pytest.mark.parametrize(('fields', 'name'), [
  ({'task': 'classification'}, 'resnet18'),
  ({'task': 'classification', 'augshift.max_shift': 0}, 'unshifted'),
  ({'task': 'classification', 'augshift.max_shift': 0, 'model.downsample': 'blur'},
   'blurpool_unshifted'),
  ({'task': 'classification', 'augshift.max_shift': 0, 'model.downsample': 'blur',
    'model.blur_size': 4}, 'blurpool_4_unshifted'),
  ({'task': 'classification', 'augshift.max_shift': 0, 'model.padding': 'circular'},
   'circular_unshifted'),
  ({'task': 'classification', 'model.padding': 'full'}, 'full_padding'),
  ({'task': 'classification', 'model.downsample': 'blur', 'model.blur_size': 4}, 'blurpool_4'),
  ({'task': 'classification', 'model.downsample': 'learned_polyphase', 'model.blur_size': 1},
   'lps'),
  ({'task': 'classification', 'model.padding': 'circular', 'model.downsample': 'polyphase'},
   'aps_blur_3_circular'),
  ({'task': 'classification', 'model.padding': 'circular', 'augshift.crops': 2},
   'augshift_circular'),
  ({'task': 'classification', 'augshift.crops': 2, 'augshift.weight': 0., 'model.blur_size': 2,
    'model.downsample': 'blur'}, 'two_crops_blurpool_2'),
  ({'task': 'classification', 'model.padding': 'reflect'}, 'reflect_padding'),
  ({'task': 'segmentation', 'model.name': 'deeplabv3', 'model.padding': 'circular'},
   'deeplabv3_circular'),
  ({'task': 'segmentation', 'model.name': 'deeplabv3plus', 'model.downsample': 'blur'},
   'deeplabv3plus_blurpool'),
  ({'model.name': 'vgg11', 'model.downsample': 'blur', 'model.padding': 'circular'},
   'gapnet_blurpool_circular'),
  ({'model.head': 'permuted'}, 'permutenet'),
  ({'model.head': 'permuted', 'model.permutation': 'fixed'}, 'permutenet_fixed'),
  ({'model.head': 'permuted', 'model.permute_at': 'stage2'}, 'permutenet_stage2')])
def test_a_run_alone_is_called_after_what_makes_it_another_network(fields, name):
  c = config.default()
  c.update_from_flattened_dict(fields)
  assert runs.network_of(config.as_json(c)) == name


@pytest.mark.parametrize('name', recipes.SHIFT_NETWORKS)
def test_a_row_of_table_2_trained_alone_has_its_name(name):
  c = recipes.shifted(name, recipes.cifar('cifar10'))
  assert runs.network_of(config.as_json(c)) == name
