"""One reward behind HTTP, for rewards whose packages fit no current environment or that need a GPU
of their own:

    python server.py deqa --model zhiyuanyou/DeQA-Score-Mix3 --trust-remote-code --port 8100

This file stands alone (Python 3.10 or newer; fastapi, uvicorn, pillow, numpy and what its reward
imports): run it in an environment made from servers/requirements-REWARD.txt, as
docs/reward-server.md says.

    POST /score  {"reward": "DeQA", "items": [{"png": base64, "prompt": text, "metadata": {}}, ...]}
    -> {"reward", "version", "model", "results": [{"score": 3.2}, ...]}, one result per item. A
       detector's has "detections", [{"label", "color", "score", "box"}, ...], in place of a score;
       that of an item that could not be scored has {"error": sentence}, and never a score.
    GET /health
    -> {"reward", "version", "model", "range", "answers", "ready", ...}; 503 while the model loads

All other replies are {"error": sentence}: 400 for what cannot be read, 401 for the token, 409 for
another reward's name, 413 for too much, 503 (with Retry-After) for a full queue.
"""

import argparse
import asyncio
import base64
import hashlib
import hmac
import io
import os
import queue
import sys
import threading
import time
from collections import namedtuple
from concurrent.futures import Future
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from PIL import Image
from pydantic import BaseModel, Field, ValidationError

TOKEN = "FLOWOPD_REWARD_TOKEN"
MAX_PIXELS = 4096 * 4096  # of an image
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]


# --- the protocol, which the client imports from here; FastAPI is imported only to serve it


class Item(BaseModel):
    png: str  # in base64
    prompt: str = ""
    metadata: dict[str, Any] = {}


class ScoreRequest(BaseModel):
    reward: str
    items: list[Item] = Field(min_length=1)


class DetectedObject(BaseModel):
    label: str
    color: str | None
    score: Annotated[Number, Field(ge=0, le=1)]
    box: tuple[Number, Number, Number, Number]  # left, top, right, bottom


class Result(BaseModel):
    score: Number | None = None
    detections: list[DetectedObject] | None = None
    error: str | None = None


class Identity(BaseModel):
    reward: str
    version: str
    model: str


class ScoreResponse(Identity):
    results: list[Result]


class Health(Identity):
    range: tuple[float, float]
    answers: Literal["scores", "detections"]
    ready: bool = True
    waiting: int = 0
    limit: int = 0
    labels: tuple[str, ...] = ()  # this and the following: of a detector
    colors: tuple[str, ...] = ()
    threshold: float = 0.3
    counting_threshold: float = 0.9


# --- rewards: images (PIL, RGB) and prompts to one answer each; each imports what it needs


