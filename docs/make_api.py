"""Writes docs/api.md from the docstrings, which griffe reads from the source without importing it.

    pip install -e '.[test]'
    python docs/make_api.py
"""

import ast
import pathlib
import textwrap

import griffe

import gapjax

DOCS = pathlib.Path(__file__).parent
PAGE = DOCS / 'api.md'
# What there is to import beside gapjax's own names; a package stands for what its __all__ says.
MODULES = ('config', 'data', 'models', 'models.base', 'models.resnet', 'models.vgg',
           'models.deeplab', 'models.mobilenet', 'models.heads', 'models.downsample',
           'models.layers', 'tasks.augshift', 'tasks.canvas', 'tasks.consistency',
           'tasks.segmentation', 'neurons.network', 'neurons.rank', 'neurons.yardstick',
           'neurons.attack', 'neurons.sweeps', 'weights.files', 'weights.pretrained',
           'training.train',
           'training.evaluate')
LEAD = """# Reference

Made from the docstrings by `python docs/make_api.py`; do not edit it by hand. The first part is
what `from gapjax import ...` gives, for networks of your own. The rest is what gapjax itself is
made of, module by module: (b, h, w, c) is a batch of feature maps, K or k the number of classes.
"""


def page() -> str:
  """The Markdown of api.md."""
  package = griffe.load(
    'gapjax', search_paths=[DOCS.parent], try_relative_path=False, docstring_parser='google',
    docstring_options={'returns_multiple_items': False, 'returns_named_value': False,
                       'warnings': False})
  faces = [face(package, name) for name in gapjax.__all__]
  parts = [LEAD, '## from gapjax import', *sections(package)]
  parts += [part for entry in faces for part in described(entry, package)]
  for module in map(package.__getitem__, MODULES):
    parts += [f'## {module.path}', file_of(module), *sections(module)]
    parts += [part for entry in members(module) if entry not in faces
              for part in described(entry, module)]
  return '\n\n'.join(part.strip('\n') for part in parts) + '\n'


def face(package, name):
  """griffe's object of a function or class that gapjax hands on, found by where it says it is from.
  """
  value = getattr(gapjax, name)
  return package[f'{value.__module__.partition(".")[2]}.{value.__qualname__}']


def members(module):
  """Its public functions and classes that have a docstring; of a package, those it hands on."""
  for name, member in module.members.items():
    if name in (module.exports or ()) or not (name.startswith('_') or member.is_alias):
      entry = member.final_target if member.is_alias else member
      if (entry.is_function or entry.is_class) and entry.has_docstring:
        yield entry


def file_of(entry):
  file = entry.filepath.relative_to(DOCS.parent)
  return f'[{file}](../{file})'


def described(entry, module, level=3):
  """Heading, file if it is not the module's, signature and docstring of a function, or a class with
  its methods."""
  yield f'{"#" * level} {entry.name}'
  if entry.filepath != module.filepath:
    yield file_of(entry)
  yield f'```python\n{signature(entry)}\n```'
  yield from sections(entry)
  for method in entry.members.values() if entry.is_class else ():
    if method.is_function and method.has_docstring and not method.name.startswith('_'):
      yield from described(method, entry, level + 1)


def signature(entry) -> str:
  """As in the source, which keeps the quotes of shapes; of a class, its fields."""
  [node] = ast.parse(textwrap.dedent(entry.source)).body
  if entry.is_class:
    fields = [ast.unparse(field) for field in node.body if isinstance(field, ast.AnnAssign)]
    line = f'class {entry.name}' + (f'({", ".join(fields)})' if fields else '')
  else:
    line = f'{entry.name}({ast.unparse(node.args)})' + (
      f' -> {ast.unparse(node.returns)}' if node.returns else '')
  return textwrap.fill(line, 100, subsequent_indent=' ' * (line.find('(') + 1),
                       break_long_words=False, break_on_hyphens=False)


def sections(entry):
  """The docstring's parts as Markdown."""
  for section in entry.docstring.parsed if entry.docstring else ():
    kind, value = section.kind.value, section.value
    if kind == 'text':
      yield value
    elif kind == 'returns':
      [item] = value  # what stands before a colon passes for a type
      said = '' if str(item.annotation) == str(entry.returns) else f'{item.annotation}: '
      yield f'Returns: {one_line(said + item.description)}'
    else:  # parameters, attributes, raises
      title = section.title or kind.capitalize()
      yield '\n'.join([f'{title}:\n', *(
        f'- {named(item)}{one_line(item.description)}'
        for item in value)])


def named(item) -> str:
  """'`name`: ' of a parameter, or of an exception; what a generator yields has no name."""
  name = getattr(item, 'name', None)
  name = item.annotation if name is None else name
  return f'`{name}`: ' if name else ''


def one_line(text) -> str:
  return ' '.join(text.split())


if __name__ == '__main__':
  PAGE.write_text(page())
