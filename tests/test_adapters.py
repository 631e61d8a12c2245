"""Adapters in and out: the formats of PEFT and diffusers, what is refused and why, and that a failed load
leaves nothing.

`python -m pytest tests/test_adapters.py -k interop -s` prints the interop matrix.
"""

import json
import shutil
from functools import cache

import huggingface_hub
import pytest
import torch
import yaml
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from flowopd_lib import FlowPolicy, Prompt, Sampler, load_benchmark, sample
from flowopd_lib.adapters import (
    CONFIG,
    DIFFUSERS_FILE,
    PEFT_FILE,
    linear_places,
    read_adapter,
    write_diffusers,
    write_peft,
)
from flowopd_lib.export import export
from flowopd_lib.merge import merge
from flowopd_lib.objectives import OPD
from flowopd_lib.schedule import Schedule

BENCHMARK = load_benchmark()

PROMPTS = [
    Prompt('a sign that says "CAT"', "ocr"),
    Prompt("a photo of a red circle left of a blue star", "geneval"),
]
TARGETS = ["to_q", "to_k", "ff.net.2"]
KINDS = {
    "plain": {},
    "rank_pattern": {"rank_pattern": {"to_q": 6, "transformer_blocks.1.ff.net.2": 2}},
    "alpha_pattern": {"alpha_pattern": {"to_k": 3}},
    "rslora": {"use_rslora": True},
}


def config_of(kind, **more):
    return LoraConfig(
        r=4,
        lora_alpha=12,
        target_modules=list(TARGETS),
        init_lora_weights="gaussian",
        **KINDS[kind],
        **more,
    )


def fill(model):
    """The same made-up weights for the same adapter, whoever holds it."""
    with torch.no_grad():
        for i, (name, p) in enumerate(
            sorted(
                (n.replace(".default", "").replace("base_model.model.", ""), p)
                for n, p in model.named_parameters()
                if ".lora_" in n
            )
        ):
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * 0.1)


def transformer():
    return SD3Transformer2DModel.from_pretrained(BENCHMARK.base, subfolder="transformer").eval()


@cache
def pipeline():
    return StableDiffusion3Pipeline.from_pretrained(BENCHMARK.base)


@cache
def policy_of_all():
    return FlowPolicy(BENCHMARK.base)


@torch.no_grad()
def look(model):
    g = torch.Generator().manual_seed(3)
    arguments = {
        "hidden_states": torch.randn(1, 16, 8, 8, generator=g),
        "encoder_hidden_states": torch.randn(1, 28, 256, generator=g),
        "pooled_projections": torch.randn(1, model.config.pooled_projection_dim, generator=g),
        "timestep": torch.tensor([600.0]),
    }
    return model(**arguments, return_dict=False)[0]


def velocity(policy, adapter):
    x = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return policy.velocity(x, 0.7, policy.encode([p.text for p in PROMPTS]), adapter=adapter)


# ---- the interop matrix: who saved it, who loads it


def saved_by_peft(kind, folder):
    model = get_peft_model(transformer(), config_of(kind))
    fill(model)
    model.save_pretrained(str(folder))


def saved_by_diffusers(kind, folder):
    model = transformer()
    model.add_adapter(config_of(kind))
    fill(model)
    StableDiffusion3Pipeline.save_lora_weights(
        folder,
        get_peft_model_state_dict(model),
        transformer_lora_adapter_metadata=model.peft_config["default"].to_dict(),
    )


def saved_by_us(kind, folder):
    """Both of our formats, from an adapter that PEFT made."""
    saved_by_peft(kind, folder / "theirs")
    lora = read_adapter(folder / "theirs", linear_places(policy_of_all().transformer))
    write_peft(lora, folder / "peft")
    write_diffusers(lora, folder / "diffusers")


def loaded_by_peft(folder):
    return look(PeftModel.from_pretrained(transformer(), str(folder)))


def loaded_by_diffusers(folder):
    pipeline().load_lora_weights(str(folder))
    seen = look(pipeline().transformer)
    pipeline().unload_lora_weights()
    return seen


def loaded_by_us(folder):
    policy, name = policy_of_all(), f"x{len(policy_of_all().adapters)}"
    policy.load_adapter(name, folder)
    policy.train_adapter(name)  # PEFT's own way through the layers
    policy._used = name
    return look(policy.transformer)


