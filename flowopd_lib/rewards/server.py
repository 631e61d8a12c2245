"""One reward behind HTTP, for rewards whose packages fit no current environment or who want their own GPU:

    python reward_server.py deqa --model zhiyuanyou/DeQA-Score-Mix3 --trust-remote-code --port 8100

This file stands alone (Python 3.10 or newer; fastapi, uvicorn, pillow, numpy and what its reward imports):
run it in an environment made from servers/requirements-REWARD.txt, as docs/reward-server.md says.

    POST /score   {"reward": "DeQA", "items": [{"png": base64, "prompt": text, "metadata": {}}, ...]}
              ->  {"reward", "version", "model", "results": [{"score": 3.2}, ...]}, one an item; a detector's
                  have "detections" ([{"label", "color", "score", "box"}, ...]) in place of a score, and one
                  that could not be scored is {"error": sentence}, never a score
    GET /health   {"reward", "version", "model", "range", "answers", "ready", ...}; 503 while the model loads

Else {"error": sentence}: 400 what cannot be read, 401 the token, 409 another reward's name, 413 too much, 503
(with Retry-After) a full queue.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import hashlib
import hmac
import io
import ipaddress
import json
import math
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections import namedtuple
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from PIL import Image

PIXELS = 4096 * 4096  # of the largest picture that is opened
TOKEN = "FLOWOPD_REWARD_TOKEN"


# --- rewards: pictures (PIL, RGB) and prompts to one answer each; whatever they import, they import themselves


class Brightness:
    """Mean of the pixels, 0 to 1. It needs no model: to try a server, and for tests; `--delay` makes it
    slow."""

    name, version, range, answers = "Brightness", "1", (0.0, 1.0), "scores"

    def __init__(self, options):
        self.delay = options.delay

    def __call__(self, pictures, prompts):
        time.sleep(self.delay * len(pictures))
        return [float(np.asarray(picture, np.float64).mean() / 255) for picture in pictures]


class DeQA:
    """DeQA-Score (You et al. 2025), 1 to 5: its own code pads to a square, asks "How would you rate the
    quality of this image?" and gives the expectation over excellent, good, fair, poor, bad."""

    name, version, range, answers = "DeQA", "1", (1.0, 5.0), "scores"

    def __init__(self, options):
        if not options.trust_remote_code:
            raise ValueError(
                "DeQA-Score runs code that comes with its weights; read it, then start with "
                "--trust-remote-code (and --revision COMMIT, which keeps it the code that was read)"
            )
        import torch
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(
            options.model,
            revision=options.revision,
            trust_remote_code=True,
            attn_implementation="eager",
            torch_dtype=torch.float16,
            use_safetensors=True,
        )
        self.model.to(options.device).eval().requires_grad_(False)

    def __call__(self, pictures, prompts):
        scores = self.model.score(pictures).float().tolist()
        # its probabilities are in half precision, and their sum passes 1 by up to a thousandth
        return [min(max(s, 1.0), 5.0) if 0.99 < s < 5.01 else s for s in scores]


class ImageReward:
    """ImageReward (Xu et al. 2023), about -2 to 2, a picture and its prompt at a time, as it was made for.
    `--model`: a folder with ImageReward.safetensors and med_config.json."""

    name, version, range, answers = "ImageReward", "1", (-6.0, 6.0), "scores"

    def __init__(self, options):
        from ImageReward.ImageReward import ImageReward as Model

        folder = Path(options.model)
        self.model = Model(device=options.device, med_config=str(folder / "med_config.json"))
        fill(self.model, folder / "ImageReward.safetensors", "position_ids")
        self.model.to(options.device).eval().requires_grad_(False)

    def __call__(self, pictures, prompts):
        return [self.model.score(prompt, picture) for picture, prompt in zip(pictures, prompts)]


