"""Trainings beside a notebook: followed by their folder, stopped with a checkpoint, gone on with to the
bit."""

import time

import pytest
import yaml
from test_train import ENVIRONMENT, GRPO, SFT_START, assert_same_training, sft

from flowopd_lib import (
    FlowPolicy,
    InProcess,
    Launched,
    Look,
    Prompt,
    Sampler,
    TrainConfig,
    load_benchmark,
)
from flowopd_lib.files import read_lines
from flowopd_lib.jobs.launch import some_prompts
from flowopd_lib.jobs.recipes import build
from flowopd_lib.plots.looks import looks_of

BENCHMARK = load_benchmark()

RECIPE = {**GRPO, "train": {"iterations": 4, "lr": 1e-3, "save_every": 100}}


def until(condition, seconds=1800):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "waited in vain"
        time.sleep(0.05)


def test_stopped_in_a_process_of_its_own_and_gone_on_with_is_uninterrupted_to_the_bit(
    tmp_path, monkeypatch
):
    # threads that wait by spinning starve each other on a busy machine
    for name, value in {**ENVIRONMENT, "OMP_WAIT_POLICY": "PASSIVE"}.items():
        monkeypatch.setenv(name, value)
    cut = Launched(RECIPE, tmp_path / "cut", "local", look=2)
    whole = Launched(RECIPE, tmp_path / "whole", "local")
    assert cut.state == "waiting" and cut.iterations == 4
    cut.start()
    with pytest.raises(RuntimeError, match="running already"):
        cut.start()
    until(
        lambda: len(read_lines(tmp_path / "cut" / "metrics.jsonl")) >= 2 or cut.state != "running"
    )
    cut.stop()
    cut.wait()
    assert cut.state == "stopped" and not (tmp_path / "cut" / "adapter").exists()
    assert 2 <= len(read_lines(tmp_path / "cut" / "metrics.jsonl")) < 4
    cut.start()
    cut.wait()
    whole.start()
    whole.wait()
    assert (
        cut.state == whole.state == "over"
        and (tmp_path / "cut" / "adapter" / "adapter_model.safetensors").is_file()
    )
    assert_same_training(tmp_path / "whole", tmp_path / "cut", 4)
    looks = looks_of(tmp_path / "cut")
    assert looks.models == [f"iteration {i}" for i in (0, 2, 4)] and len(looks.table) == 3 * 6
    assert looks.scores(0)[0][0] == "OCR" and looks.picture(0)[:4] == b"RIFF"
    assert looks_of(tmp_path / "whole") is None


def test_a_supervised_start_under_its_own_name_is_looked_at(tmp_path, monkeypatch):
    for name, value in {**ENVIRONMENT, "OMP_WAIT_POLICY": "PASSIVE"}.items():
        monkeypatch.setenv(name, value)
    start = Launched({**SFT_START, "name": "start"}, tmp_path, "local", look=2)
    start.start()
    start.wait()
    looks = looks_of(tmp_path)
    assert start.state == "over" and looks.models == ["iteration 0", "iteration 2"]
    assert looks.table["task"].value_counts().to_dict() == {"geneval": 4, "ocr": 4, "pickscore": 4}


def test_a_recipe_that_fails_says_so_in_one_sentence(tmp_path):
    failing = Launched({**RECIPE, "sampler": {"stepz": 4}}, tmp_path, "local")
    failing.start()
    with pytest.raises(
        RuntimeError, match="failed: error: sampler has no 'stepz' .did you mean 'steps'"
    ):
        failing.wait()
    assert failing.state == "failed"
    with pytest.raises(
        ValueError, match="there is no launcher 'locl' .did you mean 'local'.*; there are "
    ):
        Launched(RECIPE, tmp_path, "locl")
    (tmp_path / "mine.yaml").write_text("command: exec $PYTHON -m flowopd_lib.jobs\n")
    with pytest.raises(ValueError, match='mine.yaml needs a command in which "\\$@" stands for'):
        Launched(RECIPE, tmp_path, str(tmp_path / "mine.yaml"))


def test_in_a_thread_it_stops_goes_on_and_fails_aloud(tmp_path):
    policy = FlowPolicy(BENCHMARK.base)
    policy.add_adapter("student", rank=4, alpha=8)
    look = Look([Prompt("a photo of one red star", "pickscore")], every=1, sampler=Sampler(2))
    training = InProcess(
        policy, sft(policy), tmp_path / "a", TrainConfig(10**6, lr=1e-3, ema=0.0), look=look
    )
    training.start()
    with pytest.raises(RuntimeError, match="running already"):
        training.start()
    until(lambda: len(read_lines(tmp_path / "a" / "metrics.jsonl")) >= 2)
    training.stop()
    training.wait()
    done = len(read_lines(tmp_path / "a" / "metrics.jsonl"))
    assert training.state == "stopped" and (tmp_path / "a" / "state.safetensors").is_file()
    assert looks_of(tmp_path / "a").models == [f"iteration {i}" for i in range(done + 1)]
    again = InProcess(policy, sft(policy), tmp_path / "a", TrainConfig(done + 1, lr=1e-3, ema=0.0))
    again.start()
    again.wait()
    assert again.state == "over" and len(read_lines(tmp_path / "a" / "metrics.jsonl")) == done + 1
    bad = InProcess(policy, sft(policy, float("nan")), tmp_path / "b", TrainConfig(2, lr=1e-3))
    bad.start()
    with pytest.raises(RuntimeError, match="failed: TrainingDiverged: iteration 0"):
        bad.wait()


def test_a_file_another_is_writing_is_read_up_to_its_last_whole_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert not len(read_lines(path))
    path.write_text('{"iteration": 0, "loss"')
    assert not len(read_lines(path))
    path.write_text('{"iteration": 0, "loss": 2}\n{"iter')
    assert read_lines(path).to_dict("records") == [{"iteration": 0, "loss": 2}]


def test_some_prompts_are_different_ones_of_every_task():
    recipe = yaml.safe_load(
        yaml.safe_dump(
            {
                **GRPO,
                "schedule": {
                    "tasks": ["geneval", "ocr"],
                    "prompts_per_batch": 2,
                    "images_per_prompt": 4,
                    "tags": {"counting": 3},
                },
                "grpo": {"reward_weights": {"PickScore": 1.0}},
            }
        )
    )
    prompts = some_prompts(build(recipe)[1].schedule, 6)
    assert [p.task for p in prompts] == ["geneval"] * 3 + ["ocr"] * 3 and len(set(prompts)) == 6
    with pytest.raises(ValueError, match="at least one prompt"):
        Look([])
