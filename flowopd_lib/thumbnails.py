"""Samples kept as small pictures: one uncompressed zip of WebP a model, so that a run of thousands stays a handful of files."""
from __future__ import annotations

import io
import os
import re
import zipfile
from functools import lru_cache
from pathlib import Path

import torch
from PIL import Image

LARGEST = 256       # pixels; larger samples are scaled down to this
QUALITY = 85        # a 64x64 scene takes some 600 bytes, a fifth of what lossless takes


def webp(image: torch.Tensor) -> bytes:
    """One image (3, H, W) in [0, 1] as WebP, at most `LARGEST` pixels a side."""
    picture = Image.fromarray((image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy())
    picture.thumbnail((LARGEST, LARGEST))
    file = io.BytesIO()
    picture.save(file, "webp", quality=QUALITY)
    return file.getvalue()


class ThumbnailWriter:
    """Fills `folder/NUMBER_MODEL.zip`, image by image; it gets its name at `close`, so a file that is there is whole."""

    def __init__(self, folder: str | Path, number: int, model: str):
        self.path = Path(folder) / f"{number:02d}_{re.sub(r'[^A-Za-z0-9.+-]', '_', model)}.zip"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.partial = self.path.with_name(self.path.name + ".partial")
        self.zip, self.count = zipfile.ZipFile(self.partial, "w"), 0

    def add(self, images: torch.Tensor) -> list[str]:
        """Images (B, 3, H, W); where each lies, as `FOLDER/FILE.zip/N.webp` beside the folder's own parent."""
        names = []
        for image in images:
            # a fixed date: the same samples make the same file
            self.zip.writestr(zipfile.ZipInfo(f"{self.count}.webp", (1980, 1, 1, 0, 0, 0)), webp(image))
            names.append(f"{self.path.parent.name}/{self.path.name}/{self.count}.webp")
            self.count += 1
        return names

    def close(self) -> None:
        self.zip.close()
        os.replace(self.partial, self.path)


@lru_cache(maxsize=64)
def _opened(path: str, changed: int) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)


def read_thumbnail(folder: str | Path, place: str) -> bytes:
    """The WebP of one `picture` of a table in `folder`. Raises FileNotFoundError, naming the file, where there is none."""
    path, name = Path(folder) / place.rpartition("/")[0], place.rpartition("/")[2]
    try:
        return _opened(str(path), path.stat().st_mtime_ns).read(name)
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise FileNotFoundError(f"no picture {place} in {folder} ({error})") from error
