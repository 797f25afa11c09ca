"""From JSON on disk to a report a stranger can read: README.md, report.html and PNGs.

A report is a list of sections. The paper's claims are a module each, canvas, shifts and attack,
which know their cells, tables and words; each function in a module's `SECTIONS`
looks at the `Source` and returns one `Section` (text, facts, tables, pictures), which is left out
without a table or a picture. Markdown and HTML are both rendered from that list. A new figure of
the paper is one more function in `SECTIONS`. Nothing here depends on the clock: the same JSON gives
the same bytes.
"""

import dataclasses
import json

from gapjax import paths
from gapjax.errors import UsageError
from gapjax.records import runs, schema
from gapjax.report import ablations, attack, canvas, compared, shifts
from gapjax.report.parts import DASH, Source, number, ours, pytorch, suite
from gapjax.report.render import Page, Section, Table, html_page, markdown, markdown_table

CLAIMS = (canvas, shifts, attack)
# What a report can tell: the paper's claims, and what it leaves open.
PARTS = (*CLAIMS, ablations)
PAPER = ('Islam, Kowal, Jia, Derpanis, Bruce: Global Pooling, More than Meets the Eye: Position '
         'Information is Encoded Channel-Wise in CNNs. ICCV 2021, arXiv 2108.07884.')
COMPARE = 'so compare the order of the rows with the paper\'s, not the values.'
NARROW = ('This run uses a narrow ResNet-18 and a part of the training images for a few epochs, '
          f'{COMPARE}')
NARROW_CIFAR = ('This run uses a quarter of the width, {} and 20 epochs of large batches with a '
                f'triangular rate, {COMPARE}')
FULL_CIFAR = ('The recipe is gapjax\'s own, 26 epochs on CIFAR-10 and 50 on CIFAR-100 of large '
              'batches with a triangular rate: our sources do not have the paper\'s.')
BFLOAT16 = ('Networks compute in bfloat16; BatchNorm\'s statistics, pooled features and losses in '
            'float32.')
# What to say of a (suite, scale) that is not the paper's own; '' is any other suite.
NOTES = {
  ('quickstart', 'digits'): (
    'This run uses small handwritten digits in place of CIFAR-10, narrow networks and one to five '
    f'hundred steps, {COMPARE} PermuteNet learns slowly: after 2,911 steps, on canvases of 48 '
    'pixels, it finds 44.4% of the places (gapjax reproduce ablations), and the paper\'s, four '
    'times as wide and after 20,000 steps on CIFAR-10, 78.8%.'),
  ('', 'digits'): 'This run uses small handwritten digits in place of CIFAR-10, a narrow network '
                  f'and a few hundred steps, {COMPARE}',
  ('table1', 'small'): 'This run uses a quarter of the width, 10,000 training and 500 test images '
                       'shrunk to 16 x 16, and 10, 6 and 4 epochs with cosine decay, '
                       f'{COMPARE}',
  ('attack', 'small'): 'This run uses CamVid in place of Cityscapes, at half the size, a narrow '
                       f'ResNet-18 from scratch and a few thousand steps, {COMPARE} Classifiers '
                       'are trained as in table 1 at this scale.',
  ('attack', 'pretrained'): 'This run uses CamVid in place of Cityscapes, at half the size, and '
                            f'EfficientNet-Lite0 in place of ResNet-50, {COMPARE}',
  ('attack', 'full'): 'This run uses CamVid in place of Cityscapes.',
  ('ablations', 'small'): 'This run uses small handwritten digits in place of CIFAR-10, and all '
                          'but the row 4x a narrow network.',
  ('table2', 'small'): NARROW, ('augshift_sweep', 'small'): NARROW,
  ('table1', 'narrow'): 'This run is the paper\'s recipe, all images and all epochs (GAPNet\'s '
                        'location: 2, which it finds after one), at a quarter of the width.',
  ('table2', 'narrow'): NARROW_CIFAR.format('all training images'),
  ('augshift_sweep', 'narrow'): NARROW_CIFAR.format(
    'all training images but those by which it is measured'),
  ('table2', 'full'): FULL_CIFAR, ('augshift_sweep', 'full'): FULL_CIFAR,
  ('', 'narrow'): f'This run uses a quarter of the width, {COMPARE}',
  ('', 'small'): f'This run is smaller than the paper\'s, {COMPARE}',
  ('', 'tiny'): 'This run shows that everything runs; its few steps show nothing else.'}

