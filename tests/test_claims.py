"""The ledger's verdicts on made-up runs whose truth is known."""

import nbformat
import numpy as np
import pandas as pd
import pytest

from flowopd_lib import load_world, model_scores, paired_differences, paper_average, write_json
from flowopd_lib.looking.result_figures import (
    beside,
    conclusion,
    cost,
    ledger_figure,
    ledger_table,
    mar_scores,
    said,
    surpassing,
    surpassing_figure,
)
from flowopd_lib.runs.runner import NOTEBOOKS
from flowopd_lib.studies.claims import Claim, Missing, Run, paired, some
from flowopd_lib.studies.ledger import CLAIMS, judge

SCALE = {"GenEval": 1.0, "OCR": 1.0, "PickScore": 26.0, "DeQA": 5.0}
TASKS = {"geneval": ["GenEval"], "ocr": ["OCR"], "pickscore": ["PickScore", "DeQA"]}
# What the paper claims, as shifts in full scales: all its claims hold, each by a clear margin.
TRUE = {
    "02_mixed_reward_seesaw": {
        "base": {},
        "+GenEval": {},
        **{m: {j: -s for j in SCALE} for m, s in (("+OCR", 0.3), ("+PickScore", 0.6), ("+DeQA", 0.9))},
    },
    "03_expert_training": {
        "base": {},
        "geneval": {"GenEval": 0.4},
        "ocr": {"OCR": 0.4},
        "pickscore": {"PickScore": 0.4, "GenEval": -0.4},
        "deqa": {"DeQA": 0.4},
    },
    "05_opd": {
        "base": {},
        "geneval expert": {"GenEval": 0.9},
        "ocr expert": {"OCR": 0.3},
        "pickscore expert": {"PickScore": 0.9},
        "deqa expert": {"DeQA": 0.3},
        **{
            m: {j: s for j in SCALE}
            for m, s in (("merged", 0.2), ("student", 0.6), ("student from sft", 0.4), ("GRPO-Mix", 0.1))
        },
    },
    "06_mar": {
        "merged": {},
        "none": {},
        "base 0.04": {},
        "deqa 0.04": {"DeQA": 0.2, "PickScore": 0.2},
        "deqa 1": {"DeQA": 0.3, "PickScore": 0.1},
    },
    "07_opd_estimators": {"merged": {}, "paper": {"GenEval": 0.4}, "as_coded": {"OCR": 0.4}},
    "08_results": {
        "base": {},
        "GRPO-Mix": {},
        "merged": {"OCR": 0.4},
        "student": {"OCR": 0.6, "GenEval": 0.2},
    },
}


def samples(models, sign=1, noise=0.05, n=40, seed=0):
    """Scores of prompts of very different difficulty, the same for every model, plus `sign` times a model's
    shifts and noise."""
    rng, rows = np.random.default_rng(seed), []
    hard = {j: rng.normal(0.5, 0.3, n) for j in SCALE}
    for model, shifts in models.items():
        for task, judges in TASKS.items():
            values = {
                j: SCALE[j] * (hard[j] + sign * shifts.get(j, 0) + noise * rng.normal(size=n)) for j in judges
            }
            rows += [
                {
                    "model": model,
                    "task": task,
                    "prompt": f"{task} {i}",
                    "repeat": 0,
                    **{j: v[i] for j, v in values.items()},
                }
                for i in range(n)
            ]
    return pd.DataFrame(rows)


def cosines(values, half=0.05, batches=12):
    """Rows of notebook 01, both orders and the diagonal, from {(task, on): cosine}."""
    rows = [
        {"task": t, "on": t, "cosine": 1.0, "cosine_low": 1.0, "cosine_high": 1.0, "batches": batches}
        for t in SCALE
    ]
    for (a, b), c in values.items():
        row = {
            "cosine": c,
            "cosine_low": None if c is None else c - half,
            "cosine_high": None if c is None else c + half,
            "batches": batches,
        }
        rows += [{"task": a, "on": b, **row}, {"task": b, "on": a, **row}]
    return rows


PAIRS = [(a, b) for a in SCALE for b in SCALE if a < b]


def taylor(slope, noise=0.1, seed=0, shared=0.0):
    """Rows of notebook 01's check: measured = slope * predicted with errors of which a part is common to one
    task's images; diagonals mislead."""
    rng, rows = np.random.default_rng(seed), []
    for on, scale in SCALE.items():
        common = rng.normal()
        for task in SCALE:
            p = abs(rng.normal()) if shared else rng.normal()  # of one sign, common errors add up
            error = noise * (np.sqrt(shared) * common + np.sqrt(1 - shared) * rng.normal())
            m = -slope * p if task == on else slope * p + error
            rows.append(
                {
                    "task": task,
                    "on": on,
                    "n": 5000,
                    **{
                        k: scale * v
                        for k, v in (
                            ("predicted", p),
                            ("measured", m),
                            ("measured_low", m - 1.96 * noise),
                            ("measured_high", m + 1.96 * noise),
                        )
                    },
                }
            )
    return rows


