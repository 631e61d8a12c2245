"""The figures and tables, on made-up numbers whose answer is known."""

import json
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from flowopd_lib.files import encode_webp, write_thumbnails
from flowopd_lib.plots import experiments, scores, style, training

REWARDS, MODELS = ["GenEval", "OCR", "DeQA"], ["base", "ocr expert", "student"]


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def made_up_summary(models=MODELS, rewards=REWARDS, **columns):
    rows = [(m, r, 0.1 * i + 0.2 * j) for i, m in enumerate(models) for j, r in enumerate(rewards)]
    table = pd.DataFrame(rows, columns=["model", "reward", "mean"])
    return table.assign(low=table["mean"] - 0.15, high=table["mean"] + 0.15, n=50, **columns)


def legend_of(owner):
    return [text.get_text() for text in owner.get_texts()]


def test_a_reward_its_gold_and_its_expert_share_a_colour_and_other_names_get_their_own():
    assert style.color_of("OCR") == style.color_of("OCR gold") == style.color_of("ocr expert")
    colors = {
        name: style.color_of(name)
        for name in ["base", "student", *(f"training {i}" for i in range(10))]
    }
    assert len(set(colors.values())) == 12
    assert style.color_of("training 3") == colors["training 3"], "the same in the next figure"


def test_a_figure_of_another_thread_does_not_use_pyplot():
    with ThreadPoolExecutor() as threads:
        figure, _ = threads.submit(style.make_panels, 3, columns=2).result()
    assert len(figure.axes) == 3 and not plt.get_fignums()


def test_a_matrix_is_bold_where_the_interval_excludes_0_and_blank_where_nothing_is_known():
    table = made_up_summary(MODELS[:2], REWARDS[:2])  # means 0, .2, .1, .3
    table.loc[2, ["mean", "low", "high"]] = np.nan
    axis = scores.plot_gain_matrix(table, "title", {"GenEval": 1.0, "OCR": 2.0}).axes[0]
    cells = {text.get_text().split("\n")[0]: text.get_fontweight() for text in axis.texts}
    assert cells == {"+0.000": "normal", "+0.200": "bold", "+0.300": "bold"}
    assert axis.get_xticklabels()[0].get_text() == "GenEval (n=50)"


def test_scores_have_a_panel_per_reward_with_n_and_a_line_at_the_first_model():
    summary = made_up_summary().iloc[:-1]  # the last model lacks the last reward
    axes = scores.plot_scores(summary, "title").axes
    assert [axis.get_title() for axis in axes] == [f"{reward} (n=50)" for reward in REWARDS]
    assert [axis.lines[-1].get_xdata()[0] for axis in axes] == pytest.approx([0.0, 0.2, 0.4])
    kinds = [made_up_summary(by=by) for by in ("proxy", "gold", "gap")]
    figure = scores.plot_gold_gains(pd.concat(kinds), "title")
    assert legend_of(figure.legends[0]) == ["reward", "gold reward"]


def test_an_image_grid_shows_thumbnails_with_prompt_and_scores(tmp_path):
    thumbnails = [encode_webp(torch.full((3, 8, 8), value)) for value in (0.2, 0.6)]
    paths = write_thumbnails(tmp_path / "images", 0, "base", thumbnails)
    table = pd.DataFrame({"prompt": ["a", "b"], "image": paths, "OCR": [0.5, np.nan], "DeQA": 3.0})
    images = scores.load_images(table, tmp_path)
    assert images.shape == (2, 3, 8, 8) and images[1].mean() == pytest.approx(0.6, abs=0.02)
    captions = scores.format_captions(table)
    assert captions == ["a\nOCR 0.50\nDeQA 3.00", "b\nDeQA 3.00"]
    figure = scores.plot_image_grid([*images, None], [*captions, "none"], 2, "title", ["A", "B"])
    assert [len(axis.images) for axis in figure.axes] == [1, 1, 0]


