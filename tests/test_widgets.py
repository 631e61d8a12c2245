"""The gallery's widgets, worked as a hand would, and what stands in their place headless."""
import pandas as pd
import pytest

from flowopd_lib import SampleGallery
from flowopd_lib.bench_gallery import MODELS, made_up_samples, measure
from flowopd_lib.gallery import Query


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    return made_up_samples(tmp_path_factory.mktemp("made_up"), 100)


@pytest.fixture
def gallery(samples, tmp_path, monkeypatch):
    monkeypatch.delenv("FLOWOPD_HEADLESS", raising=False)
    return SampleGallery(samples, rows=3, setup="policy = ...", out=tmp_path)


def test_a_page_shows_pictures_with_alt_texts_and_badges(gallery, samples):
    assert gallery.models == ["base", "ocr expert", "merged", "student"] and gallery.grid.shape == (20, 4)
    tile = gallery.cells[0, 3][0].value
    assert 'alt="student, seed 0: a sign that says &quot;0000&quot;; OCR' in tile and "▲ +" in tile + gallery.cells[1, 3][0].value
    assert "jp-ui-font-color1" in gallery.box.children[0].value and "of 7; 20 rows, 80 of 100 samples" in gallery.count.value
    widgets = list(gallery.cells.values())
    gallery.forth.click()
    assert gallery.number == 1 and gallery.at.value == 2 and "seed 3" in gallery.cells[0, 3][0].value
    assert list(gallery.cells.values()) == widgets, "tiles are used again"
    gallery.at.value = 7
    assert gallery.forth.disabled and len(gallery.page) == 2 and len(gallery.body.children) == 3 * 5


def test_search_filter_sort(gallery, samples):
    gallery.search.value = "sign 0009"
    assert [o for o, _ in gallery.prompt.options] == ["all prompts", "— ocr: 1 —", 'a sign that says "0009"', "— geneval: 0 —"] and len(gallery.grid) == 1
    gallery.search.value = "no such"
    assert "nothing passes" in gallery.count.value
    gallery.search.value = ""
    gallery.prompt.value = ("ocr", "")
    gallery.sort.value, gallery.descending.value = "OCR", False
    assert samples.table["OCR"].iloc[gallery.grid[:, 3]].is_monotonic_increasing and len(gallery.grid) == 7
    gallery.judge.value = "OCR"
    gallery.range.value = (.5, gallery.range.max)
    assert (samples.table["OCR"].iloc[gallery.grid[:, 3]] >= .5).all() and len(gallery.grid) < 7
    gallery.columns.value = ("student", "base")
    assert gallery.grid.shape[1] == 2


def test_look_swipe_pin_and_export(gallery, tmp_path):
    gallery.cells[1, 3][1].click()
    assert "A: student" in gallery.zoom.value and gallery.zoom.value.count("<img") == 2 and "inset(0 100% 0 0)" in gallery.zoom.value
    gallery.swipe.value, gallery.other.value = 40, "merged"
    assert "inset(0 60% 0 0)" in gallery.zoom.value and "B: merged" in gallery.zoom.value
    gallery.pin.click()
    assert gallery.cells[1, 3][1].description == "look ★"
    gallery.only_pinned.value = True
    assert len(gallery.grid) == 1
    gallery.as_csv.click()
    gallery.as_sheet.click()
    assert len(pd.read_csv(tmp_path / "gallery.csv")) == 4 and (tmp_path / "gallery.png").stat().st_size > 1000
    gallery.pin.click()
    assert not len(gallery.grid)


def test_an_error_of_a_callback_is_shown_and_goes_away(gallery):
    gallery.columns.value = ()
    assert "no models are chosen" in gallery.guard.box.value and 'role="alert"' in gallery.guard.box.value
    gallery.columns.value = ("base",)
    assert gallery.guard.box.value == ""
    gallery.cells[0, 0][1].click()
    gallery.code.click()        # made-up samples have no about.json
    assert "about.json" in gallery.guard.box.value


def test_headless_a_sheet_and_a_table(samples, monkeypatch, capsys):
    monkeypatch.setenv("FLOWOPD_HEADLESS", "1")
    shown = []
    monkeypatch.setattr("flowopd_lib.widgets.gallery.display", lambda *things: shown.extend(things))
    gallery = SampleGallery(samples, MODELS, Query(task="ocr", sort="OCR"), rows=2)
    gallery._ipython_display_()
    assert shown[0].width > 600 and len(shown[1]) == 10 and not hasattr(gallery, "box")
    assert len(gallery.table()) == 35


def test_the_benchmark_measures_every_change(samples):
    spent = measure(samples, 2)
    assert len(spent) == 7 and (spent["median ms"] < 200).all()
