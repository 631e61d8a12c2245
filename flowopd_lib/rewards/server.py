"""One reward behind HTTP, for rewards whose packages fit no current environment or that need a GPU
of their own:

    python server.py deqa --model zhiyuanyou/DeQA-Score-Mix3 --trust-remote-code --port 8100

This file stands alone (Python 3.10 or newer; fastapi, uvicorn, pillow, numpy and what its reward
imports): run it in an environment made from servers/requirements-REWARD.txt, as
docs/reward-server.md says, which also describes the protocol.
"""

import argparse
import asyncio
import base64
import hashlib
import hmac
import io
import os
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
from PIL import Image
from pydantic import BaseModel, Field

TOKEN = "FLOWOPD_REWARD_TOKEN"
Number = Annotated[float, Field(allow_inf_nan=False)]


# --- the protocol, which the client imports from here; FastAPI is imported only to serve it


class Item(BaseModel):
    png: str  # in base64
    prompt: str = ""


class ScoreRequest(BaseModel):
    reward: str
    items: list[Item] = Field(min_length=1)


class DetectedObject(BaseModel):
    label: str
    color: str | None
    score: Annotated[Number, Field(ge=0, le=1)]
    box: tuple[Number, Number, Number, Number]  # left, top, right, bottom


class Identity(BaseModel):
    reward: str
    version: str
    model: str


class ScoreResponse(Identity):
    """One entry per item: in `detections` those of a detector, in `scores` those of a reward."""

    scores: list[Number] = []
    detections: list[list[DetectedObject]] = []


class Health(Identity):
    range: tuple[float, float]
    labels: tuple[str, ...] = ()  # this and the following: of a detector
    colors: tuple[str, ...] = ()
    threshold: float = 0.3
    counting_threshold: float = 0.9


# --- rewards: images (PIL, RGB) and prompts to one answer each; each imports what it needs


class Brightness:
    """Mean of the pixels, 0 to 1: needs no model, to try a server and for tests."""

    name, version, range, answers = "Brightness", "1", (0.0, 1.0), "scores"

    def __init__(self, options):
        pass

    def __call__(self, images, prompts):
        return [float(np.asarray(image, np.float64).mean() / 255) for image in images]


class DeQA:
    """DeQA-Score (You et al. 2025), 1 to 5: its own code pads to a square, asks "How would you rate
    the quality of this image?" and gives the expectation over excellent, good, fair, poor, bad."""

    name, version, range, answers = "DeQA", "1", (1.0, 5.0), "scores"

    def __init__(self, options):
        if not options.trust_remote_code:
            raise ValueError(
                "DeQA-Score runs code that comes with its weights; read it, then start with "
                "--trust-remote-code and with --revision COMMIT, which pins the code"
            )
        import torch
        from transformers import AutoModelForCausalLM

        load = {"torch_dtype": torch.float16, "attn_implementation": "eager"}
        load |= {"use_safetensors": True, "trust_remote_code": True, "revision": options.revision}
        self.model = AutoModelForCausalLM.from_pretrained(options.model, **load)
        self.model.to(options.device).eval().requires_grad_(False)

    def __call__(self, images, prompts):
        scores = self.model.score(images).float().tolist()
        # its probabilities are in half precision, and their sum exceeds 1 by up to a thousandth
        return [min(max(s, 1.0), 5.0) if 0.99 < s < 5.01 else s for s in scores]


class ImageReward:
    """ImageReward (Xu et al. 2023), about -2 to 2, one image and prompt at a time, as it was made
    for. `--model`: a folder with ImageReward.safetensors and med_config.json."""

    name, version, range, answers = "ImageReward", "1", (-6.0, 6.0), "scores"

    def __init__(self, options):
        from ImageReward.ImageReward import ImageReward as Model

        folder = Path(options.model)
        self.model = Model(device=options.device, med_config=str(folder / "med_config.json"))
        load_weights(self.model, folder / "ImageReward.safetensors", "position_ids")
        self.model.to(options.device).eval().requires_grad_(False)

    def __call__(self, images, prompts):
        return [self.model.score(prompt, image) for image, prompt in zip(images, prompts)]


class HPS:
    """HPS v2.1 (Wu et al. 2023): cosine of image and prompt, about .15 to .4, in float32.
    `--model`: the checkpoint as safetensors."""

    name, version, range, answers = "HPS", "1", (-1.0, 1.0), "scores"

    def __init__(self, options):
        import open_clip

        self.device, kind = options.device, "ViT-H-14"
        self.model, _, self.process = open_clip.create_model_and_transforms(kind, pretrained=None)
        load_weights(self.model, options.model)
        self.model.to(self.device).eval().requires_grad_(False)
        self.tokenize = open_clip.get_tokenizer(kind)

    def __call__(self, images, prompts):
        import torch

        pixels = torch.stack([self.process(image) for image in images]).to(self.device)
        tokens = self.tokenize(list(prompts)).to(self.device)
        z_image = self.model.encode_image(pixels, normalize=True)
        z_text = self.model.encode_text(tokens, normalize=True)
        return (z_image * z_text).sum(-1).tolist()


COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
COLOR_TEXTS = "a photo of a {0} {1}", "a photo of a {0}-colored {1}", "a photo of a {0} object"
# COCO's 80 in its order, by the names that GenEval's prompts have for them
LABELS = tuple(
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,"
    "stop sign,parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,"
    "backpack,umbrella,handbag,tie,suitcase,frisbee,skis,snowboard,sports ball,kite,baseball bat,"
    "baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,cup,fork,knife,spoon,"
    "bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,"
    "potted plant,bed,dining table,toilet,tv,laptop,computer mouse,tv remote,computer keyboard,"
    "cell phone,microwave,oven,toaster,sink,refrigerator,book,clock,vase,scissors,teddy bear,"
    "hair drier,toothbrush".split(",")
)


class ColorClassifier:
    """GenEval's colour rule (Ghosh et al. 2023, evaluation/evaluate_images.py): the nearest of ten
    colours to each object, cut out on gray, by cosine to the mean of three unit text embeddings
    that name colour and class. For a CLIPModel (GenEval's: openai/clip-vit-large-patch14) and its
    processor."""

    def __init__(self, model, processor):
        self.model, self.processor = model, processor
        self._texts = {}

    def __call__(self, image, objects, masks):
        """The objects of a PIL image, dicts with label and box, with the color of each; `masks`:
        (H, W) bool."""
        gray, crops = Image.new("RGB", image.size, "#999"), []
        for found, mask in zip(objects, masks):
            alone = Image.composite(image, gray, Image.fromarray(np.asarray(mask, bool)))
            crops.append(alone.crop(tuple(found["box"])))
        z_images = self.embed("image", images=crops) if crops else []
        cosines = [self.text_embeddings(o["label"]) @ z for o, z in zip(objects, z_images)]
        if any(one.isnan().any() for one in cosines):
            raise ValueError("GenEval's CLIP gave NaN; load its weights again, in float32")
        return [o | {"color": COLORS[int(c.argmax())]} for o, c in zip(objects, cosines)]

    def text_embeddings(self, label):
        """(10, D): of the colours of a class, computed once."""
        if label not in self._texts:
            texts = [text.format(color, label) for color in COLORS for text in COLOR_TEXTS]
            length = self.model.config.text_config.max_position_embeddings
            options = {"padding": "max_length", "truncation": True, "max_length": length}
            z = self.embed("text", text=texts, **options)
            means = z.unflatten(0, (len(COLORS), len(COLOR_TEXTS))).mean(1)
            self._texts[label] = means / means.norm(dim=-1, keepdim=True)
        return self._texts[label]

    def embed(self, kind, **inputs):
        """Unit embeddings (N, D)."""
        inputs = self.processor(return_tensors="pt", **inputs).to(self.model.device)
        z = getattr(self.model, f"get_{kind}_features")(**inputs)
        z = getattr(z, "pooler_output", z)  # an object since transformers 5
        return z / z.norm(dim=-1, keepdim=True)


class GenEval:
    """The detections of GenEval's own detector (Ghosh et al. 2023): mmdetection's Mask2Former, and
    CLIP ViT-L/14 for the colours. The verdict is the client's. `--model`: the detector's weights as
    safetensors; `--config`: mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco.py, in
    mmdet/.mim/configs/mask2former."""

    name, version, range, answers = "GenEval", "1", (0.0, 1.0), "detections"
    health = {"labels": LABELS, "colors": COLORS, "threshold": 0.3, "counting_threshold": 0.9}

    def __init__(self, options):
        from mmdet.apis import init_detector
        from transformers import CLIPModel, CLIPProcessor

        self.detector = init_detector(options.config, None, device=options.device)
        load_weights(self.detector, options.model)
        clip = CLIPModel.from_pretrained(options.clip, use_safetensors=True)
        clip.to(options.device).eval().requires_grad_(False)
        self.classify = ColorClassifier(clip, CLIPProcessor.from_pretrained(options.clip))

    def __call__(self, images, prompts):
        from mmdet.apis import inference_detector

        # mmdetection reads files as BGR
        arrays = [np.ascontiguousarray(np.asarray(image)[:, :, ::-1]) for image in images]
        found = inference_detector(self.detector, arrays)
        return [self.objects(image, *one) for image, one in zip(images, found)]

    def objects(self, image, boxes, masks):
        """From the boxes with scores (N, 5) and the masks (N, H, W) of each class."""
        objects, shapes = [], []
        for label, rows, own in zip(LABELS, boxes, masks):
            for (*box, score), mask in zip(rows.tolist(), own):
                if score > self.health["threshold"]:
                    objects.append({"label": label, "score": score, "box": box})
                    shapes.append(mask)
        return self.classify(image, objects, shapes)


