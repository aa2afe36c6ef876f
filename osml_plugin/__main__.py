"""`python -m osml_plugin`: the same as `osml`."""

from .cli import main

main()
