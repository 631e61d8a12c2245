"""One training loop for every objective: a generator that yields after each update.

Everything random follows from the seed and the iteration, so a checkpoint is weights, optimizer and a count,
and a resumed run continues to the bit. `accelerate launch` runs the same loop in several processes: each
takes its share of an iteration, and the gradients of the adapter, which is all that trains, are added up.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import torch

from .checkpoint import load_state, save_state
from .files import append_lines, locked, read_lines, write_whole
from .identity import describe, differences
from .objectives import Objective, Share
from .policy import FlowPolicy
from .progress import progress

if TYPE_CHECKING:
    from accelerate import Accelerator

# What a resumed training may have otherwise than the one that began it. All else must be the same: objective,
# prompts and their order, sampler, judges, the weights of teachers, base and start, the adapter's shape and
# scale, precision, optimizer. (Beside these, objectives leave out `micro`, the images in a forward, and
# judges the device and the images they look at together; the number of processes is no setting at all.)
MAY_CHANGE = ("iterations", "save_every", "save_seconds", "max_seconds", "log_with")


class TrainingDiverged(RuntimeError):
    """The loss or the gradient is no longer a finite number."""


@dataclass(frozen=True)
class TrainConfig:
    """`iterations` of the objective (each makes its own number of updates), fewer if `max_seconds` of
    training are over before. A checkpoint is written every `save_every` iterations and after `save_seconds`,
    whichever comes first, and at the end. `log_with`: one of accelerate's trackers, such as tensorboard or
    wandb, that is told of every iteration too. `cooldown`: the share of the iterations, at the end, over
    which `lr` falls to zero."""

    iterations: int
    lr: float = 3e-4
    warmup: int = 0  # updates
    cooldown: float = 0.0
    ema: float = 0.95  # of the adapter, per update; 0 keeps none
    clip_norm: float = 1.0
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    save_every: int = 20
    save_seconds: float = 120.0
    max_seconds: float = math.inf
    log_with: str | None = None

    def __post_init__(self):
        if self.iterations < 1 or self.save_every < 1:
            raise ValueError("a training needs at least one iteration, and one between checkpoints")
        if not self.max_seconds > 0:
            raise ValueError(f"max_seconds must be positive, not {self.max_seconds}")
        if not self.lr > 0 or not self.clip_norm > 0 or not 0 <= self.ema < 1:
            raise ValueError(
                f"lr {self.lr} and clip_norm {self.clip_norm} must be positive and ema {self.ema} in [0, 1)"
            )
        if (
            self.warmup < 0
            or self.weight_decay < 0
            or not self.save_seconds > 0
            or not all(0 <= b < 1 for b in self.betas)
        ):
            raise ValueError(
                f"warmup {self.warmup} and weight_decay {self.weight_decay} must be at least 0, "
                f"save_seconds {self.save_seconds} positive "
                f"and betas {self.betas} in [0, 1)"
            )
        if not 0 <= self.cooldown <= 1 or (self.cooldown and self.max_seconds < math.inf):
            raise ValueError(
                "cooldown is a share of the iterations, from 0 to 1, and needs to know how many there are: "
                f"not {self.cooldown} with max_seconds "
                f"{self.max_seconds}"
            )
        # accelerate leaves out a tracker it does not find, and says nothing
        if self.log_with is not None:
            from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

            if self.log_with not in map(str, LOGGER_TYPE_TO_CLASS):
                raise ValueError(
                    f"log_with names no tracker of accelerate's: {self.log_with!r}; there are "
                    f"{', '.join(map(str, LOGGER_TYPE_TO_CLASS))}"
                )
            if self.log_with not in map(str, get_available_trackers()):
                raise ValueError(
                    f"the tracker {self.log_with} is not installed; pip install {self.log_with}, or leave "
                    "log_with out"
                )


@dataclass(frozen=True)
class StepInfo:
    """One update. `metrics` are the objective's, with the last update of an iteration; empty before."""

    iteration: int
    update: int
    loss: float
    grad_norm: float
    # of training up to here, those before a resume included, those the caller takes left out
    seconds: float
    metrics: dict[str, float]


