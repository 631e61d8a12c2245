"""One training loop for every objective: a generator that yields after each update.

Everything random follows from the seed and the iteration, so a checkpoint is weights, optimizer and
a count, and a resumed run continues to the bit. `accelerate launch` runs the same loop in several
processes: each takes its shard of an iteration, and the gradients of the adapter, which is all that
trains, are added up.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import torch

from .checkpoint import load_state, save_state
from .config import Count, Decay, Fraction, Index, NonNegative, Positive, settings
from .files import append_lines, locked, read_lines, write_whole
from .fingerprint import describe, differences
from .losses import Objective, Shard
from .policy import FlowPolicy
from .progress import progress

if TYPE_CHECKING:
    from accelerate import Accelerator

STATE, METRICS, VALIDATION = "state.safetensors", "metrics.jsonl", "validation_samples.jsonl"
# What a resumed training may have otherwise than the one that began it. Everything else must be the
# same: objective, prompts and their order, sampler, rewards, the weights of teachers, base and
# start, the adapter's shape and scale, precision, optimizer. (Not compared either: images in a
# forward, devices, processes.)
MAY_CHANGE = ("iterations", "save_every", "save_seconds", "log_with")


class TrainingDiverged(RuntimeError):
    """The loss or the gradient is no longer a finite number."""


@settings
class TrainConfig:
    """`iterations` of the objective (each makes its own number of updates). A checkpoint is written
    every `save_every` iterations and after `save_seconds`, whichever comes first, and at the end.
    `log_with`: one of accelerate's trackers, such as tensorboard or wandb. `cooldown`: the fraction
    of the iterations, at the end, over which `lr` falls to zero."""

    iterations: Count
    lr: Positive = 3e-4
    warmup: Index = 0  # updates
    cooldown: Fraction = 0.0
    ema: Decay = 0.95  # of the adapter, per update; 0 keeps none
    clip_norm: Positive = 1.0
    betas: tuple[Decay, Decay] = (0.9, 0.99)
    weight_decay: NonNegative = 0.0
    save_every: Count = 20
    save_seconds: Positive = 120.0
    log_with: str | None = None

    def __post_init__(self):
        if self.log_with is None:
            return
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

        known, installed = map(str, LOGGER_TYPE_TO_CLASS), map(str, get_available_trackers())
        if self.log_with not in (names := list(known)):
            raise ValueError(
                f"accelerate has no tracker {self.log_with!r}; it has {', '.join(names)}"
            )
        if self.log_with not in installed:  # accelerate would silently leave it out
            raise ValueError(
                f"the tracker {self.log_with} is not installed; pip install {self.log_with}"
            )


@dataclass(frozen=True)
class StepInfo:
    """One update. `metrics` come with the last update of an iteration; empty before. `average`: of
    the adapter's weights, in the order of `FlowPolicy.adapter_parameters`."""

    iteration: int
    update: int
    loss: float
    grad_norm: float
    seconds: (
        float  # of training so far, those before a resume included, the caller's pauses left out
    )
    metrics: dict[str, float]
    average: list[torch.Tensor] = field(repr=False)


class _Run:
    """What a checkpoint holds: the adapter, its average, the optimizer, and the count of iterations
    done."""

    def __init__(
        self,
        policy: FlowPolicy,
        adapter: str,
        objective: Objective,
        config: TrainConfig,
        folder: Path,
    ):
        self.config, self.folder, self.state = config, folder, folder / STATE
        self.parameters = policy.train_adapter(adapter)
        self.average = [p.detach().clone() for p in self.parameters]
        self.optimizer = torch.optim.AdamW(
            self.parameters, config.lr, betas=config.betas, weight_decay=config.weight_decay
        )
        self.iteration = self.updates = 0
        self.seconds = 0.0
        self.fingerprint = fingerprint(policy, objective, folder, config, adapter)

    def resume(self) -> None:
        state = load_state(self.state)
        own, saved = [*self.parameters, *self.average], [*state["parameters"], *state["average"]]
        with torch.no_grad():
            for p, value in zip(own, saved, strict=True):
                p.copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        self.iteration, self.updates, self.seconds = (
            state[k] for k in ("iteration", "updates", "seconds")
        )

    def save(self) -> None:
        counts = {k: getattr(self, k) for k in ("iteration", "updates", "seconds", "fingerprint")}
        tensors = {"parameters": [p.data for p in self.parameters], "average": self.average}
        save_state(self.state, {**tensors, **counts, "optimizer": self.optimizer.state_dict()})

    def learning_rate(self) -> float:
        """Warmed up by updates; in the cooldown it falls by iterations, and is never 0."""
        config, total = self.config, self.config.iterations
        warm = min(1.0, (self.updates + 1) / max(config.warmup, 1))
        cool = (total - self.iteration) / (config.cooldown * total + 1) if config.cooldown else 1.0
        return config.lr * warm * min(1.0, cool)

    def step(self, accelerator: Accelerator) -> float:
        """Add up the processes' gradients, clip, update, average; the gradient's norm before
        clipping."""
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.parameters]
        if accelerator.num_processes > 1:
            flat = accelerator.reduce(torch.cat([g.flatten() for g in gradients]), "sum")
            for p, part in zip(self.parameters, flat.split([p.numel() for p in self.parameters])):
                p.grad = part.view_as(p)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.clip_norm).item()
        if not math.isfinite(norm):
            return norm
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.updates += 1
        decay = min(self.config.ema, self.updates / (self.updates + 9)) if self.config.ema else 0.0
        with torch.no_grad():
            torch._foreach_lerp_(self.average, [p.data for p in self.parameters], 1 - decay)
        return norm


