"""A page as data, and its two renderings: Markdown, and one HTML file that needs nothing else."""

import base64
import dataclasses
import html
import pathlib
import posixpath
import re
import struct

import jinja2
from markupsafe import Markup

from gapjax.errors import UsageError
from gapjax.report.plots.base import DPI


@dataclasses.dataclass(frozen=True)
class Table:
  """Cells are plain strings; the first `text` columns are words, the others numbers.

  `breaks` are the rows that start a new block, `strong` the columns that hold our own numbers.
  """
  head: list
  rows: list
  text: int = 1
  caption: str = ''
  breaks: frozenset = frozenset()
  strong: frozenset = frozenset()


@dataclasses.dataclass(frozen=True)
class Picture:
  """A PNG."""
  path: pathlib.Path
  alt: str
  caption: str


@dataclasses.dataclass(frozen=True)
class Section:
  """What one section holds, in this order; `facts` are (number, what it is) in large type.

  `level` 3 stands below the last of level 2.
  """
  heading: str
  text: list = ()
  facts: list = ()
  code: str = ''
  tables: list = ()
  pictures: list = ()
  level: int = 2


@dataclasses.dataclass(frozen=True)
class Page:
  """A report: title, subtitle, lead (paragraphs), the sections, and the work it rests on."""
  title: str
  subtitle: str
  lead: list
  sections: list
  source: str


# --- Markdown --------------------------------------------------------------------------------


def _plain(text):
  """Text that Markdown and the HTML inside it leave alone, on one line."""
  text = html.escape(re.sub(r'[ \t\r\n]+', ' ', str(text)), quote=False)
  # Underscores inside words are harmless, and names full of backslashes are hard to read.
  return re.sub(r'([\\`*|\[\]]|(?<!\w)_|_(?!\w))', r'\\\1', text)


def markdown_table(table):
  """Markdown with the columns padded, so that it reads well in a terminal too."""
  head, *rows = [[_plain(cell) for cell in row] for row in (table.head, *table.rows)]
  widths = [max(3, *(len(row[i]) for row in (head, *rows))) for i in range(len(head))]
  words = [i < table.text for i in range(len(head))]
  def line(cells):
    padded = [cell.ljust(width) if word else cell.rjust(width)
              for cell, width, word in zip(cells, widths, words, strict=True)]
    return f'| {" | ".join(padded)} |'
  rule = '|'.join('-' * (width + 2) if word else '-' * (width + 1) + ':'
                  for width, word in zip(widths, words, strict=True))
  return '\n'.join([line(head), f'|{rule}|', *map(line, rows)])


def markdown(page, folder):
  """The page as Markdown in `folder`; its pictures are links to files there and beside it."""
  def link(path):
    return posixpath.relpath(path.as_posix(), folder.as_posix())
  def finalize(value):
    return value if isinstance(value, Markup) else _plain(value)
  return _template('page.md.jinja', finalize=finalize).render(
    page=page, link=link, markdown_table=markdown_table)


def html_page(page):
  """The page as one HTML file: pictures inside, no script, nothing loaded from elsewhere."""
  return _template('page.html.jinja', autoescape=True).render(page=page, embedded=_embedded)


def _template(name, **options):
  return jinja2.Environment(
    loader=jinja2.PackageLoader('gapjax.report', '.'), undefined=jinja2.StrictUndefined,
    trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, **options).get_template(name)


def _embedded(path):
  """A PNG in base64, and its width and height on the page, so that this does not jump."""
  data = path.read_bytes()
  if not data.startswith(b'\x89PNG\r\n\x1a\n'):
    raise UsageError(f'{path} is not a PNG; delete the file and run again')
  size = struct.unpack('>II', data[16:24])
  return base64.b64encode(data).decode(), *(round(pixels * 96 / DPI) for pixels in size)
