"""Rewards elsewhere: those of `reward_server.py`, and vision-language models behind an OpenAI-style endpoint.

A server that is gone, slow or wrong is an error, never a score. What can pass by itself (408, 429, 5xx, no
connection, no answer in time) is tried again a few times with growing pauses; after that the run stops.
"""

from __future__ import annotations

import base64
import json
import os
import random
import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import cv2
import httpx
import numpy as np
import torch

from ..prompts import Prompt
from .base import as_uint8
from .geneval import Detection

TOKEN = "FLOWOPD_REWARD_TOKEN"
PAUSE, LONGEST = 0.5, 60.0  # seconds: the first pause, and the longest a server may ask for
SCORE = r"(?i)score[\s*_]*:[\s*_]*(-?\d+(?:\.\d+)?)(?![\d.]*\d|\s*(?:-|–|to)\s*\d)"  # "Score: 4.5", not "1-5"


class RewardUnavailable(RuntimeError):
    """A reward that did not answer, after as many tries as were allowed."""


class _Line:
    """Requests to one server. Threads may share it; a process made by a fork gets connections of its own."""

    def __init__(self, url: str, reward: str, token: str | None, timeout: float, retries: int):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query:
            raise ValueError(f"{reward} needs a url such as http://127.0.0.1:8100")
        if parts.username or parts.password:
            raise ValueError(
                f"the url of {reward} must not hold a password; give the token in {TOKEN}"
            )
        if not timeout > 0 or retries < 0:
            raise ValueError(
                f"timeout must be positive and retries at least 0, not {timeout:g} and {retries}"
            )
        self.url, self.reward, self.timeout, self.retries = (
            url.rstrip("/"),
            reward,
            timeout,
            retries,
        )
        self.token = os.environ.get(TOKEN, "") if token is None else token
        if not all("!" <= letter <= "~" for letter in self.token):
            raise ValueError(
                f"the token of {reward} must be of letters, digits and signs without spaces"
            )
        self.client: tuple[int, httpx.Client] | None = None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "client": None}

    def _client(self) -> httpx.Client:
        if self.client is None or self.client[0] != os.getpid():
            # no proxy of the environment's: pictures and token go to the url that was given
            headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
            client = httpx.Client(headers=headers, timeout=self.timeout, trust_env=False)
            self.client = os.getpid(), client
        return self.client[1]

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """The JSON of an answer. Raises RewardUnavailable after the last try, ValueError for a refusal."""
        content = None if body is None else json.dumps(body).encode()
        for attempt in range(self.retries + 1):
            pause, ours = PAUSE * 2**attempt, {"Content-Type": "application/json"}
            try:
                reply = self._client().request(
                    method, self.url + path, content=content, headers=ours
                )
            except httpx.TimeoutException:
                said = f"no answer within {self.timeout:g} s"
            except httpx.TransportError as error:
                said = f"no connection ({str(error) or type(error).__name__})"
            else:
                said = self._said(reply)
                if reply.status_code == 200:
                    try:
                        return reply.json()
                    except ValueError:
                        raise ValueError(
                            f"{self.reward} at {self.url} answered something else than JSON"
                        ) from None
                if reply.status_code not in (408, 429) and reply.status_code < 500:
                    raise ValueError(f"{self.reward} at {self.url} refused: {said}")
                asked = reply.headers.get("Retry-After", "")
                pause = max(pause, min(float(asked), LONGEST) if asked.isdigit() else 0.0)
            if attempt < self.retries:
                # not all processes at the same moment; and nobody's seeded numbers are drawn from
                time.sleep(pause * random.SystemRandom().uniform(1, 1.25))
        tries = f"{self.retries + 1} tries" if self.retries else "1 try"
        raise RewardUnavailable(
            f"{self.reward} at {self.url} cannot reward, after {tries}: {said}. The run's state is saved: "
            "start the reward again, and the same command goes on"
        )

    def _said(self, reply: httpx.Response) -> str:
        try:
            body = reply.json()
            error = body.get("error", body.get("detail", body)) if isinstance(body, dict) else body
            text = error if isinstance(error, str) else json.dumps(error)
        except ValueError:
            text = reply.text
        text = " ".join(text.split())[:300]
        if self.token:
            text = text.replace(self.token, "...")
        if reply.status_code == 401:
            text += f"; the token is read from {TOKEN}"
        return f"{reply.status_code} {text}".strip()


def png(picture: np.ndarray) -> str:
    """(H, W, 3) uint8 as PNG in base64."""
    options = [cv2.IMWRITE_PNG_COMPRESSION, 1]  # half as long as pillow takes; it wants blue first
    return base64.b64encode(
        cv2.imencode(".png", picture[:, :, ::-1], options)[1].tobytes()
    ).decode()


