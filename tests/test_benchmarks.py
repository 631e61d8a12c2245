"""Benchmarks as data: the shipped ones, the example of docs/benchmarks.md, and faults in a file."""

import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml

from flowopd_lib import load_benchmark
from flowopd_lib.benchmarks.tiny.scenes import SIGN_BOX, SIZE
from flowopd_lib.check import check, check_reward
from flowopd_lib.config import read_yaml, validate
from flowopd_lib.files import ROOT
from flowopd_lib.lab import Lab, build
from flowopd_lib.lab.jobs import run_job
from flowopd_lib.lab.recipe import SFT_SEED, Recipe
from flowopd_lib.lab.workspace import Workspace
from flowopd_lib.rewards import attribute
from flowopd_lib.rollout import Sampler, sample, trajectory

ASSETS = ROOT / "flowopd_lib" / "assets"
TINY = read_yaml(ROOT / "flowopd_lib" / "benchmarks" / "tiny" / "benchmark.yaml")
BLOCK = re.compile(r"```\w+ (\S+\.\w+)\n(.*?)```", re.DOTALL)


@pytest.fixture
def mine(tmp_path):
    """Writes the small benchmark's file with something else in it, and loads it."""

    def load(**changes):
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump({**TINY, "folder": str(ASSETS), **changes}))
        return load_benchmark(path)

    return load


def built(recipe, workspace):
    return build(validate(Recipe, recipe), workspace)[0]


# ---- the shipped benchmarks


def test_the_shipped_benchmark_is_the_papers_four_tasks(benchmark, rewards):
    assert benchmark.prompt_tasks == ("geneval", "ocr", "pickscore")
    assert list(rewards) == ["GenEval", "OCR", "PickScore", "DeQA"]
    assert benchmark.domains == (
        ("GenEval", "geneval", 1.0),
        ("OCR", "ocr", 1.0),
        ("PickScore", "pickscore", 26.0),
        ("DeQA", "pickscore", 5.0),
    )
    assert benchmark.experts_of == {benchmark.tasks[t].reward: t for t in benchmark.tasks}
    assert list(benchmark.reward_weights()) == ["geneval", "ocr", "pickscore"]
    assert benchmark.reward_weights(tasks=["deqa"]) == {"deqa": {"DeQA": 0.4, "PickScore": 0.6}}
    with_auxiliary = benchmark.reward_weights(auxiliary=True)["geneval"]
    assert with_auxiliary == pytest.approx({"GenEvalScore": 0.8, "DeQA": 0.2})
    assert (tuple(rewards["OCR"].region), tuple(rewards["OCR"].size)) == (SIGN_BOX, (SIZE, SIZE))


def test_a_reward_is_loaded_once_and_those_for_training_are_not_reported(benchmark, rewards):
    training, held_out = benchmark.training_rewards("cpu"), benchmark.held_out_rewards("cpu")
    assert rewards["OCR"] is training["OCR"]
    assert set(training) - set(rewards) == {"GenEvalScore"}
    assert set(held_out) == {f"{name} gold" for name in rewards}
    assert list(benchmark.all_rewards("cpu")) == [*rewards, *held_out]


def test_the_full_size_benchmark_has_the_papers_settings(monkeypatch):
    benchmark = load_benchmark("sd35")
    config = benchmark.config
    assert (config.resolution, config.text_length) == (512, 128)
    assert (benchmark.rank, benchmark.alpha) == (32, 64.0)
    # the joint attention alone: neither attn2 nor the feed-forward layers
    assert all(t.startswith("attn.") for t in benchmark.targets) and len(benchmark.targets) == 8
    assert benchmark.sampling.evaluation == Sampler(40, guidance=4.5)
    assert benchmark.task_schedule == {"geneval": 3, "ocr": 1, "pickscore": 1}
    assert config.grpo_mix.auxiliary_rewards == {"DeQA": 0.2}
    assert benchmark.base == "stabilityai/stable-diffusion-3.5-medium"
    assert benchmark.adapter("ocr") == "jieliu/SD3.5M-FlowGRPO-Text"
    held_out = {n for n in benchmark.reward_configs if benchmark.reward_is(n, "held_out")}
    assert held_out == {"Aesthetic", "ImageReward", "HPS"}
    assert benchmark.reward_is("GenEvalScore", "training_only")
    monkeypatch.delenv("FLOW_GRPO", raising=False)
    with pytest.raises(ValueError, match="needs the environment variable FLOW_GRPO"):
        benchmark.prompts("ocr", "train")


