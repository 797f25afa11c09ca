"""The verbs and their flags; each verb is one call into the module that does the job."""

import argparse
import contextlib
import json
import logging
import os
import shlex
import sys

from gapjax import paths
from gapjax.errors import (
  CheckFailed,
  Interrupted,
  TrainingFailed,
  UsageError,
  check_choice,
  first_line,
)
from gapjax.training.system import keep_freed_memory

USAGE = """usage: gapjax VERB [flags]

  quickstart        the paper on scikit-learn's digits, in minutes on a CPU, with a report
  prepare DATASET   build a dataset on disk from its publisher's files, or download it
  train             train and evaluate one network; the same command resumes
  evaluate          all metrics of a run's newest checkpoint
  rank              which channels of a run encode position, overall and by region
  attack            remove them, and as many random ones, and measure what is lost
  reproduce SUITE   every cell of a table, resumable, then its report
  report            Markdown, HTML and PNG from the JSON files of a workdir, or of each in a folder
  convert SRC DST   PyTorch's weights to a run, or a run's to PyTorch's
  compile           does a config fit a TPU that is not here, and how fast could it be
  bench             how fast training is here, alone or in turns with PyTorch

gapjax VERB --help says more."""


class Parser(argparse.ArgumentParser):
  """argparse whose mistakes are one line."""

  def error(self, message):
    raise UsageError(f'{message} ({self.prog} --help)')


def flags(verb, *, workdir=None, data=False):
  """A parser for a verb with the shared flags; workdir '' makes --workdir required."""
  parser = Parser(prog=f'gapjax {verb}', allow_abbrev=False)
  if workdir is not None:
    parser.add_argument('--workdir', required=not workdir, default=workdir or None, type=folder,
                        help='folder of the run, or gs://BUCKET/FOLDER'
                        + (f' (default {workdir})' if workdir else ''))
  if data:
    parser.add_argument('--data_dir', type=local, help="where datasets are (default: TFDS' own)")
  return parser


def parse_with_config(parser, argv):
  """The arguments, and the --config=FILE and --config.FIELD=VALUE that config.from_flags takes."""
  parser.add_argument('--config', metavar='FILE[:variant]', help='such as '
                      'configs/gapnet_cifar10.py:grid=7; set any field of it with '
                      '--config.FIELD=VALUE (all fields: gapjax/config.py)')
  arguments, rest = parser.parse_known_args(argv)
  return arguments, [*([f'--config={arguments.config}'] if arguments.config else []), *rest]


def parse_with_neurons(parser, argv):
  """The arguments, and the --config.neurons.FIELD=VALUE that config.with_fields takes."""
  parser.epilog = ('--config.neurons.FIELD=VALUE sets how channels are ranked and removed, other '
                   "than the run's config.json says (fields: gapjax/config.py)")
  return parser.parse_known_args(argv)


def folder(path):
  """A folder on this machine, `~` expanded, or in a bucket."""
  if not path:  # such as of an unset variable; pathlib takes it for the current folder
    raise argparse.ArgumentTypeError('a folder is named by nothing; the current one is `.`')
  path = os.path.expanduser(path)
  try:
    paths.of(path)
  except UsageError as error:  # a ValueError, of which argparse would not give the words
    raise argparse.ArgumentTypeError(str(error)) from None
  return path


def local(path):
  """A file or folder on this machine, `~` expanded."""
  if not path:
    raise argparse.ArgumentTypeError('a file or folder is named by nothing; the current folder is '
                                     '`.`')
  if '://' in path:
    raise argparse.ArgumentTypeError(f'{path}: remote folders are not supported here; give a local '
                                     'path')
  return os.path.expanduser(path)


def check_output(path):
  """Raises UsageError where --output cannot be written in the end, before what takes minutes."""
  if path and not os.path.isdir(os.path.dirname(path) or '.'):
    raise UsageError(f'--output={path}: there is no such folder; make it first')
  if path and os.path.isdir(path):
    raise UsageError(f'--output={path} is a folder; name a file in it')


def quickstart(argv):
  """The whole paper on data that ships with scikit-learn."""
  parser = flags('quickstart', workdir='quickstart', data=True)
  parser.add_argument('--scale', choices=['digits', 'tiny'], default='digits',
                      help='tiny: a few steps of each network, to see that it runs')
  arguments = parser.parse_args(argv)
  run_suite('quickstart', arguments, seeds=1,
            command=f'gapjax quickstart --scale={arguments.scale}')


