"""The training loop: resumed to the bit after kill -9, the same in two processes, stopped when it
diverges."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter

import pandas as pd
import pytest
import torch
import yaml

from flowopd_lib import FlowPolicy, Look, Sampler, files, load_benchmark, some_prompts, trajectory
from flowopd_lib.checkpoint import load_state
from flowopd_lib.files import RUNS
from flowopd_lib.fit import fit
from flowopd_lib.inputs import read_yaml
from flowopd_lib.jobs.processes import Served
from flowopd_lib.jobs.recipes import build
from flowopd_lib.jobs.site import Site
from flowopd_lib.jobs.work import run_job
from flowopd_lib.merge import drawn_by_teachers
from flowopd_lib.objectives import SFT
from flowopd_lib.train import TrainConfig, TrainingDiverged, train

BENCHMARK = load_benchmark()

OPD = {
    "student": {"rank": 4, "alpha": 8},
    "schedule": {"tasks": ["geneval", "ocr"], "prompts_per_batch": 4},
    "sampler": {"steps": 4},
    "opd": {
        "teachers": {"geneval": "expert", "ocr": None},
        "micro_batch_size": 2,
        "anchor": "expert",
    },
    "train": {"iterations": 6, "lr": 1e-3, "save_every": 2, "cooldown": 0.5},
}
GRPO = {
    "student": {"rank": 4, "alpha": 8},
    "schedule": {"tasks": ["ocr"], "prompts_per_batch": 2, "images_per_prompt": 4},
    "sampler": {"steps": 4},
    "grpo": {"reward_weights": {"OCR": 0.6, "DeQA": 0.4}, "micro_batch_size": 2, "updates": 2},
    "train": {"iterations": 2, "lr": 1e-3},
}
# the window moves, and the images of a prompt part there
BRANCH = {**GRPO, "sampler": {"steps": 4, "noisy": 1, "last": 2, "branch": True}}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def expert(tmp_path_factory):
    """A made-up teacher."""
    policy, folder = FlowPolicy(BENCHMARK.base), tmp_path_factory.mktemp("expert")
    policy.add_adapter("expert", rank=4, alpha=8)
    with torch.no_grad():
        for p in policy.adapter_parameters("expert").values():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)) * 0.03)
    policy.save_adapter("expert", folder)
    return folder


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """Two processes of one thread each, which do one training after another."""
    served = Served("local2", tmp_path_factory.mktemp("processes"))
    yield served
    served.stop()


def written(recipe, path, expert=None):
    path.write_text(
        yaml.safe_dump({**recipe, **({"adapters": {"expert": str(expert)}} if expert else {})})
    )
    return path


def command(recipe, folder):
    return [sys.executable, "-m", "flowopd_lib.jobs", str(recipe), "--folder", str(folder)]


@pytest.fixture
def here(policy):
    """This process, of one thread as those that are started."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Site("tiny", policy=policy)
    policy.remove_adapters()
    torch.set_num_threads(before)


