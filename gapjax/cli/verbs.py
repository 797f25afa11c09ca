"""The verbs and their flags; each verb is one call into the module that does the job."""

import json
import logging
import os
import shlex
import sys

from gapjax import paths
from gapjax.cli.flags import (
  CONFIG,
  DATA,
  NEURONS,
  OUTPUT,
  VERBS,
  WORKDIR,
  check_output,
  duration,
  flag,
  folder,
  local,
  positive,
  verb,
)
from gapjax.errors import (
  CheckFailed,
  Diverged,
  Interrupted,
  TrainingFailed,
  UsageError,
  check_choice,
  first_line,
  refused_variable,
)
from gapjax.training.system import Unbreakable, is_large, keep_freed_memory

USAGE = """usage: gapjax VERB [flags]

  quickstart        the paper on scikit-learn's digits, in minutes on a CPU, with a report
  prepare DATASET   build a dataset on disk from its publisher's files, or download it
  train             train and evaluate one network; the same command resumes
  evaluate          all metrics of a run's newest checkpoint
  rank              which channels encode position, of a run or any PyTorch network
  attack            remove them, and as many random ones, and measure what is lost
  reproduce SUITE   every cell of a table, resumable, then its report
  report            Markdown, HTML and PNG from the JSON files of a workdir, or of each in a folder
  convert SRC DST   PyTorch's weights to a run, or a run's to PyTorch's
  compile           does a config fit a TPU that is not here, and how fast could it be
  bench             how fast training is here, alone or in turns with PyTorch

gapjax VERB --help says more."""
LONGEST = 1000  # characters of a complaint


# What `prepare` and `reproduce` take. data/catalogue.py and reproduce/suites.py have the same, but
# importing them loads NumPy and jax.
DATASETS = ('cifar10', 'cifar100', 'digits', 'voc2012', 'cityscapes', 'camvid', 'digit_scenes')
SUITES = ('table1', 'table2', 'augshift_sweep', 'attack', 'ablations')
WITH_TORCH = ('table1', 'table2', 'augshift_sweep')  # whose tables have a column for PyTorch


DEVICES = 'gapjax.training.devices'  # what loads jax


@verb(flag('--workdir', default='quickstart', type=folder,
           help=f'{WORKDIR[1]["help"]} (default quickstart)'), DATA,
      flag('--scale', choices=['digits', 'tiny'], default='digits',
           help='tiny: a few steps of each network, to see that it runs'))
def quickstart(arguments):
  """The whole paper on data that ships with scikit-learn."""
  print('gapjax: seven networks on handwritten digits; at scale digits two minutes on 2 cores',
        file=sys.stderr, flush=True)
  # A fifth less to compile on a CPU, and no number changes.
  os.environ['XLA_FLAGS'] = (os.environ.get('XLA_FLAGS', '')
                             + ' --xla_llvm_disable_expensive_passes=true')
  from gapjax.report import page as report
  [(records, page)] = run_suites(
    ['quickstart'], arguments, seeds=1, at_once=2,
    command=lambda _: f'gapjax quickstart --scale={arguments.scale}')
  print('\n'.join([*report.told(records, headings=True), f'report: {page}']))


@verb(DATA, flag('dataset', help=', '.join(DATASETS)),
      flag('--source', type=local, help="the publisher's files: a folder or archive (default: "
           'download CIFAR; digits and digit_scenes need none)'))
def prepare(arguments):
  """Builds a dataset on disk."""
  from gapjax import data
  print(data.prepare(arguments.dataset, source=arguments.source, data_dir=arguments.data_dir))


@verb(WORKDIR, DATA, CONFIG, flag(
  '--distributed', nargs='?', const='auto', metavar='HOST:PORT,N,I',
  help='this is one of several processes, each started with this command: without a value on Cloud '
  "TPU and under SLURM (srun needs no flag), else the first process' address, how many there are, "
  'and which this is, from 0'), fields='')
