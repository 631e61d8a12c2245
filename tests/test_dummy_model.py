"""Stable Diffusion 3.5's architecture with random weights: the policy and the losses run on it."""

import dummy_model
import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from peft import PeftModel

from flowopd_lib import OPD, FlowPolicy, OPDConfig, Prompt, Sampler, Schedule, sample
from flowopd_lib.bench import TINY, write_pipeline
from flowopd_lib.lora import linear_modules, write_diffusers
from flowopd_lib.losses import Shard
from flowopd_lib.merge import merge

PROMPTS = [Prompt("a photo of a heart", "geneval"), Prompt('a sign that says "CAT"', "ocr")]


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """With two experts as Flow-GRPO's are published."""
    folder = tmp_path_factory.mktemp("sd35")
    write_pipeline(folder / "model", TINY, torch.float32)
    policy = FlowPolicy(folder / "model", dtype="float32")
    for seed, name in enumerate(("geneval", "ocr")):
        modules = linear_modules(policy.transformer)
        dummy_model.write_expert(folder / name, modules, seed)
        policy.load_adapter(name, folder / name)
    policy.folder = folder
    return policy


def test_it_has_what_tells_sd35_from_sd3_and_is_distilled(policy):
    blocks = policy.transformer.transformer_blocks
    assert [block.attn2 is not None for block in blocks] == [True, True, False]
    assert blocks[0].attn.norm_q.weight.shape == (64,)
    assert policy.encode([p.text for p in PROMPTS]).tokens.shape == (2, 77 + 128, 64)
    policy.add_adapter("student", rank=2, alpha=4)
    schedule = Schedule({p.task: [p] for p in PROMPTS}, 4)
    teachers = {"geneval": "geneval", "ocr": "ocr"}
    objective = OPD(schedule, OPDConfig(teachers=teachers, mar=0.0), Sampler(3, "sde"))
    objective.check(policy, "student")
    policy.train_adapter("student")
    data, _ = objective.collect(policy, "student", 0, Shard())
    for loss, _ in objective.losses(policy, "student", data, 0):
        loss.backward()
    weights = policy.adapter_parameters("student")
    moved = [name for name, p in weights.items() if p.grad is not None and p.grad.abs().max() > 0]
    assert any(".attn2.to_q.lora_B" in name for name in moved)


def test_published_experts_are_merged_and_exported_to_the_same_images(policy, tmp_path):
    backbone = SD3Transformer2DModel.from_pretrained(policy.folder / "model" / "transformer")
    x_t, text = torch.randn(1, *policy.latent_shape), policy.encode([PROMPTS[0].text])
    theirs = PeftModel.from_pretrained(backbone, str(policy.folder / "ocr"))
    v = theirs(x_t, text.tokens, text.pooled, torch.tensor([500.0]), return_dict=False)[0]
    with torch.no_grad():
        ours = policy.velocity(x_t, 0.5, text, adapter="ocr")
    torch.testing.assert_close(ours, v, rtol=1e-4, atol=1e-5)
    names = set(policy.adapter("ocr").ranks)
    # the last block has no output for the text
    assert len(names) == 8 * TINY.layers - 1 and not any("attn2" in name for name in names)
    merge(policy, ("geneval", "ocr"), "merged", weights=[4.0, 4.0])
    write_diffusers(policy.adapter("merged"), tmp_path)
    plain = StableDiffusion3Pipeline.from_pretrained(policy.folder / "model")
    plain.load_lora_weights(str(tmp_path))
    theirs = plain(
        [p.text for p in PROMPTS],
        max_sequence_length=TINY.tokens,
        num_inference_steps=3,
        guidance_scale=1.0,
        output_type="pt",
        generator=[torch.Generator().manual_seed(s) for s in (5, 6)],
    ).images
    ours, base = (sample(policy, PROMPTS, [5, 6], Sampler(3), name) for name in ("merged", None))
    assert (ours - theirs).abs().max() < 1e-3 < 0.01 < (ours - base).abs().max()