def test_killed_and_resumed_is_uninterrupted_to_the_bit(expert, tmp_path, here):
    recipe = written(OPD, tmp_path / "recipe.yaml", expert)
    run_job(read_yaml(recipe), tmp_path / "whole", here, shown=False)
    folder = tmp_path / "killed"
    process = subprocess.Popen(
        command(recipe, folder), env=ENVIRONMENT, stdout=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        if line.startswith("3/6"):  # one iteration after the checkpoint of the second
            os.kill(process.pid, signal.SIGKILL)
            break
    process.wait()
    state = folder / "state.safetensors"
    assert (
        process.returncode == -signal.SIGKILL and 2 <= (done := load_state(state)["iteration"]) < 6
    )
    before = (folder / "metrics.jsonl").read_text().splitlines()[:done]
    # refused, and nothing of it stays
    other = written({**OPD, "sampler": {"steps": 5}}, tmp_path / "other.yaml", expert)
    here.forget()
    with pytest.raises(ValueError, match="holds a training of something else"):
        run_job(read_yaml(other), folder, here)
    assert yaml.safe_load((folder / "recipe.yaml").read_text()) == yaml.safe_load(
        recipe.read_text()
    )
    here.forget()
    run_job(read_yaml(recipe), folder, here, shown=False)
    assert (folder / "metrics.jsonl").read_text().splitlines()[:done] == before  # not trained again
    assert_same_training(tmp_path / "whole", folder, 6)


def assert_same_training(whole, other, iterations):
    a, b = (load_state(folder / "state.safetensors") for folder in (whole, other))
    assert a["iteration"] == b["iteration"] == iterations and a["updates"] == b["updates"]
    for key in ("parameters", "average"):
        assert all(torch.equal(x, y) for x, y in zip(a[key], b[key], strict=True))
    for i, moments in a["optimizer"]["state"].items():
        assert all(torch.equal(moments[k], b["optimizer"]["state"][i][k]) for k in moments)
    rows = [
        [
            {k: v for k, v in json.loads(line).items() if k != "seconds"}
            for line in (folder / "metrics.jsonl").read_text().splitlines()
        ]
        for folder in (whole, other)
    ]
    assert rows[0] == rows[1] and [r["iteration"] for r in rows[0]] == list(range(iterations))


DRAWN = {**OPD, "opd": {**OPD["opd"], "steps": 1}}


@pytest.mark.parametrize(
    "recipe", [OPD, DRAWN, GRPO, BRANCH], ids=["opd", "opd drawn", "grpo", "grpo branch"]
)
def test_a_generator_closed_after_an_iteration_leaves_a_checkpoint_to_go_on_from_to_the_bit(
    recipe, expert, tmp_path
):
    recipe = {
        **recipe,
        "adapters": {"expert": str(expert)},
        "train": {"iterations": 4, "lr": 1e-3, "save_every": 100},
    }
    for folder, stops in (("whole", ()), ("cut", (1, 3))):
        for stop in (*stops, None):
            policy, objective, config = build(recipe)
            updates = train(policy, objective, tmp_path / folder, config)
            for info in updates:
                if info.metrics and info.iteration + 1 == stop:
                    updates.close()
                    assert (
                        load_state(tmp_path / folder / "state.safetensors")["iteration"] == stop
                        and not (tmp_path / folder / "adapter").exists()
                    )
                    assert not any(
                        p.requires_grad for p in policy.adapter_parameters("student").values()
                    )
    assert_same_training(tmp_path / "whole", tmp_path / "cut", 4)


def test_a_generator_closed_between_the_updates_of_an_iteration_writes_nothing(expert, tmp_path):
    policy, objective, config = build(GRPO)
    updates = train(policy, objective, tmp_path, config)
    assert not next(updates).metrics
    updates.close()
    assert not (tmp_path / "state.safetensors").exists()


def of(recipe, prompts):
    """The same on so many prompts an iteration."""
    return {**recipe, "schedule": {**recipe["schedule"], "prompts_per_batch": prompts}}


SFT_START = {
    "student": {"rank": 4, "alpha": 8},
    "sft": {"samples": 6, "batch": 3, "steps": 2},
    "train": {"iterations": 2, "lr": 1e-3},
}


# GRPO's rewards are not the same to the last bit when a reward sees half of the pictures, and centred in their
# group they lose digits. Of the three prompts of each of its updates both processes have some. Three in all
# are no multiple of two processes.
@pytest.mark.parametrize(
    "recipe, tolerance",
    [
        (OPD, 1e-5),
        (DRAWN, 1e-5),
        (of(GRPO, 6), 1e-3),
        (of(BRANCH, 6), 1e-3),
        (of(GRPO, 3), 1e-3),
        (SFT_START, 1e-5),
    ],
    ids=["opd", "opd drawn", "grpo", "grpo branch", "grpo of 3", "sft of 3"],
)
def test_two_processes_make_the_update_of_one(recipe, tolerance, expert, two_processes, tmp_path):
    recipe = {**recipe, "train": {"iterations": 1, "lr": 1e-3}, "adapters": {"expert": str(expert)}}
    policy, objective, config = build(recipe)
    fit(policy, objective, tmp_path / "one", config, shown=False)
    two_processes.do(
        {**recipe, "benchmark": "tiny", "name": f"of_{tmp_path.name}"}, tmp_path / "two"
    )
    # AdamW's first moments are the (last updates') gradients; the weights themselves moved by its sign, which
    # rounding decides where it is almost 0.
    one, two = (
        torch.cat(
            [
                m["exp_avg"].flatten()
                for m in load_state(tmp_path / f / "state.safetensors")["optimizer"][
                    "state"
                ].values()
            ]
        )
        for f in ("one", "two")
    )
    apart = ((two - one).norm() / one.norm()).item()
    assert 0 < apart < tolerance, "sums in another order, so there were two, and the same update"


def sft(policy, scale=1.0):
    prompts = BENCHMARK.prompts("ocr", "train")[:8]
    latents = scale * torch.randn(
        8, *policy.latent_shape, generator=torch.Generator().manual_seed(0)
    )
    return SFT(latents, prompts, batch=4)


def test_a_training_that_diverges_stops_and_keeps_the_last_good_state(tmp_path):
    policy = FlowPolicy(BENCHMARK.base)
    policy.add_adapter("student", rank=4, alpha=8)
    config = TrainConfig(2, lr=1e-3, save_every=1)
    assert [i.iteration for i in train(policy, sft(policy), tmp_path, config)] == [0, 1]
    average = load_state(tmp_path / "state.safetensors")["average"]
    objective = sft(policy)
    updates = train(policy, objective, tmp_path, TrainConfig(9, lr=1e-3, save_every=1))
    with pytest.raises(TrainingDiverged, match="iteration 3: loss nan.*lower lr.*last good state"):
        assert next(updates).iteration == 2
        good = load_state(tmp_path / "state.safetensors")
        objective.latents.fill_(float("nan"))
        next(updates)
    kept = load_state(tmp_path / "state.safetensors")
    assert kept["iteration"] == 3 and all(
        torch.equal(a, b) for a, b in zip(good["parameters"], kept["parameters"])
    )
    with pytest.raises(
        ValueError,
        match=r"holds a training of something else: train\.lr was 0\.001 and is 0\.002\. Give a new folder",
    ):
        next(train(policy, sft(policy), tmp_path, TrainConfig(9, lr=2e-3)))
    # what the first training left behind: the averaged weights on disk
    other = FlowPolicy(BENCHMARK.base)
    other.load_adapter("student", tmp_path / "adapter")
    assert all(
        torch.equal(p, a)
        for p, a in zip(other.adapter_parameters("student").values(), average, strict=True)
    )


# What a resume must not accept, and the words that say what differs.
OTHERWISE = {
    "teachers swapped": (
        {"opd": {"teachers": {"geneval": None, "ocr": "expert"}}},
        'objective.teachers.geneval was "expert" and is null',
    ),
    "another weighting": ({"opd": {"weighting": "x0"}}, "objective.weighting was"),
    "another anchor": ({"opd": {"mar": 0.5}}, "objective.mar was 0.04 and is 0.5"),
    "sampler steps": ({"sampler": {"steps": 5}}, "objective.sampler.steps was 4 and is 5"),
    "noise": (
        {"sampler": {"noise_level": 0.3}},
        "objective.sampler.noise_level was 0.7 and is 0.3",
    ),
    "prompts a batch": (
        {"schedule": {"prompts_per_batch": 8}},
        "objective.schedule.size was 4 and is 8",
    ),
    "task_weights": (
        {"schedule": {"task_weights": {"geneval": 2, "ocr": 1}}},
        "objective.schedule.task_schedule was",
    ),
    "other prompts": (
        {"schedule": {"tags": {"counting": 2}}},
        "objective.schedule.prompts.geneval",
    ),
    "another seed": ({"seed": 1}, "objective.schedule.seed was 0 and is 1"),
    "optimizer": ({"train": {"betas": [0.9, 0.95]}}, "train.betas was"),
    "the adapter's scale": ({"student": {"rank": 4, "alpha": 4}}, "scales."),
    "the adapter's shape": ({"student": {"rank": 2, "alpha": 4}}, "ranks."),
}
MAY = {
    "micro_batch_size": {"opd": {"micro_batch_size": 1}},
    "save times": {"train": {"save_every": 1, "save_seconds": 1.0}},
    "more iterations": {"train": {"iterations": 4}},
}


def merged(recipe, change):
    return {
        **recipe,
        **{
            k: {**recipe[k], **v} if isinstance(v, dict) and k in recipe else v
            for k, v in change.items()
        },
    }


@pytest.fixture(scope="module")
def begun(expert, tmp_path_factory):
    """A training of two iterations, its recipe and its folder."""
    folder = tmp_path_factory.mktemp("begun")
    recipe = {**OPD, "adapters": {"expert": str(expert)}, "train": {"iterations": 2, "lr": 1e-3}}
    policy, objective, config = build(recipe)
    list(train(policy, objective, folder, config))
    return recipe, folder


def resumed(recipe, folder, **options):
    policy, objective, config = build(recipe, **options)
    return [i.iteration for i in train(policy, objective, folder, config)]


@pytest.mark.parametrize("name", OTHERWISE)
def test_a_resume_refuses_another_training_and_says_what_differs(name, begun):
    recipe, folder = begun
    change, message = OTHERWISE[name]
    before = (folder / "state.safetensors").read_bytes()
    with pytest.raises(ValueError) as error:
        resumed(merged(recipe, change), folder)
    assert (
        "holds a training of something else" in str(error.value)
        and message in str(error.value)
        and "\n" not in str(error.value)
    )
    assert (folder / "state.safetensors").read_bytes() == before and not (
        folder / ".owner.json"
    ).exists()


def test_a_resume_refuses_other_weights_under_the_same_name_another_precision_and_another_start(
    begun, tmp_path
):
    recipe, folder = begun
    policy = FlowPolicy(BENCHMARK.base)
    policy.load_adapter("expert", recipe["adapters"]["expert"])
    with torch.no_grad():
        next(iter(policy.adapter_parameters("expert").values())).flatten()[0] += 1e-3
    policy.save_adapter("expert", tmp_path / "expert")
    with pytest.raises(
        ValueError, match=r"adapters\.expert was weights [0-9a-f]{8}… and is weights"
    ):
        resumed({**recipe, "adapters": {"expert": str(tmp_path / "expert")}}, folder)
    with pytest.raises(ValueError, match='precision was "torch.float32" and is "torch.bfloat16"'):
        resumed(recipe, folder, dtype=torch.bfloat16)
    policy, objective, config = build(recipe)
    with torch.no_grad():
        next(iter(policy.adapter_parameters("student").values())).flatten()[0] += 1e-3
    with pytest.raises(ValueError, match="start was weights"):
        next(train(policy, objective, folder, config))


@pytest.mark.parametrize("name", MAY)
def test_a_resume_accepts_what_may_change(name, begun, tmp_path):
    recipe, folder = begun
    change, copy = MAY[name], shutil.copytree(folder, tmp_path / "copy")
    assert resumed(merged(recipe, change), copy) == list(
        range(2, merged(recipe, change)["train"]["iterations"])
    )


def test_a_resume_of_grpo_knows_its_rewards(tmp_path):
    recipe = {
        **GRPO,
        "grpo": {"reward_weights": {"DeQA": 1.0}, "micro_batch_size": 4},
        "train": {"iterations": 1, "lr": 1e-3},
    }
    assert resumed(recipe, tmp_path) == [0] * 2
    with pytest.raises(ValueError, match=r"objective\.reward_weights\.DeQA was 1\.0 and is null"):
        resumed(
            {**recipe, "grpo": {"reward_weights": {"OCR": 1.0}, "micro_batch_size": 4}}, tmp_path
        )
    assert resumed({**recipe, "train": {"iterations": 2, "lr": 1e-3}}, tmp_path) == [1] * 2


def test_a_second_training_into_a_folder_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "WAIT", 0.2)
    policy = FlowPolicy(BENCHMARK.base)
    policy.add_adapter("student", rank=2, alpha=4)
    first = train(policy, sft(policy), tmp_path, TrainConfig(3, lr=1e-3))
    next(first)
    with pytest.raises(
        files.FolderInUse, match=f"is in use by process {os.getpid()} .a training of student"
    ):
        next(train(policy, sft(policy), tmp_path, TrainConfig(3, lr=1e-3)))
    first.close()
    assert [i.iteration for i in train(policy, sft(policy), tmp_path, TrainConfig(3, lr=1e-3))] == [
        1,
        2,
    ]


