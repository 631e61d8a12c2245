"""Rewards elsewhere: behind `server.py`, and vision-language models behind an OpenAI-style
endpoint (vLLM, sglang).

A server that is gone, slow or wrong is an error, never a score. What can be temporary (408, 429,
5xx, no connection, no reply in time) is tried again a few times with growing pauses; after that the
run stops.

Where a reward is and how it is called are private attributes, which a run's fingerprint leaves out:
a server may move.
"""

from __future__ import annotations

import base64
import functools
import os
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import cv2
import httpx
import numpy as np
import torch
from pydantic import AliasPath, BaseModel, Field, ValidationError, validate_call

from ..config import Count, Index, Positive, sentence
from ..data import Prompt
from .base import as_uint8, batches
from .server import TOKEN, DetectedObject, Health, Item, ScoreRequest, ScoreResponse

# seconds that the processes of a run wait for one whose reward is slow or tried again
PATIENCE = 6 * 3600
PAUSE = 0.5  # seconds before the second try; each further pause is twice as long
# "Score: 4.5", not "Score: 1-5"
SCORE = r"(?i)score[\s*_]*:[\s*_]*(-?\d+(?:\.\d+)?)(?![\d.]*\d|\s*(?:-|–|to)\s*\d)"


class RewardUnavailable(RuntimeError):
    """A reward that did not reply, after all tries."""


@functools.cache
def _client(token: str, timeout: float) -> httpx.Client:
    """It uses no proxy of the environment: images and token go to the url alone."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    return httpx.Client(headers=headers, timeout=timeout, trust_env=False)


def encode_png(image: np.ndarray) -> str:
    """(H, W, 3) uint8 as PNG in base64."""
    options = [cv2.IMWRITE_PNG_COMPRESSION, 1]  # twice as fast as pillow; takes BGR
    return base64.b64encode(cv2.imencode(".png", image[:, :, ::-1], options)[1]).decode()


class Endpoint:
    """JSON requests to one server, with the token of the environment, FLOWOPD_REWARD_TOKEN."""

    def __init__(self, url: str, name: str, timeout: float, retries: int):
        if httpx.URL(url).scheme not in ("http", "https"):
            raise ValueError(f"{name} needs a url like http://127.0.0.1:8100, not {url}")
        longest = timeout * (retries + 1) + PAUSE * (2.0 ** min(retries, 99) - 1)
        if longest > PATIENCE:  # another process would end the run first, and not say why
            raise ValueError(
                f"{name}: {retries} retries of {timeout:g} s may take longer than the "
                f"{PATIENCE // 3600} hours that processes wait; lower its timeout or retries"
            )
        self.url, self.timeout, self.retries = url.rstrip("/"), timeout, retries
        self.where = f"{name} at {self.url}"

    def request(self, kind: type[BaseModel], method: str, path: str, body: Any = None) -> Any:
        """The reply as `kind`. Raises RewardUnavailable after the last try, ValueError for a
        refusal or a reply that is something else."""
        token = os.environ.get(TOKEN, "").strip()
        for attempt in range(self.retries + 1):
            time.sleep(PAUSE * 2 ** (attempt - 1) if attempt else 0)
            try:
                reply = _client(token, self.timeout).request(method, self.url + path, json=body)
            except httpx.TransportError as error:
                fault = f"{type(error).__name__}: {error}"
                continue
            if reply.status_code == 200:
                try:
                    return kind.model_validate_json(reply.content)
                except ValidationError as error:
                    raise ValueError(sentence(error, f"the reply of {self.where}")) from None
            fault = f"{reply.status_code} {' '.join(reply.text.split())[:300]}"
            if reply.status_code not in (408, 429) and reply.status_code < 500:
                raise ValueError(f"{self.where} refused: {fault}")
        raise RewardUnavailable(
            f"{self.where} is unavailable (tries: {self.retries + 1}): {fault}. The run's state "
            "is saved: start the reward again, and the same command continues"
        )


class RewardServer(Endpoint):
    """The reward of a `server.py`. Raises ValueError for the server of another reward."""

    def __init__(self, url: str, reward: str, timeout: float, retries: int, batch: int):
        super().__init__(url, reward, timeout, retries)
        self.batch, self.health = batch, self.request(Health, "GET", "/health")
        if self.health.reward != reward:
            raise ValueError(
                f"the server at {url} has the reward {self.health.reward}, not {reward}"
            )

    def results(self, images: np.ndarray, prompts: Sequence[str], field: str) -> list:
        """One entry per image of the replies' `field`, scores or detections."""
        results = []
        for some, own in batches(self.batch, images, prompts):
            items = [Item(png=encode_png(image), prompt=text) for image, text in zip(some, own)]
            body = ScoreRequest(reward=self.health.reward, items=items).model_dump()
            reply = self.request(ScoreResponse, "POST", "/score", body)
            identity = {"reward", "version", "model"}
            before, now = (one.model_dump(include=identity) for one in (self.health, reply))
            if now != before:
                raise ValueError(f"{self.where} is now {now}, and was {before}")
            found = getattr(reply, field)
            if len(found) != len(items):
                raise ValueError(f"{self.where} gave {len(found)} {field} for {len(items)} images")
            results += found
        return results


