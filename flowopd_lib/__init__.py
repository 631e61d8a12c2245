"""Flow-OPD lab: on-policy distillation of flow-matching text-to-image models. What a notebook imports."""
import diffusers
import transformers

# Notebooks and logs are for results: no bar for each of nine files loaded, no advice about torchvision, which we do not use.
for library in (diffusers, transformers):
    library.utils.logging.set_verbosity_error()
    library.utils.logging.disable_progress_bar()

from . import tinyworld  # noqa: E402
from .evaluate import diversity, evaluate, gain_kept, kernel_distance, mean_interval, paired_differences, paper_average, score, summary
from .merge import merge
from .objectives import GRPO, OPD, SFT
from .policy import FlowPolicy
from .prompts import Prompt, load_prompts, save_prompts
from .rollout import Sampler, initial_noise, sample, trajectory
from .runs import check_range, write_json
from .schedule import Schedule
from .train import StepInfo, TrainConfig, TrainingDiverged, train
from .viz import (captions_of, gain_matrix, image_grid, interference_figure, judge_figure, model_panels, readable, score_bars, taylor_figure,
                  training_curves, trajectory_strip, use_style)

__all__ = ["captions_of", "check_range", "diversity", "evaluate", "FlowPolicy", "gain_kept", "gain_matrix", "GRPO", "image_grid", "initial_noise", "interference_figure",
           "judge_figure", "kernel_distance", "load_prompts", "mean_interval", "merge", "model_panels", "OPD", "paired_differences",
           "paper_average", "Prompt", "readable", "sample", "Sampler", "save_prompts", "Schedule", "score", "score_bars", "SFT",
           "StepInfo", "summary", "taylor_figure", "tinyworld", "train", "TrainConfig", "training_curves", "TrainingDiverged", "trajectory", "trajectory_strip",
           "use_style", "write_json"]