def _greet(line: _Line, answers: str, expected: dict[str, Any]) -> dict[str, Any]:
    """A server's /health. Raises ValueError where it is not what was `expected`."""
    health = line.ask("GET", "/health")
    lacks = {"reward", "version", "model", "range", "answers"} - set(health)
    if lacks:
        raise ValueError(
            f"{line.url} is no reward server of ours: its /health lacks {', '.join(sorted(lacks))}"
        )
    for key, wanted in {"answers": answers, **expected}.items():
        there = tuple(health[key]) if isinstance(health[key], list) else health[key]
        if wanted is not None and there != wanted:
            raise ValueError(
                f"the server at {line.url} has the {key} {there}, not {wanted}; give another server's url, "
                "or what this one is"
            )
    return health


def _results(
    line: _Line, health: dict, key: str, pictures: np.ndarray, texts: Sequence[str], batch: int
) -> Iterator[Any]:
    """What the server says of each picture, `batch` in a request. Raises ValueError, naming the picture."""
    for start in range(0, len(pictures), batch):
        part, told = pictures[start : start + batch], texts[start : start + batch]
        items = [{"png": png(p), "prompt": t, "metadata": {}} for p, t in zip(part, told)]
        reply = line.ask("POST", "/score", {"reward": health["reward"], "items": items})
        reply = reply if isinstance(reply, dict) else {}
        who = {key: reply.get(key) for key in ("reward", "version", "model")}
        if who != {key: health[key] for key in who}:
            raise ValueError(
                f"the server at {line.url} was {health['reward']} {health['version']} of {health['model']} "
                f"and is {who['reward']} {who['version']} of {who['model']} now; scores of two rewards are not "
                "mixed"
            )
        results = reply.get("results", ())
        if len(results) != len(items):
            raise ValueError(
                f"{line.reward} at {line.url} gave {len(results)} answers for {len(items)} pictures"
            )
        for number, (result, text) in enumerate(zip(results, told), start + 1):
            if not isinstance(result, dict) or key not in result:
                raise ValueError(
                    f"{line.reward} at {line.url} could not reward picture {number} of {len(pictures)} "
                    f"({text!r}): {result.get('error') if isinstance(result, dict) else result!r}"
                )
            yield result[key]


def _checked(
    line: _Line, value: Any, allowed: tuple[float, float], number: int, text: str
) -> float:
    number_given = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number_given or not allowed[0] <= value <= allowed[1]:  # nor is NaN
        raise ValueError(
            f"{line.reward} at {line.url} gave {value!r} for picture {number} ({text!r}), which is not "
            f"between {allowed[0]:g} and {allowed[1]:g}"
        )
    return float(value)


class RemoteReward:
    """The reward of a reward server, as a `Reward`. What `reward`, `version` and `range` say must be what the
    server says of itself, now and with every answer; those left out are taken from it.

    `token`: by default that of the environment, FLOWOPD_REWARD_TOKEN. `timeout`: seconds a request; `retries`:
    further tries; `batch`: pictures in a request.

    Raises RewardUnavailable, and ValueError for a reward that is another or an answer that is no score.
    """

    def __init__(
        self,
        url: str,
        reward: str,
        token: str | None = None,
        timeout: float = 60.0,
        retries: int = 4,
        batch: int = 16,
        version: str | None = None,
        range: tuple[float, float] | None = None,
    ):
        if batch < 1:
            raise ValueError(f"batch must be at least 1, not {batch}")
        self._line, self.batch = _Line(url, reward, token, timeout, retries), batch
        wanted = {"reward": reward, "version": version, "range": range and tuple(range)}
        self._health = _greet(self._line, "scores", wanted)
        self.name, self.range = reward, tuple(self._health["range"])

    def __call__(self, images: torch.Tensor, prompts: Sequence[Prompt]) -> np.ndarray:
        texts = [prompt.text for prompt in prompts]
        pictures = as_uint8(images, prompts, self.name)
        values = _results(self._line, self._health, "score", pictures, texts, self.batch)
        numbered = enumerate(zip(values, texts), 1)
        return np.array(
            [_checked(self._line, v, self.range, n, t) for n, (v, t) in numbered], np.float32
        )

    def identity(self) -> dict[str, Any]:
        """What a training's state says of it: the reward, not where it lives, so that a server may move."""
        return {key: self._health[key] for key in ("reward", "version", "model", "range")}


