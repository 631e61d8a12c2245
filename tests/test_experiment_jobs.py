"""The jobs of the experiments on the small benchmark, as small as they run."""

import pandas as pd
import pytest
import torch

from flowopd_lib.benchmarks.benchmark import Sampling
from flowopd_lib.lab.jobs import run_job
from flowopd_lib.lab.workspace import Workspace
from flowopd_lib.losses import Shard
from flowopd_lib.rollout import Sampler


@pytest.fixture
def workspace(benchmark, policy, monkeypatch):
    """With short trajectories."""
    sampling = Sampling(opd=Sampler(3, "sde"), grpo=Sampler(3, "sde", noisy_steps=1, branch=True))
    monkeypatch.setattr(benchmark, "sampling", sampling)
    yield Workspace(benchmark, policy=policy)
    policy.remove_adapters()


def test_the_interference_job_resumes_and_is_shared_by_processes(tmp_path, workspace):
    spec = {"job": "interference", "adapter": "ocr", "gradient_of": "distillation", "batches": 3}
    spec |= {"prompts_per_batch": 1}
    whole = tmp_path / "whole"
    run_job(spec, whole, workspace)
    for rank in (1, 0):  # one after the other; the one that makes the table comes last
        shared = Workspace(workspace.benchmark, policy=workspace.policy)
        shared.shard = Shard(rank, 2)
        if rank:
            with pytest.raises(FileNotFoundError):  # of the other, which it would wait for
                run_job(spec, tmp_path / "shared", shared)
        else:
            run_job(spec, tmp_path / "shared", shared)
    file = whole / "interference.parquet"
    table = pd.read_parquet(file)
    pd.testing.assert_frame_equal(table, pd.read_parquet(tmp_path / "shared" / file.name))
    assert set(table["task"]) == {"geneval", "pickscore", "deqa"}
    assert not [p for p in (tmp_path / "shared").iterdir() if p.is_dir()]
    written = file.stat().st_mtime_ns
    run_job(spec, whole, workspace)
    assert file.stat().st_mtime_ns == written  # finished: nothing is computed
    run_job({**spec, "seed": 1}, whole, workspace)
    assert list((whole / "earlier").rglob(file.name)) and file.stat().st_mtime_ns != written


def test_the_interference_job_differentiates_the_rewards_that_can_be(tmp_path, workspace):
    spec = {"job": "interference", "adapter": "ocr", "gradient_of": "reward", "batches": 3}
    run_job({**spec, "prompts_per_batch": 1}, tmp_path, workspace)
    table = pd.read_parquet(tmp_path / "interference.parquet")
    assert set(table["task"]) == {"pickscore", "deqa"} and table["inner"].notna().all()


def test_the_estimators_job_compares_with_closer_teachers(tmp_path, workspace):
    spec = {"job": "estimators", "adapter": "ocr", "batches": 3, "images": 3, "distance": 0.5}
    run_job({**spec, "estimators": ["paper"]}, tmp_path, workspace)
    rows = pd.read_parquet(tmp_path / "estimators.parquet").set_index("estimator")
    assert list(rows.index) == ["pathwise", "paper"] and (rows["n"] == 3).all()
    assert abs(rows.loc["paper", "mean along pathwise"]) < 0.01 < rows.loc["paper", "noise"]
    policy = workspace.policy
    near, student, expert = (policy.adapter(n) for n in ("near_geneval_0p5", "ocr", "geneval"))
    for path in expert.a:
        middle = (student.delta(path) + expert.delta(path)) / 2
        torch.testing.assert_close(near.delta(path), middle)


def test_the_steps_job_trains_at_each_step_alone(tmp_path, workspace):
    spec = {"job": "steps", "adapter": "ocr", "iterations": 1, "prompts_per_batch": 3}
    run_job({**spec, "n": 1, "steps": 2}, tmp_path, workspace)
    table = pd.read_parquet(tmp_path / "steps.parquet")
    assert table["step"].tolist() == [0, 1] and (table["n"] == 3).all()
    assert (table["low"] <= table["distance_reduction"]).all() and (table["before"] > 0).all()
    assert not [n for n in workspace.policy.adapters if n.startswith("step_")]
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == []
