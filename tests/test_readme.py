"""What the README says is what the repository holds."""

import itertools
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT

from gapjax import cli, config
from gapjax.paths import read_json
from gapjax.pytorch import parity
from gapjax.records import schema
from gapjax.report.render import markdown_table
from gapjax.reproduce import suites
from gapjax.reproduce.records import holds

sys.path += [str(ROOT / 'benchmarks'), str(ROOT / 'docs')]
import compile_table
import make_api
import results_pages

README = (ROOT / 'README.md').read_text()
PAGES = [ROOT / 'README.md', *sorted(ROOT.glob('docs/*.md')), ROOT / 'launch/README.md',
         ROOT / 'results/README.md']
MADE = sorted(ROOT.glob('results/*/**/README.md'))  # by commands


def test_tables_are_what_the_commands_print():
  """To the byte, from the JSON files alone: benchmarks/results_pages.py would change nothing."""
  pages = results_pages.pages()
  assert set(pages) > {ROOT / 'README.md', ROOT / 'results/README.md'}
  assert [path for path, text in pages.items() if path.read_text() != text] == []


def test_the_reference_is_what_the_docstrings_say():
  """docs/make_api.py would change nothing."""
  assert make_api.PAGE.read_text() == make_api.page()


def test_where_is_what_names_what_is_there():
  """In each row of docs/where.md's table the file holds what it says to look for."""
  page = (ROOT / 'docs/where.md').read_text()
  rows = re.findall(r'^\|.*\]\(\.\./(.*?)\) \| (.*) \|$', page, re.M)
  assert len(rows) > 20
  for file, names in rows:
    text = (ROOT / file).read_text()
    missing = [name for name in re.findall('`(.*?)`', names) if not re.search(rf'\b{name}\b', text)]
    assert not missing, file


def test_the_architecture_is_a_page_that_names_each_file_once():
  page = (ROOT / 'docs/architecture.md').read_text()
  files = re.findall(r'\]\((\.\./[^)]*)\)', page)
  assert len(files) == len(set(files)) > 40
  assert len(page.splitlines()) <= 120 and max(map(len, page.splitlines())) <= 120


def test_the_readme_is_short():
  assert len(README.splitlines()) <= 220


def test_a_table_is_filled_in_by_its_name_and_the_words_of_its_heads():
  names = {'a': '| x |\n|---|\n| 1 |\n\n| y |\n|---|\n| 2 |\n', 'b': '| z |\n'}
  old = '<!-- table: {} -->\n| old |\n\n| old |\n| older |\n\nend\n'
  filled = results_pages.filled(old.format('a: y'), names)
  assert filled == '<!-- table: a: y -->\n| y |\n|---|\n| 2 |\n\nend\n'
  assert results_pages.filled(old.format('a'), names).count('| x |\n|---|\n| 1 |\n\n| y |') == 1
  with pytest.raises(KeyError):
    results_pages.filled(old.format('c'), names)


@pytest.mark.parametrize('suite', results_pages.SUITES)
def test_the_code_still_trains_what_was_measured(suite):
  records = schema.read(ROOT / 'results' / suite / 'results.json')
  name, scale, changes = (records[0].get(key, ()) for key in ('suite', 'scale', 'changes'))
  every = suites.changed(suites.SUITES[name](scale), [f'--config.{change}' for change in changes])
  trained = {cell.name: cell for cell in every}
  assert suite.startswith(name)
  assert {record['scale'] for record in records} == {scale}
  assert suite.endswith(f'_{scale}') or scale == suites.SCALES[name][0]
  for record in records:
    cell = trained[record['cell']]
    assert holds(record, cell) and cell.fields.items() <= record.items()


def test_parity_is_of_these_networks_and_rounding_alone():
  found = read_json(ROOT / 'results/parity/results.json')['networks']
  assert list(found) == [case.name for case in parity.cases()], (
    'run gapjax convert --check --output=results/parity/results.json')
  assert not any(parity.too_large(row) for row in found.values())


