"""On-policy distillation of flow-matching text-to-image models: sampler, losses, rewards,
experiments.

Names are imported from their modules when they are first used: torch and diffusers take seconds.
"""

import os
from importlib import import_module

# Read when torch is loaded, so before: threads that wait by spinning, torch's default, starve those
# of any other process, and two trainings at once take 4 to 10 times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

_MODULES = {
    "benchmarks": "Benchmark load_benchmark",
    "data": "Prompt Schedule",
    "files": "read_lines write_json write_table",
    "losses": "GRPO GRPOConfig OPD OPDConfig SFT SFTConfig Shard advantages pathwise anchor_loss",
    "merge": "merge_loras",
    "policy": "FlowPolicy",
    "rewards": "DeQA GenEval OCR PickScore RemoteReward Reward",
    "rollout": "Sampler initial_noise sample trajectory visited_states",
    "sde": "log_prob transition kl_weight",
    "stats": (
        "diversity fraction_kept gold_gains in_domain_scores kernel_distance mean_interval "
        "model_scores paired_differences paper_average summary"
    ),
    "train": "TrainConfig fit",
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names.split()}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
