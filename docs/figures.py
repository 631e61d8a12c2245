"""The figures of README.md and docs/: `make figures`, which drives the gallery in a browser too."""

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from flowopd_lib import Sampler, load_benchmark, sample, trajectory
from flowopd_lib.benchmarks.tiny import ASSETS
from flowopd_lib.evaluate import score
from flowopd_lib.lab.workspace import Workspace
from flowopd_lib.plots.scores import format_captions, plot_image_grid
from flowopd_lib.plots.style import color_of, use_style

HERE = Path(__file__).parent
BENCHMARK = load_benchmark()
REWARDS = {expert: reward for reward, expert in BENCHMARK.experts_of.items()}


def box(axis, x, y, width, height, text, color=".35", **style):
    shape = {"boxstyle": "round,pad=0,rounding_size=.06", "fc": "white", "ec": color, "lw": 1.8}
    axis.add_patch(FancyBboxPatch((x, y), width, height, **shape, **style))
    center = {"ha": "center", "va": "center", "fontsize": 10, "color": ".15"}
    axis.text(x + width / 2, y + height / 2, text, **center)


def arrow(axis, start, end, color=".35", **style):
    shape = {"arrowstyle": "-|>", "mutation_scale": 13, "lw": 1.6, "shrinkA": 2, "shrinkB": 2}
    axis.add_patch(FancyArrowPatch(start, end, color=color, **shape, **style))


def draw_image(axis, image, x, y, side=0.8, color=".35"):
    extent = (x, x + side, y, y + side)
    axis.imshow(image.permute(1, 2, 0), extent=extent, interpolation="nearest", zorder=3)
    axis.add_patch(plt.Rectangle((x, y), side, side, fill=False, ec=color, lw=1.8, zorder=4))


def draw_method() -> plt.Figure:
    """Experts, cold start, the student's trajectory, the routed teacher and the anchor. The images
    are samples of the small benchmark: the first sign of the test split that the base gets wrong
    and that its OCR expert and the merged student, sampling with the SDE, get right."""
    workspace, reward, seed = Workspace(BENCHMARK), BENCHMARK.rewards()["OCR"], 0
    workspace.load_adapters(list(BENCHMARK.experts))
    experts = list(BENCHMARK.experts)
    merged = {"merge": "svd", "adapters": experts, "rank": BENCHMARK.rank}
    workspace.load_adapters(["merged"], {"merged": merged})
    policy = workspace.policy

    def is_right(adapter, sampler):
        return reward(sample(policy, [prompt], [seed], sampler, adapter), [prompt])[0] == 1

    for prompt in BENCHMARK.prompts("ocr", "test"):
        of_models = is_right(None, Sampler(20)), is_right("ocr", Sampler(20))
        if of_models == (False, True) and is_right("merged", Sampler(10, "sde")):
            break
    steps = list(trajectory(policy, [prompt], [seed], Sampler(10, "sde"), "merged"))
    states = [policy.decode(steps[k].x_t)[0] for k in (0, 2, 4, 6, 8)]
    states.append(policy.decode(steps[-1].x_next)[0])
    own = {n: sample(policy, [prompt], [seed], Sampler(20), n)[0] for n in (None, *REWARDS)}
    figure = plt.figure(figsize=(13, 5.2), layout="none")
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, 13), ylim=(0.4, 5.6))
    axis.axis("off")
    title = {"fontsize": 12, "weight": "bold"}
    axis.text(0.1, 5.3, "1  one expert per reward, by GRPO", **title)
    box(axis, 0.1, 2.55, 1.2, 0.7, "base")
    draw_image(axis, own[None], 0.3, 3.35)
    for row, (name, of_expert) in enumerate(REWARDS.items()):
        y, color = 4.35 - row * 1.12, color_of(of_expert)
        box(axis, 2.1, y, 1.55, 0.8, f"{of_expert}\nexpert", color)
        draw_image(axis, own[name], 3.75, y, color=color)
        arrow(axis, (1.3, 2.9), (2.1, y + 0.4), color)
        arrow(axis, (4.6, y + 0.4), (5.15, 2.9), color)
    axis.text(5.1, 5.3, "2  cold start", **title)
    box(axis, 5.15, 2.5, 1.1, 0.8, "student =\nmerged")
    text = "3  the student samples a trajectory; at its states it is\n    trained towards "
    axis.text(6.6, 5.3, text + "the expert its prompt is routed to", va="center", **title)
    arrow(axis, (6.25, 2.9), (6.75, 2.9))
    for i, image in enumerate(states):
        x = 6.8 + i * 1.03
        draw_image(axis, image, x, 2.5)
        if i:
            arrow(axis, (x - 0.23, 2.9), (x, 2.9))
        if i < len(states) - 1:
            arrow(axis, (x + 0.4, 3.3), (x + 0.4, 4.15), color_of("OCR"))
            arrow(axis, (x + 0.4, 2.5), (x + 0.4, 1.65), color_of("DeQA"), linestyle="--")
    teacher = f"OCR expert: the teacher of this prompt, {prompt.text}"
    box(axis, 6.8, 4.2, 5.0, 0.5, teacher, color_of("OCR"))
    anchor = "DeQA expert: the anchor, weakly, on all prompts"
    box(axis, 6.8, 1.1, 5.0, 0.5, anchor, color_of("DeQA"), linestyle="--")
    axis.text(6.6, 0.55, "4  Manifold Anchor Regularization (MAR) keeps images clean", **title)
    axis.text(6.8, 2.25, "noise", fontsize=9, color=".3")
    axis.text(12.75, 2.25, "image", fontsize=9, color=".3", ha="right")
    return figure


def draw_samples(task: str, n: int = 24) -> plt.Figure:
    """Contact sheet of the first test prompts of a task, with scores: below each image of the base
    that of the base with the adapter that undoes its misalignment (`ability`), and those of the
    experts whose prompts these are, from the same noise."""
    policy, rewards = BENCHMARK.policy(), BENCHMARK.rewards()
    policy.load_adapter("ability", ASSETS / "ability")
    names = [e for e in BENCHMARK.experts if (BENCHMARK.tasks[e].prompts_of or e) == task]
    for name in names:
        policy.load_adapter(name, BENCHMARK.adapter(name))
    prompts, images, captions = BENCHMARK.prompts(task, "test")[:n], [], []
    for i in range(0, n, 8):
        for adapter in (None, "ability", *names):
            some = prompts[i : i + 8]
            samples = sample(policy, some, range(i, i + len(some)), Sampler(20), adapter)
            images += list(samples)
            captions += format_captions(score(samples, some, rewards))
    rows = "; below it ".join(["base", "what it can do (ability)", *(f"{e} expert" for e in names)])
    return plot_image_grid(images, captions, 8, f"{task} prompts of the test split: {rows}")


if __name__ == "__main__":
    use_style()
    torch.set_grad_enabled(False)
    figures = {"method": draw_method()}
    figures |= {f"samples_{task}": draw_samples(task) for task in BENCHMARK.prompt_tasks}
    for name, figure in figures.items():
        figure.savefig(HERE / f"{name}.png", bbox_inches="tight", dpi=80)
        print(HERE / f"{name}.png")
