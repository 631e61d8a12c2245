"""Trainings next to a notebook: stopped, killed, resumed to the bit, and failing aloud."""

import os
import shutil
import signal
from unittest.mock import Mock

import pytest
from accelerate import Accelerator
from trainings import GRPO, OPD, START, assert_same_training, changed, launcher, metrics, wait_until

from flowopd_lib.config import read_yaml, validate
from flowopd_lib.files import load_state, read_lines, read_thumbnail
from flowopd_lib.lab import Lab, launch
from flowopd_lib.lab.jobs import run_job
from flowopd_lib.lab.launch import LaunchedJob, Worker, work
from flowopd_lib.lab.recipe import Recipe
from flowopd_lib.rewards.remote import PATIENCE, RemoteReward


def test_stopped_killed_and_resumed_is_uninterrupted_to_the_bit(workspace, tmp_path):
    """In processes of its own, and ended in this one."""
    recipe = changed(OPD, train={"iterations": 16, "lr": 1e-4, "save_every": 3})
    job = LaunchedJob(recipe, tmp_path / "cut", launcher(tmp_path))
    assert job.state == "waiting" and job.iterations == 16
    job.start()
    with pytest.raises(RuntimeError, match="running already"):
        job.start()
    wait_until(lambda: len(read_lines(job.folder / "metrics.jsonl")) >= 2 or job.state != "running")
    job.stop()
    job.wait()
    stopped = load_state(job.folder / "state.safetensors")["iteration"]
    assert job.state == "stopped" and not (job.folder / "adapter").exists()
    assert 2 <= stopped == len(metrics(job.folder)) < 16
    job.start()
    wait_until(lambda: len(metrics(job.folder)) >= stopped + 4 or job.state != "running")
    os.killpg(job.process.pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="failed"):
        job.wait()
    saved = load_state(job.folder / "state.safetensors")["iteration"]
    assert stopped < saved <= len(metrics(job.folder)) < 16
    before = (job.folder / "metrics.jsonl").read_text().splitlines()[:saved]
    for folder in ("cut", "whole"):
        run_job(recipe, tmp_path / folder, workspace)
    # what had been trained is not trained again
    assert (job.folder / "metrics.jsonl").read_text().splitlines()[:saved] == before
    assert_same_training(tmp_path / "whole", tmp_path / "cut", 16)
    written = read_yaml(tmp_path / "cut" / "recipe.yaml")
    assert validate(Recipe, written) == validate(Recipe, recipe)


def test_a_launched_recipe_that_fails_says_so_in_one_sentence(tmp_path):
    failing = LaunchedJob(changed(GRPO, sampler={"stepz": 4}), tmp_path / "x", launcher(tmp_path))
    failing.start()
    message = "failed: error: sampler: stepz: no such setting .did you mean 'steps'"
    with pytest.raises(RuntimeError, match=message):
        failing.wait()
    assert failing.state == "failed" and not (tmp_path / "x" / "metrics.jsonl").exists()
    assert not [line for line in failing.lines() if "Traceback" in line]
    shutil.rmtree(failing.folder)
    failing.stop()  # as at the end of this process: what has ended needs no log
    with pytest.raises(ValueError, match="there is no launcher 'locl' .did you mean 'local'"):
        LaunchedJob(GRPO, tmp_path, "locl")


def test_a_signal_ends_a_training_with_a_checkpoint_and_a_second_one_at_once(tmp_path, monkeypatch):
    recipe = changed(OPD, train={"iterations": 50, "save_every": 40})
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    on_step = Worker.on_step

    def interrupted(self, info):
        if info.iteration == 1:
            os.kill(os.getpid(), signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                self._on_signal(signal.SIGINT, None)
        return on_step(self, info)

    monkeypatch.setattr(Worker, "on_step", interrupted)
    try:
        work(recipe, tmp_path, "float32")
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert load_state(tmp_path / "state.safetensors")["iteration"] == len(metrics(tmp_path)) == 2


def test_a_background_training_has_validation_images_and_fails_aloud(tmp_path):
    recipe = changed(START, train={"iterations": 1, "ema": 0.0})
    lab = Lab("tiny", out=tmp_path)
    job = lab.background("start", recipe, {"every": 1, "n": 1, "steps": 1, "images": True})
    assert isinstance(job, LaunchedJob) and job.spec["name"] == "start"
    job.start()
    job.wait()
    assert job.state == "finished" and len(metrics(job.folder)) == 1
    samples = read_lines(job.folder / "validation_samples.jsonl")
    assert sorted(set(samples["iteration"])) == [0, 1]
    assert all(read_thumbnail(job.folder, image)[:4] == b"RIFF" for image in samples["image"])
    bad = lab.background("start", changed(recipe, sft={"batch": 1}))
    bad.start()
    with pytest.raises(RuntimeError, match="failed: error: .* holds another training"):
        bad.wait()


def test_processes_wait_longer_for_each_other_than_a_reward_is_tried(monkeypatch, tmp_path):
    """So that a run whose reward is gone ends with the reward's sentence, not the backend's."""
    make = Mock(wraps=Accelerator)
    monkeypatch.setattr(launch, "Accelerator", make)
    launch.make_accelerator({}, tmp_path)
    [of_group] = make.call_args.kwargs["kwargs_handlers"]
    assert of_group.timeout.total_seconds() == PATIENCE
    with pytest.raises(ValueError, match="X: 4 retries of 10000 s .* lower its timeout"):
        RemoteReward("http://127.0.0.1:9", "X", timeout=10000)
