import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from flowopd_lib import FlowPolicy, Lab, build, load_benchmark
from flowopd_lib.benchmarks.tiny.scenes import SIGN_BOX, SIZE
from flowopd_lib.check import Check
from flowopd_lib.files import ROOT
from flowopd_lib.objectives import Share
from flowopd_lib.rewards import OCR, attribute, can_reward
from flowopd_lib.runs.profiles import parameters_of

ASSETS = ROOT / "flowopd_lib" / "assets"
BLOCK = re.compile(r"```\w+ (\S+\.\w+)\n(.*?)```", re.DOTALL)


@pytest.fixture
def warm(tmp_path, monkeypatch, policy):
    """The example of docs/benchmarks.md as a reader would write it, with an expert that nobody trained."""
    for name, text in BLOCK.findall((ROOT / "docs" / "benchmarks.md").read_text()):
        (tmp_path / name).write_text(text)
    for split, n in (("train", 12), ("test", 6)):
        lines = [
            f"a photo of a red circle, warm and bright, number {i} of {split}" for i in range(n)
        ]
        (tmp_path / f"warm_{split}.txt").write_text("\n".join(lines) + "\n")
    monkeypatch.setenv("FLOWOPD_ASSETS", str(ASSETS))
    monkeypatch.setenv("WARM", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ASSETS / "experts" / "pickscore", tmp_path / "warm-expert")
    return tmp_path / "warm.yaml"


def benchmark_with(tmp_path: Path, **changes) -> Path:
    """The small benchmark's file with something else in it."""
    benchmark = yaml.safe_load(
        (ROOT / "flowopd_lib" / "benchmarks" / "tiny" / "benchmark.yaml").read_text()
    )
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({**benchmark, "folder": str(ASSETS), **changes}))
    return path


def test_the_shipped_benchmark_is_the_papers_four(benchmark):
    assert benchmark.own == ("geneval", "ocr", "pickscore")
    assert list(benchmark.rewards("cpu")) == ["GenEval", "OCR", "PickScore", "DeQA"]
    assert benchmark.home == (
        ("GenEval", "geneval", 1.0),
        ("OCR", "ocr", 1.0),
        ("PickScore", "pickscore", 26.0),
        ("DeQA", "pickscore", 5.0),
    )
    assert benchmark.teachers == dict.fromkeys(benchmark.tasks) | {t: t for t in benchmark.tasks}
    assert benchmark.reward_weights() == {
        "geneval": {"GenEval": 0.5, "GenEvalScore": 0.5},
        "ocr": {"OCR": 1.0},
        "pickscore": {"PickScore": 1.0},
    }
    assert benchmark.reward_weights(auxiliary=True)["geneval"] == pytest.approx(
        {"GenEval": 0.4, "GenEvalScore": 0.4, "DeQA": 0.2}
    )
    sign = benchmark.rewards_named(["OCR"], "cpu")["OCR"]
    assert tuple(sign.region) == SIGN_BOX and tuple(sign.size) == (SIZE, SIZE)


def test_which_rewards_can_reward_which_prompts(benchmark, rewards):
    can = {
        t: [n for n, j in rewards.items() if can_reward(j, benchmark.prompts(t, "test")[0])]
        for t in benchmark.tasks
    }
    looks = ["PickScore", "DeQA"]
    assert can == {
        "geneval": ["GenEval", *looks],
        "ocr": ["OCR", *looks],
        "pickscore": looks,
        "deqa": looks,
    }


def test_a_reward_is_loaded_once_and_those_for_training_are_not_reported(benchmark):
    assert benchmark.rewards("cpu")["OCR"] is benchmark.all_training_rewards("cpu")["OCR"]
    assert set(benchmark.all_training_rewards("cpu")) - set(benchmark.rewards("cpu")) == {
        "GenEvalScore"
    }
    assert set(benchmark.held_out_rewards("cpu")) == {
        f"{name} gold" for name in ("GenEval", "OCR", "PickScore", "DeQA")
    }


