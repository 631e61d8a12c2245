"""What a student of two teachers on the same prompts ends at: `python -m flowopd_lib.studies.mixture`.

A student is asked for one velocity at a state, and a prompt that two teachers share asks for the velocity of
one or the other. The loss is least at their average, weighed by how often each is asked (`shares`). Here that
average is sampled, without a student: what the shares are worth before anything is trained.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
import torch

from ..evaluate import score
from ..files import write_whole
from ..policy import FlowPolicy
from ..progress import progress
from ..prompts import Prompt
from ..rewards import Reward
from ..rollout import Sampler, walk
from ..stats import gain_kept, mean_interval
from ..worlds import load_world

TEACHERS = {"PickScore": "0", "DeQA": "1"}  # by judge, DeQA's share at which its expert is alone
SEED, BATCH = 1 << 20, 64


@torch.no_grad()
def sample_average(
    policy: FlowPolicy,
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    weights: Mapping[str | None, float],
    sampler: Sampler,
) -> torch.Tensor:
    """Images (B, 3, H, W) of the walk by the sum of the adapters' velocities times `weights`."""
    text = policy.encode([p.text for p in prompts])

    def velocity(x: torch.Tensor, sigma: float, index: int) -> torch.Tensor:
        return sum(w * policy.velocity(x, sigma, text, adapter=name) for name, w in weights.items() if w)

    for step in walk(policy, velocity, prompts, seeds, sampler):
        pass
    return policy.decode(step.x_next).cpu()


def of_average(
    policy: FlowPolicy, prompts: Sequence[Prompt], judges: Mapping[str, Reward], shares: Sequence[float]
) -> pd.DataFrame:
    """The scores of every image, same noise under all: model (`base`, or DeQA's share), task, prompt, and a
    column a judge."""
    models = {"base": {None: 1.0}, **{f"{s:g}": {"pickscore": 1 - s, "deqa": s} for s in shares}}
    rows = []
    with progress(len(models) * len(prompts), "average") as advance:
        for model, weights in models.items():
            for i in range(0, len(prompts), BATCH):
                some = prompts[i : i + BATCH]
                seeds = range(SEED + i, SEED + i + len(some))
                images = sample_average(policy, some, seeds, weights, Sampler(20))
                rows.append(score(images, some, judges).assign(model=model))
                advance(len(some))
    return pd.concat(rows, ignore_index=True)


def kept(table: pd.DataFrame, shares: Sequence[float]) -> pd.DataFrame:
    """By share and judge: the mean score and the part of its expert's gain, with 95 % intervals."""
    rows = []
    for share in shares:
        gains = gain_kept(table, f"{share:g}", TEACHERS).set_index("judge")
        for judge in TEACHERS:
            mean, low, high = mean_interval(table.loc[table["model"] == f"{share:g}", judge].to_numpy())
            part = {f"kept {k}": gains.loc[judge, k] for k in ("mean", "low", "high")}
            told = {"share": share, "judge": judge, "mean": mean, "low": low, "high": high}
            rows.append({**told, **part, "n": int(gains.loc[judge, "n"])})
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m flowopd_lib.studies.mixture",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--n", type=int, default=120, help="val prompts")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.0, 0.25, 0.5, 0.75, 1.0], help="DeQA's")
    parser.add_argument("--out", type=Path, help="a CSV file for the table")
    args = parser.parse_args()
    if args.n < 12 or not {0.0, 1.0} <= set(args.shares) or not all(0 <= s <= 1 for s in args.shares):
        parser.error(
            "--n must be at least 12, and --shares lie in [0, 1] with 0 and 1, the teachers, among them"
        )
    world = load_world()
    policy = world.policy()
    world.load_experts(policy)
    prompts = world.prompts("pickscore", "val")[: args.n]
    judges = {name: judge for name, judge in world.judges().items() if name in TEACHERS}
    told = kept(of_average(policy, prompts, judges, args.shares), args.shares)
    print(told.round(3).to_string(index=False))
    if args.out:
        write_whole(args.out, told.round(4).to_csv(index=False))


if __name__ == "__main__":
    main()
