"""The training loop: resumed to the bit, refused in another training's folder, stopped when it
diverges, with validation on the way."""

import os
import re
import shutil
import sys
from collections import Counter

import pandas as pd
import pytest
import torch
import yaml
from trainings import (
    GRPO,
    OPD,
    RECIPES,
    START,
    assert_same_training,
    changed,
    metrics,
    run,
    sft,
    train_config,
)

from flowopd_lib import files
from flowopd_lib.config import validate
from flowopd_lib.files import RUNS, load_state
from flowopd_lib.fingerprint import code_hashes
from flowopd_lib.lab import build
from flowopd_lib.lab.recipe import SFT_SEED, Recipe
from flowopd_lib.lab.workspace import Workspace
from flowopd_lib.losses import Shard, sample_teachers
from flowopd_lib.rollout import Sampler, trajectory
from flowopd_lib.train import TrainConfig, TrainingDiverged, fit, train


@pytest.fixture
def student(workspace):
    """The shipped model with a new adapter."""
    workspace.policy.add_adapter("student", rank=2, alpha=4)
    return workspace.policy


def built(recipe, workspace):
    return build(validate(Recipe, recipe), workspace)


# ---- checkpoints


@pytest.mark.parametrize("name", RECIPES)
def test_a_training_closed_after_an_iteration_resumes_to_the_bit(name, workspace, tmp_path):
    recipe = changed(RECIPES[name], train={"iterations": 3, "save_every": 100})
    for folder, stops in (("whole", [None]), ("cut", [1, 2, None])):
        for stop in stops:
            objective, config = built(recipe, workspace)
            updates = train(workspace.policy, objective, tmp_path / folder, config)
            for info in updates:
                if info.metrics and info.iteration + 1 == stop:
                    updates.close()
                    state = load_state(tmp_path / folder / "state.safetensors")
                    assert state["iteration"] == stop
                    assert not (tmp_path / folder / "adapter").exists()
            weights = workspace.policy.adapter_parameters("student").values()
            assert not any(p.requires_grad for p in weights)
    assert_same_training(tmp_path / "whole", tmp_path / "cut", 3)


def test_a_training_closed_between_two_updates_writes_no_checkpoint(workspace, tmp_path):
    objective, config = built(GRPO, workspace)
    updates = train(workspace.policy, objective, tmp_path, config)
    assert not next(updates).metrics
    updates.close()
    assert not (tmp_path / "state.safetensors").exists()


def test_a_training_that_diverges_stops_and_keeps_the_last_good_state(student, tmp_path):
    state, config = tmp_path / "state.safetensors", train_config(9, save_every=1)
    objective = sft(student)
    updates = train(student, objective, tmp_path, config)
    next(updates)
    good = load_state(state)
    objective.latents.fill_(float("nan"))
    message = "iteration 1: loss nan.*lower lr.*The last good state, if one"
    with pytest.raises(TrainingDiverged, match=message):
        next(updates)
    kept = load_state(state)
    assert kept["iteration"] == 1
    assert all(torch.equal(a, b) for a, b in zip(good["parameters"], kept["parameters"]))


def test_the_adapter_of_a_finished_training_has_the_averaged_weights(student, tmp_path):
    list(train(student, sft(student), tmp_path, train_config(3)))
    average = load_state(tmp_path / "state.safetensors")["average"]
    student.load_adapter("loaded", tmp_path / "adapter")
    for name in ("student", "loaded"):
        weights = student.adapter_parameters(name).values()
        assert all(torch.equal(p, a) for p, a in zip(weights, average, strict=True))


def test_a_folder_has_one_training_at_a_time(student, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "WAIT", 0.2)
    first = train(student, sft(student), tmp_path, train_config(3))
    next(first)
    message = f"is in use by process {os.getpid()} .a training of student"
    with pytest.raises(files.FolderInUse, match=message):
        next(train(student, sft(student), tmp_path, train_config(3)))
    first.close()
    rest = train(student, sft(student), tmp_path, train_config(3))
    assert [info.iteration for info in rest] == [1, 2]


# ---- what a resume refuses and accepts

