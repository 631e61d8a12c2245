"""The reward server, a real process around `brightness`, and its clients: right scores, or an error that says
what to do, and never a score for a failure."""

import ast
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import ModuleType

import httpx
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from flowopd_lib import Prompt
from flowopd_lib.bench.reward_server import load
from flowopd_lib.benchmarks.reward_specs import build_reward
from flowopd_lib.benchmarks.tiny import ASSETS
from flowopd_lib.checkpoint import load_state
from flowopd_lib.files import ROOT
from flowopd_lib.identity import describe
from flowopd_lib.jobs.recipes import build
from flowopd_lib.rewards import (
    ChatReward,
    GenEval,
    RemoteDetector,
    RemoteReward,
    RewardUnavailable,
    remote,
    reward_server,
)
from flowopd_lib.train import train

FILE = ROOT / "flowopd_lib" / "rewards" / "reward_server.py"
PROMPTS = [Prompt(f"a picture of {n}", "pickscore") for n in range(8)]
IMAGES = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
RIGHT = [float(np.asarray((i * 255).round().byte(), np.float64).mean() / 255) for i in IMAGES]


@contextmanager
def server(*options, token="", stop=signal.SIGTERM):
    """A server's url and process."""
    process = subprocess.Popen(
        [sys.executable, str(FILE), "brightness", "--port", "0", *map(str, options)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, remote.TOKEN: token},
        cwd="/",
    )
    try:
        url = process.stdout.readline().split()[-1]
        assert process.stdout.readline() == "Brightness is ready\n"
        yield url, process
    finally:
        process.send_signal(stop)
        process.wait(10)
        process.stdout.close()


@pytest.fixture(scope="module")
def url():
    with server() as (url, _):
        yield url


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(remote, "PAUSE", 0.05)
    monkeypatch.delenv(remote.TOKEN, raising=False)


class Fake:
    """A server that says what a test wants: `replies` maps paths to a status and a body."""

    health = {
        "reward": "Fake",
        "version": "1",
        "model": "none",
        "range": [0, 1],
        "answers": "scores",
    }

    def __init__(self, replies):
        self.replies, self.asked, fake = replies, [], self

        class Handler(BaseHTTPRequestHandler):
            def answer(self):
                length = int(self.headers.get("Content-Length", 0))
                fake.asked.append(
                    (self.path, self.headers, json.loads(self.rfile.read(length) or "null"))
                )
                told = fake.replies[self.path]
                status, body = told.pop(0) if isinstance(told, list) else told
                self.send_response(status)
                self.end_headers()
                self.wfile.write(
                    body.encode() if isinstance(body, str) else json.dumps(body).encode()
                )

            do_GET = do_POST = answer

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


def said(results, **more):
    return {"reward": "Fake", "version": "1", "model": "none", "results": results, **more}


def test_scores_are_right_in_whatever_portions(url):
    for batch in (3, 16):
        reward = RemoteReward(url, "Brightness", batch=batch)
        scores = reward(IMAGES, PROMPTS)
        assert scores.dtype == np.float32 and np.allclose(scores, RIGHT, atol=1e-6)
    assert (reward.name, reward.range) == ("Brightness", (0.0, 1.0))
    with pytest.raises(ValueError, match="8 images for 7 prompts"):
        reward(IMAGES, PROMPTS[:7])


def test_threads_and_processes_share_a_reward(url, monkeypatch):
    reward = RemoteReward(url, "Brightness", batch=2)
    with ThreadPoolExecutor(4) as pool:
        for scores in pool.map(lambda _: reward(IMAGES, PROMPTS), range(8)):
            assert np.allclose(scores, RIGHT, atol=1e-6)
    assert np.allclose(pickle.loads(pickle.dumps(reward))(IMAGES, PROMPTS), RIGHT, atol=1e-6)
    before = reward._line._client()
    monkeypatch.setattr(os, "getpid", lambda: -1)  # as after a fork: connections of its own
    assert reward._line._client() is not before
    assert np.allclose(reward(IMAGES, PROMPTS), RIGHT, atol=1e-6)


