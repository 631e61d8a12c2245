"""Flow-OPD lab: on-policy distillation of flow-matching text-to-image models. What a notebook imports."""
import diffusers
import transformers

# Notebooks and logs are for results: no bar for each of nine files loaded, no advice about torchvision, which we do not use.
for library in (diffusers, transformers):
    library.utils.logging.set_verbosity_error()
    library.utils.logging.disable_progress_bar()

from . import tinyworld  # noqa: E402
from .evaluate import evaluate, mean_interval, score, summary
from .policy import FlowPolicy
from .prompts import Prompt, load_prompts, save_prompts
from .rollout import Sampler, initial_noise, sample, trajectory
from .runs import check_range, write_json
from .viz import captions_of, image_grid, judge_figure, readable, score_bars, trajectory_strip, use_style

__all__ = ["FlowPolicy", "Prompt", "Sampler", "captions_of", "check_range", "evaluate", "image_grid", "initial_noise", "judge_figure", "load_prompts", "mean_interval",
           "readable", "sample", "save_prompts", "score", "score_bars", "summary", "tinyworld", "trajectory",
           "trajectory_strip", "use_style", "write_json"]
