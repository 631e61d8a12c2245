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
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .checkpoint import load_state, save_state
from .files import append_lines, locked, write_whole
from .identity import describe, differences
from .inputs import (
    BelowOne,
    Count,
    NotNegative,
    Positive,
    Whole,
    check_fields,
    check_tracker,
    within,
)
from .objectives import Objective, Share
from .policy import FlowPolicy

if TYPE_CHECKING:
    from accelerate import Accelerator

# What a resumed training may have otherwise than the one that began it. All else must be the same: objective,
# prompts and their order, sampler, rewards, the weights of teachers, base and start, the adapter's shape and
# scale, precision, optimizer. (Beside these, objectives leave out `micro_batch_size`, the images in a forward, and
# rewards the device and the images they look at together; the number of processes is no setting at all.)
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

    iterations: Count
    lr: Positive = 3e-4
    warmup: Whole = 0  # updates
    cooldown: within(0.0, 1.0) = 0.0
    ema: BelowOne = 0.95  # of the adapter, per update; 0 keeps none
    clip_norm: Positive = 1.0
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.99)
    weight_decay: NotNegative = 0.0
    save_every: Count = 20
    save_seconds: Positive = 120.0
    max_seconds: Positive = math.inf
    log_with: str | None = None

    def __post_init__(self):
        check_fields(self)
        if self.cooldown and self.max_seconds < math.inf:
            raise ValueError(
                "cooldown is a share of the iterations and needs to know how many there are: not "
                f"{self.cooldown} with max_seconds {self.max_seconds}"
            )
        check_tracker(self.log_with)


@dataclass(frozen=True)
class StepInfo:
    """One update. `metrics` are the objective's, with the last update of an iteration; empty before.
    `average`: of the adapter's weights, in the order of `FlowPolicy.adapter_parameters`."""

    iteration: int
    update: int
    loss: float
    grad_norm: float
    # of training up to here, those before a resume included, those the caller takes left out
    seconds: float
    metrics: dict[str, float]
    average: list[torch.Tensor] = field(repr=False)


class _Run:
    """What a checkpoint holds: the adapter, its average, the optimizer, and the count of iterations done."""

    def __init__(
        self,
        policy: FlowPolicy,
        adapter: str,
        objective: Objective,
        config: TrainConfig,
        folder: Path,
    ):
        self.config, self.folder, self.state = config, folder, folder / "state.safetensors"
        self.parameters = policy.train_adapter(adapter)
        self.average = [p.detach().clone() for p in self.parameters]
        self.optimizer = torch.optim.AdamW(
            self.parameters, config.lr, betas=config.betas, weight_decay=config.weight_decay
        )
        self.iteration = self.updates = 0
        self.seconds = 0.0
        may_change = set(MAY_CHANGE) - ({"iterations"} if config.cooldown else set())
        self.follows_from = {
            "objective": describe(objective),
            "train": {k: v for k, v in describe(config).items() if k not in may_change},
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
                [*self.parameters, *self.average],
                [*state["parameters"], *state["average"]],
                strict=True,
            ):
                mine.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        self.iteration, self.updates, self.seconds = (
            state["iteration"],
            state["updates"],
            state["seconds"],
        )

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
        warmed = min(1.0, (self.updates + 1) / max(self.config.warmup, 1))
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * warmed * self._cooled
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.updates += 1
        decay = min(self.config.ema, self.updates / (self.updates + 9))
        with torch.no_grad():
            torch._foreach_lerp_(
                self.average,
                [p.data for p in self.parameters],
                1 - decay if self.config.ema else 1.0,
            )
        return norm


def mean_of_processes(metrics: dict[str, float]) -> dict[str, float]:
    """Each mean over the processes that have it: one without prompts of a task has none."""
    from accelerate.utils import gather_object

    every = gather_object([metrics])
    return {
        name: sum(told) / len(told)
        for name in sorted({name for m in every for name in m})
        for told in [
            [m[name] for m in every if name in m and not math.isnan(m[name])] or [math.nan]
        ]
    }


def share_of(accelerator: Accelerator) -> Share:
    """This process's share; processes may have unequal parts to gather."""

    def gather(values: torch.Tensor) -> torch.Tensor:
        sizes = accelerator.gather(torch.tensor([len(values)], device=accelerator.device)).tolist()
        padded = values.new_zeros(max(sizes), *values.shape[1:])
        padded[: len(values)] = values
        every = accelerator.gather(padded.to(accelerator.device)).unflatten(0, (len(sizes), -1))
        return torch.cat([part[:size] for part, size in zip(every, sizes)]).to(values.device)

    return Share(
        accelerator.process_index, accelerator.num_processes, gather, accelerator.wait_for_everyone
    )


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
    share = share_of(accelerator)
    saved = time.time()
    began = saved - run.seconds
    while run.iteration < config.iterations and run.seconds < config.max_seconds:
        try:
            data = objective.collect(policy, adapter, run.iteration, share)
        except (
            Exception
        ):  # a reward has gone, say: what was trained before is whole, in every process
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
                where = (
                    f"The last good state is in {run.state}"
                    if run.state.exists()
                    else "No checkpoint had been written yet"
                )
                raise TrainingDiverged(
                    f"iteration {run.iteration}: loss {loss}, gradient norm {norm}; lower lr (now "
                    f"{config.lr}) or raise the KL or anchor weight. {where}"
                )
            last = update == objective.updates - 1
            metrics = objective.metrics(data) if last else {}
            if last and accelerator.num_processes > 1:
                metrics = mean_of_processes(metrics)
            metrics = {name: value for name, value in metrics.items() if not math.isnan(value)}
            run.seconds = time.time() - began
            info = StepInfo(run.iteration, update, loss, norm, run.seconds, metrics, run.average)
            if last:
                run.iteration += 1
                told = {"loss": loss, "grad_norm": norm}
                if accelerator.log_with:
                    accelerator.log({**told, **metrics}, step=info.iteration)
                if accelerator.is_main_process:
                    seconds = round(info.seconds, 2)
                    line = {"iteration": info.iteration, **told, "seconds": seconds, **metrics}
                    append_lines(log, json.dumps(line) + "\n")
                    over = run.iteration == config.iterations or run.seconds >= config.max_seconds
                    due = (
                        run.iteration % config.save_every == 0
                        or time.time() - saved > config.save_seconds
                    )
                    if over or due:
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
