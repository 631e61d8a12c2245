"""Rewards elsewhere: behind `server.py`, and vision-language models behind an OpenAI-style
endpoint.

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
import random
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
from .geneval import Detection
from .server import TOKEN, Health, Item, Result, ScoreRequest, ScoreResponse

PAUSE, MAX_PAUSE = 0.5, 60.0  # seconds: the first pause, and the longest that a server may ask for
# "Score: 4.5", not "Score: 1-5"
SCORE = r"(?i)score[\s*_]*:[\s*_]*(-?\d+(?:\.\d+)?)(?![\d.]*\d|\s*(?:-|–|to)\s*\d)"


class RewardUnavailable(RuntimeError):
    """A reward that did not reply, after all tries."""


@functools.cache
def _client(process: int, token: str, timeout: float) -> httpx.Client:
    """Shared by threads, not with forked processes. It uses no proxy of the environment: images and
    token go to the url alone."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    return httpx.Client(headers=headers, timeout=timeout, trust_env=False)


class Endpoint:
    """JSON requests to one server, with the token of the environment, FLOWOPD_REWARD_TOKEN."""

    def __init__(self, url: str, name: str, timeout: float, retries: int):
        parts = httpx.URL(url)
        if parts.scheme not in ("http", "https") or not parts.host or parts.query or parts.userinfo:
            raise ValueError(f"{name} needs a url like http://127.0.0.1:8100, with no password")
        self.url, self.name, self.timeout, self.retries = url.rstrip("/"), name, timeout, retries
        self.where = f"{name} at {self.url}"

    def request(self, method: str, path: str, kind: type[BaseModel], body: Any = None) -> Any:
        """The reply as `kind`. Raises RewardUnavailable after the last try, ValueError for a
        refusal or a reply that is something else."""
        token = os.environ.get(TOKEN, "")
        if not all("!" <= letter <= "~" for letter in token):
            raise ValueError(f"{TOKEN} must consist of letters, digits and signs without spaces")
        for attempt in range(self.retries + 1):
            pause, client = PAUSE * 2**attempt, _client(os.getpid(), token, self.timeout)
            try:
                reply = client.request(method, self.url + path, json=body)
            except httpx.TimeoutException:
                fault = f"no reply within {self.timeout:g} s"
            except httpx.TransportError as error:
                fault = f"no connection ({str(error) or type(error).__name__})"
            else:
                if reply.status_code == 200:
                    try:
                        return kind.model_validate_json(reply.content)
                    except ValidationError as error:
                        raise ValueError(sentence(error, f"the reply of {self.where}")) from None
                text = " ".join(reply.text.split())[:300]
                fault = f"{reply.status_code} {text.replace(token, '...') if token else text}"
                if reply.status_code not in (408, 429) and reply.status_code < 500:
                    hint = f"; the token is read from {TOKEN}" if reply.status_code == 401 else ""
                    raise ValueError(f"{self.where} refused: {fault}{hint}")
                seconds = reply.headers.get("Retry-After", "")
                pause = max(pause, min(float(seconds), MAX_PAUSE) if seconds.isdigit() else 0.0)
            if attempt < self.retries:
                # at another moment in each process, and without drawing from seeded generators
                time.sleep(pause * random.SystemRandom().uniform(1, 1.25))
        raise RewardUnavailable(
            f"{self.where} is unavailable (tries: {self.retries + 1}): {fault}. The run's state "
            "is saved: start the reward again, and the same command continues"
        )


def encode_png(image: np.ndarray) -> str:
    """(H, W, 3) uint8 as PNG in base64."""
    options = [cv2.IMWRITE_PNG_COMPRESSION, 1]  # twice as fast as pillow; takes BGR
    return base64.b64encode(cv2.imencode(".png", image[:, :, ::-1], options)[1]).decode()


class RewardServer(Endpoint):
    """The reward of a `server.py`. Raises ValueError if its /health is not as `expected`."""

    def __init__(self, url: str, name: str, timeout: float, retries: int, batch: int, **expected):
        super().__init__(url, name, timeout, retries)
        self.batch, self.health = batch, self.request("GET", "/health", Health)
        for key, value in {**expected, "reward": name}.items():
            actual = getattr(self.health, key)
            if value not in (None, actual):
                raise ValueError(f"the server at {self.url} has the {key} {actual}, not {value}")

    def results(self, images: np.ndarray, prompts: Sequence[str]) -> list[Result]:
        """One result per image. Raises ValueError, with its number and prompt, for one that
        failed."""
        results: list[Result] = []
        for some, own in batches(self.batch, images, prompts):
            items = [Item(png=encode_png(image), prompt=text) for image, text in zip(some, own)]
            body = ScoreRequest(reward=self.health.reward, items=items).model_dump()
            reply = self.request("POST", "/score", ScoreResponse, body)
            identity = {"reward", "version", "model"}
            before, now = (one.model_dump(include=identity) for one in (self.health, reply))
            if now != before:
                raise ValueError(f"{self.where} is now {now}, and was {before}")
            if len(reply.results) != len(items):
                count = f"{len(reply.results)} results for {len(items)} images"
                raise ValueError(f"{self.where} gave {count}")
            results += reply.results
        for number, (result, prompt) in enumerate(zip(results, prompts), 1):
            if result.score is None and result.detections is None:
                image = f"image {number} of {len(images)} ({prompt!r})"
                raise ValueError(f"{self.where} could not score {image}: {result.error}")
        return results


