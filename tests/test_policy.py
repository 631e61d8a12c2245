"""One backbone, many adapters; rollouts under each; merging."""

import pytest
import torch

from flowopd_lib import FlowPolicy, Prompt, Sampler, load_benchmark, sample, trajectory
from flowopd_lib.merge import METHODS, merge

BENCHMARK = load_benchmark()

PROMPTS = [
    Prompt('a sign that says "CAT"', "ocr"),
    Prompt("a photo of a red circle left of a blue star", "geneval"),
]


@pytest.fixture(scope="module")
def crowd():
    """A policy of its own with three adapters that do something."""
    policy = FlowPolicy(BENCHMARK.base)
    for i, name in enumerate(("one", "two", "three")):
        policy.add_adapter(name, rank=4, alpha=8, seed=i)
        g = torch.Generator().manual_seed(i)
        with torch.no_grad():
            for p in policy.adapter_parameters(name).values():
                p.add_(torch.randn(p.shape, generator=g) * 0.05)
    return policy


def look(policy, adapter, **options):
    x = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(3))
    return policy.velocity(
        x, 0.7, policy.encode([p.text for p in PROMPTS]), adapter=adapter, **options
    )


def test_a_new_adapter_changes_nothing_and_costs_itself_only(policy):
    fresh = FlowPolicy(BENCHMARK.base)
    before, size = look(fresh, None), sum(p.nbytes for p in fresh.transformer.parameters())
    fresh.add_adapter("student", rank=4, alpha=8)
    mine = sum(p.nbytes for p in fresh.adapter_parameters("student").values())
    fresh.add_adapter("teacher", rank=4, alpha=8)
    assert (
        sum(p.nbytes for p in fresh.transformer.parameters()) == size + 2 * mine
        and mine < size / 20
    )
    for adapter in ("student", "teacher", None):
        assert torch.equal(look(fresh, adapter), before)


def test_a_model_whose_adapters_were_removed_is_as_it_was_loaded(crowd):
    fresh = FlowPolicy(BENCHMARK.base)
    before, places = look(fresh, None), set(fresh.transformer.state_dict())
    weights = crowd.adapter("two")
    for _ in range(2):  # the same name again
        fresh.add_adapter("two", rank=4, alpha=8, seed=1)
        with torch.no_grad():
            for name, p in fresh.adapter_parameters("two").items():
                p.copy_(crowd.adapter_parameters("two")[name])
        fresh.train_adapter("two")
        assert (
            not torch.equal(look(fresh, "two"), before)
            and fresh.adapter("two").sha256 == weights.sha256
        )
        fresh.remove_adapters()
        assert fresh.adapters == [] and torch.equal(look(fresh, None), before)
        assert set(fresh.transformer.state_dict()) == places
        assert not any(p.requires_grad for p in fresh.transformer.parameters())


def test_velocities_do_not_depend_on_what_was_asked_before(crowd):
    first = {name: look(crowd, name) for name in (None, "one", "two", "three")}
    assert all((first[name] - first[None]).abs().max() > 1e-3 for name in ("one", "two", "three"))
    for name in ("three", None, "one", "one", None, "two"):
        assert torch.equal(look(crowd, name), first[name])
    stronger = look(crowd, "one", guidance=3.0)
    assert (stronger - first["one"]).abs().max() > 1e-3


def test_asking_a_teacher_does_not_cut_the_students_gradient(crowd):
    weights = crowd.train_adapter("one")
    v = look(crowd, "one")
    with torch.no_grad():
        target, base = look(crowd, "two"), look(crowd, None)
    (v - target).square().sum().backward()
    apart = [p.grad.clone() for p in weights]
    for p in weights:
        p.grad = None
    (look(crowd, "one") - target).square().sum().backward()
    assert (
        all(torch.equal(p.grad, g) for p, g in zip(weights, apart))
        and sum(g.abs().sum() for g in apart) > 0
    )
    assert all(
        p.grad is None for name in ("two", "three") for p in crowd.adapter_parameters(name).values()
    )
    for p in weights:
        p.grad = None
    crowd.train_adapter(None)
    assert not look(crowd, "one").requires_grad and base.shape == v.shape


def test_a_frozen_adapter_is_what_peft_makes_of_it(crowd):
    crowd.train_adapter(None)
    with torch.no_grad():
        merged, base = look(crowd, "one"), look(crowd, None)
        crowd.train_adapter("one")
        factored = look(crowd, "one")
    crowd.train_adapter(None)
    assert not torch.equal(merged, factored)  # it does take another way
    torch.testing.assert_close(merged, factored, atol=2e-5, rtol=1e-4)
    assert (merged - base).abs().max() > 1e-2