def train(arguments, chosen):
  """Trains and evaluates one network; prints its summary and the path of its report."""
  from gapjax import config
  config = config.from_flags(chosen)
  keep_freed_memory(large=is_large(config))
  from gapjax.report import page as report
  from gapjax.training import devices as parallel
  how = arguments.distributed or parallel.told_by_environment()
  if how:
    parallel.initialize(how)
  from gapjax.training.train import train
  with parallel.together():
    summary = train(config, workdir=arguments.workdir, data_dir=arguments.data_dir)
  if parallel.is_first():
    print(json.dumps({key: summary[key] for key in ('final', 'best', 'wall_seconds')}, indent=2))
    print(f'report: {report.build(arguments.workdir)}')


@verb(WORKDIR, DATA)
def evaluate(arguments):
  """Prints the metrics of a run's newest checkpoint; evaluation.json has lists and maps, too."""
  from gapjax.training.evaluate import evaluate
  result = evaluate(arguments.workdir, data_dir=arguments.data_dir)
  numbers = {k: v for k, v in result.items() if not isinstance(v, dict | list)}
  print(json.dumps(numbers, indent=2))


@verb(flag('--workdir', required=True, type=folder,
           help=f'{WORKDIR[1]["help"]}; with --torch a new one'), DATA,
      flag('--regions', nargs='+', metavar='REGION', help='names, or rectangles '
           'TOP,LEFT,BOTTOM,RIGHT in fractions (default: left right; with --torch those of --ids)'),
      flag('--ids', help='a JSON file {"left": [image ids], ...} to rank those regions by, in '
           'place of the masks; or REGION=FILE, a list of ids, one a line'),
      flag('--torch', metavar='MODULE:FUNCTION', help='no run, but the PyTorch network that this '
           'function returns, on the --images; their ids are their names in the folder'),
      flag('--images', metavar='FOLDER', type=local, help='images that --torch is ranked by'),
      flag('--layer', metavar='NAME', help="the layer of --torch, as named_modules() has it "
           '(default: the last that returns feature maps)'), fields=NEURONS)
def rank(arguments, neurons):
  """Ranks the channels of a run, or of any PyTorch network."""
  from gapjax.neurons import run
  from gapjax.report import attack as report_attack
  from gapjax.report.plots import neurons as pictures
  from gapjax.report.render import markdown_table
  region, path = paths.named(arguments.ids)
  ids = {region: paths.read_names(path)} if region else paths.read_json(path) if path else None
  if arguments.torch:
    ranking = rank_torch(arguments, neurons, ids)
  elif arguments.images or arguments.layer:
    raise UsageError('--images and --layer are for --torch=MODULE:FUNCTION, which is missing')
  else:
    ranking = run.rank_run(arguments.workdir, data_dir=arguments.data_dir,
                           regions=arguments.regions or run.SIDES, ids=ids, neurons=neurons)
  for name, order in ranking.orders.items():  # before the pictures, whose place may be full
    print(f'{name:10} {" ".join(map(str, order[:10]))} ...')
  if ranking.yardsticks:
    network = arguments.torch or arguments.workdir
    print(markdown_table(report_attack.yardstick_table({network: ranking.yardsticks})))
  pictures.save(paths.of(arguments.workdir), ranking)
  print(paths.of(arguments.workdir) / run.RANKING)


@verb(WORKDIR, DATA,
      flag('--ranking', help='a JSON file {"left": [channels], ...}, or NAME=FILE to call its one '
           'list so (default: rank this run\'s channels, overall, left and right)'),
      flag('--regions', nargs='+', metavar='REGION', help='where mIoU is measured: names, or '
           'rectangles TOP,LEFT,BOTTOM,RIGHT in fractions (default: all left right center)'),
      fields=NEURONS)