class RemoteDetector:
    """GenEval's own detector behind a reward server, for `GenEval(RemoteDetector(url))`: the server finds
    objects, and our rule rewards them. Arguments and errors as for `RemoteReward`."""

    size = None

    def __init__(
        self,
        url: str,
        token: str | None = None,
        timeout: float = 60.0,
        retries: int = 4,
        batch: int = 16,
        version: str | None = None,
    ):
        if batch < 1:
            raise ValueError(f"batch must be at least 1, not {batch}")
        self._line, self.batch = _Line(url, "GenEval", token, timeout, retries), batch
        self._health = _greet(self._line, "detections", {"reward": "GenEval", "version": version})
        self.labels, self.colors = tuple(self._health["labels"]), tuple(self._health["colors"])
        self.threshold = float(self._health["threshold"])
        self.counting_threshold = float(self._health["counting_threshold"])

    def __call__(self, images: np.ndarray) -> list[list[Detection]]:
        found = _results(
            self._line, self._health, "detections", images, [""] * len(images), self.batch
        )
        return [[self._detection(d, number) for d in seen] for number, seen in enumerate(found, 1)]

    def _detection(self, told: dict, number: int) -> Detection:
        label, color = told["label"], told["color"]
        if label not in self.labels or color not in (None, *self.colors) or len(told["box"]) != 4:
            raise ValueError(
                f"{self._line.url} gave {told} for picture {number}, which is no detection"
            )
        score = _checked(self._line, told["score"], (0.0, 1.0), number, label)
        edges = [_checked(self._line, edge, (-1e6, 1e6), number, label) for edge in told["box"]]
        return Detection(label, color, score, tuple(edges))

    def identity(self) -> dict[str, Any]:
        return {key: self._health[key] for key in ("reward", "version", "model")}


class ChatReward:
    """A vision-language model behind an OpenAI-style endpoint (vLLM, sglang) that is shown the picture and
    asked `prompt`, in which {prompt} stands for the picture's own. Its reply's number, which `pattern` finds,
    is the score; a reply with none, with two that differ, or with one out of `range` is an error.

    `url`: what comes before /v1. `parallel`: pictures asked about at the same time. Else as `RemoteReward`.
    """

    def __init__(
        self,
        url: str,
        model: str,
        prompt: str,
        range: tuple[float, float],
        name: str = "ChatReward",
        pattern: str = SCORE,
        max_tokens: int = 512,
        token: str | None = None,
        timeout: float = 60.0,
        retries: int = 4,
        parallel: int = 8,
    ):
        if re.compile(pattern).groups != 1:
            raise ValueError(
                f"pattern must have one group, the score: {pattern!r} has another number"
            )
        if not range[0] < range[1] or parallel < 1:
            raise ValueError(
                f"range must go up and parallel be at least 1, not {range} and {parallel}"
            )
        self._line = _Line(url, name, token, timeout, retries)
        self.name, self.range, self.model, self.prompt = name, tuple(range), model, prompt
        self.pattern, self.max_tokens, self.parallel = pattern, max_tokens, parallel
        served = [m.get("id") for m in self._line.ask("GET", "/v1/models").get("data", [])]
        if model not in served:
            raise ValueError(
                f"{url} serves {', '.join(map(str, served)) or 'nothing'}, not {model}"
            )

    def __call__(self, images: torch.Tensor, prompts: Sequence[Prompt]) -> np.ndarray:
        asked = list(enumerate(zip(as_uint8(images, prompts, self.name), prompts), 1))
        with ThreadPoolExecutor(self.parallel) as pool:
            return np.array(list(pool.map(lambda a: self._one(a[0], *a[1]), asked)), np.float32)

    def _one(self, number: int, picture: np.ndarray, prompt: Prompt) -> float:
        content = [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{png(picture)}"}},
            {"type": "text", "text": self.prompt.replace("{prompt}", prompt.text)},
        ]
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": self.max_tokens,
        }
        reply = self._line.ask("POST", "/v1/chat/completions", body)
        try:
            choice = reply["choices"][0]
            text = choice["message"]["content"] or ""
        except (KeyError, IndexError, TypeError):
            raise ValueError(f"{self.name} at {self._line.url} answered without choices") from None
        found = {float(value) for value in re.findall(self.pattern, text)}
        if len(found) != 1 or choice.get("finish_reason") == "length":
            why = (
                "was cut off"
                if choice.get("finish_reason") == "length"
                else f"has {len(found)} scores"
            )
            raise ValueError(
                f"the reply of {self.name} to picture {number} ({prompt.text!r}) {why}: {text[-200:]!r}"
            )
        return _checked(self._line, found.pop(), self.range, number, prompt.text)

    def identity(self) -> dict[str, Any]:
        return {
            key: getattr(self, key)
            for key in ("name", "model", "prompt", "range", "pattern", "max_tokens")
        }
