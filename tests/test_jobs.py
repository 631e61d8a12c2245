"""One way to compute: a job in this process, and in one, two and four of their own, leaves the same."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml

from flowopd_lib import Lab, build
from flowopd_lib.checkpoint import load_state
from flowopd_lib.files import ROOT, RUNS, read_lines
from flowopd_lib.jobs.launchers import load_launcher
from flowopd_lib.jobs.processes import serving, shared
from flowopd_lib.jobs.site import Site, one_thread
from flowopd_lib.jobs.work import JOBS, check_spec, run_job
from flowopd_lib.objectives import Share

# five prompts: on two processes three and two, on four two, one, one and one
RECIPE = {
    "student": {"merge": "cat", "adapters": ["geneval", "ocr"]},
    "schedule": {"tasks": ["geneval", "ocr"], "prompts_per_batch": 5},
    "sampler": {"steps": 4, "kind": "sde"},
    "opd": {"steps": 1, "mar": 0.04, "anchor": "deqa"},
    "train": {"iterations": 3, "lr": 1.0e-3, "ema": 0.0},
    "probe": {"every": 3, "n": 2, "steps": 2},
}


def launched(spec: dict, folder: Path) -> subprocess.Popen:
    """A job in two processes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder.parent / f"{folder.name}.yaml").write_text(yaml.safe_dump(spec))
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    job = [
        "-m",
        "flowopd_lib.jobs",
        str(folder.parent / f"{folder.name}.yaml"),
        "--folder",
        str(folder),
    ]
    return subprocess.Popen(
        [sys.executable, *run, *job],
        env={**os.environ, "OMP_NUM_THREADS": "1", "FLOWOPD_HEADLESS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def ended(process: subprocess.Popen) -> str:
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said[-4000:]
    return said


@pytest.fixture(scope="module")
def on(tmp_path_factory, policy) -> dict[int, Lab]:
    """What computes in this process, and in two and four of a launcher, each of one thread."""
    folder = tmp_path_factory.mktemp("on")
    four = yaml.safe_load((RUNS / "launchers" / "local2.yaml").read_text())
    four["command"] = four["command"].replace("--nproc_per_node 2", "--nproc_per_node 4")
    (folder / "local4.yaml").write_text(yaml.safe_dump(four))
    launchers = {1: "", 2: "local2", 4: str(folder / "local4.yaml")}
    labs = {n: Lab("tiny", launcher, folder / str(n)) for n, launcher in launchers.items()}
    labs[1].site.policy = policy
    yield labs
    for lab in labs.values():
        lab.stop()


@pytest.fixture(scope="module")
def trained(on) -> dict[int, Path]:
    """The same recipe on one, two and four processes."""
    with one_thread():
        return {n: lab.run("train", "trained", **RECIPE, name="trained") for n, lab in on.items()}


def gradients(folder: Path) -> torch.Tensor:
    """AdamW's first moments: the mean of the updates' gradients. The weights themselves move by its sign,
    which rounding decides where it is almost 0."""
    state = load_state(folder / "state.safetensors")["optimizer"]["state"]
    return torch.cat([of["exp_avg"].flatten() for of in state.values()])


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one - other).norm() / one.norm()).item()


def test_an_update_does_not_depend_on_the_processes(trained):
    one, losses = gradients(trained[1]), read_lines(trained[1] / "metrics.jsonl")["loss"].to_numpy()
    for processes in (2, 4):
        # in another order of sums; the first update's rounding goes on into the next
        assert 0 < apart(one, gradients(trained[processes])) < 1e-4
        others = read_lines(trained[processes] / "metrics.jsonl")["loss"].to_numpy()
        assert others == pytest.approx(losses, rel=1e-5)


def test_an_evaluation_does_not_depend_on_the_processes_at_all(trained):
    """The batches are those of the evaluation, whoever draws them: the same table to the last digit, before
    the trainings' own roundings come in."""
    tables = [read_lines(trained[n] / "probes.jsonl") for n in (1, 2, 4)]
    first = [t[t["iteration"] == 0].drop(columns="seconds") for t in tables]
    assert len(first[0]) == 5  # four rewards and the Average
    pd.testing.assert_frame_equal(first[1], first[0], check_exact=True)
    pd.testing.assert_frame_equal(first[2], first[0], check_exact=True)


def test_a_training_goes_on_with_another_number_of_processes(trained, on, tmp_path):
    """Begun on two, gone on with by one and ended by four, with the weights of one process throughout."""
    recipe = {k: v for k, v in RECIPE.items() if k != "probe"}
    for iterations, processes in ((1, 2), (2, 1), (3, 4)):
        recipe["train"] = {**RECIPE["train"], "iterations": iterations}
        with one_thread():
            on[processes].run("train", str(tmp_path / "mixed"), **recipe, name="mixed")
    assert apart(gradients(trained[1]), gradients(tmp_path / "mixed")) < 1e-4
    assert list(read_lines(tmp_path / "mixed" / "metrics.jsonl")["iteration"]) == [0, 1, 2]


