"""Every mistake a person can make: one clear line, exit code 2, no traceback."""

import asyncio
import json

import jax.numpy as jnp
import pytest
from conftest import ROOT, refused

from gapjax import cli, config, paths
from gapjax.cli import verbs
from gapjax.data import catalogue
from gapjax.errors import Diverged, UsageError
from gapjax.neurons import run
from gapjax.reproduce import suites

GAPNET = f'--config={ROOT}/configs/gapnet_cifar10.py'
AUGSHIFT = f'--config={ROOT}/configs/augshift_cifar10.py'
DIGITS = f'--config={ROOT}/configs/digits.py'
MOVED = ('--config.task=classification', '--config.model.stem=cifar', '--config.batch_size=48')


@pytest.mark.parametrize(('argv', 'expected'), [
  (['trian'], 'unknown verb `trian` (did you mean `train`?)'),
  (['train', '--workdir=w'], 'give --config=FILE'),
  (['train', '--workdir=w', '--config.model.width=8'], 'which config? give --config=FILE'),
  (['evaluate', '--workdir=w', '--data_dir=gs://bucket/data'], 'give a local path'),
  (['prepare', 'cifar10', '--source=gs://bucket/x'], 'give a local path'),
  (['bench', '--config.augshift.weight=3'], '`augshift.weight` is not read in the task canvas'),
  (['bench', '--torch=compiled'], '--torch says how the twin of --against=torch runs, which is'),
  (['convert', '--check', '--wrap=net'], '--wrap is for a file of weights, and --check draws its'),
  (['convert', 'a.pth', 'w', '--output=f.json'], '--output is for --check'),
  (['bench', '--output=.'], '--output=. is a folder; name a file in it'),
  (['train', GAPNET], '--workdir'),
  (['train', GAPNET, '--workdir='], 'is empty; name a file or folder'),
  (['train', GAPNET, '--workdir=w', '--distributed='], '--distributed: is empty; give a value'),
  (['attack', '--workdir=runs', '--ranking='], '--ranking: is empty; give a value'),
  (['bench', GAPNET, '--against='], '--against: is empty; give a value'),
  (['train', '--config=nowhere.py', '--workdir=w'], 'no config file `nowhere.py`'),
  *((['train', f'--config={name}', '--workdir=w'],
     f'no config file `{name}` (did you mean `gapnet_cifar10`')
    for name in ('gapnet_cifar', 'mine/gapnet_cifar10.py')),
  (['train', GAPNET, '--workdir=w', '--config.model.widht=8'],
   'unknown config field `model.widht` (did you mean `model.width`?)'),
  (['train', GAPNET, '--workdir=w', '--config.modle.width=8'],
   '(did you mean `model.width`?)'),
  (['train', GAPNET, '--workdir=w', '--config.model=8'], 'model'),
  (['train', GAPNET, '--workdir=w', '--config.batch_size=many'], 'many'),
  (['train', GAPNET, '--workdir=w', '--config.augshift.crops=2'],
   'config field `augshift.crops` is not read in the task canvas'),
  (['train', GAPNET, '--workdir=w', '--config.model.dropout=.5'], '`model.dropout` is not read'),
  *((['train', f'{AUGSHIFT}:network=resnet18', '--workdir=w', f'--config.augshift.{field}'],
     f'`augshift.{field.partition("=")[0]}` is of the pairwise loss of two crops')
    for field in ('weight=3', 'stacked=False', 'warm_up=0')),
  (['train', f'--config={ROOT}/configs/deeplab_camvid.py', '--workdir=w',
    '--config.model.head=permuted'], '`model.head` is not read in the task segmentation'),
  (['train', GAPNET, '--workdir=w', '--cofnig=x'], 'cofnig'),
  (['train', GAPNET, '--workdir=w', 'fast'], 'unexpected argument `fast`'),
  (['train', f'{GAPNET}:gird=3', '--workdir=w'], 'unknown variant `gird=3` (did you mean `grid`?)'),
  (['train', f'{GAPNET}:grid=three', '--workdir=w'], 'grid must be a number'),
  (['train', f'{GAPNET}:grid=0', '--workdir=w'], 'canvas.grid must be a number above 0, not 0'),
  (['train', GAPNET, '--workdir=w', '--config.canvas.grid=-1'],
   'canvas.grid must be a number above 0, not -1'),
  (['train', GAPNET, '--workdir=w', '--config.canvas.target=locaton'],
   'unknown canvas.target `locaton` (did you mean `location`?)'),
  (['train', GAPNET, '--workdir=w', '--config.model.name=resnet19'], '(did you mean `resnet1'),
  (['train', GAPNET, '--workdir=w', '--config.model.padding=zeros'],
   'unknown model.padding `zeros` (did you mean `zero`?)'),
  (['train', GAPNET, '--workdir=w', '--config.model.head=permute'],
   'unknown model.head `permute` (did you mean `permuted`?)'),
  (['train', GAPNET, '--workdir=w', '--config.model.permute_at=stage2'], 'model.head=permuted'),
  (['train', GAPNET, '--workdir=w', '--config.optimizer.lr=nan'],
   'optimizer.lr must be a number above 0'),
  (['train', GAPNET, '--workdir=w', '--config.seed=99999999999999999999'], 'seed must be'),
  (['train', GAPNET, '--workdir=w', '--config.optimizer.b1=2'], 'optimizer.b1 must be'),
  (['train', GAPNET, '--workdir=w', '--config.optimizer.momentum=nan'], 'momentum must be'),
  (['train', GAPNET, '--workdir=w', '--config.schedule.step_factor=-1'], 'step_factor must be'),
  (['train', GAPNET, '--workdir=w', "--config.schedule.step_epochs=('a',)"], 'step_epochs'),
  (['train', GAPNET, '--workdir=w', '--config.checkpoint.every_epochs=1e-9'],
   'checkpoint.every_epochs must be a number at least 0.001'),
  (['train', GAPNET, '--workdir=w', '--config.model.downsample=blurr'],
   'unknown model.downsample `blurr` (did you mean `blur`?)'),
  (['train', GAPNET, '--workdir=w', '--config.model.downsample=blur',
    '--config.model.blur_size=1'], 'model.blur_size must be a number at least 2 and below 6'),
  (['train', AUGSHIFT, '--workdir=w', '--config.augshift.weight=-1'],
   'augshift.weight must be a number at least 0, not -1'),
  (['train', AUGSHIFT, '--workdir=w', '--config.eval.map_step=9'],
   'eval.map_step=9 leaves no map within eval.max_shift=8'),
  (['train', AUGSHIFT, '--workdir=w', '--config.augshift.warm_up=1.5'],
   'augshift.warm_up must be a number at least 0 and at most 1, not 1.5'),
  (['train', AUGSHIFT, '--workdir=w', '--config.augshift.crops=3'],
   'augshift.crops must be a number at least 1 and below 3'),
  (['train', AUGSHIFT, '--workdir=w', '--config.task=classify'],
   'unknown task `classify` (did you mean `classification`?)'),
  (['train', f'{AUGSHIFT}:network=augshfit', '--workdir=w'],
   'unknown network `augshfit` (did you mean `augshift`?)'),
  (['train', DIGITS, '--workdir=w', *MOVED, '--config.augshift.max_shift=16'],
   'augshift.max_shift=16: a shift of 16 pixels does not fit images of 16x16'),
  (['train', DIGITS, '--workdir=w', *MOVED, '--config.model.downsample=polyphase',
    '--config.data.image_size=10'],
   'polyphase downsampling needs even sizes, not a 5x5 feature map'),
  (['train', GAPNET, '--workdir=w', '--config.batch_size=48'], 'gapjax prepare cifar10 --source='),
  (['train', GAPNET, '--workdir=s3://bucket/run'], 'a remote folder must be gs://BUCKET/FOLDER'),
  (['train', GAPNET, '--workdir=w', '--config.batch_size=30'],
   '30 cannot be shared by 8 devices; use 24 or 32'),
  (['train', GAPNET, '--workdir=w', '--config.data.name=cifar11'],
   '(did you mean `cifar10`?)'),
  (['evaluate'], '--workdir'),
  (['evaluate', '--workdir=nowhere'], 'holds no run'),
  (['report', '--workdir=nowhere'], 'nowhere'),
  (['prepare', 'cifra10'], '(did you mean `cifar10`?)'),
  (['prepare', 'cifar10', '--source=nowhere'], 'nowhere'),
  (['reproduce', 'table9', '--workdir=w'], 'unknown suite `table9` (did you mean `table'),
  (['reproduce', 'table1', '--workdir=w', '--scale=huge'], 'huge'),
  (['reproduce', 'ablations', '--workdir=w', '--scale=narrow'],
   'unknown scale of ablations `narrow`'),
  (['reproduce', 'table2', '--workdir=w', '--cells=augshfit/*'],
   '--cells: no cell is named `augshfit/*`; there are resnet18/cifar10, unshifted/cifar10'),
  (['reproduce', 'table2', '--workdir=w', '--cells=*/cifar100'],
   'gapjax prepare cifar100 --source='),
  (['reproduce', 'table2', '--workdir=w', '--config.num_epoch=1'],
   'unknown config field `num_epoch` (did you mean `num_epochs`?)'),
  (['reproduce', 'table1', '--workdir=w', '--seed=2'], 'unexpected argument `--seed=2`'),
  (['reproduce', 'table1', '--workdir=w', '--with_torch', '--minutes=5'],
   '--minutes cannot stop the PyTorch twin, which does not resume: leave it or --with_torch out'),
  (['reproduce', 'table1', '--workdir=w', '--seeds=0'], '--seeds: must be at least 1'),
  (['quickstart', '--sclae=tiny'], 'sclae'),
])
def test_mistakes(complaint, monkeypatch, tmp_path, argv, expected):
  monkeypatch.chdir(tmp_path)
  data = [f'--data_dir={tmp_path}'] if argv[0] in ('train', 'prepare', 'reproduce') else []
  assert expected in complaint(*argv, *data)
  assert not list((tmp_path / 'w').glob('[!.]*'))  # but for the lock


