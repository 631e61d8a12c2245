"""What moves in a notebook."""
from __future__ import annotations

from collections.abc import Iterable, Sequence

import matplotlib.pyplot as plt
import pandas as pd
import torch
from IPython.display import display

from ..policy import FlowPolicy
from ..prompts import Prompt
from ..rollout import Sampler, sample
from ..train import StepInfo
from ..viz import image_grid, training_curves


def watch(updates: Iterable[StepInfo], policy: FlowPolicy, adapter: str, prompts: Sequence[Prompt], columns: Sequence[str], every: int = 10,
          sampler: Sampler = Sampler(20), seed: int = 0) -> pd.DataFrame:
    """Go through a training (`train`'s updates) and draw it as it goes: curves of the metrics `columns`, and below them a gallery that gets a row of
    samples of the same prompts and noise every `every` iterations. The metrics, a row an iteration; none for a training that was over.
    """
    rows, pictures, captions = [], [], []
    curves, gallery = (display(display_id=True) for _ in range(2))

    def draw(when: str) -> None:
        pictures.append(sample(policy, prompts, range(seed, seed + len(prompts)), sampler, adapter))
        captions.extend(f"{when}: {p.text}" for p in prompts)
        figures = [image_grid(torch.cat(pictures), captions, len(prompts), "Samples on the way, the same noise in a column")]
        gallery.update(figures[0])
        if rows:
            figures.append(training_curves({adapter: pd.DataFrame(rows)}, columns, f"iteration {rows[-1]['iteration'] + 1}, {rows[-1]['seconds']:.0f} s"))
            curves.update(figures[1])
        for figure in figures:
            plt.close(figure)
    draw("before")
    for info in updates:
        if info.metrics:
            rows.append({"iteration": info.iteration, "seconds": info.seconds, "loss": info.loss, **info.metrics})
            if (info.iteration + 1) % every == 0:
                draw(f"iteration {info.iteration + 1}")
    draw("after, averaged weights")
    return pd.DataFrame(rows)