def write_run(folder, sign=1, noise=0.05, leave_out=()):
    for notebook, models in TRUE.items():
        (folder / notebook).mkdir()
        kept = {m: s for m, s in models.items() if m not in leave_out}
        samples(kept, sign, noise).to_parquet(
            folder / notebook / ("ood.parquet" if notebook == "08_results" else "samples.parquet")
        )
    (folder / "01_gradient_interference").mkdir()
    write_json(
        folder / "01_gradient_interference" / "results.json",
        {"interference": cosines({p: -0.5 * sign for p in PAIRS}), "taylor": taylor(sign)},
    )
    rows = [
        {
            "estimator": e,
            "distance": d,
            "mean along pathwise": float(sign) if d < 1 else 0.0,
            "se": 0.1,
            "n": 20,
        }
        for d in (1.0, 0.1)
        for e in ("pathwise", "paper", "as_coded")
    ]
    write_json(folder / "07_opd_estimators" / "results.json", {"estimators": rows})
    write_json(folder / "05_opd" / "results.json", {"seconds": {"student": 60.0, "GRPO-Mix": 61.0}})
    told = [{"model": m, "mean": 0.1, "low": 0.0, "high": 0.2, "n": 40} for m in TRUE["06_mar"]]
    write_json(folder / "06_mar" / "results.json", {"distance": told, "diversity": []})
    return folder


@pytest.mark.parametrize(
    "sign, verdict, note",
    [
        (1, "reproduced", ""),
        (-1, "not reproduced", "other side"),
        (0, "not reproduced", "undecided at this n"),
    ],
)
def test_every_claim_is_judged_by_its_numbers(tmp_path, sign, verdict, note):
    ledger = judge(write_run(tmp_path, sign, noise=0.05 if sign else 0.0)).set_index("claim")
    tested = [c for c in CLAIMS if c.test]
    assert len(tested) >= 14 and len(ledger) == len(CLAIMS) == len({c.key for c in CLAIMS})
    for claim in CLAIMS:
        row = ledger.loc[claim.key]
        assert row["verdict"] == (verdict if claim.test else "not testable here"), row
        assert (
            (note in row["note"] and row["n"] > 1 and row["seeds"] == 1 and row["measured"])
            if claim.test
            else row["note"] == claim.why != ""
        )
    values = ledger.loc[[c.key for c in tested]]
    assert (values["low"] <= values["effect"]).all() and (values["effect"] <= values["high"]).all()


def test_effects_are_in_the_units_of_the_judge(tmp_path):
    ledger = judge(write_run(tmp_path)).set_index("claim")
    assert ledger.loc["gain_pickscore", "effect"] == pytest.approx(0.4 * 26, rel=0.1) and ledger.loc[
        "gain_deqa", "effect"
    ] == pytest.approx(2, rel=0.1)
    assert (
        ledger.loc["opd_mix", "effect"] == pytest.approx(0.5, abs=0.03) and ledger.loc["opd_mix", "n"] == 120
    )
    assert ledger.loc["opd_mix", "note"] == "training: student 60 s, its experts not counted, GRPO-Mix 61 s"
    assert (
        ledger.loc["seesaw_deqa", "effect"] == pytest.approx(-0.3, abs=0.05)
        and "full scale" in ledger.loc["seesaw_deqa", "measured"]
    )
    assert (
        ledger.loc["mar_looks", "effect"] == pytest.approx(1.5, rel=0.1)
        and "deqa 1 minus none" in ledger.loc["mar_looks", "measured"]
    )
    assert ledger.loc["mar_preference", "measured"].startswith("PickScore, deqa 0.04 minus none")


def test_what_has_not_been_run_cannot_be_judged(tmp_path):
    ledger = judge(tmp_path)
    assert (
        set(ledger["verdict"]) == {"not testable here"}
        and ledger["effect"].isna().all()
        and ledger["n"].isna().all()
    )
    for claim, (_, row) in zip(CLAIMS, ledger.iterrows()):
        assert row["note"] == (f"{claim.needs} has not been run" if claim.test else claim.why)
    write_run(tmp_path, leave_out=["GRPO-Mix", "deqa expert"])
    (tmp_path / "03_expert_training" / "samples.parquet").unlink()
    ledger = judge(tmp_path).set_index("claim")
    assert (
        ledger.loc["opd_mix", "note"] == "05_opd: the table has no 'GRPO-Mix'"
        and ledger.loc["ood_mix", "verdict"] == "not testable here"
    )
    assert (
        ledger.loc["surpass_deqa", "verdict"] == "not testable here"
        and ledger.loc["surpass_ocr", "verdict"] == "reproduced"
    )
    assert ledger.loc["gain_ocr", "note"] == "03_expert_training has left no samples.parquet"
    # a table given wins over the folder's
    beaten = judge(tmp_path, ood=samples(TRUE["08_results"], -1)).set_index("claim")
    assert (
        beaten.loc["ood_mix", "verdict"] == "not reproduced"
        and ledger.loc["ood_start", "verdict"] == "reproduced"
    )


