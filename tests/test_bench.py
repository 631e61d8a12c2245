"""The benchmarks measure what they say. Nothing here depends on how fast this machine is."""

import json
import re

import pytest
import torch

import flowopd_lib.bench.run as bench
from flowopd_lib import load_benchmark
from flowopd_lib.bench.dummy_model import TINY, write_random_sd35
from flowopd_lib.bench.gallery import measure_gallery, random_samples
from flowopd_lib.bench.reward_server import measure_server
from flowopd_lib.check import check


@pytest.fixture(scope="module")
def random_sd35(tmp_path_factory):
    return write_random_sd35(tmp_path_factory.mktemp("sd35"), TINY, torch.float32)


def test_every_case_is_measured_and_written_as_json(random_sd35, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "MODULES", ["json"])
    out, short = tmp_path / "bench.json", random_sd35.with_name("short.yaml")
    short.write_text(re.sub("steps: [14]0", "steps: 3", random_sd35.read_text()))
    result = bench.run(str(short), [4], ["model", "imports"], repeats=1, out=out)
    assert json.loads(out.read_text()) == result
    assert result["device"] and result["versions"]["torch"] == torch.__version__
    assert min(result["import_seconds"].values()) > 0
    rows = {row["case"]: row for row in result["cases"]}
    assert set(rows) == {"GRPO update", "OPD update", "rollout", "evaluation"}
    for row in rows.values():
        assert row["images_per_second"] * row["seconds"] == pytest.approx(4)
        phases = [value for name, value in row.items() if name.endswith("_seconds")]
        assert sum(phases) == pytest.approx(row["seconds"]) and row["peak_memory_gib"] > 0


def test_random_sd35_has_the_architecture_and_settings_of_sd35_and_passes_every_check(random_sd35):
    benchmark, real = load_benchmark(random_sd35), load_benchmark("sd35")
    assert benchmark.sampling == real.sampling and benchmark.targets == real.targets
    assert (benchmark.teachers, benchmark.anchor) == (real.teachers, real.anchor)
    assert [row for row in check(benchmark, "float32") if not row.passed] == []
    blocks = benchmark.policy(device="cpu").transformer.transformer_blocks
    assert [block.attn2 is not None for block in blocks] == [True, True, False]


def test_a_gpu_without_enough_memory_is_a_row_with_an_error():
    def fail(iteration):
        raise torch.cuda.OutOfMemoryError

    assert bench.measure({"update": fail}, 64, 3) == {"batch": 64, "error": "out of GPU memory"}


def test_arguments_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"multiples of 4 .* not \[6\]"):
        bench.run(batch_sizes=[6])
    with pytest.raises(ValueError, match="did you mean 'gallery'"):
        bench.run(parts=["galery"])


def test_every_change_of_the_gallery_is_timed(tmp_path, monkeypatch):
    monkeypatch.delenv("FLOWOPD_HEADLESS", raising=False)
    rows = measure_gallery(random_samples(tmp_path, 60), repeats=3)
    changes = {"page", "search", "tag", "sort", "minus", "range_of", "same_noise"}
    assert {row["change"] for row in rows} == changes
    assert all(0 < row["median_ms"] <= row["max_ms"] for row in rows)


def test_requests_of_several_clients_are_counted():
    (row,) = measure_server(clients=[2], size=16, batch=3, seconds=0.2)
    assert row["requests_per_second"] > 0
    assert row["images_per_second"] == pytest.approx(3 * row["requests_per_second"])
