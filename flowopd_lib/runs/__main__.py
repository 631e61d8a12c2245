"""`python -m flowopd_lib.runs PROFILE`: see `run`."""

from .run import main

main()
