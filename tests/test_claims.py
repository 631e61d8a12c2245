"""The claims table's verdicts on made-up runs whose truth is known."""

import subprocess
import sys

import nbformat
import numpy as np
import pandas as pd
import pytest

from flowopd_lib import load_benchmark, model_scores, paired_differences, paper_average, write_json
from flowopd_lib.plots.result_figures import (
    beside,
    claims_figure,
    conclusion,
    cost,
    in_all,
    manifests,
    mar_scores,
    said,
    show_claims,
    surpassing,
    surpassing_figure,
)
from flowopd_lib.runs.profiles import NOTEBOOKS
from flowopd_lib.studies.claims import Claim, Missing, Run, paired, some
from flowopd_lib.studies.claims_table import _verdict, judge_claims
from flowopd_lib.studies.paper_claims import CLAIMS
from flowopd_lib.studies.power import power

SCALE = {"GenEval": 1.0, "OCR": 1.0, "PickScore": 26.0, "DeQA": 5.0}
TASKS = {"geneval": ["GenEval"], "ocr": ["OCR"], "pickscore": ["PickScore", "DeQA"]}
# What the paper claims, as shifts in full scales: all its claims hold, each by a clear margin.
TRUE = {
    "02_mixed_reward_seesaw": {
        "base": {},
        "+GenEval": {},
        **{
            m: {j: -s for j in SCALE}
            for m, s in (("+OCR", 0.3), ("+PickScore", 0.6), ("+DeQA", 0.9))
        },
        "Mix 3:1:1": {},
        "Mix total": {},
        "Mix twice": {},
        "average of experts": {j: 0.2 for j in SCALE},
        "geneval expert": {"GenEval": 0.4},
        "ocr expert": {"OCR": 0.4},
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
            for m, s in (
                ("merged", 0.2),
                ("student", 0.6),
                ("student from sft", 0.4),
                ("GRPO-Mix", 0.1),
            )
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
        for task, rewards in TASKS.items():
            values = {
                j: SCALE[j] * (hard[j] + sign * shifts.get(j, 0) + noise * rng.normal(size=n))
                for j in rewards
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


OWN = {"geneval": "GenEval", "ocr": "OCR", "pickscore": "PickScore", "deqa": "DeQA"}


def moved(cost, small_cost=None, noise=0.05, seed=0, n=40):
    """Notebook 01's samples: along an expert its own score rises and every other loses `cost` of the full
    scale a whole step, and `small_cost` where a quarter of it is taken."""
    models = {"base": {}}
    for expert, own in OWN.items():
        for size in (0.25, 0.5, 1.0):
            lost = size * (cost if size > 0.25 or small_cost is None else small_cost)
            models[f"{expert} {size:+g}"] = {j: 0.4 * size if j == own else -lost for j in SCALE}
    return samples(models, noise=noise, seed=seed, n=n)


def write_run(folder, sign=1, noise=0.05, leave_out=()):
    folder.mkdir(exist_ok=True)
    for notebook, models in TRUE.items():
        (folder / notebook).mkdir()
        kept = {m: s for m, s in models.items() if m not in leave_out}
        table = samples(kept, sign, noise)
        table = table.assign(**{f"{reward} gold": table[reward] for reward in SCALE})
        table.to_parquet(
            folder / notebook / ("ood.parquet" if notebook == "08_results" else "samples.parquet")
        )
    (folder / "01_gradient_interference").mkdir()
    moved(0.3 * sign, 0.3, noise).to_parquet(
        folder / "01_gradient_interference" / "samples.parquet"
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
    [(1, "reproduced", ""), (-1, "contradicted", "other side"), (0, "undecided", "")],
)
def test_every_claim_is_rewardd_by_its_numbers(tmp_path, sign, verdict, note):
    claims_table = judge_claims(write_run(tmp_path, sign, noise=0.05 if sign else 0.0)).set_index(
        "claim"
    )
    tested = [c for c in CLAIMS if c.test]
    assert len(tested) >= 14 and len(claims_table) == len(CLAIMS) == len({c.key for c in CLAIMS})
    for claim in CLAIMS:
        row = claims_table.loc[claim.key]
        assert row["verdict"] == (verdict if claim.test else "not testable here"), row
        assert (
            (note in row["note"] and row["n"] > 1 and row["seeds"] == 1 and row["measured"])
            if claim.test
            else row["note"] == claim.why != ""
        )
    values = claims_table.loc[[c.key for c in tested]]
    assert (values["low"] <= values["effect"]).all() and (values["effect"] <= values["high"]).all()


def test_an_effect_is_bounded_where_a_third_of_the_papers_is_ruled_out(tmp_path):
    """The student as good as GRPO-Mix, the experts .4 of the scale above the base: a third of the paper's
    difference is .44 / 3 of that distance."""
    verdicts = {}
    for noise in (0.05, 1.0):
        run = write_run((tmp_path / str(noise)).resolve(), noise=0.05)
        same = TRUE["05_opd"] | {"student": {}, "GRPO-Mix": {}}
        samples(same, noise=noise).to_parquet(run / "05_opd" / "samples.parquet")
        verdicts[noise] = judge_claims(run).set_index("claim").loc["opd_mix"]
    assert verdicts[0.05]["bound"] == pytest.approx(0.4 * (0.08 / 0.1833) / 3, rel=0.1)
    assert verdicts[0.05]["verdict"] == "bounded" and "is ruled out" in verdicts[0.05]["note"]
    assert verdicts[1.0]["verdict"] == "undecided"
    (run / "03_expert_training" / "samples.parquet").unlink()  # no distance, no bound
    assert judge_claims(run).set_index("claim").loc["opd_mix", "verdict"] == "undecided"


def test_what_a_benchmark_was_made_to_have_is_no_result(tmp_path):
    run = write_run(tmp_path)
    plain, told = judge_claims(run), judge_claims(run, calibrated={"pickscore_costs": "made so"})
    row = told.set_index("claim").loc["pickscore_costs"]
    assert (row["verdict"], row["note"]) == ("calibrated", "made so") and row[
        "effect"
    ] == pytest.approx(plain.set_index("claim").loc["pickscore_costs", "effect"])
    assert (plain["verdict"] == "reproduced").sum() == (told["verdict"] == "reproduced").sum() + 1
    tested = sum(c.test is not None for c in CLAIMS)
    text = conclusion(told)
    assert (
        f"{tested - 1} are tested here" in text
        and "**Calibrated: the benchmark was made so" in text
    )
    with pytest.raises(ValueError, match="'pickscore_cots' .did you mean 'pickscore_costs'"):
        judge_claims(run, calibrated={"pickscore_cots": "made so"})


def test_effects_are_in_the_units_of_the_reward(tmp_path):
    claims_table = judge_claims(write_run(tmp_path)).set_index("claim")
    assert claims_table.loc["gain_pickscore", "effect"] == pytest.approx(
        0.4 * 26, rel=0.1
    ) and claims_table.loc["gain_deqa", "effect"] == pytest.approx(2, rel=0.1)
    assert (
        claims_table.loc["opd_mix", "effect"] == pytest.approx(0.5, abs=0.03)
        and claims_table.loc["opd_mix", "n"] == 120
    )
    assert (
        claims_table.loc["opd_mix", "note"]
        == "training: student 60 s, its experts not counted, GRPO-Mix 61 s"
    )
    assert (
        claims_table.loc["seesaw_deqa", "effect"] == pytest.approx(-0.3, abs=0.05)
        and "full scale" in claims_table.loc["seesaw_deqa", "measured"]
    )
    assert (
        claims_table.loc["mar_looks", "effect"] == pytest.approx(1.5, rel=0.1)
        and "deqa 1 minus none" in claims_table.loc["mar_looks", "measured"]
    )
    assert claims_table.loc["mar_preference", "measured"].startswith(
        "PickScore, deqa 0.04 minus none"
    )


def test_what_has_not_been_run_cannot_be_rewardd(tmp_path):
    claims_table = judge_claims(tmp_path)
    assert (
        set(claims_table["verdict"]) == {"not testable here"}
        and claims_table["effect"].isna().all()
        and claims_table["n"].isna().all()
    )
    for claim, (_, row) in zip(CLAIMS, claims_table.iterrows()):
        assert row["note"] == (f"{claim.needs} has not been run" if claim.test else claim.why)
    write_run(tmp_path, leave_out=["GRPO-Mix", "deqa expert"])
    (tmp_path / "03_expert_training" / "samples.parquet").unlink()
    claims_table = judge_claims(tmp_path).set_index("claim")
    assert (
        claims_table.loc["opd_mix", "note"] == "05_opd: the table has no 'GRPO-Mix'"
        and claims_table.loc["ood_mix", "verdict"] == "not testable here"
    )
    assert (
        claims_table.loc["surpass_deqa", "verdict"] == "not testable here"
        and claims_table.loc["surpass_ocr", "verdict"] == "reproduced"
    )
    assert claims_table.loc["gain_ocr", "note"] == "03_expert_training has left no samples.parquet"
    # a table given wins over the folder's
    beaten = judge_claims(tmp_path, ood=samples(TRUE["08_results"], -1)).set_index("claim")
    assert (
        beaten.loc["ood_mix", "verdict"] == "contradicted"
        and claims_table.loc["ood_start", "verdict"] == "reproduced"
    )


def test_the_paired_average_is_the_difference_of_the_papers_averages():
    table = samples(TRUE["05_opd"])
    means = paper_average(table).set_index("model")["mean"]
    value, low, high, n = paired(table, "student", "GRPO-Mix")
    assert value == pytest.approx(means["student"] - means["GRPO-Mix"]) and n == 120
    one = (
        paired_differences(table[table.task == "ocr"], "base", ["OCR"])
        .set_index("model")
        .loc["student"]
    )
    assert paired(table, "student", "base", [("OCR", "ocr", 1.0)]) == pytest.approx(
        (one["mean"], one["low"], one["high"], one["n"]), abs=0.002
    )
    hits = 0
    for seed in range(60):  # a true gain of .25 in each of four rewards
        _, low, high, _ = paired(
            samples({"a": {}, "b": dict.fromkeys(SCALE, 0.25)}, noise=0.5, seed=seed),
            "b",
            "a",
            resamples=400,
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
    rows = model_scores(run.samples("05_opd")).set_index(["model", "reward"])
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
                pd.concat([table[table.model == "a"], *rows]),
                "b",
                "a",
                [("OCR", "ocr", 1.0)],
                resamples=400,
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
                    {
                        "model": m,
                        "task": "pickscore",
                        "prompt": [str(i) for i in range(100)],
                        "DeQA": c,
                    }
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


def told(name, table):
    claim, run = next(c for c in CLAIMS if c.key == name), Run(".")
    run._tables["01_gradient_interference"] = table
    return claim.test(run, claim)


def test_one_expert_that_costs_one_score_is_enough_if_it_stands_twelve_looks():
    def one(cost, noise):
        table = moved(0.0, noise=noise)
        here = (table["model"] == "ocr +0.5") & (table["task"] == "geneval")
        return told("conflict", table.assign(GenEval=table["GenEval"] - cost * here))

    found = one(0.3, 0.05)
    assert found.high < 0 and found.effect == pytest.approx(-0.3, abs=0.05)
    assert (
        found.measured.startswith("GenEval / full scale, 0.5 of the ocr expert") and found.n == 40
    )
    assert "lowest of 12" in found.note
    assert one(0.0, 0.5).low < 0 < one(0.0, 0.5).high  # the lowest of twelve lucky ones is none
    with pytest.raises(Missing, match="has gone 0.5 along no expert"):
        table = moved(0.1)
        told("conflict", table[~table["model"].str.contains("0.5", regex=False)])


def test_the_slope_of_first_order_is_covered_and_not_pulled_to_nothing_by_noise():
    hits, found = 0, []
    for seed in range(60):
        found.append(told("first_order", moved(0.2, 0.4, noise=0.1, seed=seed)))
        hits += found[-1].low <= 0.5 <= found[-1].high
    assert hits >= 52  # 95 % of 60 is 57, minus three standard errors
    assert np.mean([f.effect for f in found]) == pytest.approx(0.5, abs=0.03)
    assert found[0].n == 12 and "1, the exact prediction" in found[0].note
    # nothing moves: nothing to foretell by
    assert np.isnan(told("first_order", moved(0.0, 0.0, noise=0.5)).low)


def test_a_table_tells_score_gold_and_seconds_in_all(benchmark):
    table = samples(TRUE["05_opd"])
    table["GenEval gold"] = table["GenEval"] - 0.1
    told = in_all(table, benchmark, {"student": 60.0, "GRPO-Mix": 61.0})
    assert list(told.index) == list(TRUE["05_opd"])
    assert list(told) == [
        "GenEval",
        "GenEval gold",
        "OCR",
        "PickScore",
        "DeQA",
        "Average",
        "seconds in all",
    ]
    mean = told[["GenEval", "GenEval gold"]].map(lambda text: float(text.split()[0]))
    assert (mean["GenEval"] - mean["GenEval gold"]).to_numpy() == pytest.approx(0.1, abs=0.0015)
    spent, each = (
        told["seconds in all"],
        {name: m["seconds"] for name, m in manifests(benchmark).items()},
    )
    assert spent["base"] == 0 and spent["GRPO-Mix"] == 61 and spent["ocr expert"] == each["ocr"]
    assert spent["merged"] == sum(each.values()) == spent["student"] - 60
    assert np.isnan(spent["student from sft"])  # whose own training nobody told of


def test_the_tables_and_figures_of_the_results(tmp_path):
    run = Run(write_run(tmp_path))
    passed = surpassing(run.samples("05_opd")).set_index(["reward", "student is"])
    assert (passed.groupby("reward")["mean"].sum() == 1).all() and passed.loc[
        ("GenEval", "below"), "mean"
    ] == 1 == passed.loc[("OCR", "above"), "mean"]
    same = run.samples("05_opd").assign(OCR=1.0)
    assert surpassing(same).set_index(["reward", "student is"]).loc[
        ("OCR", "equal"), ["mean", "n"]
    ].tolist() == [1, 40]
    shown = beside(
        model_scores(run.samples("05_opd")), {"base": {"paper's name": "x", "GenEval": 0.63}}
    )
    assert (
        shown.loc["base", "paper: GenEval"] == 0.63
        and shown.loc["merged", "paper: GenEval"] == "–"
        and "n=120" in shown.loc["student", "Average"]
    )
    assert set(mar_scores(run)["reward"]) == {*SCALE, "Average", "distance"}
    costs = cost(run, load_benchmark()).set_index("stage")["minutes"]
    assert (
        costs["student"] == 1
        and costs["02_mixed_reward_seesaw has left no results.json"] != costs["all experts"]
    )
    claims_table = judge_claims(tmp_path)
    text = conclusion(claims_table)
    tested = sum(c.test is not None for c in CLAIMS)
    assert (
        f"Of {len(CLAIMS)} claims {tested} are tested here: {tested} reproduced, 0 bounded, 0 und"
        in text
    )
    assert "- numbers, cost: needs SD-3.5-M" in text and "(`opd_mix`): +" in text
    assert "- conflict, first_order: 01_gradient_interference has not been run" in conclusion(
        judge_claims(tmp_path / "none")
    )
    assert show_claims(claims_table).notna().all(axis=None)
    for figure in (
        claims_figure(claims_table, "a run"),
        claims_figure(judge_claims(tmp_path / "none"), "no run"),
        surpassing_figure(passed.reset_index()),
    ):
        figure.savefig(tmp_path / "figure.png")
    sure = claims_table.assign(
        low=claims_table["effect"] - 1e-7, high=claims_table["effect"] + 1e-7
    )
    assert claims_figure(sure, "a run without noise").axes[0].get_xlim()[1] < 100
    write_json(tmp_path / "claims table.json", claims_table.to_dict("records"))
    assert (
        said(lambda: model_scores(Run(tmp_path / "none").samples("05_opd")))
        == "05_opd has not been run: nothing to show."
    )


def test_the_notebook_needs_what_the_claims_need():
    needs = nbformat.read(NOTEBOOKS / "08_results.ipynb", 4).metadata["flowopd"]["needs"]
    assert {c.needs for c in CLAIMS if c.test} - {"08_results"} <= set(needs)


def test_an_interval_as_long_as_the_bound_decides_whatever_is_true():
    def undecided(width):
        return [
            e
            for e in np.linspace(-3, 3, 121)
            if _verdict("> 0", e - width / 2, e + width / 2, 1.0)[0] == "undecided"
        ]

    assert not undecided(0.999) and undecided(1.2)
    # certainly there, and certainly next to nothing
    assert (
        _verdict("> 0", 1e-6, 3e-6, 0.1)[0] == "bounded"
        and _verdict("> 0", 0.05, 0.2, 0.1)[0] == "reproduced"
    )
    assert _verdict("> 0", -3e-6, -1e-6, 0.1)[0] == "contradicted"


def test_what_a_larger_run_can_decide_is_foretold(tmp_path):
    """The interval at four times the prompts, foretold from a pilot, and met by a run of that size."""
    same = TRUE["05_opd"] | {"student": {}, "GRPO-Mix": {}}
    widths = {}
    for n in (40, 160):
        run = write_run(tmp_path / str(n))
        samples(same, noise=0.6, n=n).to_parquet(run / "05_opd" / "samples.parquet")
        widths[n] = power(judge_claims(run)).set_index("claim").loc["opd_mix"]
    told = power(judge_claims(tmp_path / "40"), times=4).set_index("claim").loc["opd_mix"]
    assert told["width"] == pytest.approx(widths[160]["width"], rel=0.2) and told["n"] == 480
    assert not widths[40]["decidable"]
    assert told["needs"] == pytest.approx(120 * (widths[40]["width"] / told["bound"]) ** 2, abs=1)
    done = subprocess.run(
        [sys.executable, "-m", "flowopd_lib.studies.power", tmp_path / "none"],
        capture_output=True,
        text=True,
    )
    assert done.returncode and "there is no run at" in done.stderr
