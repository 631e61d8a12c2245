"""The widgets, worked as a hand would, and what stands in their place headless."""

import threading
import time

import pandas as pd
import pytest
from test_launch import until
from test_train import sft

from flowopd_lib import (
    FlowPolicy,
    InProcess,
    Look,
    Playground,
    Prompt,
    SampleGallery,
    Sampler,
    TrainConfig,
    TrainingMonitor,
    TrajectoryExplorer,
    load_benchmark,
)
from flowopd_lib.bench.gallery import MODELS, made_up_samples, measure
from flowopd_lib.plots.gallery import Query, Samples
from flowopd_lib.plots.widgets.common import Guard

BENCHMARK = load_benchmark()


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    return made_up_samples(tmp_path_factory.mktemp("made_up"), 100)


@pytest.fixture
def gallery(samples, tmp_path, monkeypatch):
    monkeypatch.delenv("FLOWOPD_HEADLESS", raising=False)
    return SampleGallery(samples, rows=3, setup="policy = ...", out=tmp_path)


def test_a_page_shows_pictures_with_alt_texts_and_badges(gallery, samples):
    assert gallery.models == ["base", "ocr expert", "merged", "student"] and gallery.grid.shape == (
        20,
        4,
    )
    tile = gallery.cells[0, 3][0].value
    assert (
        'alt="student, seed 0: a sign that says &quot;0000&quot;; OCR' in tile
        and "▲ +" in tile + gallery.cells[1, 3][0].value
    )
    assert (
        "jp-ui-font-color1" in gallery.box.children[0].value
        and "of 7; 20 rows, 80 of 100 samples" in gallery.count.value
    )
    widgets = list(gallery.cells.values())
    gallery.forth.click()
    assert (
        gallery.number == 1 and gallery.at.value == 2 and "seed 3" in gallery.cells[0, 3][0].value
    )
    assert list(gallery.cells.values()) == widgets, "tiles are used again"
    gallery.at.value = 7
    assert gallery.forth.disabled and len(gallery.page) == 2 and len(gallery.body.children) == 3 * 5


def test_search_filter_sort(gallery, samples):
    gallery.search.value = "sign 0009"
    assert [o for o, _ in gallery.prompt.options] == [
        "all prompts",
        "— ocr: 1 —",
        'a sign that says "0009"',
        "— geneval: 0 —",
    ] and len(gallery.grid) == 1
    gallery.search.value = "no such"
    assert "nothing passes" in gallery.count.value
    gallery.search.value = ""
    gallery.prompt.value = ("ocr", "", "")
    gallery.sort.value, gallery.descending.value = "OCR", False
    assert (
        samples.table["OCR"].iloc[gallery.grid[:, 3]].is_monotonic_increasing
        and len(gallery.grid) == 7
    )
    gallery.reward.value = "OCR"
    gallery.range.value = (0.5, gallery.range.max)
    assert (samples.table["OCR"].iloc[gallery.grid[:, 3]] >= 0.5).all() and len(gallery.grid) < 7
    gallery.columns.value = ("student", "base")
    assert gallery.grid.shape[1] == 2


def test_look_swipe_pin_and_export(gallery, tmp_path):
    gallery.cells[1, 3][1].click()
    assert (
        "A: student" in gallery.zoom.value
        and gallery.zoom.value.count("<img") == 2
        and "inset(0 100% 0 0)" in gallery.zoom.value
    )
    gallery.swipe.value, gallery.other.value = 40, "merged"
    assert "inset(0 60% 0 0)" in gallery.zoom.value and "B: merged" in gallery.zoom.value
    gallery.pin.click()
    assert gallery.cells[1, 3][1].description == "look ★"
    gallery.only_pinned.value = True
    assert len(gallery.grid) == 1
    gallery.as_csv.click()
    gallery.as_sheet.click()
    assert (
        len(pd.read_csv(tmp_path / "gallery.csv")) == 4
        and (tmp_path / "gallery.png").stat().st_size > 1000
    )
    gallery.pin.click()
    assert not len(gallery.grid)


def test_an_error_of_a_callback_is_shown_and_goes_away(gallery):
    gallery.columns.value = ()
    assert (
        "no models are chosen" in gallery.guard.box.value
        and 'role="alert"' in gallery.guard.box.value
    )
    gallery.columns.value = ("base",)
    assert gallery.guard.box.value == ""
    gallery.cells[0, 0][1].click()
    gallery.code.click()  # made-up samples have no about.json
    assert "about.json" in gallery.guard.box.value