def test_the_paired_average_is_the_difference_of_the_papers_averages():
    table = samples(TRUE["05_opd"])
    means = paper_average(table).set_index("model")["mean"]
    value, low, high, n = paired(table, "student", "GRPO-Mix")
    assert value == pytest.approx(means["student"] - means["GRPO-Mix"]) and n == 120
    one = paired_differences(table[table.task == "ocr"], "base", ["OCR"]).set_index("model").loc["student"]
    assert paired(table, "student", "base", [("OCR", "ocr", 1.0)]) == pytest.approx(
        (one["mean"], one["low"], one["high"], one["n"]), abs=0.002
    )
    hits = 0
    for seed in range(60):  # a true gain of .25 in each of four judges
        _, low, high, _ = paired(
            samples({"a": {}, "b": dict.fromkeys(SCALE, 0.25)}, noise=0.5, seed=seed), "b", "a", resamples=400
        )
        hits += low <= 0.25 <= high
    assert hits >= 52  # 95 % of 60 is 57, minus three standard errors


def test_a_prompt_counts_once_however_often_it_was_drawn_or_trained():
    table = samples({"old": {}, "new": {}}, noise=0)
    new = table[table.model == "new"]
    more = pd.concat(
        [
            table[table.model == "old"],
            *(new.assign(train_seed=s, OCR=new.OCR + g) for s, g in ((0, 0.1), (1, 0.2), (2, 0.3))),
        ]
    )
    claim = Claim("k", "s", "w", "05_opd", next(c for c in CLAIMS if c.key == "opd_ocr").test)
    run = Run(".")
    run._tables["05_opd"] = more.replace({"model": {"old": "base", "new": "student"}})
    found = claim.test(run, claim)
    assert (found.n, found.seeds, found.note) == (
        40,
        3,
        "by training: +0.100, +0.200, +0.300",
    ) and found.effect == pytest.approx(0.2)
    rows = model_scores(run.samples("05_opd")).set_index(["model", "judge"])
    assert rows.loc[("student", "OCR"), "n"] == 40 and rows.loc[("student", "Average"), "n"] == 120


def test_an_interval_over_trainings_speaks_of_others():
    """Trainings that differ by more than prompts do: an interval over prompts alone would nearly always miss
    the true gain of 0."""
    rng, hits, widths = np.random.default_rng(0), {1: 0, 8: 0}, {}
    for seed in range(40):
        for n in hits:
            table = samples({"a": {}, "b": {}}, noise=0.1, seed=seed)
            b = table[table.model == "b"]
            rows = [b.assign(train_seed=s, OCR=b.OCR + rng.normal(0, 0.5)) for s in range(n)]
            _, low, high, _ = paired(
                pd.concat([table[table.model == "a"], *rows]), "b", "a", [("OCR", "ocr", 1.0)], resamples=400
            )
            hits[n] += low <= 0 <= high
            widths[n] = high - low
    assert hits[8] >= 32 and hits[1] < 12 and widths[8] > 2 * widths[1]


def test_many_looks_need_more_than_one_lucky_interval():
    """An effect of 2.3 standard errors is one alone, and none as the best of eight."""
    noise = np.tile([-1.0, 1.0], 50)

    def table(weights):
        change = {
            "none": 0.0,
            **{f"deqa {w}": (2.3 / np.sqrt(99) if w == 0 else 0) + noise for w in range(weights)},
        }
        return pd.concat(
            [
                pd.DataFrame(
                    {"model": m, "task": "pickscore", "prompt": [str(i) for i in range(100)], "DeQA": c}
                )
                for m, c in change.items()
            ]
        )

    verdicts = {}
    for weights in (1, 8):
        run, claim = Run("."), next(c for c in CLAIMS if c.key == "mar_looks")
        run._tables["06_mar"] = table(weights)
        verdicts[weights] = claim.test(run, claim)
    assert (
        verdicts[1].low > 0 > verdicts[8].low
        and "most favourable of 8" in verdicts[8].note
        and verdicts[1].note == ""
    )
    assert verdicts[1].effect == pytest.approx(verdicts[8].effect)
    with pytest.raises(Missing, match="no model that begins with 'sft '"):
        some("sft ", "none", "DeQA")(run, claim)