# A change of the recipe, and the words that say what differs.
REFUSED = {
    "teachers swapped": (
        {"opd": {"teachers": {"geneval": None, "ocr": "geneval"}}},
        'objective.teachers.geneval was "geneval" and is null',
    ),
    "weighting": ({"opd": {"weighting": "x0"}}, 'objective.weighting was "kl" and is "x0"'),
    "sampler": ({"sampler": {"steps": 5}}, "objective.sampler.steps was 3 and is 5"),
    "prompts": ({"schedule": {"tag_weights": {"counting": 2}}}, "objective.schedule.prompts.gene"),
    "seed": ({"seed": 1}, "objective.schedule.seed was 0 and is 1"),
    "optimizer": ({"train": {"ema": 0.9}}, "train.ema was"),
    "scale": ({"student": {"alpha": 4}}, "scales."),
    "rank": ({"student": {"rank": 2}}, "ranks."),
    "fewer iterations": ({"train": {"iterations": 1}}, "holds 2 iterations already, more than 1"),
}
SHORT = changed(OPD, train={"iterations": 2})


@pytest.fixture(scope="module")
def short(policy, tmp_path_factory):
    """The folder of a training of two iterations."""
    folder = tmp_path_factory.mktemp("short")
    policy.remove_adapters()
    run(SHORT, Workspace("tiny", policy=policy), folder)
    policy.remove_adapters()
    return folder


def refuse(recipe, workspace, folder, message):
    before = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    with pytest.raises(ValueError, match=message) as error:
        run(recipe, workspace, folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()} == before


@pytest.mark.parametrize("name", REFUSED)
def test_a_resume_refuses_another_training_and_says_what_differs(name, short, workspace):
    change, message = REFUSED[name]
    refuse(changed(SHORT, **change), workspace, short, re.escape(message))


def test_a_resume_accepts_other_micro_batches_and_save_times(short, workspace, tmp_path):
    folder = shutil.copytree(short, tmp_path / "copy")
    train = {"save_every": 1, "iterations": 3}
    recipe = changed(SHORT, opd={"micro_batch_size": 1}, train=train)
    assert run(recipe, workspace, folder) == [2]


def test_a_resume_refuses_other_weights_under_the_same_name(short, benchmark, workspace, tmp_path):
    policy = workspace.policy
    policy.load_adapter("geneval", benchmark.adapter("geneval"))
    next(iter(policy.adapter_parameters("geneval").values())).data[0, 0] += 1e-3
    policy.save_adapter("geneval", tmp_path / "other")
    recipe = SHORT | {"adapters": {"geneval": str(tmp_path / "other")}}
    refuse(recipe, workspace, short, r"adapters\.geneval was sha256 [0-9a-f]{8}… and is sha256")


def test_a_resume_refuses_another_precision_and_another_start(short, benchmark, workspace):
    other = Workspace(benchmark, torch.bfloat16)
    refuse(SHORT, other, short, 'precision was "float32" and is "bfloat16"')
    objective, config = built(SHORT, workspace)
    next(iter(workspace.policy.adapter_parameters("student").values())).data[0, 0] += 1e-3
    with pytest.raises(ValueError, match="start was sha256"):
        next(train(workspace.policy, objective, short, config))


def test_a_resume_refuses_another_version_of_the_code(short, workspace, monkeypatch):
    code = code_hashes() | {"losses/opd.py": "0" * 64}
    monkeypatch.setattr(sys.modules["flowopd_lib.train"], "code_hashes", lambda: code)
    refuse(SHORT, workspace, short, "code.losses/opd.py was sha256 .* and is sha256 00000000")


LOSS = """
def scaled(values):
    return {factor} * values


def loss(batch):
    return scaled(batch.weight * (batch.v_student - batch.v_teacher).square().flatten(1).sum(1))


def weighting(sigma, sigma_next, *_):
    return sigma / sigma
"""


