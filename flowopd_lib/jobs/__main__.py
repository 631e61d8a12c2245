"""`python -m flowopd_lib.jobs RECIPE.yaml --folder FOLDER`: see `recipes`."""

from .recipes import main

main()