class RemoteReward:
    """The reward of a reward server, which must have this name at the start, and the same name,
    version and model with every reply.

    `timeout`: seconds per request; `retries`: further tries; `batch`: images per request.

    Raises RewardUnavailable, and ValueError for another reward and for images that could not be
    scored.
    """

    @validate_call
    def __init__(
        self, url: str, reward: str, timeout: Positive = 60.0, retries: Index = 4, batch: Count = 16
    ):
        self._server = RewardServer(url, reward, timeout, retries, batch)
        health = self._server.health
        self.name, self.range = reward, health.range
        self.version, self.model = health.version, health.model

    def __call__(self, images: torch.Tensor, prompts: Sequence[Prompt]) -> np.ndarray:
        pixels = as_uint8(images, prompts, self.name)
        texts = [prompt.text for prompt in prompts]
        return np.array(self._server.results(pixels, texts, "scores"), np.float32)


class RemoteDetector:
    """GenEval's own detector behind a reward server, for `GenEval(RemoteDetector(url))`: the server
    finds objects, our rule scores them. Arguments and errors as for `RemoteReward`."""

    size = None

    @validate_call
    def __init__(self, url: str, timeout: Positive = 60.0, retries: Index = 4, batch: Count = 16):
        self._server = RewardServer(url, "GenEval", timeout, retries, batch)
        health = self._server.health
        self.name, self.version = health.model, health.version
        self.labels, self.colors = health.labels, health.colors
        self.threshold, self.counting_threshold = health.threshold, health.counting_threshold

    def __call__(self, images: np.ndarray) -> list[list[DetectedObject]]:
        return self._server.results(images, [""] * len(images), "detections")


class Models(BaseModel):
    """The reply of /v1/models."""

    data: list[dict[str, Any]]


class Completion(BaseModel):
    """The reply of /v1/chat/completions."""

    text: str = Field(validation_alias=AliasPath("choices", 0, "message", "content"))
    finish: str | None = Field(None, validation_alias=AliasPath("choices", 0, "finish_reason"))


class ChatReward:
    """A vision-language model behind an OpenAI-style endpoint, which gets the image and `prompt`,
    where {prompt} stands for the image's own. The score is the number in its reply that `pattern`
    finds; a reply with none, or with two that differ, is an error.

    `url`: what comes before /v1. `parallel`: requests at the same time. Otherwise as
    `RemoteReward`.
    """

    @validate_call
    def __init__(
        self,
        url: str,
        model: str,
        prompt: str,
        range: tuple[float, float],
        name: str = "ChatReward",
        pattern: str = SCORE,
        max_tokens: Count = 512,
        timeout: Positive = 60.0,
        retries: Index = 4,
        parallel: Count = 8,
    ):
        self.name, self.range, self.model, self.prompt = name, range, model, prompt
        self.pattern, self.max_tokens, self._parallel = pattern, max_tokens, parallel
        self._endpoint = Endpoint(url, name, timeout, retries)
        served = [m.get("id") for m in self._endpoint.request(Models, "GET", "/v1/models").data]
        if model not in served:
            raise ValueError(f"{url} serves {', '.join(map(str, served))}, not {model}")

    def __call__(self, images: torch.Tensor, prompts: Sequence[Prompt]) -> np.ndarray:
        pixels = as_uint8(images, prompts, self.name)
        with ThreadPoolExecutor(self._parallel) as pool:
            return np.array(list(pool.map(self._score, pixels, prompts)), np.float32)

    def _score(self, image: np.ndarray, prompt: Prompt) -> float:
        url = {"url": f"data:image/png;base64,{encode_png(image)}"}
        text = self.prompt.replace("{prompt}", prompt.text)
        content = [{"type": "image_url", "image_url": url}, {"type": "text", "text": text}]
        body = {"model": self.model, "messages": [{"role": "user", "content": content}]}
        body |= {"temperature": 0, "max_tokens": self.max_tokens}
        reply = self._endpoint.request(Completion, "POST", "/v1/chat/completions", body)
        scores = {float(value) for value in re.findall(self.pattern, reply.text)}
        if len(scores) != 1 or reply.finish == "length":
            fault = "was cut off" if reply.finish == "length" else f"has {len(scores)} scores"
            where = f"the reply of {self.name} to the image of {prompt.text!r}"
            raise ValueError(f"{where} {fault}: {reply.text[-200:]!r}")
        return scores.pop()
