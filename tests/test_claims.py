"""The verdicts on claims, on made-up runs whose truth is known."""

import json

import numpy as np
import pandas as pd
import pytest

from flowopd_lib.experiments.claims import (
    CLAIMS,
    PAPER_MAIN,
    MissingResult,
    Run,
    decide,
    evaluate_claims,
    measure,
    paired_difference,
)
from flowopd_lib.experiments.interference import first_order_slope
from flowopd_lib.files import ROOT, write_json
from flowopd_lib.stats import AVERAGE, model_scores, paired_differences, paper_average

SCALE = {"GenEval": 1.0, "OCR": 1.0, "PickScore": 26.0, "DeQA": 5.0}
TASKS = {"geneval": ["GenEval"], "ocr": ["OCR"], "pickscore": ["PickScore", "DeQA"]}
OWN = {"geneval": "GenEval", "ocr": "OCR", "pickscore": "PickScore", "deqa": "DeQA"}
TESTED = [claim for claim in CLAIMS if not claim.untestable]


def shifted(*unchanged, **shifts):
    """Models by the shift of all their scores."""
    return {name: {} for name in unchanged} | {
        name: dict.fromkeys(SCALE, shift) for name, shift in shifts.items()
    }


def experts(suffix, *shifts):
    return {f"{e}{suffix}": {reward: s} for (e, reward), s in zip(OWN.items(), shifts)}


# What the paper claims, as shifts in full scales: all its claims hold, each by a clear margin.
TRUE = {
    "02_mixed_reward_seesaw": shifted("base", "+GenEval", "Mix 3:1:1", "Mix total", "Mix twice")
    | shifted(**{"+OCR": -0.3, "+PickScore": -0.6, "+DeQA": -0.9, "average of experts": 0.2})
    | experts(" expert", 0.4, 0.4),
    "03_expert_training": {"base": {}}
    | experts("", 0.4, 0.4, 0.4, 0.4)
    | {"pickscore": {"PickScore": 0.4, "GenEval": -0.4}},
    "05_opd": {"base": {}}
    | experts(" expert", 0.9, 0.3, 0.9, 0.3)
    | shifted(**{"merged": 0.2, "student": 0.6, "student from sft": 0.4, "GRPO-Mix": 0.1}),
    "06_mar": shifted("merged", "none", "base 0.04")
    | {"deqa 0.04": {"DeQA": 0.2, "PickScore": 0.2}, "deqa 1": {"DeQA": 0.3, "PickScore": 0.1}},
    "07_opd_estimators": {"merged": {}, "paper": {"GenEval": 0.4}, "as_coded": {"OCR": 0.4}},
    "08_results": shifted("base", "GRPO-Mix")
    | {"merged": {"OCR": 0.4}, "student": {"OCR": 0.6, "GenEval": 0.2}},
}


def samples(models, sign=1, noise=0.05, n=40, seed=0):
    """Scores of prompts of very different difficulty, the same for every model, plus `sign` times a
    model's shifts and noise."""
    rng, rows = np.random.default_rng(seed), []
    hard = {reward: rng.normal(0.5, 0.3, n) for reward in SCALE}
    for model, shifts in models.items():
        for task, rewards in TASKS.items():
            scores = {
                r: SCALE[r] * (hard[r] + sign * shifts.get(r, 0) + noise * rng.normal(size=n))
                for r in rewards
            }
            prompts = [f"{task} {i}" for i in range(n)]
            rows.append(pd.DataFrame({"model": model, "task": task, "prompt": prompts, **scores}))
    return pd.concat(rows, ignore_index=True)


def along_experts(cost, small_cost=None, noise=0.05, seed=0):
    """Notebook 01's samples: along an expert its own score rises and every other loses `cost` of
    the full scale a whole step, and `small_cost` where a quarter of it is taken."""
    models = {"base": {}}
    for expert, own in OWN.items():
        for size in (0.25, 0.5, 1.0):
            lost = size * (cost if size > 0.25 or small_cost is None else small_cost)
            shifts = {reward: 0.4 * size if reward == own else -lost for reward in SCALE}
            models[f"{expert} {size:+g}"] = shifts
    return samples(models, noise=noise, seed=seed)