def test_resolution_text_length_and_targets_are_the_benchmarks(mine):
    adapters = {"rank": 2, "alpha": 4.0, "targets": ["attn.to_q"]}
    workspace = Workspace(mine(resolution=32, text_length=20, adapters=adapters), "float32")
    policy = workspace.policy
    assert policy.latent_shape[1:] == (4, 4) and policy.max_sequence_length == 20
    assert policy.encode(["a photo of a red circle"]).tokens.shape[1] > 20 - 1
    built({"sft": {"samples": 3, "steps": 1}, "train": {"iterations": 1}}, workspace)
    student = policy.adapter("student")
    assert set(student.ranks.values()) == {2} and set(student.alpha.values()) == {4.0}
    assert all(name.endswith("attn.to_q") for name in student.a)


def test_a_scale_that_the_file_leaves_out_is_the_classs(mine, benchmark):
    """What GRPO divides a reward by, the Average divides it by."""
    without = {k: v for k, v in TINY["rewards"]["PickScore"].items() if k != "scale"}
    other = mine(rewards={**TINY["rewards"], "PickScore": without})
    assert other.scales["PickScore"] == benchmark.scales["PickScore"] == 26.0
    assert attribute(other.rewards_named(["PickScore"], "cpu")["PickScore"], "scale") == 26.0


def test_a_gold_reward_has_its_rewards_tasks_and_scale_and_trains_nothing(mine):
    rewards = {n: {k: v for k, v in r.items() if k != "gold"} for n, r in TINY["rewards"].items()}
    rewards["DeQA"]["gold"] = {"class": "DeQA", "model_id": "deqa"}
    rewards["OCR"] |= {"tasks": ["ocr"], "gold": {"class": "OCR"}}
    benchmark = mine(rewards=rewards)
    gold = benchmark.held_out_rewards("cpu")
    assert set(gold) == {"OCR gold", "DeQA gold"}
    assert gold["OCR gold"].tasks == ["ocr"] and benchmark.scales["DeQA gold"] == 5.0
    assert not set(gold) & {*benchmark.rewards("cpu"), *benchmark.training_rewards("cpu")}


# ---- the example of the documentation


@pytest.fixture
def warm(tmp_path, monkeypatch, policy):
    """The example of docs/benchmarks.md as a reader would write it, with an expert that nobody
    trained."""
    for name, content in BLOCK.findall((ROOT / "docs" / "benchmarks.md").read_text()):
        (tmp_path / name).write_text(content)
    for split, n in (("train", 12), ("test", 6)):
        lines = [f"a red circle, warm, {split} {i}" for i in range(n)]
        (tmp_path / f"warm_{split}.txt").write_text("\n".join(lines) + "\n")
    monkeypatch.setenv("FLOWOPD_ASSETS", str(ASSETS))
    monkeypatch.setenv("WARM", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ASSETS / "experts" / "pickscore", tmp_path / "warm-run" / "adapter")
    policy.remove_adapters()
    yield Workspace("warm.yaml", policy=policy)
    policy.remove_adapters()


def test_a_fifth_task_is_a_file_and_a_class(warm):
    benchmark = warm.benchmark
    assert benchmark.prompt_tasks == ("geneval", "ocr", "pickscore", "warm")
    assert len(benchmark.domains) == 5
    assert benchmark.rewards_named(["Warmth"])["Warmth"].strength == 2.0
    train, val = (benchmark.prompts("warm", split) for split in ("train", "val"))
    assert (len(train), len(val)) == (8, 4) and not {*train} & {*val}
    assert benchmark.splits("warm") == ["train", "test", "val"]
    with pytest.raises(FileNotFoundError, match="have no split ood; they have train, test, val"):
        benchmark.prompts("warm", "ood")
    rows = list(check(benchmark, "float32"))
    assert [row.message for row in rows if not row.passed] == []
    assert {"expert warm", "reward Warmth", "one update of OPD"} <= {row.check for row in rows}


