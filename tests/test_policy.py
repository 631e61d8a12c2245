"""One backbone with many adapters, and trajectories under each of them, on the shipped model."""

import pytest
import torch

from flowopd_lib import OPD, FlowPolicy, OPDConfig, Prompt, Sampler, Schedule, sample, trajectory
from flowopd_lib.losses import Shard
from flowopd_lib.sde import log_prob

pytestmark = pytest.mark.fast

PROMPTS = [
    Prompt('a sign that says "CAT"', "ocr"),
    Prompt("a photo of a red circle left of a blue star", "geneval"),
]
DTYPES = (torch.float32, torch.bfloat16)


def randomize(policy, name, seed=0, scale=0.05):
    """Weights that change something in an adapter of the policy."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in policy.adapter_parameters(name).values():
            p.add_(torch.randn(p.shape, generator=g) * scale)


@pytest.fixture(scope="module")
def three(benchmark):
    """A policy of its own with three adapters."""
    policy = FlowPolicy(benchmark.base)
    for seed, name in enumerate(("one", "two", "three")):
        policy.add_adapter(name, rank=4, alpha=8, seed=seed)
        randomize(policy, name, seed)
    return policy


def velocity(policy, adapter, **options):
    x_t = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(3))
    text = policy.encode([p.text for p in PROMPTS])
    return policy.velocity(x_t, 0.7, text, adapter=adapter, **options)


def test_a_new_adapter_changes_nothing_and_removed_ones_leave_the_model_as_it_was(benchmark):
    policy = FlowPolicy(benchmark.base)
    before, names = velocity(policy, None), set(policy.transformer.state_dict())
    hash_before = policy.base_hash
    for _ in range(2):  # the same names again
        for name in ("student", "teacher"):
            policy.add_adapter(name, rank=4, alpha=8)
            assert torch.equal(velocity(policy, name), before)
        randomize(policy, "student")
        policy.train_adapter("student")
        assert not torch.equal(velocity(policy, "student"), before)
        assert torch.equal(velocity(policy, "teacher"), before)
        policy.remove_adapters()
        assert policy.adapters == [] and torch.equal(velocity(policy, None), before)
        assert set(policy.transformer.state_dict()) == names
        assert not any(p.requires_grad for p in policy.transformer.parameters())
    del policy.__dict__["base_hash"]
    assert policy.base_hash == hash_before


def test_a_velocity_does_not_depend_on_what_was_computed_before(three):
    names = (None, "one", "two", "three")
    first = {name: velocity(three, name) for name in names}
    assert all((first[name] - first[None]).abs().max() > 1e-3 for name in names[1:])
    for name in ("three", None, "one", "one", None, "two"):
        assert torch.equal(velocity(three, name), first[name])
    guided = velocity(three, "one", guidance=3.0)
    empty = [Prompt("", "ocr")] * 2
    x_t = torch.randn(2, *three.latent_shape, generator=torch.Generator().manual_seed(3))
    v_empty = three.velocity(x_t, 0.7, three.encode([p.text for p in empty]), adapter="one")
    torch.testing.assert_close(guided, v_empty + 3 * (first["one"] - v_empty), atol=1e-4, rtol=0)


def test_a_teachers_forward_between_leaves_the_students_gradient(three):
    weights = three.train_adapter("one")
    grads = []
    for teacher_between in (True, False):
        v = velocity(three, "one")
        if teacher_between:
            with torch.no_grad():
                target = velocity(three, "two")
        (v - target).square().sum().backward()
        grads.append([p.grad.clone() for p in weights])
        for p in weights:
            p.grad = None
    assert all(torch.equal(a, b) for a, b in zip(*grads))
    assert sum(g.abs().sum() for g in grads[0]) > 0
    assert all(p.grad is None for p in three.adapter_parameters("two").values())
    three.train_adapter(None)
    assert not velocity(three, "one").requires_grad


def test_an_adapter_is_saved_loaded_and_copied(three, workspace, tmp_path):
    policy = workspace.policy
    three.save_adapter("two", tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    policy.load_adapter("expert", tmp_path)
    policy.copy_adapter("expert", "student")
    for name in ("expert", "student"):
        assert torch.equal(velocity(policy, name), velocity(three, "two"))
    randomize(policy, "student")  # a copy has weights of its own
    assert policy.adapter("expert").sha256 == three.adapter("two").sha256
    assert policy.adapter("student").sha256 != three.adapter("two").sha256


@pytest.mark.parametrize("name", ["0", "attn", "to_q", "lora_A", "default", "weight"])
def test_an_adapter_may_be_named_like_a_module(name, workspace):
    policy = workspace.policy
    policy.add_adapter("other", rank=2, alpha=4)
    policy.add_adapter(name, rank=2, alpha=4)
    assert policy.adapter_parameters(name).keys() == policy.adapter_parameters("other").keys()
    policy.train_adapter(name)
    velocity(policy, name).square().sum().backward()
    assert all(p.grad is not None for k, p in policy.adapter_parameters(name).items() if "_B" in k)
    for taken in (name, "a.b", ""):
        with pytest.raises(ValueError, match="needs a new name"):
            policy.add_adapter(taken)
    with pytest.raises(ValueError, match="no adapter 'ten'; there are other"):
        velocity(policy, "ten")


def test_other_weights_for_a_while(three):
    weights = list(three.adapter_parameters("two").values())
    before, of_two = velocity(three, "one"), velocity(three, "two")
    with pytest.raises(KeyError), three.adapter_weights("one", weights):
        assert torch.equal(velocity(three, "one"), of_two)
        raise KeyError
    with three.adapter_weights("one", []):
        assert torch.equal(velocity(three, "one"), before)
    assert torch.equal(velocity(three, "one"), before)


@pytest.mark.parametrize("kind", ["sde", "cps"])
def test_a_noisy_sample_depends_on_its_own_seed_and_prompt_alone(three, kind):
    sampler = Sampler(5, kind)
    batch = sample(three, PROMPTS * 2, [1, 2, 3, 4], sampler, "one")
    alone = sample(three, PROMPTS[1:], [4], sampler, "one")
    torch.testing.assert_close(alone[0], batch[3], atol=1e-4, rtol=0)
    steps = list(trajectory(three, PROMPTS, [1, 2], sampler, "one"))
    # the last step leaves no noise in the image
    assert [bool(s.std > 0) for s in steps] == [True] * 4 + [False]
    assert all(torch.equal(a.x_next, b.x_t) for a, b in zip(steps, steps[1:]))


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def student_and_teacher(request, benchmark):
    """A policy of each precision whose frozen teacher has the weights of its student."""
    policy = FlowPolicy(benchmark.base, dtype=request.param)
    policy.load_adapter("teacher", benchmark.adapter("ocr"))
    policy.copy_adapter("teacher", "student")
    policy.train_adapter("student")
    return policy


def test_before_an_update_every_action_has_the_probability_it_was_taken_with(student_and_teacher):
    policy, sampler = student_and_teacher, Sampler(6, "sde")
    text = policy.encode([p.text for p in PROMPTS])
    for step in list(trajectory(policy, PROMPTS, [5, 6], sampler, "student"))[:-1]:
        v = policy.velocity(step.x_t, step.sigma, text, adapter="student")
        mean, std = sampler.transition(step.x_t, v, step.sigma, step.sigma_next)
        ratio = (log_prob(step.x_next, mean, std) - step.log_prob()).exp()
        assert v.requires_grad and (ratio == 1).all()


@pytest.mark.parametrize("loss", ["pathwise", "log_ratio"])
def test_the_kl_to_a_teacher_of_the_same_weights_is_exactly_zero(student_and_teacher, loss):
    policy = student_and_teacher
    config = OPDConfig(teachers={"ocr": "teacher"}, loss=loss, mar=0.0, micro_batch_size=3)
    opd = OPD(Schedule({"ocr": PROMPTS[:1]}, 4), config, Sampler(4, "sde"))
    data, _ = opd.collect(policy, "student", 0, Shard())
    terms = list(opd.losses(policy, "student", data, 0))
    assert terms and all(value.requires_grad and value == 0 for value, _ in terms)
    assert all((metrics["kl"] == 0).all() for _, metrics in terms)


def test_a_texts_embedding_does_not_depend_on_its_batch(benchmark):
    texts = [p.text for p in benchmark.first_prompts("val", 7)]
    batch, alone = (FlowPolicy(benchmark.base) for _ in range(2))
    every = batch.encode(texts)
    for i in reversed(range(len(texts))):
        row = alone.encode([texts[i]])
        assert torch.equal(row.tokens[0], every.tokens[i])
        assert torch.equal(row.pooled[0], every.pooled[i])


def test_a_teacher_that_is_the_base_under_another_name_is_refused(workspace):
    policy = workspace.policy
    for name in ("student", "null"):
        policy.add_adapter(name, rank=2, alpha=4)
    policy.load_adapter("ocr", workspace.benchmark.adapter("ocr"))

    def check(teacher, **options):
        config = OPDConfig(teachers={"ocr": teacher}, **options)
        OPD(Schedule({"ocr": PROMPTS[:1]}, 1), config).check(policy, "student")

    for arguments, message in (
        (dict(teacher="null"), "'null' has the velocity of the base"),
        (dict(teacher="ocr", anchor="null"), "'null' has the velocity of the base"),
        (dict(teacher="student"), "'student' is in training"),
        (dict(teacher="gone"), "no adapter 'gone'"),
    ):
        with pytest.raises(ValueError, match=message):
            check(**arguments)
    check(None)  # the base, by name


def test_resolutions_that_the_model_cannot_have_are_refused(benchmark):
    with pytest.raises(ValueError, match="must be a multiple of 16 up to .* pixels, not 60"):
        FlowPolicy(benchmark.base, resolution=60)
    with pytest.raises(FileNotFoundError, match="is neither a diffusers pipeline folder"):
        FlowPolicy(benchmark.folder)


def test_the_hash_of_the_base_has_all_that_changes_a_velocity_or_an_image(benchmark):
    policy, hashes = benchmark.policy(device="cpu"), []
    changes = (
        lambda: None,
        lambda: policy.pipeline.scheduler.register_to_config(shift=5.0),
        lambda: policy.vae.register_to_config(scaling_factor=0.5),
        lambda: setattr(policy, "latent_shape", (*policy.latent_shape[:2], 4)),
        lambda: setattr(policy, "max_sequence_length", 3),
        lambda: policy.pipeline.text_encoder.get_input_embeddings().weight.add_(1.0),
    )
    for change in changes:
        change()
        policy.__dict__.pop("base_hash", None)
        hashes.append(policy.base_hash)
    assert len({*hashes}) == len(changes)