def test_tables_for_readers_have_mean_interval_and_n_in_a_cell():
    paper = {"base": {"paper's name": "SD-3.5-M", "OCR": 0.59}}
    table = scores.tabulate_scores(made_up_summary(), paper)
    assert table.loc["student", "OCR"] == "0.400 [0.250, 0.550] n=50"
    assert table.loc["base", "paper: OCR"] == 0.59 and table.loc["student", "paper: OCR"] == "–"
    small = pd.DataFrame({"mean": [0.02], "low": [0.01], "high": [0.03]})
    assert scores.format_intervals(small).iloc[0, 0] == "0.0200 [0.0100, 0.0300]"


def test_training_curves_take_a_metric_that_only_some_trainings_have():
    curve = pd.DataFrame({"iteration": range(30), "kl": np.geomspace(1, 1e-3, 30)})
    curves = {"a": curve, "b": curve.assign(mar=1.0)}
    axes = training.plot_training_curves(curves, ["kl", "mar"], "title").axes
    assert [len(axis.lines) for axis in axes] == [4, 2]
    assert [axis.get_yscale() for axis in axes] == ["log", "linear"]


def test_score_curves_and_paths_have_a_line_per_training():
    rows = pd.concat([made_up_summary(["x"], iteration=i, seconds=i / 2) for i in range(4)])
    probes = {"a": rows, "b": rows}
    figure = training.plot_score_curves(probes, "seconds", "title")
    assert len(figure.axes) == 3 and legend_of(figure.legends[0]) == ["a", "b"]
    axes = training.plot_score_paths(probes, REWARDS, "title").axes
    pairs = [(axis.get_xlabel().split(",")[0], axis.get_ylabel().split(",")[0]) for axis in axes]
    assert pairs == [("GenEval", "OCR"), ("GenEval", "DeQA"), ("OCR", "DeQA")]


def test_distillation_is_shown_by_task_and_by_step_where_steps_are_drawn_at_random():
    metrics = pd.DataFrame(
        {"iteration": range(30), "velocity_mse_ocr": 0.1, "velocity_mse_deqa": 1}
    )
    for step in range(3):
        metrics[f"kl_step_{step}"] = np.where(metrics["iteration"] % 3 == step, 10.0**step, np.nan)
    left, right = training.plot_distillation(metrics, "title").axes
    assert legend_of(left.get_legend()) == ["ocr", "deqa"]
    assert legend_of(right.get_legend()) == ["1", "2", "3"]


def test_directions_start_at_no_change():
    changes = [made_up_summary(["x"], along=a, size=s) for a in "pq" for s in (-0.5, 1.0)]
    figure = experiments.plot_directions(pd.concat(changes), "title")
    line = figure.axes[0].containers[0].lines[0]
    assert line.get_xdata() == pytest.approx([-0.5, 0, 1], abs=0.02) and line.get_ydata()[1] == 0


def test_a_cosine_below_the_noise_is_left_out():
    table = pd.DataFrame([(task, on) for task in "pqr" for on in "pqr"], columns=["task", "on"])
    for name, value in (("cosine", 0.9), ("inner", 2e6)):
        table[name], table[f"{name}_low"], table[f"{name}_high"] = value, value * 0.9, value * 1.1
    table.loc[1, ["cosine_low", "cosine_high"]] = np.nan
    figure = experiments.plot_gradient_interference(table.assign(batches=8), "title", "nats")
    cosines, products = figure.axes
    assert len(cosines.texts) == 8 and len(products.texts) == 9
    assert products.texts[0].get_text() == "+2e+06\n[+1.8e+06, +2.2e+06]"


def test_reward_checks_and_the_ablation_by_timestep_name_what_they_compare():
    checks = pd.DataFrame({"reward": ["OCR", "OCR gold"], "test": "reads signs", "value": 0.95})
    graded = pd.DataFrame({"kind": ["blur", "noise"] * 10, "level": [1, 2] * 10, "score": 2.0})
    checks = checks.assign(low=0.9, high=0.99, aim=[0.9, np.nan], n=300)
    left, right = scores.plot_reward_checks(checks, graded).axes
    names = [label.get_text() for label in left.get_yticklabels()]
    assert names == ["OCR reads signs (n=300)", "OCR gold reads signs (n=300)"]
    steps = {"step": [0, 1], "sigma": [1.0, 0.3], "share kl": 0.5, "share ode": 0.5, "n": 72}
    table = pd.DataFrame(steps).assign(distance_reduction=0.05, low=0.04, high=0.06)
    left, right = experiments.plot_timestep_ablation(table, "title").axes
    assert legend_of(left.get_legend()) == ["kl", "ode"] and "n=72" in right.get_title()


