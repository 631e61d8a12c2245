"""Which gradient does each reading of the OPD loss estimate? `python -m flowopd_lib.studies.estimators [--out
estimators.json]`.

Every reading is differentiated on the same rollouts of the same student. Means are compared by inner products
with `pathwise` on *other* batches, so no batch's noise meets itself (see interference.py), and variances by
the squared norm that averaging cannot explain:

    mean along pathwise   <E g, E g_pathwise> / |E g_pathwise|^2      1: the same gradient (along it), 0: none
                                                            of it
    noise                 tr Cov(g of one batch) / |E g_pathwise|^2

At every state visited the mean is that of the action taken and of its mirror image at the other side of the
policy's mean, 2 mu - x_{k+1}, which is as likely (antithetic variates): the score changes its sign between
the two, so a reward that does not depend on the action leaves none of its noise in the mean. `return_to_go`
knows what followed on the action taken alone, and is left as it is. The noise is that of one batch as a
training draws it.

Standard errors: jackknife over batches. A reading that multiplies a KL by a score has noise that falls with
the KL, so the mean of `return_to_go` shows best with teachers near the student: `--distance 0.1` puts them a
tenth of the way from its weights to theirs.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from ..benchmarks import load_benchmark
from ..benchmarks.benchmark import DEFAULT
from ..files import write_json
from ..jobs.site import Site
from ..merge import merge
from ..objectives import ESTIMATORS, OPD, Share
from ..objectives.opd import Visit, Walks
from ..policy import FlowPolicy
from ..progress import progress
from ..schedule import Schedule
from .interference import Gradients


def gradients(
    policy: FlowPolicy,
    adapter: str,
    objectives: Mapping[str, OPD],
    batches: int,
    kept: Gradients | None = None,
    share: Share = Share(),
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """By objective, (batches, P) float32: the loss's gradient by the adapter's weights, on the actions taken;
    and its mean on these and their mirror images. The objectives, readings of one distillation, share the
    rollouts of each iteration and the teachers' velocities there, which the first that is not `pathwise`
    alone collects. `kept` and `share`: see `interference`."""
    parameters, kept = policy.train_adapter(adapter), kept or Gradients()
    collector = next(
        (o for o in objectives.values() if o.readings != ["pathwise"]),
        next(iter(objectives.values())),
    )
    mine = range(share.rank, batches, share.processes)
    shown, held = share.rank == 0, f"{adapter}_mirrored"

    def gradient(objective: OPD, data: Walks) -> torch.Tensor:
        for loss in objective.losses(policy, adapter, data, 0):
            loss.backward()
        found = torch.cat([p.grad.flatten() for p in parameters]).cpu()
        for p in parameters:
            p.grad = None
        return found

    with progress(
        len(mine) * len(objectives), f"gradients of {len(objectives)} readings", shown
    ) as advance:
        for iteration in mine:
            if not kept.has(held, iteration):
                data, found = collector.collect(policy, adapter, iteration, Share()), {}
                for name, objective in objectives.items():
                    found[name] = gradient(objective, data)
                    if not {"pathwise", "return_to_go"}.issuperset(objective.readings):
                        found[f"{name} mirrored"] = gradient(objective, mirrored(data))
                    advance(1)
                kept.put(held, iteration, found)
    share.wait()
    rows = [kept.get(held, iteration) for iteration in range(batches)]
    taken = {name: torch.stack([found[name] for found in rows]) for name in objectives}
    both = {
        name: (g + torch.stack([found.get(f"{name} mirrored", found[name]) for found in rows])) / 2
        for name, g in taken.items()
    }
    return taken, both


def mirrored(data: Walks) -> Walks:
    """The same states, and at each of them the action at the other side of the policy's mean."""

    def other(visit: Visit) -> Visit:
        step = visit.step
        return replace(visit, step=replace(step, x_next=2 * step.mean - step.x_next))

    visits = [(*which, [other(visit) for visit in found]) for *which, found in data.visits]
    return replace(data, visits=visits, records=[])


