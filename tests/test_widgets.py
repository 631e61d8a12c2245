"""The trajectory player, the playground and the monitor, operated as a user would, and headless."""

import base64
import json
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import ipywidgets as ipw
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from small_policy import SmallPolicy

from flowopd_lib import FlowPolicy, Prompt, Sampler, trajectory, transition
from flowopd_lib.files import append_lines, encode_webp, write_thumbnails
from flowopd_lib.stats import rewards_in
from flowopd_lib.widgets import common, monitor, sampling
from flowopd_lib.widgets.monitor import TrainingMonitor
from flowopd_lib.widgets.sampling import (
    Playground,
    TrajectoryPlayer,
    parse_prompt,
    record_trajectory,
    try_prompt,
)

PROMPT = Prompt("a photo of one red star", "geneval")


@pytest.fixture(autouse=True)
def live(monkeypatch):
    monkeypatch.delenv("FLOWOPD_HEADLESS", raising=False)


def wait_until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


# --- the trajectory player


@pytest.mark.parametrize("kind", ["ode", "sde", "cps"])
def test_the_kl_of_a_step_is_that_of_the_two_gaussians(kind):
    policy = SmallPolicy(2, teacher=torch.tensor([[0.3, -0.2], [0.1, 0.4]]))
    sampler, models = Sampler(5, kind, 0.6), {"base": None, "expert": "teacher"}
    images, table = record_trajectory(policy, PROMPT, 3, sampler, models, "base")
    clean, noisy, difference = images.values()
    assert clean.shape == noisy.shape == difference.shape == (5, 3, 1, 1)
    for step, kl in zip(trajectory(policy, [PROMPT], [3], sampler), table["expert"]):
        if step.sigma_next == 0:
            assert np.isnan(kl), "the last step has no noise"
            continue
        v_teacher = policy.velocity(step.x_t, step.sigma, None, adapter="teacher")
        args = step.sigma, step.sigma_next, "sde" if kind == "ode" else kind, 0.6
        (mean, std), (other, _) = (transition(step.x_t, v, *args) for v in (step.v, v_teacher))
        expected = (mean - other).square().sum().item() / (2 * float(std) ** 2)
        assert kl == pytest.approx(expected, rel=1e-4)


def test_trajectories_recorded_in_several_threads_do_not_mix_adapters(benchmark):
    policy = FlowPolicy(benchmark.base)
    models = {name: name for name in benchmark.experts}
    for name in models:
        policy.load_adapter(name, benchmark.adapter(name))

    def record(_):
        return record_trajectory(policy, PROMPT, 0, Sampler(4, "sde"), models, "ocr")[1]

    alone = record(0)
    with ThreadPoolExecutor(2) as threads:
        for table in threads.map(record, range(2)):
            pd.testing.assert_frame_equal(table, alone)


def test_the_player_shows_each_step_and_samples_again(policy, test_prompts):
    prompts = [test_prompts["ocr"][0], test_prompts["geneval"][0]]
    models = {"base": None, "same": None}
    player = TrajectoryPlayer(policy, models, prompts, 4, Sampler(4, "sde"), "base")
    assert "step 1 of 4, σ 1.00" in player.shown.value and player.shown.value.count("<img") == 3
    assert "no noise" in player.table.value
    player.step.value = 3
    assert "predicted clean image, step 3 of 4" in player.shown.value
    player.kind.value = "ode"
    assert "as if with the SDE" in player.table.value and "ODE: a sign" in player.shown.value
    player.noise.value, player.seed.value, player.prompt.value = 0.3, 5, prompts[1]
    assert player.sampled[:2] == (prompts[1], 5) and player.sampled[2].noise_level == 0.3
    assert "step 3 of 4" in player.shown.value and player.guard.box.value == ""
    player.kind.value, player.noise.value = "cps", 1.2
    assert "noise level of CPS lies in [0, 1]" in player.guard.box.value