# --- results


@pytest.fixture
def benchmark(tmp_path):
    """Two rewards whose experts trained for 100 and 200 s."""
    for name, seconds in (("geneval", 100), ("ocr", 200)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(json.dumps({"seconds": seconds}))
    return SimpleNamespace(
        domains=[("GenEval", "geneval", 1.0), ("OCR", "ocr", 1.0)],
        experts={"geneval": None, "ocr": None},
        experts_of={"GenEval": "geneval", "OCR": "ocr"},
        adapter=lambda name: tmp_path / name,
    )


def test_a_student_is_compared_with_the_teacher_of_each_task(benchmark):
    rows = []  # of ten prompts the student is above on two, equal on four, below on four
    for task, reward in (("geneval", "GenEval"), ("ocr", "OCR")):
        for i in range(10):
            row = {"task": task, "prompt": str(i)}
            rows.append({**row, "model": f"{task} expert", reward: 0.5})
            rows.append({**row, "model": "student", reward: 0.5 + 0.2 * (i < 2) - 0.2 * (i > 5)})
    table = experiments.compare_with_teachers(pd.DataFrame(rows), benchmark)
    shares = table.pivot(index="reward", columns="student is", values="mean")
    assert shares.loc["OCR"].to_dict() == {"above": 0.2, "below": 0.4, "equal": 0.4}
    assert (table["n"] == 10).all() and table["teacher"].iloc[-1] == "ocr expert"
    scores.plot_scores(table, "title", rows="student is", reference=0.5)


def test_a_students_training_time_counts_that_of_its_experts(benchmark):
    total = experiments.sum_training_seconds(benchmark, {"student": 60.0, "GRPO-Mix": 61.0})
    assert total[["base", "ocr expert", "merged", "student"]].tolist() == [0, 200, 300, 360]
    benchmark.experts["deqa"] = None  # which others trained
    total = experiments.sum_training_seconds(benchmark, {"student": 60.0, "GRPO-Mix": 61.0})
    assert np.isnan(total["merged"]) and np.isnan(total["student"]) and total["GRPO-Mix"] == 61


def test_claims_are_counted_by_verdict_and_drawn_so_that_the_claim_is_right_of_0():
    nan, rows = np.nan, [("a", "reproduced", "> 0", 0.2, 0.1, 0.3, 40, "")]
    rows += [("b", "contradicted", "< 0", 0.2, 0.1, 0.3, 40, "the other sign")]
    rows += [("c", "undecided", "> 0", nan, nan, nan, 40, "nothing above the noise")]
    rows += [("d", "true by construction", "> 0", 0.5, 0.5 - 1e-7, 0.5 + 1e-7, 40, "made so")]
    rows += [(k, "not testable here", "", nan, nan, nan, None, "needs SD-3.5-M") for k in "ef"]
    columns = ["claim", "verdict", "claimed", "effect", "low", "high", "n", "note"]
    claims = pd.DataFrame(rows, columns=columns).assign(where="4.2", measured="OCR", seeds=1)
    claims["statement"] = "statement " + claims["claim"]
    text = experiments.summarize_claims(claims)
    assert "Of 6 claims 3 are tested here: 1 reproduced, 0 effect excluded, 1 undecided, 1 " in text
    assert "1 more are true by construction" in text and "about 0.1 would still" in text
    table = experiments.format_claims(claims)
    assert table["effect [95 % interval]"].tolist()[:3] == ["+0.200 [+0.100, +0.300]"] * 2 + [""]
    assert table.notna().all(axis=None)
    (axis,) = experiments.plot_claims(claims, "a run").axes
    drawn = [points.lines[0].get_xdata()[0] for points in axis.containers]
    assert drawn == pytest.approx([2.0, -2.0, 30.0]), "reproduced, contradicted, cut off"
    experiments.plot_claims(claims.iloc[4:], "an empty run")
