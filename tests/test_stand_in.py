"""Stable Diffusion 3.5's architecture with random weights: the policy and the losses run on it."""

import torch

from flowopd_lib.bench.speed import run_case, setting
from flowopd_lib.bench.stand_in import TINY, write_sd35
from flowopd_lib.objectives import OPD, Share
from flowopd_lib.prompts import TASKS
from flowopd_lib.rollout import Sampler, sample


def test_it_has_what_tells_sd35_from_sd3_and_distils(tmp_path):
    folder = write_sd35(tmp_path, TINY, torch.float32)
    policy, schedule = setting(str(folder), "cpu", torch.float32, 4, TASKS)
    blocks = policy.transformer.transformer_blocks
    assert [block.attn2 is not None for block in blocks] == [True, True, False]
    assert blocks[0].attn.norm_q.weight.shape == (64,)
    prompts = schedule.draw(0).prompts
    tokens = policy.encode([p.text for p in prompts]).tokens
    assert tokens.shape == (4, 77 + 128, 64)
    assert sample(policy, prompts, range(4), Sampler(2)).shape == (4, 3, 64, 64)
    objective = OPD(schedule, {task: task for task in TASKS}, Sampler(3, "sde"), mar=0.0)
    policy.train_adapter("student")
    for loss in objective.losses(policy, "student", objective.collect(policy, "student", 0, Share()), 0):
        loss.backward()
    moved = {k for k, p in policy.adapter_parameters("student").items() if p.grad.abs().max() > 0}
    assert any(".attn2.to_q.lora_B" in key for key in moved)


def test_the_benchmark_runs_on_it(tmp_path):
    class Pipe:
        sent = []
        asked = iter([2, None])

        def send(self, what):
            self.sent.append(what)

        def recv(self):
            return next(self.asked)

    folder = write_sd35(tmp_path, TINY, torch.float32)
    threads, pipe = torch.get_num_threads(), Pipe()
    run_case("grpo", str(folder), "cpu", torch.float32, 8, pipe)
    torch.set_num_threads(threads)
    ready, seconds, end = pipe.sent
    assert ready == "ready" and seconds > 0 and end["flop"] > 0
