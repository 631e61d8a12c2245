"""The precision: measured once, recorded in the folder, refused if it was started in another."""

import json

import pytest
import torch

from flowopd_lib import FlowPolicy, loading
from flowopd_lib.loading import decide, resolve

measure = loading.fastest.__wrapped__  # without its cache


@pytest.fixture
def unset(monkeypatch):
    """Without the environment's variable."""
    monkeypatch.delenv(loading.VARIABLE, raising=False)
    return monkeypatch


def test_precision_is_the_named_one_or_the_environments_or_the_faster(unset):
    assert resolve("float32") == resolve(torch.float32) == torch.float32
    assert resolve("torch.bfloat16") == torch.bfloat16
    for faster in loading.NAMES:
        unset.setattr(loading, "fastest", lambda device: faster)
        assert resolve("auto") == loading.NAMES[faster] and resolve("float32") == torch.float32
        unset.setenv(loading.VARIABLE, "float32")
        assert resolve("auto") == torch.float32
        unset.delenv(loading.VARIABLE)
    for wrong in ("fp8", torch.float16):
        with pytest.raises(ValueError, match="must be auto or one of float32, bfloat16, not"):
            resolve(wrong)
    unset.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert measure("cuda") == "float32"


def test_the_measurement_takes_the_faster_one(unset):
    dtypes = []
    cost = {torch.float32: 2.0, torch.bfloat16: 1.0}

    def ones(*shape, dtype, device):
        dtypes.append(dtype)
        return torch.zeros(shape)

    unset.setattr(torch, "ones", ones)
    unset.setattr(loading.timeit, "repeat", lambda *_, **__: [cost[dtypes[-1]]])
    assert measure("cpu") == "bfloat16"
    cost[torch.bfloat16] = 3.0
    assert measure("cpu") == "float32"


def test_a_folder_keeps_the_precision_it_was_begun_in(unset, tmp_path):
    unset.setattr(loading, "fastest", lambda device: "bfloat16")
    assert decide(tmp_path, write=False) == torch.bfloat16 and not list(tmp_path.iterdir())
    assert decide(tmp_path) == torch.bfloat16
    record = json.loads((tmp_path / "precision.json").read_text())
    assert record == {"precision": "bfloat16", "device": "cpu"}
    unset.setattr(loading, "fastest", lambda device: "float32")  # another machine
    assert decide(tmp_path) == decide(tmp_path, "bfloat16") == torch.bfloat16
    with pytest.raises(ValueError, match="was started in bfloat16, not in float32"):
        decide(tmp_path, torch.float32)


def test_a_policy_is_loaded_in_the_precision(unset, benchmark):
    unset.setattr(loading, "fastest", lambda device: "bfloat16")
    policy = FlowPolicy(benchmark.base)
    assert policy.dtype == next(policy.transformer.parameters()).dtype == torch.bfloat16
    assert policy.precision == "bfloat16"
    assert FlowPolicy(benchmark.base, dtype="float32").precision == "float32"
