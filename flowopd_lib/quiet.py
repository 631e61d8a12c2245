"""Other libraries' bars and warnings held back while we call them, and left as they were for
everybody else in the process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No bar for each of nine files loaded, no advice about torchvision, which we do not use:
    notebooks and logs are for results.

    Here and wherever a model is loaded, diffusers, transformers and PEFT are imported by the
    function that needs them: they take longer than all else."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    kept = [
        (library, library.get_verbosity(), library.is_progress_bar_enabled())
        for library in (diffusers_logging, transformers_logging)
    ]
    for library, *_ in kept:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, verbosity, bars in kept:
            library.set_verbosity(verbosity)
            if bars:
                library.enable_progress_bar()