def fingerprint(
    policy: FlowPolicy, objective: Objective, folder: Path, config: TrainConfig, adapter: str
) -> dict:
    """What a training follows from, compared before it is resumed."""
    may_change = set(MAY_CHANGE) - ({"iterations"} if config.cooldown else set())
    return {
        "objective": describe(objective),
        "train": {k: v for k, v in describe(config).items() if k not in may_change},
        "base": policy.base_hash,
        "precision": policy.precision,
        "start": policy.start_hash(adapter, folder),
        "adapters": {name: policy.adapter(name).sha256 for name in sorted(objective.adapters)},
        "ranks": describe(policy.adapter(adapter).ranks),
        "scales": describe(policy.adapter(adapter).alpha),
    }


def check_folder(
    policy: FlowPolicy,
    objective: Objective,
    folder: str | Path,
    config: TrainConfig,
    adapter: str = "student",
) -> None:
    """Raises ValueError for a folder that holds a training of something else, or of more
    iterations."""
    folder = Path(folder)
    here = fingerprint(policy, objective, folder, config, adapter)
    if not (folder / STATE).exists():
        return
    state = load_state(folder / STATE)
    changed = list(differences(state.get("fingerprint", {}), here))
    if changed:
        more = f" (and {len(changed) - 6} more)" if len(changed) > 6 else ""
        raise ValueError(
            f"{folder} holds another training: {'; '.join(changed[:6])}{more}. Give a new folder, "
            "or the settings it was begun with"
        )
    if state["iteration"] > config.iterations:
        raise ValueError(
            f"{folder} holds {state['iteration']} iterations already, more than "
            f"{config.iterations}; give a new folder"
        )


class _Metrics:
    """Means over the rows and micro-batches of an iteration, and over processes."""

    def __init__(self):
        self.values = defaultdict(list)

    def add(self, metrics: dict[str, torch.Tensor]) -> None:
        for name, value in metrics.items():
            self.values[name].append(value.detach().reshape(-1))

    def means(self, accelerator: Accelerator) -> dict[str, float]:
        sums = {
            n: (float(v.sum()), len(v))
            for n, v in ((n, torch.cat(v)) for n, v in self.values.items())
        }
        if accelerator.num_processes > 1:
            from accelerate.utils import gather_object

            everyone = gather_object([sums])
            names = sorted({name for part in everyone for name in part})
            sums = {n: tuple(map(sum, zip(*(p[n] for p in everyone if n in p)))) for n in names}
        return {name: total / n for name, (total, n) in sums.items() if n and math.isfinite(total)}