def test_another_reward_version_or_range_is_an_error_before_anything_begins(url):
    for said, message in (
        ({"reward": "DeQA"}, "has the reward Brightness, not DeQA"),
        ({"version": "2"}, "has the version 1, not 2"),
        ({"range": (1.0, 5.0)}, r"has the range \(0.0, 1.0\), not \(1.0, 5.0\)"),
    ):
        with pytest.raises(ValueError, match=message):
            RemoteReward(url, **{"reward": "Brightness", **said})
    with pytest.raises(ValueError, match="has the answers scores, not detections"):
        RemoteDetector(url)
    with pytest.raises(ValueError, match="needs a url such as"):
        RemoteReward("127.0.0.1:8100", "Brightness")
    with pytest.raises(ValueError, match="must not hold a password"):
        RemoteReward("http://a:b@127.0.0.1", "Brightness")


def test_a_token_is_wanted_and_never_told(monkeypatch, caplog):
    caplog.set_level("DEBUG")
    with server(token="Sesame1") as (url, _):
        assert httpx.get(url + "/health").status_code == 401
        for wrong in (None, "Sesame2"):
            with pytest.raises(ValueError, match="refused: 401 .*FLOWOPD_REWARD_TOKEN") as error:
                RemoteReward(url, "Brightness", token=wrong)
            assert "Sesame" not in str(error.value)
        monkeypatch.setenv(remote.TOKEN, "Sesame1")
        reward = RemoteReward(url, "Brightness")
        assert np.allclose(reward(IMAGES, PROMPTS), RIGHT, atol=1e-6)
        assert describe(reward) == {
            "class": "RemoteReward",
            "reward": "Brightness",
            "version": "1",
            "model": "none",
            "range": [0.0, 1.0],
        }
    with pytest.raises(RewardUnavailable) as error:
        reward(IMAGES, PROMPTS)
    assert "Sesame" not in repr(reward) + str(error.value) + caplog.text
    refused = subprocess.run(
        [sys.executable, FILE, "brightness", "--host", "0.0.0.0"],
        env={k: v for k, v in os.environ.items() if k != remote.TOKEN},
        capture_output=True,
        text=True,
    )
    assert refused.returncode == 2 and "needs a token" in refused.stderr


@pytest.mark.parametrize(
    "body, status, message",
    [
        ("no json", 400, "must be JSON"),
        ({"reward": "DeQA", "items": [{}]}, 409, "this server's reward is Brightness, not DeQA"),
        ({"reward": "Brightness", "items": []}, 400, "at least one"),
        ({"reward": "Brightness", "items": [{"png": "AAAA"}]}, 400, "item 1 has no PNG"),
        (
            {"reward": "Brightness", "items": [{"png": 3, "prompt": 4}]},
            400,
            "item 1 must be a mapping",
        ),
        ("9" * (2 << 20), 413, "more than 1 MB"),
    ],
)
def test_what_cannot_be_read_is_refused_with_a_sentence(small, body, status, message):
    body = body if isinstance(body, str) else json.dumps(body)
    for content in (
        body,
        (part.encode() for part in (body[:9], body[9:])),
    ):  # told its length, and not
        reply = httpx.post(small + "/score", content=content)
        assert reply.status_code == status and message in reply.json()["error"]


@pytest.fixture(scope="module")
def small():
    with server("--most", 1, "--queue", 8, "--batch", 4, "--delay", 0.05) as (url, _):
        yield url


def test_a_full_queue_is_503_and_clients_wait_their_turn(small):
    items = [{"png": remote.png(np.zeros((4, 4, 3), np.uint8)), "prompt": ""}] * 8
    body = {"reward": "Brightness", "items": items}
    with ThreadPoolExecutor(4) as pool:
        replies = list(pool.map(lambda _: httpx.post(small + "/score", json=body), range(4)))
        full = [r for r in replies if r.status_code == 503]
        assert len(full) == 3 and all(1 <= int(r.headers["Retry-After"]) <= 60 for r in full)
        assert "queue is full" in full[0].json()["error"]
        reward = RemoteReward(small, "Brightness", batch=8, retries=6)
        for scores in pool.map(lambda _: reward(IMAGES, PROMPTS), range(3)):
            assert np.allclose(scores, RIGHT, atol=1e-6)
    with pytest.raises(ValueError, match=r"413 9 pictures are more than the queue holds \(8\)"):
        RemoteReward(small, "Brightness", batch=9)(IMAGES[[0] * 9], [PROMPTS[0]] * 9)


