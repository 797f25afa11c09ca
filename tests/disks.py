"""Small disks for the tests that fill one or may not write to it."""

import shutil
import subprocess


def mount_tmpfs(path, options):
  """'' when it is mounted, else why it cannot be."""
  if not shutil.which('mount'):
    return 'there is no mount command'
  done = subprocess.run(['mount', '-t', 'tmpfs', '-o', options, 'tmpfs', path],
                        capture_output=True, text=True, check=False)
  return done.stderr.strip() if done.returncode else ''