EVALUATE = {
    "job": "evaluate",
    "benchmark": "tiny",
    "models": {"base": None, "ocr expert": "ocr"},
    "n": 12,
    "steps": 6,
    "batch": 3,
    "pictures": True,
}


def test_a_killed_process_leaves_its_finished_batches(tmp_path, policy):
    """kill -9 of one of two, then the same command: what was done is not done again, and the table is that of
    one process."""
    process = launched(EVALUATE, tmp_path / "killed")
    parts = tmp_path / "killed" / ".samples.parquet.parts"
    end = time.monotonic() + 240
    while len(list(parts.glob("*.parquet"))) < 6:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    os.kill(int(children.stdout.split()[-1]), signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode != 0
    kept = {p: p.stat().st_mtime_ns for p in parts.glob("*.parquet")}
    assert 6 <= len(kept) < 24
    process = launched(EVALUATE, tmp_path / "killed")
    seen = {}
    while process.poll() is None:
        seen |= {p: p.stat().st_mtime_ns for p in kept if p.exists()}
        time.sleep(0.05)
    ended(process)
    assert seen == kept
    with one_thread():
        run_job(EVALUATE, tmp_path / "one", Site("tiny", policy=policy))
    tables = [pd.read_parquet(tmp_path / name / "samples.parquet") for name in ("killed", "one")]
    pd.testing.assert_frame_equal(*tables, check_exact=True)
    pictures = [sorted((tmp_path / name / "pictures").glob("*.zip")) for name in ("killed", "one")]
    assert [p.read_bytes() for p in pictures[0]] == [p.read_bytes() for p in pictures[1]]


def test_a_job_in_this_process_is_the_job_of_another(on):
    """A notebook's own process and a launcher's leave the same tables."""
    size = {"n": 2, "steps": 2}
    with one_thread():
        tables = [on[n].evaluate({"base": None, "deqa expert": "deqa"}, **size) for n in (1, 2)]
    pd.testing.assert_frame_equal(*tables, check_exact=True)
    with pytest.raises(
        RuntimeError, match="the launcher local2 computes: this process holds no model"
    ):
        _ = on[2].policy
    assert on[2].live(lambda: 1 / 0) is None


def asked_of_a_launcher(folder: Path, source: str, environment: dict) -> tuple[pd.DataFrame, str]:
    """What a notebook gets that evaluates an adapter `x` made of `source`, and what it tells of itself."""
    code = f"""
import sys
from pathlib import Path
from flowopd_lib import Lab
lab = Lab("tiny", "local", Path({str(folder)!r}))
lab.sources["x"] = {source!r}
lab.evaluate({{"x": "x", "expert": {source!r}}}, n=1, steps=1)
print("policy" in lab.site.__dict__, "flowopd_lib.benchmarks.tiny.detector" in sys.modules)
"""
    run = [sys.executable, "-c", code]
    done = subprocess.run(
        run,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return pd.read_parquet(folder / "samples.parquet"), done.stdout


def test_the_processes_of_a_launcher_serve_all_notebooks_of_a_run(tmp_path):
    """And a notebook's own process loads no model, nor a reward's."""
    with shared(tmp_path / ".jobs") as variable:
        tables = []
        for source in ("geneval", "ocr"):
            table, told = asked_of_a_launcher(tmp_path / source, source, variable)
            assert told.split()[-2:] == ["False", "False"]
            scores = {
                m: of.drop(columns="model").reset_index(drop=True)
                for m, of in table.groupby("model")
            }
            pd.testing.assert_frame_equal(scores["x"], scores["expert"])
            tables.append(scores["x"])
        # an adapter of the same name that another notebook had is forgotten
        assert not tables[0]["PickScore"].equals(tables[1]["PickScore"])
        (notes,) = (tmp_path / ".jobs").glob("[0-9]*")
        assert sorted(p.name for p in notes.glob("*.done")) == ["0.done", "1.done"]
        process = serving(notes, launcher="local", parent=os.getpid())
        assert process is not None and serving(notes, launcher="local2") is None
    process.wait(60)  # its run is over


def test_the_studies_jobs_are_shared_out_and_go_on(tmp_path, policy):
    """Of two processes each does its batches, by way of the folder; here one after the other."""
    spec = {"job": "interference", "adapter": "ocr", "of": "pull", "batches": 3}
    spec |= {"prompts_per_batch": 1, "images_per_prompt": 2}
    alone = Site("tiny", policy=policy)
    run_job(spec, tmp_path / "alone", alone)
    for rank in (1, 0):  # the one that assembles comes last
        shared = Site("tiny", policy=policy)
        shared.share = Share(rank, 2)
        if rank:
            with pytest.raises(
                FileNotFoundError
            ):  # it would wait for the other, which here comes later
                run_job(spec, tmp_path / "shared", shared)
        else:
            run_job(spec, tmp_path / "shared", shared)
    tables = [pd.read_parquet(tmp_path / n / "interference.parquet") for n in ("alone", "shared")]
    pd.testing.assert_frame_equal(*tables)
    assert not [p for p in (tmp_path / "shared").iterdir() if p.is_dir()]
    written = (tmp_path / "alone" / "interference.parquet").stat().st_mtime_ns
    run_job(spec, tmp_path / "alone", alone)  # it is there: nothing is done again
    assert (tmp_path / "alone" / "interference.parquet").stat().st_mtime_ns == written
    run_job({**spec, "seed": 1}, tmp_path / "alone", alone)  # another: what lay there is kept
    assert list((tmp_path / "alone" / "earlier").rglob("interference.parquet"))


def test_rewards_of_the_same_samples_on_one_two_and_four_processes(
    benchmark, policy, record_property
):
    """What a process draws is a batch of another size: a rounding may flip a reward's yes or no, not more."""
    benchmark.load_experts(policy)
    recipe = {
        "schedule": {"tasks": ["geneval", "ocr"], "prompts_per_batch": 8, "images_per_prompt": 2},
        "sampler": {"steps": 4, "kind": "sde"},
        "grpo": {"updates": 1},
        "train": {"iterations": 1},
    }
    objective = build(recipe, "cpu", "float32", policy=policy, site=Site("tiny", policy=policy))[1]
    found = {}
    for processes in (1, 2, 4):
        rewards = {}
        for rank in range(processes):
            score = objective.score

            def seen(images, batch, score=score, rewards=rewards):
                told = score(images, batch)
                rewards.update(zip(batch.seeds, (told[0] * told[1]).sum(1).tolist()))
                return told

            objective.score = seen
            try:
                objective.collect(policy, "ocr", 0, Share(rank, processes))
            finally:
                objective.score = score
        found[processes] = rewards
    flips = {n: sum(abs(found[n][s] - r) > 1e-3 for s, r in found[1].items()) for n in (2, 4)}
    record_property("flips", flips)
    assert all(set(found[n]) == set(found[1]) for n in (2, 4))
    assert max(flips.values()) <= 1, flips  # of 16


def test_a_failed_process_is_told_by_its_own_words(tmp_path):
    lab = Lab("tiny", "local2", tmp_path)
    (tmp_path / "nothing").mkdir()
    lab.sources["mine"] = str(tmp_path / "nothing")
    with pytest.raises(RuntimeError, match=r"error.*(adapter|nothing)"):
        lab.evaluate({"mine": "mine"}, n=1, steps=1)


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ([], "a job is a mapping"),
        ({"job": "evalute"}, "there is no job 'evalute' .did you mean 'evaluate'"),
        (
            {"job": "evaluate", "modls": {}},
            "the evaluate job has no 'modls' .did you mean 'models'",
        ),
        ({"job": "evaluate", "models": {"a": None}, "n": 0}, "n must be at least 1"),
        ({"job": "evaluate", "models": {"a": None}, "split": "dev"}, "split must be one of"),
        ({"job": "interference", "adapter": "ocr", "batches": 2}, "batches must be at least 3"),
    ],
)
def test_faults_of_a_specification(spec, told):
    with pytest.raises(ValueError, match=told):
        check_spec(spec)