def test_interop_every_kind_saved_by_one_and_loaded_by_another_is_the_same_adapter(tmp_path):
    rows = []
    for kind in KINDS:
        made = get_peft_model(transformer(), config_of(kind))
        fill(made)
        wanted = look(made)
        assert (wanted - look(transformer())).abs().max() > 1e-2
        places = {
            "PEFT": tmp_path / kind / "peft",
            "diffusers": tmp_path / kind / "diffusers",
            "ours": tmp_path / kind / "ours",
        }
        saved_by_peft(kind, places["PEFT"])
        saved_by_diffusers(kind, places["diffusers"])
        saved_by_us(kind, places["ours"])
        for saver, place in places.items():
            ours = (
                {"ours": place / "peft", "PEFT": place / "peft", "diffusers": place / "diffusers"}
                if saver == "ours"
                else dict.fromkeys(("ours", saver), place)
            )
            for loader, load in (
                ("ours", loaded_by_us),
                ("PEFT", loaded_by_peft),
                ("diffusers", loaded_by_diffusers),
            ):
                if loader not in ours:
                    rows.append((kind, saver, loader, "not theirs: by way of ours"))
                    continue
                apart = (load(ours[loader]) - wanted).abs().max().item()
                rows.append((kind, saver, loader, f"{apart:.1e}"))
                assert apart < 1e-5, rows[-1]
        assert loaded_by_us(places["ours"] / "diffusers").sub(wanted).abs().max() < 1e-5
    print(
        "\n"
        + "\n".join(
            f"{kind:14} saved by {saver:10} loaded by {loader:10} {said}"
            for kind, saver, loader, said in rows
        )
    )
    assert len(rows) == 4 * 9


def test_an_export_gives_the_same_pictures_in_a_plain_pipeline(tmp_path):
    policy = FlowPolicy(BENCHMARK.base)
    policy.load_adapter("expert", BENCHMARK.adapter("ocr"))
    recipe = {
        "schedule": {"tasks": ["ocr"]},
        "grpo": {"reward_weights": {"OCR": 1.0}},
        "train": {"iterations": 3},
    }
    scores = [{"model": "student", "reward": "OCR", "mean": 0.8, "low": 0.7, "high": 0.9, "n": 300}]
    export(policy, "expert", tmp_path, recipe, "apache-2.0", scores=scores, updates=3)
    plain = StableDiffusion3Pipeline.from_pretrained(BENCHMARK.base)
    plain.set_progress_bar_config(disable=True)
    plain.load_lora_weights(str(tmp_path))
    theirs = plain(
        [p.text for p in PROMPTS],
        max_sequence_length=8,
        num_inference_steps=8,
        guidance_scale=1.0,
        output_type="pt",
        generator=[torch.Generator().manual_seed(s) for s in (5, 6)],
    ).images
    ours, base = (sample(policy, PROMPTS, [5, 6], Sampler(8), name) for name in ("expert", None))
    assert (ours - theirs).abs().max() < 1e-3 < 0.05 < (ours - base).abs().max()
    text = (tmp_path / "README.md").read_text()
    about = yaml.safe_load(text.split("---")[1])
    assert about["license"] == "apache-2.0" and "lora" in about["tags"]
    assert (
        "| OCR | 0.800 [0.700, 0.900] | 300 |" in text
        and "Prompts of ocr" in text
        and "rewards:" in text
        and "3 iterations" in text
    )
    with pytest.raises(ValueError, match="needs a licence"):
        export(policy, "expert", tmp_path, recipe, " ")


# ---- what is refused


@pytest.fixture
def expert(tmp_path):
    return shutil.copytree(BENCHMARK.adapter("ocr"), tmp_path / "expert")


def change_config(folder, **changes):
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_weights(folder, change):
    save_file(change(load_file(folder / PEFT_FILE)), folder / PEFT_FILE)


def first(weights):
    return next(iter(sorted(weights)))


