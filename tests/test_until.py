"""A GRPO training that a rule ends, and one that goes on from another's state."""

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from flowopd_lib.files import read_lines
from flowopd_lib.jobs.site import Site
from flowopd_lib.jobs.work import run_job

PROBE = {"every": 1, "n": 2, "steps": 1}
# no score rises by its full scale, so that the second look ends it
UNTIL = {**PROBE, "until": {"patience": 2, "rise": 1.0}}


def spec(iterations: int, probe: dict, **more) -> dict:
    return {
        "benchmark": "tiny",
        "student": {"rank": 2},
        "schedule": {"tasks": ["ocr"], "prompts_per_batch": 2, "images_per_prompt": 2},
        "sampler": {"steps": 2, "kind": "sde"},
        "grpo": {"reward_weights": {"OCR": 1.0}},
        "train": {"iterations": iterations, "lr": 1.0e-3},
        "probe": probe,
        **more,
    }


@pytest.fixture
def site(policy):
    yield Site("tiny", policy=policy)
    policy.remove_adapters()


def weights(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def same(a, b) -> bool:
    return all(torch.equal(value, weights(b)[key]) for key, value in weights(a).items())


def alike(looks, others) -> None:
    """But for rounding: an adapter that trains is sampled by other products than one that does not. The
    weights before averaging are ten times as far away."""
    pd.testing.assert_frame_equal(looks, others, rtol=1e-4, atol=1e-4)


def test_the_rule_ends_it_as_if_it_had_been_that_long(tmp_path, site):
    run_job(spec(2, PROBE, name="short"), tmp_path / "short", site, shown=False)
    for _ in range(2):  # the second time there is nothing to do
        run_job(spec(5, UNTIL, name="ended"), tmp_path / "ended", site, shown=False)
    assert len(read_lines(tmp_path / "ended" / "metrics.jsonl")) == 2
    assert same(tmp_path / "short", tmp_path / "ended")
    looks = [
        read_lines(tmp_path / name / "probes.jsonl").drop(columns="seconds")
        for name in ("short", "ended")
    ]
    alike(*(part.drop(columns="model") for part in looks))


def test_it_goes_on_from_anothers_state(tmp_path, site):
    run_job(spec(3, PROBE, name="whole"), tmp_path / "whole", site, shown=False)
    run_job(spec(1, PROBE, name="begun"), tmp_path / "begun", site, shown=False)
    before = weights(tmp_path / "begun")
    run_job(
        spec(3, PROBE, name="on", after=str(tmp_path / "begun")), tmp_path / "on", site, shown=False
    )
    assert same(tmp_path / "whole", tmp_path / "on")
    assert len(read_lines(tmp_path / "begun" / "metrics.jsonl")) == 1
    assert all(
        torch.equal(value, weights(tmp_path / "begun")[key]) for key, value in before.items()
    )


def test_a_look_is_at_the_averaged_weights(tmp_path, site):
    """The last look of a shorter training, which is at what it comes to, is one on the way of a longer."""
    run_job(spec(1, PROBE, name="short"), tmp_path / "short", site, shown=False)
    run_job(spec(2, PROBE, name="long"), tmp_path / "long", site, shown=False)
    short, long = (
        read_lines(tmp_path / n / "probes.jsonl").drop(columns=["model", "seconds"])
        for n in ("short", "long")
    )
    alike(short, long[long["iteration"] <= 1])
    assert set(long["iteration"]) == {0, 1, 2}


@pytest.mark.parametrize(
    "change, told",
    [
        ({"probe": {**UNTIL, "until": {"patience": 5}}}, "ends no training of at most 5"),
        ({"probe": {**UNTIL, "until": {"patients": 2}}}, "patients"),
        ({"probe": {**UNTIL, "n": 1}}, "probe.n of at least 2"),
        ({"probe": {"until": {"patience": 2}}}, "it needs probe.every"),
        ({"train": {"iterations": 5, "cooldown": 0.5}}, "no cooldown"),
    ],
)
def test_a_rule_that_is_none_is_told(tmp_path, site, change, told):
    with pytest.raises(ValueError, match=told):
        run_job({**spec(5, UNTIL), **change}, tmp_path / "bad", site)
