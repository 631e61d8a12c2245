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
from flowopd_lib.rewards import BLIPVQA, OCR, Aesthetic, DeQA, GenEval, PickScore, mask2former
from flowopd_lib.rewards.aesthetic import convert_head
from flowopd_lib.rewards.base import embed_images, load_clip, score_images
from flowopd_lib.rewards.compbench import chunks_of, load_compbench
from flowopd_lib.rewards.mask2former import Mask2FormerDetector, box_of, cut_out, instances
from flowopd_lib.rewards.server import COLORS, LABELS, ColorClassifier

RGB = {color: ImageColor.getrgb(color) for color in COLORS}
PROMPTS = [Prompt("a red apple and a green bench", "compbench")] * 4


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    names = {
        "mask2former": "mask2former",
        "clip": "clip",
        "aesthetic": "aesthetic",
        "blip": "blip_vqa",
    }
    root = tmp_path_factory.mktemp("rewards")
    return {n: getattr(dummy_rewards, f"write_{kind}")(root / n) for n, kind in names.items()}


@pytest.fixture(scope="module")
def detector(folders):
    return Mask2FormerDetector(folders["mask2former"], folders["clip"], side=64)


@pytest.fixture(scope="module")
def blip(folders):
    return BLIPVQA(folders["blip"])


@pytest.fixture
def aesthetic(folders):
    return Aesthetic(folders["aesthetic"], folders["aesthetic"] / "head.safetensors", batch=3)