def attack(arguments, neurons):
  """Removes channels of a run and measures what is lost."""
  from gapjax.neurons import run
  from gapjax.report import attack as report_attack
  from gapjax.report import page as report
  from gapjax.report.plots import neurons as pictures
  from gapjax.report.render import markdown_table
  attacked = run.attack_run(arguments.workdir, data_dir=arguments.data_dir,
                            ranking=arguments.ranking, regions=arguments.regions, neurons=neurons)
  print(markdown_table(report_attack.table([{**record, 'cell': arguments.workdir}
                                            for record in attacked.sweep.records()])))
  pictures.save(paths.of(arguments.workdir), *attacked)
  if (paths.of(arguments.workdir) / 'summary.json').exists():  # else it is still to be trained on
    print(f'report: {report.build(arguments.workdir)}')


@verb(WORKDIR, DATA, flag('suite', nargs='+', help=f'{", ".join(SUITES)}; of several, each in '
                          'WORKDIR/SUITE, the cells that tell most come first'),
      flag('--seeds', type=positive, default=1, help='train with seeds 0 to SEEDS - 1'),
      flag('--scale', choices=['small', 'narrow', 'pretrained', 'full'], default='full',
           help='full (default): for accelerators; small, narrow (table1, table2, augshift_sweep) '
           'and pretrained (attack): for CPUs'),
      flag('--cells', help="only these, such as 'augshift/* resnet18/cifar10'"),
      flag('--with_torch', action='store_true', help='train the same networks in plain PyTorch '
           f'too, for the column PyTorch ({", ".join(WITH_TORCH)})'),
      flag('--minutes', type=duration, help='begin no cell that would not end within so many, as '
           'far as those before it tell, and stop, saved, when they are over'),
      fields='--config.FIELD=VALUE sets a field of every cell, such as --config.num_epochs=100 '
      '(fields: gapjax/config.py)')
def reproduce(arguments, changes):
  """Trains every cell of a suite."""
  for suite in arguments.suite:
    check_choice(suite, SUITES, what='suite')
    if arguments.with_torch and suite not in WITH_TORCH:
      raise UsageError(f'--with_torch: the tables of {suite} have no column for PyTorch; those of '
                       f'{", ".join(WITH_TORCH)} do: leave it or {suite} out')
  if arguments.with_torch and arguments.minutes:
    raise UsageError('--minutes cannot stop the PyTorch twin, which does not resume: leave it or '
                     '--with_torch out')

  def command(suite):
    return ' '.join([
      'gapjax reproduce', suite, f'--scale={arguments.scale}', f'--seeds={arguments.seeds}',
      *([f'--cells={shlex.quote(arguments.cells)}'] if arguments.cells else []),
      *(['--with_torch'] if arguments.with_torch else []), *map(shlex.quote, changes)])

  from gapjax.report import page as report
  for records, page in run_suites(
      list(dict.fromkeys(arguments.suite)), arguments, seeds=arguments.seeds, command=command,
      only=arguments.cells, with_torch=arguments.with_torch, changes=changes,
      minutes=arguments.minutes):
    print('\n'.join([report.table(records).rstrip(), *report.scale_notes(records)]))
    print(f'\nreport: {page}')


@verb(WORKDIR)
def report(arguments):
  """Builds the report of a workdir, or of each workdir in a folder; prints their paths."""
  from gapjax.report import page as report
  print(*report.build_all(arguments.workdir), sep='\n')


@verb(CONFIG,
      flag('source', metavar='SRC', nargs='?', type=local, help='a file of weights (.pth, .pt, '
           '.safetensors, .npz), or the workdir of a run'),
      flag('target', metavar='DST', nargs='?', type=local, help='a new workdir, whose network '
           '--config says, or a new file'),
      flag('--wrap', help="key of a dict around a .pth file's weights, as the authors' scripts "
           'read them: net, model_state'),
      flag('--check', action='store_true', help='no SRC and DST: print how far gapjax and PyTorch '
           'differ from the same weights, for many small networks or that of --config, and exit '
           'with 1 where it is more than rounding'),
      flag('--output', metavar='FILE', type=local, help="--check's table as JSON, too"), fields='')
