"""Keep a run's trainings for later runs: `python -m flowopd_lib.runs.keep papermill_runs/lab`.

Each that has ended goes into papermill_runs/trainings, adapter in half precision, curve and probes, under the
hash of what it follows from; a training of the same key is taken from there instead of being made again. So
a long run adds up over evenings, and over machines, once what was kept is committed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pandas as pd

from ..jobs.kept import PLACE, keep


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m flowopd_lib.runs.keep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="a run's folder, such as papermill_runs/lab")
    args = parser.parse_args()
    try:
        rows = pd.DataFrame(keep(args.run))
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(rows.assign(seconds=rows["seconds"].round()).to_string(index=False))
    size = sum(p.stat().st_size for p in PLACE.rglob("*") if p.is_file())
    print(
        f"{rows['seconds'].sum() / 60:.0f} minutes of training; {PLACE.name} has {size / 1e6:.1f} MB"
    )


if __name__ == "__main__":
    main()