def test_an_adapter_is_saved_and_loaded(crowd, tmp_path):
    crowd.save_adapter("two", tmp_path / "two")
    assert {p.name for p in (tmp_path / "two").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    other = FlowPolicy(BENCHMARK.base)
    other.load_adapter("expert", tmp_path / "two")
    other.copy_adapter("expert", "student")
    for name in ("expert", "student"):
        torch.testing.assert_close(look(other, name), look(crowd, "two"))


def changes(policy, name):
    """{layer: s B A}"""
    parameters = policy.adapter_parameters(name)
    scaling = {
        k: m.scaling[name]
        for k, m in policy.transformer.named_modules()
        if hasattr(m, "scaling") and name in m.scaling
    }
    return {
        layer: s * parameters[f"{layer}.lora_B.weight"] @ parameters[f"{layer}.lora_A.weight"]
        for layer, s in scaling.items()
    }


def test_cat_and_svd_are_the_mean_of_the_changes_and_the_public_codes_average_is_not(crowd):
    names = ("one", "two", "three")
    exact = {k: sum(changes(crowd, n)[k] for n in names) / 3 for k in changes(crowd, "one")}
    merge(crowd, names, "cat")
    merge(crowd, names, "svd", "svd", rank=12)
    merge(crowd, names, "factors", "factor_wise")
    for k, mean in exact.items():
        torch.testing.assert_close(changes(crowd, "cat")[k], mean, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(changes(crowd, "svd")[k], mean, atol=1e-5, rtol=1e-3)
    layer = next(iter(exact))
    a, b = (
        sum(crowd.adapter_parameters(n)[f"{layer}.lora_{f}.weight"] for n in names) / 3
        for f in "AB"
    )
    # scaling 8 / 4
    torch.testing.assert_close(changes(crowd, "factors")[layer], 2.0 * b @ a, atol=1e-6, rtol=1e-4)
    assert ((changes(crowd, "factors")[layer] - exact[layer]).norm() / exact[layer].norm()) > 0.5


def test_ties_and_dare_merge_and_bad_merges_are_named(crowd):
    base = look(crowd, None)
    for method in ("ties", "dare"):
        merge(crowd, ("one", "two"), method, method)
        assert (look(crowd, method) - base).abs().max() > 1e-4
    assert {"ties", "dare"} < set(METHODS)
    for call, message in [
        (lambda: merge(crowd, ("one",), "x"), "at least two"),
        (lambda: merge(crowd, ("one", "ten"), "x"), "merging takes some of"),
        (lambda: merge(crowd, ("one", "two"), "x", "mean"), "unknown way"),
        (lambda: merge(crowd, ("one", "two"), "one"), "new name"),
        (
            lambda: crowd.velocity(
                torch.zeros(1, 16, 8, 8), 0.5, crowd.encode(["a photo of a star"]), adapter="ten"
            ),
            "no adapter 'ten'",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(FileNotFoundError, match="adapter_config.json"):
        crowd.load_adapter("x", BENCHMARK.base)


@pytest.mark.parametrize("kind", ["sde", "cps"])
def test_a_noisy_sample_depends_on_its_own_seed_and_prompt_only(crowd, kind):
    sampler = Sampler(5, kind)
    together = sample(crowd, PROMPTS * 2, [1, 2, 3, 4], sampler, "one")
    torch.testing.assert_close(
        sample(crowd, PROMPTS[1:], [4], sampler, "one")[0], together[3], atol=1e-4, rtol=0
    )
    steps = list(trajectory(crowd, PROMPTS, [1, 2], sampler, "one"))
    # the last step leaves no noise in the picture
    assert [s.std > 0 for s in steps] == [True] * 4 + [False]
    assert all(torch.equal(a.x_next, b.x) for a, b in zip(steps, steps[1:]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_before_an_update_every_action_has_the_probability_it_was_taken_with(
    crowd, dtype, tmp_path
):
    from flowopd_lib.sde import log_prob, transition

    crowd.save_adapter("one", tmp_path)
    policy = FlowPolicy(BENCHMARK.base, dtype=dtype)
    policy.load_adapter("student", tmp_path)
    policy.train_adapter("student")
    text = policy.encode([p.text for p in PROMPTS])
    for step in list(trajectory(policy, PROMPTS, [5, 6], Sampler(6, "sde"), "student"))[:-1]:
        v = policy.velocity(step.x, step.sigma, text, adapter="student")
        mean, std = transition(step.x, v, step.sigma, step.sigma_next)
        ratio = (log_prob(step.x_next, mean, std) - step.log_prob()).exp()
        assert v.requires_grad and (ratio - 1).abs().max() < 1e-5


def test_a_texts_embedding_does_not_depend_on_the_texts_beside_it():
    texts = [
        p.text
        for task in ("geneval", "ocr", "pickscore")
        for p in BENCHMARK.prompts(task, "val")[:7]
    ]
    together, alone = FlowPolicy(BENCHMARK.base), FlowPolicy(BENCHMARK.base)
    every = together.encode(texts)
    for text in reversed(texts):
        row = alone.encode([text])
        assert torch.equal(row.tokens[0], every.tokens[texts.index(text)]) and torch.equal(
            row.pooled[0], every.pooled[texts.index(text)]
        )
