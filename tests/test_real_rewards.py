"""The real rewards' loading code, on classes of the same kind at tiny width and random weights."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file, save_file
from transformers import CLIPModel

from flowopd_lib import Prompt
from flowopd_lib.bench import dummy_rewards as dummy_model
from flowopd_lib.benchmarks.tiny import ASSETS
from flowopd_lib.rewards import (
    BLIPVQA,
    OCR,
    Aesthetic,
    DeQA,
    GenEval,
    Mask2FormerDetector,
    PickScore,
    load_compbench,
)
from flowopd_lib.rewards.aesthetic import convert_head
from flowopd_lib.rewards.base import embed_pictures
from flowopd_lib.rewards.colors import COLORS, ColorNamer, cut_out
from flowopd_lib.rewards.compbench import chunks_of
from flowopd_lib.rewards.mask2former import box_of, instances

GENEVAL = set(  # evaluation/object_names.txt
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,"
    "parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,"
    "handbag,tie,suitcase,frisbee,skis,snowboard,sports ball,kite,baseball bat,baseball glove,"
    "skateboard,surfboard,tennis racket,bottle,wine glass,cup,fork,knife,spoon,bowl,banana,apple,"
    "sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,potted plant,bed,"
    "dining table,toilet,tv,laptop,computer mouse,tv remote,computer keyboard,cell phone,microwave,"
    "oven,toaster,sink,refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush".split(
        ","
    )
)
RGB = {
    "red": (220, 20, 20),
    "orange": (240, 140, 0),
    "yellow": (240, 230, 20),
    "green": (20, 160, 40),
    "blue": (20, 60, 220),
    "purple": (120, 20, 160),
    "pink": (250, 150, 190),
    "brown": (120, 70, 30),
    "black": (0, 0, 0),
    "white": (255, 255, 255),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("rewards")
    return {
        "mask2former": dummy_model.write_mask2former(root / "mask2former"),
        "clip": dummy_model.write_clip(root / "clip"),
        "aesthetic": dummy_model.write_aesthetic(root / "aesthetic"),
        "blip": dummy_model.write_blip_vqa(root / "blip"),
    }


@pytest.fixture(scope="module")
def detector(folders):
    return Mask2FormerDetector(folders["mask2former"], folders["clip"], side=64)


@pytest.fixture(scope="module")
def blip(folders):
    return BLIPVQA(folders["blip"])


def pictures(n, size=(96, 80), seed=0):
    """(n, 3, *size): soft blobs of colour, no two alike."""
    noise = torch.rand(n, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(noise, size=size, mode="bicubic").clamp(0, 1)


def as_pixels(images):
    return (images * 255).round().byte().permute(0, 2, 3, 1).numpy()


THINGS = [Prompt("a red apple and a green bench", "compbench")] * 4


# ---- GenEval's detector


def logits_of(*objects, classes=3, side=8):
    """Class and mask logits of queries given as (class logits, mask logit inside, rectangle)."""
    masks = torch.full((len(objects), side, side), -9.0)
    for mask, (_, inside, (left, top, right, bottom)) in zip(masks, objects):
        mask[top:bottom, left:right] = inside
    return torch.tensor([list(o[0]) for o in objects]).float(), masks


def test_an_instance_has_its_class_its_certainty_and_its_mask():
    sure, unsure, none = (9, 0, 0, 0), (0, 2, 1.5, 0), (0, 0, 0, 9)
    told = logits_of((sure, 2, (1, 2, 5, 6)), (unsure, 9, (1, 2, 5, 6)), (none, 9, (0, 0, 8, 8)))
    labels, scores, masks = instances(*told, (8, 8), 0.2)
    p = torch.tensor(unsure).float().softmax(0)
    # the second query is two classes; both lie where the first lies and are kept
    assert labels.tolist() == [0, 1, 2]
    assert scores == pytest.approx(
        [float(told[0][0].softmax(0)[0] * torch.tensor(2.0).sigmoid()), *p[1:3].tolist()], 1e-3
    )
    assert [box_of(m) for m in masks] == [(1, 2, 5, 6)] * 3 and masks[0].sum() == 16
    assert instances(*told, (8, 8), 0.6)[0].tolist() == [0]
    assert [len(x) for x in instances(*told, (8, 8), 0.95)] == [0, 0, 0]


def test_boxes_are_in_pixels_of_the_picture():
    *_, masks = instances(*logits_of(((9, 0, 0, 0), 9, (2, 0, 4, 8))), (80, 40), 0.5)
    assert masks.shape == (1, 80, 40) and box_of(masks[0]) == (10, 0, 20, 80)
    assert instances(*logits_of(((9, 0, 0, 0), -9, (0, 0, 8, 8))), (8, 8), 0.0)[2].shape == (
        0,
        8,
        8,
    )


def test_damaged_weights_are_no_empty_picture():
    classes, masks = logits_of(((9, 0, 0, 0), 9, (0, 0, 8, 8)))
    with pytest.raises(ValueError, match="gave NaN"):
        instances(classes * float("nan"), masks, (8, 8), 0.3)


def test_instances_are_those_of_transformers(detector):
    pixels = as_pixels(pictures(3, (384, 384)))
    inputs = detector.processor(list(pixels), return_tensors="pt", **detector.options)
    with torch.no_grad():
        told = detector.model(**inputs)
    theirs = detector.processor.post_process_instance_segmentation(
        told, threshold=0.3, target_sizes=[(384, 384)] * 3, return_binary_maps=True
    )
    for i, their in enumerate(theirs):
        ours = instances(
            told.class_queries_logits[i], told.masks_queries_logits[i], (384, 384), 0.3
        )
        assert len(ours[0]) == len(their["segments_info"]) > 1
        order = np.argsort([-s["score"] for s in their["segments_info"]], kind="stable")
        for label, score, mask, j in zip(*ours, order):
            segment = their["segments_info"][j]
            assert segment["label_id"] == label and segment["score"] == pytest.approx(
                score, abs=2e-6
            )
            assert (their["segmentation"][j].numpy() == mask).all()


def test_the_detector_speaks_genevals_names_whatever_the_config_calls_them(
    detector, folders, tmp_path
):
    assert len(detector.labels) == 80 and set(detector.labels) == GENEVAL
    assert detector.name == "mask2former (transformers)" and detector.size is None
    own = dummy_model.write_mask2former(tmp_path, ("airplane", "couch", "robot"))
    assert Mask2FormerDetector(own, folders["clip"]).labels == ("airplane", "couch", "robot")


@pytest.mark.parametrize("size", [(96, 80), (64, 64), (50, 130)])
def test_the_detector_finds_the_same_alone_and_in_a_batch(detector, size):
    pixels = as_pixels(pictures(9, size))
    found = detector(pixels)
    assert len(found) == 9 and sum(map(len, found)) > 9
    for image, one in zip(pixels, found):
        assert [d.score for d in one] == sorted((d.score for d in one), reverse=True)
        for d, alone in zip(one, detector(image[None])[0], strict=True):
            assert (d.label, d.color, d.box) == (alone.label, alone.color, alone.box)
            assert d.score == pytest.approx(alone.score, abs=1e-5) and d.score > detector.threshold
            assert (
                d.color in COLORS
                and 0 <= d.box[0] < d.box[2] <= size[1]
                and 0 <= d.box[1] < d.box[3] <= size[0]
            )


def test_at_most_16_of_a_class_are_kept(folders, tmp_path, monkeypatch):
    detector = Mask2FormerDetector(folders["mask2former"], folders["clip"], side=64)
    many = (
        np.zeros(20, int),
        np.linspace(0.9, 0.4, 20, dtype=np.float32),
        np.ones((20, 64, 64), bool),
    )
    monkeypatch.setattr("flowopd_lib.rewards.mask2former.instances", lambda *_: many)
    (found,) = detector(as_pixels(pictures(1, (64, 64))))
    assert len(found) == 16 and found[-1].score == many[1][15]


def test_geneval_rewards_with_it_and_tells_its_name(detector):
    reward = GenEval(detector)
    seen = detector(as_pixels(pictures(1)))[0][0]
    wanted = {"class": seen.label, "count": 1, "color": seen.color}
    prompt = Prompt(f"a {seen.label}", "geneval", {"tag": "colors", "include": [wanted]})
    assert (
        reward(pictures(1), [prompt]).tolist() == [1.0] and "transformers" in reward.detector.name
    )
    wanted["color"] = next(c for c in COLORS if c != seen.color)
    assert reward(pictures(1), [prompt]).tolist() == [0.0]
    with pytest.raises(ValueError, match="does not know 'mouse'"):
        reward(
            pictures(1),
            [
                Prompt(
                    "a mouse", "geneval", {"tag": "x", "include": [{"class": "mouse", "count": 1}]}
                )
            ],
        )


def test_thresholds_are_probabilities(folders):
    with pytest.raises(ValueError, match="cannot use thresholds of 0.9 and, to count, 0.3"):
        Mask2FormerDetector(
            folders["mask2former"], folders["clip"], threshold=0.9, counting_threshold=0.3
        )


# ---- colours


def test_the_object_is_cut_out_on_gray():
    picture = np.zeros((20, 30, 3), np.uint8)
    picture[:, :15], picture[:, 15:] = RGB["red"], RGB["blue"]
    mask = np.zeros((20, 30), bool)
    mask[4:10, 10:20] = True
    mask[4, 10] = False
    cut = np.array(cut_out(picture, mask, box_of(mask)))
    assert cut.shape == (6, 10, 3) and cut[0, 0].tolist() == [153, 153, 153]
    assert cut[1, 0].tolist() == list(RGB["red"]) and cut[1, 9].tolist() == list(RGB["blue"])


def test_a_colour_is_the_mean_of_three_texts(folders):
    namer, clip = ColorNamer(folders["clip"]), CLIPModel.from_pretrained(folders["clip"])
    texts = ["a photo of a pink car", "a photo of a pink-colored car", "a photo of a pink object"]
    with torch.no_grad():
        z = clip.get_text_features(
            **namer.processor.tokenizer(texts, return_tensors="pt", padding=True)
        ).pooler_output
    mean = (z / z.norm(dim=-1, keepdim=True)).mean(0)
    assert torch.allclose(namer.texts("car")[COLORS.index("pink")], mean / mean.norm(), atol=1e-5)
    assert namer.texts("car") is namer.texts("car") and namer.texts("bus") is not namer.texts("car")


def test_plain_objects_reach_the_classifier_in_their_own_colour(folders):
    """A classifier made of plain colours names the colour of objects of any size, on a picture of another."""
    namer = ColorNamer(folders["clip"], batch=3)
    plain = [Image.new("RGB", (50, 40), RGB[color]) for color in COLORS]
    with torch.no_grad():
        namer._texts["car"] = embed_pictures(namer.model, namer.processor, plain, 10)
    objects = []
    for i, color in enumerate(COLORS):
        picture = np.full((90, 90, 3), RGB[COLORS[i - 1]], np.uint8)
        mask = np.zeros((90, 90), bool)
        mask[10 : 30 + i, 20 : 70 - i] = True
        picture[mask] = RGB[color]
        objects.append(cut_out(picture, mask, box_of(mask)))
    assert namer(objects, ["car"] * 10) == list(COLORS) and namer([], []) == []


# ---- PickScore, Aesthetic, DeQA


def test_pickscore_is_undivided_and_takes_its_processor_from_elsewhere(folders, tmp_path):
    for file in ("config.json", "model.safetensors"):
        shutil.copy(folders["clip"] / file, tmp_path)
    with pytest.raises(FileNotFoundError, match="no processor of PickScore"):
        PickScore(tmp_path)
    reward = PickScore(tmp_path, processor_id=folders["clip"], batch=3)
    assert reward.range == pytest.approx((-100, 100), abs=0.01)
    clip, images = CLIPModel.from_pretrained(tmp_path), pictures(4)
    inputs = reward.processor(
        images=list(as_pixels(images)), text=[THINGS[0].text], return_tensors="pt"
    )
    with torch.no_grad():
        wanted = clip(**inputs).logits_per_image[:, 0]
    assert reward(images, THINGS) == pytest.approx(wanted.numpy(), abs=1e-3)


def test_aesthetic_is_the_head_on_the_unit_embedding(folders):
    reward = Aesthetic(folders["aesthetic"], folders["aesthetic"] / "head.safetensors", batch=3)
    head, clip = dummy_model.aesthetic_head(), CLIPModel.from_pretrained(folders["aesthetic"])
    inputs = reward.processor(images=list(as_pixels(pictures(4))), return_tensors="pt")
    with torch.no_grad():
        z = clip.get_image_features(**inputs).pooler_output
    z = z / z.norm(dim=-1, keepdim=True)
    for n in (0, 2, 4, 6, 7):
        z = z @ head[f"layers.{n}.weight"].T + head[f"layers.{n}.bias"]
    scores = reward(pictures(4), THINGS)
    assert scores == pytest.approx(z[:, 0].numpy(), abs=1e-5) and scores.dtype == np.float32
    assert reward.held_out and reward.range == (1, 10)


def test_the_aesthetic_head_is_converted_once_and_checked(folders, tmp_path):
    head = dummy_model.aesthetic_head()
    torch.save(head, tmp_path / "head.pth")
    out = convert_head(tmp_path / "head.pth", tmp_path / "head.safetensors")
    assert all(torch.equal(value, head[key]) for key, value in load_file(out).items())
    torch.save({**head, "extra": head["layers.7.bias"]}, tmp_path / "more.pth")
    with pytest.raises(ValueError, match="not LAION's aesthetic head: it differs in extra"):
        convert_head(tmp_path / "more.pth", tmp_path / "more.safetensors")
    save_file({k: v for k, v in head.items() if "2" not in k}, tmp_path / "less.safetensors")
    with pytest.raises(ValueError, match="differs in layers.2.bias, layers.2.weight"):
        Aesthetic(folders["clip"], tmp_path / "less.safetensors")
    save_file({**head, "layers.4.weight": torch.zeros(64, 100)}, tmp_path / "odd.safetensors")
    with pytest.raises(ValueError, match="do not fit together"):
        Aesthetic(folders["clip"], tmp_path / "odd.safetensors")
    save_file(dummy_model.aesthetic_head(48), tmp_path / "wide.safetensors")
    with pytest.raises(ValueError, match="takes embeddings of 48 numbers, and .* gives 32"):
        Aesthetic(folders["clip"], tmp_path / "wide.safetensors")
    with pytest.raises(ValueError, match="no safetensors file"):
        Aesthetic(folders["clip"], tmp_path / "head.pth")
    with pytest.raises(FileNotFoundError, match="make one with convert_head"):
        Aesthetic(folders["clip"], tmp_path / "none.safetensors")


def test_deqa_score_itself_is_sent_to_the_reward_server(folders, tmp_path):
    config = {"model_type": "mplug_owl2", "architectures": ["MPLUGOwl2LlamaForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for folder in (tmp_path, folders["clip"]):
        with pytest.raises(
            ValueError, match="no transformers image classifier.*behind the reward server"
        ):
            DeQA(folder)


def test_pictures_are_prepared_by_pil_everywhere(folders, detector, blip):
    for processor in (
        PickScore(folders["clip"]).processor.image_processor,
        DeQA(ASSETS / "deqa").processor,
        detector.processor,
        detector.name_colors.processor.image_processor,
        blip.processor,
    ):
        assert type(processor).__name__.endswith("Pil")


def test_a_score_is_never_nan(folders):
    spoilt = {
        PickScore(folders["clip"]): "visual_projection.weight",
        Aesthetic(
            folders["aesthetic"], folders["aesthetic"] / "head.safetensors"
        ): "visual_projection.weight",
        DeQA(ASSETS / "deqa"): "classifier.1.bias",
        BLIPVQA(folders["blip"]): "text_encoder.embeddings.word_embeddings.weight",
    }
    for reward, name in spoilt.items():
        reward.model.get_parameter(name).fill_(float("nan"))
        with pytest.raises(ValueError, match=f"{reward.name} gave NaN"):
            reward(pictures(4, (64, 64)), THINGS)


def test_a_parameter_without_weights_is_no_random_reward(folders, tmp_path):
    folder = shutil.copytree(folders["clip"], tmp_path / "clip")
    weights = load_file(folder / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError, match="holds no weights for 1 parameters .* visual_projection.weight"
    ):
        PickScore(folder)


def test_missing_weights_are_named(folders, tmp_path):
    makers = {
        "PickScore": PickScore,
        "BLIPVQA": BLIPVQA,
        "Aesthetic": lambda at: Aesthetic(at, "head"),
        "GenEval's detector": lambda at: Mask2FormerDetector(at, folders["clip"]),
        "GenEval's colours": lambda at: Mask2FormerDetector(folders["mask2former"], at),
    }
    for name, make in makers.items():
        with pytest.raises(FileNotFoundError, match=f"no {name} weights at"):
            make(tmp_path / "nothing")


# ---- OCR


def signs():
    """Pictures of two lines, of one line wider than the recogniser's own width, of a word, and of nothing."""
    texts, found = ["OPEN\nDAILY", "FRESH BREAD AND COFFEE", "Exit", ""], []
    for text in texts:
        picture = Image.new("RGB", (320, 320), "white")
        font = ImageFont.load_default(22 if len(text) > 12 else 60)
        ImageDraw.Draw(picture).multiline_text((20, 60), text, "black", font, spacing=50)
        found.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255)
    return torch.stack(found), [
        Prompt(f'a sign that says "{text or "x"}"', "ocr") for text in texts
    ]


