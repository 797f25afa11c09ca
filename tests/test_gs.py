"""Workdirs in a bucket: real processes against a Cloud Storage server on this machine."""

import http.server
import importlib.util
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request

import jax
import numpy as np
import pytest
from conftest import ROOT, event_values, newest, python, refused, same

from gapjax import paths
from gapjax.neurons.rank import load
from gapjax.paths import read_json, read_lines
from gapjax.report import page as report
from gapjax.training.evaluate import evaluate
from gapjax.training.log import Writer

STEPS = 40  # of 4 epochs; saved every 5


class Bucket:
  """The server's objects, by HTTP alone; `env` leads gcsfs and tensorstore to it."""

  def __init__(self, address):
    self._objects = f'{address}/storage/v1/b/bucket/o'
    self._upload = f'{address}/upload/storage/v1/b/bucket/o?uploadType=media&name='
    self.env = environment(address)

  def names(self, folder) -> list[str]:
    query = urllib.parse.urlencode({'prefix': f'{folder}/'})
    with urllib.request.urlopen(f'{self._objects}?{query}') as answer:
      return [item['name'] for item in json.load(answer).get('items', [])]

  def read(self, name) -> bytes:
    with urllib.request.urlopen(
        f'{self._objects}/{urllib.parse.quote(name, safe="")}?alt=media') as answer:
      return answer.read()

  def write(self, name, data: bytes) -> None:
    urllib.request.urlopen(urllib.request.Request(
      self._upload + urllib.parse.quote(name, safe=''), data, method='POST',
      headers={'Content-Type': 'application/octet-stream'})).close()

  def download(self, folder, target):
    """All of a folder, to a local one."""
    for name in self.names(folder):
      file = target / name.removeprefix(f'{folder}/')
      file.parent.mkdir(parents=True, exist_ok=True)
      file.write_bytes(self.read(name))
    return target

  def saved(self, folder) -> int:
    """The newest step whose checkpoint is whole, or 0."""
    return max((int(found[1]) for name in self.names(folder) if (found := re.fullmatch(
      f'{folder}/checkpoints/(\\d+)/commit_success.txt', name))), default=0)


def environment(address):
  return {'STORAGE_EMULATOR_HOST': address, 'TENSORSTORE_GCS_HTTP_URL': address,
          'GOOGLE_AUTH_TOKEN_FOR_TESTING': 'none', 'no_proxy': '127.0.0.1',
          # The server does not know of kinds of buckets.
          'GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT': 'false'}


