"""Compiles the training step of every config for TPU slices that are not here, and tabulates it.

    pip install 'gapjax[tpu]'
    python benchmarks/compile_table.py [--no_compile]

Runs `gapjax compile --config --topology --output` for each pair, half a minute to ten minutes on a
core, into results/compile/, and writes the table from what stands there. What is there already is
not compiled again; --no_compile compiles nothing, and names what is missing. Exits with 1 if
something does not fit.
"""

import argparse
import json
import pathlib
import subprocess
import sys

from gapjax.report.render import Table, markdown_table

ROOT = pathlib.Path(__file__).parent.parent
FOLDER = ROOT / 'results' / 'compile'
PAIRS = [*((path.stem, topology) for topology in ('v5e:2x2', 'v4:2x2x2')
           for path in sorted((ROOT / 'configs').glob('*.py'))),
         ('gapnet_cifar10', 'v5e:16x16')]
# A batch must be a multiple of the chips.
FIELDS = {'v5e:16x16': ['--config.batch_size=1024']}


def command(config, topology, output='FILE'):
  return ['gapjax', 'compile', f'--config=configs/{config}.py', f'--topology={topology}',
          f'--output={output}', *FIELDS.get(topology, [])]


def path_of(config, topology):
  return FOLDER / f'{config}-{topology.replace(":", "_")}.json'


def compile_step(config, topology):
  """Runs `gapjax compile`, whose exit code is 1 too where the batch does not fit."""
  path = path_of(config, topology)
  done = subprocess.run([sys.executable, '-m', *command(config, topology, path)], cwd=ROOT,
                        check=False)
  if not path.exists():
    raise SystemExit(f'{config} on {topology}: exit code {done.returncode}')


def row(config, topology, found):
  collectives = found['collectives'].values()
  return (f'{config}, {found["config"]["batch_size"]}', topology, found['config']['model']['dtype'],
          f'{found["needed_bytes"] / 2 ** 30:.2f} of {found["available_bytes"] / 2 ** 30:.2f}',
          'yes' if found['fits'] else f'no; {found["largest_batch"]} would',
          f'{found["flops"] / 1e9:,.0f}', f'{found["bytes"] / 1e9:.1f}',
          f'{sum(c["bytes"] for c in collectives) / 1e6:.0f} in '
          f'{sum(c["count"] for c in collectives)}',
          f'{1e3 * found["step_seconds"]:.1f}', f'{found["images_per_second"]:,.0f}')


def results():
  """{(config, topology): what `gapjax compile` found}, of what has been compiled."""
  return {pair: json.loads(path_of(*pair).read_text()) for pair in PAIRS if path_of(*pair).exists()}


def table(results):
  return Table(
    ('config, batch', 'slice', 'type', 'GiB a chip', 'fits', 'GFLOP a chip', 'GB a chip',
     'collectives, MB', 'roofline step, ms', 'images a second'),
    [row(*pair, found) for pair, found in results.items()], text=3)


def page(results):
  """What README.md says of {(config, topology): what `gapjax compile` found}."""
  found = list(results.values())
  versions = ', '.join(  # of all rows
    f'{name} {" or ".join(dict.fromkeys(x["versions"][name] for x in found))}'
    for name in found[0]['versions'])
  minutes = sum(x['compile_seconds'] for x in found) / 60
  missing = ', '.join(f'{config} on {topology}' for config, topology in PAIRS
                      if (config, topology) not in results)
  return f"""# Training steps compiled for TPUs that are not here

    python benchmarks/compile_table.py

which runs `{' '.join(command('CONFIG', 'SLICE'))}` for each row.
{versions}; {minutes:.0f} minutes of compiling.

All is per step. The roofline is an estimate: the longer of the times that a chip's operations and
its bytes take at the data sheet's speeds, fast memory included; dispatch and communication come on
top.
Random images stand in for the datasets.

The rows of canvases, CIFAR and digits are of a version in which images lay on a chip as (n, h, w,
3), which every call copied into another layout.
Today an image is a row of bytes. The step of gapnet_cifar10 on v5e:2x2 in bfloat16 has 2.75 GB a
chip since, in place of 3.60 (float32: 5.0 then), and needs 0.37 GiB; these rows are to be compiled
again. What is left are, by XLA's text of the program, transfers of kernels and of Adam's moments
between HBM and VMEM (1.7 of 3.1 GB that stand there), their update (0.3), convolutions and
BatchNorm (0.6), the kernels' gradients over all chips (0.1), and a gather that is counted as the
whole dataset (0.15) and reads 37 kB.

{markdown_table(table(results))}
{f'Not compiled yet: {missing}.' if missing else ''}
"""


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--no_compile', action='store_true')
  args = parser.parse_args()
  FOLDER.mkdir(parents=True, exist_ok=True)
  for pair in PAIRS:
    if not args.no_compile and not path_of(*pair).exists():
      compile_step(*pair)
  found = results()
  (FOLDER / 'README.md').write_text(page(found))
  if not all(x['fits'] for x in found.values()):
    raise SystemExit(1)


if __name__ == '__main__':
  main()