def test_whole_pictures_are_read_together_as_the_engine_reads_them_alone():
    reward, (images, prompts), calls = OCR(), signs(), []
    alone = [
        "".join(reward.engine(np.ascontiguousarray(p[..., ::-1])).txts or ())
        for p in as_pixels(images)
    ]
    assert [a.lower().replace(" ", "") for a in alone] == [
        "opendaily",
        "freshbreadandcoffee",
        "exit",
        "",
    ]
    recognise = reward.engine.recognize_txt
    reward.engine.recognize_txt = lambda crops: calls.append(len(crops)) or recognise(crops)
    assert reward.read(images, prompts) == alone
    assert calls == [3, 1]  # the lines that fit together, and the wide one


# ---- T2I-CompBench


def test_things_are_told_apart_and_sentences_refused():
    assert chunks_of("a green bench and a blue bowl") == ["a green bench", "a blue bowl"]
    assert chunks_of("rubber gloves, a cat and the dog.") == ["rubber gloves", "a cat", "the dog"]
    assert chunks_of("an oval dish, and a slice of pie") == ["an oval dish", "a slice", "pie"]
    for sentence in (
        "a black and white cat sits in a sink",
        "The tall tower and the short hut dominated the skyline.",
        "a bowl and a vase on a table",
        "a cat and",
    ):
        assert chunks_of(sentence) is None