@pytest.fixture(scope='module')
def bucket():
  missing = [name for name in ('gcsfs', 'gcp_storage_emulator')
             if not importlib.util.find_spec(name)]
  if missing:
    pytest.skip(f"{' and '.join(missing)} not installed: pip install '.[test]'")
  with subprocess.Popen([sys.executable, ROOT / 'tests' / 'bucket_server.py', 'bucket'], text=True,
                        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
    yield Bucket(process.stdout.readline().strip())
    process.kill()


@pytest.fixture(scope='module')
def arguments(tiny_file, data_dir):
  return [f'--config={tiny_file(num_epochs=4, log_every=5)}', f'--data_dir={data_dir}']


@pytest.fixture(scope='module')
def local(gapjax, arguments, tmp_path_factory):
  """The run in a local folder, undisturbed."""
  workdir = tmp_path_factory.mktemp('local')
  done = gapjax('train', *arguments, f'--workdir={workdir}')
  assert done.returncode == 0, done.stderr
  return workdir


@pytest.fixture(scope='module')
def killed(bucket, gapjax, arguments, tmp_path_factory):
  """The same run in the bucket, killed and started again: (a copy of its folder, the step that it
  went on from)."""
  command = ['train', *arguments, '--workdir=gs://bucket/a run']
  process = gapjax(*command, env=bucket.env, start=True)
  while process.poll() is None and bucket.saved('a run') < 10:
    time.sleep(0.05)
  time.sleep(random.uniform(0, 0.3))
  os.kill(process.pid, signal.SIGKILL)
  _, said = process.communicate()
  assert process.returncode == -signal.SIGKILL, said
  done = gapjax(*command, env=bucket.env)
  assert done.returncode == 0, done.stderr
  step = int(re.search(r'resumed from step (\d+) of', done.stderr)[1])
  return bucket.download('a run', tmp_path_factory.mktemp('copy')), step


@pytest.mark.slow
def test_killed_in_a_bucket_ends_as_in_a_folder(local, killed):
  copy, resumed = killed
  assert 10 <= resumed < STEPS
  (step, state), (copied_step, copied_state) = newest(local), newest(copy)
  assert step == copied_step == STEPS and same(state, copied_state)
  for name in ('config.json', 'samples.png'):
    assert (copy / name).read_bytes() == (local / name).read_bytes()
  ours, theirs = ([(line['step'], line['split'], line['loss'], line['accuracy'])
                   for line in read_lines(workdir / 'metrics.jsonl')] for workdir in (local, copy))
  # The lines of training are means since the one before, and a kill begins such a mean anew.
  assert [line for line in ours if line[1] != 'train'] == [
    line for line in theirs if line[1] != 'train']
  assert [line[:2] for line in ours] == [line[:2] for line in theirs]
  assert read_json(copy / 'summary.json')['final'] == read_json(local / 'summary.json')['final']


@pytest.mark.slow
def test_event_files_in_a_bucket(killed):
  """One of each process, of whole records, and together no step is missing."""
  copy, _ = killed
  files = list(copy.glob('events.*'))
  assert len(files) == 2
  steps = {step for file in files for tag, step in event_values(file) if tag == 'train/loss'}
  assert steps == {line['step'] for line in read_lines(copy / 'metrics.jsonl')
                   if line['split'] == 'train'}


@pytest.mark.slow
def test_report_in_a_bucket(bucket, gapjax, killed):
  """Training has written it; made again from a copy of the folder it is the same page."""
  copy, _ = killed
  before = {file.name: file.read_bytes() for file in (copy / 'report').iterdir()}
  assert {'README.md', 'report.html', 'curves.png'} <= set(before)
  report.build(copy)
  assert before == {file.name: file.read_bytes() for file in (copy / 'report').iterdir()}
  bucket.write('a run/report/README.md', b'old')
  done = gapjax('report', '--workdir=gs://bucket/a run', env=bucket.env)
  assert done.returncode == 0, done.stderr
  assert done.stdout == 'gs://bucket/a run/report/report.html\n'
  assert bucket.read('a run/report/README.md') == before['README.md']


VERBS = """
import sys
from gapjax import cli
sys.exit(cli.main(['evaluate', *sys.argv[1:]]) or cli.main(['attack', *sys.argv[1:]]))
"""


@pytest.mark.slow
def test_evaluate_and_attack_in_a_bucket(bucket, local, killed, data_dir, tmp_path):
  python(VERBS, '--workdir=gs://bucket/a run', f'--data_dir={data_dir}', **bucket.env)
  found = bucket.download('a run', tmp_path)
  expected = evaluate(local, data_dir=data_dir, devices=jax.local_devices()[:1])
  assert read_json(found / 'evaluation.json') == json.loads(json.dumps(expected))
  orders = load(found / 'ranking.json', num_channels=32)  # 8 times the width
  assert all(sorted(order) == list(range(32)) for order in orders.values())
  assert {'overall', 'left', 'right'} <= set(orders)
  records = read_json(found / 'attack.json', list)
  assert {record['order'] for record in records} == {*orders, 'random', 'clean'}
  for name in ('attack.png', 'activations.png', 'report/attack.png'):
    assert (found / name).read_bytes().startswith(b'\x89PNG')


@pytest.mark.slow
def test_two_processes_and_a_broken_checkpoint_in_a_bucket(bucket, gapjax, arguments, killed,
                                                           tmp_path):
  """They use the one before, the first sets the broken one aside, and the run ends as ever."""
  copy, _ = killed
  files = {str(file.relative_to(copy)): file.read_bytes() for file in copy.rglob('*')
           if file.is_file() and file.name != 'summary.json'}
  broken = [name for name in files if name.startswith(f'checkpoints/{STEPS}/state/ocdbt')]
  largest = max(broken, key=lambda name: len(files[name]))
  files[largest] = files[largest][:len(files[largest]) // 2]
  for name, data in files.items():
    bucket.write(f'broken/{name}', data)
  with socket.socket() as s:
    s.bind(('localhost', 0))
    port = s.getsockname()[1]
  processes = [gapjax('train', f'--distributed=localhost:{port},2,{i}', *arguments,
                      '--workdir=gs://bucket/broken', env=bucket.env, start=True)
               for i in range(2)]
  said = [process.communicate(timeout=300)[1] for process in processes]
  assert [process.returncode for process in processes] == [0, 0], said
  assert f'checkpoint {STEPS} is broken' in said[0]
  assert f'resumed from step {STEPS - 5} of' in said[0]
  aside = {name.removeprefix('broken/checkpoints_broken/'): bucket.read(name)
           for name in bucket.names('broken/checkpoints_broken')}
  assert aside == {name.removeprefix('checkpoints/'): data for name, data in files.items()
                   if name.startswith(f'checkpoints/{STEPS}/')}
  found = bucket.download('broken', tmp_path)
  (step, state), (_, expected) = newest(found), newest(copy)
  assert step == STEPS
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-3),  # other devices
               state['params'], expected['params'])
  ours, theirs = ([(line['step'], line['split']) for line in read_lines(w / 'metrics.jsonl')]
                  for w in (copy, found))
  assert ours == theirs


