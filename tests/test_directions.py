"""What a step along an expert does."""

import pandas as pd
import pytest
import torch

from flowopd_lib import ways_figure
from flowopd_lib.jobs.site import Site
from flowopd_lib.studies.directions import (
    WAYS,
    adapter_of,
    agreement,
    alignment,
    along,
    changes,
    ways,
)


def delta(policy, adapter):
    lora = policy.adapter(adapter)
    return {place: lora.alpha[place] / len(a) * lora.b[place] @ a for place, a in lora.a.items()}


def test_a_step_along_an_expert_is_so_much_of_its_change(benchmark):
    site = Site(benchmark, "float32")
    for name in ("ocr", "deqa"):
        site.adapter(name)
    ocr, deqa = delta(site.policy, "ocr"), delta(site.policy, "deqa")
    for model, source in along(["ocr"], [-0.5, 0.25]).items():
        site.adapter(adapter_of(model), source)
    for model, source in along(["ocr"], [0.5], "merged", ["ocr", "deqa"]).items():
        site.adapter(adapter_of(model), source)
    back, forth = delta(site.policy, "ocr_-0_5"), delta(site.policy, "ocr_+0_25")
    from_mean = delta(site.policy, "merged_ocr_+0_5")
    for place, change in ocr.items():
        torch.testing.assert_close(back[place], -0.5 * change)
        torch.testing.assert_close(forth[place], 0.25 * change)
        torch.testing.assert_close(from_mean[place], change + 0.5 * deqa[place])
    with pytest.raises(ValueError, match="size 0 goes nowhere"):
        along(["ocr"], [0.5, 0.0])


def test_changes_are_paired_and_in_shares_of_the_full_scale():
    home = (("OCR", "ocr", 1.0), ("DeQA", "pickscore", 5.0))
    rows = [
        {"model": model, "task": task, "prompt": f"{task} {i}", reward: i + gain * full}
        for model, gain in (
            ("base", 0.0),
            ("ocr +0.5", 0.1),
            ("ocr -1", -0.3),
            ("merged ocr +0.5", 9.0),
        )
        for reward, task, full in home
        for i in range(5)
    ]
    found = changes(pd.DataFrame(rows), home, ["ocr"], [0.5, -1.0]).set_index(
        ["along", "size", "reward"]
    )
    assert len(found) == 4 and set(found["n"]) == {5}
    for size, gain in ((0.5, 0.1), (-1.0, -0.3)):
        for reward in ("OCR", "DeQA"):
            row = found.loc[("ocr", size, reward)]
            assert list(row[["mean", "low", "high"]]) == pytest.approx([gain] * 3)


def test_task_vectors_are_compared_across_trainings_only(policy):
    made, rng = {}, torch.Generator().manual_seed(0)
    shared = {name: {} for name in ("a", "b")}
    for name in ("a", "b"):
        for number in range(3):
            adapter = f"{name}{number}"
            policy.add_adapter(adapter, rank=2, alpha=4, targets=("to_q",))
            made.setdefault(name, []).append(adapter)
            for place, p in policy.adapter_parameters(adapter).items():
                if "lora_B" in place:  # what all trainings learn, and noise of each
                    common = shared[name].setdefault(place, torch.randn(p.shape, generator=rng))
                    p.data = common + 3 * torch.randn(p.shape, generator=rng)
    table = alignment(policy, made)
    whole = table[table["block"] == "all"].set_index(["task", "on"])

    def dense(adapter):
        lora = policy.adapter(adapter)
        scaled = [
            lora.alpha[p] / len(lora.a[p]) * (lora.b[p] @ lora.a[p]).flatten() for p in lora.a
        ]
        return torch.cat(scaled).double()

    vectors = {name: [dense(adapter) for adapter in adapters] for name, adapters in made.items()}
    for one, other in (("a", "a"), ("a", "b")):
        pairs = [(i, j) for i in range(3) for j in range(3) if i != j]
        inner = sum(vectors[one][i] @ vectors[other][j] for i, j in pairs) / 6
        assert whole.loc[(one, other), "inner"] == pytest.approx(inner.item(), rel=1e-4)
    # two single trainings look less alike than what they learned
    assert (
        whole.loc[("a", "a"), "cosine"] == pytest.approx(1) and whole.loc[("a", "a"), "raw"] < 0.3
    )
    assert set(table["block"]) == {"all", "block 0", "block 1", "block 2", "block 3"}
    with pytest.raises(
        ValueError, match="at least three trainings, as many for each direction, not a: 2, b: 3"
    ):
        alignment(policy, {"a": made["a"][:2], "b": made["b"]})
    policy.remove_adapters()


def test_several_ways_are_put_side_by_side_and_counted(benchmark):
    reward = {expert: reward for reward, expert in benchmark.experts_of.items()}

    def moved(**says):
        rows = [
            {"along": a, "size": size, "reward": j, "mean": says.get(f"{a}_{j}", 0.0) * size}
            for a in reward
            for j in reward.values()
            for size in (0.5, 1.0)
        ]
        return pd.DataFrame(rows).assign(
            low=lambda t: t["mean"] - 0.1, high=lambda t: t["mean"] + 0.1
        )

    def cosines(value):
        row = {
            "block": "all",
            "sigma": "all",
            "task": "pickscore",
            "on": "geneval",
            "cosine": value,
        }
        return pd.DataFrame([row | {"cosine_low": value - 0.1, "cosine_high": value + 0.1}])

    walk = pd.DataFrame(
        [
            {
                "task": "pickscore",
                "on": "ocr",
                "measured": 0.3,
                "measured_low": 0.2,
                "measured_high": 0.4,
            }
        ]
    )
    tables = {
        "along": moved(pickscore_GenEval=-1.0, pickscore_OCR=-1.0),
        "walk": walk,
        "vectors": cosines(-0.5),
    }
    found = ways(benchmark, {**tables, "first": None, "branch": cosines(0.05)})
    assert list(found["way"].unique()) == ["along", "walk", "vectors", "branch"]
    cell = found.set_index(["way", "along", "reward"])
    assert cell.loc[("along", "PickScore", "GenEval"), "mean"] == -0.5  # of half the expert
    assert cell.loc[("along", "PickScore", "GenEval"), "says"] == -1
    assert cell.loc[("walk", "PickScore", "OCR"), "says"] == 1
    assert cell.loc[("branch", "PickScore", "GenEval"), "says"] == 0
    # on OCR two ways disagree, on GenEval two agree and a third does not know
    assert agreement(found) == (2, 1, 12)
    assert len(ways_figure(found, WAYS).axes) == 4
