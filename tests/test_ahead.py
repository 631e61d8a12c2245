"""A profile's jobs are done ahead of its notebooks, those first on which the most training waits."""

from threading import Event, Thread

import pytest
import torch

from flowopd_lib.jobs.site import Site
from flowopd_lib.jobs.work import share_by_files
from flowopd_lib.runs import ahead
from flowopd_lib.runs.ahead import Job, do_all, in_order


def jobs_of_a_seesaw(out):
    def train(name, iterations, **spec):
        return Job(
            "02",
            out / name,
            {"job": "train", "name": name, "train": {"iterations": iterations}, **spec},
        )

    models = {"base": None, "short": "short", "long": "long"}
    sources = {name: str(out / name / "adapter") for name in ("short", "long")}
    return [
        train("other", 60),
        train("short", 40),
        train("long", 750, after=str(out / "short")),
        Job(
            "02",
            out,
            {"job": "evaluate", "models": models, "adapters": sources, "file": "all.parquet"},
        ),
    ]


def test_needs_are_told_by_folders(tmp_path):
    found = in_order(jobs_of_a_seesaw(tmp_path))
    assert [job.needs for job in found] == [set(), set(), {1}, {1, 2}]
    assert [job.long for job in found] == [60, 790, 750, 0]
    assert [str(job) for job in found[2:]] == ["02 train long", "02 evaluate all.parquet"]


@pytest.mark.parametrize("fails", ["", "short", "evaluate"])
def test_what_has_the_most_training_after_it_is_first_and_a_failure_stops_what_needs_it(
    tmp_path, monkeypatch, fails
):
    asked, told, stopped = [], [], []

    class Does:
        def __init__(self, launcher, notes, tell):
            self.asked_to_stop = Event()

        def do(self, spec, folder, first):
            assert first, "adapters of another job may have the same names"
            rank, benchmark = spec.get("share", (0, 1))
            asked.append((spec.get("name", "evaluate"), benchmark))
            if asked[-1][0] == fails and rank == 0:
                raise RuntimeError("out of memory")
            if asked[-1][0] == fails:
                assert self.asked_to_stop.wait(20)
                raise RuntimeError("stopped")

        def stop(self):
            self.asked_to_stop.set()
            stopped.append(self)

    monkeypatch.setattr(ahead, "Served", Does)
    failed = do_all(in_order(jobs_of_a_seesaw(tmp_path)), 2, "local", tmp_path, told.append)
    if fails == "short":
        assert sorted(asked) == [("other", 1), ("short", 1)] and failed == [1, 2, 3]
        assert "02 train short failed: out of memory" in told
    else:
        assert asked[0] == ("short", 1) and asked[-2:] == [("evaluate", 2)] * 2 and len(asked) == 5
        assert failed == ([3] if fails else [])
        assert [line for line in told if "failed" in line] == (
            ["02 evaluate all.parquet failed: out of memory"] if fails else []
        )


def test_processes_that_meet_in_a_folder_wait_for_one_another(tmp_path):
    passed = []

    def one(rank):
        share = share_by_files(rank, 3, tmp_path)
        for step in range(2):
            passed.append((step, rank))
            share.wait()

    threads = [Thread(target=one, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert [step for step, _ in passed] == [0, 0, 0, 1, 1, 1]


def test_a_merge_is_the_same_on_any_number_of_threads(benchmark):
    site, threads, found = Site(benchmark, "float32"), torch.get_num_threads(), []
    for number in (1, 2):
        torch.set_num_threads(number)
        site.adapter(f"on_{number}", benchmark.average())
        found.append(site.policy.adapter(f"on_{number}").sha256)
    torch.set_num_threads(threads)
    assert found[0] == found[1]


def test_bad_input():
    with pytest.raises(
        ValueError, match="processes, the jobs beside one another, must be at least 1, not 0"
    ):
        ahead.run_ahead("smoke", 0)
    with pytest.raises(ValueError, match="no launcher 'lokal'"):
        ahead.run_ahead("smoke", 1, launcher="lokal")