class HPS:
    """HPS v2.1 (Wu et al. 2023): cosine of picture and prompt, about .15 to .4, in float32. `--model`: the
    checkpoint as safetensors."""

    name, version, range, answers = "HPS", "1", (-1.0, 1.0), "scores"

    def __init__(self, options):
        import open_clip

        self.device = options.device
        self.model, _, self.look = open_clip.create_model_and_transforms(
            "ViT-H-14", pretrained=None
        )
        fill(self.model, options.model)
        self.model.to(self.device).eval().requires_grad_(False)
        self.tokens = open_clip.get_tokenizer("ViT-H-14")

    def __call__(self, pictures, prompts):
        import torch

        images = torch.stack([self.look(picture) for picture in pictures]).to(self.device)
        seen = self.model.encode_image(images, normalize=True)
        read = self.model.encode_text(self.tokens(list(prompts)).to(self.device), normalize=True)
        return (seen * read).sum(-1).tolist()


COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
SENTENCES = "a photo of a {0} {1}", "a photo of a {0}-colored {1}", "a photo of a {0} object"
# COCO's 80 in its order, by the names that GenEval's prompts have for them
LABELS = tuple(
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,"
    "parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,"
    "tie,suitcase,frisbee,skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,"
    "tennis racket,bottle,wine glass,cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,"
    "hot dog,pizza,donut,cake,chair,couch,potted plant,bed,dining table,toilet,tv,laptop,computer mouse,"
    "tv remote,computer keyboard,cell phone,microwave,oven,toaster,sink,refrigerator,book,clock,vase,"
    "scissors,teddy bear,hair drier,toothbrush".split(",")
)


class GenEval:
    """The detections of GenEval's own detector (Ghosh et al. 2023): mmdetection's Mask2Former, and CLIP
    ViT-L/14 for the colours. The verdict is the client's. `--model`: the detector's weights as safetensors;
    `--config`: mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco.py, in mmdet/.mim/configs/mask2former."""

    name, version, range, answers = "GenEval", "1", (0.0, 1.0), "detections"
    most = 16  # objects of a class
    more = {"labels": LABELS, "colors": COLORS, "threshold": 0.3, "counting_threshold": 0.9}

    def __init__(self, options):
        from mmdet.apis import init_detector
        from transformers import CLIPModel, CLIPProcessor

        if not options.config:
            raise ValueError("geneval needs --config: its detector's file of mmdetection 2.x")
        self.device = options.device
        self.detector = init_detector(options.config, None, device=self.device)
        fill(self.detector, options.model)
        self.clip = CLIPModel.from_pretrained(options.clip, use_safetensors=True)
        self.clip.to(self.device).eval().requires_grad_(False)
        self.look = CLIPProcessor.from_pretrained(options.clip)
        self.texts = {}

    def __call__(self, pictures, prompts):
        from mmdet.apis import inference_detector

        # as mmdetection reads files: blue first
        arrays = [np.ascontiguousarray(np.asarray(picture)[:, :, ::-1]) for picture in pictures]
        return [
            self._objects(*seen)
            for seen in zip(pictures, inference_detector(self.detector, arrays))
        ]

    def _objects(self, picture, found):
        boxes, masks = found
        objects = []
        for label, here, shapes in zip(LABELS, boxes, masks):
            order = [i for i in np.argsort(here[:, 4])[::-1] if here[i, 4] > self.more["threshold"]]
            order = order[: self.most]
            colors = (
                self._colors(label, picture, [(here[i, :4], shapes[i]) for i in order])
                if order
                else []
            )
            objects += [
                {
                    "label": label,
                    "color": c,
                    "score": float(here[i, 4]),
                    "box": [float(x) for x in here[i, :4]],
                }
                for c, i in zip(colors, order)
            ]
        return objects

    def _colors(self, label, picture, objects):
        grey = Image.new("RGB", picture.size, "#999")
        crops = [
            Image.composite(picture, grey, Image.fromarray(np.asarray(mask, bool))).crop(tuple(box))
            for box, mask in objects
        ]
        pixels = self.look(images=crops, return_tensors="pt")["pixel_values"].to(self.device)
        seen = self.clip.get_image_features(pixel_values=pixels)
        seen = getattr(seen, "pooler_output", seen)  # an object since transformers 5
        return [COLORS[i] for i in (seen @ self._classifier(label).T).argmax(1).tolist()]

    def _classifier(self, label):
        """(10, D): for each colour the mean of three normalised sentences, normalised."""
        if label not in self.texts:
            sentences = [words.format(color, label) for color in COLORS for words in SENTENCES]
            how = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
            tokens = self.look(text=sentences, **how).to(self.device)
            read = self.clip.get_text_features(**tokens)
            read = getattr(read, "pooler_output", read)
            mean = (read / read.norm(dim=-1, keepdim=True)).unflatten(0, (len(COLORS), 3)).mean(1)
            self.texts[label] = mean / mean.norm(dim=-1, keepdim=True)
        return self.texts[label]


