"""The base is a plain diffusers pipeline, and our sampler is diffusers' sampler."""

import subprocess
import sys
import warnings

import diffusers
import numpy as np
import pytest
import torch
import transformers
from diffusers import FlowMatchEulerDiscreteScheduler

from flowopd_lib import (
    FlowPolicy,
    Prompt,
    Sampler,
    initial_noise,
    load_benchmark,
    sample,
    trajectory,
)
from flowopd_lib.benchmarks.tiny.text import encode
from flowopd_lib.benchmarks.tiny.train_base import tokenize
from flowopd_lib.sde import predict_x0, transition

BENCHMARK = load_benchmark()

ALONE = """
import sys
import numpy as np, torch
from diffusers import StableDiffusion3Pipeline
pipeline = StableDiffusion3Pipeline.from_pretrained(sys.argv[1])
images = pipeline(sys.argv[3:], max_sequence_length=8, num_inference_steps=40,
                  guidance_scale=float(sys.argv[2]), output_type="np",
                  generator=[torch.Generator().manual_seed(s) for s in range(5, 2 + len(sys.argv))]).images
assert not any(name.startswith("flowopd") for name in sys.modules)
np.save("images.npy", images)
"""
PROMPTS = [
    Prompt('a sign that says "CAT"', "ocr"),
    Prompt("a photo of a red circle left of a blue star", "geneval"),
    Prompt("a photo of three green squares", "geneval"),
]


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_folder_works_with_nothing_of_ours_and_gives_our_images(policy, guidance, tmp_path):
    command = [
        sys.executable,
        "-c",
        ALONE,
        str(BENCHMARK.base),
        str(guidance),
        *(p.text for p in PROMPTS),
    ]
    subprocess.run(command, check=True, cwd=tmp_path)
    theirs = np.load(tmp_path / "images.npy")
    ours = (
        sample(policy, PROMPTS, range(5, 8), Sampler(40, guidance=guidance))
        .permute(0, 2, 3, 1)
        .numpy()
    )
    assert ours.shape == theirs.shape == (3, 64, 64, 3) and ours.std() > 0.05
    assert np.abs(ours - theirs).max() < 1e-3


def test_an_ode_step_is_diffusers_euler_step(policy):
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(policy.pipeline.scheduler.config)
    scheduler.set_timesteps(7)
    x, grid = torch.randn(2, 16, 8, 8), policy.sigmas(7)
    assert grid[0] == 1 and grid[-1] == 0 and len(grid) == 8 and grid == sorted(grid, reverse=True)
    for t, sigma, sigma_next in zip(scheduler.timesteps, grid, grid[1:]):
        v = torch.randn_like(x)
        theirs = scheduler.step(v, t, x).prev_sample
        assert torch.allclose(transition(x, v, sigma, sigma_next, "ode")[0], theirs, atol=1e-6)
        x = theirs


def test_the_conventions_hold():
    x0, eps, sigma = torch.randn(2, 16, 8, 8), torch.randn(2, 16, 8, 8), 0.3
    x, v = (1 - sigma) * x0 + sigma * eps, eps - x0
    assert torch.allclose(predict_x0(x, v, sigma), x0, atol=1e-6)
    assert torch.allclose(transition(x, v, sigma, 0.0, "ode")[0], x0, atol=1e-6)


def test_a_sample_depends_on_its_own_seed_and_prompt_only(policy):
    together = sample(policy, PROMPTS, [11, 12, 13], Sampler(6))
    alone = sample(policy, PROMPTS[1:2], [12], Sampler(6))
    assert (together[1] - alone[0]).abs().max() < 1e-4
    assert (sample(policy, PROMPTS[1:2], [13], Sampler(6))[0] - alone[0]).abs().max() > 0.05
    assert torch.equal(initial_noise(policy, [4, 9])[1], initial_noise(policy, [9])[0])


def test_trajectory_yields_every_transition(policy):
    steps = list(trajectory(policy, PROMPTS[:1], [0], Sampler(5)))
    assert [s.index for s in steps] == list(range(5))
    assert all(torch.equal(a.x_next, b.x) for a, b in zip(steps, steps[1:]))
    assert torch.allclose(steps[-1].x0_hat, steps[-1].x_next, atol=1e-5)


def test_texts_are_encoded_once(policy, monkeypatch):
    first = policy.encode(["a photo of a red circle"])
    monkeypatch.setattr(
        policy.pipeline, "encode_prompt", lambda *a, **k: pytest.fail("encoded again")
    )
    again = policy.encode(["a photo of a red circle"] * 3)
    assert again.tokens.shape == (3, 28, 256) and torch.equal(again.tokens[2], first.tokens[0])