def compare_estimators(
    gradients_of: Mapping[str, torch.Tensor], averaged: Mapping[str, torch.Tensor] | None = None
) -> pd.DataFrame:
    """A row per estimator from their gradients (batches, P), `pathwise` among them: estimator, mean, se,
    noise, noise se, n batches. `averaged`: the same with less noise and the same means, which the mean is
    then taken of."""
    averaged = gradients_of if averaged is None else averaged
    reference, rows = averaged["pathwise"].double(), []
    n = len(reference)
    if n < 3:
        raise ValueError(f"a standard error over batches needs at least 3 of them, not {n}")

    def other(gram: np.ndarray) -> float:
        return (gram.sum() - np.trace(gram)) / (len(gram) * (len(gram) - 1))

    size = (reference @ reference.T).numpy()
    for name, g in gradients_of.items():
        cross = (averaged[name].double() @ reference.T).numpy()
        own = (g.double() @ g.double().T).numpy()

        def figures(keep: np.ndarray) -> np.ndarray:
            here = np.ix_(keep, keep)
            length = other(size[here])
            return np.array(
                [
                    other(cross[here]) / length,
                    (np.trace(own[here]) / len(keep) - other(own[here])) / length,
                ]
            )

        whole = figures(np.arange(n))
        left_out = np.stack([figures(np.delete(np.arange(n), i)) for i in range(n)])
        errors = np.sqrt((n - 1) / n * ((left_out - left_out.mean(0)) ** 2).sum(0))
        rows.append(
            {
                "estimator": name,
                "mean along pathwise": whole[0],
                "se": errors[0],
                "noise": whole[1],
                "noise se": errors[1],
                "n": n,
            }
        )
    return pd.DataFrame(rows)


def measure(
    site: Site,
    adapter: str = "merged",
    batches: int = 24,
    images: int = 12,
    seed: int = 0,
    estimators: Sequence[str] = ESTIMATORS,
    distance: float = 1.0,
    folder: Path | None = None,
) -> pd.DataFrame:
    """The table for a student and the experts that its prompts are routed to; the teachers lie at `distance`
    (a share) of the way from the student to an expert."""
    benchmark, policy = site.benchmark, site.policy
    teachers = {
        task: benchmark.teachers[task] for task in benchmark.own if task in benchmark.teachers
    }
    site.adapters(teachers.values())
    if distance != 1:
        for task, name in teachers.items():
            near = f"near_{name}_{distance:g}".replace(".", "p")
            if near not in policy.adapters:
                merge(policy, [adapter, name], near, "cat", [1 - distance, distance])
            teachers[task] = near
    schedule = Schedule({t: benchmark.prompts(t, "train") for t in teachers}, images, seed=seed)
    readings = {n: OPD(schedule, teachers, benchmark.distillation, n, mar=0.0) for n in estimators}
    taken, both = gradients(policy, adapter, readings, batches, Gradients(folder), site.share)
    return compare_estimators(taken, both)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m flowopd_lib.studies.estimators",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--benchmark", default=DEFAULT, help="a benchmark's name, or its YAML file")
    parser.add_argument("--batches", type=int, default=24)
    parser.add_argument("--images", type=int, default=12, help="in a batch")
    parser.add_argument(
        "--distance",
        type=float,
        default=1.0,
        help="of the teachers from the student, as a share of the experts'",
    )
    parser.add_argument("--out", type=Path, help="a JSON file for the table")
    args = parser.parse_args()
    if args.batches < 3 or args.images < 1:
        parser.error(
            f"at least 3 batches of at least 1 image are needed, not {args.batches} of {args.images}"
        )
    if not 0 < args.distance <= 1:
        parser.error(f"--distance is a share in (0, 1], not {args.distance}")
    torch.set_num_threads(os.cpu_count())
    benchmark = load_benchmark(args.benchmark)
    site = Site(benchmark, "float32")
    site.adapter("merged", benchmark.average())
    table = measure(site, "merged", args.batches, args.images, distance=args.distance)
    print(table.round(4).to_string(index=False))
    if args.out:
        write_json(args.out, table)


if __name__ == "__main__":
    main()
