"""`python -m hf_efficient.cli` is `hf-efficient`."""

from hf_efficient.cli.main import run

run()