REWARDS = {
    "brightness": Brightness,
    "deqa": DeQA,
    "imagereward": ImageReward,
    "hps": HPS,
    "geneval": GenEval,
}


def fill(model, path, *but):
    """Weights from safetensors into a model. One that is missing is an error, unless its name ends in one of
    `but`: a reward that is partly random would reward all the same."""
    from safetensors.torch import load_file

    missing = model.load_state_dict(load_file(str(path)), strict=False).missing_keys
    missing = [name for name in missing if not name.endswith(but)]
    if missing:
        raise ValueError("%s lacks %d weights, such as %s" % (path, len(missing), missing[0]))


def named(options):
    """What /health calls the model: a hub id as it is; a file or folder, which may lie elsewhere on another
    machine, by its name and the hash of what is in it."""
    if not options.model:
        return "none"
    path = Path(options.model)
    if not path.exists():
        return "%s@%s" % (options.model, options.revision)
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            for block in iter(lambda: stream.read(1 << 20), b""):
                digest.update(block)
    return "%s sha256:%s" % (path.name, digest.hexdigest()[:16])


# --- the queue, and the thread that empties it


Item = namedtuple("Item", "picture prompt future")


def checked(reward, answer):
    """An answer as it goes out: an error where it is not what this reward can have meant."""
    if reward.answers == "detections":
        if all(math.isfinite(n) for found in answer for n in (found["score"], *found["box"])):
            return {"detections": answer}
        return {"error": "the detector gave a box or a score that is not a number"}
    low, high = reward.range
    value = float(answer)
    if not low <= value <= high:  # nor is NaN
        return {"error": "the model gave %s, which is not between %s and %s" % (value, low, high)}
    return {"score": value}


def scored(reward, items):
    """A result an item. Where several fail together each is tried alone, so that one cannot spoil the
    others."""
    try:
        answers = list(reward([item.picture for item in items], [item.prompt for item in items]))
        if len(answers) != len(items):
            raise ValueError(
                "the model gave %d answers for %d pictures" % (len(answers), len(items))
            )
        return [checked(reward, answer) for answer in answers]
    except Exception as error:
        if len(items) > 1:
            return [scored(reward, [item])[0] for item in items]
        return [{"error": "%s: %s" % (type(error).__name__, error)}]


class Desk:
    """What waits for the reward, and the thread it works in, which takes up to `batch` of that at a time."""

    def __init__(self, kind, load, batch, limit):
        self.kind, self.load, self.batch, self.limit = kind, load, batch, limit
        self.reward, self.model, self.failed = None, "", ""
        self.queue = queue.SimpleQueue()
        self.waiting = (
            0  # pictures taken in and not answered; only the event loop's thread counts them
        )
        self.pace = 0.1  # seconds a picture, lately

    def work(self):
        try:
            self.reward, self.model = self.load()
        except Exception as error:
            self.failed = "%s: %s" % (type(error).__name__, error)
            return
        print("%s is ready" % self.kind.name, flush=True)
        while True:
            self.step()

    def step(self):
        items = [self.queue.get()]
        while len(items) < self.batch and not self.queue.empty():
            items.append(self.queue.get())
        # those whose client has gone are cancelled
        items = [item for item in items if item.future.set_running_or_notify_cancel()]
        if items:
            began = time.perf_counter()
            for item, result in zip(items, scored(self.reward, items)):
                item.future.set_result(result)
            self.pace += 0.2 * ((time.perf_counter() - began) / len(items) - self.pace)


