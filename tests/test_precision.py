"""Precision by measurement: decided once, kept by the folder, told otherwise only by name."""

import json

import pytest
import torch

from flowopd_lib import FlowPolicy, load_benchmark, precision
from flowopd_lib.precision import decide, resolve

BENCHMARK = load_benchmark()

MEASURE = precision.fastest.__wrapped__  # not the one time that is kept


@pytest.fixture
def free(monkeypatch):
    """Nothing said by the environment."""
    monkeypatch.delenv(precision.VARIABLE, raising=False)
    return monkeypatch


def test_it_is_what_is_said_else_what_is_faster(free):
    assert (
        resolve("float32") == resolve(torch.float32) == torch.float32
        and resolve("torch.bfloat16") == torch.bfloat16
    )
    for faster in precision.NAMES:
        free.setattr(precision, "fastest", lambda device: faster)
        assert resolve("auto") == precision.NAMES[faster] and resolve("float32") == torch.float32
        free.setenv(precision.VARIABLE, "float32")
        assert resolve("auto") == torch.float32
        free.delenv(precision.VARIABLE)
    for wrong in ("fp8", torch.float16):
        with pytest.raises(ValueError, match="must be auto or one of float32, bfloat16, not"):
            resolve(wrong)
    free.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    free.setattr(torch.cuda, "get_device_name", lambda: "An old GPU")
    with pytest.raises(
        ValueError, match="An old GPU cannot compute in bfloat16; take auto or float32"
    ):
        resolve("bfloat16", "cuda")
    assert MEASURE("cuda") == "float32"


def test_the_measurement_takes_the_faster_one(free):
    clock, cost = [0.0], {torch.float32: 2.0, torch.bfloat16: 1.0}

    def ones(*shape, dtype, device):
        clock.append(cost[dtype])
        return torch.zeros(shape)

    now = [0.0]

    def tick():
        now[0] += clock[-1] * 1e-3
        return now[0]

    free.setattr(torch, "ones", ones)
    free.setattr(precision.time, "perf_counter", tick)
    assert MEASURE("cpu") == "bfloat16"
    cost[torch.bfloat16] = 3.0
    assert MEASURE("cpu") == "float32"


def test_a_folder_keeps_the_precision_it_was_begun_in(free, tmp_path):
    free.setattr(precision, "fastest", lambda device: "bfloat16")
    assert decide(tmp_path, write=False) == torch.bfloat16 and not list(tmp_path.iterdir())
    assert decide(tmp_path) == torch.bfloat16
    assert json.loads((tmp_path / "precision.json").read_text()) == {
        "precision": "bfloat16",
        "device": "cpu",
    }
    free.setattr(precision, "fastest", lambda device: "float32")  # another machine
    assert decide(tmp_path) == decide(tmp_path, "bfloat16") == torch.bfloat16
    with pytest.raises(ValueError, match="was begun in bfloat16, not in float32"):
        decide(tmp_path, torch.float32)


def test_a_policy_takes_it(free):
    free.setattr(precision, "fastest", lambda device: "bfloat16")
    policy = FlowPolicy(BENCHMARK.base)
    assert (
        policy.dtype == torch.bfloat16
        and policy.precision == "bfloat16"
        and next(policy.transformer.parameters()).dtype == torch.bfloat16
    )
    assert FlowPolicy(BENCHMARK.base, dtype="float32").precision == "float32"
