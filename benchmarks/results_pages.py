"""Writes every page of results/ and every table of the READMEs from the JSON files alone.

    python benchmarks/results_pages.py

Rebuilds the reports of the suites (`gapjax report --workdir=results`), the pages of parity and
bench, and the tables that stand below a line `<!-- table: NAME -->` in README.md, docs/ and
results/README.md. Runs nothing and needs no dataset: about a minute.
"""

import dataclasses
import json
import pathlib
import re

import attack_protocols
import compile_table
from flax.traverse_util import flatten_dict

from gapjax import config as configs
from gapjax.neurons import run, yardstick
from gapjax.pytorch import parity
from gapjax.records import schema
from gapjax.report import attack as report_attack
from gapjax.report import compared as report_compared
from gapjax.report import page as report
from gapjax.report.parts import DASH, number, ours
from gapjax.report.plots import base as plots
from gapjax.report.render import Table, markdown_table
from gapjax.reproduce import suites
from gapjax.speed import bench

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / 'results'
SUITES = ('quickstart', 'table1', 'table1_narrow', 'table1_full', 'table2', 'table2_narrow',
          'table2_full', 'table2_longer', 'augshift_sweep', 'ablations', 'attack',
          'attack_pretrained')
YARDSTICKS = {  # network -> where its ranking lies
  'EfficientNet-Lite0': 'yardstick/zero',
  'EfficientNet-Lite0, circular padding': 'yardstick/circular',
  **{f'DeepLabv3+ on it, seed {seed}': f'attack_pretrained/cells/deeplabv3plus/camvid/seed{seed}'
     for seed in (0, 1)},
  'GAPNet, location, 3x3': 'yardstick/gapnet',
  'PermuteNet, location, 3x3': 'yardstick/permutenet'}
PARITY = 'gapjax convert --check --output=results/parity/results.json'
BENCH = 'gapjax bench --against=torch --rounds={rounds} --output=results/bench/{name}'
# Measured while convolutions on CPU were computed in another way.
EARLIER = ('canvas_cpu.json', 'canvas_cpu_intel.json', 'canvas_cpu_one_core.json')
BENCHED = """The training step of canvas networks (batch 48) on machines without other work. Both
sides train in turns, each in a process of its own. On the GPU PyTorch's side is channels_last,
autocast to bfloat16 and torch.compile, without CUDA graphs, and gapjax takes 32 steps in one
dispatch; jax took 91 s to compile its step, PyTorch 26 s. Columns: *code*, today's, or an earlier
version's (below); the median time of a step, the least and the most in brackets; and gapjax's
images a second over PyTorch's, where a value below 1 means that PyTorch is faster."""
LIMITS = """## What a CPU's step is spent on

Small networks have 0.5 to 0.7 of PyTorch's images a second on two cores. `python
benchmarks/step_profile.py` says why (AMD EPYC, 2 cores, jax 0.10.2, torch 2.13.0; milliseconds a
step):

|                          | digits: gapjax | PyTorch | table 1, small, 3x3: gapjax | PyTorch |
|--------------------------|---------------:|--------:|----------------------------:|--------:|
| step, by the wall clock  |           35.8 |    23.4 |                        79.2 |    48.5 |
| cores that are busy      |           1.69 |    1.99 |                        1.60 |    1.99 |
| convolutions, products   |           24.6 |    16.1 |                        51.7 |    30.5 |
| changes of layout        |            5.5 |     0.3 |                        16.2 |     0.5 |
| the rest                 |            4.2 |     7.1 |                        10.8 |    11.5 |

So gapjax loses in two places, 8.5 and 21 ms in the convolutions (XLA's against oneDNN's), 5 and 16
ms in changes of layout (transpositions and copies, of which PyTorch has next to none), and in
nothing else. Tried, and not faster, in few and noisy runs of table 1's step (77 to 96 ms as it
is): 3x3 convolutions as one product of patches from 16, 32, 64 or 128 channels on (78 to 137 ms),
or as nine products from 64 on (90 to 94). On digits XLA without YNNPACK had 38 ms, with oneDNN's
custom calls 35, as it is 36 to 46. What helped: threads that do not share one arena of memory where
buffers are small (digits in three turns: 2, 8 and 28% more images a second, and 3.7 to 4.9 s to
compile in place of 5.5 to 6.5).

## The rows `earlier`

They are of a version of gapjax that computed some
convolutions and gradients on CPU in another way: Winograd's algorithm for the 3x3 convolutions of
many channels, and matrix products for the gradients of kernels. Both are removed. Today a
convolution on CPU is cut into parts of the batch ([on_cpu.py](../../gapjax/models/on_cpu.py)),
which is faster where channels are few and maps are large. **Today's code has not been timed against
PyTorch at width 64 on a CPU.** The earlier and today's convolutions in turns in one process
(AMD EPYC, 2 cores, jax 0.10.2, median of seven steps):

| step                                        | earlier, ms | today, ms | earlier over today |
|---------------------------------------------|------------:|----------:|-------------------:|
| that of these rows: width 64, canvas 96x96  |       2,345 |     2,630 |               0.89 |
| canvas 96x96, width 24 (jax 0.12.0)         |         691 |       575 |               1.20 |
| CIFAR, 3x3 stem, width 16, batch 500        |       1,819 |     1,397 |               1.30 |
| CIFAR, width 24, batch 500 (jax 0.12.0)     |       3,348 |     3,017 |               1.11 |
| DeepLabv3, ResNet-18, width 32 (CamVid)     |         379 |       359 |               1.06 |

Their own step lost 12%. XLA's own convolutions, the batch whole, take 2,637 ms
for the width 16 step. `python benchmarks/convolutions.py` compares today's with XLA's own.

## What limited the earlier version

On the EPYC PyTorch computes at about the speed of the best matrix product measured there: 95% of it
with two cores and 106% with one. gapjax came near that speed because Winograd's algorithm needs
fewer multiplications. Its transforms move more memory, so a second core helped less. The Xeon has
AVX-512; there the gradient of a kernel cost most. It was a product with a transposed matrix, which
XLA computes more slowly than other products (on one core, with 64 channels, at about half the
speed). On GPU and TPU gapjax has always used XLA's convolutions."""
# The tables of a page, apart or together; group 1 is their name.
PLACE = re.compile(r'<!-- table: (.*) -->\n((?:\|.*\n)+(?:\n(?:\|.*\n)+)*)')