def write_run(folder, sign=1, noise=0.05, leave_out=()):
    for notebook, models in TRUE.items():
        (folder / notebook).mkdir(parents=True)
        table = samples({m: s for m, s in models.items() if m not in leave_out}, sign, noise)
        table = table.assign(**{f"{reward} gold": table[reward] for reward in SCALE})
        name = "ood.parquet" if notebook == "08_results" else "samples.parquet"
        table.to_parquet(folder / notebook / name)
    (folder / "01_gradient_interference").mkdir()
    table = along_experts(0.3 * sign, 0.3, noise)
    table.to_parquet(folder / "01_gradient_interference" / "samples.parquet")
    row = {"se": 0.1, "n": 20}
    rows = [
        {"estimator": e, "distance": d, "mean along pathwise": sign * (d < 1.0), **row}
        for d in (1.0, 0.1)
        for e in ("pathwise", "paper", "as_coded")
    ]
    write_json(folder / "07_opd_estimators" / "results.json", {"estimators": rows})
    return folder


def table_of(*arguments, **options):
    return evaluate_claims(*arguments, **options).set_index("claim")


@pytest.fixture(scope="module")
def true_run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def true_claims(true_run):
    return table_of(true_run)


def claim_of(name, notebook, table):
    """What a claim measures on a table of its notebook."""
    run, claim = Run("."), next(c for c in CLAIMS if c.id == name)
    run._tables[notebook] = table
    return measure(run, claim)


def test_claims_hold_where_the_paper_is_right(true_claims):
    assert len(TESTED) >= 14 and len(true_claims) == len({c.id for c in CLAIMS})
    for claim in CLAIMS:
        row = true_claims.loc[claim.id]
        if claim.untestable:
            assert row["verdict"] == "not testable here" and row["note"] == claim.untestable
        else:
            assert row["verdict"] == "reproduced", row
            assert row["low"] <= row["effect"] <= row["high"] and row["measured"]
            assert row["n"] > 1 and row["seeds"] == 1


@pytest.mark.parametrize("sign, verdict", [(-1, "contradicted"), (0, "undecided")])
def test_claims_do_not_hold_where_the_sign_is_another_or_nothing_changes(tmp_path, sign, verdict):
    claims = table_of(write_run(tmp_path, sign, noise=0.05 if sign else 0.0))
    assert set(claims.loc[[c.id for c in TESTED], "verdict"]) == {verdict}


def test_an_effect_is_excluded_where_a_third_of_the_papers_is(tmp_path):
    """The student as good as GRPO-Mix, the experts .4 of the scale above the base: a third of the
    paper's difference is .44 / 3 of that distance."""
    run, rows, claims = write_run(tmp_path), {}, [c for c in CLAIMS if c.id == "opd_mix"]
    same = TRUE["05_opd"] | shifted("student", "GRPO-Mix")
    for noise in (0.05, 1.0):
        samples(same, noise=noise).to_parquet(run / "05_opd" / "samples.parquet")
        rows[noise] = table_of(run, claims=claims).loc["opd_mix"]
    assert rows[0.05]["bound"] == pytest.approx(0.4 * (0.08 / 0.1833) / 3, rel=0.1)
    assert rows[0.05]["verdict"] == "effect excluded" and "is excluded" in rows[0.05]["note"]
    assert rows[1.0]["verdict"] == "undecided"
    (run / "03_expert_training" / "samples.parquet").unlink()  # no distance, no bound
    assert table_of(run, claims=claims).loc["opd_mix", "verdict"] == "undecided"


def test_what_a_benchmark_was_made_to_have_is_no_result(true_run, true_claims):
    claims = [c for c in CLAIMS if c.id == "pickscore_costs"]
    made_so = {"pickscore_costs": "made so"}
    row = table_of(true_run, claims=claims, true_by_construction=made_so).loc["pickscore_costs"]
    assert (row["verdict"], row["note"]) == ("true by construction", "made so")
    assert row["effect"] == true_claims.loc["pickscore_costs", "effect"]
    with pytest.raises(ValueError, match="'pickscore_cots' .did you mean 'pickscore_costs'"):
        evaluate_claims(true_run, true_by_construction={"pickscore_cots": "made so"})


def test_effects_are_in_the_units_of_the_reward_and_the_best_of_several_counts(true_claims):
    expected = {"gain_pickscore": 0.4 * 26, "gain_deqa": 2, "opd_mix": 0.5, "seesaw_deqa": -0.3}
    for name, effect in {**expected, "mar_quality": 1.5}.items():
        assert true_claims.loc[name, "effect"] == pytest.approx(effect, rel=0.15)
    measured = true_claims["measured"]
    assert true_claims.loc["opd_mix", "n"] == 120 and "full scale" in measured["seesaw_deqa"]
    assert measured["mar_quality"] == "DeQA, deqa 1 minus none, by prompts"
    assert measured["mar_preference"].startswith("PickScore, deqa 0.04 minus none")
    assert measured["opd_mix_total_gold"].startswith("Average of the gold rewards, student minus")


