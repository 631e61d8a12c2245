"""Checkpoints keep everything, and the build goes on where it was cut off."""

from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from flowopd_lib import FlowPolicy, initial_noise
from flowopd_lib.benchmarks.tiny import build, train_base
from flowopd_lib.benchmarks.tiny.loop import run_steps
from flowopd_lib.benchmarks.tiny.specs import PROMPT_TASKS
from flowopd_lib.benchmarks.tiny.text import new_text_modules
from flowopd_lib.benchmarks.tiny.train_base import BaseConfig, Examples, misalign, new_vae
from flowopd_lib.files import load_state, save_state


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


class PowerCut(Exception):
    pass


class Cut(Examples):
    """Examples for the steps before `until`, and then none."""

    until = 4

    def loss(self, forward, step, *how):
        if step == self.until:
            raise PowerCut
        return super().loss(forward, step, *how)


def small_vae():
    torch.manual_seed(0)
    vae = new_vae().eval()
    vae.register_to_config(scaling_factor=1.0, shift_factor=0.0)
    return vae


def test_a_base_that_was_cut_off_is_the_base_trained_in_one_go(tmp_path, monkeypatch):
    vae, modules = small_vae(), new_text_modules()
    config = BaseConfig(steps=4, batch=8, pool=20)
    monkeypatch.setattr(train_base, "compiled", lambda model: model)
    monkeypatch.setattr(train_base, "run_steps", partial(run_steps, every=2))
    monkeypatch.setattr(train_base, "Examples", Cut)

    def train(name, until=4):
        monkeypatch.setattr(Cut, "until", until)
        folder = tmp_path / name
        train_base.train_base(vae, modules, folder / "out", folder, config)
        return load_file(folder / "out/transformer/diffusion_pytorch_model.safetensors")

    whole = train("whole")
    with pytest.raises(PowerCut):
        train("cut", until=3)
    resumed = train("cut")
    assert all(torch.equal(resumed[k], whole[k]) for k in whole)
    with pytest.raises(ValueError, match="was started with"):
        config = replace(config, adam_rate=2e-3)
        train("cut")


def test_the_ability_adapter_undoes_the_misalignment(tmp_path, monkeypatch):
    vae, modules = small_vae(), new_text_modules()
    config = BaseConfig(steps=2, batch=8, pool=20)
    monkeypatch.setattr(train_base, "compiled", lambda model: model)
    train_base.train_base(vae, modules, tmp_path / "base", tmp_path, config)
    wrong = {"wrong": dict.fromkeys(PROMPT_TASKS, 1.0), "other": 0.5, "spoiled": 0.5}
    misalign(vae, modules, tmp_path, wrong, steps=4, batch=8, pool_size=20, rate=1e-2)
    capable, policy = FlowPolicy(tmp_path / "base"), FlowPolicy(tmp_path / "tiny-sd3")
    policy.load_adapter("ability", tmp_path / "ability")
    x_t, text = initial_noise(policy, range(4)), policy.encode(["a photo of a circle"] * 4)
    with torch.no_grad():
        before, after = (p.velocity(x_t, 0.9, text) for p in (capable, policy))
        undone = policy.velocity(x_t, 0.9, text, adapter="ability")
    assert (undone - before).abs().max() < 0.05 * (after - before).abs().max()


def test_a_step_of_the_build_does_not_go_on_from_other_inputs(tmp_path):
    for name in ("vae", "text"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text("1")
    build.check_inputs(tmp_path, "base")
    build.check_inputs(tmp_path, "base")
    (tmp_path / "vae/weights").write_text("2")
    with pytest.raises(ValueError, match="base was started from another vae"):
        build.check_inputs(tmp_path, "base")
    with pytest.raises(ValueError, match="pickscore needs vae"):
        build.build(tmp_path / "new", ["pickscore"])
    with pytest.raises(ValueError, match="no step 'bas'"):
        build.build(tmp_path / "new", ["bas"])


def test_muons_steps_in_float32_are_muons_but_for_bfloat16s_rounding():
    def moved(mode):
        g = torch.Generator().manual_seed(0)
        weight = torch.nn.Parameter(torch.zeros(24, 16))
        weight.grad = torch.randn(24, 16, generator=g)
        before = weight.grad.clone()
        muon = torch.optim.Muon([weight], lr=1.0, weight_decay=0.0, nesterov=False)
        with mode:
            muon.step()
        assert torch.equal(weight.grad, before)
        return weight.detach()

    plain, ours = moved(nullcontext()), moved(train_base.MuonInFloat32())
    difference = (plain - ours).norm() / plain.norm()
    assert 0 < difference < 0.02 and torch.equal(ours, moved(train_base.MuonInFloat32()))