def test_a_slow_server_is_an_error_and_does_not_reward_for_those_who_left(small):
    reward = RemoteReward(small, "Brightness", timeout=0.2, retries=0)
    with pytest.raises(
        RewardUnavailable, match=r"Brightness at .* after 1 try: no answer within 0\.2 s\. .*saved"
    ):
        reward(IMAGES, PROMPTS)
    time.sleep(1.2)  # the server looks once a second
    assert httpx.get(small + "/health").json()["waiting"] == 0


class Odd:
    """A reward by how bright a picture is: 0 is a NaN to it, 255 a fault, the rest .5; three get one score too
    few."""

    name, version, range, answers = "Odd", "1", (0.0, 1.0), "scores"

    def __call__(self, pictures, prompts):
        values = [np.asarray(picture).mean() for picture in pictures]
        if 255 in values:
            raise RuntimeError("it broke")
        return [float("nan") if v == 0 else 7.0 if v == 1 else 0.5 for v in values][
            : 2 if len(values) == 3 else 9
        ]


def asked(*brightness):
    return [reward_server.Item(np.full((1, 1, 3), b, np.uint8), "", None) for b in brightness]


def test_the_server_gives_an_error_for_an_item_and_spoils_no_other():
    results = reward_server.scored(Odd(), asked(9, 0, 255, 1))
    assert results[0] == {"score": 0.5} and all("score" not in r for r in results[1:])
    assert (
        "nan" in results[1]["error"]
        and "it broke" in results[2]["error"]
        and "7.0" in results[3]["error"]
    )
    assert reward_server.scored(Odd(), asked(9, 9, 9)) == [{"score": 0.5}] * 3  # each alone has one
    short = type("Short", (Odd,), {"__call__": lambda *_: []})()
    assert reward_server.scored(short, asked(9)) == [
        {"error": "ValueError: the model gave 0 answers for 1 pictures"}
    ]


def test_waiting_items_go_into_one_forward():
    sizes = []
    seen = type(
        "Seen", (Odd,), {"__call__": lambda self, p, _: sizes.append(len(p)) or [0.5] * len(p)}
    )
    desk = reward_server.Desk(Odd, lambda: (seen(), "none"), batch=4, limit=99)
    desk.reward, desk.model = desk.load()
    items = [item._replace(future=reward_server.Future()) for item in asked(*range(10))]
    for item in items:
        desk.queue.put(item)
    items[0].future.cancel()
    for _ in range(3):
        desk.step()
    assert sizes == [3, 4, 2] and all(item.future.result() == {"score": 0.5} for item in items[1:])


@pytest.mark.parametrize(
    "reply, message",
    [
        (said([{"score": 0.5}] * 7), "gave 7 answers for 8 pictures"),
        (said([{"score": 0.5}] * 2 + [{"score": float("nan")}] * 6), "gave nan for picture 3"),
        (said([{"score": 1.5}] * 8), r"gave 1\.5 for picture 1 .*between 0 and 1"),
        (said([{"score": True}] * 8), "gave True"),
        (
            said([{"score": 0.5}, {"error": "out of memory"}] * 4),
            "picture 2 of 8 .*a picture of 1.*out of memory",
        ),
        (said([{"score": 0.5}] * 8, model="another"), "is Fake 1 of another now"),
        ([0.5] * 8, "is None None of None now"),
        ("<html>", "something else than JSON"),
    ],
)
def test_an_answer_that_is_no_score_is_an_error(reply, message):
    with Fake({"/health": (200, Fake.health), "/score": (200, reply)}) as fake:
        with pytest.raises(ValueError, match=message):
            RemoteReward(fake.url, "Fake")(IMAGES, PROMPTS)
        assert len(fake.asked) == 2  # no second try could make it right


def test_what_may_pass_is_tried_again_and_what_will_not_is_not():
    good = (200, said([{"score": 0.5}] * 8))
    again = [(503, {"error": "busy"}), (500, "oops"), (429, ""), (408, ""), good]
    with Fake({"/health": (200, Fake.health), "/score": again}) as fake:
        assert RemoteReward(fake.url, "Fake")(IMAGES, PROMPTS).tolist() == [0.5] * 8
    for replies, kind, message, tries in (
        ([(503, {"error": "busy"})] * 9, RewardUnavailable, "after 3 tries: 503 busy", 3),
        ([(422, {"detail": "who knows"})], ValueError, "refused: 422 who knows", 1),
    ):
        with Fake({"/health": (200, Fake.health), "/score": replies}) as fake:
            with pytest.raises(kind, match=message):
                RemoteReward(fake.url, "Fake", retries=2)(IMAGES, PROMPTS)
            assert len(fake.asked) == 1 + tries
    with pytest.raises(
        RewardUnavailable, match=r"no connection \(.*refused.*The run's state is saved"
    ):
        RemoteReward(fake.url, "Fake", retries=1)