def prepare(argv):
  """Builds a dataset on disk."""
  from gapjax import data
  parser = flags('prepare', data=True)
  parser.add_argument('dataset', help=', '.join(data.NAMES))
  parser.add_argument('--source', type=local, help="the publisher's files: a folder or archive "
                      '(default: download CIFAR; digits and digit_scenes need none)')
  arguments = parser.parse_args(argv)
  print(data.prepare(arguments.dataset, source=arguments.source, data_dir=arguments.data_dir))


def train(argv):
  """Trains and evaluates one network; prints its summary and the path of its report."""
  from gapjax import config
  parser = flags('train', workdir='', data=True)
  parser.add_argument('--distributed', nargs='?', const='auto', metavar='HOST:PORT,N,I',
                      help='one of several processes, each started with this command: on Cloud TPU '
                      'and under SLURM without a value (there srun does without the flag), else '
                      "the first process' address, how many there are, and which this is, from 0")
  arguments, chosen = parse_with_config(parser, argv)
  config = config.from_flags(chosen)
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


def evaluate(argv):
  """Prints all metrics of a checkpoint."""
  arguments = flags('evaluate', workdir='', data=True).parse_args(argv)
  from gapjax.training.evaluate import evaluate
  result = evaluate(arguments.workdir, data_dir=arguments.data_dir)
  numbers = {k: v for k, v in result.items() if not isinstance(v, dict | list)}
  print(json.dumps(numbers, indent=2))


def rank(argv):
  """Ranks the channels of a run."""
  parser = flags('rank', workdir='', data=True)
  parser.add_argument('--regions', nargs='+', default=['left', 'right'], metavar='REGION',
                      help='names, or rectangles TOP,LEFT,BOTTOM,RIGHT in fractions '
                      '(default: left right)')
  parser.add_argument('--ids', help='a JSON file {"left": [image ids], ...} to rank those regions '
                      'by, in place of the masks')
  arguments, neurons = parse_with_neurons(parser, argv)
  from gapjax.neurons import run
  from gapjax.report.plots import neurons as pictures
  ids = paths.read_json(arguments.ids) if arguments.ids else None
  ranking = run.rank_run(arguments.workdir, data_dir=arguments.data_dir,
                         regions=arguments.regions, ids=ids, neurons=neurons)
  pictures.save(paths.of(arguments.workdir), ranking)
  for name, order in ranking.orders.items():
    print(f'{name:10} {" ".join(map(str, order[:10]))} ...')
  print(f'{arguments.workdir}/{run.RANKING}')


def attack(argv):
  """Removes channels of a run and measures what is lost."""
  parser = flags('attack', workdir='', data=True)
  parser.add_argument('--ranking', help='a file of channels as the authors write it '
                      '(default: rank this run\'s, overall, left and right)')
  parser.add_argument('--regions', nargs='+', metavar='REGION', help='where mIoU is measured: '
                      'names, or rectangles TOP,LEFT,BOTTOM,RIGHT in fractions '
                      '(default: all left right center)')
  arguments, neurons = parse_with_neurons(parser, argv)
  from gapjax.neurons import run
  from gapjax.report import attack as report_attack
  from gapjax.report import page as report
  from gapjax.report.plots import neurons as pictures
  from gapjax.report.render import markdown_table
  attacked = run.attack_run(arguments.workdir, data_dir=arguments.data_dir,
                            ranking=arguments.ranking, regions=arguments.regions, neurons=neurons)
  pictures.save(paths.of(arguments.workdir), *attacked)
  print(markdown_table(report_attack.table([{**record, 'cell': arguments.workdir}
                                            for record in attacked.sweep.records()])))
  if (paths.of(arguments.workdir) / 'summary.json').exists():  # else it is still to be trained on
    print(f'report: {report.build(arguments.workdir)}')


def reproduce(argv):
  """Trains every cell of a suite."""
  parser = flags('reproduce', workdir='', data=True)
  parser.add_argument('suite', help=', '.join(SUITES))
  parser.add_argument('--seeds', type=int, default=1, help='train with seeds 0 to SEEDS - 1')
  parser.add_argument('--scale', choices=['small', 'narrow', 'full'], default='full')
  parser.add_argument('--cells', help="only these, such as 'augshift/* resnet18/cifar10'")
  parser.add_argument('--with_torch', action='store_true', help='train the same networks in plain '
                      f'PyTorch too, for the column PyTorch ({", ".join(WITH_TORCH)})')
  parser.epilog = ('--config.FIELD=VALUE sets a field of every cell, such as '
                   '--config.num_epochs=100 (fields: gapjax/config.py)')
  arguments, changes = parser.parse_known_args(argv)
  if arguments.seeds < 1:
    raise UsageError(f'--seeds must be at least 1, not {arguments.seeds}')
  check_choice(arguments.suite, SUITES, what='suite')
  if arguments.with_torch and arguments.suite not in WITH_TORCH:
    raise UsageError(f'--with_torch: the tables of {arguments.suite} have no column for PyTorch; '
                     f'those of {", ".join(WITH_TORCH)} do')
  command = (f'gapjax reproduce {arguments.suite} --scale={arguments.scale} '
             f'--seeds={arguments.seeds}')
  if arguments.cells:
    command += f' --cells={shlex.quote(arguments.cells)}'
  if arguments.with_torch:
    command += ' --with_torch'
  command = ' '.join([command, *map(shlex.quote, changes)])
  run_suite(arguments.suite, arguments, seeds=arguments.seeds, command=command,
            only=arguments.cells, with_torch=arguments.with_torch, changes=changes)