def test_the_text_encoders_are_called_in_training_as_in_the_pipeline(policy):
    texts = [p.text for p in PROMPTS]
    names = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_3")
    modules = {name: getattr(policy.pipeline, name) for name in names}
    ids = tokenize(modules, texts)
    tokens, pooled = encode(modules, ids["clip"], ids["t5"])
    theirs = policy.encode(texts)
    assert torch.allclose(tokens, theirs.tokens, atol=1e-5) and torch.allclose(
        pooled, theirs.pooled, atol=1e-5
    )


def test_a_prompt_that_cannot_be_read_is_an_error(policy):
    with pytest.raises(
        ValueError,
        match="1 of the prompts have characters that the model's tokenizer does not know, such as 'a photo "
        "of a café'",
    ):
        policy.encode(["a photo of a café"])
    with pytest.raises(
        ValueError,
        match="longer than the 8 tokens of the model's tokenizer_3, such as .*; shorten them",
    ):
        policy.encode(['a sign that says "ELEPHANTS"'])
    with pytest.warns(UserWarning, match="longer than the 20 tokens"):
        policy.encode(["a photo of " + "a red circle and " * 6])


def test_a_model_that_can_read_anything_cuts_prompts_off_and_says_so_once_a_task():
    open_ = FlowPolicy(BENCHMARK.base)
    assert open_.strict
    open_.strict = False  # as a full-size model is
    prompts = [
        Prompt("a photo of a café", "pickscore"),
        Prompt("a red star", "pickscore"),
        Prompt('a sign that says "ELEPHANTS"', "ocr"),
        Prompt("a photo of " + "a red circle and " * 6, "pickscore"),
    ]
    with pytest.warns(UserWarning) as told:
        open_.check_prompts(prompts)
    said = sorted(str(w.message) for w in told)
    assert [s.split(",")[0] for s in said] == [
        "1 of the ocr prompts are longer than the 8 tokens of the model's tokenizer_3",
        "1 of the pickscore prompts are longer than the 20 tokens of the model's tokenizer",
        "1 of the pickscore prompts have characters that the model's tokenizer does not know",
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_.check_prompts(prompts)
        text = open_.encode([p.text for p in prompts])
    assert text.tokens.shape == (4, 28, 256) and text.tokens.isfinite().all()


def test_bad_calls_are_errors(policy, tmp_path):
    with pytest.raises(FileNotFoundError, match="model_index.json"):
        FlowPolicy(tmp_path)
    with pytest.raises(ValueError, match="at least one step"):
        policy.sigmas(0)
    with pytest.raises(ValueError, match="1 prompts with 2 seeds"):
        next(trajectory(policy, PROMPTS[:1], [0, 1]))
    with pytest.raises(ValueError, match="64 prompts with 128 seeds"):
        sample(policy, PROMPTS[:1] * 64, range(128), batch=64)


def test_other_libraries_logs_are_left_as_they_were():
    logs = (diffusers.utils.logging, transformers.utils.logging)
    before = [(log.get_verbosity(), log.is_progress_bar_enabled()) for log in logs]
    try:
        for log in logs:
            log.set_verbosity_info()
            log.enable_progress_bar()
        FlowPolicy(BENCHMARK.base).encode([PROMPTS[0].text])
        BENCHMARK.rewards("cpu")
        assert all(
            log.get_verbosity() == log.INFO and log.is_progress_bar_enabled() for log in logs
        )
    finally:
        for log, (verbosity, bars) in zip(logs, before):
            log.set_verbosity(verbosity)
            log.enable_progress_bar() if bars else log.disable_progress_bar()
    alone = (
        "import diffusers, transformers; a = [m.utils.logging.get_verbosity() for m in (diffusers, "
        "transformers)]; import flowopd_lib; "
        "assert a == [m.utils.logging.get_verbosity() for m in (diffusers, transformers)]"
    )
    assert (
        subprocess.run([sys.executable, "-c", alone], capture_output=True, text=True).stderr == ""
    )


def test_importing_the_library_loads_nothing_that_only_models_or_runs_need():
    heavy = (
        "diffusers transformers peft accelerate rapidocr onnxruntime papermill jsonschema scipy.stats "
        "seaborn torch._dynamo huggingface_hub"
    ).split()
    told = subprocess.run(
        [sys.executable, "-c", "import sys, flowopd_lib; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert "torch" in told and [name for name in heavy if name in told] == []
