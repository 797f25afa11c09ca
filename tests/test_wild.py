"""Files and machines as people have them: each test stands for a kind of fault."""

import os
import subprocess
import sys

import numpy as np
import pytest
import scene_files
from conftest import ROOT, XLA_FLAGS, python, refused
from prepared_files import encoded, write_images, write_scenes

from gapjax import data
from gapjax.errors import UsageError

draw = np.random.default_rng(0)


def test_masks_with_a_palette_are_read_as_indices(tmp_path):
  indices = draw.integers(0, 2, (24, 32)).astype(np.uint8)
  folder = write_scenes(tmp_path, [encoded(indices, palette=[0, 0, 0, 128, 64, 128])])
  np.testing.assert_array_equal(data.load_scenes(folder, split='train')[0]['label'], indices)


def test_masks_in_colour_are_refused(tmp_path):
  colours = draw.integers(0, 255, (24, 32, 3)).astype(np.uint8)
  scenes = data.load_scenes(write_scenes(tmp_path, [encoded(colours)]), split='train')
  with pytest.raises(UsageError, match='is no mask: its pixels are RGB'):
    _ = scenes[0]


@pytest.mark.parametrize('linked', ['leftImg8bit/train/bochum', 'leftImg8bit/train'])
def test_links_of_a_source_are_followed(tmp_path, linked):
  """Also where one leads back to where it lies."""
  files, masks = scene_files.cityscapes_files([7])
  source = scene_files.write(tmp_path / 'city', files)
  (source / linked).rename(tmp_path / 'elsewhere')
  (source / linked).symlink_to(tmp_path / 'elsewhere')
  (source / 'gtFine/train/aachen/back').symlink_to(source / 'gtFine')
  data.prepare('cityscapes', source=source, data_dir=tmp_path / 'data')
  scenes = data.load_scenes('cityscapes', split='train', data_dir=tmp_path / 'data')
  assert sorted(scene['id'] for scene in scenes) == [id for id in masks if 'lindau' not in id]


@pytest.mark.parametrize('file', [encoded(draw.integers(0, 256, (8, 8, 3)).astype(np.uint8),
                                          kind='JPEG')[:-150], b'<html>not found</html>', b''])
def test_images_that_do_not_decode_are_refused(tmp_path, file):
  whole = encoded(draw.integers(0, 256, (8, 8, 3)).astype(np.uint8))
  folder = write_images(tmp_path, [whole, file])
  refused(lambda: data.load_images(folder, split='train'), 'holds what is no image')


def test_images_of_sixteen_bits_are_not_cut(tmp_path):
  deep = encoded(draw.integers(0, 65536, (8, 8)).astype(np.uint16))
  refused(lambda: data.load_images(write_images(tmp_path, [deep]), split='train'),
          'more than 8 bits a channel')


@pytest.mark.parametrize('platform', ['cuda', 'cup'])
def test_a_device_that_is_not_here(gapjax, tiny_file, tmp_path, data_dir, platform):
  done = gapjax('train', f'--config={tiny_file()}', f'--workdir={tmp_path}',
                f'--data_dir={data_dir}', env={'JAX_PLATFORMS': platform})
  assert done.returncode == 2
  assert f'JAX_PLATFORMS={platform}' in done.stderr.splitlines()[-1]
  assert 'Traceback' not in done.stderr


@pytest.mark.parametrize('stderr', ['2>&-', '2> >(head -c 10 >/dev/null)'])
def test_training_ends_well_without_anybody_to_read_its_bar(tiny_file, tmp_path, data_dir, stderr):
  command = (f'{sys.executable} -m gapjax train --config={tiny_file(num_epochs=1)} '
             f'--workdir={tmp_path} --data_dir={data_dir} {stderr}')
  subprocess.run(['bash', '-c', command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL,
                 env={**os.environ, 'XLA_FLAGS': XLA_FLAGS.format(1)})
  assert (tmp_path / 'summary.json').exists()


def test_output_that_a_terminal_cannot_show_costs_nothing():
  code = ('from gapjax import cli; cli.VERBS["report"] = lambda argv: print("3\\u00d73 \\u00b1"); '
          'raise SystemExit(cli.main(["report"]))')
  assert python(code, PYTHONIOENCODING='ascii').stdout == '3?3 ?\n'


