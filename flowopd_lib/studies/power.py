"""What a run can decide, before it is run: `python -m flowopd_lib.studies.power PILOT --times 4`.

A claim is decidable at n if its interval there is no longer than the bound: an interval that holds 0 then
lies within the bound on both sides, so the claim comes out as reproduced, contradicted or bounded, whatever
is true. The interval is a pilot's, shortened as n grows; what other trainings would change does not shrink
with it, so a claim that rests on several is told more hopefully than it is.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from .claims_table import judge_claims


def power(claims_table: pd.DataFrame, times: float = 1.0) -> pd.DataFrame:
    """A row a claim that a pilot's `claims table` has measured: claim, n, width (of the interval at `times` that
    n), bound, needs (the n at which the interval is as long as the bound) and decidable."""
    rows = claims_table[claims_table["high"] > claims_table["low"]]
    width, n = rows["high"] - rows["low"], rows["n"].astype(float)
    return pd.DataFrame(
        {
            "claim": rows["claim"],
            "n": (n * times).round().astype(int),
            "width": width / np.sqrt(times),
            "bound": rows["bound"],
            "needs": np.ceil(n * (width / rows["bound"]) ** 2),
            "decidable": width / np.sqrt(times) <= rows["bound"],
        }
    ).reset_index(drop=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "pilot", type=Path, help="folder of a run, such as papermill_runs/reference"
    )
    parser.add_argument("--times", type=float, default=1.0, help="how often the pilot's n (1)")
    args = parser.parse_args()
    if not args.pilot.is_dir():
        parser.error(
            f"there is no run at {args.pilot}; run a profile first (python -m flowopd_lib.runs)"
        )
    if not args.times > 0:
        parser.error(
            f"--times is how often the pilot's n is taken, more than 0, not {args.times:g}"
        )
    table = power(judge_claims(args.pilot), args.times)
    if table.empty:
        parser.error(f"{args.pilot} holds no measurement of any claim")
    print(table.to_string(index=False, float_format="{:.3g}".format))
    print(
        f"{int(table['decidable'].sum())} of {len(table)} are decidable at {args.times:g} times its n."
    )


if __name__ == "__main__":
    main()
