"""A finished training is found again in the cache by what it follows from, and by nothing else."""

import json

import huggingface_hub.constants
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from trainings import changed, metrics

from flowopd_lib import load_benchmark
from flowopd_lib.config import read_yaml, validate
from flowopd_lib.files import ROOT, read_lines, write_json, write_whole
from flowopd_lib.fingerprint import code_hashes, sha256_of_code
from flowopd_lib.lab import Lab, cache
from flowopd_lib.lab.jobs import TrainJob, run_job
from flowopd_lib.lab.workspace import Workspace

SPEC = {
    "student": {"rank": 2},
    "schedule": {"tasks": ["geneval"], "prompts_per_batch": 2},
    "sampler": {"steps": 2},
    "opd": {"trained_steps": 1},
    "train": {"iterations": 2, "lr": 1.0e-3},
    "validation": {"every": 2, "n": 2, "steps": 1},
}
GRPO = {
    "student": {"rank": 2},
    "schedule": {"tasks": ["geneval"], "prompts_per_batch": 2, "images_per_prompt": 2},
    "grpo": {"reward_weights": {"GenEval": 1.0}},
    "train": {"iterations": 1},
}
THREE = changed(SPEC, train={"iterations": 3})
TINY = read_yaml(ROOT / "flowopd_lib" / "benchmarks" / "tiny" / "benchmark.yaml")


def fingerprint(spec, benchmark, dtype=torch.float32):
    return cache.fingerprint(validate(TrainJob, spec), benchmark, dtype)


def key(*arguments):
    return fingerprint(*arguments)["key"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, policy):
    """A run with one finished training."""
    folder = tmp_path_factory.mktemp("run")
    policy.remove_adapters()
    run_job(SPEC, folder / "05" / "student", Workspace("tiny", policy=policy))
    policy.remove_adapters()
    return folder


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "PLACE", tmp_path / "trainings")
    return tmp_path / "trainings"


# ---- found, and not found


def test_a_published_training_is_found_and_no_model_is_loaded(finished, place, tmp_path, capsys):
    [row] = cache.publish(finished)
    assert row["training"] == "05/student" and row["iterations"] == 2 and row["new"]
    assert not cache.publish(finished)[0]["new"]
    workspace = Workspace("tiny", "float32")
    for _ in range(2):  # the second time it lies in the folder
        run_job({**SPEC, "name": "other"}, tmp_path / "again", workspace)
    assert "policy" not in workspace.__dict__
    assert capsys.readouterr().out.count("again: found in the cache") == 1
    student = finished / "05" / "student"
    for name in ("metrics.jsonl", "validation_samples.jsonl"):
        tables = [read_lines(folder / name) for folder in (tmp_path / "again", student)]
        pd.testing.assert_frame_equal(*tables)
    weights = "adapter/adapter_model.safetensors"
    ours, cached = load_file(student / weights), load_file(tmp_path / "again" / weights)
    assert (
        all(torch.equal(ours[k].half(), cached[k]) for k in ours) and cached.keys() == ours.keys()
    )


def test_a_folder_with_a_cached_training_takes_another_one(finished, place, workspace, tmp_path):
    cache.publish(finished)
    folder = tmp_path / "more"
    run_job(SPEC, folder, workspace)
    assert not (folder / "state.safetensors").exists()
    run_job(THREE, folder, workspace)
    assert len(metrics(folder)) == 3
    assert set(read_lines(folder / "validation_samples.jsonl")["iteration"]) == {0, 2, 3}
    own = json.loads((folder / "training.json").read_text())["key"]
    assert own == key(THREE, workspace.benchmark) != key(SPEC, workspace.benchmark)
    # a folder with a state of its own is left alone
    cache.fetch(fingerprint(SPEC, workspace.benchmark), folder)
    assert len(metrics(folder)) == 3


def test_a_training_that_was_stopped_is_not_published_as_the_shorter_one(workspace, tmp_path):
    folder = tmp_path / "run" / "student"
    run_job(SPEC, folder, workspace)
    workspace.on_step = lambda info: info.iteration == 2
    longer = changed(SPEC, train={"iterations": 4})
    run_job(longer, folder, workspace)
    assert len(metrics(folder)) == 3 and (folder / "adapter").is_dir()
    with pytest.raises(ValueError, match="holds no finished training"):
        cache.publish(tmp_path / "run", tmp_path / "trainings")
    workspace.on_step = None
    run_job(longer, folder, workspace)
    assert cache.publish(tmp_path / "run", tmp_path / "trainings")[0]["iterations"] == 4


def test_a_cached_training_can_be_merged(finished, place, workspace, tmp_path):
    cache.publish(finished)
    lab = Lab("tiny", out=tmp_path)
    lab.workspace = workspace
    recipe = {key: value for key, value in SPEC.items() if key != "validation"}
    training = lab.train("again", recipe, validation=SPEC["validation"])
    assert len(training.metrics) == 2 and set(training.validation["iteration"]) == {0, 2}
    assert "again" not in workspace.policy.adapters  # it was not trained here
    lab.sources["mean"] = {"merge": "cat", "adapters": ["again", "geneval"]}
    lab.evaluate({"mean": "mean"}, n=1, steps=1, rewards=["DeQA"])


# ---- what a key depends on


