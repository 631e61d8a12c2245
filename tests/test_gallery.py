"""The gallery: selection, exports, reproduction, and the widget."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from flowopd_lib import Sampler
from flowopd_lib.evaluate import evaluate
from flowopd_lib.files import encode_webp, read_thumbnail, write_thumbnails
from flowopd_lib.widgets import SampleGallery, gallery
from flowopd_lib.widgets.gallery import TEACHER, Query, Samples, export_rows, select

MODELS = ["base", "ocr expert", "student"]


@pytest.fixture
def samples(tmp_path):
    """Four GenEval prompts and four signs under three models, with scores that differ."""
    tables, i = [], np.arange(8)
    prompts = [f"a photo of {k} red stars" for k in range(4)]
    prompts += [f'a sign that says "{k}"' for k in "EFGH"]
    for m, model in enumerate(MODELS):
        thumbnail = encode_webp(torch.full((3, 8, 8), 0.1 * m + 0.2))
        table = pd.DataFrame({"prompt": prompts, "seed": 50 + i, "DeQA": 1.0 + m + i / 10})
        table["task"] = np.where(i < 4, "geneval", "ocr")
        table["tag"] = np.where(i < 4, "count", "ocr")
        table["image"] = write_thumbnails(tmp_path / "images", m, model, [thumbnail] * 8)
        table["GenEval"] = np.where(i < 4, (i + m) % 2, np.nan)
        table["OCR"] = np.where(i < 4, np.nan, i / 10 + m * (-1.0) ** i / 100)
        tables.append(table.assign(model=model))
    return Samples(pd.concat(tables, ignore_index=True), tmp_path)


def seeds(samples, query, models=None, column=0):
    return samples.table["seed"].iloc[select(samples, query, models)[:, column]].tolist()


@pytest.mark.parametrize(
    "query, expected",
    [
        (Query(), [50, 54, 51, 55, 52, 56, 53, 57]),  # the tasks alternate
        (Query(search="RED 2"), [52]),
        (Query(search="nothing like it"), []),
        (Query(task="ocr"), [54, 55, 56, 57]),
        (Query(tag="count", search="1 red"), [51]),
        (Query(pinned=[0, 7]), [50, 57]),
        (Query(task="ocr", sort="OCR", model="student"), [57, 56, 55, 54]),
        # only on the odd seeds is the student below its teacher
        (Query(task="ocr", sort="OCR", minus=TEACHER, descending=False), [55, 57, 54, 56]),
    ],
)
def test_select_filters_and_sorts(samples, query, expected):
    assert seeds(samples, query) == expected


@pytest.mark.parametrize("descending", [True, False])
def test_sorting_keeps_the_noise_together_and_puts_missing_scores_last(samples, descending):
    query = Query(sort="OCR", descending=descending)
    order = seeds(samples, query, ["student", "base"])
    assert order == seeds(samples, query, ["student", "base"], column=1)
    assert set(order[4:]) == {50, 51, 52, 53}


def test_exports_and_regressions_have_the_differences_on_the_same_noise(samples):
    grid = select(samples, Query())[[1, 3]]
    rows = export_rows(samples, grid)
    assert rows["row"].tolist() == [0, 0, 0, 1, 1, 1] and rows["model"].tolist() == MODELS * 2
    assert rows["OCR - base"].tolist() == pytest.approx([0, 0.01, 0.02, 0, -0.01, -0.02])
    position = int(grid[0, 2])
    assert samples.badges(position) == {"DeQA": "DeQA 3.40 ▲ +2.00", "OCR": "OCR 0.42 ▲ +0.02"}
    assert samples.badges(int(grid[0, 0])) == {"DeQA": "DeQA 1.40", "OCR": "OCR 0.40"}
    description = 'student, seed 54: a sign that says "E"; DeQA 3.40, OCR 0.42'
    assert samples.describe(position) == description
    grid[0, 1] = -1
    figure = gallery.plot_contact_sheet(samples, grid, MODELS)
    assert [len(axis.images) for axis in figure.axes] == [1, 0, 1, 1, 1, 1]
    assert gallery.grid_html(samples, grid, MODELS).count("<img") == 5
    worst = gallery.find_regressions(samples, "student", "ocr expert", "OCR")
    assert sorted(worst["seed"]) == [55, 57] and np.allclose(worst["difference"], -0.01)
    assert gallery.find_regressions(samples, "student", "base", "DeQA", "ocr").empty


def test_trainings_of_one_name_are_models_of_their_own(samples):
    table = samples.table.assign(train_seed=0)
    again = table[table["model"] == "student"].assign(train_seed=1)
    without = again.assign(train_seed=2, image=None)
    both = Samples(pd.concat([table, again, without]), samples.folder)
    assert both.models == [*MODELS, "student#1"]
    with pytest.raises(FileNotFoundError, match="about.json"):
        gallery.load_samples(samples.folder)


def test_a_sample_is_made_again_to_the_bit_in_its_batch_with_its_adapter_and_guidance(
    benchmark, test_prompts, tmp_path
):
    policy = benchmark.policy(device="cpu")
    policy.load_adapter("ocr", benchmark.adapter("ocr"))
    how = {"models": {"base": None, "ocr expert#0": "ocr"}, "batch": 2, "guidance": {"ocr": 4.0}}
    table = evaluate(
        policy, test_prompts["ocr"][:3], {}, 9, Sampler(2), images=tmp_path / "images", **how
    )
    table["model"] = table["model"].str.removesuffix("#0")
    table.to_parquet(tmp_path / "samples.parquet")
    samples = gallery.load_samples(tmp_path)
    for position in (0, 2, 4, 5):
        image = gallery.redraw(policy, samples, position)
        assert encode_webp(image) == read_thumbnail(tmp_path, samples.table["image"][position])
    code = gallery.reproduction_code(samples, 3, "policy = ...")
    assert "redraw(policy, samples, 3)" in code and compile(code, "cell", "exec")
    samples.about["dtype"] = "float16"
    with pytest.raises(ValueError, match="made in float16"):
        gallery.redraw(policy, samples, 0)


# --- the widget


@pytest.fixture
def shown(samples, monkeypatch):
    monkeypatch.delenv("FLOWOPD_HEADLESS", raising=False)
    samples.about["adapters"] = dict.fromkeys(MODELS)
    return SampleGallery(samples, rows=3, folder=samples.folder)


def test_pages_turn_and_the_controls_select(shown):
    controls, scores = shown.controls, shown.samples.table["OCR"]
    assert 'alt="student, seed 50: a photo of 0 red stars; DeQA' in shown.rows[0].value
    assert "of 3; 8 rows, 24 of 24 samples" in shown.count.value
    shown.turn.value = 3
    assert "seed 53" in shown.rows[0].value and shown.rows[2].value == ""
    controls["search"].value = 'sign "G"'
    assert shown.turn.value == 1 and len(shown.grid) == 1
    controls["search"].value = ""
    controls["sort"].value, controls["descending"].value = "OCR", False
    assert scores.iloc[shown.grid[:2, 2]].tolist() == pytest.approx([0.42, 0.48])
    shown.columns.value = ("student", "base")
    assert shown.grid.shape == (8, 2)
    shown.columns.value = ()
    assert "0 rows" in shown.count.value


def test_a_sample_is_enlarged_compared_pinned_and_exported(shown):
    shown.enlarge[1].click()
    assert "student, seed 54" in shown.zoom.value and "samples, 20)" in shown.code.value
    shown.model.value = "base"
    assert "base, seed 54" in shown.zoom.value and "samples, 4)" in shown.code.value
    shown.pin.click()
    assert [button.description for button in shown.enlarge] == ["enlarge", "enlarge ★", "enlarge"]
    shown.only_pinned.value = True
    assert len(shown.grid) == 1
    for button in shown.exports:
        button.click()
    assert len(pd.read_csv(shown.folder / "gallery.csv")) == 3
    page = (shown.folder / "gallery.html").read_text()
    assert page.startswith("<!doctype") and page.count("<img") == 3 and "OCR 0.42 ▲ +0.02" in page
    assert (shown.folder / "gallery.png").read_bytes().startswith(b"\x89PNG")
    shown.pin.click()
    assert not len(shown.grid)


def test_an_error_of_a_callback_is_shown_until_the_next(shown, tmp_path):
    shown.folder = tmp_path / "missing"
    shown.exports[2].click()
    assert "missing" in shown.guard.box.value
    shown.columns.value = ("base",)
    assert shown.guard.box.value == ""


def test_headless_there_are_a_contact_sheet_and_a_table(samples, monkeypatch):
    monkeypatch.setenv("FLOWOPD_HEADLESS", "1")
    before = plt.get_fignums()
    static = SampleGallery(samples, MODELS, Query(task="ocr", sort="OCR"), rows=2)
    figure, table = static.still()
    assert len(figure.axes) == 6 and len(table) == 6 and "image" not in table
    assert plt.get_fignums() == before and not hasattr(static, "box")
