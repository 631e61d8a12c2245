"""`python -m flowopd_lib.bench`: see `speed`."""

from .speed import main

main()
