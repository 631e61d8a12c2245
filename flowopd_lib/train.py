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
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import torch

from .config import Count, Decay, Fraction, Index, Positive, choose, settings
from .files import append_lines, load_state, locked, progress, read_lines, save_state, write_whole
from .fingerprint import code_hashes, describe, differences
from .losses import Objective, Shard
from .policy import FlowPolicy

if TYPE_CHECKING:
    from accelerate import Accelerator

STATE, METRICS, VALIDATION = "state.safetensors", "metrics.jsonl", "validation_samples.jsonl"
# What a resumed training may have otherwise than the one that began it. Everything else must be the
# same: objective, prompts and their order, sampler, rewards, the weights of teachers, base and
# start, the adapter's shape and scale, precision, optimizer. (Not compared either: images in a
# forward, devices, processes.)
MAY_CHANGE = ("iterations", "save_every", "log_with")
COUNTS = ("iteration", "updates", "seconds")
BETAS, CLIP_NORM = (0.9, 0.99), 1.0
SAVE_SECONDS = 120.0


class TrainingDiverged(RuntimeError):
    """The loss or the gradient is no longer a finite number."""


@settings
class TrainConfig:
    """`iterations` of the objective (each makes its own number of updates). A checkpoint is written
    every `save_every` iterations and two minutes, whichever comes first, and at the end.
    `log_with`: one of accelerate's trackers, such as tensorboard or wandb. `cooldown`: the fraction
    of the iterations, at the end, over which `lr` falls to zero."""

    iterations: Count
    lr: Positive = 3e-4
    warmup: Index = 0  # updates
    cooldown: Fraction = 0.0
    ema: Decay = 0.95  # of the adapter, per update; 0 keeps none
    save_every: Count = 20
    log_with: str | None = None

    def __post_init__(self):
        if self.log_with is not None:  # accelerate would silently leave out one that it lacks
            from accelerate.tracking import get_available_trackers

            choose("installed tracker", self.log_with, map(str, get_available_trackers()))


@dataclass(frozen=True)
class StepInfo:
    """One update. `metrics` come with the last update of an iteration; empty before. `average`: of
    the adapter's weights, in the order of `FlowPolicy.adapter_parameters`."""

    iteration: int
    update: int
    loss: float
    grad_norm: float
    seconds: float  # of training, also before a resume, without the caller's pauses
    metrics: dict[str, float]
    average: list[torch.Tensor] = field(repr=False)


class _Run:
    """What a checkpoint holds: the adapter, its average, the optimizer, the count of iterations
    done, and what the training follows from (`about`)."""

    def __init__(self, policy: FlowPolicy, adapter: str, config: TrainConfig, about: dict):
        self.config, self.fingerprint = config, about
        self.parameters = policy.train_adapter(adapter)
        self.average = [p.detach().clone() for p in self.parameters]
        self.optimizer = torch.optim.AdamW(self.parameters, config.lr, BETAS, weight_decay=0.0)
        self.iteration = self.updates = 0
        self.seconds = 0.0

    def resume(self, file: Path) -> None:
        state = load_state(file)
        own, saved = [*self.parameters, *self.average], [*state["parameters"], *state["average"]]
        with torch.no_grad():
            for p, value in zip(own, saved, strict=True):
                p.copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        vars(self).update({k: state[k] for k in COUNTS})

    def save(self, file: Path) -> None:
        state = {k: getattr(self, k) for k in (*COUNTS, "fingerprint", "average")}
        state["parameters"] = [p.data for p in self.parameters]
        save_state(file, {**state, "optimizer": self.optimizer.state_dict()})

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
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, CLIP_NORM).item()
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


def check_folder(
    policy: FlowPolicy,
    objective: Objective,
    folder: str | Path,
    config: TrainConfig,
    adapter: str = "student",
) -> dict:
    """What the training follows from, compared before it is resumed. Raises ValueError for a folder
    that holds a training of something else, or of more iterations."""
    may_change = set(MAY_CHANGE) - ({"iterations"} if config.cooldown else set())
    here = {
        "objective": describe(objective),
        "train": {k: v for k, v in describe(config).items() if k not in may_change},
        "base": policy.base_hash,
        "code": code_hashes(),
        "precision": policy.precision,
        "start": policy.start_hash(adapter, Path(folder)),
        "adapters": {name: policy.adapter(name).sha256 for name in sorted(objective.adapters)},
        "ranks": describe(policy.adapter(adapter).ranks),
        "scales": describe(policy.adapter(adapter).alpha),
    }
    if not (Path(folder) / STATE).exists():
        return here
    state = load_state(Path(folder) / STATE)
    if changed := list(differences(state["fingerprint"], here)):
        raise ValueError(
            f"{folder} holds another training: {'; '.join(changed[:6])}. Give a new folder, or the "
            "settings it was started with"
        )
    if (done := state["iteration"]) > config.iterations:
        raise ValueError(
            f"{folder} holds {done} iterations already, more than {config.iterations}; give a new "
            "folder"
        )
    return here


def mean_metrics(terms: list[dict[str, torch.Tensor]], accelerator: Accelerator) -> dict:
    """Means over the rows and micro-batches of an iteration, and over processes."""
    from accelerate.utils import gather_object

    pairs = [(name, value) for term in terms for name, value in term.items()]
    values = defaultdict(list)
    for name, value in gather_object([(n, torch.as_tensor(v).detach().cpu()) for n, v in pairs]):
        values[name].append(value.reshape(-1))
    means = {name: torch.cat(parts).mean().item() for name, parts in values.items()}
    return {name: mean for name, mean in means.items() if math.isfinite(mean)}