def test_ctrl_c_on_a_recipe_leaves_a_checkpoint_to_go_on_from(expert, tmp_path):
    recipe = written(
        {**OPD, "train": {"iterations": 500, "lr": 1e-3, "save_every": 400}},
        tmp_path / "recipe.yaml",
        expert,
    )
    process = subprocess.Popen(
        command(recipe, tmp_path / "x"),
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line.startswith("2/500"):
            process.send_signal(signal.SIGINT)
            break
    out, err = process.communicate()
    assert process.returncode == 0 and "stopped after iteration" in out and "Traceback" not in err
    done = load_state(tmp_path / "x" / "state.safetensors")["iteration"]
    assert (
        2 <= done < 500 and len((tmp_path / "x" / "metrics.jsonl").read_text().splitlines()) == done
    )


def test_the_students_recipe_can_be_looked_at(tmp_path):
    recipe = yaml.safe_load((RUNS / "recipes" / "student_opd.yaml").read_text())
    policy, objective, _ = build(recipe)
    look = Look(some_prompts(objective.schedule, 4), BENCHMARK.rewards("cpu"), 1, Sampler(2))
    look(policy, "student", tmp_path, 0)
    rows = files.read_lines(tmp_path / "looks.jsonl")
    assert (
        set(rows["task"]) == {"geneval", "ocr", "pickscore", "deqa"}
        and rows[rows["task"] == "deqa"]["DeQA"].notna().all()
    )
    once = (tmp_path / "looks.jsonl").read_bytes()
    # as a training does that goes on from a checkpoint before this look
    look(policy, "student", tmp_path, 0)
    assert (tmp_path / "looks.jsonl").read_bytes() == once


def test_a_probed_training_that_was_cut_off_tells_what_an_uninterrupted_one_tells(tmp_path):
    def run(folder, iterations, **options):
        policy = FlowPolicy(BENCHMARK.base)
        policy.add_adapter("student", rank=4, alpha=8)

        def probe(adapter):
            size = sum(
                p.detach().abs().sum().item() for p in policy.adapter_parameters(adapter).values()
            )
            return pd.DataFrame([{"reward": "size", "mean": size}])

        return fit(
            policy,
            sft(policy),
            tmp_path / folder,
            TrainConfig(iterations, lr=1e-3, save_every=1, ema=0.0, **options),
            probe=probe,
            every=2,
        )

    curve, probes = run("whole", 5)
    assert (
        list(probes["iteration"]) == [0, 2, 4, 5]
        and len(curve) == 5
        and probes["seconds"].is_monotonic_increasing
    )
    assert probes["seconds"].iloc[-1] == pytest.approx(curve["seconds"].iloc[-1])
    run("cut", 3)
    assert len(run("cut", 3)[0]) == 3  # over: nothing is trained or asked again
    curve, cut = run("cut", 5)
    assert (
        dict(zip(cut["iteration"], cut["mean"])).items()
        >= dict(zip(probes["iteration"], probes["mean"])).items()
    )
    assert curve["seconds"].is_monotonic_increasing  # the clock of a resumed training goes on
    assert len(run("short", 100, max_seconds=1e-9)[0]) == 1


def test_a_start_by_fine_tuning_learns_each_tasks_own_teacher(tmp_path):
    policy, objective, config = build(SFT_START, name="start")
    prompts = BENCHMARK.first_prompts("train", 2)
    assert [p.task for p in prompts] == ["geneval"] * 2 + ["ocr"] * 2 + ["pickscore"] * 2
    assert objective.prompts == prompts and objective.batch == 3
    for i, prompt in enumerate(prompts):
        for step in trajectory(
            policy, [prompt], [(1 << 39) + i], BENCHMARK.sampler(2), prompt.task
        ):
            pass
        torch.testing.assert_close(objective.latents[i : i + 1], step.x_next, atol=1e-4, rtol=1e-4)
    curve, _ = fit(policy, objective, tmp_path, config, "start", shown=False)
    assert len(curve) == 2 and "start" in policy.adapters and "student" not in policy.adapters
    few = build({**SFT_START, "sft": {"samples": 3, "tasks": ["ocr"], "steps": 2}}, policy=policy)[
        1
    ]
    assert few.prompts == BENCHMARK.prompts("ocr", "train")[:3]
    with pytest.raises(ValueError, match="no teacher for the task"):
        drawn_by_teachers(policy, prompts, {"ocr": None}, Sampler(2))


def test_tags_say_how_often_prompts_are_drawn():
    recipe = {
        **GRPO,
        "schedule": {
            "tasks": ["geneval"],
            "prompts_per_batch": 2,
            "images_per_prompt": 4,
            "tags": {"counting": 3, "colors": 0},
        },
        "grpo": {"reward_weights": {"GenEval": 1.0}, "micro_batch_size": 2, "updates": 2},
    }
    drawn = Counter(p.tag for p in build(recipe)[1].schedule.prompts["geneval"])
    assert drawn["counting"] == 3 * drawn["two_object"] > 0 == drawn["colors"]
    for tags, message in (
        ({"colour": 2}, "did you mean 'colors'"),
        ({"colors": -1}, "in whole numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            build({**recipe, "schedule": {**recipe["schedule"], "tags": tags}})


@pytest.mark.parametrize("path", sorted((RUNS / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_can_be_built(path):
    recipe = yaml.safe_load(path.read_text())
    policy, objective, config = build(recipe)
    assert (
        "student" in policy.adapters
        and len(objective.schedule.draw(0)) > 0
        and config.iterations > 0
    )


def test_the_rate_warms_up_and_cools_down_to_the_end_it_was_begun_with(tmp_path, monkeypatch):
    rates, step = [], torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW,
        "step",
        lambda self, *args: (rates.append(self.param_groups[0]["lr"]), step(self, *args))[1],
    )
    policy = FlowPolicy(BENCHMARK.base)
    policy.add_adapter("student", rank=2, alpha=4)
    config = {"lr": 1.0, "warmup": 2, "cooldown": 0.5, "save_every": 4}
    list(train(policy, sft(policy), tmp_path, TrainConfig(8, **config)))
    assert rates == pytest.approx([0.5, 1.0, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2])
    with pytest.raises(ValueError, match="train.iterations was 8 and is 9"):
        next(train(policy, sft(policy), tmp_path, TrainConfig(9, **config)))


def test_a_tracker_is_told_of_every_iteration_and_one_that_is_not_there_is_named(
    tmp_path, monkeypatch
):
    from accelerate import Accelerator, tracking
    from accelerate.tracking import GeneralTracker

    class Told(GeneralTracker):
        name, requires_logging_directory, tracker, main_process_only = "told", False, None, True

        def __init__(self):
            super().__init__()
            self.rows, self.finished = [], 0

        def store_init_configuration(self, values):
            pass

        def log(self, values, step=None, **_):
            self.rows.append((step, values))

        def finish(self):
            self.finished += 1

    policy, told = FlowPolicy(BENCHMARK.base), Told()
    policy.add_adapter("student", rank=4, alpha=8)
    list(
        train(
            policy,
            sft(policy),
            tmp_path,
            TrainConfig(3, lr=1e-3),
            accelerator=Accelerator(cpu=True, log_with=told),
        )
    )
    log = files.read_lines(tmp_path / "metrics.jsonl")
    assert (
        [step for step, _ in told.rows] == [0, 1, 2]
        and [values["loss"] for _, values in told.rows] == list(log["loss"])
        and told.finished == 1
    )
    with pytest.raises(ValueError, match="names no tracker of accelerate's: 'tensorbord'"):
        TrainConfig(3, log_with="tensorbord")
    with pytest.raises(ValueError, match="the tracker dvclive is not installed"):
        TrainConfig(3, log_with="dvclive")
    # its names are members of an enum, not strings
    monkeypatch.setattr(tracking, "_available_trackers", [tracking.LoggerType.DVCLIVE])
    assert TrainConfig(3, log_with="dvclive").log_with == "dvclive"