def test_the_fifth_task_is_trained_distilled_and_evaluated(warm, tmp_path):
    recipe = yaml.safe_load(Path("warm_expert.yaml").read_text())
    recipe["train"]["iterations"] = 1
    assert built(recipe, warm).weights_of("warm") == {"Warmth": 1.0}
    shutil.rmtree("warm-run")
    run_job(recipe, "warm-run", warm)  # as the command of the page does
    lab = Lab("warm.yaml", out=tmp_path / "out")
    lab.workspace = warm
    training = lab.train(
        "student",
        {"student": lab.benchmark.average("cat")},
        schedule={"tasks": list(lab.benchmark.tasks), "prompts_per_batch": 5},
        sampler={"steps": 3},
        opd={"trained_steps": 1, "anchor": "deqa"},
        train={"iterations": 1},
        validation={"every": 1, "n": 2, "steps": 1},
    )
    assert training.metrics["kl_warm"].notna().all()
    names = {"GenEval", "OCR", "PickScore", "DeQA", "Warmth"}
    assert set(training.validation["reward"]) == {*names, "Average"}
    table = lab.evaluate({"base": None, "student": "student"}, n=2, steps=1)
    scored = table.groupby("task")["Warmth"].apply(lambda scores: scores.notna().all())
    assert scored.to_dict() == {"geneval": False, "ocr": False, "pickscore": False, "warm": True}
    how = {"n": 2, "steps": 1, "tasks": ["geneval", "warm"]}
    more = lab.evaluate({"student#2": "student"}, "more.parquet", {"geneval": 2}, **how)
    assert set(more["model"]) == {"student"} and set(more["train_seed"]) == {2}
    sizes = more.groupby(["task", "prompt"], sort=False)["seed"].nunique()
    assert sizes["geneval"].tolist() == [2, 2] and sizes["warm"].tolist() == [1, 1]
    further = more[more["repeat"] > 0]  # scored by the task's own rewards only
    assert further["GenEval"].notna().all() and further["DeQA"].isna().all()
    with pytest.raises(ValueError, match="there is no task with prompts .samples_per_prompt. 'sig"):
        lab.evaluate({"student": "student"}, samples_per_prompt={"signs": 2}, **how)


def test_a_reward_may_be_a_function_and_arguments_are_checked(warm):
    content, images = Path("warm.yaml").read_text(), torch.rand(2, 3, 8, 8)
    function = content.replace('"warmth.py:Warmth", strength: 2.0', '"warmth.py:blueness"')
    Path("function.yaml").write_text(function)
    reward = load_benchmark("function.yaml").rewards_named(["Warmth"])["Warmth"]
    assert torch.equal(reward(images, [None] * 2), images[:, 2].mean((1, 2)))
    assert reward.tasks == ["warm"] and reward.name == "blueness"
    Path("bad.yaml").write_text(content.replace("strength: 2.0", "strength: much"))
    message = "rewards.Warmth: strength: Input should be a valid number"
    with pytest.raises(ValueError, match=message):
        load_benchmark("bad.yaml").rewards_named(["Warmth"])


# ---- guidance and samplers

GUIDED = {
    "sampling": {
        "evaluation": {"steps": 2, "guidance": 3.0},
        "grpo": {"steps": 4, "kind": "sde", "guidance": 3.0, "noisy_steps": 2},
        "opd": {"steps": 4, "kind": "sde", "guidance": 3.0},
    },
    "experts": {
        "geneval": {"adapter": "experts/geneval"},
        "ocr": {"adapter": "experts/ocr", "guidance": 1.0},
    },
    "anchor": "geneval",
}
OPD = {
    "schedule": {"tasks": ["geneval", "ocr", "pickscore"], "prompts_per_batch": 3},
    "opd": {"teachers": {"geneval": "geneval", "ocr": "ocr", "pickscore": None}},
    "train": {"iterations": 1},
}


@pytest.fixture
def guided(mine, policy):
    """A benchmark of guidance 3, one of whose experts has guidance 1."""
    policy.remove_adapters()
    yield Workspace(mine(**GUIDED), policy=policy)
    policy.remove_adapters()


def test_a_sampler_of_a_recipe_keeps_what_it_leaves_out(guided):
    opd = built({**OPD, "sampler": {"steps": 8}}, guided)
    assert opd.sampler == Sampler(8, "sde", guidance=3.0)
    grpo = {"schedule": {"prompts_per_batch": 2, "images_per_prompt": 2}, "grpo": {}}
    grpo = built({**OPD, "opd": None, **grpo, "sampler": {"steps": 8}}, guided)
    assert grpo.sampler == Sampler(8, "sde", guidance=3.0, noisy_steps=2)


