"""Compiles the training step of every config for TPU slices that are not here, and tabulates it.

    pip install 'gapjax[tpu]'
    python benchmarks/compile_table.py

Runs `gapjax compile --config --topology --output` for each pair, two to six minutes on a core, into
results/compile/, and writes the table from what stands there. What is there already is not compiled
again. Exits with 1 if something does not fit.
"""

import datetime
import json
import pathlib
import subprocess
import sys

from gapjax.render import Table, markdown_table

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


def compiled(config, topology):
  """What `gapjax compile` says, from its file or by running it."""
  path = FOLDER / f'{config}-{topology.replace(":", "_")}.json'
  if not path.exists():
    done = subprocess.run([sys.executable, '-m', *command(config, topology, path)], cwd=ROOT,
                          check=False)
    if not path.exists():
      raise SystemExit(f'{config} on {topology}: exit code {done.returncode}')
  return json.loads(path.read_text())


def row(config, topology, found):
  collectives = found['collectives'].values()
  return (f'{config}, {found["config"]["batch_size"]}', topology, found['config']['model']['dtype'],
          f'{found["needed_bytes"] / 2 ** 30:.2f} of {found["available_bytes"] / 2 ** 30:.2f}',
          'yes' if found['fits'] else f'no; {found["largest_batch"]} would',
          f'{found["flops"] / 1e9:,.0f}', f'{found["bytes"] / 1e9:.1f}',
          f'{sum(c["bytes"] for c in collectives) / 1e6:.0f} in '
          f'{sum(c["count"] for c in collectives)}',
          f'{1e3 * found["step_seconds"]:.1f}', f'{found["images_per_second"]:,.0f}')


def table(results):
  return Table(
    ('config, batch', 'slice', 'type', 'GiB a chip', 'fits', 'GFLOP a chip', 'GB a chip',
     'collectives, MB', 'roofline step, ms', 'images a second'),
    [row(*pair, found) for pair, found in results.items()])


def main():
  FOLDER.mkdir(parents=True, exist_ok=True)
  results = {pair: compiled(*pair) for pair in PAIRS}
  versions = next(iter(results.values()))['versions']
  seconds = sum(found['compile_seconds'] for found in results.values())
  (FOLDER / 'README.md').write_text(f"""# Training steps compiled for TPUs that are not here

    python benchmarks/compile_table.py

which runs, for each row, `{' '.join(command('CONFIG', 'SLICE'))}`: {', '.join(
  f'{name} {version}' for name, version in versions.items())}; {datetime.date.today()};
{seconds / 60:.0f} minutes of compiling. All per step. The roofline is an estimate: the longer of a
chip's operations and its bytes, fast memory included, at the data sheet's speeds; dispatch and
communication come on top. Random images in place of the datasets.

<!-- table: compile -->
{markdown_table(table(results))}""")
  if not all(found['fits'] for found in results.values()):
    raise SystemExit(1)


if __name__ == '__main__':
  main()