def convert(arguments, chosen):
  """PyTorch's weights to a run, or a run's to PyTorch's; --check compares what both compute."""
  from gapjax import config
  from gapjax.weights.files import require_torch
  if arguments.check:
    if arguments.source:
      raise UsageError('--check draws its own weights; leave SRC and DST out')
    if arguments.wrap:
      raise UsageError('--wrap is for a file of weights, and --check draws its own; leave it out')
    check_output(arguments.output)
    require_torch('--check', 'leave it out')
    from gapjax.pytorch import reference
    return reference.check(config.from_flags(chosen) if chosen else None, output=arguments.output)
  if not arguments.target:
    raise UsageError('convert what to what? give SRC and DST, or --check (gapjax convert --help)')
  if arguments.output:
    raise UsageError('--output is for --check, whose table it keeps; leave it out')
  if chosen and os.path.isdir(arguments.source):
    raise UsageError(f'{arguments.source} is a workdir, whose config.json says the network; leave '
                     f'{" ".join(chosen)} out')
  from gapjax.pytorch import convert
  print(convert.convert(arguments.source, arguments.target, wrap=arguments.wrap,
                        config=config.from_flags(chosen) if chosen else None))


@verb(DATA, CONFIG, OUTPUT, flag('--topology', required=True, metavar='CHIP:SHAPE', help='a slice, '
                                 'such as v5e:2x2, v6e:16x16, v4:2x2x2 or v5p:4x4x4'), fields='')
def compile(arguments, chosen):
  """Compiles the training step for a TPU slice without one; exits with 1 where it does not fit."""
  # jax and libtpu read these as they load: take no TPU, ask no cloud for one, do not complain.
  os.environ.update(JAX_PLATFORMS='cpu', TPU_SKIP_MDS_QUERY='1', ALLOW_MULTIPLE_LIBTPU_LOAD='1',
                    TPU_ACCELERATOR_TYPE='v5litepod-1', TPU_WORKER_HOSTNAMES='localhost')
  from gapjax import config
  from gapjax.speed import compile_tpu
  check_output(arguments.output)
  result = compile_tpu.compile_step(config.from_flags(chosen), topology=arguments.topology,
                                    data_dir=arguments.data_dir)
  if result['fits']:
    print('\n'.join(compile_tpu.lines(result)))
  if arguments.output:
    paths.write_json(arguments.output, result)
  if not result['fits']:
    raise CheckFailed(compile_tpu.refusal(result))


@verb(DATA, CONFIG, OUTPUT,
      flag('--steps', type=positive, help='training steps a round (default: as many as take '
           'about 5 seconds)'),
      flag('--rounds', type=positive, default=5, help='how often to measure (default 5)'),
      flag('--against', help='torch: the same network in PyTorch, in turns with gapjax'),
      flag('--torch', help='how PyTorch runs: plain (float32, the default), '
           'compiled (channels_last, autocast to bfloat16, torch.compile)'),
      flag('--profile', metavar='DIR', type=local, help='a folder for a trace of a few calls'),
      fields='')
def bench(arguments, chosen):
  """Times training; with --against=torch the last line is the ratio to the PyTorch twin."""
  from gapjax import config
  if arguments.torch and not arguments.against:
    raise UsageError('--torch says how the twin of --against=torch runs, which is missing')
  chosen_config = (config.from_flags(chosen) if arguments.config else
                   config.with_fields(config.default(), chosen))
  keep_freed_memory(large=is_large(chosen_config))
  check_output(arguments.output)
  from gapjax.speed import bench
  result = bench.bench(chosen_config, steps_per_round=arguments.steps, rounds=arguments.rounds,
                       against=arguments.against, mode=arguments.torch or 'plain',
                       profile=arguments.profile, data_dir=arguments.data_dir)
  print('\n'.join(bench.lines(result)))
  if arguments.output:
    paths.write_json(arguments.output, result)


def rank_torch(arguments, neurons, ids):
  """The ranking of --torch."""
  if neurons or arguments.data_dir:
    raise UsageError(f'{(neurons or ["--data_dir"])[0]} is for runs of gapjax; leave it out')
  if not arguments.images:
    raise UsageError('--torch ranks by the images of a folder; name it: --images=FOLDER')
  if arguments.regions:
    raise UsageError('--regions: a folder has no masks to choose images by; list those of each '
                     f'region: --ids={arguments.regions[0]}=FILE')
  from gapjax.pytorch.rank import rank_network
  return rank_network(arguments.torch, arguments.images, workdir=arguments.workdir,
                      layer=arguments.layer, ids=ids)