# What run.json says of a suite's trainings, by its types.
RUN = {'command': str, 'began': str, 'ended': str, 'device': str, 'versions': dict,
       'wall_seconds': (float, int)}


def _load(workdir):
  run, summary = (paths.read_json(workdir / name) if (workdir / name).exists() else {}
                  for name in ('run.json', 'summary.json'))
  paths.check_fields(run, {key: kind for key, kind in RUN.items() if key in run},
                     workdir / 'run.json')
  results = workdir / 'results.json'
  if records := schema.read(results):
    return Source(workdir, records=records, run=run)
  if results.exists():
    raise UsageError(f'{results} is empty: no cell has finished yet; run again')
  if not summary:
    raise UsageError(f'{workdir} holds neither results.json nor summary.json; '
                     'give the --workdir of a `gapjax reproduce`, `quickstart` or `train`')
  about = {key: summary[key] for key in ('device', 'versions', 'began', 'ended') if key in summary}
  return Source(workdir, records=runs.single(workdir, summary), run={**run, **about})


def _split(records):
  """[(module, its records in its order)], in the order of PARTS; None's are all others."""
  by_claim = {claim: sorted((r for r in records if claim.match(r)), key=claim.place)
              for claim in PARTS}
  by_claim[None] = [r for r in records if not any(claim.match(r) for claim in PARTS)]
  return [(claim, some) for claim, some in by_claim.items() if some]


def _parts(source):
  """[(module or None, Source with the records and cells of that claim)]."""
  parts = [(claim, dataclasses.replace(source, records=some))
           for claim, some in _split(source.records)]
  return [(claim, dataclasses.replace(part, cells=claim.cells(part)) if claim else part)
          for claim, part in parts]


def _plain_table(records):
  torch = any(r.get('torch') is not None for r in records)
  several = len({suite(r) for r in records}) > 1
  rows = [[*([suite(r)] if several else []), r['cell'], r['metric'],
           number(r.get('paper'), r['metric']), *([pytorch([r])] if torch else []), ours(r)]
          for r in records]
  head = [*(['suite'] if several else []), 'cell', 'metric', 'paper',
          *(['PyTorch'] if torch else []), 'gapjax']
  return Table(head, rows, text=2 + several, strong=frozenset({len(head) - 1}),
               caption='Accuracy, consistency and mIoU in percent. gapjax: mean '
               '\N{PLUS-MINUS SIGN} sample standard deviation (seeds).')


def table(records):
  """The results as Markdown, in percent, for a report, a terminal or a README.

  The canvas cells (the paper's section 3) and the shift cells (section 4) take one row a cell in a
  table each, what removing channels left (section 5) and the ablations a table or two; any others
  one row a record in the last. `records`: a suite's results.json (schema.py).
  """
  return '\n\n'.join(markdown_table(table) for claim, some in _split(records)
                     for table in (claim.tables(some) if claim else [_plain_table(some)]))


def told(records, *, headings=False) -> list[str]:
  """What each network of a suite showed, a sentence each; headings: below those of the claims."""
  lines = []
  for claim, some in _split(records):
    if claim not in CLAIMS:
      continue
    if headings:
      lines.append(claim.HEADING)
    for cell in dict.fromkeys(r['cell'] for r in some):
      lines.append(claim.told([r for r in some if r['cell'] == cell]))
  return lines