def test_a_remote_detector_finds_what_our_rule_rewards():
    health = {**Fake.health, "reward": "GenEval", "answers": "detections"}
    health |= {"labels": ["dog"], "colors": ["red"], "threshold": 0.3, "counting_threshold": 0.9}
    dog = {"label": "dog", "color": "red", "score": 0.8, "box": [0, 0, 9, 9]}
    record = {"tag": "single_object", "include": [{"class": "dog", "count": 1}]}
    prompts = [Prompt("a photo of a dog", "geneval", record)] * 2
    results = {**said([{"detections": [dog]}, {"detections": []}]), "reward": "GenEval"}
    broken = {**said([{"detections": [{**dog, "label": "unicorn"}]}] * 2), "reward": "GenEval"}
    with Fake({"/health": (200, health), "/score": [(200, results), (200, broken)]}) as fake:
        reward = GenEval(RemoteDetector(fake.url))
        assert reward(IMAGES[:2], prompts).tolist() == [1.0, 0.0]
        with pytest.raises(ValueError, match="which is no detection"):
            reward(IMAGES[:2], prompts)
        assert describe(reward)["detector"]["reward"] == "GenEval" and fake.url not in str(
            describe(reward)
        )
        detector = {"class": "RemoteDetector", "url": fake.url}
        spec = {"class": "GenEval", "detector": detector, "rule": "score", "training": True}
        assert build_reward("GenEvalScore", spec, ROOT, "cpu").rule == "score"


def chat(text, reason="stop"):
    return 200, {"choices": [{"message": {"content": text}, "finish_reason": reason}]}


def test_a_chat_reward_reads_a_number_or_raises():
    models = 200, {"data": [{"id": "qwen"}]}
    with Fake(
        {"/v1/models": models, "/v1/chat/completions": chat("Good colours. **Score:** 4.5 / 5")}
    ) as fake:
        reward = ChatReward(
            fake.url, "qwen", "How good is it for {prompt}? Say Score: N", (1, 5), token="Sesame"
        )
        assert reward(IMAGES[:3], PROMPTS[:3]).tolist() == [4.5] * 3
        _, headers, body = fake.asked[-1]
        picture, text = body["messages"][0]["content"]
        assert headers["Authorization"] == "Bearer Sesame" and "for a picture of" in text["text"]
        assert picture["image_url"]["url"].startswith("data:image/png;base64,iVBOR")
        assert "Sesame" not in str(describe(reward)) and fake.url not in str(describe(reward))
        for reply, message in (
            (chat("I cannot reward this"), "has 0 scores: 'I cannot reward this'"),
            (chat("Score: 1-5"), "has 0 scores"),
            (chat("Score: 2. No, Score: 3"), "has 2 scores"),
            (chat("Score: 4", "length"), "was cut off"),
            (chat("Score: 11"), r"gave 11\.0 for picture 1 .*between 1 and 5"),
            ((200, {}), "without choices"),
            ((401, {"error": {"message": "bad key Sesame"}}), r"401 .*bad key \.\.\."),
        ):
            fake.replies["/v1/chat/completions"] = reply
            with pytest.raises(ValueError, match=message):
                reward(IMAGES[:1], PROMPTS[:1])
        with pytest.raises(ValueError, match="serves qwen, not quen"):
            ChatReward(fake.url, "quen", "?", (1, 5))


def benchmark_of(url, folder):
    """The shipped benchmark with a remote reward more."""
    benchmark = yaml.safe_load(
        (ROOT / "flowopd_lib" / "benchmarks" / "tiny" / "benchmark.yaml").read_text()
    )
    remote = {
        "class": "RemoteReward",
        "url": url,
        "reward": "Brightness",
        "retries": 1,
        "timeout": 10.0,
    }
    benchmark |= {"rewards": {**benchmark["rewards"], "Brightness": remote}, "folder": str(ASSETS)}
    path = folder.parent / f"{folder.name}_{url.rsplit(':', 1)[1]}.yaml"
    path.write_text(yaml.safe_dump(benchmark))
    return str(path)