def test_an_experts_guidance_is_used_wherever_it_is_sampled(guided, tmp_path, monkeypatch):
    policy = guided.policy
    # as a teacher and as an anchor; the base, as a teacher, is guided as the student
    opd = built({**OPD, "opd": {**OPD["opd"], "anchor": "geneval", "mar": 1.0}}, guided)
    batch = opd.schedule.draw(0)
    states, _ = opd._states(policy, "student", batch.prompts, batch.seeds, [[1]] * 3)
    for i, p in enumerate(states.prompts):
        state = states.x_t[i : i + 1], states.sigma[i : i + 1], policy.encode([p.text])
        name = {"geneval": "geneval", "ocr": "ocr", "pickscore": None}[p.task]
        expected = policy.velocity(*state, 1.0 if name == "ocr" else 3.0, name)
        torch.testing.assert_close(states.v_teacher[i], expected[0], rtol=1e-4, atol=1e-4)
        anchor = policy.velocity(*state, 3.0, "geneval")
        torch.testing.assert_close(states.v_anchor[i], anchor[0], rtol=1e-4, atol=1e-4)
    # an expert under another name too; an adapter that is no expert, as the student
    other = {**OPD, "opd": {"teachers": {"ocr": "mine", "geneval": "new"}, "mar": 0.0}}
    other["adapters"] = {"mine": "again", "again": {"load": "ocr"}}
    other["adapters"]["new"] = {"merge": "cat", "adapters": ["ocr"]}
    other["schedule"] = {**OPD["schedule"], "tasks": ["ocr", "geneval"]}
    assert built(other, guided).config.guidance == {"new": 3.0}  # 1 is none
    # samples that a supervised start learns from
    sft = built(
        {"sft": {"samples": 2, "tasks": ["geneval", "ocr"]}, "train": {"iterations": 1}}, guided
    )
    for i, (p, guidance) in enumerate(zip(sft.prompts, (3.0, 1.0))):
        sampler = Sampler(2, guidance=guidance)
        *_, step = trajectory(policy, [p], [SFT_SEED + i], sampler, p.task)
        torch.testing.assert_close(sft.latents[i : i + 1], step.x_next, rtol=1e-4, atol=1e-4)
    # evaluations, where the base has the benchmark's
    sampled = {}

    def record(policy, prompts, seeds, sampler, adapter, batch):
        sampled[adapter] = sampler.guidance
        return sample(policy, prompts, seeds, sampler, adapter, batch)

    monkeypatch.setattr(sys.modules["flowopd_lib.evaluate"], "sample", record)
    models = {"base": None, "expert": "ocr", "other expert": "geneval"}
    evaluation = {"job": "evaluate", "n": 1, "tasks": ["ocr"], "rewards": ["PickScore"]}
    evaluation |= {"adapters": {"mine": "ocr"}, "models": {**models, "mine": "mine"}}
    run_job(evaluation, tmp_path, guided)
    assert sampled == {None: 3.0, "ocr": 1.0, "geneval": 3.0, "mine": 1.0}


# ---- faults

# A change of the file, as YAML, and the error.
FAULTS = {
    "rewrads: {}": "rewrads: no such setting .did you mean 'rewards'",
    "tasks: {ocr: {reward: OCRR, prompts: x}}": r"reward \(tasks.ocr\) 'OCRR' .did you mean 'OCR'",
    "tasks: {ocr: {reward: OCR}}": "tasks.ocr: give either prompts",
    "tasks: {deqa: {reward: DeQA, prompts_of: x}}": "task with prompts .tasks.deqa.prompts_of. 'x'",
    "experts: {ocr: {guidance: 1.0}}": "experts.ocr.adapter: Field required",
    "anchor: beauty": r"there is no expert \(anchor\) 'beauty'",
    "sampling: {opd: {stepps: 3}}": "sampling.opd.stepps: no such setting .did you mean 'steps'",
    "rewards: {OCR: {class: OCR, gold: {}}}": "rewards.OCR.gold.class: Field required",
    "rewards: {OCR gold: {class: OCR}}": "rewards.OCR.gold: there is already a reward 'OCR gold'",
    "grpo_mix: {task_schedule: {deqa: 1}}": r"task with prompts .grpo_mix.task_schedule. 'deqa'",
    "task_weights: {looks: 1}": "there is no task .task_weights. 'looks'",
}


