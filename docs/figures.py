"""The pictures of README.md and docs/: `make figures`, which also works the gallery in a browser."""

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from flowopd_lib import Sampler, captions_of, image_grid, load_benchmark, sample, score, trajectory, use_style
from flowopd_lib.plots.figures import COLORS

HERE = Path(__file__).parent
BENCHMARK = load_benchmark()
REWARDS = {expert: reward for reward, expert in BENCHMARK.experts_of.items()}


def box(axis, x, y, width, height, text, colour=".35", **style):
    axis.add_patch(
        FancyBboxPatch(
            (x, y),
            width,
            height,
            boxstyle="round,pad=0,rounding_size=.06",
            fc="white",
            ec=colour,
            lw=1.8,
            **style,
        )
    )
    axis.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=10, color=".15")


def arrow(axis, start, end, colour=".35", **style):
    axis.add_patch(
        FancyArrowPatch(
            start,
            end,
            arrowstyle="-|>",
            mutation_scale=13,
            color=colour,
            lw=1.6,
            shrinkA=2,
            shrinkB=2,
            **style,
        )
    )


def method() -> plt.Figure:
    """Experts, cold start, the student's walk, the routed teacher and the anchor. The pictures are samples of
    the small benchmark: the first sign of the test split that the base gets wrong, its OCR expert right, and the
    merged student, on a walk of the SDE, right too."""
    policy, reward, seed = BENCHMARK.merged_policy(), BENCHMARK.rewards()["OCR"], 0

    def right(adapter, sampler):
        return reward(sample(policy, [prompt], [seed], sampler, adapter), [prompt])[0] == 1

    for prompt in BENCHMARK.prompts("ocr", "test"):
        if not right(None, Sampler(20)) and right("ocr", Sampler(20)) and right("merged", Sampler(10, "sde")):
            break
    steps, shown = list(trajectory(policy, [prompt], [seed], Sampler(10, "sde"), "merged")), [0, 2, 4, 6, 8]
    states = [policy.decode(steps[k].x)[0] for k in shown] + [policy.decode(steps[-1].x_next)[0]]
    own = {name: sample(policy, [prompt], [seed], Sampler(20), name)[0] for name in (None, *REWARDS)}
    figure, axis = plt.subplots(figsize=(13, 5.2))
    axis.set(xlim=(0, 13), ylim=(0.4, 5.6))
    axis.axis("off")

    def picture(image, x, y, side=0.8, colour=".35"):
        axis.imshow(
            image.permute(1, 2, 0), extent=(x, x + side, y, y + side), interpolation="nearest", zorder=3
        )
        axis.add_patch(plt.Rectangle((x, y), side, side, fill=False, ec=colour, lw=1.8, zorder=4))

    axis.text(0.1, 5.3, "1  one expert a reward, by GRPO", fontsize=12, weight="bold")
    box(axis, 0.1, 2.55, 1.2, 0.7, "base")
    picture(own[None], 0.3, 3.35)
    for row, (name, reward) in enumerate(REWARDS.items()):
        y = 4.35 - row * 1.12
        box(axis, 2.1, y, 1.55, 0.8, f"{reward}\nexpert", COLORS[reward])
        picture(own[name], 3.75, y, colour=COLORS[reward])
        arrow(axis, (1.3, 2.9), (2.1, y + 0.4), COLORS[reward])
        arrow(axis, (4.6, y + 0.4), (5.15, 2.9), COLORS[reward])
    axis.text(5.1, 5.3, "2  cold start", fontsize=12, weight="bold")
    box(axis, 5.15, 2.5, 1.1, 0.8, "student =\nmerged")
    axis.text(
        6.6,
        5.3,
        "3  the student walks, and at the states it visits is pulled\n"
        "    to the teacher that its prompt is routed to",
        fontsize=12,
        weight="bold",
        va="center",
    )
    arrow(axis, (6.25, 2.9), (6.75, 2.9))
    for i, image in enumerate(states):
        x = 6.8 + i * 1.03
        picture(image, x, 2.5, 0.8)
        if i:
            arrow(axis, (x - 0.23, 2.9), (x, 2.9))
        if i < len(shown):
            arrow(axis, (x + 0.4, 3.3), (x + 0.4, 4.15), COLORS["OCR"])
            arrow(axis, (x + 0.4, 2.5), (x + 0.4, 1.65), COLORS["DeQA"], linestyle="--")
    box(axis, 6.8, 4.2, 5.0, 0.5, f"OCR expert: the teacher of this prompt, {prompt.text}", COLORS["OCR"])
    box(
        axis,
        6.8,
        1.1,
        5.0,
        0.5,
        "DeQA expert: the anchor of every prompt, weakly",
        COLORS["DeQA"],
        linestyle="--",
    )
    axis.text(6.6, 0.55, "4  the anchor (MAR) keeps all pictures clean", fontsize=12, weight="bold")
    axis.text(6.75, 2.2, "noise", fontsize=9, color=".3")
    axis.text(12.75, 2.2, "picture", fontsize=9, color=".3", ha="right")
    return figure


def samples() -> plt.Figure:
    """The base's samples of the first test prompts, with their scores."""
    policy, rewards = BENCHMARK.policy(), BENCHMARK.rewards()
    few = BENCHMARK.first_prompts("test", 6)
    images = sample(policy, few, range(len(few)), Sampler(40))
    return image_grid(
        images,
        captions_of(score(images, few, rewards)),
        6,
        "Base model: GenEval, OCR and PickScore test prompts",
    )


if __name__ == "__main__":
    use_style()
    for name, figure in (("method", method()), ("samples", samples())):
        figure.savefig(HERE / f"{name}.png", bbox_inches="tight")
        print(HERE / f"{name}.png")