def test_what_has_not_been_run_is_not_testable(tmp_path, true_run):
    claims = table_of(tmp_path)
    assert set(claims["verdict"]) == {"not testable here"}
    assert claims[["effect", "n", "seeds"]].isna().all(axis=None)
    for claim in TESTED:
        assert claims.loc[claim.id, "note"] == f"{claim.notebook} has not been run"
    write_run(tmp_path, leave_out=["GRPO-Mix", "deqa expert", "Mix twice"])
    (tmp_path / "03_expert_training" / "samples.parquet").unlink()
    names = "opd_mix opd_mix_twice surpass_deqa surpass_ocr gain_ocr ood_start".split()
    some = [c for c in CLAIMS if c.id in names]
    claims = table_of(tmp_path, claims=some)
    notes = claims["note"].to_dict()
    no, where = "there is no GenEval of 'student' and", "on two or more geneval prompts"
    assert notes["opd_mix"] == f"05_opd: {no} 'GRPO-Mix' {where}"
    assert notes["opd_mix_twice"] == f"05_opd and 02_mixed_reward_seesaw: {no} 'Mix twice' {where}"
    assert notes["gain_ocr"] == "03_expert_training has left no samples.parquet"
    untestable = claims["verdict"] == "not testable here"
    assert set(claims.index[~untestable]) == {"surpass_ocr", "ood_start"}
    # a given table counts instead of the folder's
    other = table_of(tmp_path, ood=samples(TRUE["08_results"], -1), claims=some)
    assert other.loc["ood_start", "verdict"] == "contradicted"


def test_the_paired_average_is_the_difference_of_the_papers_averages():
    table = samples(TRUE["05_opd"])
    means = paper_average(table).set_index("model")["mean"]
    value, _, _, n = paired_difference(table, "student", "GRPO-Mix")
    assert value == pytest.approx(means["student"] - means["GRPO-Mix"]) and n == 120
    differences = paired_differences(table[table.task == "ocr"], "base", ["OCR"])
    one = differences.set_index("model").loc["student", ["mean", "low", "high", "n"]]
    paired = paired_difference(table, "student", "base", [("OCR", "ocr", 1.0)])
    assert paired == pytest.approx(tuple(one), abs=0.002)
    hits = 0
    for seed in range(60):  # a true gain of .25 in each of four rewards
        table = samples(shifted("a", b=0.25), noise=0.5, seed=seed)
        _, low, high, _ = paired_difference(table, "b", "a", resamples=400)
        hits += low <= 0.25 <= high
    assert hits >= 52  # 95 % of 60 is 57, minus three standard errors


def test_a_prompt_counts_once_however_often_it_was_sampled_or_trained_on():
    table = samples({"base": {}, "student": {}}, noise=0)
    base, student = (table[table.model == name] for name in ("base", "student"))
    trained = [student.assign(train_seed=k, OCR=student.OCR + 0.1 * (k + 1)) for k in range(3)]
    table = pd.concat([base, *trained])
    effect = claim_of("opd_ocr", "05_opd", table)
    assert (effect.n, effect.seeds) == (40, 3) and effect.effect == pytest.approx(0.2)
    assert effect.note == "by training: +0.100, +0.200, +0.300"
    rows = model_scores(table).set_index(["model", "reward"])["n"]
    assert rows["student", "OCR"] == 40 and rows["student", "Average"] == 120


def test_an_interval_over_trainings_covers_other_trainings():
    """Trainings that differ by more than prompts do: an interval over prompts alone would nearly
    always miss the true gain of 0."""
    rng, hits, widths = np.random.default_rng(0), {1: 0, 8: 0}, {}
    for seed in range(40):
        table = samples({"a": {}, "b": {}}, noise=0.1, seed=seed)
        a, b = (table[table.model == name] for name in "ab")
        for n in hits:
            rows = [b.assign(train_seed=s, OCR=b.OCR + rng.normal(0, 0.5)) for s in range(n)]
            both, domain = pd.concat([a, *rows]), [("OCR", "ocr", 1.0)]
            _, low, high, _ = paired_difference(both, "b", "a", domain, resamples=400)
            hits[n] += low <= 0 <= high
            widths[n] = high - low
    assert hits[8] >= 32 and hits[1] < 12 and widths[8] > 2 * widths[1]