class _Run:
    """What a checkpoint holds: the adapter, its average, the optimizer, and the count of iterations done."""

    def __init__(
        self, policy: FlowPolicy, adapter: str, objective: Objective, config: TrainConfig, folder: Path
    ):
        self.config, self.folder, self.state = config, folder, folder / "state.safetensors"
        self.parameters = policy.train_adapter(adapter)
        self.average = [p.detach().clone() for p in self.parameters]
        self.optimizer = torch.optim.AdamW(
            self.parameters, config.lr, betas=config.betas, weight_decay=config.weight_decay
        )
        self.iteration = self.updates = 0
        self.seconds = 0.0
        self.follows_from = {
            "objective": describe(objective),
            "train": {
                k: v
                for k, v in describe(config).items()
                if k not in MAY_CHANGE or (k == "iterations" and config.cooldown)
            },
            "base": policy.base_hash,
            "precision": str(policy.dtype),
            "start": policy.start_hash(adapter, folder),
            "adapters": {name: policy.adapter(name).sha256 for name in sorted(objective.adapters)},
            "ranks": describe(policy.adapter(adapter).ranks),
            "scales": describe(policy.adapter(adapter).alpha),
        }

    def resume(self) -> None:
        state = load_state(self.state)
        changed = list(differences(state.get("follows_from", {}), self.follows_from))
        if changed:
            more = f" (and {len(changed) - 6} more)" if len(changed) > 6 else ""
            raise ValueError(
                f"{self.folder} holds a training of something else: {'; '.join(changed[:6])}{more}. "
                "Give a new folder, or what it was begun with"
            )
        with torch.no_grad():
            for mine, saved in zip(
                [*self.parameters, *self.average], [*state["parameters"], *state["average"]], strict=True
            ):
                mine.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        self.iteration, self.updates, self.seconds = state["iteration"], state["updates"], state["seconds"]

    def save(self) -> None:
        save_state(
            self.state,
            {
                "parameters": [p.data for p in self.parameters],
                "average": self.average,
                "iteration": self.iteration,
                "seconds": self.seconds,
                "updates": self.updates,
                "optimizer": self.optimizer.state_dict(),
                "follows_from": self.follows_from,
            },
        )

    @property
    def _cooled(self) -> float:
        """What is left of the rate in the iteration under way: 1 before the cooldown, and never 0 in it."""
        total, cooldown = self.config.iterations, self.config.cooldown
        return min(1.0, (total - self.iteration) / (cooldown * total + 1)) if cooldown else 1.0

    def step(self, accelerator: Accelerator) -> float:
        """Add up the processes' gradients, clip, update, average; the gradient's norm before clipping."""
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.parameters]
        if accelerator.num_processes > 1:
            flat = accelerator.reduce(torch.cat([g.flatten() for g in gradients]), "sum")
            for p, part in zip(self.parameters, flat.split([p.numel() for p in self.parameters])):
                p.grad = part.view_as(p)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.clip_norm).item()
        if not math.isfinite(norm):
            return norm
        for group in self.optimizer.param_groups:
            group["lr"] = (
                self.config.lr * min(1.0, (self.updates + 1) / max(self.config.warmup, 1)) * self._cooled
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.updates += 1
        decay = min(self.config.ema, self.updates / (self.updates + 9))
        with torch.no_grad():
            torch._foreach_lerp_(
                self.average, [p.data for p in self.parameters], 1 - decay if self.config.ema else 1.0
            )
        return norm


def train(
    policy: FlowPolicy,
    objective: Objective,
    folder: str | Path,
    config: TrainConfig,
    adapter: str = "student",
    accelerator: Accelerator | None = None,
) -> Iterator[StepInfo]:
    """Train one adapter of `policy`; yield a `StepInfo` after each update.

    `folder` gets `state.safetensors` (resumed from, if it is there), `metrics.jsonl` (a line an iteration)
    and, at the end,
    `adapter/`: the averaged weights in PEFT's format, which the policy then holds too. Closed after an
    iteration (`close()` of the generator), it writes `state.safetensors` and no more.

    Raises TrainingDiverged, with the last good state left in `folder`, and ValueError for a folder of another
    training.
    """
    if accelerator is None:
        from accelerate import Accelerator

        accelerator = Accelerator(
            cpu=policy.device.type == "cpu", log_with=config.log_with, project_dir=folder
        )
    if accelerator.num_processes > 1 and config.max_seconds < math.inf:
        raise ValueError(
            "max_seconds is for one process: several would stop at different iterations, and wait for each "
            "other; give iterations"
        )
    folder = Path(folder)
    objective.check(policy, adapter)
    with (
        locked(folder, f"a training of {adapter}")
        if accelerator.is_main_process
        else contextlib.nullcontext()
    ):
        if accelerator.log_with:
            accelerator.init_trackers(
                "flow-opd", init_kwargs={"wandb": {"dir": str(folder), "name": folder.name}}
            )
        try:
            yield from _updates(policy, objective, folder, config, adapter, accelerator)
        finally:
            for tracker in accelerator.trackers:
                tracker.finish()


def _updates(
    policy: FlowPolicy,
    objective: Objective,
    folder: Path,
    config: TrainConfig,
    adapter: str,
    accelerator: Accelerator,
) -> Iterator[StepInfo]:
    run = _Run(policy, adapter, objective, config, folder)
    log = folder / "metrics.jsonl"
    if run.state.exists():
        run.resume()
    if accelerator.is_main_process:
        kept = log.read_text().splitlines()[: run.iteration] if log.exists() else []
        write_whole(log, "".join(line + "\n" for line in kept))
    share = Share(accelerator.process_index, accelerator.num_processes, accelerator.gather)
    saved = time.time()
    began = saved - run.seconds
    while run.iteration < config.iterations and run.seconds < config.max_seconds:
        try:
            data = objective.collect(policy, adapter, run.iteration, share)
        except Exception:  # a judge has gone, say: what was trained before is whole, in every process
            if run.iteration:
                run.save()
            raise
        for update in range(objective.updates):
            total = torch.zeros((), device=policy.device)
            for loss in objective.losses(policy, adapter, data, update):
                loss.backward()
                total += loss.detach()
            loss = accelerator.reduce(total, "sum").item()
            norm = run.step(accelerator)
            if not math.isfinite(loss) or not math.isfinite(norm):
                raise TrainingDiverged(
                    f"iteration {run.iteration}: loss {loss}, gradient norm {norm}; lower lr (now "
                    f"{config.lr}) or raise the KL or anchor weight. "
                    + (
                        f"The last good state is in {run.state}"
                        if run.state.exists()
                        else "No checkpoint had been written yet"
                    )
                )
            last = update == objective.updates - 1
            metrics = objective.metrics(data) if last else {}
            if last and accelerator.num_processes > 1:
                names = sorted(metrics)
                every = accelerator.gather(torch.tensor([[metrics[n] for n in names]], device=policy.device))
                metrics = dict(zip(names, every.nanmean(0).tolist()))
            metrics = {name: value for name, value in metrics.items() if not math.isnan(value)}
            run.seconds = time.time() - began
            info = StepInfo(run.iteration, update, loss, norm, run.seconds, metrics)
            if last:
                run.iteration += 1
                if accelerator.log_with:
                    accelerator.log({"loss": loss, "grad_norm": norm, **metrics}, step=info.iteration)
                if accelerator.is_main_process:
                    append_lines(
                        log,
                        json.dumps(
                            {
                                "iteration": info.iteration,
                                "loss": loss,
                                "grad_norm": norm,
                                "seconds": round(info.seconds, 2),
                                **metrics,
                            }
                        )
                        + "\n",
                    )
                    over = run.iteration == config.iterations or run.seconds >= config.max_seconds
                    if (
                        run.iteration % config.save_every == 0
                        or time.time() - saved > config.save_seconds
                        or over
                    ):
                        run.save()
                        saved = time.time()
            paused = time.time()
            try:
                yield info
            # the caller stops here: between two iterations that is a place to go on from
            except GeneratorExit:
                if last and accelerator.is_main_process:
                    run.save()
                policy.train_adapter(None)
                raise
            began += time.time() - paused
    if config.ema:
        with torch.no_grad():
            for p, average in zip(run.parameters, run.average):
                p.copy_(average)
    policy.train_adapter(None)
    if accelerator.is_main_process:
        policy.save_adapter(adapter, folder / "adapter")
    accelerator.wait_for_everyone()


def fit(
    policy: FlowPolicy,
    objective: Objective,
    folder: str | Path,
    config: TrainConfig,
    adapter: str = "student",
    probe: Callable[[str], pd.DataFrame] | None = None,
    every: int = 0,
    shown: bool = True,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """`train` to the end, in one process: its metrics, a row an iteration, and what `probe(adapter)` told on
    the way.

    The probe is asked before the first iteration, after every `every` and after the last (then about the
    averaged weights); its rows get
    `iteration` (how many were done) and `seconds` of training. They are kept in `folder/probes.jsonl`, so a
    resumed training has them all.
    """
    folder = Path(folder)
    log = folder / "probes.jsonl"
    asked = set(read_lines(log).get("iteration", []))

    def ask(iteration: int, seconds: float) -> None:
        if probe is not None and iteration not in asked:
            rows = probe(adapter).assign(iteration=iteration, seconds=seconds)
            # one write, so that a kill leaves all of a probe's rows or none
            append_lines(log, rows.to_json(orient="records", lines=True))

    ask(0, 0.0)
    by_time = config.max_seconds < math.inf
    with progress(config.max_seconds if by_time else config.iterations, f"train {adapter}", shown) as advance:
        before = 0.0
        for info in train(policy, objective, folder, config, adapter):
            done = info.iteration + 1
            if not info.metrics:
                continue
            now = min(info.seconds, config.max_seconds) if by_time else done
            advance(now - before)
            before = now
            if every and done % every == 0 and done < config.iterations and info.seconds < config.max_seconds:
                ask(done, info.seconds)
    curve = read_lines(folder / "metrics.jsonl")
    ask(len(curve), curve["seconds"].iloc[-1])
    return curve, read_lines(log)