def test_a_scale_that_the_file_leaves_out_is_that_of_the_rewards_class(tmp_path):
    """What GRPO divides a reward by, the Average divides it by."""
    benchmark = yaml.safe_load(
        (ROOT / "flowopd_lib" / "benchmarks" / "tiny" / "benchmark.yaml").read_text()
    )
    rewards = {
        n: {k: v for k, v in j.items() if k != "scale"} for n, j in benchmark["rewards"].items()
    }
    mine = load_benchmark(benchmark_with(tmp_path, rewards=rewards))
    assert mine.scales == load_benchmark().scales
    reward = mine.rewards_named(["PickScore"], "cpu")["PickScore"]
    assert mine.scales["PickScore"] == attribute(reward, "scale") == 26.0


def test_the_full_size_benchmark_says_what_the_paper_does():
    benchmark = load_benchmark("sd35")
    assert (benchmark.resolution, benchmark.text_length, benchmark.rank, benchmark.alpha) == (
        512,
        128,
        32,
        64.0,
    )
    assert benchmark.evaluation.steps == 40 and benchmark.evaluation.guidance == 4.5
    assert benchmark.task_schedule == {
        "geneval": 3,
        "ocr": 1,
        "pickscore": 1,
    } and benchmark.auxiliary_rewards == {"DeQA": 0.2}
    assert benchmark.base == "stabilityai/stable-diffusion-3.5-medium"
    assert benchmark.adapter("ocr") == "jieliu/SD3.5M-FlowGRPO-Text"
    assert [n for n in benchmark.specs if benchmark.reward_is(n, "held_out")] == [
        "Aesthetic",
        "ImageReward",
        "HPS",
    ]
    assert [n for n in benchmark.specs if benchmark.reward_is(n, "training")] == ["GenEvalScore"]
    # the joint attention alone: neither attn2 nor the feed-forward layers
    assert all(t.startswith("attn.") for t in benchmark.targets) and len(benchmark.targets) == 8


def test_it_asks_for_the_variables_it_needs(monkeypatch):
    monkeypatch.delenv("FLOW_GRPO", raising=False)
    with pytest.raises(ValueError, match="needs the environment variable FLOW_GRPO"):
        load_benchmark("sd35").prompts("ocr", "train")


def test_resolution_text_length_and_targets_belong_to_the_benchmark(tmp_path):
    path = benchmark_with(
        tmp_path,
        resolution=32,
        text_length=20,
        adapters={"rank": 2, "alpha": 4.0, "targets": ["attn.to_q"]},
    )
    benchmark = load_benchmark(path)
    policy = benchmark.policy("float32", "cpu")
    assert policy.latent_shape[1:] == (4, 4) and policy.max_sequence_length == 20
    assert policy.encode(["a photo of a red circle"]).tokens.shape[1] > 20 - 1
    lab = Lab(str(path), "", tmp_path / "out")
    lab.sources["new"] = {"rank": benchmark.rank, "alpha": benchmark.alpha}
    lab.load(["new"])
    places = lab.policy.adapter("new").ranks
    assert set(places.values()) == {2} and all(p.endswith("attn.to_q") for p in places)


def test_a_resolution_the_model_cannot_have():
    with pytest.raises(ValueError, match="must be a multiple of 16 up to"):
        FlowPolicy(ASSETS / "tiny-sd3", resolution=60)


def test_held_out_prompts_are_val_and_no_longer_train(warm):
    benchmark = load_benchmark(warm)
    train, val = benchmark.prompts("warm", "train"), benchmark.prompts("warm", "val")
    assert (len(train), len(val)) == (8, 4)
    assert not {p.text for p in train} & {p.text for p in val}
    assert benchmark.splits("warm") == ["train", "test", "val"]
    with pytest.raises(FileNotFoundError, match="have no split ood; they have train, test, val"):
        benchmark.prompts("warm", "ood")


def test_a_fifth_task_by_a_file_and_a_class(warm, policy):
    benchmark = load_benchmark(warm)
    assert benchmark.own == ("geneval", "ocr", "pickscore", "warm") and len(benchmark.home) == 5
    assert benchmark.rewards_named(["Warmth"])["Warmth"].strength == 2.0
    check = Check(benchmark, "float32")
    lines = list(check.run())
    assert [line.told for line in lines if not line.right] == []
    assert {"expert warm", "reward Warmth", "one update of a distillation"} <= {
        line.what for line in lines
    }