def test_a_key_depends_on_the_recipe_and_the_precision(benchmark):
    same = [
        {**SPEC, "name": "a"},
        changed(SPEC, train={"save_every": 7}),
        changed(SPEC, student={"alpha": None}),
        changed(SPEC, opd={"loss": "pathwise"}),  # the default
    ]
    others = [
        {**SPEC, "seed": 1},
        changed(SPEC, student={"rank": 3}),
        {**SPEC, "student": "geneval"},
        {**SPEC, "student": {"merge": "cat", "adapters": ["geneval", "ocr"]}},
        changed(SPEC, opd={"loss": "log_ratio"}),
        THREE,
        {**SPEC, "validation": None},
    ]
    own = key(SPEC, benchmark)
    assert {key(spec, benchmark) for spec in same} == {own}
    keys = {own, key(SPEC, benchmark, torch.bfloat16), *(key(spec, benchmark) for spec in others)}
    assert len(keys) == len(others) + 2


def test_an_adapter_is_its_files_or_its_training(benchmark, finished, tmp_path):
    def of(folder):
        spec = {**SPEC, "student": "start", "adapters": {"start": str(folder / "adapter")}}
        return key(spec, benchmark)

    before = of(finished / "05" / "student")
    cache.publish(finished, tmp_path / "cached")
    [folder] = (tmp_path / "cached").iterdir()
    assert of(folder) == before  # the same training, in half precision
    (folder / "training.json").unlink()
    assert of(folder) != before


def test_what_lies_on_the_hub_is_its_commit(key_of, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    keys = [key_of({**SPEC, "student": "someone/adapter/deeper"})]
    for commit in ("1234", "5678"):
        write_whole(tmp_path / "models--someone--adapter" / "refs" / "main", commit)
        keys.append(key_of({**SPEC, "student": "someone/adapter/deeper"}))
    for commit in ("1234", "5678"):
        write_whole(tmp_path / "models--someone--adapter" / "refs" / "v2", commit)
        keys.append(key_of({**SPEC, "student": "someone/adapter@v2"}))
    assert len({*keys}) == 5


REWARD = '''
class Redness:
    """How red an image is."""

    name, range = "Redness", (0.0, 1.0)

    def __call__(self, images, prompts):
        return images[:, 0].mean((1, 2)) ** {power}


def loss(batch):  # the distillation loss, scaled
    return {power} * batch.weight * (batch.v_student - batch.v_teacher).square().flatten(1).sum(1)
'''


@pytest.fixture
def key_of(benchmark, tmp_path):
    """The key of a training of the small benchmark with other settings in its file."""

    def key_with(spec=SPEC, **change):
        config = {**TINY, "folder": str(benchmark.folder), **change}
        write_json(tmp_path / "mine.yaml", config)
        return key(spec, load_benchmark(tmp_path / "mine.yaml"))

    return key_with


def test_another_benchmark_is_another_training(benchmark, key_of):
    own = key_of()
    assert own == key(SPEC, benchmark) == key_of(about="Another sentence.")
    rewards = TINY["rewards"] | {"PickScore": {**TINY["rewards"]["PickScore"], "scale": 20.0}}
    sampling = {"opd": {"steps": 3, "kind": "sde"}}
    assert len({own, key_of(rewards=rewards), key_of(sampling=sampling)}) == 3


def test_another_version_of_a_users_reward_or_loss_is_another_training(key_of, tmp_path):
    file = tmp_path / "mine.py"
    rewards = TINY["rewards"] | {"Redness": {"class": f"{file}:Redness"}}
    keys = []
    for power, comment in ((1, ""), (1, "# a comment\n"), (2, "")):
        file.write_text(comment + REWARD.format(power=power))
        with_loss = changed(SPEC, opd={"loss": f"{file}:loss"})
        keys.append((key_of(rewards=rewards), key_of(with_loss)))
    assert keys[0] == keys[1]
    assert all(a != b for a, b in zip(keys[0], keys[2]))


def test_held_out_rewards_and_for_grpo_the_experts_do_not_count(benchmark):
    records = [fingerprint(spec, benchmark)["follows_from"] for spec in (SPEC, GRPO)]
    for record in records:
        rewards = record["benchmark"]["rewards"]
        assert not any(benchmark.reward_is(name, "held_out") for name in rewards)
        assert "gold" not in rewards["OCR"]
    assert set(records[0]["experts"]) == set(benchmark.experts) and not records[1]["experts"]
    with_reference = changed(GRPO, grpo={"reference": "ocr"})
    assert set(fingerprint(with_reference, benchmark)["follows_from"]["experts"]) == {"ocr"}


def test_comments_docstrings_and_the_version_of_python_do_not_count_as_code():
    one = '"""One."""\ndef f(x):\n    """Two."""\n    return x\n'
    assert sha256_of_code(one) == sha256_of_code("''\ndef f(x):  # so\n    'y'\n    return (x)")
    assert sha256_of_code(one) != sha256_of_code("def f(x):\n    return -x")
    # computed by another version: a machine with another one finds what is cached, too
    code = "def f(x, *, y=1):\n    return f'{x:.2f}', [y, None, '']\n"
    assert sha256_of_code(code).startswith("f623ff1a8866")


CACHED = sorted(cache.PLACE.glob("[!.]*"))


@pytest.mark.parametrize("folder", CACHED, ids=lambda folder: folder.name)
def test_the_cached_trainings_of_the_repository_are_of_its_code(folder):
    record = json.loads((folder / cache.RECORD).read_text())
    assert record["key"] == folder.name and record["follows_from"]["code"] == code_hashes(), (
        "what trainings follow from has changed (fingerprint.CODE), and this one is never found "
        "again: delete it, or take the change back"
    )