BAD = {
    "another prefix": (
        lambda f: change_weights(
            f, lambda w: {k.replace("base_model.model.", "transformer."): v for k, v in w.items()}
        ),
        r"(\d+) of \1 keys are not of adapter_model.safetensors in PEFT's format.*such as "
        r"'transformer\.transformer_blocks",
    ),
    "a missing key": (
        lambda f: change_weights(f, lambda w: {k: v for k, v in w.items() if k != first(w)}),
        r"1 of \d+ keys are missing, such as",
    ),
    "a key too many": (
        lambda f: change_weights(
            f, lambda w: w | {"base_model.model.norm.lora_A.weight": torch.ones(2, 2)}
        ),
        r"1 of \d+ keys are unexpected, such as 'norm.lora_A.weight'",
    ),
    "another shape": (
        lambda f: change_weights(f, lambda w: w | {first(w): torch.ones(16, 7)}),
        r"1 of \d+ have another shape, such as .*\(16, 7\) instead of",
    ),
    "another rank": (lambda f: change_config(f, r=8), r"have another shape"),
    "not finite": (
        lambda f: change_weights(f, lambda w: w | {first(w): w[first(w)] * float("nan")}),
        r"1 of \d+ weights are not finite",
    ),
    "DoRA": (
        lambda f: change_config(f, use_dora=True),
        "use_dora = True, which is not supported: a DoRA adapter",
    ),
    "biases": (
        lambda f: change_config(f, bias="all"),
        "bias = 'all', which is not supported: trained biases belong to the base",
    ),
    "whole layers": (
        lambda f: change_config(f, modules_to_save=["proj_out"]),
        "modules_to_save = .*no B A",
    ),
    "PiSSA": (
        lambda f: change_config(f, init_lora_weights="pissa"),
        "init_lora_weights = 'pissa', which is not supported",
    ),
    "another kind": (lambda f: change_config(f, peft_type="LOHA"), "of the kind LOHA; only LoRA"),
    "a field of the future": (
        lambda f: change_config(f, use_magic=3),
        "use_magic = 3, which is not supported",
    ),
    "cut off": (
        lambda f: (f / PEFT_FILE).write_bytes((f / PEFT_FILE).read_bytes()[:2000]),
        "not a whole safetensors file",
    ),
    "a pointer": (
        lambda f: (f / PEFT_FILE).write_text(
            "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
        ),
        "Git LFS pointer",
    ),
    "a pickle alone": (
        lambda f: (f / PEFT_FILE).rename(f / "adapter_model.bin"),
        "adapter_model.bin, a pickle, which is never read",
    ),
    "no config": (lambda f: (f / CONFIG).unlink(), "is no adapter: a PEFT folder has"),
    "a broken config": (lambda f: (f / CONFIG).write_text("{"), "is not JSON"),
    "another model's layers": (
        lambda f: change_config(f, target_modules=["q_proj"]),
        "unexpected, such as",
    ),
}


@pytest.fixture(scope="module")
def crowd():
    policy = FlowPolicy(BENCHMARK.base)
    policy.add_adapter("first", rank=2, alpha=4)
    return policy


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_refused_by_name_and_leaves_nothing(name, expert, crowd):
    before = {k: v.clone() for k, v in crowd.transformer.state_dict().items()}
    change, message = BAD[name]
    change(expert)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        crowd.load_adapter("ocr", expert)
    after = crowd.transformer.state_dict()
    assert (
        crowd.adapters == ["first"]
        and after.keys() == before.keys()
        and all(torch.equal(before[k], after[k]) for k in before)
    )


def test_after_a_refused_one_the_good_one_takes_the_name(expert):
    policy = FlowPolicy(BENCHMARK.base)
    good = shutil.copytree(expert, expert.parent / "good")
    BAD["another prefix"][0](expert)
    with pytest.raises(ValueError, match="not of adapter_model.safetensors"):
        policy.load_adapter("ocr", expert)
    policy.load_adapter("ocr", good)
    assert (velocity(policy, "ocr") - velocity(policy, None)).abs().max() > 1e-3


