"""A training that is kept is found again by what it follows from, and by nothing else."""

import json

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from flowopd_lib import Lab
from flowopd_lib.files import ROOT, read_lines, write_json
from flowopd_lib.inputs import read_yaml
from flowopd_lib.jobs import kept
from flowopd_lib.jobs.site import Site
from flowopd_lib.jobs.work import run_job
from flowopd_lib.runs import keep as command

SPEC = {
    "benchmark": "tiny",
    "student": {"rank": 2},
    "schedule": {"tasks": ["geneval"], "prompts_per_batch": 2},
    "sampler": {"steps": 2, "kind": "sde"},
    "opd": {"steps": 1},
    "train": {"iterations": 2, "lr": 1.0e-3},
    "probe": {"every": 2, "n": 2, "steps": 1},
}


def key(spec, benchmark, dtype=torch.float32):
    return kept.record_of(spec, benchmark, dtype)["key"]


@pytest.fixture(scope="module")
def run(tmp_path_factory, policy):
    """A run with one training, which has ended."""
    folder = tmp_path_factory.mktemp("run")
    run_job(SPEC, folder / "05" / "student", Site("tiny", policy=policy), shown=False)
    policy.remove_adapters()
    return folder


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setattr(kept, "PLACE", tmp_path / "trainings")
    return tmp_path / "trainings"


def test_it_is_not_made_again(run, place, tmp_path, capsys):
    (row,) = kept.keep(run, place)
    assert row["training"] == "05/student" and row["iterations"] == 2 and row["new"]
    assert not kept.keep(run, place)[0]["new"]
    site = Site("tiny", "float32")
    for _ in range(2):  # the second time it lies in the folder
        run_job({**SPEC, "name": "other"}, tmp_path / "again", site)
    assert "policy" not in site.__dict__  # no model was loaded for it
    assert "again: trained before, in" in capsys.readouterr().out
    for name in ("metrics.jsonl", "probes.jsonl"):
        pd.testing.assert_frame_equal(
            read_lines(tmp_path / "again" / name), read_lines(run / "05" / "student" / name)
        )
    weights = "adapter/adapter_model.safetensors"
    ours, found = (
        load_file(run / "05" / "student" / weights),
        load_file(tmp_path / "again" / weights),
    )
    assert all(torch.equal(ours[k].half(), found[k]) for k in ours) and found.keys() == ours.keys()


def test_a_folder_with_what_was_fetched_takes_another_training(run, place, tmp_path, policy):
    kept.keep(run, place)
    site = Site("tiny", policy=policy)
    run_job(SPEC, tmp_path / "more", site, shown=False)
    assert not (tmp_path / "more" / "state.safetensors").exists()
    longer = {**SPEC, "train": {**SPEC["train"], "iterations": 3}}
    run_job(longer, tmp_path / "more", site, shown=False)
    assert len(read_lines(tmp_path / "more" / "metrics.jsonl")) == 3
    assert sorted(set(read_lines(tmp_path / "more" / "probes.jsonl")["iteration"])) == [0, 2, 3]
    own = json.loads((tmp_path / "more" / "training.json").read_text())["key"]
    assert own == key(longer, site.benchmark) != key(SPEC, site.benchmark)
    # one of the folder's own is under way, or has ended: it goes on from its state
    kept.fetch(kept.record_of(SPEC, site.benchmark, torch.float32), tmp_path / "more")
    assert len(read_lines(tmp_path / "more" / "metrics.jsonl")) == 3
    policy.remove_adapters()


def test_a_training_that_is_stopped_is_not_kept_for_what_it_was_before(tmp_path, policy):
    site, folder = Site("tiny", policy=policy), tmp_path / "run" / "student"
    run_job(SPEC, folder, site, shown=False)
    assert (folder / "training.json").exists()
    longer = {**SPEC, "train": {**SPEC["train"], "iterations": 4}}
    run_job(longer, folder, site, told=lambda info: info.iteration == 2, shown=False)
    assert len(read_lines(folder / "metrics.jsonl")) == 3 and (folder / "adapter").is_dir()
    with pytest.raises(ValueError, match="holds no training that has ended"):
        kept.keep(tmp_path / "run", tmp_path / "trainings")
    run_job(longer, folder, site, shown=False)
    assert kept.keep(tmp_path / "run", tmp_path / "trainings")[0]["iterations"] == 4
    policy.remove_adapters()


def test_a_key_is_what_it_follows_from(benchmark, run, tmp_path):
    mine = key(SPEC, benchmark)
    assert mine == key(
        {**SPEC, "name": "a", "train": {**SPEC["train"], "save_every": 7}}, benchmark
    )
    others = [
        {**SPEC, "seed": 1},
        {**SPEC, "student": {"rank": 3}},
        {**SPEC, "student": "geneval"},
        {**SPEC, "student": {"merge": "cat", "adapters": ["geneval", "ocr"]}},
        {**SPEC, "train": {**SPEC["train"], "iterations": 3}},
        {**SPEC, "probe": None},
    ]
    keys = {mine, key(SPEC, benchmark, torch.bfloat16), *(key(spec, benchmark) for spec in others)}
    assert len(keys) == len(others) + 2
    assert (
        kept.record_of(
            {**SPEC, "train": {**SPEC["train"], "max_seconds": 9.0}}, benchmark, torch.float32
        )
        is None
    )


