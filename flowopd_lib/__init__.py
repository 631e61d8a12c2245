"""Flow-OPD lab: on-policy distillation of flow-matching text-to-image models. What a notebook imports."""

import os

# Read when torch is loaded, so before: threads that wait by spinning, torch's default, starve those of any
# other job, and two jobs beside one another take 4 to 10 times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from .benchmarks import Benchmark, load_benchmark
from .evaluate import evaluate, probe_of, score
from .files import read_lines, write_json, write_table
from .fit import fit
from .inputs import SEED, SHARES, begin, check_value, list_of, one_of, some_of, within
from .jobs.lab import Lab
from .jobs.launch import InProcess, Look, some_prompts
from .jobs.processes import Launched
from .jobs.recipes import build, grpo_mix
from .merge import merge
from .objectives import GRPO, OPD, SFT
from .plots.figures import (
    captions_of,
    gold_figure,
    image_grid,
    model_panels,
    paths_figure,
    pictures_of,
    probe_curves,
    readable,
    score_bars,
    training_curves,
    use_style,
)
from .plots.interference_figures import (
    directions_figure,
    gain_matrix,
    interference_figure,
    taylor_figure,
    ways_figure,
)
from .plots.playground import known_prompts
from .plots.study_figures import kl_figure, reward_figure, steps_figure, walk_figure
from .plots.widgets import Playground, SampleGallery, TrainingMonitor, TrajectoryExplorer
from .policy import FlowPolicy
from .prompts import Prompt
from .rollout import Sampler, initial_noise, sample, trajectory
from .schedule import Schedule
from .stats import (
    diversity,
    gain_kept,
    gold_gains,
    home_scores,
    kernel_distance,
    mean_interval,
    model_scores,
    paired_differences,
    paper_average,
    summary,
)
from .train import StepInfo, TrainConfig, TrainingDiverged, train

__all__ = [
    "begin",
    "build",
    "captions_of",
    "check_value",
    "directions_figure",
    "diversity",
    "evaluate",
    "fit",
    "FlowPolicy",
    "gain_kept",
    "gain_matrix",
    "gold_figure",
    "gold_gains",
    "GRPO",
    "grpo_mix",
    "home_scores",
    "image_grid",
    "initial_noise",
    "InProcess",
    "interference_figure",
    "reward_figure",
    "kernel_distance",
    "kl_figure",
    "known_prompts",
    "Lab",
    "Launched",
    "list_of",
    "load_benchmark",
    "Look",
    "mean_interval",
    "merge",
    "model_panels",
    "model_scores",
    "one_of",
    "OPD",
    "paired_differences",
    "paper_average",
    "paths_figure",
    "pictures_of",
    "Playground",
    "probe_curves",
    "probe_of",
    "Prompt",
    "read_lines",
    "readable",
    "sample",
    "SampleGallery",
    "Sampler",
    "Schedule",
    "score",
    "score_bars",
    "SEED",
    "SHARES",
    "SFT",
    "some_of",
    "some_prompts",
    "StepInfo",
    "steps_figure",
    "summary",
    "taylor_figure",
    "train",
    "TrainConfig",
    "training_curves",
    "TrainingDiverged",
    "TrainingMonitor",
    "trajectory",
    "TrajectoryExplorer",
    "use_style",
    "walk_figure",
    "ways_figure",
    "within",
    "Benchmark",
    "write_json",
    "write_table",
]