def test_compiled_steps_are_of_these_configs():
  results = compile_table.results()
  table = markdown_table(compile_table.table(results))
  assert results and table in (ROOT / 'results/compile/README.md').read_text()
  for (name, topology), found in results.items():
    c = config.from_flags([f'--config={ROOT}/configs/{name}.py',
                           *compile_table.FIELDS.get(topology, [])])
    assert not config.difference(c, found['config'], deciding=config.RUN)


@pytest.mark.parametrize('page', PAGES + MADE, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_links_and_headings_exist(page):
  for target in re.findall(r'\]\((?!http)([^)]*)\)', page.read_text()):
    name, _, heading = target.partition('#')
    file = page.parent / name if name else page
    assert file.exists(), target
    headings = re.findall('^#+ (.*)$', file.read_text(), re.M) if heading else ()
    assert not heading or heading in [re.sub(r'[^\w -]', '', h).lower().replace(' ', '-')
                                      for h in headings]


def test_configs_and_variants_that_they_name_are_read():
  variants = {found for page in PAGES
              for found in re.findall(r'configs/\w+\.py(?::[\w=,]+)?', page.read_text())}
  assert len(variants) > 8
  for variant in variants:
    config.from_flags([f'--config={ROOT}/{variant}'])


def commands(page):
  """The commands of a page's shell blocks: lists of words."""
  for block in re.findall('```sh\n(.*?)```', page.read_text(), re.S):
    for line in block.replace('\\\n', ' ').splitlines():
      words = shlex.split(line, comments=True)
      if words:
        yield words


def options(verb, capsys):
  """The names of the flags that a verb knows, and of those that it must have."""
  with pytest.raises(SystemExit):
    cli.VERBS[verb](['--help'])
  told = capsys.readouterr().out
  usage = told.partition('\n\n')[0]
  while '[' in usage:  # what may be left out, of which a part may be, too
    usage = re.sub(r'\[[^][]*\]', '', usage)
  return set(re.findall(r'--\w+', told)), set(re.findall(r'--\w+', usage))


def test_every_command_of_the_pages_is_understood(capsys):
  """Scripts of launch/ by --dry-run; of gapjax, theirs and others', verb, flags and config fields.
  """
  seen = 0
  for words in itertools.chain.from_iterable(map(commands, PAGES)):
    scripts = [i for i, word in enumerate(words) if word.startswith('launch/')]
    if scripts and words[scripts[0]] != 'launch/restart.sh':
      script, *rest = words[scripts[0]:]
      flags = [*rest[:1], '--dry-run', *rest[1:]] if 'tpu_vm' in script else ['--dry-run', *rest]
      done = subprocess.run(['bash', script, *flags], cwd=ROOT, capture_output=True, text=True,
                            check=False)
      assert done.returncode == 0, (words, done.stderr)
      seen += 1
    verbs = [i for i, word in enumerate(words) if word in cli.VERBS]
    if not verbs or not any('gapjax' in word or 'launch/' in word for word in words[:verbs[0]]):
      continue
    verb, *flags = words[verbs[0]:]
    (known, needed), of_config = options(verb, capsys), [f for f in flags
                                                         if f.startswith('--config')]
    if verb in ('rank', 'attack'):  # of a run's own config
      config.with_fields(config.from_file('deeplab_camvid'), of_config, of='neurons.')
    elif of_config:
      config.from_flags([f.replace('--config=', f'--config={ROOT}/') for f in of_config])
    strange = [f for f in flags if f.startswith('--') and f not in of_config
               and f.partition('=')[0] not in known]
    given = {f.partition('=')[0] for f in flags}
    assert not strange and (given >= needed or '--help' in given), words
    seen += 1
  assert seen > 40


def test_continuous_integration_runs_the_readmes_test_command():
  block = README.split('<!-- tests -->\n')[1].split('```')[1]
  [command] = block.splitlines()[1:]
  assert command.startswith('python3 -m venv') and command.endswith('pytest -q')
  assert "sed -n '/^<!-- tests -->$/,/^```$/p' README.md" in (ROOT / '.ci' / 'run').read_text()