@pytest.mark.fast
def test_the_player_and_the_playground_sample_an_adapter_with_its_own_guidance(monkeypatch):
    policy, used = SmallPolicy(2, expert=torch.ones(2, 2)), set()
    velocity = policy.velocity

    def record(x, sigma, text, guidance=1.0, adapter=None):
        used.add((adapter, guidance))
        return velocity(x, sigma, text, guidance, adapter)

    monkeypatch.setattr(policy, "velocity", record)
    models, own = {"base": None, "expert": "expert"}, {"expert": 1.0}
    for model in models:
        record_trajectory(policy, PROMPT, 0, Sampler(2, "sde", guidance=3.0), models, model, own)
        assert used == {(None, 3.0), ("expert", 1.0)}
        used.clear()
    try_prompt(policy, PROMPT, {}, models, Sampler(2, guidance=3.0), 0, own)
    assert used == {(None, 3.0), ("expert", 1.0)}


# --- the playground


def test_a_typed_prompt_gets_the_metadata_of_the_one_that_is_known(benchmark):
    known = sampling.list_prompts(benchmark)
    geneval = next(p for p in known if p.task == "geneval")
    assert parse_prompt(f"  {geneval.text.upper()} ", known) is geneval
    assert parse_prompt("a photo of  a frog", known) == Prompt("a photo of a frog", "own")


def test_every_reward_reports_what_it_found(policy, rewards, test_prompts):
    red = next(p for p in test_prompts["geneval"] if p.tag == "single_object")
    images, table = try_prompt(policy, red, rewards, {"a": None, "b": None}, Sampler(8), 1)
    assert torch.equal(*images) and table["model"].tolist() == ["a", "b"]
    assert rewards_in(table) == ["GenEval", "PickScore", "DeQA"]
    first = table.iloc[0]
    assert "detected: " in first["findings"]
    assert (first["GenEval"] == 1) == first["findings"].endswith("; correct")
    sign = parse_prompt('a sign that says "GWEN"')
    images, table = try_prompt(policy, sign, rewards, {"base": None}, Sampler(8), 1)
    assert rewards_in(table) == ["OCR", "PickScore", "DeQA"]
    assert table["findings"][0].startswith("read: ")
    images, table = try_prompt(policy, red, {"DeQA": rewards["DeQA"]}, {"base": None}, Sampler(2))
    assert rewards_in(table) == ["DeQA"] and table["findings"][0] == ""


def test_the_playground_tries_what_is_typed(policy, rewards, test_prompts):
    models, known = {"base": None, "same": None}, test_prompts["geneval"]
    sign = 'a sign that says "GWEN"'
    widget = Playground(policy, models, rewards, sign, known, 1, Sampler(4))
    body = widget.body.value
    assert body.count("<img") == 2 and "Scored as own prompt by OCR" in body
    assert 'alt="base: a sign that says &quot;GWEN&quot; (seed 1); OCR' in body
    widget.text.value = known[0].text
    assert "Scored as geneval prompt by GenEval" in widget.body.value
    widget.seed.value = 2
    assert "(seed 2)" in widget.body.value and widget.guard.box.value == ""


def test_headless_there_are_a_figure_and_a_table(monkeypatch, policy, rewards, test_prompts):
    monkeypatch.setenv("FLOWOPD_HEADLESS", "1")
    models = {"base": None, "same": None}
    player = TrajectoryPlayer(policy, models, test_prompts["ocr"], 0, Sampler(3), "base")
    figure, table = player.still()
    assert len(figure.axes) == 3 * 3 and list(table) == ["sigma", "same"]
    widget = Playground(policy, {"base": None}, rewards, PROMPT.text, (), 0, Sampler(3))
    figure, table = widget.still()
    assert len(figure.axes) == 1 and {"PickScore", "findings"} <= set(table)


# --- the monitor


