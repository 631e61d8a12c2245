"""The real rewards' architectures at tiny width with random weights, in the files that the
published models have. Each takes a second or less. Their scores mean nothing. And a reward server.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import signal
import string
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from flowopd_lib.bench import special_tokens
from flowopd_lib.benchmarks import load_benchmark
from flowopd_lib.loading import quiet
from flowopd_lib.rewards import server

# COCO's classes in the order and the spelling of the published Mask2Former's config.
COCO = tuple(
    "person,bicycle,car,motorbike,aeroplane,bus,train,truck,boat,traffic light,fire hydrant,"
    "stop sign,parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,"
    "backpack,umbrella,handbag,tie,suitcase,frisbee,skis,snowboard,sports ball,kite,baseball bat,"
    "baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,cup,fork,knife,spoon,"
    "bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,sofa,"
    "pottedplant,bed,diningtable,toilet,tvmonitor,laptop,mouse,remote,keyboard,cell phone,"
    "microwave,oven,toaster,sink,refrigerator,book,clock,vase,scissors,teddy bear,hair drier,"
    "toothbrush".split(",")
)
SIDE = 64  # pixels: what the image processors resize to
VISION = {"image_size": SIDE, "patch_size": 16}


def encoder(width: int = 32) -> dict[str, int]:
    """The size of a transformer in a config."""
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2}
    return {"hidden_size": width, "intermediate_size": 2 * width, **heads}


@contextlib.contextmanager
def fixed_seed(seed: int) -> Iterator[None]:
    """The same random weights every time; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(seed)
        yield


def write_mask2former(folder: str | Path, labels: tuple[str, ...] = COCO, seed: int = 0) -> Path:
    """A Mask2Former that is confident of some objects, for `Mask2FormerDetector(folder,
    write_clip(...), side=64)`."""
    from transformers import (
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        Mask2FormerImageProcessorPil,
        SwinConfig,
    )

    stages = [f"stage{n}" for n in range(1, 5)]
    config = Mask2FormerConfig(
        backbone_config=SwinConfig(
            embed_dim=8,
            depths=(1, 1, 1, 1),
            num_heads=(1, 1, 2, 2),
            window_size=4,
            out_features=stages,
        ),
        feature_size=32,  # its group norms have 32 groups
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=32,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=32,
        num_queries=10,
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
    )
    with fixed_seed(seed), torch.no_grad():
        model = Mask2FormerForUniversalSegmentation(config)
        # at initialisation all classes are equally likely and all masks close to empty
        model.class_predictor.weight.mul_(2 / model.class_predictor.weight.std())
        masks = model.model.transformer_module.decoder.mask_predictor.mask_embedder
        list(masks.parameters())[-2].mul_(20)
        model.save_pretrained(folder)
    size = {"shortest_edge": SIDE, "longest_edge": SIDE * 5 // 3}
    Mask2FormerImageProcessorPil(size=size, num_labels=len(labels)).save_pretrained(folder)
    return Path(folder)


def write_clip(folder: str | Path, width: int = 32, seed: int = 0) -> Path:
    """A CLIPModel with its processor, for PickScore, the detector's colours and Aesthetic;
    embeddings have `width` numbers."""
    from transformers import (
        AutoTokenizer,
        CLIPConfig,
        CLIPImageProcessorPil,
        CLIPModel,
        CLIPProcessor,
    )

    with fixed_seed(seed):
        tokenizer = AutoTokenizer.from_pretrained(load_benchmark().folder / "pickscore")
        config = CLIPConfig(
            text_config=encoder(width) | special_tokens(tokenizer),
            vision_config=encoder(width) | VISION,
            projection_dim=width,
            logit_scale_init_value=4.6052,  # its exponential is 100, as PickScore's
        )
        CLIPModel(config).save_pretrained(folder)
        sizes = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
        CLIPProcessor(CLIPImageProcessorPil(**sizes), tokenizer).save_pretrained(folder)
    return Path(folder)


def aesthetic_head(width: int = 32, seed: int = 0) -> dict[str, torch.Tensor]:
    """The weights of LAION's head for embeddings of `width` numbers; scores are around 5.5."""
    g, state = torch.Generator().manual_seed(seed), {}
    sizes = itertools.pairwise((width, 1024, 128, 64, 16, 1))
    for layer, (n_in, n_out) in zip((0, 2, 4, 6, 7), sizes):
        state[f"layers.{layer}.weight"] = torch.randn(n_out, n_in, generator=g) * n_in**-0.5
        state[f"layers.{layer}.bias"] = torch.zeros(n_out)
    state["layers.7.bias"] += 5.5
    return state


def write_aesthetic(folder: str | Path, width: int = 32, seed: int = 0) -> Path:
    """A CLIPModel and the head for it, for `Aesthetic(folder, folder / "head.safetensors")`."""
    folder = write_clip(folder, width, seed)
    save_file(aesthetic_head(width, seed), folder / "head.safetensors")
    return folder


def write_blip_vqa(folder: str | Path, seed: int = 0) -> Path:
    """A BlipForQuestionAnswering with a tokenizer of letters and the two answers, for `BLIPVQA`."""
    from transformers import (
        BertTokenizer,
        BlipConfig,
        BlipForQuestionAnswering,
        BlipImageProcessorPil,
    )

    characters = string.ascii_lowercase + string.digits
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "yes", "no", *"?,.'-", *characters]
    vocabulary += [f"##{c}" for c in characters]
    text = {
        "vocab_size": len(vocabulary) + 2,  # and [DEC], [ENC], which the tokenizer does not know
        "encoder_hidden_size": 32,
        "max_position_embeddings": 64,
        "bos_token_id": len(vocabulary),
        "pad_token_id": 0,
        "sep_token_id": 3,
        "initializer_range": 0.3,
    }
    vision = VISION | {"initializer_range": 0.3}
    with fixed_seed(seed):
        config = BlipConfig(
            text_config=encoder() | text, vision_config=encoder() | vision, projection_dim=32
        )
        BlipForQuestionAnswering(config).save_pretrained(folder)
        ids = {piece: i for i, piece in enumerate(vocabulary)}
        BertTokenizer(vocab=ids, do_lower_case=True).save_pretrained(folder)
        BlipImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return Path(folder)


@contextlib.contextmanager
def reward_server(token: str = "", stop: int = signal.SIGTERM) -> Iterator[tuple]:
    """The url and the process of a server with `brightness`, which ends by the signal `stop`."""
    process = subprocess.Popen(
        [sys.executable, server.__file__, "brightness", "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, server.TOKEN: token},
        cwd="/",
    )
    output = ""
    try:
        while "running on" not in output:
            assert process.poll() is None, output
            output += process.stdout.readline()
        yield re.search(r"running on (\S+)", output)[1], process
    finally:
        process.send_signal(stop)
        process.wait(10)
        process.stdout.close()