def run_suites(suites, arguments, *, command, **rest):
  """Runs suites; returns [(records, path of the report)] of those of which something is finished.

  command: suite -> what makes the same again, without this machine's folders. rest: see loop.run.
  """
  from gapjax.records import schema
  from gapjax.reproduce import loop
  logging.getLogger('gapjax.training.train').setLevel(logging.WARNING)  # the loop says enough
  pages = loop.run_several(suites, scale=arguments.scale, workdir=arguments.workdir,
                           data_dir=arguments.data_dir, command=command, **rest)
  return [(schema.read(page.parent.parent / 'results.json'), page) for page in pages.values()]


def main(argv=None) -> int:
  """Runs a verb. Exit codes: 0 done, or stopped by SIGTERM; 1 training or a check failed, or a
  bucket is out of reach; 2 bad input, a full disk or too little memory (one line); 3 training
  diverged; 130 Ctrl-C; 143 or 129 a dataset was being prepared when SIGTERM or SIGHUP came."""
  argv = sys.argv[1:] if argv is None else list(argv)
  sys.stderr = Unbreakable(sys.stderr)
  if hasattr(sys.stdout, 'reconfigure'):  # a terminal without our signs must not cost the work
    sys.stdout.reconfigure(errors='replace')
  if not argv or argv[0] in ('-h', '--help'):
    print(USAGE)
    return 0 if argv else 2
  logging.basicConfig(level=logging.WARNING, format='%(message)s', stream=sys.stderr)
  logging.getLogger('gapjax').setLevel(logging.INFO)
  for name in ('absl', 'gcsfs'):  # log the traceback of what they also raise, such as a full disk
    logging.getLogger(name).setLevel(logging.CRITICAL)
  try:
    check_choice(argv[0], VERBS, what='verb')
    if argv[0] not in ('train', 'bench', 'reproduce', 'quickstart'):  # which know a step's size
      keep_freed_memory(large=True)
    VERBS[argv[0]](argv[1:])
  except UsageError as error:
    return complain(error, code=2)
  except Diverged as error:
    return complain(error, code=3)
  except (CheckFailed, TrainingFailed) as error:
    return complain(error, code=1)
  except Interrupted as error:
    return complain(error, code=error.code)
  except Exception as error:
    if refused := paths.refused(error):
      return complain(refused, code=2)
    if paths.unreachable(error):  # not 2: the same command may well succeed later
      return complain(f'Cloud Storage cannot be reached ({error}); once it can, the same command '
                      'goes on', code=1)
    if isinstance(error, OSError) and error.errno is not None:  # a disk's or a file's complaint
      where = f' `{error.filename}`' if error.filename else ''
      return complain(f'{os.strerror(error.errno)}{where}', code=2)
    if DEVICES in sys.modules and (refused := sys.modules[DEVICES].refused(error)):
      return complain(refused, code=2)
    if variable := refused_variable(error):
      return complain(f'{variable}={os.environ[variable]} is none of the values that it takes; '
                      'set it right, or unset it', code=2)
    if isinstance(error, MemoryError):
      return complain(f'this machine has too little memory ({first_line(error)}); take fewer or '
                      'smaller images, or a larger machine', code=2)
    raise
  except KeyboardInterrupt:
    return complain('interrupted', code=130)
  return 0


def complain(message, *, code):
  """Prints a message as one line that can be read: what is wrong stands at its beginning, what to
  do at its end, and between them a list of thousands may stand."""
  line = ' '.join(str(message).split())
  if len(line) > LONGEST:
    line = f'{line[:LONGEST - 300]} ... {line[-300:]}'
  print(f'gapjax: {line}', file=sys.stderr)
  if DEVICES in sys.modules:
    sys.modules[DEVICES].leave(code)
  return code
