"""The gallery: selection, exports, reproduction, and the widget."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from flowopd_lib import Sampler
from flowopd_lib.evaluate import evaluate
from flowopd_lib.files import encode_webp, write_thumbnails
from flowopd_lib.widgets import SampleGallery, gallery
from flowopd_lib.widgets.gallery import TEACHER, Query, Samples, export_rows, select

MODELS = ["base", "ocr expert", "student"]


@pytest.fixture
def samples(tmp_path):
    """Four GenEval prompts and four signs under three models, with scores that differ."""
    tables = []
    for m, model in enumerate(MODELS):
        thumbnail = encode_webp(torch.full((3, 8, 8), 0.1 * m + 0.2))
        i = np.arange(8)
        stars = [f"a photo of {k} red stars" for k in range(4)]
        table = pd.DataFrame({"prompt": [*stars, *(f'a sign that says "{k}"' for k in "EFGH")]})
        table["task"], table["tag"] = (
            np.where(i < 4, "geneval", "ocr"),
            np.where(i < 4, "count", ""),
        )
        table["seed"], table["repeat"], table["split"] = (
            50 + i,
            i % 2,
            np.where(i < 6, "test", "ood"),
        )
        table["image"] = write_thumbnails(tmp_path / "images", m, model, [thumbnail] * 8)
        table["GenEval"] = np.where(i < 4, (i + m) % 2, np.nan)
        table["OCR"] = np.where(i < 4, np.nan, i / 10 + m * (-1.0) ** i / 100)
        tables.append(table.assign(model=model, DeQA=1.0 + m + i / 10))
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
        (Query(split="ood", repeat=1), [57]),
        (Query(tag="count", prompt="a photo of 1 red stars"), [51]),
        (Query(range_of="DeQA", range=(3.25, 3.45), model="student"), [54, 53]),
        (Query(range_of="OCR", range=(0, 1)), [54, 55, 56, 57]),
        (Query(pinned=(0, 7)), [50, 57]),
        (Query(task="ocr", sort="OCR", model="student"), [57, 56, 55, 54]),
        # only on the odd seeds is the student below its teacher
        (Query(task="ocr", sort="OCR", minus=TEACHER, descending=False), [55, 57, 54, 56]),
    ],
)
def test_select_filters_and_sorts(samples, query, expected):
    assert seeds(samples, query) == expected


def test_sorting_keeps_the_noise_together_and_puts_missing_scores_last(samples):
    for descending in (True, False):
        query = Query(sort="OCR", descending=descending)
        order = seeds(samples, query, ["student", "base"])
        assert order == seeds(samples, query, ["student", "base"], column=1)
        assert set(order[4:]) == {50, 51, 52, 53}
    with pytest.raises(ValueError, match="no model 'studnt'.*did you mean 'student'"):
        select(samples, Query(model="studnt"))
    with pytest.raises(ValueError, match="no reward 'Taste'"):
        select(samples, Query(sort="Taste"))


def test_exports_and_regressions_have_the_differences_on_the_same_noise(samples):
    grid = select(samples, Query())[[1, 3]]
    rows = export_rows(samples, grid)
    assert rows["row"].tolist() == [0, 0, 0, 1, 1, 1] and rows["model"].tolist() == MODELS * 2
    assert rows["OCR - base"].tolist() == pytest.approx([0, 0.01, 0.02, 0, -0.01, -0.02])
    position = int(grid[0, 2])
    assert samples.badges(position) == {"OCR": "OCR 0.42 ▲ +0.02", "DeQA": "DeQA 3.40 ▲ +2.00"}
    description = 'student, seed 54: a sign that says "E"; OCR 0.42, DeQA 3.40'
    assert samples.describe(position) == description
    assert samples.label(grid[0]) == 'a sign that says "E"\nocr, seed 54'
    page = gallery.export_html(samples, grid, MODELS)
    assert page.count("<img") == 6 and "OCR 0.42 ▲ +0.02" in page and page.startswith("<!doctype")
    grid[0, 1] = -1
    figure = gallery.plot_contact_sheet(samples, grid, MODELS)
    assert [len(axis.images) for axis in figure.axes] == [1, 0, 1, 1, 1, 1]
    worst = gallery.find_regressions(samples, "student", "ocr expert", "OCR")
    assert sorted(worst["seed"]) == [55, 57] and np.allclose(worst["difference"], -0.01)
    assert gallery.find_regressions(samples, "student", "base", "DeQA", "ocr").empty


def test_trainings_of_one_name_are_models_of_their_own_and_missing_columns_are_named(samples):
    table = samples.table.assign(train_seed=0)
    again = table[table["model"] == "student"].assign(train_seed=1)
    without = again.assign(train_seed=2, image=None)
    both = Samples(pd.concat([table, again, without]), samples.folder)
    assert both.models == [*MODELS, "student#1"]
    with pytest.raises(ValueError, match="samples without image; evaluate with images="):
        Samples(table.drop(columns="image"), samples.folder)
    with pytest.raises(FileNotFoundError, match="about.json"):
        gallery.load_samples(samples.folder)


def test_a_sample_is_made_again_to_the_bit_in_its_batch_with_its_adapter_and_guidance(
    benchmark, test_prompts, tmp_path
):
    policy, tables = benchmark.policy(device="cpu"), {}
    policy.load_adapter("ocr", benchmark.adapter("ocr"))
    how = {"models": {"base": None, "ocr expert": "ocr"}, "batch": 2, "guidance": {"ocr": 4.0}}
    for split, prompts in {
        "test": test_prompts["ocr"][:3],
        "ood": test_prompts["ocr"][3:5],
    }.items():
        how |= {"images": tmp_path / split / "images", "show_progress": False}
        tables[split] = evaluate(policy, prompts, {}, 9, Sampler(2), **how)
    samples = gallery.merge_splits(tables, tmp_path)
    assert len(select(samples, Query(split="ood"))) == 2
    for position in (2, 5, 7, 9):
        image = gallery.redraw(policy, samples, position)
        assert encode_webp(image) == samples.image(position)
    code = gallery.reproduction_code(samples, 3, "policy = ...")
    assert "redraw(policy, samples, 3)" in code and compile(code, "cell", "exec")
    samples.about["dtype"] = "float16"
    with pytest.raises(ValueError, match="made in float16"):
        gallery.redraw(policy, samples, 0)


# --- the widget


@pytest.fixture
def shown(samples, monkeypatch):
    monkeypatch.delenv("FLOWOPD_HEADLESS", raising=False)
    return SampleGallery(samples, rows=3, folder=samples.folder)


def test_pages_turn_and_reuse_their_cells(shown):
    tile = shown.cells[0, 2].children[0]
    assert 'alt="student, seed 50: a photo of 0 red stars; GenEval' in tile.value
    assert "page 1 of 3; 8 rows, 24 of 24 samples" in shown.count.value
    cells = list(shown.cells.values())
    shown.next.click()
    assert "page 2 of 3" in shown.count.value and "seed 55" in tile.value
    shown.next.click()
    assert shown.next.disabled and len(shown.body.children) == 3 * 4
    assert list(shown.cells.values()) == cells


def test_search_prompts_sort_range_and_columns_change_the_page(shown):
    controls, scores = shown.controls, shown.samples.table["OCR"]
    controls["search"].value = 'sign "G"'
    labels = [label for label, _ in shown.prompt.options if "0 —" not in label]
    assert labels == ["all prompts", "— ocr, ood: 1 —", 'a sign that says "G"']
    assert len(shown.grid) == 1
    controls["search"].value = "no such"
    assert "nothing passes" in shown.count.value
    controls["search"].value = ""
    shown.prompt.value = ("ocr", "ood", "")
    assert len(shown.grid) == 2
    shown.prompt.value = ("", "", "")
    controls["sort"].value, controls["descending"].value, controls["repeat"].value = "OCR", False, 1
    assert scores.iloc[shown.grid[:2, 2]].tolist() == pytest.approx([0.48, 0.68])
    controls["range_of"].value = "OCR"
    controls["range"].value = (0.5, controls["range"].max)
    assert scores.iloc[shown.grid[:, 2]].tolist() == pytest.approx([0.68])
    shown.columns.value = ("student", "base")
    assert shown.grid.shape == (1, 2)


def test_a_sample_is_enlarged_compared_pinned_and_exported(shown):
    enlarge = shown.cells[1, 2].children[1]
    enlarge.click()
    assert "A: student" in shown.zoom.value and shown.zoom.value.count("<img") == 2
    shown.swipe.value, shown.other.value = 40, "ocr expert"
    assert "inset(0 60% 0 0)" in shown.zoom.value and "B: ocr expert" in shown.zoom.value
    shown.pin.click()
    assert enlarge.description == "enlarge ★"
    shown.only_pinned.value = True
    assert len(shown.grid) == 1
    for button in shown.exports:
        button.click()
    assert len(pd.read_csv(shown.folder / "gallery.csv")) == 3
    assert (shown.folder / "gallery.html").read_text().count("<img") == 3
    assert (shown.folder / "gallery.png").read_bytes().startswith(b"\x89PNG")
    shown.pin.click()
    assert not len(shown.grid)


def test_an_error_of_a_callback_is_shown_until_the_next(shown):
    shown.columns.value = ()
    assert "no models are chosen" in shown.guard.box.value
    shown.columns.value = ("base",)
    assert shown.guard.box.value == ""


def test_headless_there_are_a_contact_sheet_and_a_table(samples, monkeypatch):
    monkeypatch.setenv("FLOWOPD_HEADLESS", "1")
    before = plt.get_fignums()
    static = SampleGallery(samples, MODELS, Query(task="ocr", sort="OCR"), rows=2)
    figure, table = static.still()
    assert len(figure.axes) == 6 and len(table) == 6 and "image" not in table
    assert plt.get_fignums() == before and not hasattr(static, "box")