def read(path):
  return json.loads((RESULTS / path).read_text())


def tables() -> dict[str, str]:
  """The Markdown of every table that a page may show, by its name."""
  found = {suite: report.table(schema.read(RESULTS / suite / 'results.json'))
           for suite in SUITES}
  found['compared'] = markdown_table(report_compared.table(comparisons()))
  networks = read('parity/results.json')['networks']
  for dtype, table in zip(parity.TOLERANCES, parity.tables(networks), strict=True):
    found[f'parity, {dtype}'] = markdown_table(table)
  found['parity'] = markdown_table(parity_summary(networks))
  compiled = compile_table.results()
  for topology in {topology for _, topology in compiled}:
    found[f'compile, {topology}'] = markdown_table(compile_table.table(
      {pair: result for pair, result in compiled.items() if pair[1] == topology}))
  found['bench'] = markdown_table(Table(
    ['step', 'machine', 'code', 'gapjax: step, ms', 'PyTorch: step, ms',
     'gapjax over PyTorch, images a second'],
    [[step(x), machine(x['device']), 'earlier' if name in EARLIER else "today's",
      *(bench.range_of(x[side]['step_seconds'], '{:,.1f}', 1e3) for side in ('gapjax', 'torch')),
      bench.range_of(x['ratio'], '{:.2f}')] for name, x in benched().items()], text=3))
  found['overview'] = markdown_table(overview())
  found['yardstick'] = markdown_table(report_attack.yardstick_table({
    network: yardstick.read_json(RESULTS / folder / run.YARDSTICK)
    for network, folder in YARDSTICKS.items()}))
  found['protocols'] = markdown_table(attack_protocols.table([
    read(f'attack_protocols/{path.name}')
    for path in sorted(RESULTS.glob('attack_protocols/seed*.json'))]))
  return {name: table.strip() + '\n' for name, table in found.items()}