def test_prompt_files_are_loaded_with_their_chunks(tmp_path):
    (tmp_path / "color_val.txt").write_text("a red car and a blue cup\n\na green frog and a pond\n")
    prompts = load_compbench(tmp_path / "color_val.txt")
    assert [p.tag for p in prompts] == ["color"] * 2 and prompts[1].metadata["chunks"] == [
        "a green frog",
        "a pond",
    ]
    record = {"prompt": "A man in a white shirt.", "chunks": ["A man", "the left", "a white shirt"]}
    (tmp_path / "shape.jsonl").write_text(json.dumps(record) + "\n")
    assert load_compbench(tmp_path / "shape.jsonl")[0].metadata == {
        "tag": "shape",
        "chunks": ["A man", "a white shirt"],
    }


@pytest.mark.parametrize(
    "file, text, message",
    [
        (
            "a.txt",
            "a cat and a dog\nA man in a hat.\n",
            "line 2: 'A man in a hat.' is no list of things",
        ),
        ("a.txt", "\n", "holds no prompt"),
        ("a.jsonl", "{", "line 1 is not JSON"),
        ("a.jsonl", '{"prompt": "a cat"}', "no record with prompt and chunks"),
        ("a.jsonl", '{"prompt": 3, "chunks": []}', "prompt must be a text"),
        (
            "a.jsonl",
            '{"prompt": "a cat", "chunks": ["a cat", 3]}',
            "chunks must be a list of texts",
        ),
        ("a.jsonl", '{"prompt": "go left", "chunks": ["the left"]}', "no noun chunk to ask about"),
    ],
)
def test_prompts_that_cannot_be_asked_about_are_refused(tmp_path, file, text, message):
    (tmp_path / file).write_text(text)
    with pytest.raises(ValueError, match=message):
        load_compbench(tmp_path / file)
    with pytest.raises(FileNotFoundError):
        load_compbench(tmp_path / "none.txt")