def recipe(url, folder):
    return {
        "benchmark": benchmark_of(url, folder),
        "student": {"rank": 4, "alpha": 8},
        "schedule": {"tasks": ["pickscore"], "prompts_per_batch": 2, "images_per_prompt": 2},
        "sampler": {"steps": 2},
        "grpo": {"reward_weights": {"Brightness": 1.0}, "updates": 1},
        "train": {"iterations": 3, "lr": 1e-3, "save_every": 100},
    }


def test_a_run_whose_reward_dies_keeps_its_state_and_goes_on_to_the_bit(url, tmp_path):
    for _ in train(*parts(url, tmp_path / "whole")):
        pass
    with server(stop=signal.SIGKILL) as (other, process):
        updates = train(*parts(other, tmp_path / "cut"))
        assert [next(updates).iteration, next(updates).iteration] == [0, 1]
        process.kill()
        with pytest.raises(
            RewardUnavailable, match="cannot reward, after 2 tries: no connection .*is saved"
        ):
            next(updates)
    assert load_state(tmp_path / "cut" / "state.safetensors")["iteration"] == 2
    # begun again, as a server on another port
    assert [info.iteration for info in train(*parts(url, tmp_path / "cut"))] == [2]
    whole, cut = (load_state(tmp_path / name / "state.safetensors") for name in ("whole", "cut"))
    for key in ("parameters", "average"):
        assert all(torch.equal(a, b) for a, b in zip(whole[key], cut[key], strict=True))
    lines = [
        (tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "cut")
    ]
    rewards = [[json.loads(line)["Brightness"] for line in part] for part in lines]
    assert rewards[0] == rewards[1] and len(rewards[0]) == 3


def parts(url, folder):
    policy, objective, config = build(recipe(url, folder))
    return policy, objective, folder, config


def test_a_benchmark_names_a_reward_by_its_url_and_never_its_token(url):
    spec = {"class": "RemoteReward", "url": url, "reward": "Brightness"}
    assert isinstance(build_reward("Brightness", spec, ROOT, "cpu"), RemoteReward)
    with pytest.raises(
        ValueError, match=r"rewards\.Brightness\.token: a secret is not written in a file"
    ):
        build_reward("Brightness", {**spec, "token": "Sesame"}, ROOT, "cpu")
    with pytest.raises(ValueError, match=r"rewards\.Brightness\.retries must be a whole number"):
        build_reward("Brightness", {**spec, "retries": "4"}, ROOT, "cpu")


OWN_CODE = """
import torch
from transformers import PretrainedConfig, PreTrainedModel

class TinyConfig(PretrainedConfig):
    model_type = "tiny_deqa"

class Tiny(PreTrainedModel):
    config_class = TinyConfig

    def __init__(self, config):
        super().__init__(config)
        self.levels = torch.nn.Parameter(torch.zeros(5))
        self.post_init()

    def score(self, images):
        assert all(image.mode == "RGB" for image in images) and self.levels.dtype == torch.float16
        shares = torch.softmax(self.levels, 0).expand(len(images), 5)
        return (shares.float() @ torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])).half()
"""


def test_deqa_runs_the_code_that_came_with_its_weights(tmp_path, monkeypatch):
    from safetensors.torch import save_file
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "deqa"
    folder.mkdir()
    (folder / "own.py").write_text(OWN_CODE)
    classes = {"AutoConfig": "own.TinyConfig", "AutoModelForCausalLM": "own.Tiny"}
    config = {"model_type": "tiny_deqa", "architectures": ["Tiny"], "auto_map": classes}
    (folder / "config.json").write_text(json.dumps(config))
    weights = {"levels": torch.tensor([9.0, 0.0, 0.0, 0.0, 0.0])}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    options = Namespace(model=str(folder), revision="main", device="cpu", trust_remote_code=True)
    reward = reward_server.DeQA(options)
    items = [item._replace(picture=Image.new("RGB", (4, 6))) for item in asked(0, 0)]
    scores = [result["score"] for result in reward_server.scored(reward, items)]
    assert scores == pytest.approx([5.0] * 2, abs=0.01)
    before = reward_server.named(options)
    (folder / "own.py").write_text(OWN_CODE + "# changed")
    assert before.startswith("deqa sha256:") and reward_server.named(options) != before