SUITE = """
import runpy, sys
from gapjax import cli
from gapjax.reproduce import suites
config, *argv = sys.argv[1:]
cell = suites.Cell(runpy.run_path(config)['get_config'](), {'network': 'gapnet'})
suites.SUITES['table1'] = lambda scale: [cell]
sys.exit(cli.main(argv) or cli.main(argv))
"""


@pytest.mark.slow
def test_reproduce_in_a_bucket(bucket, tiny_file, data_dir):
  """A suite of one cell: trained, and the second time known."""
  done = python(SUITE, tiny_file(num_epochs=2), 'reproduce', 'table1', '--scale=small',
                '--workdir=gs://bucket/suite', f'--data_dir={data_dir}', **bucket.env)
  assert done.stdout.count('report: gs://bucket/suite/report/report.html\n') == 2
  assert 'is known from gs://bucket/suite/results.json' in done.stderr
  names = bucket.names('suite')
  assert {'suite/results.json', 'suite/run.json', 'suite/report/report.html',
          'suite/report/curves.png',
          'suite/cells/gapnet/location/2x2/seed0/summary.json'} <= set(names)


SEVERAL = """
import json, sys
from gapjax import cli
for argv in json.loads(sys.argv[1]):
  print(cli.main(argv))
"""


def complaints(*commands, env):
  """The one line that each of the commands complains with, all in one process."""
  done = python(SEVERAL, json.dumps(commands), **env)
  assert done.stdout.split() == ['2'] * len(commands), done.stderr
  lines = [line for line in done.stderr.splitlines() if line.startswith('gapjax: ')]
  assert len(lines) == len(commands) and 'Traceback' not in done.stderr
  return lines


def test_no_such_bucket_and_pytorch(bucket, arguments):
  nowhere, torch = complaints(
    ['train', *arguments, '--workdir=gs://nowhere/run'],
    ['reproduce', 'table1', '--workdir=gs://bucket/torch', '--with_torch', '--scale=small'],
    env=bucket.env)
  assert re.search('the bucket cannot be used .*nowhere.*see that it exists', nowhere)
  assert '--with_torch trains in a local folder only' in torch and not bucket.names('torch')