class MadeUpTraining:
    """Writes an iteration every few milliseconds, and a validation sample before two of them."""

    def __init__(self, folder, iterations):
        self.folder, self.iterations, self.done = folder, iterations, 0
        self.state, self.error, self.stopping = "waiting", "", False

    def start(self):
        self.state, self.stopping = "running", False
        threading.Thread(target=self.run, daemon=True).start()

    def stop(self):
        self.stopping = True

    def run(self):
        while self.done < self.iterations and not self.stopping:
            if self.done in (0, 2):
                image = [encode_webp(torch.rand(3, 8, 8))]
                (path,) = write_thumbnails(self.folder / "images", self.done, "student", image)
                row = {"model": f"iteration {self.done}", "task": "ocr", "tag": "", "seed": 0}
                row |= {"prompt": "a sign", "image": path, "OCR": 0.5 + self.done / 10}
                row |= {"iteration": self.done, "seconds": 0.0}
                append_lines(self.folder / "validation_samples.jsonl", json.dumps(row) + "\n")
            row = {"iteration": self.done, "loss": 1 / (1 + self.done), "seconds": self.done / 10}
            append_lines(self.folder / "metrics.jsonl", json.dumps(row) + "\n")
            self.done += 1
            time.sleep(0.01)
        self.state = "stopped" if self.stopping else "failed" if self.error else "finished"


def test_the_monitor_follows_stops_and_resumes(tmp_path, monkeypatch):
    monkeypatch.setattr(monitor, "POLL_SECONDS", 0.05)
    training = MadeUpTraining(tmp_path, 10**6)
    shown = TrainingMonitor(training, title="student")
    wait_until(lambda: "iteration 2" in shown.samples.value)
    assert 'alt="Curves of student' in shown.curves.value and shown.resume.disabled
    assert "running: student" in shown.status.value and "OCR 0.70 ▲ +0.20" in shown.samples.value
    shown.stop.click()
    wait_until(lambda: not shown.resume.disabled)
    done = len(shown.metrics())
    assert f"stopped: student: {done} of" in shown.status.value
    shown.resume.click()
    wait_until(lambda: len(shown.metrics()) > done)
    training.error, training.iterations = "the disk is full", training.done
    wait_until(lambda: "the disk is full" in shown.guard.box.value)
    wait_until(lambda: not shown.resume.disabled)


def test_headless_a_training_runs_to_its_end(monkeypatch, tmp_path):
    monkeypatch.setenv("FLOWOPD_HEADLESS", "1")
    figure, rows, sheet = TrainingMonitor(MadeUpTraining(tmp_path, 4)).still()
    assert "4 of 4 iterations" in figure._suptitle.get_text() and len(rows) == 4
    assert len(sheet.axes) == 2
    failed = MadeUpTraining(tmp_path, 0)
    failed.error = "the disk is full"
    with pytest.raises(RuntimeError, match="failed: the disk is full"):
        TrainingMonitor(failed).wait()


# --- callbacks and display


def test_callbacks_of_several_threads_run_one_at_a_time_and_do_not_trigger_each_other():
    guard, inside, done = common.Guard(), [], []

    def action():
        inside.append(1)
        time.sleep(0.02)
        guard(lambda: done.append("triggered by a callback"))()
        done.append(len(inside))
        inside.pop()

    with ThreadPoolExecutor(5) as threads:
        for _ in range(5):
            threads.submit(guard(action))
    assert done == [1] * 5 and guard.box.value == ""


@pytest.mark.parametrize("kernel", [True, False])
def test_the_widget_is_displayed_only_where_a_kernel_drives_it(monkeypatch, kernel):
    shown, viewer, figure = [], common.Viewer(), plt.figure()
    viewer.box, viewer.still = ipw.HTML(), lambda: [figure, "a table"]
    monkeypatch.setattr(common, "get_ipython", lambda: SimpleNamespace(kernel=kernel))
    monkeypatch.setattr(common, "display", lambda item, raw=False: shown.append(item))
    viewer._ipython_display_()
    assert not plt.fignum_exists(figure.number)
    if not kernel:
        assert shown == [figure, "a table"]
        return
    [bundle] = shown  # with a still image for where there are no widgets
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert base64.b64decode(bundle["image/png"]).startswith(b"\x89PNG")


def test_the_style_takes_all_colours_from_jupyterlabs_theme():
    values = re.findall(r"(?:color|background|border|outline)[\w-]*:([^;]+);", common.STYLE)
    colored = [value for value in values if re.search(r"#[0-9a-f]{3}|rgb|white|black", value)]
    assert len(values) > 5 and not colored
