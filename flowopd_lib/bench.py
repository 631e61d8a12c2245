"""Speed and memory of what long runs spend their time on, `python -m flowopd_lib bench`, and a
Stable Diffusion 3.5 with random weights, for where none can be downloaded.

Measured by batch size: a rollout, an update of GRPO, an update of OPD with all teachers and the
anchor, and an evaluation, each as images a second, seconds of its phases and peak memory.

The random model has what the real one has: dual attention in the first blocks, RMS norm of queries
and keys, 16 latent channels, shift 3, and three text encoders, the third with 128 tokens
(Flow-GRPO's length). The text encoders are shallow in every size, because their outputs are cached
and their cost is not measured. Their tokenizers are those of the default benchmark.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from .benchmarks import DEFAULT, load_benchmark
from .benchmarks.benchmark import SHIPPED
from .config import read_yaml, validate
from .data import Schedule
from .evaluate import evaluate
from .files import write_json, write_whole
from .lab.recipe import Recipe, build
from .lab.workspace import Workspace
from .loading import quiet, resolve
from .lora import Lora, linear_modules, new_lora, write_peft
from .losses import Objective, Shard
from .policy import FlowPolicy
from .rollout import sample

RANDOM_SD35 = "sd35-random"  # Stable Diffusion 3.5 Medium with random weights
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft")
GROUP = 4  # images per prompt in GRPO
Phases = Mapping[str, Callable[[int], Any]]  # what one iteration does, in order, by name


# ---- measurements


def run(
    model: str = DEFAULT,
    batch_sizes: Sequence[int] = (8, 32),
    repeats: int = 3,
    precision: str = "auto",
    out: str | Path | None = None,
) -> dict[str, Any]:
    """All measurements, also written to the file `out` as JSON.

    `model`: a benchmark by its name or file, or `sd35-random`. `batch_sizes`: images per batch,
    multiples of 4. `repeats`: of every measurement, after a warm-up; the median counts. Raises
    ValueError for other batch sizes.
    """
    if any(n < GROUP or n % GROUP for n in batch_sizes):
        raise ValueError(f"batch sizes must be multiples of {GROUP}, not {list(batch_sizes)}")
    gpu = torch.cuda.is_available()
    result = {
        "model": model,
        "repeats": repeats,
        "device": torch.cuda.get_device_name() if gpu else platform.machine(),
        "cores": os.cpu_count(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }
    with tempfile.TemporaryDirectory() as folder:
        dtype = resolve(precision, "cuda" if gpu else "cpu")
        file = write_random_sd35(folder, dtype=dtype) if model == RANDOM_SD35 else model
        workspace = Workspace(load_benchmark(file), dtype)
        result |= {"precision": workspace.policy.precision, "cases": []}
        for batch in batch_sizes:
            for row in measure_model(workspace, batch, repeats):
                print(row, file=sys.stderr, flush=True)
                result["cases"].append(row)
    if out:
        write_json(out, result)
    return result


def measure_model(workspace: Workspace, batch: int, repeats: int) -> Iterator[dict[str, Any]]:
    """A row per case at one batch size. OPD is left out for a benchmark without experts."""
    benchmark, policy = workspace.benchmark, workspace.policy
    grpo = {"prompts_per_batch": batch // GROUP, "images_per_prompt": GROUP}
    opd = {"prompts_per_batch": batch, "tasks": list(benchmark.teachers)}
    options = {"micro_batch_size": batch}
    recipes = {"GRPO update": {"schedule": grpo, "grpo": {"updates": 1, "beta": 0.0, **options}}}
    if benchmark.teachers:
        recipes["OPD update"] = {"schedule": opd, "opd": {"anchor": benchmark.anchor, **options}}
    for case, sections in recipes.items():
        recipe = validate(Recipe, {**sections, "train": {"iterations": 1}})
        objective, _ = build(recipe, workspace)
        yield {"case": case, **measure(update_phases(policy, objective), batch, repeats)}
    policy.train_adapter(None)
    prompts = {task: benchmark.prompts(task, "train") for task in benchmark.prompt_tasks}
    drawn, rewards = Schedule(prompts, batch).draw(0), benchmark.rewards(workspace.device)

    def rollout(iteration: int) -> None:
        sampler = benchmark.sampling.grpo
        sample(policy, drawn.prompts, drawn.seeds, sampler, "student", batch)

    def evaluation(iteration: int) -> None:
        sampler, models = benchmark.sampling.evaluation, {"student": "student"}
        evaluate(
            policy, drawn.prompts, rewards, 0, sampler, models, batch=batch, show_progress=False
        )

    for phase in (rollout, evaluation):
        yield {"case": phase.__name__, **measure({"sampling": phase}, batch, repeats)}


def update_phases(policy: FlowPolicy, objective: Objective) -> Phases:
    """An iteration of a training: `collect` (rollout, rewards or teachers), then `update` (forward,
    backward, optimizer)."""
    optimizer = torch.optim.AdamW(policy.train_adapter("student"), 1e-5)
    collected = {}

    def collect(iteration: int) -> None:
        collected["data"], _ = objective.collect(policy, "student", iteration, Shard())

    def update(iteration: int) -> None:
        for number in range(objective.updates):
            for loss, _ in objective.losses(policy, "student", collected["data"], number):
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return {"collect": collect, "update": update}


def measure(phases: Phases, batch: int, repeats: int) -> dict[str, Any]:
    """Seconds of each phase and of all (medians, after a warm-up), images per second, peak memory
    in GiB; `error` in place of them where a GPU has too little memory."""
    seconds, gpu = {name: [] for name in phases}, torch.cuda.is_available()
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    try:
        for iteration in range(repeats + 1):
            for name, phase in phases.items():
                start = time.perf_counter()
                phase(iteration)
                if gpu:
                    torch.cuda.synchronize()
                seconds[name].append(time.perf_counter() - start)
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        return {"batch": batch, "error": "out of GPU memory"}
    medians = {name: float(np.median(times[1:])) for name, times in seconds.items()}
    total = sum(medians.values())
    # of the GPU's allocations or, without a GPU, of the process since its start
    process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "batch": batch,
        "seconds": total,
        **{f"{name}_seconds": median for name, median in medians.items()},
        "images_per_second": batch / total,
        "peak_memory_gib": (torch.cuda.max_memory_allocated() if gpu else process) / 2**30,
    }


# ---- Stable Diffusion 3.5 with random weights


@dataclass(frozen=True)
class Size:
    """Blocks of the transformer, how many of them have dual attention, heads of width 64, widths of
    the two CLIP encoders and of T5, T5 tokens, latent height and width, and VAE channels."""

    layers: int
    dual_layers: int
    heads: int
    clip_widths: tuple[int, int]
    t5_width: int
    tokens: int
    latent_size: int
    vae_channels: tuple[int, ...]


MEDIUM = Size(24, 13, 24, (768, 1280), 4096, 128, 64, (128, 256, 512, 512))
TINY = Size(3, 2, 1, (32, 32), 64, 128, 8, (8, 8, 8, 8))


def special_tokens(tokenizer) -> dict[str, int]:
    """What a CLIP text encoder's config says of its tokenizer."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {"vocab_size": len(tokenizer), **{name: getattr(tokenizer, name) for name in names}}