def test_geneval_gives_objects_with_the_colours_clip_sees(tmp_path, monkeypatch):
    """Its own code around a detector that the test makes up and a CLIP of another training."""
    from safetensors.torch import save_file

    found = [np.zeros((0, 5), np.float32) for _ in reward_server.LABELS]
    masks = [[] for _ in reward_server.LABELS]
    dog = reward_server.LABELS.index("dog")
    found[dog] = np.array([[0, 0, 8, 8, 0.5], [4, 4, 16, 16, 0.95], [0, 0, 9, 9, 0.2]], np.float32)
    masks[dog] = [np.ones((16, 16), bool)] * 3
    apis = ModuleType("mmdet.apis")
    apis.init_detector = lambda config, checkpoint, device: torch.nn.Linear(1, 1)
    apis.inference_detector = lambda model, images: [(found, masks) for _ in images]
    monkeypatch.setitem(sys.modules, "mmdet", ModuleType("mmdet"))
    monkeypatch.setitem(sys.modules, "mmdet.apis", apis)
    clip = str(ASSETS / "pickscore")
    options = Namespace(
        model=str(tmp_path / "d.safetensors"), config="c.py", device="cpu", clip=clip
    )
    save_file({"weight": torch.zeros(1, 1)}, options.model)
    with pytest.raises(ValueError, match="lacks 1 weights, such as bias"):
        reward_server.GenEval(options)
    save_file({"weight": torch.zeros(1, 1), "bias": torch.zeros(1)}, options.model)
    items = [item._replace(picture=Image.new("RGB", (16, 16), "red")) for item in asked(0, 0)]
    results = reward_server.scored(reward_server.GenEval(options), items)
    first = results[0]["detections"]
    assert results == [results[0]] * 2 and [d["score"] for d in first] == pytest.approx([0.95, 0.5])
    assert [d["label"] for d in first] == ["dog"] * 2 and first[1]["box"] == [0, 0, 8, 8]
    assert all(d["color"] in reward_server.COLORS for d in first)


def test_the_benchmark_measures():
    told = load(2, 16, 2, 0.1)
    assert told["clients"] == 2 and all(value > 0 for value in told.values())


def test_sigterm_ends_a_server_after_what_it_has_begun():
    with server("--delay", 0.05) as (url, process):
        reward = RemoteReward(url, "Brightness", retries=0)
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(reward, IMAGES, PROMPTS)
            time.sleep(0.15)
            process.terminate()
            assert np.allclose(answer.result(), RIGHT, atol=1e-6) and process.wait(10) == 0


def test_a_reward_that_cannot_be_loaded_is_a_sentence(tmp_path):
    done = subprocess.run(
        [sys.executable, FILE, "deqa", "--model", tmp_path, "--port", "0"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "error: DeQA cannot be loaded: " in done.stderr
    assert "--trust-remote-code" in done.stderr and "Traceback" not in done.stderr


def test_the_server_stands_alone_and_its_environments_have_what_it_imports():
    tree = ast.parse(FILE.read_text(), feature_version=(3, 10))
    packages = {"open_clip": "open_clip_torch", "ImageReward": "image-reward", "PIL": "pillow"}
    listed = {
        reward: {
            line.split("#")[0].split("=")[0].split("<")[0].split(">")[0].strip()
            for line in (FILE.parent / "servers" / f"requirements-{reward}.txt")
            .read_text()
            .splitlines()
        }
        for reward in reward_server.REWARDS
        if reward != "brightness"
    }

    def imports(node):
        for part in ast.walk(node):
            names = [a.name for a in part.names] if isinstance(part, ast.Import) else []
            if isinstance(part, ast.ImportFrom):
                assert not part.level, "nothing of ours"
                names = [part.module]
            yield from (
                n.split(".")[0] for n in names if n.split(".")[0] not in sys.stdlib_module_names
            )

    classes = {c.name: set(imports(c)) for c in tree.body if isinstance(c, ast.ClassDef)}
    common = {
        n
        for part in tree.body
        if isinstance(part, (ast.Import, ast.ImportFrom))
        for n in imports(part)
    }
    for reward, packages_of in listed.items():
        for name in common | {"safetensors"} | classes[reward_server.REWARDS[reward].__name__]:
            assert packages.get(name, name) in packages_of, (reward, name)
