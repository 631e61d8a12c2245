"""Checkpoints keep everything, and the build goes on where it was cut off."""

from contextlib import nullcontext

import pytest
import torch

from flowopd_lib.benchmarks.tiny import train_base as base
from flowopd_lib.benchmarks.tiny.train_vae import new_vae
from flowopd_lib.checkpoint import load_state, save_state


def test_a_state_comes_back_as_it_was(tmp_path):
    shared = torch.arange(3)
    state = {
        "a": [1, None, "x", 2.5],
        "opt": {"state": {0: {"m": torch.randn(2, 2)}}, 1: shared, "again": shared},
        "b": True,
    }
    save_state(tmp_path / "s", state)
    again = load_state(tmp_path / "s")
    assert again["a"] == state["a"] and again["b"] is True and 0 in again["opt"]["state"]
    assert torch.equal(again["opt"]["state"][0]["m"], state["opt"]["state"][0]["m"])
    assert torch.equal(again["opt"][1], shared) and torch.equal(again["opt"]["again"], shared)
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_a_file_that_is_no_checkpoint_is_named(tmp_path):
    (tmp_path / "s").write_bytes(b"not a checkpoint at all")
    with pytest.raises(ValueError, match="not a checkpoint"):
        load_state(tmp_path / "s")


def test_a_base_cut_off_and_restarted_is_the_base_trained_in_one_go(tmp_path, monkeypatch):
    torch.manual_seed(0)
    vae = new_vae().eval()
    vae.register_to_config(scaling_factor=1.0, shift_factor=0.0)
    monkeypatch.setattr(base, "SAVE_EVERY", 2)

    def train(name):
        pipeline = base.train_base(
            vae,
            tmp_path / name / "out",
            tmp_path / name,
            steps=4,
            batch=8,
            pool_size=20,
            compiled=False,
            log=lambda message: None,
        )
        return pipeline.transformer.state_dict()

    whole = train("whole")
    finish, calls = base.finish, []

    def power_cut(*args):
        calls.append(args)
        raise KeyboardInterrupt

    monkeypatch.setattr(base, "finish", power_cut)
    with pytest.raises(KeyboardInterrupt):
        train("cut")
    monkeypatch.setattr(base, "finish", finish)
    resumed = train("cut")
    assert len(calls) == 1 and all(torch.equal(resumed[k], whole[k]) for k in whole)


def test_muons_steps_in_float32_are_muons_but_for_bfloat16s_rounding():
    def moved(mode):
        g = torch.Generator().manual_seed(0)
        weight = torch.nn.Parameter(torch.zeros(24, 16))
        weight.grad = torch.randn(24, 16, generator=g)
        before, muon = (
            weight.grad.clone(),
            torch.optim.Muon([weight], lr=1.0, weight_decay=0.0, nesterov=False),
        )
        with mode:
            muon.step()
        assert torch.equal(weight.grad, before)
        return weight.detach()

    plain, ours = moved(nullcontext()), moved(base.MuonInFloat32())
    difference = (plain - ours).norm() / plain.norm()
    assert 0 < difference < 0.02 and torch.equal(ours, moved(base.MuonInFloat32()))
