"""The loading code of the real rewards, on classes of the same kind with tiny random weights."""

import json
import shutil

import dummy_rewards
import numpy as np
import pytest
import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont
from safetensors.torch import load_file, save_file
from transformers import CLIPModel

from flowopd_lib.benchmarks.tiny import ASSETS
from flowopd_lib.data import Prompt
from flowopd_lib.rewards import (
    BLIPVQA,
    OCR,
    Aesthetic,
    DeQA,
    GenEval,
    Mask2FormerDetector,
    PickScore,
)
from flowopd_lib.rewards.base import embed_images, load_clip, score_images
from flowopd_lib.rewards.compbench import chunks_of
from flowopd_lib.rewards.server import COLORS, LABELS, ColorClassifier

RGB = {color: ImageColor.getrgb(color) for color in COLORS}
PROMPTS = [Prompt("a red apple and a green bench", "geneval")] * 4


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("rewards")
    names = ("mask2former", "clip", "aesthetic", "blip_vqa")
    return {n: getattr(dummy_rewards, f"write_{n}")(root / n) for n in names}


@pytest.fixture(scope="module")
def detector(folders):
    return Mask2FormerDetector(folders["mask2former"], folders["clip"], side=64)


@pytest.fixture
def aesthetic(folders):
    return Aesthetic(folders["aesthetic"], folders["aesthetic"] / "head.safetensors", batch=3)


@pytest.fixture
def blip(folders):
    return BLIPVQA(folders["blip_vqa"])


