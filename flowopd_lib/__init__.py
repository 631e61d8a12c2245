"""Flow-OPD lab: on-policy distillation of flow-matching text-to-image models. What a notebook imports."""
import diffusers
import transformers

# Notebooks and logs are for results: no bar for each of nine files loaded, no advice about torchvision, which we do not use.
for library in (diffusers, transformers):
    library.utils.logging.set_verbosity_error()
    library.utils.logging.disable_progress_bar()

from . import tinyworld  # noqa: E402
from .evaluate import (diversity, evaluate, gain_kept, home_scores, kernel_distance, mean_interval, model_scores, paired_differences, paper_average, probe_of,
                       score, summary)
from .launch import InProcess, Launched, Look, some_prompts
from .merge import merge, sft_start
from .objectives import GRPO, OPD, SFT, grpo_mix, task_rewards
from .policy import FlowPolicy
from .prompts import Prompt, load_prompts, save_prompts
from .rollout import Sampler, initial_noise, sample, trajectory
from .runs import check_range, write_json
from .schedule import Schedule
from .train import StepInfo, TrainConfig, TrainingDiverged, fit, train
from .viz import (captions_of, gain_matrix, image_grid, interference_figure, judge_figure, kl_figure, model_panels, probe_curves, readable, score_bars,
                  taylor_figure, training_curves, use_style, walk_figure)
from .widgets import Playground, SampleGallery, TrainingMonitor, TrajectoryExplorer

__all__ = ["captions_of", "check_range", "diversity", "evaluate", "fit", "FlowPolicy", "gain_kept", "gain_matrix", "GRPO", "grpo_mix", "home_scores",
           "image_grid", "initial_noise", "InProcess", "interference_figure", "judge_figure", "kernel_distance", "kl_figure", "Launched", "load_prompts",
           "Look", "mean_interval", "merge", "model_panels", "model_scores", "OPD", "paired_differences", "paper_average", "Playground", "probe_curves",
           "probe_of", "Prompt", "readable", "sample", "SampleGallery", "Sampler", "save_prompts", "Schedule", "score", "score_bars", "SFT", "sft_start",
           "some_prompts", "StepInfo", "summary", "task_rewards", "taylor_figure", "tinyworld", "train", "TrainConfig", "training_curves",
           "TrainingDiverged", "TrainingMonitor", "trajectory", "TrajectoryExplorer", "use_style", "walk_figure", "write_json"]