def shard_of(accelerator: Accelerator) -> Shard:
    """This process's shard; processes may have unequal parts to gather."""
    from accelerate.utils import gather_object

    def gather(values: torch.Tensor) -> torch.Tensor:
        return torch.cat(gather_object([values.cpu()])).to(values.device)

    rank, processes = accelerator.process_index, accelerator.num_processes
    return Shard(rank, processes, gather, accelerator.wait_for_everyone)


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

        on_cpu = policy.device.type == "cpu"
        accelerator = Accelerator(cpu=on_cpu, log_with=config.log_with, project_dir=folder)
    folder, main = Path(folder), accelerator.is_main_process
    objective.check(policy, adapter)
    with locked(folder, f"a training of {adapter}") if main else contextlib.nullcontext():
        about = check_folder(policy, objective, folder, config, adapter)
        if main and accelerator.log_with:
            start_trackers(accelerator, folder, about)
        try:
            yield from _updates(policy, objective, folder, config, adapter, accelerator, about)
        finally:
            policy.train_adapter(None)
            for tracker in accelerator.trackers:
                tracker.finish()


def start_trackers(accelerator: Accelerator, folder: Path, about: dict) -> None:
    """With the training's settings where it begins, as the same run where it is resumed."""
    begins, file = not (folder / STATE).exists(), folder / "tracker_run.txt"
    if begins or not file.exists():  # a state that was copied is another run
        write_whole(file, uuid.uuid4().hex)
    wandb = {"dir": str(folder), "name": folder.name, "id": file.read_text(), "resume": "allow"}
    settings = {key: about[key] for key in ("objective", "train", "precision")}
    (flat,) = pd.json_normalize(settings).to_dict("records")
    plain = {k: v if isinstance(v, (bool, int, float, str)) else str(v) for k, v in flat.items()}
    accelerator.init_trackers("flow-opd", plain if begins else None, {"wandb": wandb})


def _updates(policy, objective, folder, config, adapter, accelerator, about):
    run, state, log = _Run(policy, adapter, config, about), folder / STATE, folder / METRICS
    main, shard = accelerator.is_main_process, shard_of(accelerator)
    if state.exists():
        run.resume(state)
    if main:
        lines = log.read_text().splitlines()[: run.iteration] if log.exists() else []
        write_whole(log, "".join(line + "\n" for line in lines))
    saved, unlogged = time.time(), []
    start = saved - run.seconds

    def save() -> None:
        """A tracker gets an iteration when a checkpoint has it: each once, whatever is killed."""
        run.save(state)
        while unlogged:
            line, step = unlogged.pop(0)
            accelerator.log(line, step)

    while run.iteration < config.iterations:
        try:
            data, collected = objective.collect(policy, adapter, run.iteration, shard)
        except Exception:  # a reward server is gone, say: what was trained before is whole
            if run.iteration and main:
                save()
            raise
        metrics = [collected]
        for update in range(objective.updates):
            total = torch.zeros((), device=policy.device)
            for loss, terms in objective.losses(policy, adapter, data, update):
                loss.backward()
                total += loss.detach()
                metrics.append(terms)
            loss = accelerator.reduce(total, "sum").item()
            norm = run.step(accelerator)
            if not math.isfinite(loss) or not math.isfinite(norm):
                raise TrainingDiverged(
                    f"iteration {run.iteration}: loss {loss}, gradient norm {norm}; lower lr (now "
                    f"{config.lr}) or raise the KL or anchor weight. The last good state, if one "
                    f"was saved, is in {state}"
                )
            run.seconds, last = time.time() - start, update == objective.updates - 1
            means = mean_metrics(metrics, accelerator) if last else {}
            info = StepInfo(run.iteration, update, loss, norm, run.seconds, means, run.average)
            if last:
                run.iteration += 1
                line = {"loss": loss, "grad_norm": norm, **means}
                if main:
                    unlogged.append((line, info.iteration))
                    line = {"iteration": info.iteration, "seconds": round(info.seconds, 2), **line}
                    append_lines(log, json.dumps(line) + "\n")
                    due = run.iteration % config.save_every == 0
                    due |= time.time() - saved > SAVE_SECONDS
                    if due or run.iteration == config.iterations:
                        save()
                        saved = time.time()
            paused = time.time()
            try:
                yield info
            except GeneratorExit:  # between two iterations is a place to continue from
                if last and main:
                    save()
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
    updates = train(policy, objective, folder, config, adapter, accelerator)
    bar = progress(config.iterations, f"train {adapter}", show_progress and main)
    shown, stopped = 0, False
    with bar as advance, contextlib.closing(updates):
        for info in updates:
            if info.update < objective.updates - 1:
                continue
            iteration = info.iteration + 1
            advance(iteration - shown)
            shown = iteration
            if every and iteration % every == 0 and iteration < config.iterations:
                probe(iteration, info.seconds, info.average)
            if stopped := bool(on_step and on_step(info)):
                break
    metrics = read_lines(folder / METRICS)
    if not stopped:
        probe(len(metrics), metrics["seconds"].iloc[-1])
    if accelerator is not None:
        accelerator.wait_for_everyone()
    return metrics, read_lines(log)