def test_blip_is_asked_as_transformers_own_generation_would_answer(blip):
    """With the mark that BLIP's questions begin with, which transformers' processor leaves out."""
    (picture,), start = as_pixels(pictures(1)), blip.model.config.text_config.bos_token_id
    asked = blip.tokenizer("a red apple?", return_tensors="pt")
    asked.input_ids[0, 0] = start + 1
    told = blip.model.generate(
        input_ids=asked.input_ids,
        attention_mask=asked.attention_mask,
        pixel_values=blip.processor(picture, return_tensors="pt").pixel_values,
        max_new_tokens=1,
        do_sample=False,
        output_scores=True,
        return_dict_in_generate=True,
    ).scores[0][0]
    yes, no = told[blip.yes_no].softmax(-1)
    sure = blip.yes(pictures(1), [Prompt("a red Apple.", "compbench")])
    assert sure[0][0] == pytest.approx(yes.item(), abs=1e-5) and 0.01 < yes < 0.99


def test_blipvqa_is_the_product_over_the_chunks_the_same_alone_and_in_a_batch(blip):
    prompts = [
        Prompt("a red apple and a green bench", "compbench"),
        Prompt(
            "A cat sits on it.",
            "compbench",
            {"chunks": ["A cat", "it", "a very long dish (of soup)"]},
        ),
        Prompt("a cup", "compbench"),
    ]
    images, reward = pictures(3), blip
    sure, scores = reward.yes(images, prompts), reward(images, prompts)
    assert [len(one) for one in sure] == [2, 3, 1]
    assert scores == pytest.approx([np.prod(one) for one in sure]) and scores.dtype == np.float32
    reward.batch = 2
    assert reward(images, prompts) == pytest.approx(scores, abs=1e-5)
    assert [reward(images[i : i + 1], prompts[i : i + 1])[0] for i in range(3)] == pytest.approx(
        scores, abs=1e-5
    )
    assert reward.held_out and np.ptp(scores) > 1e-3
    with pytest.raises(
        ValueError, match="BLIPVQA cannot reward a prompt: 'A cat on a mat.' is no list of things"
    ):
        reward(images[:1], [Prompt("A cat on a mat.", "compbench")])