def report(argv):
  """Builds the report of a workdir, or of each workdir in a folder; prints their paths."""
  from gapjax.report import page as report
  arguments = flags('report', workdir='').parse_args(argv)
  print(*report.build_all(arguments.workdir), sep='\n')


def convert(argv):
  """PyTorch's weights to a run, or a run's to PyTorch's; --check compares what both compute."""
  parser = flags('convert')
  parser.add_argument('source', metavar='SRC', nargs='?', type=local, help='a file of weights '
                      '(.pth, .pt, .safetensors, .npz), or the workdir of a run')
  parser.add_argument('target', metavar='DST', nargs='?', type=local, help='a new workdir, whose '
                      'network --config says, or a new file')
  parser.add_argument('--wrap', help="key of a dict around a .pth file's weights, as the authors' "
                      'scripts read them: net, model_state')
  parser.add_argument('--check', action='store_true', help='no SRC and DST: print how far gapjax '
                      'and PyTorch differ from the same weights, for many small networks or that '
                      'of --config, and exit with 1 where it is more than rounding')
  parser.add_argument('--output', metavar='FILE', type=local, help="--check's table as JSON, too")
  arguments, chosen = parse_with_config(parser, argv)
  from gapjax import config
  if arguments.check:
    if arguments.source:
      raise UsageError('--check draws its own weights; leave SRC and DST out')
    check_output(arguments.output)
    return check_parity(config.from_flags(chosen) if chosen else None, output=arguments.output)
  if not arguments.target:
    raise UsageError('convert what to what? give SRC and DST, or --check (gapjax convert --help)')
  if chosen and os.path.isdir(arguments.source):
    raise UsageError(f'{arguments.source} is a workdir, whose config.json says the network; leave '
                     f'{" ".join(chosen)} out')
  from gapjax.pytorch import convert
  print(convert.convert(arguments.source, arguments.target, wrap=arguments.wrap,
                        config=config.from_flags(chosen) if chosen else None))


def check_parity(config, *, output=None):
  """Prints the table of differences between gapjax and PyTorch; config: one network's, or None."""
  from gapjax.weights import files as weights
  weights.require_torch('--check', 'leave it out')
  from gapjax.pytorch import parity, reference
  from gapjax.report.render import markdown_table
  differences = {}
  for case in [parity.of_config('config', config)] if config else parity.cases():
    logging.getLogger('gapjax').info('%s', case.name)
    differences[case.name] = reference.measure(case)
  for table in parity.tables(differences):
    print(markdown_table(table), end='\n\n')
  if output:
    paths.write_json(output, {**reference.provenance(), 'networks': differences})
  bad = {name: columns for name, row in differences.items() if (columns := parity.too_large(row))}
  if bad:
    raise CheckFailed('more than rounding: ' + '; '.join(
      f'{name}: {", ".join(columns)}' for name, columns in bad.items()))


def compile(argv):
  """Compiles the training step for a TPU slice without one; exits with 1 where it does not fit."""
  parser = flags('compile', data=True)
  parser.add_argument('--topology', required=True, metavar='CHIP:SHAPE',
                      help='a slice, such as v5e:2x2, v6e:16x16, v4:2x2x2 or v5p:4x4x4')
  parser.add_argument('--output', metavar='FILE', type=local, help='write everything as JSON')
  arguments, chosen = parse_with_config(parser, argv)
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