class RemoteReward:
    """The reward of a reward server, which must have this name, version and range at the start, and
    the same name, version and model with every reply; version and range are the server's if left
    out.

    `timeout`: seconds per request; `retries`: further tries; `batch`: images per request.

    Raises RewardUnavailable, and ValueError for another reward and for an image that could not be
    scored.
    """

    @validate_call
    def __init__(
        self,
        url: str,
        reward: str,
        timeout: Positive = 60.0,
        retries: Index = 4,
        batch: Count = 16,
        version: str | None = None,
        range: tuple[float, float] | None = None,
    ):
        expected = {"answers": "scores", "version": version, "range": range}
        self._server = RewardServer(url, reward, timeout, retries, batch, **expected)
        health = self._server.health
        self.name, self.range = reward, health.range
        self.version, self.model = health.version, health.model

    def __call__(self, images: torch.Tensor, prompts: Sequence[Prompt]) -> np.ndarray:
        pixels = as_uint8(images, prompts, self.name)
        results = self._server.results(pixels, [prompt.text for prompt in prompts])
        return np.array([result.score for result in results], np.float32)


class RemoteDetector:
    """GenEval's own detector behind a reward server, for `GenEval(RemoteDetector(url))`: the server
    finds objects, our rule scores them. Arguments and errors as for `RemoteReward`."""

    size = None

    @validate_call
    def __init__(
        self,
        url: str,
        timeout: Positive = 60.0,
        retries: Index = 4,
        batch: Count = 16,
        version: str | None = None,
    ):
        expected = {"answers": "detections", "version": version}
        self._server = RewardServer(url, "GenEval", timeout, retries, batch, **expected)
        health = self._server.health
        self.name, self.version = health.model, health.version
        self.labels, self.colors = health.labels, health.colors
        self.threshold, self.counting_threshold = health.threshold, health.counting_threshold

    def __call__(self, images: np.ndarray) -> list[list[Detection]]:
        detections = []
        for result in self._server.results(images, [""] * len(images)):
            detections.append([Detection(**d.model_dump()) for d in result.detections])
            for d in detections[-1]:
                if d.label not in self.labels or d.color not in (None, *self.colors):
                    raise ValueError(f"{self._server.where} gave {d}: not one of its own labels")
        return detections


class Models(BaseModel):
    """The reply of /v1/models."""

    data: list[dict[str, Any]]


class Completion(BaseModel):
    """The reply of /v1/chat/completions."""

    content: str | None = Field(validation_alias=AliasPath("choices", 0, "message", "content"))
    finish: str | None = Field(None, validation_alias=AliasPath("choices", 0, "finish_reason"))


class ChatReward:
    """A vision-language model behind an OpenAI-style endpoint (vLLM, sglang), which gets the image
    and `prompt`, where {prompt} stands for the image's own. The score is the number in its reply
    that `pattern` finds; a reply with none, or with two that differ, is an error.

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
        if re.compile(pattern).groups != 1:
            raise ValueError(f"pattern must have one group, the score, unlike {pattern!r}")
        self.name, self.range, self.model, self.prompt = name, range, model, prompt
        self.pattern, self.max_tokens, self._parallel = pattern, max_tokens, parallel
        self._endpoint = Endpoint(url, name, timeout, retries)
        names = [m.get("id") for m in self._endpoint.request("GET", "/v1/models", Models).data]
        if model not in names:
            raise ValueError(f"{url} serves {', '.join(map(str, names)) or 'nothing'}, not {model}")

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
        reply = self._endpoint.request("POST", "/v1/chat/completions", Completion, body)
        scores = {float(value) for value in re.findall(self.pattern, reply.content or "")}
        if len(scores) != 1 or reply.finish == "length":
            fault = "was cut off" if reply.finish == "length" else f"has {len(scores)} scores"
            end = f"{fault}: {(reply.content or '')[-200:]!r}"
            raise ValueError(f"the reply of {self.name} to the image of {prompt.text!r} {end}")
        return scores.pop()