def test_a_field_with_a_space_is_no_region(monkeypatch, complaint):
  """argparse takes what it does not know, and has a space, for one more value of a list."""
  seen = {}

  def attack_run(workdir, **how):
    seen.update(how)
    raise UsageError('seen')
  monkeypatch.setattr(run, 'attack_run', attack_run)
  field = "--config.neurons.classes=('bicyclist', 'car')"
  assert 'seen' in complaint('attack', '--workdir=w', '--regions', 'left', 'right', field)
  assert (seen['regions'], seen['neurons']) == (['left', 'right'], [field])


@pytest.mark.parametrize(('line', 'expected'), [
  ('raise KeyError("width")', 'KeyError'),
  ('c.model.depth = 3', 'unknown config field `model.depth`'),
  ('c.data.train_images = None', 'data.train_images must be like 0, not None'),
  ('c.num_epochs = True', 'num_epochs must be like 20, not True'),
  ('del c.canvas.fill', 'config field `canvas.fill` is missing'),
])
def test_a_config_file_that_fails_or_has_impossible_fields(complaint, tmp_path, line, expected):
  path = tmp_path / 'mine.py'
  path.write_text('from gapjax import config\n\n\ndef get_config(arg=None):\n'
                  f'  c = config.default()\n  {line}\n  return c\n')
  assert expected in complaint('train', f'--config={path}', f'--workdir={tmp_path}/w')


