"""A Cloud Storage server for tests: gcp-storage-emulator, and what tensorstore needs beyond.

    python tests/bucket_server.py BUCKET [BUCKET...]

prints its address, and serves until it is killed.

The emulator leaves out the generation of an object that is downloaded, and writes and deletes
whatever the condition on it. Both are in Cloud Storage's documentation ("Request preconditions",
"x-goog-generation"), and tensorstore's database of a checkpoint rests on them.
"""

import sys
from http import HTTPStatus
from urllib.parse import parse_qs, unquote, urlparse

from gcp_storage_emulator import server
from gcp_storage_emulator.exceptions import NotFound


class Handler(server.RequestHandler):
  """Objects have generations, and requests may depend on them."""

  def generation(self) -> str:
    """Of the object that the request names, '0' where there is none, '' if it names no object."""
    url = urlparse(self.path)
    bucket, _, name = url.path.partition('/b/')[2].partition('/o')
    name = unquote(name.removeprefix('/')) or ''.join(parse_qs(url.query).get('name', []))
    try:
      return self.storage.get_file_obj(bucket, name)['generation'] if name else ''
    except NotFound:
      return '0'

  def end_headers(self):
    if self.command == 'GET' and 'alt=media' in self.path and self.generation() not in ('', '0'):
      self.send_header('x-goog-generation', self.generation())
    super().end_headers()

  def allowed(self) -> bool:
    """Whether the request's conditions hold; if not, it is answered."""
    asked, generation = parse_qs(urlparse(self.path).query), self.generation()
    status = None
    if asked.get('ifGenerationMatch', [generation]) != [generation]:
      status = HTTPStatus.PRECONDITION_FAILED
    elif generation != '0' and asked.get('ifGenerationNotMatch') == [generation]:
      status = HTTPStatus.NOT_MODIFIED
    if status:
      self.rfile.read(int(self.headers.get('Content-Length', 0)))
      self.send_response(status)
      self.send_header('Content-Length', '0')
      self.end_headers()
    return not status

  def do_GET(self):
    if self.allowed():
      super().do_GET()

  def do_POST(self):
    if self.allowed():
      super().do_POST()

  def do_DELETE(self):
    if self.allowed():
      super().do_DELETE()


if __name__ == '__main__':
  server.RequestHandler = Handler
  emulator = server.create_server('127.0.0.1', 0, in_memory=True)
  for bucket in sys.argv[1:]:
    server.buckets.create_bucket(bucket, emulator._storage)
  emulator.start()
  print(f'http://127.0.0.1:{emulator._api._httpd.server_port}', flush=True)
