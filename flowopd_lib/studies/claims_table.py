"""The verdict of a run's results on each of the paper's claims."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pandas as pd

from ..inputs import check_value, one_of
from .claims import Claim, Missing, Run
from .paper_claims import CLAIMS


def judge_claims(
    run_dir: str | Path,
    ood: pd.DataFrame | None = None,
    claims: Sequence[Claim] = CLAIMS,
    calibrated: Mapping[str, str] = MappingProxyType({}),
) -> pd.DataFrame:
    """The claims table: a row a claim with verdict ("reproduced", "bounded", "undecided", "contradicted",
    "calibrated" or "not testable here"), claimed sign, effect, low, high (95 %), bound, n, seeds, measured,
    note. `ood` is notebook 08's table if it is not in the run's folder; `calibrated` says of which claims the
    benchmark was made so that they hold, and why, which is no verdict on them. Bootstraps draw prompts, and
    trainings of a model that has several. Raises ValueError if `calibrated` names no claim."""
    for key in calibrated:
        check_value("calibrated", key, one_of(*(claim.key for claim in claims)))
    run, rows = Run(run_dir, ood), []
    for claim in claims:
        row = dict(
            claim=claim.key,
            statement=claim.statement,
            where=claim.where,
            verdict="not testable here",
            claimed=claim.claimed if claim.test else "",
            effect=np.nan,
            low=np.nan,
            high=np.nan,
            bound=np.nan,
            n=None,
            seeds=None,
            measured="",
            note=claim.why,
        )
        try:
            if claim.test:
                found = claim.test(run, claim)
                for name in ("effect", "low", "high", "bound"):
                    row[name] = float(getattr(found, name))
                row["verdict"], word = _verdict(
                    claim.claimed, row["low"], row["high"], row["bound"]
                )
                if claim.key in calibrated:
                    row["verdict"], word = "calibrated", calibrated[claim.key]
                row |= dict(
                    n=int(found.n),
                    seeds=int(found.seeds),
                    measured=found.measured,
                    note="; ".join(filter(None, (word, found.note))),
                )
        except Missing as error:
            row["note"] = str(error) if claim.needs in str(error) else f"{claim.needs}: {error}"
        rows.append(row)
    # whole numbers beside None
    return pd.DataFrame(rows).assign(
        **{c: pd.Series([r[c] for r in rows], dtype=object) for c in ("n", "seeds")}
    )


def _verdict(claimed: str, low: float, high: float, bound: float) -> tuple[str, str]:
    if np.isnan(low) or np.isnan(high):
        return "undecided", "nothing above the noise"
    sign = "> 0" if low > 0 else "< 0" if high < 0 else ""
    if sign and sign != claimed:
        return "contradicted", "the interval is on the other side of 0"
    if not sign and low == high:
        return "undecided", "no score changed on any prompt, which tells nothing of the next prompt"
    if -bound <= low and high <= bound:
        return (
            "bounded",
            f"an effect of {bound:.3g}, a third of the paper's or what was fixed, is ruled out",
        )
    if sign:
        return "reproduced", ""
    beyond = "" if np.isnan(bound) else f" and reaches beyond {bound:.3g} from it"
    return "undecided", f"the interval includes 0{beyond}"