def bench(argv):
  """Times training; with --against=torch the last line is the ratio to the PyTorch twin."""
  parser = flags('bench', data=True)
  parser.add_argument('--steps', type=int, help='training steps a round (default: as many as take '
                      'about 5 seconds)')
  parser.add_argument('--rounds', type=int, default=5, help='how often to measure (default 5)')
  parser.add_argument('--against', help='torch: the same network in PyTorch, in turns with gapjax')
  parser.add_argument('--torch', default='plain', help='how it runs: plain (float32, the '
                      'default), compiled (channels_last, autocast to bfloat16, torch.compile)')
  parser.add_argument('--profile', metavar='DIR', type=local, help='write a trace of a few calls')
  parser.add_argument('--output', metavar='FILE', type=local, help='write everything as JSON')
  arguments, chosen = parse_with_config(parser, argv)
  from gapjax import config
  chosen_config = (config.from_flags(chosen) if arguments.config else
                   config.with_fields(config.default(), chosen))
  check_output(arguments.output)
  from gapjax.speed import bench
  result = bench.bench(chosen_config, steps_per_round=arguments.steps, rounds=arguments.rounds,
                       against=arguments.against, mode=arguments.torch, profile=arguments.profile,
                       data_dir=arguments.data_dir)
  print('\n'.join(bench.lines(result)))
  if arguments.output:
    paths.write_json(arguments.output, result)


def run_suite(suite, arguments, *, seeds, command, **rest):
  """Runs a suite, prints its table, and last the path of its report.

  command: what makes the same again, without this machine's folders. rest: see loop.run.
  """
  from gapjax.report import page as report
  from gapjax.report import schema
  from gapjax.reproduce import loop
  with quiet('gapjax.training.train'):
    page = loop.run(suite, scale=arguments.scale, seeds=seeds, workdir=arguments.workdir,
                    data_dir=arguments.data_dir, command=command, **rest)
  records = schema.read(paths.of(arguments.workdir) / 'results.json')
  print('\n'.join([report.table(records).rstrip(), *report.scale_notes(records)]))
  print(f'\nreport: {page}')


@contextlib.contextmanager
def quiet(name):
  """Lets only warnings of one logger through: a suite says itself what it trains."""
  logger = logging.getLogger(name)
  before = logger.level
  logger.setLevel(logging.WARNING)
  try:
    yield
  finally:
    logger.setLevel(before)


# What `reproduce` takes; reproduce/suites.py has the same, but importing it loads jax.
SUITES = ('table1', 'table2', 'augshift_sweep', 'attack', 'ablations')
WITH_TORCH = ('table1', 'table2', 'augshift_sweep')  # whose tables have a column for PyTorch
VERBS = {f.__name__: f for f in (quickstart, prepare, train, evaluate, rank, attack, reproduce,
                                report, convert, compile, bench)}


def main(argv=None) -> int:
  """Runs a verb. Exit codes: 0 done; 1 training or a check failed, or a bucket is out of reach; 2
  bad input or a full disk (one line); 130 Ctrl-C."""
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
    keep_freed_memory()
    VERBS[argv[0]](argv[1:])
  except UsageError as error:
    return complain(error, code=2)
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
    if asked_in_vain():
      return complain(f'JAX_PLATFORMS={os.environ["JAX_PLATFORMS"]} asks for a device that is not '
                      'here, or that the installed jax does not know; unset it, or set it to cpu',
                      code=2)
    if isinstance(error, MemoryError):
      return complain(f'this machine has too little memory ({first_line(error)}); take fewer or '
                      'smaller images, or a larger machine', code=2)
    if type(error).__name__ == 'JaxRuntimeError' and 'RESOURCE_EXHAUSTED' in str(error):
      return complain(f'the device has too little memory ({str(error).splitlines()[0][:200]}); '
                      'take a smaller batch_size, or model.dtype=bfloat16', code=2)
    raise
  except KeyboardInterrupt:
    return complain('interrupted', code=130)
  return 0


def asked_in_vain() -> bool:
  """Whether the environment asks jax for a platform that it cannot have."""
  if not os.environ.get('JAX_PLATFORMS') or 'jax' not in sys.modules:
    return False
  try:
    sys.modules['jax'].devices()
  except (RuntimeError, AssertionError):  # the latter of a GPU that is not there
    return True
  return False


class Unbreakable:
  """What is written to stderr, whether it is closed or its reader has gone: no reason to end."""

  def __init__(self, stream):
    self._stream = stream

  def __getattr__(self, name):
    return getattr(self._stream, name)

  def write(self, text):
    with contextlib.suppress(OSError, ValueError, AttributeError):
      self._stream.write(text)
    return len(text)

  def flush(self):
    with contextlib.suppress(OSError, ValueError, AttributeError):
      self._stream.flush()


def complain(message, *, code):
  print(f'gapjax: {" ".join(str(message).split())}', file=sys.stderr)
  if 'gapjax.training.devices' in sys.modules:
    sys.modules['gapjax.training.devices'].leave(code)
  return code
