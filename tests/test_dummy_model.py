"""Stable Diffusion 3.5's architecture with random weights: the policy and the losses run on it."""

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from peft import LoraConfig, get_peft_model

from flowopd_lib import FlowPolicy, Prompt, merge
from flowopd_lib.bench.dummy_model import TINY, write_sd35
from flowopd_lib.bench.speed import TASKS, run_case, setting
from flowopd_lib.export import export
from flowopd_lib.objectives import OPD, Share
from flowopd_lib.rollout import Sampler, sample


def test_it_has_what_tells_sd35_from_sd3_and_distils(tmp_path):
    folder = write_sd35(tmp_path, TINY, torch.float32)
    policy, schedule = setting(str(folder), "cpu", torch.float32, 4, TASKS)
    blocks = policy.transformer.transformer_blocks
    assert [block.attn2 is not None for block in blocks] == [True, True, False]
    assert blocks[0].attn.norm_q.weight.shape == (64,)
    prompts = schedule.draw(0).prompts
    tokens = policy.encode([p.text for p in prompts]).tokens
    assert tokens.shape == (4, 77 + 128, 64)
    assert sample(policy, prompts, range(4), Sampler(2)).shape == (4, 3, 64, 64)
    objective = OPD(schedule, {task: task for task in TASKS}, Sampler(3, "sde"), mar=0.0)
    policy.train_adapter("student")
    for loss in objective.losses(
        policy, "student", objective.collect(policy, "student", 0, Share()), 0
    ):
        loss.backward()
    moved = {k for k, p in policy.adapter_parameters("student").items() if p.grad.abs().max() > 0}
    assert any(".attn2.to_q.lora_B" in key for key in moved)


FLOW_GRPO = [  # the places of the published experts: the first attention of a block, and not attn2
    "attn.add_k_proj",
    "attn.add_q_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
    "attn.to_k",
    "attn.to_out.0",
    "attn.to_q",
    "attn.to_v",
]


def test_experts_as_they_are_published_are_merged_and_exported_to_the_same_pictures(tmp_path):
    folder = write_sd35(tmp_path / "model", TINY, torch.float32)
    policy = FlowPolicy(folder, dtype="float32")
    for seed, name in enumerate(("geneval", "ocr")):
        backbone = SD3Transformer2DModel.from_pretrained(folder / "transformer")
        config = LoraConfig(
            r=4, lora_alpha=8, target_modules=FLOW_GRPO, init_lora_weights="gaussian"
        )
        published = get_peft_model(backbone, config)
        noise = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for key, p in published.named_parameters():
                if "lora_B" in key:
                    p.copy_(torch.randn(p.shape, generator=noise) * 0.2)
        published.save_pretrained(tmp_path / name)
        policy.load_adapter(name, tmp_path / name)
        x, text = (
            torch.randn(1, *policy.latent_shape, generator=noise),
            policy.encode(["a photo of a heart"]),
        )
        theirs = published(x, text.tokens, text.pooled, torch.tensor([500.0]), return_dict=False)[0]
        torch.testing.assert_close(
            policy.velocity(x, 0.5, text, adapter=name), theirs, rtol=1e-4, atol=1e-5
        )
    places = set(policy.adapter("ocr").ranks)
    # The last block has no way out for the text.
    assert len(places) == 8 * TINY.layers - 1 and not any("attn2" in place for place in places)
    merge(policy, ("geneval", "ocr"), "student", rank=8)
    prompts = [Prompt("a photo of a heart", "geneval"), Prompt("a photo of a star", "geneval")]
    export(policy, "student", tmp_path / "export", {}, "apache-2.0", base="a dummy")
    plain = StableDiffusion3Pipeline.from_pretrained(folder)
    plain.load_lora_weights(str(tmp_path / "export"))
    theirs = plain(
        [p.text for p in prompts],
        max_sequence_length=TINY.tokens,
        num_inference_steps=4,
        guidance_scale=1.0,
        output_type="pt",
        generator=[torch.Generator().manual_seed(s) for s in (5, 6)],
    ).images
    ours, base = (sample(policy, prompts, [5, 6], Sampler(4), name) for name in ("student", None))
    assert (ours - theirs).abs().max() < 1e-3 < 0.01 < (ours - base).abs().max()


def test_the_benchmark_runs_on_it(tmp_path):
    class Pipe:
        sent = []
        asked = iter([2, None])

        def send(self, what):
            self.sent.append(what)

        def recv(self):
            return next(self.asked)

    folder = write_sd35(tmp_path, TINY, torch.float32)
    threads, pipe = torch.get_num_threads(), Pipe()
    run_case("grpo", str(folder), "cpu", torch.float32, 8, pipe)
    torch.set_num_threads(threads)
    ready, seconds, end = pipe.sent
    assert ready == "ready" and seconds > 0 and end["flop"] > 0
