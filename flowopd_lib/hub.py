"""Loading from the Hugging Face hub: other libraries' bars held back, and a failed load in one
sentence."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

# Loading a model changes states of the whole process, such as the device of new tensors.
LOADING = threading.RLock()
UNREACHABLE = {"ConnectError", "ConnectTimeout", "LocalEntryNotFoundError", "OfflineModeIsEnabled"}


def hub_fault(name: str, error: BaseException) -> str:
    """Why `name` could not be loaded, and what to do; the error's own message where it is none of
    the hub's."""
    kinds, messages, cause = set(), [], error
    while cause is not None and len(messages) < 10:
        kinds |= {kind.__name__ for kind in type(cause).__mro__}
        messages.append(str(cause))
        cause = cause.__cause__ or cause.__context__
    message = " ".join(messages)
    if "GatedRepoError" in kinds or "gated repo" in message.lower():
        return (
            f"{name} is gated: accept its licence at https://huggingface.co/{name} and log in with "
            "`hf auth login`"
        )
    if "RepositoryNotFoundError" in kinds or "not a valid model identifier" in message:
        return (
            f"the hub has no {name}, or it is private: check the name, or log in with `hf auth "
            "login`"
        )
    if (
        UNREACHABLE & kinds
        or "Cannot load model" in message
        or "couldn't connect" in message.lower()
    ):
        return (
            f"{name} is not on this machine and the hub cannot be reached: connect, or download it "
            f"elsewhere with `hf download {name}` and give its folder"
        )
    return " ".join(str(error).split())


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bar for each file loaded and no advice about torchvision, which is not used here:
    notebooks and logs are for results. One thread at a time.

    Wherever a model is loaded, diffusers, transformers and PEFT are imported by the function that
    needs them: importing them takes longer than everything else."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    with LOADING:
        before = [
            (library, library.get_verbosity(), library.is_progress_bar_enabled())
            for library in (diffusers_logging, transformers_logging)
        ]
        for library, *_ in before:
            library.set_verbosity_error()
            library.disable_progress_bar()
        try:
            yield
        finally:
            for library, verbosity, bars in before:
                library.set_verbosity(verbosity)
                if bars:
                    library.enable_progress_bar()