def test_a_resume_refuses_another_version_of_a_users_loss_and_weighting(workspace, tmp_path):
    plugin = tmp_path / "mine.py"
    plugin.write_text(LOSS.format(factor=2))
    functions = {"loss": f"{plugin}:loss", "weighting": f"{plugin}:weighting"}
    recipe = changed(OPD, opd=functions, train={"iterations": 1})
    assert run(recipe, workspace, tmp_path / "x") == [0]
    plugin.write_text(LOSS.format(factor=2) + "\n# a comment\n")
    assert run(changed(recipe, train={"iterations": 2}), workspace, tmp_path / "x") == [1]
    # a function that the loss calls, though neither the loss nor the weighting itself
    plugin.write_text(LOSS.format(factor=3))
    message = r"objective\.loss\.source was sha256 .*objective\.weighting\.source was sha256"
    refuse(recipe, workspace, tmp_path / "x", message)

    def own(batch):
        return 2 * batch.weight

    of_notebook = changed(OPD, opd={"loss": own})
    refuse(of_notebook, workspace, tmp_path / "x", 'objective.loss.name was "loss" and is "test_a')


# ---- recipes


def test_a_start_by_fine_tuning_learns_each_tasks_own_teacher(benchmark, workspace):
    objective, _ = built(START, workspace)
    prompts = benchmark.first_prompts("train", 2)
    assert [p.task for p in prompts] == ["geneval"] * 2 + ["ocr"] * 2 + ["pickscore"] * 2
    assert objective.prompts == prompts
    for i, p in enumerate(prompts):
        teacher = p.task, [SFT_SEED + i], benchmark.sampler(2)
        *_, step = trajectory(workspace.policy, [p], teacher[1], teacher[2], teacher[0])
        torch.testing.assert_close(objective.latents[i : i + 1], step.x_next, atol=1e-4, rtol=1e-4)
    some, _ = built(changed(START, sft={"samples": 3, "tasks": ["ocr"]}), workspace)
    assert some.prompts == benchmark.prompts("ocr", "train")[:3]
    with pytest.raises(ValueError, match="no teacher for the task"):
        sample_teachers(workspace.policy, prompts, range(6), {"ocr": None}, Sampler(2))


def test_tag_weights_say_how_often_prompts_are_drawn(workspace):
    schedule = {"tasks": ["geneval"], "tag_weights": {"counting": 3, "colors": 0}}
    recipe = changed(GRPO, schedule=schedule, grpo={"reward_weights": {"GenEval": 1.0}})
    prompts = built(recipe, workspace)[0].schedule.prompts["geneval"]
    every = Counter(p.tag for p in workspace.benchmark.prompts("geneval", "train"))
    tags = Counter(p.tag for p in prompts)
    assert tags["counting"] == 3 * every["counting"] and tags["two_object"] == every["two_object"]
    assert tags["colors"] == 0 < every["colors"]
    with pytest.raises(ValueError, match="did you mean 'colors'"):
        built(changed(recipe, schedule={"tag_weights": {"colour": 2}}), workspace)