# --- HTTP


class Refused(Exception):
    def __init__(self, status, sentence, after=None):
        self.status, self.sentence, self.after = status, sentence, after


async def body_of(request, most):
    """All of a body of at most `most` bytes."""
    said = request.headers.get("content-length", "0")
    parts, size = [], int(said) if said.isdigit() else 0
    if size <= most:
        size = 0
        async for part in request.stream():
            parts.append(part)
            size += len(part)
            if size > most:
                break
    if size > most:
        raise Refused(
            413, "the body has more than %d MB; send fewer pictures at a time" % (most >> 20)
        )
    return b"".join(parts)


def items_of(body, name):
    """The items of a request, their pictures opened."""
    try:
        asked = json.loads(body)
        reward, given = asked["reward"], asked["items"]
    except (ValueError, KeyError, TypeError):
        raise Refused(400, 'the body must be JSON: {"reward": name, "items": [...]}') from None
    if reward != name:
        raise Refused(409, "this server's reward is %s, not %s" % (name, reward))
    if not isinstance(given, list) or not given:
        raise Refused(400, "items must be a list of at least one")
    items = []
    for number, item in enumerate(given, 1):
        if not isinstance(item, dict) or not isinstance(item.get("prompt", ""), str):
            raise Refused(400, "item %d must be a mapping with png and prompt, both texts" % number)
        try:
            file = io.BytesIO(base64.b64decode(item["png"], validate=True))
            picture = Image.open(file, formats=("PNG",))
            if picture.width * picture.height > PIXELS:
                raise Refused(413, "item %d has more than %d pixels" % (number, PIXELS))
            items.append(Item(picture.convert("RGB"), item.get("prompt", ""), Future()))
        except Refused:
            raise
        except Exception:  # whatever a decoder makes of other people's bytes
            raise Refused(400, "item %d has no PNG in base64 as its png" % number) from None
    return items


