"""Samples as thumbnails: one uncompressed zip of WebP files a model, so that a run of thousands
stays a handful of files."""

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

LARGEST = 256  # pixels at a side; larger samples are scaled down
QUALITY = 85  # a 64x64 scene takes some 600 bytes, a fifth of what lossless takes


def encode_webp(image: torch.Tensor) -> bytes:
    """One image (3, H, W) in [0, 1]."""
    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    thumbnail, file = Image.fromarray(pixels), io.BytesIO()
    thumbnail.thumbnail((LARGEST, LARGEST))
    thumbnail.save(file, "webp", quality=QUALITY)
    return file.getvalue()


def write_thumbnails(
    folder: str | Path, number: int, model: str, thumbnails: Sequence[bytes]
) -> list[str]:
    """Write `folder/NUMBER_MODEL.zip` of `0.webp`, `1.webp`, ...; the path of each, seen from the
    folder's parent."""
    path = Path(folder) / f"{number:02d}_{re.sub(r'[^A-Za-z0-9.+-]', '_', model)}.zip"
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for n, data in enumerate(thumbnails):  # a fixed date: the same samples make the same file
            archive.writestr(zipfile.ZipInfo(f"{n}.webp", (1980, 1, 1, 0, 0, 0)), data)
    write_whole(path, file.getvalue())
    return [f"{path.parent.name}/{path.name}/{n}.webp" for n in range(len(thumbnails))]


@lru_cache(maxsize=64)
def _open(path: str, changed: int) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)


def read_thumbnail(folder: str | Path, image: str) -> bytes:
    """The WebP of one `image` of a table in `folder`. Raises FileNotFoundError, naming the file,
    where there is none."""
    path, name = Path(folder) / image.rpartition("/")[0], image.rpartition("/")[2]
    try:
        return _open(str(path), path.stat().st_mtime_ns).read(name)
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise FileNotFoundError(f"no image {image} in {folder} ({error})") from error