def blobs(n, size=(96, 80), seed=0):
    """(n, 3, *size): soft blobs of colour, all different."""
    noise = torch.rand(n, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(noise, size=size, mode="bicubic").clamp(0, 1)


def as_pixels(images):
    return (images * 255).round().byte().permute(0, 2, 3, 1).numpy()


# ---- GenEval's detector


def logits_of(*queries, side=8):
    """Class and mask logits of queries given as (class logits, mask logit inside, rectangle)."""
    masks = torch.full((len(queries), side, side), -9.0)
    for mask, (_, inside, (left, top, right, bottom)) in zip(masks, queries):
        mask[top:bottom, left:right] = inside
    return torch.tensor([list(q[0]) for q in queries]).float(), masks


def test_an_instance_has_its_class_its_score_and_its_mask():
    sure, unsure, none = (9, 0, 0, 0), (0, 2, 1.5, 0), (0, 0, 0, 9)
    queries = (sure, 2, (1, 2, 5, 6)), (unsure, 9, (1, 2, 5, 6)), (none, 9, (0, 0, 8, 8))
    classes, logits = logits_of(*queries)
    labels, scores, masks = instances(classes, logits, (8, 8), 0.2)
    p, q = (torch.tensor(c).float().softmax(0) for c in (sure, unsure))
    # the second query is two classes, and overlap is not suppressed
    assert labels.tolist() == [0, 1, 2]
    expected = [float(p[0] * torch.tensor(2.0).sigmoid()), float(q[1]), float(q[2])]
    assert scores == pytest.approx(expected, 1e-3)
    assert [box_of(m) for m in masks] == [(1, 2, 5, 6)] * 3 and masks[0].sum() == 16
    assert instances(classes, logits, (8, 8), 0.6)[0].tolist() == [0]
    assert [len(x) for x in instances(classes, logits, (8, 8), 0.95)] == [0, 0, 0]


def test_boxes_are_in_pixels_of_the_image():
    *_, masks = instances(*logits_of(((9, 0, 0, 0), 9, (2, 0, 4, 8))), (80, 40), 0.5)
    assert masks.shape == (1, 80, 40) and box_of(masks[0]) == (10, 0, 20, 80)
    empty = instances(*logits_of(((9, 0, 0, 0), -9, (0, 0, 8, 8))), (8, 8), 0.0)
    assert empty[2].shape == (0, 8, 8)


def test_nan_of_the_detector_is_an_error():
    classes, masks = logits_of(((9, 0, 0, 0), 9, (0, 0, 8, 8)))
    with pytest.raises(ValueError, match="gave NaN"):
        instances(classes * float("nan"), masks, (8, 8), 0.3)


def test_instances_are_those_of_transformers_at_384_pixels(detector):
    pixels = as_pixels(blobs(3, (384, 384)))
    inputs = detector.processor(list(pixels), return_tensors="pt", **detector.options)
    with torch.no_grad():
        output = detector.model(**inputs)
    results = detector.processor.post_process_instance_segmentation(
        output, threshold=0.3, target_sizes=[(384, 384)] * 3, return_binary_maps=True
    )
    logits = zip(output.class_queries_logits, output.masks_queries_logits)
    for result, one in zip(results, logits):
        ours, segments = instances(*one, (384, 384), 0.3), result["segments_info"]
        assert len(ours[0]) == len(segments) > 1
        order = np.argsort([-s["score"] for s in segments], kind="stable")
        for label, score, mask, j in zip(*ours, order):
            assert segments[j]["label_id"] == label
            assert segments[j]["score"] == pytest.approx(score, abs=2e-6)
            assert (result["segmentation"][j].numpy() == mask).all()


def test_the_detector_has_genevals_labels(detector, folders, tmp_path):
    assert detector.labels == LABELS and len(set(LABELS)) == 80
    assert {"computer mouse", "tv remote", "computer keyboard"} < set(LABELS)
    assert detector.name == "mask2former (transformers)" and detector.size is None
    own = dummy_rewards.write_mask2former(tmp_path, ("airplane", "couch", "robot"))
    assert Mask2FormerDetector(own, folders["clip"]).labels == ("airplane", "couch", "robot")
    with pytest.raises(ValueError, match="threshold\n.*less than or equal to 1"):
        Mask2FormerDetector(own, folders["clip"], threshold=30)


@pytest.mark.parametrize("size", [(96, 80), (64, 64), (50, 130)])
def test_the_detector_gives_the_same_alone_and_in_a_batch(detector, size):
    pixels = as_pixels(blobs(9, size))
    detections = detector(pixels)
    assert len(detections) == 9 and sum(map(len, detections)) > 9
    for image, found in zip(pixels, detections):
        assert [d.score for d in found] == sorted((d.score for d in found), reverse=True)
        for d, alone in zip(found, detector(image[None])[0], strict=True):
            assert (d.label, d.color, d.box) == (alone.label, alone.color, alone.box)
            assert d.score == pytest.approx(alone.score, abs=1e-5) and d.score > detector.threshold
            left, top, right, bottom = d.box
            assert 0 <= left < right <= size[1] and 0 <= top < bottom <= size[0]
            assert d.color in COLORS


def test_at_most_16_objects_of_a_class_are_returned(detector, monkeypatch):
    scores, masks = np.linspace(0.9, 0.4, 20, dtype=np.float32), np.ones((20, 64, 64), bool)
    many = np.zeros(20, int), scores, masks
    monkeypatch.setattr(mask2former, "instances", lambda *_: many)
    (found,) = detector(as_pixels(blobs(1, (64, 64))))
    assert len(found) == 16 and found[-1].score == scores[15]


def test_geneval_scores_with_the_detector(detector):
    reward, found = GenEval(detector), detector(as_pixels(blobs(1)))[0][0]
    wanted = {"class": found.label, "count": 1, "color": found.color}
    prompts = [Prompt("a thing", "geneval", {"tag": "colors", "include": [wanted]})]
    assert score_images(reward, blobs(1), prompts).tolist() == [1]
    wanted["color"] = next(c for c in COLORS if c != found.color)
    assert score_images(reward, blobs(1), prompts).tolist() == [0]
    wanted["class"] = "mouse"
    with pytest.raises(ValueError, match="does not know the class 'mouse'"):
        reward(blobs(1), prompts)


# ---- colours


@pytest.fixture
def classifier(folders):
    return ColorClassifier(*load_clip(folders["clip"], "CLIP", "cpu"), batch=3)


def test_an_object_is_cut_out_on_gray():
    image, mask = np.zeros((20, 30, 3), np.uint8), np.zeros((20, 30), bool)
    image[:, :15], image[:, 15:] = RGB["red"], RGB["blue"]
    mask[4:10, 10:20] = True
    mask[4, 10] = False
    cut = np.array(cut_out(image, mask, box_of(mask)))
    assert cut.shape == (6, 10, 3) and cut[0, 0].tolist() == [153, 153, 153]
    assert cut[1, 0].tolist() == list(RGB["red"]) and cut[1, 9].tolist() == list(RGB["blue"])


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


def test_objects_reach_clip_in_their_own_colour(classifier):
    """With images of plain colours in place of texts, objects of any size have their own colour."""
    plain = [Image.new("RGB", (50, 40), RGB[color]) for color in COLORS]
    classifier._texts["car"] = embed_images(classifier.model, classifier.processor, plain, 10)
    crops = []
    for i, color in enumerate(COLORS):
        image, mask = np.full((90, 90, 3), RGB[COLORS[i - 1]], np.uint8), np.zeros((90, 90), bool)
        mask[10 : 30 + i, 20 : 70 - i] = True
        image[mask] = RGB[color]
        crops.append(cut_out(image, mask, box_of(mask)))
    assert classifier(crops, ["car"] * 10) == list(COLORS) and classifier([], []) == []


def test_nan_of_clip_is_an_error(classifier):
    classifier.model.get_parameter("visual_projection.weight").fill_(float("nan"))
    with pytest.raises(ValueError, match="CLIP gave NaN"):
        classifier([Image.new("RGB", (9, 9))], ["car"])


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


def test_the_aesthetic_head_is_converted_from_its_pickle(tmp_path):
    head = dummy_rewards.aesthetic_head()
    torch.save(head, tmp_path / "head.pth")
    out = convert_head(tmp_path / "head.pth", tmp_path / "head.safetensors", width=32)
    state = load_file(out)
    assert state.keys() == head.keys() and all(torch.equal(state[k], head[k]) for k in head)
    torch.save({**head, "extra": head["layers.7.bias"]}, tmp_path / "extra.pth")
    with pytest.raises(ValueError, match="extra.pth is not LAION's aesthetic head: .*extra"):
        convert_head(tmp_path / "extra.pth", tmp_path / "extra.safetensors", width=32)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"layers.2.bias": None}, "not LAION's aesthetic head: .*layers.2.bias"),
        ({"layers.4.weight": torch.zeros(64, 100)}, "layers.4.weight.*64, 100"),
        ({"layers.0.weight": torch.zeros(1024, 48)}, "layers.0.weight.*1024, 48"),
    ],
)
def test_an_aesthetic_head_with_other_weights_is_an_error(folders, tmp_path, change, message):
    state = {k: v for k, v in (dummy_rewards.aesthetic_head() | change).items() if v is not None}
    save_file(state, tmp_path / "head.safetensors")
    with pytest.raises(ValueError, match=message):
        Aesthetic(folders["clip"], tmp_path / "head.safetensors")