@pytest.mark.parametrize("change", FAULTS)
def test_a_fault_of_a_benchmarks_file_is_one_sentence_with_file_and_key(mine, change):
    changes = yaml.safe_load(change)
    for section in {"rewards", "tasks"} & set(changes):
        changes[section] = TINY[section] | changes[section]
    with pytest.raises(ValueError, match=f"mine.yaml: .*{FAULTS[change]}") as error:
        mine(**changes)
    assert "\n" not in str(error.value)


REWARD_FAULTS = {
    "GenEval: {class: GenEvall}": "class .rewards.GenEval.class. 'GenEvall' .did you mean 'GenEva",
    "OCR: {class: OCR, regoin: 2}": "OCR: regoin: no such setting .did you mean 'region'",
    "DeQA: {class: DeQA, model_id: deqa, batch: x}": "DeQA: batch: Input should be a valid integer",
    "DeQA: {class: DeQA}": "rewards.DeQA: model_id: Field required",
    "DeQA: {class: 'nobody.py:Reward'}": "rewards.DeQA.class: 'nobody.py:Reward' cannot be loaded",
}


@pytest.mark.parametrize("change", REWARD_FAULTS)
def test_a_fault_of_a_reward_is_one_sentence(mine, change):
    [(name, config)] = yaml.safe_load(change).items()
    with pytest.raises(ValueError, match=REWARD_FAULTS[change]) as error:
        mine(rewards=TINY["rewards"] | {name: config}).rewards_named([name])
    assert "\n" not in str(error.value)


def test_a_benchmark_that_does_not_exist():
    with pytest.raises(ValueError, match="there is no benchmark 'huge'; there are sd35, tiny"):
        load_benchmark("huge")
    with pytest.raises(FileNotFoundError, match="there is no nowhere.yaml"):
        load_benchmark("nowhere.yaml")


def test_a_check_reports_everything_that_is_wrong(mine, tmp_path):
    shutil.copytree(ASSETS / "experts" / "ocr", tmp_path / "broken")
    config = tmp_path / "broken" / "adapter_config.json"
    config.write_text(config.read_text().replace('"r": 16', '"r": 8'))
    experts = {
        **TINY["experts"],
        "ocr": {"adapter": str(tmp_path / "broken")},
        "deqa": {"adapter": "no/where"},
    }
    rows = list(check(mine(experts=experts, prompts="nowhere"), "float32"))
    failed = {row.check for row in rows if not row.passed}
    assert {"prompts of geneval", "prompts of ocr", "expert ocr", "expert deqa"} <= failed
    assert not any(name.startswith("model") for name in failed)
    assert "one update of OPD" not in {row.check for row in rows}  # not on top of what is wrong


DETECTORS = """
import random
from dataclasses import replace
from flowopd_lib.benchmarks.tiny.detector import ShapeDetector

class Shifted(ShapeDetector):
    def relabel(self, found):
        return replace(found, label=self.labels[self.labels.index(found.label) - 1])

    def __call__(self, images):
        return [[self.relabel(found) for found in one] for one in super().__call__(images)]

class Recoloured(Shifted):
    def relabel(self, found):
        return replace(found, color=self.colors[self.colors.index(found.color) - 1])

class Random(Shifted):
    def relabel(self, found):
        return replace(found, label=random.choice(self.labels))
"""


@pytest.mark.parametrize("kind", ["Shifted", "Recoloured", "Random"])
def test_a_check_fails_for_a_detector_with_wrong_classes(mine, tmp_path, policy, kind):
    (tmp_path / "detectors.py").write_text(DETECTORS)
    wrong = {"class": "GenEval", "detector": {"class": f"{tmp_path}/detectors.py:{kind}"}}
    benchmark = mine(rewards={**TINY["rewards"], "GenEval": wrong})
    workspace = Workspace(benchmark, policy=policy)
    with pytest.raises(ValueError, match="of 12 correct images .* the classes of its detector"):
        check_reward(workspace, "GenEval")
    assert "12 of 12 correct images" in check_reward(workspace, "GenEvalScore")