def test_headless_a_sheet_and_a_table(samples, monkeypatch, capsys):
    monkeypatch.setenv("FLOWOPD_HEADLESS", "1")
    shown = []
    monkeypatch.setattr(
        "flowopd_lib.plots.widgets.gallery.display", lambda *things: shown.extend(things)
    )
    gallery = SampleGallery(samples, MODELS, Query(task="ocr", sort="OCR"), rows=2)
    gallery._ipython_display_()
    assert shown[0].width > 600 and len(shown[1]) == 10 and not hasattr(gallery, "box")
    assert len(gallery.table()) == 35


def test_the_benchmark_measures_every_change(samples):
    spent = measure(samples, 2)
    assert len(spent) == 7 and (spent["median ms"] < 200).all()


@pytest.fixture
def live(monkeypatch):
    monkeypatch.delenv("FLOWOPD_HEADLESS", raising=False)


@pytest.fixture
def shown(monkeypatch):
    """Headless, with what is displayed kept."""
    monkeypatch.setenv("FLOWOPD_HEADLESS", "1")
    things = []
    for name in ("explorer", "monitor", "playground"):
        monkeypatch.setattr(
            f"flowopd_lib.plots.widgets.{name}.display", lambda *them: things.extend(them)
        )
    return things


def test_the_explorer_scrubs_and_walks_again(live, policy, test_prompts):
    prompts = [test_prompts["ocr"][0], test_prompts["geneval"][0]]
    explorer = TrajectoryExplorer(
        policy, {"base": None, "same": None}, prompts, 4, Sampler(4, "sde"), "base"
    )
    assert (
        "step 1 of 4" in explorer.said.value
        and "σ 1.00" in explorer.said.value
        and explorer.pictures.value.count("<img") == 3
    )
    explorer.step.value = 2
    assert (
        "step 3 of 4" in explorer.said.value
        and "step 3 of 4" in explorer.pictures.value
        and prompts[0].text[:6] in explorer.pictures.value
    )
    assert (
        explorer.bars.value.count("<tr") == 5
        and "aria-current=step><td>3</td>" in explorer.bars.value
        and "no noise" in explorer.bars.value
    )
    before = explorer.walk
    explorer.kind.value = "ode"
    assert (
        "as if with the SDE" in explorer.bars.value
        and explorer.walk is not before
        and explorer.step.value == 2
    )
    explorer.noise.value, explorer.seed.value, explorer.prompt.value, explorer.steps.value = (
        0.3,
        5,
        1,
        3,
    )
    assert (
        explorer.walk.seed,
        explorer.walk.sampler.noise_level,
        explorer.walk.prompt,
        explorer.step.max,
    ) == (5, 0.3, prompts[1], 2)
    explorer.teachers.value = ()
    assert explorer.bars.value == "" and explorer.guard.box.value == ""
    explorer.kind.value, explorer.noise.value = "cps", 1.2
    assert "noise level of CPS lies in [0, 1]" in explorer.guard.box.value
    with pytest.raises(ValueError, match="no prompt to walk"):
        TrajectoryExplorer(policy, {"base": None}, [])


def test_the_playground_tries_what_is_typed(live, policy, rewards, test_prompts):
    playground = Playground(
        policy,
        {"base": None, "same": None},
        rewards,
        'a sign that says "GWEN"',
        test_prompts["geneval"],
        1,
        Sampler(4),
    )
    assert (
        playground.body.value.count("<img") == 2
        and "OCR" in playground.body.value
        and "double quotes" in playground.said.value
    )
    assert 'alt="base, seed 1: a sign that says &quot;GWEN&quot;; OCR' in playground.body.value
    before = playground.body.value
    playground.marks.value = False
    assert playground.body.value != before
    playground.text.value = test_prompts["geneval"][0].text
    assert "A known geneval prompt" in playground.said.value and "GenEval" in playground.body.value
    playground.next.click()
    assert playground.seed.value == 2 == playground.trials[0].seed
    playground.chosen.value = ("same",)
    assert playground.body.value.count("<img") == 1
    playground.text.value = ""
    assert "there is no prompt" in playground.guard.box.value and playground.said.value == ""