def write_pipeline(folder: Path, size: Size, dtype: torch.dtype):
    """A `StableDiffusion3Pipeline` with random weights, always the same, saved in `folder`."""
    base = Path(load_benchmark().base)
    with quiet():
        import diffusers
        import transformers

        load = transformers.AutoTokenizer.from_pretrained
        tokenizers = [load(base / f"tokenizer{n}") for n in ("", "_2", "_3")]
    for tokenizer, tokens in zip(tokenizers, (77, 77, size.tokens)):
        tokenizer.model_max_length = tokens

    def clip(width: int, tokenizer):
        config = transformers.CLIPTextConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=width,
            num_hidden_layers=2,  # the pipeline takes the last but one
            num_attention_heads=max(1, width // 64),
            **special_tokens(tokenizer),
        )
        return transformers.CLIPTextModelWithProjection(config)

    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(0)
        transformer = diffusers.SD3Transformer2DModel(
            sample_size=size.latent_size,
            num_layers=size.layers,
            num_attention_heads=size.heads,
            joint_attention_dim=size.t5_width,
            caption_projection_dim=64 * size.heads,
            pooled_projection_dim=sum(size.clip_widths),
            pos_embed_max_size=384,
            dual_attention_layers=tuple(range(size.dual_layers)),
            qk_norm="rms_norm",
        )
        vae = diffusers.AutoencoderKL(
            block_out_channels=size.vae_channels,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=16,
            norm_num_groups=min(32, size.vae_channels[0]),
            scaling_factor=1.5305,
            shift_factor=0.0609,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
        t5 = transformers.T5Config(
            vocab_size=len(tokenizers[2]),
            d_model=size.t5_width,
            d_ff=size.t5_width,
            num_heads=max(1, size.t5_width // 64),
            num_layers=1,
            feed_forward_proj="gated-gelu",
        )
        pipeline = diffusers.StableDiffusion3Pipeline(
            transformer,
            diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae,
            clip(size.clip_widths[0], tokenizers[0]),
            tokenizers[0],
            clip(size.clip_widths[1], tokenizers[1]),
            tokenizers[1],
            transformers.T5EncoderModel(t5),
            tokenizers[2],
        )
        pipeline.to(dtype).save_pretrained(folder)
    return pipeline


def mean_brightness(images: torch.Tensor, prompts) -> np.ndarray:
    """A reward that costs nothing: images of random weights show nothing."""
    return images.flatten(1).mean(1).float().cpu().numpy()


def write_random_sd35(
    folder: str | Path, size: Size = MEDIUM, dtype: torch.dtype = torch.bfloat16
) -> Path:
    """The file of a benchmark as sd35.yaml describes it, with random weights for model and experts,
    the prompts of the default benchmark, and `mean_brightness` for every reward."""
    folder, default = Path(folder).resolve(), load_benchmark()
    modules = linear_modules(write_pipeline(folder / "model", size, dtype).transformer)
    config = read_yaml(SHIPPED / "sd35.yaml")
    adapter = config["adapters"]
    for seed, (name, expert) in enumerate(config["experts"].items()):
        lora = new_lora(modules, adapter["rank"], adapter["alpha"], tuple(adapter["targets"]), seed)
        g = torch.Generator().manual_seed(seed)
        b = {n: 0.01 * torch.randn(w.shape, generator=g) for n, w in lora.b.items()}
        write_peft(Lora(lora.a, b, lora.alpha), folder / name)
        expert["adapter"] = name
    reward = {"class": f"{__name__}:{mean_brightness.__name__}"}
    config |= {
        "model": "model",
        "resolution": 8 * size.latent_size,
        "text_length": size.tokens,
        "prompts": str((default.folder / default.config.prompts).resolve()),
        "tasks": {name: task.model_dump() for name, task in default.tasks.items()},
        "rewards": dict.fromkeys(default.config.rewards, reward),
    }
    write_whole(folder / "sd35-random.yaml", yaml.safe_dump(config, sort_keys=False))
    return folder / "sd35-random.yaml"
