"""A page as data, and its two renderings: Markdown, and one HTML file that needs nothing else."""

import base64
import dataclasses
import html
import pathlib
import re
import struct

from gapjax.report.plots.base import DPI, PAGE


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
  """A PNG in the report's folder, and its version for a dark page if it has one."""
  path: pathlib.Path
  alt: str
  caption: str
  dark: pathlib.Path | None = None


@dataclasses.dataclass(frozen=True)
class Section:
  """What one section holds, in this order; `facts` are (number, what it is) in large type.

  `level` 3 stands below the last of level 2; `fact_columns` of facts stand side by side.
  """
  heading: str
  text: list = ()
  facts: list = ()
  code: str = ''
  tables: list = ()
  pictures: list = ()
  level: int = 2
  fact_columns: int = 3


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


def markdown(page):
  """The page as Markdown; its pictures are links to files beside it."""
  parts = [f'# {_plain(page.title)}', f'*{_plain(page.subtitle)}*', *map(_plain, page.lead)]
  for section in page.sections:
    parts.append(f'{"#" * section.level} {_plain(section.heading)}')
    parts += map(_plain, section.text)
    if section.facts:
      parts.append('\n'.join(f'- **{_plain(number)}** {_plain(what)}'
                             for number, what in section.facts))
    if section.code:
      parts.append('\n'.join(f'    {line}' for line in section.code.splitlines()))
    for table in section.tables:
      parts += [markdown_table(table), *([_plain(table.caption)] if table.caption else [])]
    for picture in section.pictures:
      parts += [f'![{_plain(picture.alt)}]({picture.path.name})', f'*{_plain(picture.caption)}*']
  return '\n\n'.join([*parts, f'*{_plain(page.source)}*']) + '\n'


# --- HTML ------------------------------------------------------------------------------------

COLORS = {dark: ';'.join(f'--{name}:{color}' for name, color in {
  **PAGE[dark], 'card': '#191f26' if dark else '#f5f7f8',
  'accent': '#6cbcf0' if dark else '#0b629e'}.items()) for dark in (False, True)}

CSS = f''':root{{color-scheme:light dark;{COLORS[False]}}}
@media(prefers-color-scheme:dark){{:root{{{COLORS[True]}}}}}''' + '''
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);-webkit-text-size-adjust:100%;
  font:16px/1.62 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",sans-serif}
main{max-width:49.5rem;margin:0 auto;padding:4rem 1.25rem 3rem}
h1,h2,h3{font-family:"Iowan Old Style","Palatino Linotype",Palatino,Charter,Georgia,serif;
  font-weight:600;line-height:1.18;text-wrap:balance}
h1{font-size:clamp(1.8rem,5.6vw,2.6rem);letter-spacing:-.012em;margin:0 0 .6rem}
h2{font-size:1.45rem;margin:3.4rem 0 .8rem}
h3{font-size:1.18rem;margin:2.6rem 0 .7rem}
p{margin:0 0 1rem}
.subtitle,figcaption,.caption,footer{color:var(--soft);font-size:.875rem;line-height:1.5}
.subtitle{margin-bottom:1.9rem}
.lead{font-size:1.08rem}
.facts{display:grid;grid-template-columns:repeat(3,1fr);gap:.75rem;margin:1.4rem 0 1.9rem;padding:0}
.facts.of2{grid-template-columns:repeat(2,1fr)}
.facts div{background:var(--card);border-radius:.6rem;padding:.95rem 1.1rem}
.facts dt{font-size:clamp(1.3rem,5vw,1.95rem);font-weight:600;line-height:1.15;
  color:var(--accent);font-variant-numeric:tabular-nums;letter-spacing:-.01em}
.facts dd{margin:.3rem 0 0;font-size:.84rem;line-height:1.4;color:var(--soft)}
.scroll{overflow-x:auto;-webkit-overflow-scrolling:touch;margin:1.2rem 0 .6rem}
table{border-collapse:collapse;width:100%;font-size:.875rem;line-height:1.4;
  font-variant-numeric:tabular-nums;border-bottom:1px solid var(--soft)}
th,td{padding:.5rem .5rem;text-align:left;vertical-align:baseline}
th:first-child,td:first-child{padding-left:0}
th:last-child,td:last-child{padding-right:0}
thead th{font-weight:500;font-size:.8rem;line-height:1.3;color:var(--soft);
  vertical-align:bottom;border-bottom:1px solid var(--soft)}
.n{text-align:right;white-space:nowrap}
thead .n{white-space:normal;max-width:8.5rem;margin-left:auto}
td.w{overflow-wrap:anywhere}
.names td.w:not(.k){white-space:nowrap;overflow-wrap:normal}
.wide table{font-size:.8rem}
.wide thead th{font-size:.74rem}
@media(min-width:58rem){.wide{margin-left:-3.5rem;margin-right:-3.5rem}}
td.strong{font-weight:600}
th.strong{color:var(--ink)}
.k{color:var(--soft);white-space:nowrap;width:1%;padding-right:1.5rem}
tbody tr+tr td{border-top:1px solid var(--rule)}
tbody tr.break td{border-top:1px solid var(--soft)}
pre{background:var(--card);border-radius:.6rem;padding:.85rem 1.1rem;overflow-x:auto;margin:1rem 0;
  font:.9rem/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
figure{margin:1.4rem 0 2rem}
img{display:block;max-width:100%;height:auto;margin:0 auto}
figcaption{margin-top:.7rem}
ul{padding-left:1.2rem}
footer{margin-top:3.6rem;padding-top:1.1rem;border-top:1px solid var(--rule)}
@media(max-width:34rem){main{padding-top:2.2rem}h2{margin-top:2.6rem}
  .facts{gap:.5rem}.facts div{padding:.75rem}.facts dd{font-size:.78rem}
  .scroll{margin-right:-1.25rem;padding-right:1.25rem}
  .scroll img{max-width:35rem;margin:0}
  table{font-size:.8rem}th,td{padding:.45rem .4rem}thead th{font-size:.74rem}
  .names td:first-child,.names th:first-child{position:sticky;left:0;background:var(--page)}
  .names td.w:first-child{white-space:normal;min-width:5.4rem}}
'''