def comparisons() -> list[report_compared.Comparison]:
  """Those of all suites that compare what the paper does, by claim; `where` says the scale."""
  found = []
  for suite in ('table1', 'table1_narrow', 'table1_full', 'table2', 'table2_longer',
                'table2_narrow', 'table2_full', 'attack', 'attack_pretrained'):
    records = schema.read(RESULTS / suite / 'results.json')
    scale = f'{records[0]["scale"]}{", 20 epochs" if suite == "table2_longer" else ""}'
    found += [dataclasses.replace(comparison, where=f'{comparison.where}, {scale}')
              for comparison in report_compared.compared(
                [r for r in records if not suite.startswith('attack') or 'N' in r])]
  claims = [*dict.fromkeys(comparison.claim for comparison in found)]
  return sorted(found, key=lambda comparison: claims.index(comparison.claim))


def overview() -> Table:
  """The README's table: the paper's numbers beside ours, at the best scale that has all of them.

  Location accuracy by the paper's protocol; top-1 accuracy and shift consistency of the final
  weights.
  """
  records = {suite: schema.read(RESULTS / f'{suite}_narrow/results.json')
             for suite in ('table1', 'table2')}
  [scale] = {record['scale'] for some in records.values() for record in some}

  def row(network, measured, suite, cell, *metrics):
    some = [next(r for r in records[suite] if (r['cell'], r['metric']) == (cell, metric))
            for metric in metrics]
    # ours(record) is 'mean ± deviation (n)'; n has a column of its own.
    return [network, measured, ' / '.join(number(r['paper'], r['metric']) for r in some),
            ' / '.join(ours(r).rpartition(' ')[0] for r in some), str(some[0]['n'])]

  return Table(['network, dataset', 'measured', 'paper', f'gapjax, scale {scale}', 'n'], [
    *(row(f'{name}, CIFAR-10 on 3x3', 'location accuracy', 'table1',
          f'{name.lower()}/location/3x3', 'location_accuracy_best_random')
      for name in ('GAPNet', 'PermuteNet')),
    *(row(f'{name}, CIFAR-10', 'top-1 / shift consistency', 'table2', f'{cell}/cifar10',
          'image_accuracy', 'consistency')
      for name, cell in (('ResNet-18', 'resnet18'), ('Unshifted images', 'unshifted'),
                         ('BlurPool', 'blurpool'), ('Two crops, weight 0', 'two_crops'),
                         ('AugShift', 'augshift')))], text=2)


def parity_summary(networks) -> Table:
  """One row a type: the largest relative difference of all networks, and what is rounding."""
  quantities = dict.fromkeys(column.rpartition(', ')[0] for column in parity.COLUMNS)

  def largest(column):
    return (f'{max(row[column][1] for row in networks.values()):.1e}' if column in parity.COLUMNS
            else DASH)

  return Table(['', *quantities, 'counts as rounding'], [
    [dtype, *(largest(f'{quantity}, {dtype}') for quantity in quantities), f'{tolerance:.0e}']
    for dtype, tolerance in parity.TOLERANCES.items()])


def benched() -> dict[str, dict]:
  """The results of bench by the names of their files: today's code first."""
  names = (path.name for path in RESULTS.glob('bench/*.json'))
  return {name: read(f'bench/{name}')
          for name in sorted(names, key=lambda name: (name in EARLIER, name))}


def step(found) -> str:
  """'ResNet-18, width 64, 96x96, float32' of a result of bench."""
  c = found['config']
  side = (c['data']['image_size'] or 32) * c['canvas']['grid']
  return (f'{c["model"]["name"].replace("resnet", "ResNet-")}, width {c["model"]["width"]}, '
          f'{side}x{side}, {c["model"]["dtype"]}')


def machine(device):
  """'AMD EPYC, 2 cores' of 'cpu x 1 (AMD EPYC, 2 cores)'."""
  return device.split('(', 1)[-1].removesuffix(')').replace('1 cores', '1 core')


