"""The pure parts of the trajectory explorer and the playground."""

import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_rgb
from small_policy import SmallPolicy

from flowopd_lib import (
    OPD,
    FlowPolicy,
    Prompt,
    Sampler,
    Schedule,
    load_benchmark,
    trajectory,
    walk_figure,
)
from flowopd_lib.plots.figures import model_colors
from flowopd_lib.plots.playground import (
    Trial,
    draw_findings,
    known_prompts,
    prompt_of,
    table_of,
    try_prompt,
)
from flowopd_lib.plots.trajectories import heat, step_weight, walk_through
from flowopd_lib.rewards import Detection

BENCHMARK = load_benchmark()

PROMPT = Prompt("a photo of one red star", "geneval")


@pytest.mark.parametrize("kind", ["ode", "sde", "cps"])
def test_a_walks_kl_is_what_opd_minimises_at_the_same_states(kind):
    teacher = torch.tensor([[0.3, -0.2], [0.1, 0.4]])
    policy, sampler = SmallPolicy(2, teacher=teacher), Sampler(5, kind, 0.6)
    walk = walk_through(
        policy, PROMPT, 3, sampler, {"base": None, "expert": "teacher"}, "base", ["expert"]
    )
    assert (
        walk.noisy.shape == walk.clean.shape == (5, 3, 1, 1)
        and walk.difference["expert"].shape == (5, 1, 1)
        and walk.sigmas[0] == 1
    )
    objective = OPD(Schedule({"geneval": [PROMPT]}, 1), {"geneval": "teacher"}, sampler, mar=0.0)
    for step, kl in zip(trajectory(policy, [PROMPT], [3], sampler), walk.kl["expert"]):
        if step.sigma_next == 0:
            assert np.isnan(kl), "the last step has no noise"
            continue
        target = policy.velocity(step.x, step.sigma, None, adapter="teacher")
        assert kl == pytest.approx(objective._distance(step, step.v, target).item(), rel=1e-5)
        assert walk.difference["expert"][step.index] == pytest.approx(
            (step.v - target)[0].square().mean(0).sqrt().numpy()
        )
    assert (
        "step 2 of 5" in walk.alt(1)
        and "expert" in walk.alt(1)
        and "none at this step" in walk.alt(4)
    )
    assert np.isnan(step_weight(Sampler(5, "sde", 0.0), 0.8, 0.6))
    with pytest.raises(ValueError, match="no model 'expert 2'.*base, expert"):
        walk_through(
            policy, PROMPT, 3, sampler, {"base": None, "expert": "teacher"}, "expert 2", []
        )


def test_two_threads_that_ask_one_policy_do_not_mix_its_adapters():
    policy = FlowPolicy(BENCHMARK.base)
    models = {name: name for name in BENCHMARK.load_experts(policy)}

    def kl(_):
        return walk_through(
            policy, PROMPT, 0, Sampler(6, "sde"), models, "ocr", ["geneval", "deqa"]
        ).kl

    alone = kl(0)
    with ThreadPoolExecutor(3) as threads:
        for table in threads.map(kl, range(3)):
            pd.testing.assert_frame_equal(table, alone)


def test_a_walks_figure_has_every_picture_and_a_curve_per_teacher():
    policy = SmallPolicy(2, teacher=torch.ones(2, 2))
    models = {"base": None, "expert": "teacher"}
    figure = walk_figure(
        walk_through(policy, PROMPT, 0, Sampler(4, "sde"), models, "base", ["expert"]), "title", 4
    )
    assert len(figure.axes) == 4 * 3 + 1 and len(figure.axes[-1].lines) == 1
    assert (
        len(
            walk_figure(
                walk_through(policy, PROMPT, 0, Sampler(4), models, "base", []), "title", 4
            ).axes
        )
        == 8
    )
    field = np.array([[0.0, 1.0], [2.0, 4.0]])
    assert (
        np.asarray(heat(field, 4.0, 2))[0, 0].sum()
        < 20
        < 600
        < np.asarray(heat(field, 4.0, 2))[1, 1].sum()
    )