def conflict(folder, rows):
    (folder / "01_gradient_interference").mkdir(exist_ok=True)
    write_json(
        folder / "01_gradient_interference" / "results.json", {"interference": rows, "taylor": taylor(1)}
    )
    return judge(folder).set_index("claim").loc["conflict"]


def test_one_pair_in_conflict_is_enough_if_it_stands_six_looks(tmp_path):
    apart = dict.fromkeys(PAIRS, 0.5)
    assert conflict(tmp_path, cosines({**apart, PAIRS[2]: -0.5}))["verdict"] == "reproduced"
    # its own interval, -.06 +- .05, leaves out 0; that of six pairs does not
    lucky = conflict(tmp_path, cosines({**apart, PAIRS[2]: -0.06}))
    assert (
        lucky["verdict"] == "not reproduced"
        and "undecided" in lucky["note"]
        and lucky["high"] > 0
        and f"{PAIRS[2][0]} and {PAIRS[2][1]}" in lucky["note"]
    )
    # two tasks: one look
    assert conflict(tmp_path, cosines({PAIRS[2]: -0.06}))["verdict"] == "reproduced"
    lost = conflict(tmp_path, cosines({**apart, PAIRS[2]: None}))
    assert "other side" in lost["note"] and "1 of 6 pairs lost in noise" in lost["note"]
    nothing = conflict(tmp_path, cosines(dict.fromkeys(PAIRS)))
    assert (
        nothing["verdict"] == "not reproduced"
        and "nothing above the noise" in nothing["note"]
        and np.isnan(nothing["effect"])
    )


def test_the_slope_of_first_order_is_covered_however_the_errors_hang_together(tmp_path):
    (tmp_path / "01_gradient_interference").mkdir()
    claim = next(c for c in CLAIMS if c.key == "first_order")
    for shared in (0.0, 1.0):
        hits = 0
        for seed in range(100):
            write_json(
                tmp_path / "01_gradient_interference" / "results.json",
                {"taylor": taylor(0.5, 1.0, seed, shared)},
            )
            found = claim.test(Run(tmp_path), claim)
            hits += found.low <= 0.5 <= found.high
        assert hits >= 88, shared  # at least 95 of 100, minus three standard errors
    assert found.n == 12 and "1, the exact prediction" in found.note


def test_the_tables_and_figures_of_the_results(tmp_path):
    run = Run(write_run(tmp_path))
    passed = surpassing(run.samples("05_opd")).set_index(["judge", "student is"])
    assert (passed.groupby("judge")["mean"].sum() == 1).all() and passed.loc[
        ("GenEval", "below"), "mean"
    ] == 1 == passed.loc[("OCR", "above"), "mean"]
    same = run.samples("05_opd").assign(OCR=1.0)
    assert surpassing(same).set_index(["judge", "student is"]).loc[
        ("OCR", "equal"), ["mean", "n"]
    ].tolist() == [1, 40]
    shown = beside(model_scores(run.samples("05_opd")), {"base": {"paper's name": "x", "GenEval": 0.63}})
    assert (
        shown.loc["base", "paper: GenEval"] == 0.63
        and shown.loc["merged", "paper: GenEval"] == "–"
        and "n=120" in shown.loc["student", "Average"]
    )
    assert set(mar_scores(run)["judge"]) == {*SCALE, "Average", "distance"}
    costs = cost(run, load_world()).set_index("stage")["minutes"]
    assert (
        costs["student"] == 1
        and costs["02_mixed_reward_seesaw has left no results.json"] != costs["all experts"]
    )
    ledger = judge(tmp_path)
    text = conclusion(ledger)
    assert f"Of {len(CLAIMS)} claims, {sum(c.test is not None for c in CLAIMS)} are reproduced" in text
    assert "- numbers, cost: needs SD-3.5-M" in text and "(`opd_mix`): +" in text
    assert "- conflict, first_order: 01_gradient_interference has not been run" in conclusion(
        judge(tmp_path / "none")
    )
    assert ledger_table(ledger).notna().all(axis=None)
    for figure in (
        ledger_figure(ledger, "a run"),
        ledger_figure(judge(tmp_path / "none"), "no run"),
        surpassing_figure(passed.reset_index()),
    ):
        figure.savefig(tmp_path / "figure.png")
    write_json(tmp_path / "ledger.json", ledger.to_dict("records"))
    assert (
        said(lambda: model_scores(Run(tmp_path / "none").samples("05_opd")))
        == "05_opd has not been run: nothing to show."
    )


def test_the_notebook_needs_what_the_claims_need():
    needs = nbformat.read(NOTEBOOKS / "08_results.ipynb", 4).metadata["flowopd"]["needs"]
    assert {c.needs for c in CLAIMS if c.test} - {"08_results"} <= set(needs)