def test_a_bucket_that_is_not_ours():
  """A server that refuses everything, as Cloud Storage does without the right credentials."""
  if not importlib.util.find_spec('gcsfs'):
    pytest.skip("gcsfs not installed: pip install '.[test]'")

  class Refuses(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      status = 401 if '/b/unknown/' in self.path else 403
      body = json.dumps({'error': {'code': status, 'message': f'no access {status}'}}).encode()
      self.send_response(status)
      self.send_header('Content-Length', str(len(body)))
      self.end_headers()
      self.wfile.write(body)

    def log_message(self, *_):
      pass

  with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Refuses) as server:
    threading.Thread(target=server.serve_forever).start()
    lines = complaints(['report', '--workdir=gs://unknown/run'],
                       ['report', '--workdir=gs://forbidden/run'],
                       env=environment(f'http://127.0.0.1:{server.server_port}'))
    server.shutdown()
  for line, status in zip(lines, (401, 403), strict=True):
    assert 'the bucket cannot be used' in line and f'no access {status}' in line


WITHOUT = """
import importlib.machinery, sys
finder = importlib.machinery.PathFinder
find = finder.find_spec
finder.find_spec = lambda name, *rest: None if name == 'gcsfs' else find(name, *rest)
import gapjax.cli
sys.exit(gapjax.cli.main(['report', '--workdir=gs://bucket/run']))
"""


def test_without_gcsfs():
  done = python(WITHOUT, check=False)
  assert done.returncode == 2
  assert len(done.stderr.splitlines()) == 1
  assert 'gs://bucket/run needs gcsfs, which is not installed: pip install gcsfs' in done.stderr


@pytest.mark.parametrize('path', ['s3://bucket/run', 'gs://', 'gs:///', 'http://host/run'])
def test_what_is_no_folder_in_a_bucket(path):
  refused(lambda: paths.of(path), 'must be gs://BUCKET/FOLDER')


def test_local_files_are_where_they_were(tmp_path):
  """A line is in the file as soon as it is written, and no temporary folder comes between."""
  with Writer(tmp_path, step=0) as writer:
    writer.write(5, 'train', loss=1.5)
    assert read_lines(tmp_path / 'metrics.jsonl') == [{'step': 5, 'split': 'train', 'loss': 1.5}]
    writer.upload()
    assert paths.Staged(tmp_path).folder == tmp_path
  paths.write_bytes(tmp_path / 'a', b'new')
  assert (tmp_path / 'a').read_bytes() == b'new' and not list(tmp_path.glob('.*'))


def test_move_replaces_a_local_folder(tmp_path):
  for name, text in (('source/a', 'new'), ('target/8/a', 'old'), ('target/8/b', 'old')):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(text)
  paths.move(tmp_path / 'source', tmp_path / 'target' / '8')
  assert {str(file.relative_to(tmp_path)): file.read_text() for file in tmp_path.rglob('*')
          if file.is_file()} == {'target/8/a': 'new'}


def test_the_way_to_a_bucket_is_not_its_contents(monkeypatch):
  """A checkpoint that cannot be fetched is not a broken one; one that is not whole is."""
  import requests
  import tensorstore
  for name, value in environment('http://127.0.0.1:1').items():  # where nobody answers
    monkeypatch.setenv(name, value)
  store = tensorstore.KvStore.open({'driver': 'gcs', 'bucket': 'bucket', 'context': {
    'gcs_request_retries': {'max_retries': 1, 'initial_delay': '10ms'}}}).result()
  with pytest.raises(ValueError, match='Could not connect') as raised:
    store.read('run/checkpoints/5/state/manifest.ocdbt').result()
  for error in (raised.value, requests.ConnectionError('down')):
    assert paths.unreachable(error)
  for error in (FileNotFoundError('bucket/run/x'), ValueError('DATA_LOSS: CRC-32C checksum'),
                KeyError('state')):
    assert not paths.unreachable(error)
  assert not paths.refused(FileNotFoundError(2, 'No such file or directory', 'x'))
