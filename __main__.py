"""`python -m ralmq`: the same as the command `ralmq`."""

from .cli.main import app

app(prog_name="ralmq")