def scale_notes(records):
  """A sentence for every suite and scale among the records that is not the paper's own, on
  bfloat16 where all compute in it, and for every change to their configs."""
  keys = {(r.get('suite') if not r.get('changes') else '', r.get('scale')) for r in records}
  keys = {key if key in NOTES else ('', key[1]) for key in keys}
  dtypes = {r['config'].get('model', {}).get('dtype') for r in records if r.get('config')}
  changes = dict.fromkeys(', '.join(r['changes']) for r in records if r.get('changes'))
  return list(dict.fromkeys([
    *(sentence for key, sentence in NOTES.items() if key in keys),
    *([BFLOAT16] if dtypes == {'bfloat16'} else []),
    *(f'Every network is trained with {change}, other than the suite says.' for change in changes)
  ]))


# --- sections --------------------------------------------------------------------------------


def _sections(parts, folder):
  """All sections; with several claims, each of them is a heading and its sections stand below."""
  several = len([claim for claim, _ in parts if claim]) > 1
  sections = []
  for claim, source in parts:
    if claim is None:
      heading = 'Other results' if len(parts) > 1 else 'Results'
      sections.append(Section(heading, tables=[_plain_table(source.records)]))
      continue
    opening = claim.results(source, folder)
    if several:
      opening = dataclasses.replace(opening, heading=claim.HEADING, text=claim.lead(source))
    below = [section for make in (compared.section, *claim.SECTIONS)
             if (section := make(source, folder)).tables or section.pictures]
    sections += [opening, *(dataclasses.replace(section, level=2 + several) for section in below)]
  return sections


def _seconds(value):
  minutes, seconds = divmod(round(value), 60)
  if minutes >= 60:
    return f'{minutes // 60} h {minutes % 60} min'
  return f'{minutes} min {seconds} s' if minutes else f'{value:.1f} s'


# What a record's detail says about training, its label, and how to print it.
DETAIL = [('model', 'model', str), ('parameters', 'parameters', '{:,}'.format),
          ('train_images', 'training images', '{:,}'.format),
          ('test_images', 'test images', '{:,}'.format),
          ('held_out', 'training images left out, to measure by', '{:,}'.format),
          ('input_size', 'input, pixels', str),
          ('epochs', 'epochs', str), ('steps', 'steps', '{:,}'.format),
          ('batch_size', 'batch', str), ('seeds', 'seeds', lambda v: ', '.join(map(str, v))),
          ('commit', 'code', lambda v: v or 'commit not recorded'),
          ('wall_seconds', 'time a seed', lambda v: _seconds(sum(v) / len(v)) if v else DASH),
          ('images_per_second', 'images/s', '{:,.0f}'.format)]


def _how(source):
  """What is the same everywhere goes into one list, what differs into a row a cell."""
  about = source.run
  days = dict.fromkeys(filter(None, [about.get('began'), about.get('ended')]))
  of_run = {'date': ' to '.join(days), 'device': about.get('device'),
            'duration': about.get('wall_seconds') and _seconds(about['wall_seconds']),
            'versions': ', '.join(f'{k} {n}' for k, n in about.get('versions', {}).items())}
  rows = [[name, str(value)] for name, value in of_run.items() if value]
  trained = [{**r['detail'], **_held_out(r), 'seeds': r.get('seeds'), 'cell': r['cell'],
              'commit': r.get('commit') or ''}
             for r in source.records if r.get('detail')]
  differ = []
  for key, name, show in DETAIL:
    column = [show(t[key]) if t.get(key) is not None else DASH for t in trained]
    if len(set(column)) == 1 and column[0] != DASH:
      rows.append([name, column[0]])
    elif len(set(column)) > 1:
      differ.append((name, column))
  tables = [Table(['', ''], rows, text=2)] if rows else []
  if differ:
    names, columns = zip(*differ, strict=True)
    lines = zip((t['cell'] for t in trained), *columns, strict=True)
    tables.append(Table(['cell', *names], list(lines)))
  configs = {record['cell']: record['config'] for record in source.records if 'config' in record}
  if len(configs) == 1:
    config, = configs.values()
    tables.append(Table(['config field', 'value'], _flat(config), text=2))
  command = str(source.run.get('command', ''))
  return Section('How it was made', code=command, tables=tables) if command or tables else None