@pytest.mark.parametrize("path", sorted((RUNS / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_recipe_can_be_built(path, workspace):
    objective, config = built(yaml.safe_load(path.read_text()), workspace)
    assert len(objective.schedule.draw(0)) > 0 and config.iterations > 0


def test_opd_from_the_merged_experts_lowers_the_kl_on_fixed_states(workspace, tmp_path):
    policy, experts = workspace.policy, list(workspace.benchmark.experts)
    recipe = {
        "student": {"merge": "cat", "adapters": experts},
        "schedule": {"prompts_per_batch": 8},
        "sampler": {"steps": 4},
        "opd": {"trained_steps": 1, "weighting": "ode", "mar": 0.0},
        "train": {"iterations": 15, "lr": 1e-3},
    }
    objective, config = built(recipe, workspace)
    every_step = built(changed(recipe, opd={"trained_steps": None}, seed=1), workspace)[0]
    states, _ = every_step.collect(policy, "student", 0, Shard())

    @torch.no_grad()
    def kl():
        terms = [m["kl"] for _, m in every_step.losses(policy, "student", states, 0)]
        return torch.cat(terms).mean().item()

    before = kl()
    list(train(policy, objective, tmp_path, config))
    assert 0 < kl() < 0.8 * before


# ---- the rest of the loop


def test_the_rate_warms_up_and_cools_down_to_the_end_it_was_started_with(
    student, tmp_path, monkeypatch
):
    rates, step = [], torch.optim.AdamW.step

    def recorded(self, *args):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", recorded)
    how = {"lr": 1.0, "warmup": 2, "cooldown": 0.5, "save_every": 4}
    list(train(student, sft(student), tmp_path, TrainConfig(8, **how)))
    assert rates == pytest.approx([0.5, 1.0, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2])
    with pytest.raises(ValueError, match="train.iterations was 8 and is 9"):
        next(train(student, sft(student), tmp_path, TrainConfig(9, **how)))


def test_validation_of_a_training_that_was_cut_off_is_that_of_an_uninterrupted_one(
    workspace, tmp_path
):
    policy = workspace.policy

    def validate(adapter, iteration):
        weights = policy.adapter_parameters(adapter).values()
        return pd.DataFrame([{"size": sum(p.abs().sum().item() for p in weights)}])

    def trained(folder, iterations):
        workspace.load_adapter("student", {"rank": 2})
        config = train_config(iterations, save_every=1)
        return fit(policy, sft(policy), tmp_path / folder, config, validate=validate, every=2)

    log, samples = trained("whole", 5)
    assert list(samples["iteration"]) == [0, 2, 4, 5] and len(log) == 5
    assert samples["seconds"].iloc[-1] == pytest.approx(log["seconds"].iloc[-1])
    trained("cut", 3)
    assert len(trained("cut", 3)[0]) == 3  # finished: nothing is trained or validated again
    log, cut = trained("cut", 5)
    assert list(cut["iteration"]) == [0, 2, 3, 4, 5]
    sizes = [dict(zip(table["iteration"], table["size"])) for table in (cut, samples)]
    assert sizes[0].items() >= sizes[1].items()  # the averaged weights, to the bit
    assert log["seconds"].is_monotonic_increasing  # the clock of a resumed training continues
    # a training that the folder refuses leaves no validation there either
    before = (tmp_path / "cut" / "validation_samples.jsonl").read_bytes()
    with pytest.raises(ValueError, match="holds another training"):
        fit(policy, sft(policy, 2.0), tmp_path / "cut", train_config(9), validate=validate, every=1)
    assert (tmp_path / "cut" / "validation_samples.jsonl").read_bytes() == before


def test_on_step_sees_every_iteration_and_ends_the_training(student, tmp_path):
    iterations = []

    def on_step(info):
        iterations.append(info.iteration)
        return info.iteration == 1

    log, _ = fit(student, sft(student), tmp_path, train_config(9), on_step=on_step)
    assert iterations == [0, 1] and len(log) == 2
    assert load_state(tmp_path / "state.safetensors")["iteration"] == 2


def test_a_tracker_gets_every_iteration(student, tmp_path, monkeypatch):
    from accelerate import Accelerator, tracking

    class Tracker(tracking.GeneralTracker):
        name, requires_logging_directory, tracker, main_process_only = "rows", False, None, True

        def __init__(self):
            super().__init__()
            self.rows, self.settings, self.finished = [], [], 0

        def store_init_configuration(self, values):
            self.settings.append(values)

        def log(self, values, step=None, **_):
            self.rows.append((step, values["loss"]))

        def finish(self):
            self.finished += 1

    tracker, config = Tracker(), train_config(5, save_every=2)

    def start():
        accelerator = Accelerator(cpu=True, log_with=tracker)
        return train(student, sft(student), tmp_path, config, accelerator=accelerator)

    killed = start()
    assert [next(killed).iteration for _ in range(3)] == [0, 1, 2]
    with pytest.raises(KeyboardInterrupt):  # which saves nothing, as a kill
        killed.throw(KeyboardInterrupt)
    list(start())
    assert tracker.rows == [(line["iteration"], line["loss"]) for line in metrics(tmp_path)]
    (settings,) = tracker.settings
    assert settings["train.lr"] == config.lr and settings["objective.class"] == "SFT"
    assert tracker.finished == 2
    with pytest.raises(ValueError, match="there is no installed tracker 'tensorbord'"):
        TrainConfig(3, log_with="tensorbord")
    # its names are members of an enum, not strings
    monkeypatch.setattr(tracking, "_available_trackers", [tracking.LoggerType.DVCLIVE])
    assert TrainConfig(3, log_with="dvclive").log_with == "dvclive"
