"""`python -m flowopd_lib COMMAND`: see `cli`."""

from .cli import main

main()
