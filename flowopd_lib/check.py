"""`python -m flowopd_lib.check BENCHMARK`: what a long run would trip over, told in a minute,
before it begins.

A table of what is right and what is wrong: every prompt file, every reward on one picture, every
adapter's keys and whether it changes anything, memory, one update and one batch of an evaluation.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from .benchmarks import Benchmark, load_benchmark
from .data import Prompt
from .evaluate import evaluate
from .hub import hub_fault
from .jobs.recipes import build
from .jobs.site import Site
from .losses import Share
from .quiet import quiet
from .rewards import can_reward
from .rollout import Sampler, initial_noise, sample

GIB = 1 << 30


@dataclass(frozen=True)
class Found:
    """One line of the table: what was looked at, whether it is right, what is to be said of it,
    seconds."""

    what: str
    right: bool
    told: str
    seconds: float


class Check:
    """The checks of one benchmark, in the order in which the later ones need the earlier."""

    def __init__(self, benchmark: Benchmark, dtype: str = "auto"):
        self.benchmark, self.site, self.found = benchmark, Site(benchmark, dtype), []

    def look(self, what: str, at: Callable[[], str]) -> bool:
        """Do one check. Whatever it raises is what the table tells: the others are asked all the
        same."""
        began = time.perf_counter()
        try:
            right, told = True, at()
        except Exception as error:  # of any library's making; nothing is hidden, all of it is shown
            right, told = False, " ".join(str(error).split()) or type(error).__name__
        self.found.append(Found(what, right, told, time.perf_counter() - began))
        return right

    def run(self) -> Iterator[Found]:
        """Every line as it is known."""
        for step in (
            self._hub,
            self._prompts,
            self._memory,
            self._model,
            self._adapters,
            self._rewards,
            self._work,
        ):
            told = len(self.found)
            step()
            yield from self.found[told:]

    def _hub(self) -> None:
        """Once, and not once a file: where the hub cannot be reached, only what is on this machine
        counts."""
        if Path(self.benchmark.base).is_dir():
            return
        import huggingface_hub

        def reach() -> str:
            try:
                huggingface_hub.HfApi().model_info(self.benchmark.base, timeout=10)
            except Exception as error:
                if (told := hub_fault(self.benchmark.base, error)).startswith(
                    f"{self.benchmark.base} is not on this"
                ):
                    huggingface_hub.constants.HF_HUB_OFFLINE = True
                    return "cannot be reached: only what is on this machine is looked at"
                raise PermissionError(told) from error
            return "reached"

        self.look("the hub", reach)

    def _prompts(self) -> None:
        for task in self.benchmark.own:

            def count(task=task) -> str:
                splits = self.benchmark.splits(task)
                if not {"train", "test"} <= set(splits):
                    raise FileNotFoundError(
                        f"train and test are needed; there are {', '.join(splits) or 'none'} at "
                        f"{', '.join(map(str, self.benchmark.tasks[task].files.values()))}"
                    )
                return ", ".join(
                    f"{split} {len(self.benchmark.prompts(task, split))}" for split in splits
                )

            self.look(f"prompts of {task}", count)

    def _memory(self) -> None:
        def estimate() -> str:
            need, have = self.needed(), memory_of(self.benchmark.device)
            told = f"{need / GIB:.1f} GiB of weights; {have / GIB:.1f} GiB free on {self.benchmark.device}"
            if need > have:
                raise MemoryError(
                    f"{told}: too little; take a larger device, or a smaller benchmark"
                )
            return told

        self.look("memory", estimate)

    def needed(self) -> float:
        """Bytes of the model's weights in the run's precision."""
        folder = Path(self.benchmark.base)
        if not folder.is_dir():
            from huggingface_hub import snapshot_download

            try:
                found = snapshot_download(
                    self.benchmark.base, allow_patterns=["*/config.json", "*.json"]
                )
            except Exception as error:  # the hub's client has many kinds of its own
                raise FileNotFoundError(hub_fault(self.benchmark.base, error)) from error
            folder = Path(found)
        with quiet():
            from diffusers import SD3Transformer2DModel
        with torch.device("meta"):
            config = SD3Transformer2DModel.load_config(folder / "transformer")
            count = sum(p.numel() for p in SD3Transformer2DModel.from_config(config).parameters())
        others = sum(
            file.stat().st_size
            for part in ("text_encoder", "text_encoder_2", "text_encoder_3", "vae")
            for file in (folder / part).glob("*.safetensors")
        )
        return count * (2 if self.benchmark.device == "cuda" else 4) + others

    def _model(self) -> None:
        def load() -> str:
            policy = self.site.policy
            return f"{policy.device}, {policy.precision}, pictures of {8 * policy.latent_shape[-1]} pixels"

        self.loaded = self.look(f"model {self.benchmark.base_name}", load)

    def _prompt(self) -> Prompt:
        return self.benchmark.prompts(self.benchmark.own[0], "train")[0]

    def _adapters(self) -> None:
        for name in self.benchmark.experts if self.loaded else ():

            def load(name=name) -> str:
                self.site.adapter(name)
                policy, prompt = self.site.policy, self._prompt()
                x, text = initial_noise(policy, [0]), policy.encode([prompt.text])
                with torch.no_grad():
                    base, ours = (policy.velocity(x, 0.9, text, adapter=a) for a in (None, name))
                change = ((ours - base).norm() / base.norm()).item()
                if not change:
                    raise ValueError("it has the velocity of the base: its weights change nothing")
                ranks = sorted(set(policy.adapter(name).ranks.values()))
                return (
                    f"{len(policy.adapter(name).ranks)} places, rank {ranks}, changes {change:.1%}"
                )

            self.look(f"expert {name}", load)

    def _rewards(self) -> None:
        """One picture each: of the model where there is one, or a grey one."""
        side = (
            8 * self.site.policy.latent_shape[-1]
            if self.loaded
            else self.benchmark.resolution or 512
        )
        for name in self.benchmark.specs:

            def ask(name=name) -> str:
                reward = self.benchmark.rewards_named([name])[name]
                prompts = (
                    p for t in self.benchmark.own for p in self.benchmark.prompts(t, "train")[:1]
                )
                prompt = next(p for p in prompts if can_reward(reward, p))
                image = torch.full((1, 3, side, side), 0.5)
                if self.loaded:
                    image = sample(self.site.policy, [prompt], [0], Sampler(2))
                score = float(reward(image, [prompt])[0])
                low, high = reward.range
                if not low <= score <= high:
                    raise ValueError(f"it gave {score}, outside its range {low} to {high}")
                kind = " (held_out)" if self.benchmark.reward_is(name, "held_out") else ""
                detector = getattr(getattr(reward, "detector", None), "name", "")
                return f"{score:.3f} in [{low:g}, {high:g}]{kind}{f', by {detector}' if detector else ''}"

            self.look(f"reward {name}", ask)

    def _work(self) -> None:
        if not self.loaded or not all(f.right for f in self.found):
            self.found.append(
                Found("one update, one evaluation", False, "not tried: see above", 0.0)
            )
            return
        teachers = {t: e for t, e in self.benchmark.teachers.items() if t in self.benchmark.own}

        def update() -> str:
            recipe = {
                "schedule": {"tasks": list(teachers), "prompts_per_batch": len(teachers)},
                "opd": {
                    "steps": 1,
                    "mar": 0.04 if self.benchmark.anchor else 0.0,
                    "anchor": self.benchmark.anchor,
                },
                "train": {"iterations": 1},
            }
            policy, objective, _ = build(recipe, site=self.site)
            parameters = policy.train_adapter("student")
            data = objective.collect(policy, "student", 0, Share())
            loss = sum(
                part.item() for part in _stepped(objective.losses(policy, "student", data, 0))
            )
            gradient = (
                torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm().item()
            )
            policy.train_adapter(None)
            if not gradient > 0:
                raise ValueError(f"loss {loss}, gradient {gradient}: it would learn nothing")
            return f"loss {loss:.4g}, gradient {gradient:.4g}{peak_of(self.benchmark.device)}"

        def scored() -> str:
            prompts = self.benchmark.first_prompts("test", 1)
            sampler, models = self.benchmark.sampler(2), {"base": None}
            table = evaluate(
                self.site.policy,
                prompts,
                self.benchmark.rewards(),
                0,
                sampler,
                models,
                progress=False,
            )
            return f"{len(table)} pictures scored"

        if teachers:
            self.look("one update of a distillation", update)
        self.look("one batch of an evaluation", scored)


def _stepped(losses: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
    for loss in losses:
        loss.backward()
        yield loss.detach()


def memory_of(device: str) -> float:
    """Bytes that are free."""
    return torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available


def peak_of(device: str) -> str:
    return f", peak {torch.cuda.max_memory_allocated() / GIB:.1f} GiB" if device == "cuda" else ""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m flowopd_lib.check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("benchmark", help="a shipped benchmark's name, or a YAML file")
    parser.add_argument("--precision", default="auto", choices=("auto", "float32", "bfloat16"))
    args = parser.parse_args()
    torch.set_num_threads(os.cpu_count())
    try:
        check = Check(load_benchmark(args.benchmark), args.precision)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    for line in check.run():
        print(
            f"{'ok   ' if line.right else 'WRONG'} {line.what}: {line.told} ({line.seconds:.1f} s)",
            flush=True,
        )
    wrong = [line.what for line in check.found if not line.right]
    print(f"{len(check.found) - len(wrong)} right, {len(wrong)} wrong")
    sys.exit(f"error: {', '.join(wrong)}" if wrong else 0)


if __name__ == "__main__":
    main()