WIDE = 8  # a table of more columns is set smaller and, where there is room, beyond the margins


def _tag(name, text, **attributes):
  """One element; `text` is escaped. class_ is class, since Python keeps that word."""
  said = ''.join(f' {key.rstrip("_")}="{html.escape(value)}"'
                 for key, value in attributes.items() if value)
  return f'<{name}{said}>{html.escape(str(text))}</{name}>'


def _whole(text):
  """Text in which no line ends inside 'top-1' or 'ResNet-18'."""
  return str(text).replace('-', '\N{NON-BREAKING HYPHEN}')


def _html_table(table):
  pairs = not any(table.head)  # a list of names and values, without a head
  def cell(tag, i, text):
    kinds = ['w' if i < table.text else 'n', *(['strong'] if i in table.strong else []),
             *(['k'] if pairs and i == 0 else [])]
    return _tag(tag, text, class_=' '.join(kinds))
  lines = ['<div class="scroll wide">' if len(table.head) > WIDE else '<div class="scroll">',
           '<table>' if pairs else '<table class="names">']
  if not pairs:
    head = ''.join(cell('th', i, _whole(text)) for i, text in enumerate(table.head))
    lines.append(f'<thead><tr>{head}</tr></thead>')
  lines.append('<tbody>')
  for number, row in enumerate(table.rows):
    start = '<tr class="break">' if number in table.breaks else '<tr>'
    lines.append(start + ''.join(cell('td', i, text) for i, text in enumerate(row)) + '</tr>')
  lines += ['</tbody>', '</table>', '</div>']
  if table.caption:
    lines.append(_tag('p', table.caption, class_='caption'))
  return lines


def _html_picture(picture):
  def data(path):
    return f'data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}'
  # Bytes 16 to 24 of a PNG are its size: with it the page does not jump while it loads.
  header = picture.path.read_bytes()[16:24]
  width, height = (round(v * 96 / DPI) for v in struct.unpack('>II', header))
  image = (f'<img src="{data(picture.path)}" width="{width}" height="{height}" '
           f'alt="{html.escape(picture.alt)}">')
  if picture.dark:
    image = ('<picture><source media="(prefers-color-scheme: dark)" '
             f'srcset="{data(picture.dark)}">{image}</picture>')
  return ['<figure>', f'<div class="scroll">{image}</div>',
          _tag('figcaption', picture.caption), '</figure>']


def html_page(page):
  """The page as one HTML file: pictures inside, no script, nothing loaded from elsewhere."""
  lines = ['<!doctype html>', '<html lang="en">', '<head>', '<meta charset="utf-8">',
           '<meta name="viewport" content="width=device-width, initial-scale=1">',
           _tag('title', page.title), f'<style>\n{CSS}</style>', '</head>', '<body>', '<main>',
           '<header>', _tag('h1', page.title), _tag('p', page.subtitle, class_='subtitle'),
           *(_tag('p', paragraph, class_='lead') for paragraph in page.lead), '</header>']
  for section in page.sections:
    lines += ['<section>', _tag(f'h{section.level}', section.heading)]
    lines += [_tag('p', paragraph) for paragraph in section.text]
    if section.facts:
      facts = (f'<div>{_tag("dt", number)}{_tag("dd", _whole(what))}</div>'
               for number, what in section.facts)
      lines += [f'<dl class="facts of{section.fact_columns}">', *facts, '</dl>']
    if section.code:
      lines.append(_tag('pre', section.code))
    for table in section.tables:
      lines += _html_table(table)
    for picture in section.pictures:
      lines += _html_picture(picture)
    lines.append('</section>')
  return '\n'.join([*lines, _tag('footer', page.source), '</main>', '</body>', '</html>', ''])