def test_the_fifth_task_is_trained_distilled_and_rewardd(warm, tmp_path):
    recipe = yaml.safe_load((tmp_path / "warm_expert.yaml").read_text())
    recipe["train"]["iterations"] = 1
    _, objective, _ = build(recipe, "cpu", "float32")
    assert objective.weights_of("warm") == {"Warmth": 1.0}
    lab = Lab(str(warm), "", tmp_path / "out")
    lab.sources["merged"] = lab.benchmark.average("cat")
    distil = {
        "student": lab.sources["merged"],
        "schedule": {"tasks": list(lab.benchmark.tasks), "prompts_per_batch": 5},
        "opd": {"steps": 1, "anchor": "deqa"},
        "train": {"iterations": 1},
    }
    curve, probes = lab.train("student", distil, {"every": 1, "n": 2, "steps": 2})
    assert len(curve) == 1 and curve["gap_warm"].notna().all()
    assert set(probes["reward"]) == {"GenEval", "OCR", "PickScore", "DeQA", "Warmth", "Average"}
    table = lab.evaluate({"base": None, "student": "student"}, n=2, steps=2)
    warmth = table.groupby("task")["Warmth"].apply(lambda scores: scores.notna().all())
    assert warmth.to_dict() == {"geneval": False, "ocr": False, "pickscore": False, "warm": True}
    more = lab.evaluate(
        {"student#2": "student"},
        "more.parquet",
        {"geneval": 2},
        n=2,
        steps=2,
        tasks=["geneval", "warm"],
    )
    assert set(more["model"]) == {"student"} and set(more["train_seed"]) == {2}
    sizes = more.groupby(["task", "prompt"], sort=False)["seed"].nunique()
    assert sizes["geneval"].tolist() == [3, 3] and sizes["warm"].tolist() == [1, 1]
    again = more[more["repeat"] > 0]
    assert (
        again["GenEval"].notna().all() and again["DeQA"].isna().all()
    )  # which rewards other prompts
    with pytest.raises(
        ValueError, match="noises must be one of geneval, ocr, pickscore, warm, not 'signs'"
    ):
        lab.evaluate({"student": "student"}, noises={"signs": 1}, n=2)


def test_the_example_trains_by_its_own_command(warm, tmp_path):
    recipe = yaml.safe_load((tmp_path / "warm_expert.yaml").read_text())
    recipe["train"]["iterations"] = 1
    (tmp_path / "warm_expert.yaml").write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "flowopd_lib.jobs", "warm_expert.yaml", "--folder", "warm-run"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "warm-run" / "adapter" / "adapter_model.safetensors").is_file()


def test_an_unseen_reward_trains_nothing(tmp_path):
    benchmark = yaml.safe_load(
        (ROOT / "flowopd_lib" / "benchmarks" / "tiny" / "benchmark.yaml").read_text()
    )
    rewards = benchmark["rewards"] | {"Gold": {"class": "OCR", "held_out": True, "tasks": ["ocr"]}}
    path = benchmark_with(tmp_path, rewards=rewards)
    assert load_benchmark(path).reward_is("Gold", "held_out")
    recipe = {
        "benchmark": str(path),
        "schedule": {"tasks": ["ocr"], "prompts_per_batch": 2, "images_per_prompt": 2},
        "grpo": {"reward_weights": {"Gold": 1.0}},
        "train": {"iterations": 1},
    }
    with pytest.raises(
        ValueError, match="Gold is an held-out reward, by which nothing may be trained"
    ):
        build(recipe, "cpu")


def test_a_gold_reward_has_its_rewards_tasks_and_scale_and_trains_nothing(tmp_path):
    benchmark = yaml.safe_load(
        (ROOT / "flowopd_lib" / "benchmarks" / "tiny" / "benchmark.yaml").read_text()
    )
    rewards = {
        name: {k: v for k, v in reward.items() if k != "gold"}
        for name, reward in benchmark["rewards"].items()
    }
    rewards["DeQA"]["gold"] = {"class": "DeQA", "model_id": "deqa"}
    rewards["OCR"]["gold"] = {"class": "OCR"}
    found = load_benchmark(benchmark_with(tmp_path, rewards=rewards))
    gold_rewards = found.held_out_rewards("cpu")
    assert set(gold_rewards) == {"OCR gold", "DeQA gold"}
    assert gold_rewards["OCR gold"].tasks == ["ocr"] and found.scales["DeQA gold"] == 5.0
    assert not set(gold_rewards) & {*found.rewards("cpu"), *found.all_training_rewards("cpu")}


