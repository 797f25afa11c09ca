"""beartype as jaxtyping's import hook calls it (conftest.py): an int is a float, too."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