def test_an_aesthetic_head_that_cannot_be_loaded_is_an_error(folders, tmp_path):
    torch.save(dummy_rewards.aesthetic_head(), tmp_path / "head.pth")
    for name in ("head.pth", "none.safetensors"):
        with pytest.raises(ValueError, match=f"cannot load .*{name}, made by convert_head"):
            Aesthetic(folders["clip"], tmp_path / name)


def test_deqa_score_itself_is_sent_to_the_reward_server(folders, tmp_path):
    config = {"model_type": "mplug_owl2", "architectures": ["MPLUGOwl2LlamaForCausalLM"]}
    config["auto_map"] = {"AutoModelForCausalLM": "modeling.MPLUGOwl2LlamaForCausalLM"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for folder in (tmp_path, folders["clip"]):
        with pytest.raises(ValueError, match="no.* transformers image classifier.*reward server"):
            DeQA(folder)


def test_every_processor_uses_pil(folders, detector, blip):
    for processor in (
        PickScore(folders["clip"]).processor.image_processor,
        DeQA(ASSETS / "deqa").processor,
        detector.processor,
        detector.classify.processor.image_processor,
        blip.processor,
    ):
        assert type(processor).__name__.endswith("Pil")


NAN = {
    "PickScore": "visual_projection.weight",
    "Aesthetic": "visual_projection.weight",
    "DeQA": "classifier.1.bias",
    "BLIPVQA": "text_encoder.embeddings.word_embeddings.weight",
}


@pytest.mark.parametrize("name", NAN)
def test_nan_of_a_model_is_never_a_score(folders, aesthetic, name):
    classes = {"PickScore": (PickScore, folders["clip"]), "BLIPVQA": (BLIPVQA, folders["blip"])}
    kind, folder = classes.get(name, (DeQA, ASSETS / "deqa"))
    reward = aesthetic if name == "Aesthetic" else kind(folder)
    reward.model.get_parameter(NAN[name]).fill_(float("nan"))
    with pytest.raises(ValueError, match=f"{name} gave nan for 'a red apple"):
        score_images(reward, blobs(4, (64, 64)), PROMPTS)


def test_a_parameter_without_weights_is_an_error(folders, tmp_path):
    folder = shutil.copytree(folders["clip"], tmp_path / "clip")
    weights = load_file(folder / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="lacks the weights of 1 .* visual_projection.weight"):
        PickScore(folder)


def test_missing_weights_are_an_error(folders, tmp_path):
    none = tmp_path / "none"
    for name, load in {
        "PickScore": lambda: PickScore(none),
        "DeQA": lambda: DeQA(none),
        "BLIPVQA": lambda: BLIPVQA(none),
        "Aesthetic": lambda: Aesthetic(none, "head"),
        "GenEval's detector": lambda: Mask2FormerDetector(none, folders["clip"]),
        "GenEval's colours": lambda: Mask2FormerDetector(folders["mask2former"], none),
    }.items():
        with pytest.raises(FileNotFoundError, match=f"no {name} weights at"):
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
        ("rubber gloves, a cat and the dog.", ["rubber gloves", "a cat", "the dog"]),
        ("an oval dish, and a slice of pie", ["an oval dish", "a slice", "pie"]),
        ("a black and white cat sits in a sink", None),
        ("The tall tower and the short hut dominated the skyline.", None),
        ("a bowl and a vase on a table", None),
        ("a cat and", None),
    ],
)
def test_chunks_of_lists_are_found_and_sentences_refused(prompt, chunks):
    assert chunks_of(prompt) == chunks


