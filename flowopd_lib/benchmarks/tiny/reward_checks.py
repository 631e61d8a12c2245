"""Judging the rewards: how often each is right on pictures and prompts that nothing was trained on."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping

import numpy as np
import pandas as pd
import torch

from ...prompts import Prompt
from ...stats import GOLD, kernel_distance
from .data import mutate, preference_pair, to_tensor
from .scenes import DEGRADATIONS, LEVELS, degrade, render
from .specs import Spec, sample_specs


def _prompt(spec: Spec) -> Prompt:
    return Prompt(spec.text, spec.task, spec.metadata)


def _pixels(images) -> torch.Tensor:
    return to_tensor(list(images)) / 2 + 0.5


def _share(reward: str, test: str, right, ms: float, aim: float) -> dict:
    """A row for a share of right answers, with Wilson's 95 % interval."""
    from scipy import stats

    right = np.asarray(right, bool)
    interval = stats.binomtest(int(right.sum()), len(right)).proportion_ci(method="wilson")
    return dict(
        reward=reward,
        test=test,
        value=right.mean(),
        low=interval.low,
        high=interval.high,
        n=len(right),
        aim=aim,
        ms=ms,
    )


def _timed(call, *args) -> tuple:
    """The result and the milliseconds an image took."""
    began = time.perf_counter()
    result = call(*args)
    return result, (time.perf_counter() - began) * 1e3 / len(args[0])


def check_rewards(
    rewards: Mapping, n: int = 300, seed: int = 0
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Two tables. The first has a row per test: reward, test, value, low, high (95 %), n, aim, ms per image.
    The second has DeQA's score of every graded picture: kind, level, score. Gold rewards that are there are scored
    as the rewards are.

    Prompts are of the test split; the pictures are rendered, so what is right is known.
    """
    rows = []

    def with_gold(name: str) -> list[str]:
        return [name, *([name + GOLD] if name + GOLD in rewards else [])]

    specs, rng = sample_specs("geneval", "test", n, seed), random.Random(f"wrong/{seed}")
    prompts, right = [_prompt(s) for s in specs], _pixels(render(s, seed) for s in specs)
    wrong = _pixels(render(mutate(s, rng), seed) for s in specs)
    for name in with_gold("GenEval"):
        verdicts, ms = _timed(rewards[name], right, prompts)
        rows.append(_share(name, "accepts right renders", verdicts > 0.5, ms, 0.98))
        verdicts, ms = _timed(rewards[name], wrong, prompts)
        rows.append(_share(name, "rejects renders of a wrong caption", verdicts < 0.5, ms, 0.95))

    specs = sample_specs("ocr", "test", n, seed)
    signs, prompts = _pixels(render(s, seed) for s in specs), [_prompt(s) for s in specs]
    for name in with_gold("OCR"):
        read, ms = _timed(rewards[name].read, signs, prompts)
        exact = [r.lower() == s.word.lower() for r, s in zip(read, specs)]
        rows.append(_share(name, "reads clean signs exactly", exact, ms, 0.95))

    texts, better, worse, likely = zip(
        *(preference_pair(random.Random(f"pair/{seed}/{i}"), "test") for i in range(n))
    )
    prompts = [Prompt(t, "pickscore") for t in texts]
    told = f"orders preference pairs (knowing the hidden reward: {np.mean(likely):.0%})"
    for name in with_gold("PickScore"):
        good, ms = _timed(rewards[name], _pixels(better), prompts)
        right = good > rewards[name](_pixels(worse), prompts)
        rows.append(_share(name, told, right, ms, 0.85))

    from scipy import stats

    graded = [
        (kind, level, s)
        for i, s in enumerate(_any_task(n, seed))
        for kind, level in [
            (DEGRADATIONS[i % len(DEGRADATIONS)], LEVELS[i // len(DEGRADATIONS) % len(LEVELS)])
        ]
    ]
    images = _pixels(
        degrade(render(s, seed), kind, level, i) for i, (kind, level, s) in enumerate(graded)
    )
    asked, details = [_prompt(s) for _, _, s in graded], None
    for name in with_gold("DeQA"):
        scores, ms = _timed(rewards[name], images, asked)
        found = pd.DataFrame(
            {"kind": [g[0] for g in graded], "level": [g[1] for g in graded], "score": scores}
        )
        details = found if details is None else details
        resampled = np.random.default_rng(seed).integers(len(found), size=(1000, len(found)))
        correlations = [
            stats.spearmanr(found.level.values[r], scores[r]).statistic for r in resampled
        ]
        rows.append(
            dict(
                reward=name,
                test="rank correlation with the true level",
                value=stats.spearmanr(found.level, scores).statistic,
                low=np.percentile(correlations, 2.5),
                high=np.percentile(correlations, 97.5),
                n=len(found),
                aim=0.9,
                ms=ms,
            )
        )
    return pd.DataFrame(rows), details


def _any_task(n: int, seed: int) -> list[Spec]:
    """Test specs of all three prompt tasks, mixed."""
    specs = [
        s
        for task in ("geneval", "ocr", "pickscore")
        for s in sample_specs(task, "test", -(-n // 3), seed)
    ]
    random.Random(seed).shuffle(specs)
    return specs[:n]


def clean_renders(task: str, split: str, n: int, seed: int = 0) -> torch.Tensor:
    """(n, 3, 64, 64) in [0, 1]: a right, unspoiled picture of each of the first `n` prompts of a split, what
    samples should be like."""
    from .build import PROMPT_COUNTS, SEED

    if not 1 <= n <= PROMPT_COUNTS[split]:
        raise ValueError(f"the {split} split has {PROMPT_COUNTS[split]} prompts a task, not {n}")
    return _pixels(
        render(spec, seed + i)
        for i, spec in enumerate(sample_specs(task, split, PROMPT_COUNTS[split], SEED)[:n])
    )


def render_distance(
    table: pd.DataFrame,
    embed: Callable[[torch.Tensor], np.ndarray],
    seed: int = 0,
    split: str = "test",
) -> pd.DataFrame:
    """How far every model's samples are from clean renders of the same prompts (`kernel_distance`): model,
    mean, low, high (95 %), n.

    `table` is `evaluate`'s, with the same `embed`, over the first prompts of each task of a split; of several
    trainings (`train_seed`) the first counts.
    """
    first = table[table["repeat"] == table["repeat"].min()]
    first = first[first["train_seed"] == 0] if "train_seed" in first else first
    counts = first[first["model"] == first["model"].iloc[0]].groupby("task", sort=False).size()
    clean = embed(torch.cat([clean_renders(task, split, n, seed) for task, n in counts.items()]))
    return pd.DataFrame(
        [
            dict(
                model=model,
                **dict(
                    zip(
                        ("mean", "low", "high"), kernel_distance(np.stack(rows["embedding"]), clean)
                    )
                ),
                n=len(rows),
            )
            for model, rows in first.groupby("model", sort=False)
        ]
    )
