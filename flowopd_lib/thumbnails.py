"""Samples kept as small pictures: one uncompressed zip of WebP a model, so that a run of thousands stays a
handful of files."""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from PIL import Image

from .files import write_whole

LARGEST = 256  # pixels; larger samples are scaled down to this
QUALITY = 85  # a 64x64 scene takes some 600 bytes, a fifth of what lossless takes


def webp(image: torch.Tensor) -> bytes:
    """One image (3, H, W) in [0, 1] as WebP, at most `LARGEST` pixels a side."""
    picture = Image.fromarray(
        (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    )
    picture.thumbnail((LARGEST, LARGEST))
    file = io.BytesIO()
    picture.save(file, "webp", quality=QUALITY)
    return file.getvalue()


def write_thumbnails(
    folder: str | Path, number: int, model: str, pictures: Sequence[bytes]
) -> list[str]:
    """Write `folder/NUMBER_MODEL.zip` of `0.webp`, `1.webp`, ..., whole; where each lies, as seen from the
    folder's own parent."""
    path, file = (
        Path(folder) / f"{number:02d}_{re.sub(r'[^A-Za-z0-9.+-]', '_', model)}.zip",
        io.BytesIO(),
    )
    with zipfile.ZipFile(file, "w") as archive:
        for n, picture in enumerate(pictures):  # a fixed date: the same samples make the same file
            archive.writestr(zipfile.ZipInfo(f"{n}.webp", (1980, 1, 1, 0, 0, 0)), picture)
    write_whole(path, file.getvalue())
    return [f"{path.parent.name}/{path.name}/{n}.webp" for n in range(len(pictures))]


@lru_cache(maxsize=64)
def _opened(path: str, changed: int) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)


def read_thumbnail(folder: str | Path, place: str) -> bytes:
    """The WebP of one `picture` of a table in `folder`. Raises FileNotFoundError, naming the file, where
    there is none."""
    path, name = Path(folder) / place.rpartition("/")[0], place.rpartition("/")[2]
    try:
        return _opened(str(path), path.stat().st_mtime_ns).read(name)
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise FileNotFoundError(f"no picture {place} in {folder} ({error})") from error
