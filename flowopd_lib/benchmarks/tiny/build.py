"""Build the small benchmark's assets from nothing: `python -m flowopd_lib build --work build`, then
its experts: `python -m flowopd_lib experts --work experts`."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import shutil
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

import pandas as pd
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save

from ...config import choose, read_yaml, validate
from ...data import write_prompts
from ...evaluate import evaluate
from ...files import RUNS, write_json, write_whole
from ...fingerprint import file_hash
from ...lab.recipe import Recipe
from ...lab.recipe import build as build_recipe
from ...lab.workspace import Workspace
from ...loading import decide
from ...stats import GOLD, rewards_in, summary
from ...train import METRICS, train
from .. import load_benchmark
from . import ASSETS, BASE, EXPERTS
from .loop import say
from .specs import PROMPT_COUNTS, PROMPT_TASKS, SEED, sample_specs
from .text import load_text, pretrain_text
from .train_base import misalign, train_base, train_vae
from .train_rewards import train_deqa, train_pickscore

LIBRARIES = ("torch", "diffusers", "transformers", "rapidocr", "numpy", "pillow", "matplotlib")
# the steps, and what each is made from
INPUTS = {
    "prompts": (),
    "vae": (),
    "text": (),
    "base": ("vae", "text"),
    "misalign": ("vae", "text", "base"),
    "pickscore": ("vae",),
    "deqa": ("vae",),
    "pickscore_gold": ("vae",),
    "deqa_gold": ("vae",),
}
SHIPPED = ("prompts", "tiny-sd3", "ability", "pickscore", "deqa", "pickscore_gold", "deqa_gold")


def write_files(out: Path) -> None:
    """The prompts of all tasks and splits, under Flow-GRPO's names."""
    for task in PROMPT_TASKS:
        for split, n in PROMPT_COUNTS.items():
            name = f"{split}_metadata.jsonl" if task == "geneval" else f"{split}.txt"
            write_prompts(out / task / name, [s.prompt for s in sample_specs(task, split, n)])


def run_step(name: str, work: Path) -> None:
    """Make what a step makes, the folder `work/name` in most cases."""
    out, state = work / name, work / "state"
    if "vae" in INPUTS[name]:
        vae = AutoencoderKL.from_pretrained(work / "vae").eval().requires_grad_(False)
    match name:
        case "prompts":
            write_files(out)
        case "vae":
            train_vae(out, state)
        case "text":
            pretrain_text(out)
        case "base":
            train_base(vae, load_text(work / "text"), out, state)
        case "misalign":
            misalign(vae, load_text(work / "text"), work)
        case "pickscore" | "pickscore_gold":
            train_pickscore(vae, out, state / name, gold=name.endswith("gold"))
        case "deqa" | "deqa_gold":
            train_deqa(vae, out, state / name, gold=name.endswith("gold"))


def check_inputs(work: Path, name: str) -> None:
    """Raises ValueError if a step was started from other inputs than those there are now."""
    inputs = {i: describe_files(work / i) for i in INPUTS[name]}
    record = work / f"{name}.inputs.json"
    for i, found in json.loads(record.read_text()).items() if record.exists() else ():
        if inputs[i] != found:
            raise ValueError(
                f"{name} was started from another {i} than {work / i} now is; delete {record} and "
                f"what {name} left in {work / 'state'}, or put {i} back"
            )
    write_json(record, inputs)


def describe_files(folder: Path, without: str = "") -> dict[str, dict]:
    """sha256 and size of the files in a folder, but of its manifest and of the folder `without`."""
    paths = {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file()}
    return {
        name: {"sha256": file_hash(path), "bytes": path.stat().st_size}
        for name, path in paths.items()
        if Path(name).parts[0] not in ("manifest.json", without)
    }


def describe_machine() -> dict:
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "versions": {"python": platform.python_version()} | {n: version(n) for n in LIBRARIES},
    }


@contextlib.contextmanager
def count_seconds(file: Path) -> Iterator[None]:
    """Add the time inside to the seconds in `file`, that of a run which is stopped as well."""
    before, start = read_seconds(file), time.time()
    try:
        yield
    finally:
        write_json(file, before + time.time() - start)


def read_seconds(file: Path) -> float:
    return json.loads(file.read_text()) if file.exists() else 0.0


