"""The paper's claims, and the verdict of a run's results on each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pandas as pd

from ..inputs import check_value, one_of
from ..stats import GOLD
from .claims import (
    HALF,
    Claim,
    Missing,
    Run,
    against,
    along_others,
    at_total_compute,
    beyond_mix,
    first_order,
    follows,
    some,
    third,
)

_MAIN, _OOD, _05, _ELSEWHERE = (
    "main table",
    "T2I-CompBench table",
    "05_opd",
    "needs SD-3.5-M, which cannot be downloaded or trained here",
)

# Of the distance from the base to the expert, or of a gradient: where the paper gives no effect in our terms,
# less than this is held to be none. Fixed before any run that it judges.
SMALL_SHARE = 0.1


CLAIMS = (
    Claim(
        "conflict",
        "Tasks conflict: what helps one lowers another",
        "4.2",
        "01_gradient_interference",
        along_others,
        "< 0",
        margin=HALF * third("pickscore expert", "base", "GenEval"),
    ),
    Claim(
        "first_order",
        "To first order, a small step for one task foretells how training for it moves the others",
        "4.2",
        "01_gradient_interference",
        first_order,
        margin=1 / 3,
    ),
    Claim(
        "seesaw_ocr",
        "Adding the OCR reward to GenEval's lowers GenEval",
        "4.3",
        "02_mixed_reward_seesaw",
        against("+OCR", "+GenEval", "GenEval"),
        "< 0",
        margin=SMALL_SHARE,
    ),
    Claim(
        "seesaw_pickscore",
        "Adding PickScore then lowers GenEval or OCR",
        "4.3",
        "02_mixed_reward_seesaw",
        some("+PickScore", "+OCR", "GenEval", "OCR"),
        "< 0",
        margin=SMALL_SHARE,
    ),
    Claim(
        "seesaw_deqa",
        "Adding DeQA then lowers GenEval, OCR or PickScore",
        "4.3",
        "02_mixed_reward_seesaw",
        some("+DeQA", "+PickScore", "GenEval", "OCR", "PickScore"),
        "< 0",
        margin=SMALL_SHARE,
    ),
    Claim(
        "gain_geneval",
        "The GenEval expert gains GenEval (.63 to .94)",
        _MAIN,
        "03_expert_training",
        against("geneval", "base", "GenEval"),
        margin=third("geneval expert", "base", "GenEval"),
    ),
    Claim(
        "gain_ocr",
        "The OCR expert gains OCR (.59 to .92)",
        _MAIN,
        "03_expert_training",
        against("ocr", "base", "OCR"),
        margin=third("ocr expert", "base", "OCR"),
    ),
    Claim(
        "gain_pickscore",
        "The PickScore expert gains PickScore (21.64 to 23.19)",
        _MAIN,
        "03_expert_training",
        against("pickscore", "base", "PickScore"),
        margin=third("pickscore expert", "base", "PickScore"),
    ),
    Claim(
        "gain_deqa",
        "The DeQA expert gains DeQA (4.07 to 4.23)",
        _MAIN,
        "03_expert_training",
        against("deqa", "base", "DeQA"),
        margin=third("deqa expert", "base", "DeQA"),
    ),
    Claim(
        "pickscore_costs",
        "The PickScore expert loses GenEval (.63 to .51)",
        _MAIN,
        "03_expert_training",
        against("pickscore", "base", "GenEval"),
        "< 0",
        margin=third("pickscore expert", "base", "GenEval"),
    ),
    Claim(
        "mix_geneval",
        "GRPO-Mix falls short of the GenEval expert (.73 against .94)",
        _MAIN,
        _05,
        against("GRPO-Mix", "geneval expert", "GenEval"),
        "< 0",
        margin=third("GRPO-Mix", "geneval expert", "GenEval"),
    ),
    Claim(
        "mix_ocr",
        "GRPO-Mix falls short of the OCR expert (.83 against .92)",
        _MAIN,
        _05,
        against("GRPO-Mix", "ocr expert", "OCR"),
        "< 0",
        margin=third("GRPO-Mix", "ocr expert", "OCR"),
    ),
    Claim(
        "mix_total_geneval",
        "GRPO-Mix falls short of the GenEval expert even with all the time of experts and student",
        _MAIN,
        "02_mixed_reward_seesaw",
        against("Mix total", "geneval expert", "GenEval"),
        "< 0",
        margin=third("GRPO-Mix", "geneval expert", "GenEval"),
    ),
    Claim(
        "mix_total_ocr",
        "GRPO-Mix falls short of the OCR expert even with all the time of experts and student",
        _MAIN,
        "02_mixed_reward_seesaw",
        against("Mix total", "ocr expert", "OCR"),
        "< 0",
        margin=third("GRPO-Mix", "ocr expert", "OCR"),
    ),
    Claim(
        "mix_interference",
        "GRPO-Mix is hampered by interference, not by time: experts of one reward, trained for as long in "
        "all and averaged, are above it",
        "4.2",
        "02_mixed_reward_seesaw",
        against("average of experts", "Mix 3:1:1"),
        margin=SMALL_SHARE,
    ),
    Claim(
        "opd_mix",
        "Flow-OPD's Average is above GRPO-Mix's (.90 against .82)",
        _MAIN,
        _05,
        beyond_mix,
        margin=third("student", "GRPO-Mix"),
    ),
    Claim(
        "opd_mix_total",
        "Flow-OPD's Average is above GRPO-Mix's at equal compute, that of the experts counted",
        _MAIN,
        _05,
        at_total_compute(),
        margin=third("student", "GRPO-Mix"),
    ),
    Claim(
        "opd_mix_total_gold",
        "So it is by judges on which nothing was trained: GRPO-Mix hacks its rewards more",
        _MAIN,
        _05,
        at_total_compute(GOLD),
        margin=third("student", "GRPO-Mix"),
    ),
    Claim(
        "opd_mix_pickscore",
        "Flow-OPD's PickScore is above GRPO-Mix's (23.08 against 21.84)",
        _MAIN,
        _05,
        against("student", "GRPO-Mix", "PickScore"),
        margin=third("student", "GRPO-Mix", "PickScore"),
    ),
    Claim(
        "opd_geneval",
        "Flow-OPD raises GenEval over the base (.63 to .92)",
        "abstract",
        _05,
        against("student", "base", "GenEval"),
        margin=third("student", "base", "GenEval"),
    ),
    Claim(
        "opd_ocr",
        "Flow-OPD raises OCR over the base (.59 to .94)",
        "abstract",
        _05,
        against("student", "base", "OCR"),
        margin=third("student", "base", "OCR"),
    ),
    Claim(
        "opd_start",
        "Distillation improves on the merged start (the paper tells it of T2I-CompBench; here the "
        "test split)",
        _OOD,
        _05,
        against("student", "merged"),
        margin=SMALL_SHARE,
    ),
    Claim(
        "merge_sft",
        "Flow-OPD ends higher from the merged start than from SFT (Average .90 against .88)",
        _MAIN,
        _05,
        against("student", "student from sft"),
        margin=third("student", "student from sft"),
    ),
    Claim(
        "surpass_ocr",
        "The student surpasses its OCR teacher (.94 against .92)",
        _MAIN,
        _05,
        against("student", "ocr expert", "OCR"),
        margin=third("student", "ocr expert", "OCR"),
    ),
    Claim(
        "surpass_deqa",
        "The student surpasses the DeQA expert (4.35 against 4.23)",
        _MAIN,
        _05,
        against("student", "deqa expert", "DeQA"),
        margin=third("student", "deqa expert", "DeQA"),
    ),
    Claim(
        "short_geneval",
        "The student does not reach its GenEval teacher (.92 against .94)",
        _MAIN,
        _05,
        against("student", "geneval expert", "GenEval"),
        "< 0",
        margin=third("student", "geneval expert", "GenEval"),
    ),
    Claim(
        "short_pickscore",
        "The student does not reach its PickScore teacher (23.08 against 23.19)",
        _MAIN,
        _05,
        against("student", "pickscore expert", "PickScore"),
        "< 0",
        margin=third("student", "pickscore expert", "PickScore"),
    ),
    Claim(
        "mar_looks",
        "MAR improves looks (Aesthetic 5.89 to 6.23, QwenVL 3.82 to 4.05); here DeQA, for some weight of "
        "the DeQA anchor",
        "MAR table",
        "06_mar",
        some("deqa ", "none", "DeQA"),
        margin=SMALL_SHARE,
    ),
    Claim(
        "mar_preference",
        "MAR improves preference (ImageReward 1.26 to 1.36, HPS-v2.1 .300 to .330); here PickScore, for "
        "some weight of the DeQA anchor",
        "MAR table",
        "06_mar",
        some("deqa ", "none", "PickScore"),
        margin=SMALL_SHARE,
    ),
    Claim(
        "loss_gradient",
        "The loss as written (detached reward times clipped ratio) follows the gradient of the KL",
        "5.1.1",
        "07_opd_estimators",
        follows("paper"),
        margin=SMALL_SHARE,
    ),
    Claim(
        "code_gradient",
        "The public code's loss (the reward left attached) follows the gradient of the KL",
        "public code",
        "07_opd_estimators",
        follows("as_coded"),
        margin=SMALL_SHARE,
    ),
    Claim(
        "loss_trains",
        "The loss as written trains the student beyond the merged start",
        "5.1.1",
        "07_opd_estimators",
        against("paper", "merged"),
        margin=SMALL_SHARE,
    ),
    Claim(
        "code_trains",
        "The public code's loss trains the student beyond the merged start",
        "public code",
        "07_opd_estimators",
        against("as_coded", "merged"),
        margin=SMALL_SHARE,
    ),
    Claim(
        "ood_mix",
        "Out of distribution, Flow-OPD is above GRPO-Mix (.618 against .587)",
        _OOD,
        "08_results",
        against("student", "GRPO-Mix"),
        margin=SMALL_SHARE,
    ),
    Claim(
        "ood_start",
        "Out of distribution, Flow-OPD is above its merged start (.618 against .595)",
        _OOD,
        "08_results",
        against("student", "merged"),
        margin=SMALL_SHARE,
    ),
    Claim(
        "ood_start_mix",
        "Out of distribution, the merged start is above GRPO-Mix (.595 against .587)",
        _OOD,
        "08_results",
        against("merged", "GRPO-Mix"),
        margin=SMALL_SHARE,
    ),
    Claim("numbers", "The scores themselves, such as GenEval .92 and OCR .94", "abstract", why=_ELSEWHERE),
    Claim("cost", "The training takes 4 nodes of 8 H800 about 50 hours", "experiments", why=_ELSEWHERE),
    Claim(
        "quality_judges",
        "MAR's gains by ImageReward, Aesthetic, HPS-v2.1 and QwenVL themselves",
        "MAR table",
        why="these judges cannot be downloaded here, and were not made for pictures of 64 pixels",
    ),
    Claim(
        "compbench",
        "The gains on T2I-CompBench itself (colour .719, numeracy .684)",
        _OOD,
        why="no world here has words for its prompts; held-out combinations (split `ood`) stand in for it",
    ),
)


def judge(
    run_dir: str | Path,
    ood: pd.DataFrame | None = None,
    claims: Sequence[Claim] = CLAIMS,
    calibrated: Mapping[str, str] = MappingProxyType({}),
) -> pd.DataFrame:
    """The ledger: a row a claim with verdict ("reproduced", "bounded", "undecided", "contradicted",
    "calibrated" or "not testable here"), claimed sign, effect, low, high (95 %), bound, n, seeds, measured,
    note. `ood` is notebook 08's table if it is not in the run's folder; `calibrated` says of which claims the
    world was made so that they hold, and why, which is no verdict on them. Bootstraps draw prompts, and
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
                row["verdict"], word = _verdict(claim.claimed, row["low"], row["high"], row["bound"])
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
        return "bounded", f"an effect of {bound:.3g}, a third of the paper's or what was fixed, is ruled out"
    if sign:
        return "reproduced", ""
    beyond = "" if np.isnan(bound) else f" and reaches beyond {bound:.3g} from it"
    return "undecided", f"the interval includes 0{beyond}"