def test_the_monitor_follows_stops_and_goes_on(live, tmp_path):
    policy = FlowPolicy(BENCHMARK.base)
    policy.add_adapter("student", rank=4, alpha=8)
    look = Look([Prompt("a photo of one red star", "pickscore")], every=1, sampler=Sampler(2))
    monitor = TrainingMonitor(
        InProcess(policy, sft(policy), tmp_path / "student", TrainConfig(10**6, lr=1e-3), look=look)
    )
    until(
        lambda: (
            'alt="Curves of student' in monitor.curves.value
            and monitor.samples.value.count("<img") >= 2
        )
    )
    assert (
        "running: student" in monitor.said.value
        and "iteration 0" in monitor.samples.value
        and monitor.go_on.disabled
    )
    monitor.stop.click()
    until(lambda: "stopped: student" in monitor.said.value and not monitor.go_on.disabled)
    done = len(monitor.table())
    assert (
        (tmp_path / "student" / "state.safetensors").is_file()
        and monitor.stop.disabled
        and monitor.bar.value == done
    )
    monitor.go_on.click()
    until(lambda: len(monitor.table()) > done)
    monitor.stop.click()
    until(lambda: not monitor.go_on.disabled)
    # another lr than the checkpoint's
    monitor.training._arguments = (
        *monitor.training._arguments[:3],
        TrainConfig(9, lr=2.0),
        "student",
    )
    monitor.go_on.click()
    until(lambda: "train.lr was 0.001 and is 2.0" in monitor.following.box.value)
    assert 'role="alert"' in monitor.following.box.value


def test_headless_figures_and_tables(shown, policy, rewards, test_prompts, tmp_path):
    TrajectoryExplorer(
        policy, {"base": None, "same": None}, test_prompts["ocr"][:1], 0, Sampler(3), "base"
    )._ipython_display_()
    assert len(shown[0].axes) == 3 * 3 + 1 and list(shown[1]) == ["sigma", "same"]
    Playground(
        policy, {"base": None}, rewards, "a photo of one red star", (), 0, Sampler(3)
    )._ipython_display_()
    assert len(shown[2].axes) == 1 and {"PickScore", "read", "seen"} <= set(shown[3])
    policy = FlowPolicy(BENCHMARK.base)
    policy.add_adapter("student", rank=4, alpha=8)
    look = Look(test_prompts["ocr"][:2], every=1, sampler=Sampler(2))
    monitor = TrainingMonitor(
        InProcess(policy, sft(policy), tmp_path, TrainConfig(2, lr=1e-3), look=look)
    )
    monitor._ipython_display_()
    assert (
        "2 of 2 iterations" in shown[4]._suptitle.get_text()
        and shown[5].width > 300
        and len(shown[6]) == 2
    )
    with pytest.raises(ValueError, match="at least one metric"):
        TrainingMonitor(monitor.training, [])


def test_prompts_are_grouped_by_split_and_one_seed_can_be_kept(samples, live):
    table = samples.table.assign(
        split=["ood" if i % 2 else "test" for i in range(20)] * 5,
        repeat=[i % 4 // 2 for i in range(20)] * 5,
    )
    gallery = SampleGallery(Samples(table, samples.folder))
    heads = [label for label, value in gallery.prompt.options if label.startswith("—")]
    assert sorted(heads) == [
        "— geneval, ood: 7 —",
        "— geneval, test: 6 —",
        "— ocr, ood: 3 —",
        "— ocr, test: 4 —",
    ]
    gallery.prompt.value = ("ocr", "ood", "")
    assert len(gallery.grid) == 3
    gallery.prompt.value = ("", "", "")
    gallery.repeat.value = 1
    assert len(gallery.grid) == 10 and set(table["repeat"].iloc[gallery.grid[:, 0]]) == {1}


def test_callbacks_in_several_threads_take_turns_and_none_is_lost():
    guard, inside, most, done = Guard(), [], [], []

    def act():
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.02)
        guard(lambda: done.append("never: set off by a callback"))()
        inside.pop()
        done.append("yes")

    threads = [threading.Thread(target=guard(act)) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert done == ["yes"] * 5 and max(most) == 1 and guard.box.value == ""