def _held_out(record):
  """What its detail says instead of test images where those are training images left out."""
  held_out = record.get('config', {}).get('data', {}).get('held_out')
  return {'held_out': record['detail'].get('test_images'), 'test_images': None} if held_out else {}


def _flat(config, prefix=''):
  """[['optimizer.lr', '0.001'], ...]: the names that --config.optimizer.lr= takes."""
  return [row for key, value in config.items() for row in (
    _flat(value, f'{prefix}{key}.') if isinstance(value, dict)
    else [[f'{prefix}{key}', json.dumps(value, ensure_ascii=False)]])]


def _told(claims):
  if set(claims) >= set(CLAIMS):
    return 'one after the other'
  return ' and '.join(f'the {name}' for name, claim in zip(('first', 'second', 'third'), CLAIMS,
                                                           strict=True) if claim in claims)


def _page(source, parts, sections):
  """Title and lead: those of the one claim that is told, or of all."""
  claims = [(claim, part) for claim, part in parts if claim]
  suites = ', '.join(dict.fromkeys(suite(r) for r in source.records if suite(r)))
  if len(claims) == 1:
    (claim, part), = claims
    title, lead = claim.title(part), claim.lead(part)
    if claim in CLAIMS and len({r['cell'] for r in part.records}) == len(part.cells) == 1:
      title = f'{part.cells[0].network_name}: {part.cells[0].task_name.lower()}'
  elif claims:  # nothing in SUITES has ablations beside a claim
    title = 'What global average pooling keeps, and how a network can shed it'
    lead = ['The paper makes three claims about convolutional networks that end in global average '
            'pooling. Position survives the pooling, in the order of the channels. A loss '
            'that drives it out of the pooled features makes a network more translation '
            'invariant. And the channels that carry it can be found and removed. This page tells '
            f'{_told([claim for claim, _ in claims])}.']
  else:
    title = 'Results beside the paper'
    lead = ['Every cell of the suite, the published number beside what gapjax measures.']
  subtitle = f'gapjax: {suites or "a single run"}. Islam et al., ICCV 2021, reproduced in JAX.'
  return Page(title, subtitle, [*lead, *scale_notes(source.records)], sections, PAPER)


def build(workdir):
  """Writes README.md, report.html and PNGs to workdir/report; returns the path of report.html.

  `workdir` holds results.json (a suite; with run.json and its runs' pictures if they exist) or
  summary.json (a run; with metrics.jsonl and samples.png if they exist). Raises UsageError when
  neither is there or one of the files is broken.
  """
  source = _load(paths.of(workdir))
  folder = source.workdir / 'report'
  paths.make(folder)
  parts = _parts(source)
  sections = [*_sections(parts, folder), *filter(None, [_how(source)])]
  page = _page(source, parts, sections)
  # Bytes, not text: Windows would turn the line ends around.
  (folder / 'README.md').write_bytes(markdown(page, folder).encode())
  (folder / 'report.html').write_bytes(html_page(page).encode())
  return folder / 'report.html'


def build_all(folder):
  """`build` of a workdir, or of all suites and runs in a folder; returns the paths of their pages.

  Raises UsageError when nothing is there to report, or one of the files is broken: then after the
  others' pages were built.
  """
  folder = paths.of(folder)
  if not folder.is_dir() or _is_reported(folder):
    return [build(folder)]
  # Other things have a results.json, too; a suite's has a run.json beside it.
  below = [path for path in sorted(folder.iterdir()) if (path / 'summary.json').exists()
           or ((path / 'run.json').exists() and _is_reported(path))]
  pages, broken = [], []
  for path in below or [folder]:
    try:
      pages.append(build(path))
    except UsageError as error:
      broken.append(error)
  if broken:
    raise broken[0]
  return pages


def _is_reported(workdir):
  return (workdir / 'results.json').exists() or (workdir / 'summary.json').exists()