REWARDS = {kind.name.lower(): kind for kind in (Brightness, DeQA, ImageReward, HPS, GenEval)}


def load_weights(model, path, optional=()):
    """Load safetensors into a model. A missing weight is an error, unless its name ends in one of
    `optional`: a partly random reward model would give scores all the same."""
    from safetensors.torch import load_file

    missing = model.load_state_dict(load_file(str(path)), strict=False).missing_keys
    missing = [name for name in missing if not name.endswith(optional)]
    if missing:
        raise ValueError(f"{path} lacks {len(missing)} weights, such as {missing[0]}")


def describe_model(model, revision):
    """The `model` of /health: a hub id with its revision; a file or folder, which may be elsewhere
    on another machine, by its name and the hash of its content."""
    path = Path(model)
    if not model or not path.exists():
        return f"{model}@{revision}" if model else "none"
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(path.rglob("*")):
        if file.is_file() and file.stat().st_size:
            digest.update(np.memmap(file, np.uint8, "r"))
    return f"{path.name} sha256:{digest.hexdigest()[:16]}"


# --- HTTP


def read_png(text):
    return Image.open(io.BytesIO(base64.b64decode(text)), formats=("PNG",)).convert("RGB")


def create_app(reward, model="none", token=""):
    """The two paths /health and /score. One request is scored at a time, the others wait."""
    from fastapi import Depends, FastAPI, HTTPException, Request

    async def check_token(request: Request):
        sent = request.headers.get("authorization", "").encode("latin-1")
        if token and not hmac.compare_digest(sent, f"Bearer {token}".encode()):
            raise HTTPException(401, f"this server needs its token, {TOKEN}")

    urls = {"docs_url": None, "redoc_url": None, "openapi_url": None}
    app, lock = FastAPI(dependencies=[Depends(check_token)], **urls), asyncio.Lock()
    about = {"reward": reward.name, "version": reward.version, "model": model}

    @app.get("/health", response_model_exclude_unset=True)
    async def health() -> Health:
        return Health(**about, range=reward.range, **getattr(reward, "health", {}))

    @app.post("/score", response_model_exclude_unset=True)
    async def score(request: Request) -> ScoreResponse:
        try:
            body = ScoreRequest.model_validate_json(await request.body())
            if body.reward != reward.name:
                raise ValueError(f"this server's reward is {reward.name}, not {body.reward}")
            prompts = [item.prompt for item in body.items]
            images = await asyncio.to_thread(lambda: [read_png(item.png) for item in body.items])
            async with lock:
                if await request.is_disconnected():  # while it waited: nobody wants the scores
                    raise ValueError("the client has disconnected")
                answers = await asyncio.to_thread(reward, images, prompts)
            return ScoreResponse(**about, **{reward.answers: answers})
        except Exception as error:  # whatever a decoder or a model raises
            fault = " ".join(str(error).split())
            raise HTTPException(422, f"{type(error).__name__}: {fault}") from error

    return app


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add, token = parser.add_argument, os.environ.get(TOKEN, "").strip()
    add("reward", choices=REWARDS)
    add("--model", default="", help="a hub id, or weights on disk: see the rewards")
    add("--revision", default="main", help="commit of a hub id")
    add("--trust-remote-code", action="store_true", help="run a model's own code (deqa)")
    add("--config", default="", help="of geneval's detector")
    add("--clip", default="openai/clip-vit-large-patch14", help="for geneval's colours")
    add("--device", default="cuda")
    add("--host", default="127.0.0.1", help=f"others than loopback need a token, {TOKEN}")
    add("--port", default=8100, type=int, help="0: any free one")
    options = parser.parse_args()
    if options.host not in ("127.0.0.1", "::1", "localhost") and not token:
        parser.error(f"a server that others can reach needs a token: set {TOKEN}, here and there")
    import uvicorn

    try:
        reward = REWARDS[options.reward](options)
        model = describe_model(options.model, options.revision)
    except Exception as error:  # whatever a model's code raises
        sys.exit(f"error: {options.reward} cannot be loaded: {type(error).__name__}: {error}")
    address = {"host": options.host, "port": options.port}
    # on SIGTERM, uvicorn accepts nothing more and answers what it has accepted
    app = create_app(reward, model, token)
    uvicorn.run(app, **address, access_log=False, timeout_graceful_shutdown=30)


if __name__ == "__main__":
    main()