def test_overrides_and_variants_reach_the_config():
  c = config.from_flags([f'{GAPNET}:grid=7,target=image', '--config.optimizer.lr=3e-4',
                         '--config.schedule.step_epochs=(1,2)', '--config.data.flip=false'])
  assert (c.canvas.grid, c.canvas.target) == (7, 'image')
  assert (c.optimizer.lr, tuple(c.schedule.step_epochs), c.data.flip) == (3e-4, (1, 2), False)


def test_a_run_is_ranked_by_fields_that_its_task_reads():
  field = '--config.neurons.split=val'
  refused(lambda: config.with_fields(config.default(), [field], of='neurons.'),
          '`neurons.split` is not read in the task canvas')


def test_a_config_file_is_executed_once(tmp_path):
  path = tmp_path / 'mine.py'
  path.write_text('from gapjax import config\n\n\ndef get_config(arg=None):\n'
                  f'  with open({str(tmp_path / "log")!r}, "a") as file:\n    file.write("x")\n'
                  '  return config.default()\n')
  assert config.from_flags([f'--config={path}', '--config.seed=3']).seed == 3
  assert (tmp_path / 'log').read_text() == 'x'


def test_what_a_field_decides():
  """Another number of kept checkpoints is the same run; another batch to evaluate by the same run
  and another number; other removed channels another attack alone."""
  ours, decided = config.default(), {}
  for name, value in (('checkpoint.keep', 9), ('eval.batch_size', 9), ('neurons.counts', 9),
                      ('batch_size', 96)):
    theirs = config.default()
    theirs.update_from_flattened_dict({name: value})
    decided[name] = [bool(config.difference(ours, config.as_json(theirs), deciding=what))
                     for what in (config.RUN, config.EVALUATION, config.RECORD)]
  assert decided == {'checkpoint.keep': [False, False, False], 'batch_size': [True, True, True],
                     'eval.batch_size': [False, True, True], 'neurons.counts': [False, False, True]}


def test_a_field_that_is_not_on_disk_is_what_it_was(monkeypatch):
  """Before Nesterov's momentum could be had, none was: whatever the default becomes."""
  old = config.as_json(config.default())
  del old['optimizer']['nesterov']
  nesterov = config.FIELDS['optimizer.nesterov']._replace(default=True)
  monkeypatch.setitem(config.FIELDS, 'optimizer.nesterov', nesterov)
  assert config.default().optimizer.nesterov and not config.from_json(old).optimizer.nesterov
  assert config.difference(config.default(), old) == ['optimizer.nesterov True (there: False)']
  del old['batch_size']  # was always there
  refused(lambda: config.from_json(old), 'batch_size')
  assert 'batch_size 48 (there: None)' in config.difference(config.default(), old)


