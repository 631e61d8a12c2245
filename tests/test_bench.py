"""The benchmarks measure what they say. Nothing here depends on how fast this machine is."""

import json
import re

import pytest
import torch

from flowopd_lib import bench, load_benchmark
from flowopd_lib.bench import TINY, write_random_sd35
from flowopd_lib.check import check


@pytest.fixture(scope="module")
def random_sd35(tmp_path_factory):
    return write_random_sd35(tmp_path_factory.mktemp("sd35"), TINY, torch.float32)


def test_every_case_is_measured_and_written_as_json(random_sd35, tmp_path):
    out, short = tmp_path / "bench.json", random_sd35.with_name("short.yaml")
    short.write_text(re.sub("steps: [14]0", "steps: 3", random_sd35.read_text()))
    result = bench.run(str(short), [4], repeats=1, out=out)
    assert json.loads(out.read_text()) == result
    assert result["device"] and result["versions"]["torch"] == torch.__version__
    rows = {row["case"]: row for row in result["cases"]}
    assert set(rows) == {"GRPO update", "OPD update", "rollout", "evaluation"}
    for row in rows.values():
        assert row["images_per_second"] * row["seconds"] == pytest.approx(4)
        phases = [value for name, value in row.items() if name.endswith("_seconds")]
        assert sum(phases) == pytest.approx(row["seconds"]) and row["peak_memory_gib"] > 0


def test_random_sd35_has_the_settings_of_sd35_and_passes_every_check(random_sd35):
    benchmark, real = load_benchmark(random_sd35), load_benchmark("sd35")
    assert benchmark.sampling == real.sampling and benchmark.targets == real.targets
    assert (benchmark.teachers, benchmark.anchor) == (real.teachers, real.anchor)
    assert [row for row in check(benchmark, "float32") if not row.passed] == []


def test_a_gpu_without_enough_memory_is_a_row_with_an_error():
    def fail(iteration):
        raise torch.cuda.OutOfMemoryError

    assert bench.measure({"update": fail}, 64, 3) == {"batch": 64, "error": "out of GPU memory"}


def test_arguments_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"multiples of 4, not \[6\]"):
        bench.run(batch_sizes=[6])