def test_the_best_of_several_comparisons_needs_more_than_one_lucky_interval():
    """An effect of 2.3 standard errors is one alone, and none as the best of eight."""
    noise, effects = np.tile([-1.0, 1.0], 50), {}
    for weights in (1, 8):
        shifts = {"none": 0 * noise}
        shifts |= {f"deqa {w}": noise + (w == 0) * 2.3 / np.sqrt(99) for w in range(weights)}
        rows = [
            pd.DataFrame({"model": m, "task": "pickscore", "prompt": range(100), "DeQA": scores})
            for m, scores in shifts.items()
        ]
        effects[weights] = claim_of("mar_quality", "06_mar", pd.concat(rows))
    assert effects[1].low > 0 > effects[8].low and effects[1].note == ""
    assert "most favourable of 8" in effects[8].note
    assert effects[1].effect == pytest.approx(effects[8].effect)
    with pytest.raises(MissingResult, match="no model 'deqa [*]'"):
        claim_of("mar_quality", "06_mar", rows[0])


def test_one_score_that_drops_along_one_expert_is_a_conflict_if_it_survives_twelve_comparisons():
    effects = []
    for cost, noise in ((0.3, 0.05), (0.0, 0.5)):
        table = along_experts(0.0, noise=noise)
        here = (table["model"] == "ocr +0.5") & (table["task"] == "geneval")
        table = table.assign(GenEval=table["GenEval"] - cost * here)
        effects.append(claim_of("conflict", "01_gradient_interference", table))
    effect, none = effects
    assert effect.high < 0 and effect.effect == pytest.approx(-0.3, abs=0.05) and effect.n == 40
    assert effect.measured == "GenEval / full scale, ocr +0.5 minus base, by prompts"
    assert "most favourable of 12" in effect.note and none.low < 0 < none.high


def test_the_first_order_slope_is_covered_and_not_attenuated_by_noise():
    hits, slopes, steps = 0, [], (OWN, 0.25, 1.0)
    for seed in range(60):
        table = along_experts(0.2, 0.4, noise=0.1, seed=seed)
        slope, low, high, _ = first_order_slope(table, AVERAGE, *steps)
        slopes.append(slope)
        hits += low <= 0.5 <= high
    assert hits >= 52  # 95 % of 60 is 57, minus three standard errors
    assert np.mean(slopes) == pytest.approx(0.5, abs=0.03)
    effect = claim_of("first_order", "01_gradient_interference", table)
    assert effect.n == 12 and effect.effect == slope and "1, the exact prediction" in effect.note
    still = along_experts(0.0, 0.0, noise=0.5)  # nothing changes: nothing to predict by
    assert np.isnan(first_order_slope(still, AVERAGE, *steps)[1])


def test_an_interval_as_long_as_the_bound_decides_whatever_is_true():
    def undecided(width):
        centres = np.linspace(-3, 3, 121)
        verdicts = [decide("> 0", e - width / 2, e + width / 2, 1.0)[0] for e in centres]
        return verdicts.count("undecided")

    assert not undecided(0.999) and undecided(1.2)
    # certainly there, and certainly next to nothing
    assert decide("> 0", 1e-6, 3e-6, 0.1)[0] == "effect excluded"
    assert decide("> 0", 0.05, 0.2, 0.1)[0] == "reproduced"
    assert decide("> 0", -3e-6, -1e-6, 0.1)[0] == "contradicted"


def test_claims_use_the_notebooks_that_the_results_need_and_margins_follow_from_the_paper():
    notebook = json.loads((ROOT / "notebooks" / "08_results.ipynb").read_text())
    needs = set(notebook["metadata"]["flowopd"]["needs"])
    assert {c.notebook for c in TESTED} - {"08_results"} <= needs
    margins, base = {claim.id: claim.margin for claim in CLAIMS}, PAPER_MAIN["base"]
    gains = {r: PAPER_MAIN[f"{e} expert"][r] - base[r] for e, r in OWN.items()}
    lost = PAPER_MAIN["pickscore expert"]["GenEval"] - base["GenEval"]
    assert margins["pickscore_costs"] == pytest.approx(-lost / gains["GenEval"] / 3, rel=1e-3)
    distance = np.mean([gain / SCALE[reward] for reward, gain in gains.items()])
    averages = PAPER_MAIN["student"]["Average"] - PAPER_MAIN["GRPO-Mix"]["Average"]
    assert margins["opd_mix"] == pytest.approx(averages / distance / 3, rel=1e-3)