def test_from_one_file_a_diffusers_folder_and_the_hub(expert, tmp_path, monkeypatch):
    places = linear_places(transformer())
    lora = read_adapter(expert, places)
    write_diffusers(lora, tmp_path / "diffusers")
    shutil.copy(tmp_path / "diffusers" / DIFFUSERS_FILE, tmp_path / "student.safetensors")
    asked = []

    def snapshot(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(expert)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    for source in (
        tmp_path / "diffusers",
        tmp_path / "student.safetensors",
        expert / PEFT_FILE,
        "somebody/ocr-expert",
    ):
        again = read_adapter(source, places)
        assert again.alpha == lora.alpha and all(
            torch.equal(again.a[p], lora.a[p]) and torch.equal(again.b[p], lora.b[p])
            for p in lora.a
        )
    assert asked == [("somebody/ocr-expert", [CONFIG, PEFT_FILE, DIFFUSERS_FILE])], (
        "weights that are pickles are not even downloaded"
    )

    def offline(*_, **__):
        raise OSError("no route to the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    for source, message in (
        ("somebody/none", "neither a folder here nor an adapter that the hub gives: no route"),
        (tmp_path / "none", "is not there"),
        (tmp_path / "diffusers" / "README.md", "is no adapter"),
    ):
        with pytest.raises(FileNotFoundError, match=message):
            read_adapter(source, places)


@pytest.mark.parametrize("name", ["0", "1", "attn", "to_q", "lora", "lora_A", "default", "weight"])
def test_an_adapter_may_be_called_like_a_part_of_the_model(name, expert):
    policy = FlowPolicy(BENCHMARK.base)
    policy.load_adapter("other", expert)
    policy.load_adapter(name, expert)
    base = {k: p.clone() for k, p in policy.transformer.named_parameters() if ".lora_" not in k}
    assert policy.adapter_parameters(name).keys() == policy.adapter_parameters("other").keys()
    weights = policy.train_adapter(name)
    with torch.enable_grad():
        velocity_ = policy.velocity(
            torch.zeros(1, *policy.latent_shape), 0.5, policy.encode(["a red star"]), adapter=name
        )
    velocity_.square().sum().backward()
    assert all(p.grad is not None for p in weights)
    torch.optim.SGD(weights, 1.0).step()
    policy.train_adapter(None)
    now = dict(policy.transformer.named_parameters())
    assert all(torch.equal(now[k], v) for k, v in base.items())
    assert policy.adapter("other").sha256 != policy.adapter(name).sha256
    policy.save_adapter(name, expert.parent / "saved")
    again = FlowPolicy(BENCHMARK.base)
    again.load_adapter("x", expert.parent / "saved")
    assert again.adapter("x").sha256 == policy.adapter(name).sha256
    for taken in ("keys", "a.b", ""):
        with pytest.raises(ValueError, match="needs a new name"):
            policy.add_adapter(taken)


# ---- merging


@pytest.mark.parametrize(
    "kinds",
    [
        ("rslora", "rslora"),
        ("rank_pattern", "plain"),
        ("alpha_pattern", "rslora"),
        ("rank_pattern", "alpha_pattern"),
    ],
)
@pytest.mark.parametrize("method", ["cat", "svd"])
def test_averages_are_those_of_the_changes_whatever_the_kind(kinds, method, tmp_path):
    policy = FlowPolicy(BENCHMARK.base)
    for i, kind in enumerate(kinds):
        saved_by_peft(kind, tmp_path / str(i))
        policy.load_adapter(f"a{i}", tmp_path / str(i))
    merge(policy, ["a0", "a1"], "mean", method, [0.25, 0.75], rank=16 if method == "svd" else None)

    def change(name, place):
        lora = policy.adapter(name)
        return lora.alpha[place] / len(lora.a[place]) * lora.b[place] @ lora.a[place]

    for place in policy.adapter("a0").a:
        exact = 0.25 * change("a0", place) + 0.75 * change("a1", place)
        assert (change("mean", place) - exact).norm() < 1e-5 * exact.norm()
    policy.save_adapter("mean", tmp_path / "mean")
    policy.load_adapter("again", tmp_path / "mean")
    assert policy.adapter("again").sha256 == policy.adapter("mean").sha256


def test_factors_of_other_ranks_have_no_mean_and_dare_is_drawn_from_its_seed(tmp_path):
    policy = FlowPolicy(BENCHMARK.base)
    for kind in ("rank_pattern", "plain"):
        saved_by_peft(kind, tmp_path / kind)
        policy.load_adapter(kind, tmp_path / kind)
    with pytest.raises(
        ValueError,
        match="needs? the same ranks everywhere: at .*to_q rank_pattern has 6 and plain 4; take cat or svd",
    ):
        merge(policy, ["rank_pattern", "plain"], "x", "factor_wise")
    policy.copy_adapter("rank_pattern", "gold")
    merge(policy, ["rank_pattern", "gold"], "factors", "factor_wise")
    torch.testing.assert_close(
        velocity(policy, "factors"), velocity(policy, "gold"), atol=1e-5, rtol=1e-4
    )
    policy.save_adapter("factors", tmp_path / "factors")
    policy.load_adapter("again", tmp_path / "factors")
    hashes = []
    for name, seed in (("d0", 0), ("d1", 0), ("d2", 1)):
        torch.randn(3)
        merge(policy, ["rank_pattern", "plain"], name, "dare", seed=seed)
        hashes.append(policy.adapter(name).sha256)
    assert hashes[0] == hashes[1] != hashes[2]


# ---- a teacher that is the base


def test_a_teacher_that_is_the_base_without_its_name_is_an_error():
    policy = FlowPolicy(BENCHMARK.base)
    for name in ("student", "null", "student2"):
        policy.add_adapter(name, rank=2, alpha=4)
    policy.load_adapter("ocr", BENCHMARK.adapter("ocr"))
    schedule = Schedule({"ocr": [PROMPTS[0]]}, 1)
    for teacher, anchor, message in (
        ("null", None, "'null' has the velocity of the base"),
        ("ocr", "null", "'null' has the velocity of the base"),
        ("student", None, "'student' is in training"),
        ("gone", None, "no adapter 'gone'"),
    ):
        with pytest.raises(ValueError, match=message):
            OPD(schedule, {"ocr": teacher}, anchor=anchor).check(policy, "student")
    OPD(schedule, {"ocr": None}).check(policy, "student")  # the base, by name
    OPD(schedule, {"ocr": "ocr"}, anchor="null", mar=0.0).check(policy, "student")
