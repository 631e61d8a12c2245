"""LoRA adapters: PEFT's and diffusers' formats, what is refused and why, merging."""

import json
import shutil
from copy import deepcopy
from functools import cache

import huggingface_hub
import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from flowopd_lib import Prompt, load_benchmark, merge_loras
from flowopd_lib.lora import (
    CONFIG,
    DIFFUSERS_FILE,
    PEFT_FILE,
    Lora,
    linear_modules,
    read_adapter,
    write_diffusers,
    write_peft,
)
from flowopd_lib.merge import METHODS

pytestmark = pytest.mark.fast

BENCHMARK = load_benchmark()
PROMPTS = [Prompt('a sign that says "CAT"', "ocr"), Prompt("a photo of a red circle", "geneval")]
KINDS = {
    "plain": {},
    "rank_pattern": {"rank_pattern": {"to_q": 6, "transformer_blocks.1.ff.net.2": 2}},
    "alpha_pattern": {"alpha_pattern": {"to_k": 3}},
    "rslora": {"use_rslora": True},
}


@cache
def pipeline():
    loaded = StableDiffusion3Pipeline.from_pretrained(BENCHMARK.base)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@cache
def base_transformer():
    return SD3Transformer2DModel.from_pretrained(BENCHMARK.base, subfolder="transformer").eval()


def peft_model(kind):
    """PEFT's own layers with an adapter of random weights."""
    targets = ["to_q", "to_k", "ff.net.2"]
    config = LoraConfig(
        r=4, lora_alpha=12, target_modules=targets, init_lora_weights="gaussian", **KINDS[kind]
    )
    model = get_peft_model(deepcopy(base_transformer()), config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            if ".lora_" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    return model


@torch.no_grad()
def velocity(policy, adapter=None, model=None):
    """Of an adapter of the policy, or of another library's model on the same inputs."""
    x_t = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(3))
    text = policy.encode([p.text for p in PROMPTS])
    if model is None:
        return policy.velocity(x_t, 0.7, text, adapter=adapter)
    return model(x_t, text.tokens, text.pooled, torch.full((2,), 700.0), return_dict=False)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_peft_diffusers_and_ours_are_the_same_adapter(kind, workspace, tmp_path):
    policy, model = workspace.policy, peft_model(kind)
    expected = velocity(policy, model=model)
    assert (expected - velocity(policy)).abs().max() > 1e-2
    model.save_pretrained(str(tmp_path / "by_peft"))
    weights = get_peft_model_state_dict(model)
    StableDiffusion3Pipeline.save_lora_weights(
        tmp_path / "by_diffusers",
        {k.removeprefix("base_model.model."): w for k, w in weights.items()},
        transformer_lora_adapter_metadata=model.peft_config["default"].to_dict(),
    )
    lora = read_adapter(tmp_path / "by_peft", linear_modules(base_transformer()))
    write_peft(lora, tmp_path / "our_peft")
    write_diffusers(lora, tmp_path / "our_diffusers")
    for name in ("by_peft", "by_diffusers", "our_peft", "our_diffusers"):
        policy.load_adapter(name, tmp_path / name)
        torch.testing.assert_close(velocity(policy, name), expected, rtol=0, atol=1e-5)
        assert policy.adapter(name).sha256 == lora.sha256
    theirs = PeftModel.from_pretrained(deepcopy(base_transformer()), str(tmp_path / "our_peft"))
    torch.testing.assert_close(velocity(policy, model=theirs), expected, rtol=0, atol=1e-5)
    pipeline().load_lora_weights(str(tmp_path / "our_diffusers"))
    try:
        theirs = velocity(policy, model=pipeline().transformer)
    finally:
        pipeline().unload_lora_weights()
    torch.testing.assert_close(theirs, expected, rtol=0, atol=1e-5)


# ---- what is refused


@pytest.fixture
def expert(tmp_path):
    return shutil.copytree(BENCHMARK.adapter("ocr"), tmp_path / "expert")


def config(**changes):
    """Changes the config of an adapter's folder."""

    def change(folder):
        path = folder / CONFIG
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def weights(edit):
    """Changes the weights of an adapter's folder, a dictionary."""

    def change(folder):
        tensors = load_file(folder / PEFT_FILE)
        edit(tensors)
        save_file(tensors, folder / PEFT_FILE)

    return change


def rename(w):
    for key in list(w):
        w[key.replace("base_model.model.", "transformer.")] = w.pop(key)


