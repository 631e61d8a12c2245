"""What a failed load from the hub means for the reader, in one sentence."""

from __future__ import annotations


def hub_fault(name: str, error: BaseException) -> str:
    """Why `name` could not be had, and what to do; the error's own words where it is none of the hub's."""
    kinds, text = set(), []
    seen: BaseException | None = error
    while seen is not None and len(text) < 10:
        kinds |= {kind.__name__ for kind in type(seen).__mro__}
        text.append(str(seen))
        seen = seen.__cause__ or seen.__context__
    said = " ".join(text)
    if "GatedRepoError" in kinds or "gated repo" in said.lower():
        return (
            f"{name} is gated: accept its licence at https://huggingface.co/{name} and log in with "
            "`hf auth login`"
        )
    if "RepositoryNotFoundError" in kinds or "not a valid model identifier" in said:
        return f"the hub has no {name}, or it is private: check the name, or log in with `hf auth login`"
    unreachable = {
        "ConnectError",
        "ConnectTimeout",
        "LocalEntryNotFoundError",
        "OfflineModeIsEnabled",
    }
    if unreachable & kinds or "Cannot load model" in said or "couldn't connect" in said.lower():
        return (
            f"{name} is not on this machine and the hub cannot be reached: connect, or download it elsewhere "
            f"with `hf download {name}` and give its folder"
        )
    return " ".join(str(error).split())