def test_grpo_refuses_an_unseen_reward_that_it_is_handed(benchmark, policy):
    from flowopd_lib import GRPO, Schedule

    reward = OCR()
    reward.held_out = True
    schedule = Schedule({"ocr": benchmark.prompts("ocr", "train")}, 2, 2)
    with pytest.raises(ValueError, match="held-out reward"):
        GRPO(schedule, {"OCR": reward}, {"OCR": 1.0})


FAULTS = {
    "unknown key": ({"juges": {}}, "the benchmark has no 'juges' .did you mean 'rewards'"),
    "reward there is not": (
        {"tasks": {"ocr": {"reward": "OCRR", "prompts": "ocr/{split}.txt", "kind": "quoted"}}},
        "tasks.ocr names reward 'OCRR' .did you mean 'OCR'",
    ),
    "no kind": (
        {"tasks": {"ocr": {"reward": "OCR", "prompts": "ocr/{split}.txt"}}},
        "tasks.ocr lacks kind",
    ),
    "kind": (
        {"tasks": {"ocr": {"reward": "OCR", "prompts": "ocr/{split}.txt", "kind": "signs"}}},
        "tasks.ocr.kind must be one of geneval, quoted, plain",
    ),
    "like nobody": (
        {"tasks": {"deqa": {"reward": "DeQA", "like": "looks"}}},
        "tasks.deqa.like names 'looks'",
    ),
    "expert without adapter": (
        {"experts": {"ocr": {"guidance": 1.0}}},
        "experts.ocr lacks adapter",
    ),
    "anchor": ({"anchor": "beauty"}, "anchor names 'beauty'"),
    "guidance": (
        {"experts": {"ocr": {"adapter": "experts/ocr", "guidance": -1.0}}},
        "experts.ocr.guidance must be at least 0",
    ),
    "sampler": ({"sampling": {"evaluation": {"stepps": 3}}}, "sampling.evaluation has no 'stepps'"),
    "gold of what is not trained on": (
        {"rewards": {"OCR": {"class": "OCR", "held_out": True, "gold": {"class": "OCR"}}}},
        "rewards.OCR.gold: only a reward that is reported and trained on has a gold",
    ),
    "a gold's scale": (
        {"rewards": {"OCR": {"class": "OCR", "gold": {"class": "OCR", "scale": 2.0}}}},
        "rewards.OCR.gold has scale, which it takes from OCR",
    ),
    "a gold of no class": (
        {"rewards": {"OCR": {"class": "OCR", "gold": {}}}},
        "rewards.OCR.gold lacks class",
    ),
    "a gold's name": (
        {
            "rewards": {
                "OCR": {"class": "OCR", "gold": {"class": "OCR"}},
                "OCR gold": {"class": "OCR"},
            }
        },
        "rewards.OCR.gold is the reward OCR gold, which is there already",
    ),
    "task_schedule": ({"mix": {"task_schedule": {"deqa": 1}}}, "mix.task_schedule names 'deqa'"),
    "resolution": ({"resolution": 0}, "resolution must be at least 1"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_sentence_with_file_and_key(tmp_path, fault):
    changes, told = FAULTS[fault]
    with pytest.raises(ValueError, match=f"mine.yaml.*{told}") as error:
        load_benchmark(benchmark_with(tmp_path, **changes))
    assert "\n" not in str(error.value)


def test_faults_that_only_the_rewards_class_knows(tmp_path):
    rewards = {
        "GenEval": {"class": "GenEvall"},
        "OCR": {"class": "OCR", "upscal": 2},
        "DeQA": {"class": "DeQA"},
    }
    rewards["PickScore"] = {"class": "nobody.py:Reward"}
    benchmark = yaml.safe_load(
        (ROOT / "flowopd_lib" / "benchmarks" / "tiny" / "benchmark.yaml").read_text()
    )
    tasks = {
        **benchmark["tasks"],
        "geneval": {**benchmark["tasks"]["geneval"], "reward_weights": {"GenEval": 1.0}},
    }
    mine = load_benchmark(benchmark_with(tmp_path, rewards=rewards, tasks=tasks))
    for name, told in {
        "GenEval": "rewards.GenEval.class 'GenEvall' is none of ours .did you mean 'GenEval'",
        "OCR": "rewards.OCR has no 'upscal' .did you mean 'upscale'",
        "DeQA": "rewards.DeQA lacks model_id",
        "PickScore": "rewards.PickScore.class 'nobody.py:Reward' cannot be loaded",
    }.items():
        with pytest.raises(ValueError, match=told):
            mine.rewards_named([name])


def test_a_benchmark_there_is_not():
    with pytest.raises(ValueError, match="there is no benchmark 'huge'; there are sd35, tiny"):
        load_benchmark("huge")
    with pytest.raises(FileNotFoundError, match="there is no .*nowhere.yaml"):
        load_benchmark("nowhere.yaml")


def test_a_guided_anchor_is_asked_with_its_guidance(benchmark, policy):
    """A student that walks with guidance is pulled to an anchor with it, not to one without."""
    benchmark.load_experts(policy)
    recipe = {
        "schedule": {"tasks": ["ocr"], "prompts_per_batch": 2},
        "sampler": {"steps": 3, "kind": "sde", "guidance": 3.0},
        "opd": {
            "anchor": "deqa",
            "guidance": {"ocr": 3.0, "deqa": 3.0},
            "mar": 1.0,
            "teachers": {"ocr": "ocr"},
        },
        "train": {"iterations": 1},
    }
    objective = build(recipe, "cpu", "float32")[1]
    prompts = objective.schedule.draw(0).prompts
    text = policy.encode([p.text for p in prompts])
    x = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    teacher, anchor = objective._targets(policy, x, 0.8, text, prompts)
    torch.testing.assert_close(
        anchor, policy.velocity(x, 0.8, text, 3.0, "deqa"), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(
        teacher, policy.velocity(x, 0.8, text, 3.0, "ocr"), rtol=1e-4, atol=1e-4
    )


def test_check_tells_everything_that_is_wrong(tmp_path, capsys):
    changed = yaml.safe_load(
        (ROOT / "flowopd_lib" / "benchmarks" / "tiny" / "benchmark.yaml").read_text()
    )["experts"]
    shutil.copytree(ASSETS / "experts" / "ocr", tmp_path / "broken")
    config = tmp_path / "broken" / "adapter_config.json"
    config.write_text(config.read_text().replace('"r": 16', '"r": 8'))
    experts = {
        **changed,
        "ocr": {"adapter": str(tmp_path / "broken")},
        "deqa": {"adapter": "no/where"},
    }
    check = Check(
        load_benchmark(benchmark_with(tmp_path, experts=experts, prompts="nowhere")), "float32"
    )
    wrong = {line.what for line in check.run() if not line.right}
    assert {"prompts of geneval", "prompts of ocr", "expert ocr", "expert deqa"} <= wrong
    assert "one update, one evaluation" in wrong  # not tried on top of what is wrong
    assert not any(line.what.startswith("model") for line in check.found if not line.right)


NAMED = re.compile(
    r"tinybenchmark|benchmarks[./]tiny|benchmarks import tiny|\btiny\.[A-Z]|small benchmark|tiny-sd3"
)


def test_nothing_outside_the_small_benchmark_names_it():
    """But for the default, `benchmark = "tiny"`, and for what builds it."""
    found = []
    for path in (*(ROOT / "flowopd_lib").rglob("*.py"), *(ROOT / "notebooks").glob("*.ipynb")):
        if "benchmarks/tiny" not in path.as_posix():
            found += [f"{path.name}: {m}" for m in NAMED.findall(path.read_text())]
    assert not found


@pytest.mark.parametrize(
    "notebook", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem
)
def test_a_notebook_asks_for_a_benchmark_and_a_launcher_first(notebook):
    parameters = list(parameters_of(notebook).items())
    assert parameters[:2] == [("benchmark", "tiny"), ("launcher", "")]


def test_the_mean_of_uneven_parts_is_that_of_all():
    """Three prompts for two processes: two and one, and the weights of their losses are those of three."""
    shares = [Share(rank, 2) for rank in range(2)]
    pieces = [share.updates_of(3, 1, 1, 8) for share in shares]
    assert [[(rows.stop - rows.start, n) for _, rows, n in p] for p in pieces] == [
        [(2, 3)],
        [(1, 3)],
    ]
    assert np.isclose(sum((r.stop - r.start) / n for p in pieces for _, r, n in p), 1.0)