def app_of(desk, token, most):
    """The two addresses, for one reward. `most`: bytes of a body."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    told = {"reward": desk.kind.name, "version": desk.kind.version}

    def check(request):
        given = request.headers.get("authorization", "").encode("latin-1")
        if token and not hmac.compare_digest(given, b"Bearer " + token.encode()):
            raise Refused(
                401, "this server wants its token, as the header Authorization: Bearer TOKEN"
            )

    def admit(number):
        if desk.reward is None:
            raise Refused(503, "%s is still loading its model" % desk.kind.name, 5)
        if number > desk.limit:
            raise Refused(
                413, "%d pictures are more than the queue holds (%d)" % (number, desk.limit)
            )
        if desk.waiting + number > desk.limit:
            after = min(max(math.ceil(desk.waiting * desk.pace), 1), 60)
            raise Refused(503, "its queue is full (%d pictures wait)" % desk.waiting, after)

    @app.exception_handler(Refused)
    async def refused(request: Request, why: Refused):
        headers = {"Retry-After": str(why.after)} if why.after else {}
        return JSONResponse({"error": why.sentence}, why.status, headers)

    @app.get("/health")
    async def health(request: Request):
        check(request)
        ready = desk.reward is not None
        more = {
            "model": desk.model,
            "range": desk.kind.range,
            "answers": desk.kind.answers,
            "ready": ready,
        }
        more = {
            **more,
            "waiting": desk.waiting,
            "limit": desk.limit,
            **getattr(desk.kind, "more", {}),
        }
        return JSONResponse(
            {**told, **more}, 200 if ready else 503, {} if ready else {"Retry-After": "5"}
        )

    @app.post("/score")
    async def score(request: Request):
        check(request)
        admit(1)  # before anything is read
        body = await body_of(request, most)
        items = await asyncio.to_thread(items_of, body, desk.kind.name)
        admit(len(items))
        desk.waiting += len(items)
        try:
            for item in items:
                desk.queue.put(item)
            answers = asyncio.gather(*(asyncio.wrap_future(item.future) for item in items))
            while not (await asyncio.wait([answers], timeout=1.0))[0]:
                if await request.is_disconnected():
                    answers.cancel()  # what still waits is not scored
                    raise Refused(499, "the client has gone")
            return JSONResponse({**told, "model": desk.model, "results": answers.result()})
        finally:
            desk.waiting -= len(items)

    return app


def serve(options):
    kind = REWARDS[options.reward]
    desk = Desk(kind, lambda: (kind(options), named(options)), options.batch, options.queue)
    try:
        family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
        listening = socket.create_server((options.host, options.port), family=family, backlog=512)
        # else every answer waits 40 ms for an acknowledgement of its head
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except OSError as error:
        sys.exit(
            "error: port %d of %s cannot be had: %s" % (options.port, options.host, error.strerror)
        )
    config = uvicorn.Config(
        app_of(desk, options.token, options.most << 20),
        log_level="warning",
        access_log=False,
        lifespan="off",
        timeout_keep_alive=75,
        timeout_graceful_shutdown=30,
    )
    server = uvicorn.Server(config)

    def work():
        try:
            desk.work()
        finally:
            server.should_exit = True

    # uvicorn answers what it has begun, gives the signal back, and then this is the end
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    print("%s at http://%s:%d" % (kind.name, options.host, listening.getsockname()[1]), flush=True)
    threading.Thread(target=work, daemon=True).start()
    server.run(sockets=[listening])
    if desk.failed:
        sys.exit("error: %s cannot be loaded: %s" % (kind.name, desk.failed))


OPTIONS = (
    ("model", "", "a hub id, or the weights on disk: see the rewards"),
    ("revision", "main", "the commit of a hub id"),
    ("config", "", "of geneval's detector"),
    ("clip", "openai/clip-vit-large-patch14", "for geneval's colours"),
    ("device", "cuda", ""),
    ("delay", 0.0, "seconds a picture that brightness takes"),
    ("host", "127.0.0.1", "whom it listens to: this machine alone, or others too, with a token"),
    ("port", 8100, "0: any that is free"),
    (
        "token",
        os.environ.get(TOKEN, ""),
        "better in the environment, as " + TOKEN + ": others see commands",
    ),
    ("batch", 16, "pictures in one forward"),
    ("queue", 1024, "pictures that may wait"),
    ("most", 64, "MB of a request"),
)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("reward", choices=REWARDS)
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run a model's own code (deqa)"
    )
    for name, default, words in OPTIONS:
        parser.add_argument("--" + name, default=default, type=type(default), help=words)
    options = parser.parse_args()
    try:
        loopback = options.host == "localhost" or ipaddress.ip_address(options.host).is_loopback
    except ValueError:
        loopback = False
    if not loopback and not options.token:
        parser.error("a server that others can reach needs a token: set %s, here and there" % TOKEN)
    if any(not 33 <= ord(letter) <= 126 for letter in options.token):
        parser.error("the token must be of letters, digits and signs without spaces")
    if options.reward != "brightness" and not options.model:
        parser.error("%s needs --model" % options.reward)
    if min(options.batch, options.queue, options.most) < 1 or options.delay < 0:
        parser.error("--batch, --queue and --most must be at least 1, and --delay at least 0")
    serve(options)


if __name__ == "__main__":
    main()