def test_fields_that_a_task_does_not_read_make_no_other_config():
  canvas, moved = config.default(), config.default()
  moved.task = 'classification'
  there = {c.task: config.as_json(c) for c in (canvas, moved)}
  canvas.augshift.weight = moved.augshift.weight = 7.0
  canvas.canvas.grid = moved.canvas.grid = 5
  assert config.difference(canvas, there['canvas']) == ['canvas.grid 5 (there: 3)']
  assert config.difference(moved, there['classification']) == ['augshift.weight 7.0 (there: 10.0)']
  assert len(config.difference(moved, there['canvas'])) == 3


def test_what_the_verbs_take_is_what_there_is():
  """verbs.py repeats it, so that --help loads nothing."""
  assert {*verbs.DATASETS} == {*catalogue.NAMES}
  assert {*verbs.SUITES, 'quickstart'} == {*suites.SUITES}


def test_a_tilde_is_the_home_of_the_user(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  (tmp_path / 'mine.py').write_text((ROOT / 'configs/digits.py').read_text())
  assert config.from_flags(['--config=~/mine.py']).data.name == 'digits'
  (tmp_path / 'ids.txt').write_text('a\n')
  for argument, name in (('left=~/ids.txt', 'left'), ('~/ids.txt', None)):
    assert paths.named(argument) == (name, str(tmp_path / 'ids.txt'))


def test_help(capsys):
  assert cli.main(['--help']) == 0
  text = capsys.readouterr().out
  assert all(verb in text for verb in cli.VERBS)
  assert cli.main([]) == 2
  for verb in cli.VERBS:
    with pytest.raises(SystemExit) as done:
      cli.main([verb, '--help'])
    assert done.value.code == 0


@pytest.mark.slow
def test_quickstart_at_its_smallest(gapjax, tmp_path, data_dir):
  """All networks, a dozen lines, the report, and a second start that has nothing left to do."""
  command = ['quickstart', '--scale=tiny', f'--workdir={tmp_path}', f'--data_dir={data_dir}']
  first = gapjax(*command)
  assert first.returncode == 0, first.stderr
  page = tmp_path / 'report' / 'report.html'
  assert first.stdout.splitlines()[-1] == f'report: {page}'
  results = json.loads((tmp_path / 'results.json').read_text())
  # Two metrics for each of three canvas cells, six for each of three of shifted images, eight of a
  # segmentation network, and for each of six orders at three N and for none mIoU in four regions.
  assert len(results) == 3 * 2 + 3 * 6 + 8 + 4 * (6 * 3 + 1)
  assert len(first.stdout.splitlines()) == 3 + 7 + 1  # claims, networks, the page
  for random, n in ((False, 1), (True, 2)):
    assert {r['n'] for r in results if (r.get('order') == 'random') == random} == {n}
  before = page.read_bytes()
  again = gapjax(*command)
  assert 'is known from' in again.stderr and again.stdout == first.stdout
  assert page.read_bytes() == before


def test_too_little_memory(monkeypatch, complaint):
  """Not a bucket's fault, though its text begins as tensorstore's; and not worth a restart."""
  monkeypatch.setitem(cli.VERBS, 'report', lambda _: jnp.zeros(2 ** 47, jnp.uint8))
  line = complaint('report')
  assert 'the device has too little memory (RESOURCE_EXHAUSTED: ' in line and 'batch_size' in line


def test_a_training_that_diverged_is_not_worth_a_restart(monkeypatch, capsys):
  def train(_):
    raise Diverged('the loss is not finite at step 7')

  monkeypatch.setitem(cli.VERBS, 'train', train)
  assert cli.main(['train']) == 3
  assert 'at step 7: try a lower optimizer.lr' in capsys.readouterr().err


def test_a_bucket_that_cannot_be_reached_is_worth_trying_again(monkeypatch, capsys):
  """Exit code 1, which launch/restart.sh starts again; 2 would be final."""
  aiohttp = pytest.importorskip('aiohttp')

  async def fetch():
    async with aiohttp.ClientSession() as session:
      await session.get('http://127.0.0.1:9')  # nobody listens there

  monkeypatch.setitem(cli.VERBS, 'report', lambda _: asyncio.run(fetch()))
  assert cli.main(['report']) == 1
  error = capsys.readouterr().err
  assert error.startswith('gapjax: Cloud Storage cannot be reached (') and error.count('\n') == 1
