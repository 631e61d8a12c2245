"""Flow-OPD lab: on-policy distillation of flow-matching text-to-image models. What a notebook imports."""

import os

# Read when torch is loaded, so before: threads that wait by spinning, torch's default, starve those of any
# other job, and two jobs beside one another take 4 to 10 times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from .evaluate import evaluate, probe_of, score
from .files import read_lines, write_json, write_table
from .fit import fit
from .inputs import SEED, begin, counts_of, list_of, one_of, some_of, within
from .jobs.launch import InProcess, Launched, Look, some_prompts
from .looking.figures import (
    captions_of,
    image_grid,
    model_panels,
    probe_curves,
    readable,
    score_bars,
    training_curves,
    use_style,
)
from .looking.study_figures import (
    gain_matrix,
    interference_figure,
    judge_figure,
    kl_figure,
    steps_figure,
    taylor_figure,
    walk_figure,
)
from .looking.widgets import Playground, SampleGallery, TrainingMonitor, TrajectoryExplorer
from .merge import merge, sft_start
from .objectives import GRPO, OPD, SFT, grpo_mix, task_rewards
from .policy import FlowPolicy
from .prompts import Prompt, load_prompts, save_prompts
from .rollout import Sampler, initial_noise, sample, trajectory
from .schedule import Schedule
from .stats import (
    diversity,
    gain_kept,
    home_scores,
    kernel_distance,
    mean_interval,
    model_scores,
    paired_differences,
    paper_average,
    summary,
)
from .train import StepInfo, TrainConfig, TrainingDiverged, train
from .worlds import tiny as tinyworld  # noqa: E402

__all__ = [
    "begin",
    "captions_of",
    "counts_of",
    "diversity",
    "evaluate",
    "fit",
    "FlowPolicy",
    "gain_kept",
    "gain_matrix",
    "GRPO",
    "grpo_mix",
    "home_scores",
    "image_grid",
    "initial_noise",
    "InProcess",
    "interference_figure",
    "judge_figure",
    "kernel_distance",
    "kl_figure",
    "Launched",
    "list_of",
    "load_prompts",
    "Look",
    "mean_interval",
    "merge",
    "model_panels",
    "model_scores",
    "one_of",
    "OPD",
    "paired_differences",
    "paper_average",
    "Playground",
    "probe_curves",
    "probe_of",
    "Prompt",
    "read_lines",
    "readable",
    "sample",
    "SampleGallery",
    "Sampler",
    "save_prompts",
    "Schedule",
    "score",
    "score_bars",
    "SEED",
    "SFT",
    "sft_start",
    "some_of",
    "some_prompts",
    "StepInfo",
    "steps_figure",
    "summary",
    "task_rewards",
    "taylor_figure",
    "tinyworld",
    "train",
    "TrainConfig",
    "training_curves",
    "TrainingDiverged",
    "TrainingMonitor",
    "trajectory",
    "TrajectoryExplorer",
    "use_style",
    "walk_figure",
    "within",
    "write_json",
    "write_table",
]