def test_every_job_says_what_it_does():
    from flowopd_lib.jobs import work

    assert all(name in work.__doc__ for name in JOBS)
    assert all(function.__doc__ for function, _ in JOBS.values())


def test_an_adapter_of_unknown_making(policy):
    site = Site("tiny", policy=policy)
    with pytest.raises(ValueError, match="must be an expert, a folder or a hub id"):
        site.adapter("odd", {"made": "up"})
    with pytest.raises(
        ValueError, match="the adapter odd has no 'adaptors' .did you mean 'adapters'"
    ):
        site.adapter("odd", {"merge": "cat", "adaptors": ["ocr"]})


def test_launchers(tmp_path):
    for path in (RUNS / "launchers").glob("*.yaml"):
        command, environment = load_launcher(path.stem)
        assert command[:2] == ["bash", "-c"] and '"$@"' in command[2]
        assert environment["FLOWOPD_HEADLESS"] == "1"
        checked = subprocess.run(["bash", "-n", "-c", command[2]], capture_output=True, text=True)
        assert checked.returncode == 0, checked.stderr
    with pytest.raises(ValueError, match="there is no launcher 'gpu8' .did you mean 'gpus8'"):
        load_launcher("gpu8")
    mine = tmp_path / "mine.yaml"
    mine.write_text(json.dumps({"command": "echo hello"}))
    with pytest.raises(ValueError, match='needs a command in which "\\$@" stands for'):
        load_launcher(str(mine))
    mine.write_text(json.dumps({"command": 'x "$@"', "nodes": 4}))
    with pytest.raises(ValueError, match="has no 'nodes'"):
        load_launcher(str(mine))