class Brightness:
    """Mean of the pixels, 0 to 1: needs no model, to try a server and for tests; `--delay` slows it
    down."""

    name, version, range, answers = "Brightness", "1", (0.0, 1.0), "scores"

    def __init__(self, options):
        self.delay = options.delay

    def __call__(self, images, prompts):
        time.sleep(self.delay * len(images))
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

        load = {
            "torch_dtype": torch.float16,
            "attn_implementation": "eager",
            "use_safetensors": True,
        }
        load |= {"trust_remote_code": True, "revision": options.revision}
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
    colours to each cut-out object, by cosine to the mean of three unit text embeddings that name
    colour and class. For a CLIPModel (GenEval's: openai/clip-vit-large-patch14) and its
    processor."""

    def __init__(self, model, processor, batch=64):
        self.model, self.processor, self.batch = model, processor, batch
        self._texts = {}

    def __call__(self, crops, labels):
        """One colour per object, from PIL images (#999 outside the object) and their classes."""
        colors = []
        for i in range(0, len(crops), self.batch):
            z_image = self.embed("image", images=crops[i : i + self.batch])
            z_texts = [self.text_embeddings(label) for label in labels[i : i + self.batch]]
            cosines = [(z_text @ z).tolist() for z_text, z in zip(z_texts, z_image)]
            if not np.isfinite(cosines).all():
                raise ValueError("GenEval's CLIP gave NaN; load its weights again, in float32")
            colors += [COLORS[i] for i in np.argmax(cosines, 1)]
        return colors

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
    max_objects = 16  # of a class

    def __init__(self, options):
        from mmdet.apis import init_detector
        from transformers import CLIPModel, CLIPProcessor

        if not options.config:
            raise ValueError("geneval needs --config: its detector's file of mmdetection 2.x")
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
        gray, objects, crops = Image.new("RGB", image.size, "#999"), [], []
        for label, rows, shapes in zip(LABELS, boxes, masks):
            for i in np.argsort(rows[:, 4])[::-1][: self.max_objects]:
                *box, score = rows[i].tolist()
                if score > self.health["threshold"]:
                    mask = Image.fromarray(np.asarray(shapes[i], bool))
                    crops.append(Image.composite(image, gray, mask).crop(tuple(box)))
                    objects.append({"label": label, "score": score, "box": box})
        colors = self.classify(crops, [found["label"] for found in objects])
        return [found | {"color": color} for found, color in zip(objects, colors)]


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


# --- the queue, and the thread that scores what waits in it


Job = namedtuple("Job", "image prompt future")


def to_result(reward, answer):
    if reward.answers == "detections":
        return Result(detections=answer)
    value, (low, high) = float(answer), reward.range
    if not low <= value <= high:  # nor NaN
        return Result(error=f"the model gave {value}, which is not between {low} and {high}")
    return Result(score=value)


def score_jobs(reward, jobs):
    """One result per job. If a batch fails, its jobs are scored one by one, so that none fails the
    others."""
    try:
        answers = list(reward([job.image for job in jobs], [job.prompt for job in jobs]))
        if len(answers) != len(jobs):
            raise ValueError(f"the model gave {len(answers)} answers for {len(jobs)} images")
        return [to_result(reward, answer) for answer in answers]
    except Exception as error:
        if len(jobs) > 1:
            return [score_jobs(reward, [job])[0] for job in jobs]
        return [Result(error=f"{type(error).__name__}: {error}")]


class Scorer:
    """A reward's queue, and what its thread runs: the model, on up to `batch` jobs at a time."""

    def __init__(self, kind, batch, limit):
        self.kind, self.batch, self.limit = kind, batch, limit
        self.reward, self.model = None, ""
        self.jobs = queue.SimpleQueue()
        self.waiting = 0  # images accepted and not answered; only the event loop changes it
        self.seconds_per_image = 0.1  # moving average

    def run(self, options):
        try:
            reward, self.model = self.kind(options), describe_model(options.model, options.revision)
            self.reward = reward
            print(f"{self.kind.name} is ready", flush=True)
            while True:
                self.step()
        except Exception as error:
            fault = "failed" if self.reward else "cannot be loaded"
            message = f"error: {self.kind.name} {fault}: {type(error).__name__}: {error}"
            print(message, file=sys.stderr, flush=True)
            os._exit(1)  # the event loop's thread cannot go on without this one

    def step(self):
        jobs = [self.jobs.get()]
        while len(jobs) < self.batch and not self.jobs.empty():
            jobs.append(self.jobs.get())
        # cancelled where the client has disconnected
        jobs = [job for job in jobs if job.future.set_running_or_notify_cancel()]
        if jobs:
            start = time.perf_counter()
            for job, result in zip(jobs, score_jobs(self.reward, jobs)):
                job.future.set_result(result)
            seconds = (time.perf_counter() - start) / len(jobs)
            self.seconds_per_image += 0.2 * (seconds - self.seconds_per_image)


# --- HTTP


def create_app(scorer, token, max_bytes):
    from fastapi import Depends, FastAPI, Request, Response
    from fastapi.responses import JSONResponse
    from starlette.exceptions import HTTPException

    async def check_token(request: Request):
        sent = request.headers.get("authorization", "").encode("latin-1")
        if token and not hmac.compare_digest(sent, f"Bearer {token}".encode()):
            raise HTTPException(401, "this server needs its token: Authorization: Bearer TOKEN")

    about = {"reward": scorer.kind.name, "version": scorer.kind.version}
    urls = {"docs_url": None, "redoc_url": None, "openapi_url": None}
    app = FastAPI(dependencies=[Depends(check_token)], **urls)

    @app.exception_handler(HTTPException)
    async def send_error(request: Request, error: HTTPException):
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)

    def check_room(count):
        if scorer.reward is None:
            raise HTTPException(503, "the model is still loading", {"Retry-After": "5"})
        if count > scorer.limit:
            raise HTTPException(413, f"the queue holds {scorer.limit} images, not {count}")
        if scorer.waiting + count > scorer.limit:
            seconds = min(1 + int(scorer.waiting * scorer.seconds_per_image), 60)
            error = f"the queue is full: {scorer.waiting} images wait"
            raise HTTPException(503, error, {"Retry-After": str(seconds)})

    def read_jobs(body):
        try:
            request = ScoreRequest.model_validate_json(body)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise HTTPException(400, f"{where}: {first['msg']}") from None
        if request.reward != scorer.kind.name:
            error = f"this server's reward is {scorer.kind.name}, not {request.reward}"
            raise HTTPException(409, error)
        return [read_job(f"items.{i}", item) for i, item in enumerate(request.items)]

    def read_job(where, item):
        try:
            data = io.BytesIO(base64.b64decode(item.png, validate=True))
            image = Image.open(data, formats=("PNG",))
            if image.width * image.height <= MAX_PIXELS:
                return Job(image.convert("RGB"), item.prompt, Future())
        except Exception:  # whatever a decoder raises
            raise HTTPException(400, f"{where}.png is not a PNG image in base64") from None
        raise HTTPException(413, f"{where}.png has more than {MAX_PIXELS} pixels")

    @app.get("/health", response_model_exclude_unset=True)
    async def health(response: Response) -> Health:
        if scorer.reward is None:
            response.status_code, response.headers["Retry-After"] = 503, "5"
        state = {name: getattr(scorer, name) for name in ("model", "waiting", "limit")}
        state |= {name: getattr(scorer.kind, name) for name in ("range", "answers")}
        state |= getattr(scorer.kind, "health", {})
        return Health(ready=scorer.reward is not None, **about, **state)

    @app.post("/score", response_model_exclude_unset=True)
    async def score(request: Request) -> ScoreResponse:
        check_room(1)  # before anything is read
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > max_bytes:
                error = f"the body has more than {max_bytes >> 20} MB; send fewer images at a time"
                raise HTTPException(413, error)
        jobs = await asyncio.to_thread(read_jobs, bytes(body))
        check_room(len(jobs))
        scorer.waiting += len(jobs)
        try:
            for job in jobs:
                scorer.jobs.put(job)
            results = asyncio.gather(*(asyncio.wrap_future(job.future) for job in jobs))
            while not (await asyncio.wait([results], timeout=1.0))[0]:
                if await request.is_disconnected():
                    results.cancel()  # what still waits is not scored
                    raise HTTPException(499, "the client has disconnected")
            return ScoreResponse(**about, model=scorer.model, results=results.result())
        finally:
            scorer.waiting -= len(jobs)

    return app


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add, token = parser.add_argument, os.environ.get(TOKEN, "")
    add("reward", choices=REWARDS)
    add("--model", default="", help="a hub id, or weights on disk: see the rewards")
    add("--revision", default="main", help="commit of a hub id")
    add("--trust-remote-code", action="store_true", help="run a model's own code (deqa)")
    add("--config", default="", help="of geneval's detector")
    add("--clip", default="openai/clip-vit-large-patch14", help="for geneval's colours")
    add("--device", default="cuda")
    add("--delay", default=0.0, type=float, help="seconds per image of brightness")
    add("--host", default="127.0.0.1", help=f"others than loopback need a token, {TOKEN}")
    add("--port", default=8100, type=int, help="0: any free one")
    add("--batch", default=16, type=int, help="images in one forward")
    add("--queue", default=1024, type=int, help="images that may wait")
    add("--max-mb", default=64, type=int, help="of a request")
    options = parser.parse_args()
    if options.host not in ("127.0.0.1", "::1", "localhost") and not token:
        parser.error(f"a server that others can reach needs a token: set {TOKEN}, here and there")
    if options.reward != "brightness" and not options.model:
        parser.error(f"{options.reward} needs --model")
    import uvicorn

    scorer = Scorer(REWARDS[options.reward], options.batch, options.queue)
    threading.Thread(target=scorer.run, args=[options], daemon=True).start()
    app = create_app(scorer, token, options.max_mb << 20)
    address = {"host": options.host, "port": options.port}
    # on SIGTERM, uvicorn accepts nothing more and answers what it has accepted
    uvicorn.run(app, **address, access_log=False, timeout_graceful_shutdown=30)


if __name__ == "__main__":
    main()