def shard_of(accelerator: Accelerator) -> Shard:
    """This process's shard; processes may have unequal parts to gather."""

    def gather(values: torch.Tensor) -> torch.Tensor:
        sizes = accelerator.gather(torch.tensor([len(values)], device=accelerator.device)).tolist()
        padded = values.new_zeros(max(sizes), *values.shape[1:])
        padded[: len(values)] = values
        every = accelerator.gather(padded.to(accelerator.device)).unflatten(0, (len(sizes), -1))
        return torch.cat([part[:size] for part, size in zip(every, sizes)]).to(values.device)

    return Shard(
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

    `folder` gets `state.safetensors` (resumed from, if it is there), `metrics.jsonl` (a line an
    iteration) and, at the end, `adapter/`: the averaged weights in PEFT's format, which the policy
    then holds too. Closed after an iteration (`close()` of the generator), it writes
    `state.safetensors` and no more.

    Raises TrainingDiverged, with the last good state left in `folder`, and ValueError for a folder
    of another training.
    """
    if accelerator is None:
        from accelerate import Accelerator

        accelerator = Accelerator(
            cpu=policy.device.type == "cpu", log_with=config.log_with, project_dir=folder
        )
    folder = Path(folder)
    objective.check(policy, adapter)
    main = accelerator.is_main_process
    with locked(folder, f"a training of {adapter}") if main else contextlib.nullcontext():
        check_folder(policy, objective, folder, config, adapter)
        if accelerator.log_with:
            accelerator.init_trackers(
                "flow-opd", init_kwargs={"wandb": {"dir": str(folder), "name": folder.name}}
            )
        try:
            yield from _updates(policy, objective, folder, config, adapter, accelerator)
        finally:
            policy.train_adapter(None)
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
    run, log, main = (
        _Run(policy, adapter, objective, config, folder),
        folder / METRICS,
        accelerator.is_main_process,
    )
    if run.state.exists():
        run.resume()
    if main:
        lines = log.read_text().splitlines()[: run.iteration] if log.exists() else []
        write_whole(log, "".join(line + "\n" for line in lines))
    shard, saved = shard_of(accelerator), time.time()
    start = saved - run.seconds
    while run.iteration < config.iterations:
        try:
            data, collected = objective.collect(policy, adapter, run.iteration, shard)
        except (
            Exception
        ):  # a reward server is gone, say: what was trained before is whole, in every process
            if run.iteration:
                run.save()
            raise
        metrics = _Metrics()
        metrics.add({name: torch.tensor(value) for name, value in collected.items()})
        for update in range(objective.updates):
            total = torch.zeros((), device=policy.device)
            for loss, terms in objective.losses(policy, adapter, data, update):
                loss.backward()
                total += loss.detach()
                metrics.add(terms)
            loss = accelerator.reduce(total, "sum").item()
            norm = run.step(accelerator)
            if not math.isfinite(loss) or not math.isfinite(norm):
                good = (
                    f"The last good state is in {run.state}"
                    if run.state.exists()
                    else "No checkpoint had been written yet"
                )
                raise TrainingDiverged(
                    f"iteration {run.iteration}: loss {loss}, gradient norm {norm}; lower lr (now "
                    f"{config.lr}) or raise the KL or anchor weight. {good}"
                )
            run.seconds, last = time.time() - start, update == objective.updates - 1
            means = metrics.means(accelerator) if last else {}
            info = StepInfo(run.iteration, update, loss, norm, run.seconds, means, run.average)
            if last:
                run.iteration += 1
                line = {"loss": loss, "grad_norm": norm, **means}
                if accelerator.log_with:
                    accelerator.log(line, step=info.iteration)
                if main:
                    line = {"iteration": info.iteration, "seconds": round(info.seconds, 2), **line}
                    append_lines(log, json.dumps(line) + "\n")
                    due = (
                        run.iteration % config.save_every == 0
                        or time.time() - saved > config.save_seconds
                    )
                    if due or run.iteration == config.iterations:
                        run.save()
                        saved = time.time()
            paused = time.time()
            try:
                yield info
            except GeneratorExit:  # between two iterations is a place to continue from
                if last and main:
                    run.save()
                raise
            start += time.time() - paused
    if config.ema:
        with torch.no_grad():
            for p, average in zip(run.parameters, run.average):
                p.copy_(average)
    if main:
        policy.save_adapter(adapter, folder / "adapter")
    accelerator.wait_for_everyone()


def fit(
    policy: FlowPolicy,
    objective: Objective,
    folder: str | Path,
    config: TrainConfig,
    adapter: str = "student",
    validate: Callable[[str, int], pd.DataFrame] | None = None,
    every: int = 0,
    on_step: Callable[[StepInfo], bool | None] | None = None,
    show_progress: bool = True,
    accelerator: Accelerator | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """`train` to the end: its metrics, a row an iteration, and the validation samples, a row an
    image.

    `validate(adapter, iteration)` is called in all processes before the first iteration, after
    every `every` and after the last, with the averaged weights in the adapter; its rows get
    `iteration` (how many were done) and `seconds` of training, and are kept in
    `folder/validation_samples.jsonl`, so a resumed training has them all. `on_step` is called after
    every iteration and ends the training there, with a checkpoint, by returning True.
    """
    folder = Path(folder)
    check_folder(policy, objective, folder, config, adapter)
    log, main = folder / VALIDATION, accelerator is None or accelerator.is_main_process
    done = set(read_lines(log).get("iteration", []))

    def probe(iteration: int, seconds: float, average: Sequence[torch.Tensor] = ()) -> None:
        if validate is None or iteration in done:
            return
        with policy.adapter_weights(adapter, average):
            rows = validate(adapter, iteration).assign(iteration=iteration, seconds=seconds)
        if main:  # one write, so that a kill leaves all of a probe's rows or none
            append_lines(log, rows.to_json(orient="records", lines=True))

    probe(0, 0.0)
    finished = True
    with (
        progress(config.iterations, f"train {adapter}", show_progress and main) as advance,
        contextlib.closing(
            train(policy, objective, folder, config, adapter, accelerator)
        ) as updates,
    ):
        before = 0
        for info in updates:
            iteration = info.iteration + 1
            if info.update < objective.updates - 1:
                continue
            advance(iteration - before)
            before = iteration
            if every and iteration % every == 0 and iteration < config.iterations:
                probe(iteration, info.seconds, info.average)
            if on_step is not None and on_step(info):
                finished = False
                break
    metrics = read_lines(folder / METRICS)
    if finished:
        probe(len(metrics), metrics["seconds"].iloc[-1])
    if accelerator is not None:
        accelerator.wait_for_everyone()
    return metrics, read_lines(log)