def parity_page(names) -> str:
  found = read('parity/results.json')
  return f"""# gapjax and PyTorch from the same weights, on the same batches

    {PARITY}

{found['device']}; {versions(found)}. Each entry is the largest absolute and the largest relative
difference (in norm, of a layer). Weights and batches are drawn from fixed seeds; no dataset is
needed. float32:

{names['parity, float32']}
float64, where `parameters` are those after 20 steps of training:

{names['parity, float64']}"""


def bench_page(names) -> str:
  parts = []
  for name, found in benched().items():
    mode = found['torch'].get('mode', 'plain')
    how = '' if mode == 'plain' else f' --torch={mode}'
    if found['config']['data']['name'] == 'digits':
      how += ' --config=configs/digits.py'
    else:
      theirs, ours = (flatten_dict(c, sep='.') for c in (
        found['config'], configs.as_json(configs.default())))
      how += ''.join(f' --config.{name}={theirs[name]}' for name in (
        'model.width', 'model.dtype', 'data.image_size') if theirs[name] != ours[name])
    one = 'taskset -c 0 ' if machine(found['device']).endswith(', 1 core') else ''
    parts += [f'## {name}: {machine(found["device"])}',
              f'    {one}{BENCH.format(rounds=found["rounds"], name=name)}{how}',
              f'{versions(found)}.', *filter(None, bench.lines(found))]
  return '\n\n'.join(['# Training steps, gapjax and PyTorch in turns', BENCHED,
                      names['bench'].strip(), LIMITS, *parts]) + '\n'


def versions(found):
  return ', '.join(f'{name} {version}' for name, version in found['versions'].items())


def filled(page: str, names: dict[str, str]) -> str:
  """The page with its tables as they are now.

  `NAME: WORD ...` are the tables of NAME with one of the words in their heads. Raises KeyError for
  a name that is none of theirs.
  """
  def tables_of(place):
    name, _, words = place[1].partition(': ')
    some = [table for table in names[name].strip().split('\n\n')
            if not words or any(word in table.splitlines()[0] for word in words.split())]
    return f'<!-- table: {place[1]} -->\n' + '\n\n'.join(some) + '\n'

  return PLACE.sub(tables_of, page)


def pages() -> dict[pathlib.Path, str]:
  """What each page says, by its path; the reports and compile's page are made elsewhere."""
  names = tables()
  return {RESULTS / 'parity/README.md': parity_page(names),
          RESULTS / 'bench/README.md': bench_page(names),
          **{path: filled(path.read_text(), names)
             for path in (ROOT / 'README.md', *sorted(ROOT.glob('docs/*.md')),
                         RESULTS / 'README.md')}}


def permutenet_steps(path):
  """Draws how PermuteNet's accuracy of places grows with steps at every scale that is measured,
  with the paper's number, and a line at each ninth: one place of the 3x3 canvas more."""
  cell = 'permutenet/location/3x3'
  with plots.drawing(path, size=(7.2, 3.4)) as figure:
    axis = figure.subplots()
    for colour, name in zip(plots.LINES, ('table1_full', 'table1', 'table1_narrow'), strict=False):
      [record] = [r for r in schema.read(RESULTS / name / 'results.json')
                  if r['cell'] == cell and 'curves' in r.get('detail', {})]
      steps, accuracy = zip(*record['detail']['curves']['eval_accuracy'], strict=True)
      width = record['config']['model']['width']
      axis.plot(steps, accuracy, color=colour, linewidth=1.6,
                label=f'gapjax, scale {record["scale"]}, width {width}, one seed')
    axis.plot([20 * 1_042], [suites.TABLE1['permutenet', 'location'][3]], 'o', color=plots.INK,
              label='the paper, width 64')
    for places in range(1, 10):
      axis.axhline(places / 9, color=plots.RULE, linewidth=.8, zorder=0)
    axis.set(ylim=(0, 1.02), xlabel='step', title='PermuteNet: places found, 3 x 3',
             yticks=[n / 9 for n in range(10)], yticklabels=[f'{n} of 9' for n in range(10)])
    axis.grid(visible=False)
    axis.legend(loc='upper left', fontsize=8, frameon=False)


def main():
  report.build_all(RESULTS)
  permutenet_steps(RESULTS / 'permutenet_steps.png')
  for path, text in pages().items():
    path.write_text(text)


if __name__ == '__main__':
  main()