def test_a_typed_prompt_is_rewardd_by_those_who_can(rewards):
    known = known_prompts(BENCHMARK, ["test"])
    geneval = next(p for p in known if p.task == "geneval")
    prompt, told = prompt_of(f"  {geneval.text.upper()} ", rewards, known)
    assert prompt is geneval and prompt.metadata["include"] and "GenEval, PickScore, DeQA" in told
    prompt, told = prompt_of('a sign that says "HELLO"', rewards, known)
    assert (
        prompt.task == "ocr" and "“HELLO” has to be read" in told and "OCR, PickScore, DeQA" in told
    )
    prompt, told = prompt_of('nothing between ""', rewards, known)
    assert prompt.task == "own" and told == (
        "Rewardd by PickScore, DeQA only; OCR needs a text in double quotes; GenEval a prompt of its file."
    )
    with pytest.raises(ValueError, match="there is no prompt"):
        prompt_of("  ", rewards, known)


def test_every_reward_says_what_it_saw(policy, rewards):
    models = {"base": None, "again": None}
    known = known_prompts(BENCHMARK, ["test"])
    red = next(p for p in known if p.tag == "single_object")
    trials = try_prompt(policy, red, rewards, models, Sampler(8), 1)
    assert [t.model for t in trials] == ["base", "again"] and torch.equal(
        trials[0].image, trials[1].image
    )
    assert set(trials[0].scores) == {"GenEval", "PickScore", "DeQA"} and bool(
        trials[0].scores["GenEval"]
    ) == (trials[0].verdict == "")
    assert all(d.score > rewards["GenEval"].detector.threshold for d in trials[0].seen)
    typed = prompt_of('a sign that says "GWEN"', rewards)[0]
    sign = try_prompt(policy, typed, rewards, {"base": None}, Sampler(8), 1)[0]
    assert (
        set(sign.scores) == {"OCR", "PickScore", "DeQA"}
        and sign.region
        and f"read: {sign.read or 'nothing'}" in sign.alt
    )
    assert list(table_of([sign]).columns) == [
        "model",
        "OCR",
        "PickScore",
        "DeQA",
        "read",
        "seen",
        "wrong",
    ]
    only = try_prompt(policy, red, {"DeQA": rewards["DeQA"]}, {"base": None}, Sampler(2))[0]
    assert set(only.scores) == {"DeQA"} and only.seen == () and only.read == ""
    with pytest.raises(ValueError, match="no models are chosen"):
        try_prompt(policy, red, rewards, {})


def test_findings_are_drawn_where_they_are():
    trial = Trial(
        "base",
        PROMPT,
        0,
        torch.full((3, 64, 64), 0.5),
        {"DeQA": 3.0},
        "GWEN",
        (8, 40, 56, 60),
        (Detection("star", "red", 0.91, (10.0, 12.0, 30.0, 32.0)),),
    )
    plain, drawn = (
        np.asarray(draw_findings(trial, 256, findings)).astype(int) for findings in (False, True)
    )
    changed = np.abs(drawn - plain).sum(2) > 0
    assert not np.ptp(plain) and plain.shape == (256, 256, 3)
    assert changed[50:126, 39:41].all() and changed[162:238, 31:33].all(), "the boxes' left edges"
    assert changed[36:46, 40:100].any() and not changed[60:110, 60:110].any(), (
        "a label above, and what is inside left as it is"
    )
    assert (
        trial.alt == "base, seed 0: a photo of one red star; DeQA 3.00; read: GWEN; seen: red star"
    )


def test_no_two_models_have_colours_that_are_hardly_told_apart():
    experts = [f"{name} expert" for name in ("geneval", "ocr", "pickscore", "deqa")]
    colors = model_colors(["base", *experts, "merged", "student", "GRPO-Mix", "student from sft"])
    rgb = [np.array(to_rgb(c)) for c in colors.values()]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(rgb, 2)) > 0.2
    assert colors["base"] == "#666666"
    assert len(set(model_colors([f"training {i}" for i in range(12)]).values())) == 12