NORM = {"base_model.model.norm.lora_A.weight": torch.ones(2, 2)}
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
BAD = {
    "another prefix": (
        weights(rename),
        r"\d+ keys are missing, unexpected or .* such as 'base_model",
    ),
    "a missing key": (weights(lambda w: w.pop(min(w))), "1 keys .* such as .*, missing instead"),
    "a key too many": (weights(lambda w: w.update(NORM)), "1 keys .*instead of unexpected"),
    "another shape": (
        weights(lambda w: w.update({min(w): torch.ones(16, 7)})),
        r"\(16, 7\) instead",
    ),
    "not finite": (
        weights(lambda w: w[min(w)].fill_(torch.nan)),
        r"1 of \d+ weights are not finite",
    ),
    "DoRA": (config(use_dora=True), "use_dora = True, which is not supported"),
    "biases": (config(bias="all"), "bias = 'all', which is not supported"),
    "PiSSA": (config(init_lora_weights="pissa"), "init_lora_weights = 'pissa', which is not"),
    "another kind": (config(peft_type="LOHA"), "peft_type = 'LOHA', which is not supported"),
    "an unknown field": (config(use_magic=3), "use_magic = 3, which is not supported"),
    "a Git LFS pointer": (
        lambda f: (f / PEFT_FILE).write_text(POINTER),
        "not a whole safetensors file.*git lfs pull",
    ),
    "a pickle": (lambda f: (f / PEFT_FILE).rename(f / "a.bin"), "pickles are never read"),
    "no config": (lambda f: (f / CONFIG).unlink(), "is no adapter: a PEFT folder has"),
    "a broken config": (lambda f: (f / CONFIG).write_text("{"), "is not an adapter's config"),
    "another model's layers": (config(target_modules=["q_proj"]), "adapts no layer"),
    "some layers left out": (config(target_modules=["to_q"]), "instead of unexpected"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_adapter_is_refused_and_leaves_nothing(name, expert, workspace):
    policy = workspace.policy
    good = shutil.copytree(expert, expert.parent / "good")
    before = velocity(policy)
    change, message = BAD[name]
    change(expert)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        policy.load_adapter("ocr", expert)
    assert "\n" not in str(error.value)
    assert policy.adapters == [] and torch.equal(velocity(policy), before)
    policy.load_adapter("ocr", good)  # under the same name
    assert (velocity(policy, "ocr") - before).abs().max() > 1e-3


def test_adapters_are_read_from_files_folders_and_the_hub(expert, tmp_path, monkeypatch):
    modules = linear_modules(base_transformer())
    lora = read_adapter(expert, modules)
    write_diffusers(lora, tmp_path / "diffusers")
    shutil.copy(tmp_path / "diffusers" / DIFFUSERS_FILE, tmp_path / "student.safetensors")
    downloads = []

    def snapshot(name, revision, allow_patterns):
        downloads.append((name, allow_patterns))
        return str(expert)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    for source in ("diffusers", "student.safetensors", f"expert/{PEFT_FILE}"):
        assert read_adapter(tmp_path / source, modules).sha256 == lora.sha256
    assert read_adapter("somebody/ocr-expert", modules).sha256 == lora.sha256
    # weights that are pickles are not even downloaded
    assert downloads == [("somebody/ocr-expert", [CONFIG, PEFT_FILE, DIFFUSERS_FILE])]

    def offline(*_, **__):
        raise OSError("no route to the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    for source, message in (
        ("somebody/none", "neither a folder here nor an adapter on the hub: no route"),
        (tmp_path / "none", "is no adapter"),
        (tmp_path / "diffusers" / "README.md", "is no adapter"),
    ):
        with pytest.raises(FileNotFoundError, match=message):
            read_adapter(source, modules)


def test_an_adapter_of_a_hub_repository_has_a_subfolder_and_a_revision(
    expert, tmp_path, monkeypatch
):
    modules, hub, asked = linear_modules(base_transformer()), tmp_path / "hub", []
    sha256 = read_adapter(expert, modules).sha256
    shutil.copytree(expert, hub / "deep" / "Student" / "lora")

    def snapshot(name, revision=None, allow_patterns=()):
        asked.append((name, revision))
        return str(hub / "deep")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    for source, revision in (
        ("owner/deep/Student/lora", None),
        ("owner/deep/Student/lora@v2", "v2"),
        ("owner/deep@refs/pr/1", "refs/pr/1"),
        ("owner/deep", None),  # the only one
        ("owner/deep/Student", None),
    ):
        asked.clear()
        assert read_adapter(source, modules).sha256 == sha256
        assert {*asked} == {("owner/deep", revision)}
    write_diffusers(read_adapter(expert, modules), hub / "deep" / "Teacher")
    there = "owner/deep/Student/lora, owner/deep/Teacher"
    for source in ("owner/deep", "owner/deep/Studnet"):
        with pytest.raises(FileNotFoundError, match=f"'{source}' .* {there}"):
            read_adapter(source, modules)


# ---- merging


def random_lora(seed, rank=4, alpha=8.0, modules=("one", "two"), inputs=12):
    g, shapes = torch.Generator().manual_seed(seed), ((rank, inputs), (inputs - 2, rank))
    a, b = ({n: torch.randn(*s, generator=g) for n in modules} for s in shapes)
    return Lora(a, b, dict.fromkeys(modules, alpha))


def test_cat_and_svd_are_the_mean_of_the_task_vectors_and_factor_wise_is_not():
    loras = [random_lora(i) for i in range(3)]
    mean = {n: sum(lora.delta(n) for lora in loras) / 3 for n in loras[0].a}
    for method, rank in (("cat", None), ("svd", 10)):
        merged = merge_loras(loras, method, rank=rank)
        for name in mean:
            torch.testing.assert_close(merged.delta(name), mean[name], atol=1e-4, rtol=1e-3)
    best = merge_loras(loras, "svd")
    assert set(best.ranks.values()) == {4}  # Eckart-Young: what is left are the smaller values
    left = torch.linalg.svdvals(mean["one"])[4:].norm()
    torch.testing.assert_close((best.delta("one") - mean["one"]).norm(), left)
    public = merge_loras(loras, "factor_wise")
    a, b = (sum(getattr(lora, f)["one"] for lora in loras) / 3 for f in ("a", "b"))
    torch.testing.assert_close(public.delta("one"), 8 / 4 * b @ a)
    assert (public.delta("one") - mean["one"]).norm() > 0.5 * mean["one"].norm()


def test_a_merge_is_the_same_on_any_number_of_threads():
    loras, threads, hashes = [random_lora(i, 16, inputs=512) for i in range(2)], [], []
    before = torch.get_num_threads()
    for n in (1, 2, 4):
        torch.set_num_threads(n)
        hashes.append(merge_loras(loras, "svd").sha256)
        threads.append(torch.get_num_threads())
    torch.set_num_threads(before)
    assert len(set(hashes)) == 1 and threads == [1, 2, 4]


@pytest.mark.parametrize("method", ["cat", "svd"])
def test_adapters_of_other_ranks_scales_and_modules_are_averaged_exactly(method):
    loras = [random_lora(0, 2, 3.0), random_lora(1, 5, 10.0, ("two", "three"))]
    merged = merge_loras(loras, method, [0.25, 0.75], rank=10 if method == "svd" else None)
    parts = {
        "one": 0.25 * loras[0].delta("one"),
        "two": 0.25 * loras[0].delta("two") + 0.75 * loras[1].delta("two"),
        "three": 0.75 * loras[1].delta("three"),
    }
    for name, mean in parts.items():
        torch.testing.assert_close(merged.delta(name), mean, atol=1e-4, rtol=1e-3)
    half = merge_loras(loras[:1], "cat", [0.5])  # of one adapter, so much of it
    torch.testing.assert_close(half.delta("one"), 0.5 * loras[0].delta("one"))


def test_ties_and_dare_keep_a_fraction_of_each_task_vector():
    loras = [random_lora(i) for i in range(2)]
    zero = Lora(loras[0].a, {n: torch.zeros_like(b) for n, b in loras[0].b.items()}, loras[0].alpha)
    one = loras[0].delta("one")
    for method in ("ties", "dare"):
        merged = merge_loras([loras[0], zero], method, density=0.5, rank=10).delta("one")
        assert (merged.abs() > 1e-4).float().mean() == pytest.approx(0.5, abs=0.1)
        assert (merged * one >= -1e-4).all()  # the signs that are left are its own
    drawn = [merge_loras(loras, "dare", seed=seed).sha256 for seed in (0, 0, 1)]
    torch.randn(3)  # whatever else was drawn
    assert drawn[0] == drawn[1] == merge_loras(loras, "dare", seed=0).sha256 != drawn[2]
    assert set(METHODS) == {"cat", "svd", "ties", "dare", "factor_wise"}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(method="mean"), "there is no way to merge 'mean'"),
        (dict(weights=[1.0]), "2 adapters need as many weights"),
        (dict(method="ties", density=0.0), r"density must be in \(0, 1\]"),
        (dict(method="factor_wise"), r"the same ranks everywhere: at one they are \[4, 2\]"),
    ],
)
def test_a_bad_merge_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        merge_loras([random_lora(0, 4), random_lora(1, 2)], **arguments)


def test_the_average_of_one_adapter_is_itself():
    lora = random_lora(0, 4)
    for method in ("cat", "svd", "factor_wise"):
        merged = merge_loras([lora], method)
        for name in lora.a:
            torch.testing.assert_close(merged.delta(name), lora.delta(name), rtol=1e-4, atol=1e-5)