def build(work: Path, only: Sequence[str] = (), out: Path = ASSETS) -> None:
    """Run the steps (`only` some of them) in `work`, with checkpoints from which they resume; a
    finished one is not run again. Once all are finished, the results and a manifest are written to
    `out`.

    Raises ValueError for a step whose inputs are missing, or are not those it began with.
    """
    for name in only:
        choose("step", name, INPUTS)
    chosen = [name for name in INPUTS if not only or name in only]
    done = {name: work / f"{name}.done" for name in INPUTS}
    for name in chosen:
        for i in INPUTS[name]:
            if i not in chosen and not done[i].exists():
                raise ValueError(f"{name} needs {i}, which {work} does not have; run {i} too")
    work.mkdir(parents=True, exist_ok=True)
    for name in chosen:
        if not done[name].exists():
            check_inputs(work, name)
            with count_seconds(work / f"{name}.seconds.json"):
                run_step(name, work)
            done[name].touch()
            say(f"{name}: finished")
    if all(file.exists() for file in done.values()):
        for name in SHIPPED:
            shutil.rmtree(out / name, ignore_errors=True)
            shutil.copytree(work / name, out / name)
        record = {"command": "python -m flowopd_lib build --work build", "seed": SEED}
        record["seconds"] = {n: round(read_seconds(work / f"{n}.seconds.json")) for n in INPUTS}
        record |= {**describe_machine(), "files": describe_files(out, "experts")}
        write_json(out / "manifest.json", record)
        say(f"assets written to {out}")


# --- the experts

NAMES = ("geneval", "ocr", "pickscore", "deqa")
# the adapters that are shipped, by percent of the iterations: their folders in a training's
FOLDERS = {25: "25", 50: "50", 100: "adapter"}
VAL_SEED = 1 << 20


def recipe_file(name: str) -> Path:
    return RUNS / "recipes" / f"expert_{name}.yaml"


def train_expert(name: str, folder: Path) -> None:
    """Train an expert in `folder`, from its last checkpoint if there is one, in the precision in
    which it began."""
    workspace = Workspace(load_benchmark(), decide(folder))
    recipe = validate(Recipe, read_yaml(recipe_file(name)), str(recipe_file(name)))
    objective, config = build_recipe(recipe, workspace)
    at = {round(config.iterations * percent / 100): FOLDERS[percent] for percent in (25, 50)}
    for info in train(workspace.policy, objective, folder, config):
        done = info.iteration + 1
        if info.metrics and done in at:
            with workspace.policy.adapter_weights("student", info.average):
                workspace.policy.save_adapter("student", folder / at[done])
        if info.metrics and done % 10 == 0:
            shown = " ".join(f"{key} {value:.4g}" for key, value in info.metrics.items())
            say(f"expert_{name} {done}/{config.iterations} {info.seconds:.0f} s {shown}")


def measure_curve(folder: Path) -> pd.DataFrame:
    """Every reward and gold reward of the base and of the adapters of a training, on val prompts:
    task, percent of the iterations, reward, mean, low, high (95 %), n."""
    benchmark = load_benchmark()
    policy, models = benchmark.policy(), {"0": None}
    for percent, source in FOLDERS.items():
        models[str(percent)] = f"at{percent}"
        policy.load_adapter(f"at{percent}", folder / source)
    prompts, sampler = benchmark.first_prompts("val", 120), benchmark.sampler(16)
    table = evaluate(policy, prompts, benchmark.all_rewards(), VAL_SEED, sampler, models)
    golds = [reward + GOLD for reward in rewards_in(table) if reward + GOLD in table]
    scores = summary(table, ["task", "model"], [*rewards_in(table), *golds])
    return scores.rename(columns={"model": "percent"})


def train_experts(work: Path, only: Sequence[str] = (), out: Path = EXPERTS) -> None:
    """Train the recipes `papermill_runs/recipes/expert_*.yaml` one after the other in `work`, with
    checkpoints from which they resume, and ship each: the adapter in half precision with those
    after a quarter and a half of the iterations (`25`, `50`), its training curve, the rewards and
    gold rewards of all of them on val prompts, and a manifest."""
    for name in only:
        choose("expert", name, NAMES)
    base = BASE / "transformer" / "diffusion_pytorch_model.safetensors"
    work.mkdir(parents=True, exist_ok=True)
    for name in only or NAMES:
        folder, target, seconds = work / f"expert_{name}", out / name, work / f"{name}.seconds.json"
        with count_seconds(seconds):
            train_expert(name, folder)
        shutil.rmtree(target, ignore_errors=True)
        for percent, source in reversed(FOLDERS.items()):
            into = target if percent == 100 else target / source
            shutil.copytree(folder / source, into)
            weights = into / "adapter_model.safetensors"
            halves = {key: weight.half() for key, weight in load_file(weights).items()}
            write_whole(weights, save(halves, {"format": "pt"}))
        shutil.copy(folder / METRICS, target)
        measure_curve(folder).round(4).to_csv(target / "curve.csv", index=False)
        record = {
            "command": f"python -m flowopd_lib experts --work experts --only {name}",
            "recipe": read_yaml(recipe_file(name)),
            "seconds": round(read_seconds(seconds)),
            "base_transformer_sha256": file_hash(base),
        }
        record |= {**describe_machine(), "files": describe_files(target)}
        write_json(target / "manifest.json", record)
        say(f"{name}: finished, {read_seconds(seconds):.0f} s")