def test_prompt_files_are_loaded_with_their_chunks(tmp_path):
    (tmp_path / "color_val.txt").write_text("a red car and a blue cup\n\na green frog and a pond\n")
    prompts = load_compbench(tmp_path / "color_val.txt")
    assert [p.tag for p in prompts] == ["color"] * 2
    assert prompts[1].metadata["chunks"] == ["a green frog", "a pond"]
    record = {"prompt": "A man in a white shirt.", "chunks": ["A man", "the left", "a white shirt"]}
    (tmp_path / "shape.jsonl").write_text(json.dumps(record) + "\n")
    (prompt,) = load_compbench(tmp_path / "shape.jsonl")
    assert prompt.metadata == {"tag": "shape", "chunks": ["A man", "a white shirt"]}


@pytest.mark.parametrize(
    "file, text, message",
    [
        ("a.txt", "a cat and a dog\nA man in a hat.\n", "line 2: 'A man in a hat.' is not a list"),
        ("a.txt", "\n", "holds no prompt"),
        ("a.jsonl", "{", "line 1: Invalid JSON"),
        ("a.jsonl", '{"prompt": "a cat"}', "line 1: chunks: Field required"),
        ("a.jsonl", '{"prompt": 3, "chunks": []}', "prompt: Input should be a valid string, not 3"),
        ("a.jsonl", '{"prompt": "a cat", "chunks": ["a cat", 3]}', r"chunks\.1: Input should be"),
        ("a.jsonl", '{"prompt": "go left", "chunks": ["the left"]}', "no noun chunk to ask about"),
    ],
)
def test_prompts_without_chunks_are_refused(tmp_path, file, text, message):
    (tmp_path / file).write_text(text)
    with pytest.raises(ValueError, match=message):
        load_compbench(tmp_path / file)
    with pytest.raises(FileNotFoundError):
        load_compbench(tmp_path / "none.txt")


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
    ((probability,),) = blip.probabilities(blobs(1), [Prompt("a red Apple.", "compbench")])
    assert probability == pytest.approx(yes.item(), abs=1e-5) and 0.01 < yes < 0.99


def test_blipvqa_is_the_product_over_the_chunks(blip):
    chunks = ["A cat", "it", "a very long dish (of soup)"]
    prompts = [
        Prompt("a red apple and a green bench", "compbench"),
        Prompt("A cat sits on it.", "compbench", {"chunks": chunks}),
        Prompt("a cup", "compbench"),
    ]
    probabilities, scores = blip.probabilities(blobs(3), prompts), blip(blobs(3), prompts)
    assert [len(p) for p in probabilities] == [2, 3, 1] and np.ptp(scores) > 1e-3
    assert scores == pytest.approx([np.prod(p) for p in probabilities])
    assert BLIPVQA.held_out
    for i in range(3):  # alone as in a batch
        alone = blip(blobs(3)[i : i + 1], prompts[i : i + 1])
        assert alone == pytest.approx(scores[i : i + 1], abs=1e-5)
    with pytest.raises(ValueError, match="BLIPVQA cannot .*'A cat on a mat.' is not a list"):
        blip(blobs(1), [Prompt("A cat on a mat.", "compbench")])