def test_an_adapter_is_its_files_or_its_training(benchmark, run, tmp_path):
    named = {
        **SPEC,
        "student": "start",
        "adapters": {"start": str(run / "05" / "student" / "adapter")},
    }
    before = key(named, benchmark)
    kept.keep(run, tmp_path / "kept")
    (folder,) = (tmp_path / "kept").iterdir()
    # the same training, in half precision
    assert key({**named, "adapters": {"start": str(folder / "adapter")}}, benchmark) == before
    (folder / "training.json").unlink()
    assert key({**named, "adapters": {"start": str(folder / "adapter")}}, benchmark) != before


def test_another_benchmark_is_another_training(benchmark, tmp_path):
    from flowopd_lib import load_benchmark

    told = read_yaml(ROOT / "flowopd_lib" / "benchmarks" / benchmark.name / "benchmark.yaml") | {
        "folder": str(benchmark.folder)
    }

    def of(name, **change):
        write_json(tmp_path / f"{name}.yaml", {**told, **change})
        return key(
            {**SPEC, "benchmark": str(tmp_path / f"{name}.yaml")},
            load_benchmark(tmp_path / f"{name}.yaml"),
        )

    same = of("same", about="Another sentence.")
    assert same == key(SPEC, benchmark)
    rewards = {**told["rewards"], "PickScore": {**told["rewards"]["PickScore"], "scale": 20.0}}
    sampling = {**told["sampling"], "distillation": {"steps": 3, "kind": "sde"}}
    assert len({same, of("rewards", rewards=rewards), of("sampling", sampling=sampling)}) == 3


def test_comments_do_not_count_as_code(tmp_path):
    def of(text):
        (tmp_path / "code.py").write_text(text)
        return kept._ast(tmp_path / "code.py")

    assert of('"""One."""\ndef f(x):\n    """Two."""\n    return x\n') == of(
        "''\ndef f(x):  # so\n    'y'\n    return (x)"
    )
    assert of("def f(x):\n    return x") != of("def f(x):\n    return -x")
    # the same in every version of Python: a machine with another finds what is kept, too
    assert of("def f(x, *, y=1):\n    return f'{x:.2f}', [y, None, '']\n").startswith(
        "f623ff1a8866"
    )


def test_held_out_rewards_and_for_grpo_the_experts_do_not_count(benchmark):
    grpo = {
        "student": {"rank": 2},
        "schedule": {"tasks": ["geneval"], "prompts_per_batch": 2, "images_per_prompt": 2},
        "grpo": {"reward_weights": {"GenEval": 1.0}},
        "train": {"iterations": 1},
    }
    told = {
        name: kept.record_of(spec, benchmark, torch.float32)
        for name, spec in {"o": SPEC, "g": grpo}.items()
    }
    benchmarks = {name: record["follows_from"]["benchmark"] for name, record in told.items()}
    assert not any(
        benchmark.reward_is(name, "held_out")
        for found in benchmarks.values()
        for name in found["rewards"]
    )
    assert not benchmarks["g"]["experts"] and set(benchmarks["o"]["experts"]) == set(
        benchmark.experts
    )
    anchored = {**grpo, "grpo": {**grpo["grpo"], "reference": "ocr"}}
    found = kept.record_of(anchored, benchmark, torch.float32)["follows_from"]["benchmark"]
    assert set(found["experts"]) == {"ocr"}


def test_what_was_fetched_can_be_merged(run, place, tmp_path, policy):
    kept.keep(run, place)
    lab = Lab("tiny", "", tmp_path)
    lab.site = Site("tiny", policy=policy)
    lab.train(
        "again", {k: v for k, v in SPEC.items() if k not in ("benchmark", "probe")}, SPEC["probe"]
    )
    assert "again" not in policy.adapters  # it was not trained here
    lab.sources["mean"] = {"merge": "cat", "adapters": ["again", "geneval"]}
    lab.evaluate({"mean": "mean"}, n=1, steps=1, rewards=["DeQA"])
    policy.remove_adapters()


@pytest.mark.parametrize("folder", sorted(kept.PLACE.glob("[!.]*")), ids=lambda folder: folder.name)
def test_what_the_repository_keeps_is_of_its_code(folder):
    told = json.loads((folder / kept.RECORD).read_text())
    assert told["key"] == folder.name and told["follows_from"]["code"] == kept._code(), (
        "what trainings follow from has changed (kept.CODE), and this one is never found again: delete it, "
        "or take the change back"
    )


def test_a_run_without_trainings_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["keep", str(tmp_path)])
    with pytest.raises(SystemExit, match="holds no training that has ended"):
        command.main()
