"""What a long run would trip over, found in a minute before it begins: `python -m flowopd_lib check
BENCHMARK`. Every prompt file, every expert's adapter, every reward on one gray image, a
detector on renders whose answer is known, one update of OPD and one batch of an evaluation."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch

from .benchmarks import Benchmark
from .config import validate
from .evaluate import evaluate
from .lab.recipe import Recipe, build
from .lab.workspace import Workspace
from .rewards import GenEval, Reward, applies_to, score_images
from .rollout import initial_noise
from .train import train


class Row(NamedTuple):
    """What was checked, whether it passed, the result or the error, and the seconds it took."""

    check: str
    passed: bool
    message: str
    seconds: float


def check(benchmark: Benchmark | str, precision: str = "auto") -> Iterator[Row]:
    """A row per check, as soon as it is known. What a check raises becomes the message of its row,
    and the others still run. Experts need the model; the update and the evaluation, which come
    last, run only if all other checks have passed.

    Raises ValueError or FileNotFoundError for a benchmark whose file cannot be read.
    """
    workspace, rows = Workspace(benchmark, precision), []
    benchmark = workspace.benchmark

    def run(name: str, function: Callable[..., str], *arguments) -> Row:
        start = time.perf_counter()
        try:
            passed, message = True, function(workspace, *arguments)
        except Exception as error:  # of any library: all of them are reported
            passed, message = False, " ".join(str(error).split()) or type(error).__name__
        rows.append(Row(name, passed, message, time.perf_counter() - start))
        return rows[-1]

    for task in benchmark.prompt_tasks:
        yield run(f"prompts of {task}", check_prompts, task)
    yield run(f"model {benchmark.base_name}", lambda w: f"{w.policy.device}, {w.policy.precision}")
    for name in benchmark.experts if rows[-1].passed else ():
        yield run(f"expert {name}", check_expert, name)
    for name in benchmark.reward_configs:
        yield run(f"reward {name}", check_reward, name)
    if all(row.passed for row in rows):
        if benchmark.teachers:
            yield run("one update of OPD", check_update)
        yield run("one batch of an evaluation", check_evaluation)


def print_rows(rows: Iterable[Row]) -> bool:
    """Print the table, each row as soon as it is known; whether all checks passed."""
    passed = True
    for row in rows:
        state = "ok    " if row.passed else "FAILED"
        print(f"{state}  {row.check}: {row.message} ({row.seconds:.1f} s)", flush=True)
        passed &= row.passed
    return passed


def check_prompts(workspace: Workspace, task: str) -> str:
    """The splits that there are, train and test at least."""
    benchmark = workspace.benchmark
    splits = dict.fromkeys(["train", *benchmark.splits(task), "test"])
    return ", ".join(f"{split} {len(benchmark.prompts(task, split))}" for split in splits)


def check_expert(workspace: Workspace, name: str) -> str:
    """The adapter's keys, and how much it changes the velocity of one state."""
    workspace.load_adapter(name)
    policy, prompt = workspace.policy, workspace.benchmark.first_prompts("train", 1)[0]
    x_t, text = initial_noise(policy, [0]), policy.encode([prompt.text])
    with torch.no_grad():
        v_base, v = (policy.velocity(x_t, 0.9, text, adapter=a) for a in (None, name))
    change, ranks = ((v - v_base).norm() / v_base.norm()).item(), policy.adapter(name).ranks
    if not change:
        raise ValueError("it has the velocity of the base: its weights change nothing")
    return f"{len(ranks)} modules, rank {sorted(set(ranks.values()))}, changes {change:.1%}"


def check_reward(workspace: Workspace, name: str) -> str:
    """Its score of a gray image, and whether its detector is right where the answer is known."""
    benchmark = workspace.benchmark
    reward = benchmark.rewards_named([name], workspace.device)[name]
    prompts = [p for p in benchmark.first_prompts("train", 1) if applies_to(reward, p)][:1]
    if not prompts:
        raise ValueError("it applies to the prompts of no task; correct its `tasks`")
    side = benchmark.config.resolution or 8 * workspace.policy.latent_shape[-1]
    score = float(score_images(reward, torch.full((1, 3, side, side), 0.5), prompts)[0])
    held_out = ", held out" if benchmark.reward_is(name, "held_out") else ""
    low, high = reward.range
    message = f"{score:.3f} in [{low:g}, {high:g}] for a gray image{held_out}"
    if isinstance(reward, GenEval):
        detector = reward.detector.name
        message += f", objects detected by {detector}; {check_detector(benchmark, reward)}"
    return message


def check_detector(benchmark: Benchmark, reward: Reward) -> str:
    """How often a correct image scores higher than a wrong one, where they can be rendered."""
    if not benchmark.renderer:
        return "no known answer: the detector's classes are not checked, only that it runs"
    prompts, right, wrong = benchmark.renderer.known_answers(12)
    higher = score_images(reward, right, prompts) > score_images(reward, wrong, prompts)
    message = f"{sum(higher)} of {len(higher)} correct images score higher than wrong ones"
    if higher.mean() < 0.75:
        raise ValueError(f"{message}: the classes of its detector are wrong; check its weights")
    return message


def check_update(workspace: Workspace) -> str:
    """With all teachers and the anchor, on one step of a trajectory per task."""
    tasks = list(workspace.benchmark.teachers)
    schedule = {"tasks": tasks, "prompts_per_batch": len(tasks)}
    opd = {"trained_steps": 1, "anchor": workspace.benchmark.anchor}
    recipe = {"schedule": schedule, "opd": opd, "train": {"iterations": 1}}
    objective, config = build(validate(Recipe, recipe), workspace)
    with tempfile.TemporaryDirectory() as folder:
        (info,) = train(workspace.policy, objective, folder, config)
    if not info.grad_norm > 0:
        raise ValueError(f"loss {info.loss}, but no gradient: the student would learn nothing")
    return f"loss {info.loss:.4g}, gradient norm {info.grad_norm:.4g}"


def check_evaluation(workspace: Workspace) -> str:
    benchmark = workspace.benchmark
    prompts, sampler = benchmark.first_prompts("test", 1), benchmark.sampler(2)
    rewards = benchmark.all_rewards(workspace.device)
    table = evaluate(workspace.policy, prompts, rewards, 0, sampler, show_progress=False)
    return f"{len(table)} images scored"