def blobs(n, size=(96, 80), seed=0):
    """(n, 3, *size): soft blobs of colour, all different."""
    noise = torch.rand(n, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(noise, size=size, mode="bicubic").clamp(0, 1)


def as_pixels(images):
    return (images * 255).round().byte().permute(0, 2, 3, 1).numpy()


# ---- GenEval's detector


def test_the_detector_has_genevals_labels_and_no_objects_of_nan(detector, folders):
    assert detector.labels == LABELS and len(set(LABELS)) == 80
    assert detector.name == "mask2former (transformers)" and detector.size is None
    own = Mask2FormerDetector(folders["mask2former"], folders["clip"], side=64)
    own.model.get_parameter("class_predictor.weight").fill_(float("nan"))
    with pytest.raises(ValueError, match="detector gave NaN"):
        own(as_pixels(blobs(1)))


@pytest.mark.parametrize("size", [(96, 80), (50, 130)])
def test_the_detector_gives_the_same_alone_and_in_a_batch(detector, size):
    pixels = as_pixels(blobs(9, size))
    detections = detector(pixels)
    assert len(detections) == 9 and sum(map(len, detections)) > 9
    for image, found in zip(pixels, detections):
        both = (sorted(ds, key=lambda d: d.score) for ds in (found, detector(image[None])[0]))
        for d, alone in zip(*both, strict=True):
            assert (d.label, d.color, d.box) == (alone.label, alone.color, alone.box)
            assert d.score == pytest.approx(alone.score, abs=1e-5) and d.score > detector.threshold
            left, top, right, bottom = d.box
            assert 0 <= left < right <= size[1] and 0 <= top < bottom <= size[0]
            assert d.color in COLORS


def test_geneval_scores_with_the_detector(detector):
    reward, found = GenEval(detector), detector(as_pixels(blobs(1)))[0][0]
    wanted = {"class": found.label, "count": 1, "color": found.color}
    prompts = [Prompt("a thing", "geneval", {"tag": "colors", "include": [wanted]})]
    assert score_images(reward, blobs(1), prompts).tolist() == [1]
    wanted["color"] = next(c for c in COLORS if c != found.color)
    assert score_images(reward, blobs(1), prompts).tolist() == [0]


# ---- colours


@pytest.fixture
def classifier(folders):
    return ColorClassifier(*load_clip(folders["clip"], "CLIP", "cpu"))


def test_a_colour_is_the_mean_of_three_text_embeddings(classifier, folders):
    clip = CLIPModel.from_pretrained(folders["clip"])
    texts = ["a photo of a pink car", "a photo of a pink-colored car", "a photo of a pink object"]
    inputs = classifier.processor.tokenizer(texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        z = clip.get_text_features(**inputs).pooler_output
    mean = (z / z.norm(dim=-1, keepdim=True)).mean(0)
    cars = classifier.text_embeddings("car")
    assert torch.allclose(cars[COLORS.index("pink")], mean / mean.norm(), atol=1e-5)
    assert classifier.text_embeddings("car") is cars  # computed once a class
    assert classifier.text_embeddings("bus") is not cars


def test_objects_reach_clip_cut_out_and_in_their_own_colour(classifier):
    """With images of plain colours in place of texts, objects of any size have their own colour."""
    plain = [Image.new("RGB", (50, 40), RGB[color]) for color in COLORS]
    classifier._texts["car"] = embed_images(classifier.model, classifier.processor, plain, 10)
    car = {"label": "car"}
    for i, color in enumerate(COLORS):
        image, mask = np.full((90, 90, 3), RGB[COLORS[i - 1]], np.uint8), np.zeros((90, 90), bool)
        mask[10 : 30 + i, 20 : 70 - i] = True
        image[mask] = RGB[color]
        car["box"] = (20, 10, 70 - i, 30 + i)
        (found,) = classifier(Image.fromarray(image), [car], [mask])
        assert found == car | {"color": color}
    crops = []
    classifier.embed = lambda kind, images: crops.extend(images) or torch.zeros(1, 32)
    mask[10, 20] = False
    classifier(Image.fromarray(image), [car], [mask])
    assert crops[0].size == (41, 29) and crops[0].getpixel((0, 0)) == (153, 153, 153)
    assert crops[0].getpixel((1, 0)) == RGB[color]


def test_nan_of_clip_is_no_colour(classifier):
    classifier.model.get_parameter("visual_projection.weight").fill_(float("nan"))
    car = {"label": "car", "box": (0, 0, 9, 9)}
    with pytest.raises(ValueError, match="CLIP gave NaN"):
        classifier(Image.new("RGB", (9, 9)), [car], [np.ones((9, 9), bool)])


# ---- PickScore, Aesthetic, DeQA


def test_pickscore_is_undivided_and_may_have_its_processor_elsewhere(folders, tmp_path):
    for file in ("config.json", "model.safetensors"):
        shutil.copy(folders["clip"] / file, tmp_path)
    with pytest.raises(FileNotFoundError, match="no processor of PickScore"):
        PickScore(tmp_path)
    reward = PickScore(tmp_path, processor_id=folders["clip"], batch=3)
    assert reward.range == pytest.approx((-100, 100), abs=0.01)
    pixels = list(as_pixels(blobs(4)))
    inputs = reward.processor(images=pixels, text=[PROMPTS[0].text], return_tensors="pt")
    with torch.no_grad():
        expected = CLIPModel.from_pretrained(tmp_path)(**inputs).logits_per_image[:, 0].numpy()
    assert score_images(reward, blobs(4), PROMPTS) == pytest.approx(expected, abs=1e-3)


def test_aesthetic_is_the_head_on_the_unit_embedding(aesthetic, folders):
    head, clip = dummy_rewards.aesthetic_head(), CLIPModel.from_pretrained(folders["aesthetic"])
    inputs = aesthetic.processor(images=list(as_pixels(blobs(4))), return_tensors="pt")
    with torch.no_grad():
        z = clip.get_image_features(**inputs).pooler_output
    z = z / z.norm(dim=-1, keepdim=True)
    for n in (0, 2, 4, 6, 7):
        z = z @ head[f"layers.{n}.weight"].T + head[f"layers.{n}.bias"]
    scores = score_images(aesthetic, blobs(4), PROMPTS)
    assert scores == pytest.approx(z[:, 0].numpy(), abs=1e-5)
    assert aesthetic.held_out


def test_anything_but_the_aesthetic_head_is_an_error(folders, tmp_path):
    head = dummy_rewards.aesthetic_head()
    torch.save(head, tmp_path / "head.pth")
    save_file({**head, "layers.0.weight": torch.zeros(1024, 48)}, tmp_path / "other.safetensors")
    del head["layers.2.bias"]
    save_file(head, tmp_path / "part.safetensors")
    for name in ("head.pth", "other.safetensors", "part.safetensors", "none.safetensors"):
        with pytest.raises(ValueError, match=f"{name} is not LAION's aesthetic head"):
            Aesthetic(folders["clip"], tmp_path / name)


def test_deqa_score_itself_is_sent_to_the_reward_server(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mplug_owl2"}))
    with pytest.raises(ValueError, match="no transformers image classifier.*reward server"):
        DeQA(tmp_path)


def test_every_processor_uses_pil(folders, detector, blip):
    of_clip = [PickScore(folders["clip"]).processor, detector.classify.processor]
    others = [DeQA(ASSETS / "deqa"), detector, blip]
    processors = [p.image_processor for p in of_clip] + [one.processor for one in others]
    assert all(type(processor).__name__.endswith("Pil") for processor in processors)


def test_missing_weights_are_an_error(folders, tmp_path):
    folder, none = shutil.copytree(folders["clip"], tmp_path / "clip"), tmp_path / "none"
    weights = load_file(folder / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="lacks the weights of 1 .* visual_projection.weight"):
        PickScore(folder)
    for load in (
        lambda: PickScore(none),
        lambda: DeQA(none),
        lambda: BLIPVQA(none),
        lambda: Aesthetic(none, "head"),
        lambda: Mask2FormerDetector(none, folders["clip"]),
        lambda: Mask2FormerDetector(folders["mask2former"], none),
    ):
        with pytest.raises(FileNotFoundError, match="no .* weights at .*none"):
            load()


# ---- OCR


def test_the_lines_of_a_whole_image_are_joined():
    images, texts = [], {"OPEN\nDAILY": 60, "FRESH BREAD AND COFFEE": 22, "Exit": 60, "": 60}
    for text, size in texts.items():
        image, font = Image.new("RGB", (320, 320), "white"), ImageFont.load_default(size)
        ImageDraw.Draw(image).multiline_text((20, 60), text, "black", font, spacing=50)
        images.append(torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255)
    read = OCR().read(torch.stack(images), PROMPTS)
    joined = [r.lower().replace(" ", "") for r in read]
    assert joined == ["opendaily", "freshbreadandcoffee", "exit", ""]


# ---- T2I-CompBench


@pytest.mark.parametrize(
    "prompt, chunks",
    [
        ("a green bench and a blue bowl", ["a green bench", "a blue bowl"]),
        ("an oval dish, and a slice of pie", ["an oval dish", "a slice", "pie"]),
        ("a black and white cat sits in a sink", []),
        ("The tall tower and the short hut dominated the skyline.", []),
        ("a cat and", []),
    ],
)
def test_chunks_of_lists_are_found_and_none_of_sentences(prompt, chunks):
    assert chunks_of(prompt) == chunks


def test_blip_gives_the_probability_of_transformers_own_generation(blip):
    """With the token that BLIP's questions start with, which transformers' processor leaves out."""
    (pixels,), start = as_pixels(blobs(1)), blip.model.config.text_config.bos_token_id
    question = blip.tokenizer("a red apple?", return_tensors="pt")
    question.input_ids[0, 0] = start + 1
    del question["token_type_ids"]
    options = {"max_new_tokens": 1, "do_sample": False, "output_scores": True}
    pixel_values = blip.processor(pixels, return_tensors="pt").pixel_values
    inputs = {**question, "pixel_values": pixel_values, "return_dict_in_generate": True}
    logits = blip.model.generate(**inputs, **options).scores[0][0]
    yes, no = logits[blip.yes_no].softmax(-1)
    (score,) = blip(blobs(1), [Prompt("a red Apple.", "color")])
    assert score == pytest.approx(yes.item(), abs=1e-5) and 0.01 < yes < 0.99


def test_blipvqa_is_the_product_over_the_chunks(folders, tmp_path):
    sentence, file = "A cat sits on it, on the left.", tmp_path / "chunks.json"
    objects = ["A cat", "it", "a long dish (soup)"]
    file.write_text(json.dumps({sentence: [*objects, "the left"]}))
    blip, images = BLIPVQA(folders["blip_vqa"], file, batch=2), blobs(3)
    asked = {"a red apple and a green bench": ["a red apple", "a green bench"]}
    asked |= {sentence: objects, "a cup": ["a cup"]}
    scores = score_images(blip, images, [Prompt(text, "color") for text in asked])
    assert np.ptp(scores) > 1e-3 and blip.held_out
    for image, score, chunks in zip(images, scores, asked.values()):
        one_by_one = [blip(image[None], [Prompt(chunk, "color")]) for chunk in chunks]
        assert score == pytest.approx(np.prod(one_by_one), abs=1e-5)


def test_prompts_without_chunks_are_an_error(blip, folders, tmp_path):
    with pytest.raises(ValueError, match="BLIPVQA knows no objects of 'A cat on a mat.'"):
        blip(blobs(1), [Prompt("A cat on a mat.", "color")])
    (tmp_path / "chunks.json").write_text('{"a cat": "a cat"}')
    with pytest.raises(ValueError, match="chunks.json: a cat: Input should be a valid list"):
        BLIPVQA(folders["blip_vqa"], tmp_path / "chunks.json")
