"""The base is a plain diffusers pipeline, and our sampler is diffusers' sampler."""

import json
import subprocess
import sys
import warnings

import diffusers
import numpy as np
import pytest
import torch
import transformers

from flowopd_lib import FlowPolicy, Prompt, Sampler, load_benchmark, sample, trajectory
from flowopd_lib.benchmarks.tiny.text import encode, tokenize

BENCHMARK = load_benchmark()
WITHOUT_THE_LIBRARY = """
import json, sys
import numpy as np, torch
from diffusers import StableDiffusion3Pipeline
model, length, prompts, seeds, scales = json.loads(sys.argv[1])
pipeline = StableDiffusion3Pipeline.from_pretrained(model)
for n, scale in enumerate(scales):
    images = pipeline(prompts, max_sequence_length=length, num_inference_steps=20,
                      guidance_scale=scale, output_type="np",
                      generator=[torch.Generator().manual_seed(seed) for seed in seeds]).images
    np.save(f"{n}.npy", images)
assert not any(name.startswith("flowopd") for name in sys.modules)
"""
PROMPTS = [
    Prompt('a sign that says "CAT"', "ocr"),
    Prompt("a photo of a red circle left of a blue star", "geneval"),
    Prompt("a photo of three green squares", "geneval"),
]
LONG = Prompt("a photo of " + "a red circle and " * 6, "pickscore")
LONG_WORD = Prompt('a sign that says "ELEPHANTS"', "ocr")
UNKNOWN = Prompt("a photo of a café", "pickscore")


def test_diffusers_alone_gives_our_images_with_and_without_guidance(policy, tmp_path):
    seeds, scales = [5, 6, 7], [1.0, 3.0]
    prompts = [p.text for p in PROMPTS]
    arguments = [str(BENCHMARK.base), policy.max_sequence_length, prompts, seeds, scales]
    command = [sys.executable, "-c", WITHOUT_THE_LIBRARY, json.dumps(arguments)]
    subprocess.run(command, check=True, cwd=tmp_path)
    for n, guidance in enumerate(scales):
        theirs = torch.from_numpy(np.load(tmp_path / f"{n}.npy")).permute(0, 3, 1, 2)
        ours = sample(policy, PROMPTS, seeds, Sampler(20, guidance=guidance))
        assert ours.shape == theirs.shape == (3, 3, 64, 64) and ours.std() > 0.05
        assert (ours - theirs).abs().max() < 1e-3


def test_a_prompt_is_encoded_once(policy, monkeypatch):
    first = policy.encode([PROMPTS[0].text])
    monkeypatch.setattr(policy.pipeline, "encode_prompt", lambda *a, **k: pytest.fail("again"))
    tokens = policy.encode([PROMPTS[0].text] * 3).tokens
    assert len(tokens) == 3 and torch.equal(tokens[2], first.tokens[0])


def test_text_encoders_are_trained_as_the_pipeline_calls_them(policy):
    prompts = [p.text for p in PROMPTS]
    names = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_3")
    modules = {name: getattr(policy.pipeline, name) for name in names}
    ids = tokenize(modules, prompts)
    tokens, pooled = encode(modules, ids["clip"], ids["t5"])
    theirs = policy.encode(prompts)
    torch.testing.assert_close(tokens, theirs.tokens, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pooled, theirs.pooled, rtol=1e-5, atol=1e-5)


def test_a_model_with_a_closed_vocabulary_refuses_what_it_cannot_spell(policy):
    with pytest.raises(ValueError, match="tokenizer does not know, such as 'a photo of a café'"):
        policy.encode([UNKNOWN.text])
    with pytest.raises(ValueError, match="longer than the 8 tokens of .* tokenizer_3"):
        policy.encode([LONG_WORD.text])
    with pytest.warns(UserWarning, match="longer than the 20 tokens"):
        policy.encode([LONG.text])


def test_a_model_with_an_open_vocabulary_warns_once_per_task_of_what_it_cuts_off():
    policy = FlowPolicy(BENCHMARK.base)
    policy.closed_vocabulary = False  # as of a full-size model
    prompts = [UNKNOWN, LONG_WORD, LONG, Prompt("a red star", "pickscore")]
    with pytest.warns(UserWarning) as caught:
        policy.check_prompts(prompts)
    assert sorted(str(w.message).split(",")[0] for w in caught) == [
        "1 of the ocr prompts are longer than the 8 tokens of the model's tokenizer_3",
        "1 of the pickscore prompts are longer than the 20 tokens of the model's tokenizer",
        "1 of the pickscore prompts have characters that the model's tokenizer does not know",
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        policy.check_prompts(prompts)
        assert policy.encode([p.text for p in prompts]).tokens.isfinite().all()


def test_calls_that_cannot_work_are_refused(policy, tmp_path):
    with pytest.raises(FileNotFoundError, match="model_index.json"):
        FlowPolicy(tmp_path)
    with pytest.raises(ValueError, match="1 prompts with 2 seeds"):
        next(trajectory(policy, PROMPTS[:1], [0, 1]))
    with pytest.raises(ValueError, match="0 prompts with 64 seeds"):
        sample(policy, PROMPTS[:1] * 64, range(128), batch=64)


def test_loading_leaves_the_logs_of_other_libraries_as_they_were():
    logs = (diffusers.utils.logging, transformers.utils.logging)
    before = [(log.get_verbosity(), log.is_progress_bar_enabled()) for log in logs]
    try:
        for log in logs:
            log.set_verbosity_info()
            log.enable_progress_bar()
        FlowPolicy(BENCHMARK.base).encode([PROMPTS[0].text])
        BENCHMARK.rewards("cpu")
        states = [(log.get_verbosity(), log.is_progress_bar_enabled()) for log in logs]
        assert states == [(log.INFO, True) for log in logs]
    finally:
        for log, (verbosity, bars) in zip(logs, before):
            log.set_verbosity(verbosity)
            log.enable_progress_bar() if bars else log.disable_progress_bar()


def test_importing_the_library_loads_no_large_package():
    command = [sys.executable, "-c", "import sys, flowopd_lib; print(*sys.modules)"]
    modules = subprocess.check_output(command, text=True).split()
    large = "torch diffusers transformers peft accelerate onnxruntime pandas matplotlib papermill"
    assert set(large.split()) & set(modules) == set()
