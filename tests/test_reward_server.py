"""The reward server, as a process with the reward `brightness`, and its clients: correct scores, or
an error that says what to do, and never a score for a failure."""

import ast
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from argparse import Namespace
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import httpx
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from flowopd_lib import Sampler, load_benchmark
from flowopd_lib.benchmarks import tiny
from flowopd_lib.checkpoint import load_state
from flowopd_lib.data import Prompt, Schedule
from flowopd_lib.files import read_lines
from flowopd_lib.fingerprint import describe
from flowopd_lib.losses import GRPO, GRPOConfig
from flowopd_lib.rewards import GenEval, RewardUnavailable, remote, score_images, server
from flowopd_lib.rewards.remote import ChatReward, RemoteDetector, RemoteReward
from flowopd_lib.train import TrainConfig, train

FILE, TINY, ASSETS = Path(server.__file__), Path(tiny.__file__).parent, tiny.ASSETS
PROMPTS = [Prompt(f"an image of {n}", "pickscore") for n in range(8)]
IMAGES = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
MEANS = [float(np.asarray((i * 255).round().byte(), np.float64).mean() / 255) for i in IMAGES]
CORRECT = pytest.approx(MEANS, abs=1e-6)


@contextmanager
def started(*options, token="", stop=signal.SIGTERM):
    """A server's url and process."""
    process = subprocess.Popen(
        [sys.executable, str(FILE), "brightness", "--port", "0", *map(str, options)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, remote.TOKEN: token},
        cwd="/",
    )
    output = ""
    try:
        while "running on" not in output or "is ready" not in output:
            assert process.poll() is None, output
            output += process.stdout.readline()
        yield re.search(r"running on (\S+)", output)[1], process
    finally:
        process.send_signal(stop)
        process.wait(10)
        process.stdout.close()


@pytest.fixture(scope="module")
def url():
    with started() as (url, _):
        yield url


@pytest.fixture(scope="module")
def small():
    with started("--max-mb", 1, "--queue", 8, "--batch", 4, "--delay", 0.05) as (url, _):
        yield url


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(remote, "PAUSE", 0.05)
    monkeypatch.delenv(remote.TOKEN, raising=False)


HEALTH = {"reward": "Fake", "version": "1", "model": "none", "range": [0, 1], "answers": "scores"}


@pytest.fixture
def fake(monkeypatch):
    """A server with a status and a body, or a list of them, for each path."""
    replies, requests = {"/health": (200, HEALTH)}, []

    def handle(request):
        requests.append(request)
        reply = replies[request.url.path]
        status, body = reply.pop(0) if isinstance(reply, list) else reply
        return httpx.Response(status, text=body if isinstance(body, str) else json.dumps(body))

    client = httpx.Client(transport=httpx.MockTransport(handle))
    monkeypatch.setattr(remote, "_client", lambda *_: client)
    return Namespace(url="http://fake", replies=replies, requests=requests)


def reply(results, **changes):
    return 200, {"reward": "Fake", "version": "1", "model": "none", "results": results, **changes}


HALVES = reply([{"score": 0.5}] * 8)


# ---- scores


@pytest.mark.parametrize("batch", [3, 16])
def test_scores_are_correct_in_batches_of_any_size(url, batch):
    reward = RemoteReward(url, "Brightness", batch=batch)
    assert score_images(reward, IMAGES, PROMPTS) == CORRECT
    assert (reward.name, reward.range) == ("Brightness", (0.0, 1.0))


def test_threads_and_processes_share_a_reward(url, monkeypatch):
    reward = RemoteReward(url, "Brightness", batch=2)
    with ThreadPoolExecutor(4) as pool:
        for scores in pool.map(lambda _: reward(IMAGES, PROMPTS), range(8)):
            assert scores == CORRECT
    assert pickle.loads(pickle.dumps(reward))(IMAGES, PROMPTS) == CORRECT
    client = remote._client(os.getpid(), "", 60.0)
    assert client is remote._client(os.getpid(), "", 60.0)
    assert client is not remote._client(-1, "", 60.0)  # after a fork, its own connections


@pytest.mark.parametrize(
    "expected, message",
    [
        ({"reward": "DeQA"}, "has the reward Brightness, not DeQA"),
        ({"version": "2"}, "has the version 1, not 2"),
        ({"range": (1.0, 5.0)}, r"has the range \(0.0, 1.0\), not \(1.0, 5.0\)"),
        ({"url": "127.0.0.1:8100"}, "needs a url like"),
        ({"url": "http://a:b@127.0.0.1"}, "needs a url .* with no password"),
        ({"batch": 0}, "batch\n.*greater than or equal to 1"),
        ({"timeout": 0}, "timeout\n.*greater than 0"),
    ],
)
def test_another_reward_or_wrong_settings_are_an_error_at_the_start(url, expected, message):
    with pytest.raises(ValueError, match=message):
        RemoteReward(**{"url": url, "reward": "Brightness", **expected})
    with pytest.raises(ValueError, match="has the answers scores, not detections"):
        RemoteDetector(url)


def test_the_token_is_required_and_never_shown(monkeypatch, caplog):
    caplog.set_level("DEBUG")
    with started(token="Sesame1") as (url, _):
        assert httpx.get(url + "/health").status_code == 401
        for wrong in ("", "Sesame2"):
            monkeypatch.setenv(remote.TOKEN, wrong)
            with pytest.raises(ValueError, match="refused: 401 .*FLOWOPD_REWARD_TOKEN") as error:
                RemoteReward(url, "Brightness")
            assert "Sesame" not in str(error.value)
        monkeypatch.setenv(remote.TOKEN, "Sesame1")
        reward = RemoteReward(url, "Brightness")
        assert reward(IMAGES, PROMPTS) == CORRECT
    message = r"no connection \(.*refused.*The run's state is saved"
    with pytest.raises(RewardUnavailable, match=message) as error:
        reward(IMAGES, PROMPTS)
    assert "Sesame" not in repr(reward) + str(error.value) + caplog.text
    monkeypatch.setenv(remote.TOKEN, "not a token")
    with pytest.raises(ValueError, match="without spaces") as error:
        reward(IMAGES, PROMPTS)
    assert "not a token" not in str(error.value)


def test_a_fingerprint_has_the_reward_and_not_its_url(url):
    about = {"name": "Brightness", "range": [0.0, 1.0], "version": "1", "model": "none"}
    assert describe(RemoteReward(url, "Brightness")) == {"class": "RemoteReward", **about}


def run_server(*arguments):
    environment = {k: v for k, v in os.environ.items() if k != remote.TOKEN}
    command = [sys.executable, FILE, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_a_server_that_others_can_reach_needs_a_token():
    result = run_server("brightness", "--host", "0.0.0.0")
    assert result.returncode == 2 and "needs a token" in result.stderr


def test_a_model_that_cannot_be_loaded_ends_the_server_with_a_sentence(tmp_path):
    result = run_server("deqa", "--model", tmp_path, "--port", "0")
    assert result.returncode == 1 and "error: DeQA cannot be loaded: " in result.stderr
    assert "--trust-remote-code" in result.stderr and "Traceback" not in result.stderr


# ---- what the server refuses


PNG = remote.encode_png(np.zeros((4, 4, 3), np.uint8))


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize(
    "body, status, message",
    [
        ("no json", 400, "Invalid JSON"),
        ({"reward": "DeQA", "items": [{"png": PNG}]}, 409, "reward is Brightness, not DeQA"),
        ({"reward": "Brightness", "items": []}, 400, "items: List should have at least 1 item"),
        ({"reward": "Brightness", "items": [{}]}, 400, "items.0.png: Field required"),
        ({"reward": "Brightness", "items": [{"png": "AAAA"}]}, 400, "items.0.png is not a PNG"),
        ({"reward": "Brightness", "items": [{"png": 3}]}, 400, "items.0.png: Input should be a"),
        ("9" * (2 << 20), 413, "more than 1 MB"),
    ],
)
def test_an_invalid_request_is_refused_with_a_sentence(small, body, status, message, chunked):
    body = (body if isinstance(body, str) else json.dumps(body)).encode()
    content = (part for part in (body[:9], body[9:])) if chunked else body
    result = httpx.post(small + "/score", content=content)
    assert result.status_code == status and message in result.json()["error"]
    assert httpx.get(small + "/scores").json() == {"error": "Not Found"}


def test_a_full_queue_is_503_and_clients_wait(small):
    body = {"reward": "Brightness", "items": [{"png": PNG}] * 8}
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: httpx.post(small + "/score", json=body), range(4)))
        full = [r for r in results if r.status_code == 503]
        assert len(full) == 3 and all(1 <= int(r.headers["Retry-After"]) <= 60 for r in full)
        assert "queue is full" in full[0].json()["error"]
        reward = RemoteReward(small, "Brightness", batch=8, retries=6)
        for scores in pool.map(lambda _: reward(IMAGES, PROMPTS), range(3)):
            assert scores == CORRECT
    with pytest.raises(ValueError, match="413 .*the queue holds 8 images, not 9"):
        RemoteReward(small, "Brightness", batch=9)(IMAGES[[0] * 9], [PROMPTS[0]] * 9)


def test_a_slow_server_is_an_error_and_does_not_score_for_clients_that_left(small):
    reward = RemoteReward(small, "Brightness", timeout=0.2, retries=0)
    message = r"Brightness at .* .tries: 1.: no reply within 0\.2 s\. .*saved"
    with pytest.raises(RewardUnavailable, match=message):
        reward(IMAGES, PROMPTS)
    time.sleep(1.2)  # the server checks once a second
    assert httpx.get(small + "/health").json()["waiting"] == 0


def test_sigterm_ends_a_server_after_the_requests_it_has_accepted():
    with started("--delay", 0.05) as (url, process):
        reward = RemoteReward(url, "Brightness", retries=0)
        with ThreadPoolExecutor(1) as pool:
            scores = pool.submit(reward, IMAGES, PROMPTS)
            time.sleep(0.15)
            process.terminate()
            assert scores.result() == CORRECT and process.wait(10) == -signal.SIGTERM


# ---- the queue


class Faulty:
    """Scores .5, but NaN for brightness 0 and 7 for 1; raises for 255; omits one of three."""

    name, version, range, answers = "Faulty", "1", (0.0, 1.0), "scores"

    def __call__(self, images, prompts):
        values = [int(np.asarray(image).mean()) for image in images]
        if 255 in values:
            raise RuntimeError("it broke")
        return [{0: float("nan"), 1: 7.0}.get(v, 0.5) for v in values][
            : 2 if len(values) == 3 else 9
        ]


def jobs(*brightness):
    images = [Image.new("RGB", (16, 16), (b, b, b)) for b in brightness]
    return [server.Job(image, "", Future()) for image in images]


def results_of(reward, *brightness):
    results = server.score_jobs(reward, jobs(*brightness))
    return [result.model_dump(exclude_unset=True) for result in results]


def test_an_item_that_fails_does_not_fail_the_others():
    first, *errors = results_of(Faulty(), 9, 0, 255, 1)
    assert first == {"score": 0.5} and all(e.keys() == {"error"} for e in errors)
    for result, message in zip(errors, ("gave nan", "it broke", "gave 7.0")):
        assert message in result["error"]
    assert results_of(Faulty(), 9, 9, 9) == [{"score": 0.5}] * 3  # one by one


def test_what_waits_is_scored_in_batches():
    class Counting(Faulty):
        def __call__(self, images, prompts):
            sizes.append(len(images))
            return [0.5] * len(images)

    sizes, waiting, scorer = [], jobs(*range(10)), server.Scorer(Faulty, batch=4, limit=99)
    scorer.reward = Counting()
    for job in waiting:
        scorer.jobs.put(job)
    waiting[0].future.cancel()
    for _ in range(3):
        scorer.step()
    assert sizes == [3, 4, 2] and all(job.future.result().score == 0.5 for job in waiting[1:])


# ---- what the client refuses


@pytest.mark.parametrize(
    "reply, message",
    [
        (reply([{"score": 0.5}] * 7), "gave 7 results for 8 images"),
        (reply([{"score": float("nan")}] * 8), r"results\.0\.score: Input should be a finite"),
        (reply([{"score": True}] * 8), "score: Input should be a valid number, not True"),
        (reply([{"score": 1.5}] * 8), r"gave 1\.5 for 'an image of 0', not .*range \[0, 1\]"),
        (reply([{"score": 0.5}, {"error": "no"}] * 4), "image 2 of 8 .'an image of 1'.: no"),
        (reply([{"score": 0.5}] * 8, model="other"), "is now .*'model': 'other'.*'model': 'none'"),
        ((200, [0.5] * 8), "the reply of Fake at .*: Input should be an object"),
        ((200, "<html>"), "the reply of Fake at .*Invalid JSON"),
    ],
)
def test_a_reply_without_valid_scores_is_an_error(fake, reply, message):
    fake.replies["/score"] = reply
    with pytest.raises(ValueError, match=message):
        score_images(RemoteReward(fake.url, "Fake"), IMAGES, PROMPTS)
    assert len(fake.requests) == 2  # another try would not help


def test_temporary_errors_are_tried_again(fake):
    fake.replies["/score"] = [(503, "busy"), (500, "error"), (429, ""), (408, ""), HALVES]
    assert RemoteReward(fake.url, "Fake")(IMAGES, PROMPTS).tolist() == [0.5] * 8


@pytest.mark.parametrize(
    "reply, kind, message, tries",
    [
        ((503, {"error": "busy"}), RewardUnavailable, ".tries: 3.: 503 .*busy", 3),
        ((422, {"detail": "unknown"}), ValueError, "refused: 422 .*unknown", 1),
    ],
)
def test_a_lasting_error_ends_the_tries(fake, reply, kind, message, tries):
    fake.replies["/score"] = reply
    with pytest.raises(kind, match=message):
        RemoteReward(fake.url, "Fake", retries=2)(IMAGES, PROMPTS)
    assert len(fake.requests) == 1 + tries


DOG = {"label": "dog", "color": "red", "score": 0.8, "box": [0, 0, 9, 9]}


def test_geneval_scores_with_a_remote_detector(fake):
    about = {"reward": "GenEval", "answers": "detections", "labels": ["dog"], "colors": ["red"]}
    fake.replies["/health"] = 200, HEALTH | about
    changes = {}, {"label": "cat"}, {"score": 2}
    results = [[{"detections": [DOG | change]}, {"detections": []}] for change in changes]
    fake.replies["/score"] = [reply(found, reward="GenEval") for found in results]
    record = {"tag": "single_object", "include": [{"class": "dog", "count": 1}]}
    prompts = [Prompt("a photo of a dog", "geneval", record)] * 2
    reward = GenEval(RemoteDetector(fake.url))
    assert score_images(reward, IMAGES[:2], prompts).tolist() == [1, 0]
    for message in ("'cat'.* not one of its own", "score: Input should be less than or equal to 1"):
        with pytest.raises(ValueError, match=message):
            reward(IMAGES[:2], prompts)
    assert fake.url not in str(describe(reward)) and reward.detector.name == "none"


# ---- vision-language models


def completion(text, reason="stop"):
    return 200, {"choices": [{"message": {"content": text}, "finish_reason": reason}]}


@pytest.fixture
def chat(fake):
    fake.replies["/v1/models"] = 200, {"data": [{"id": "qwen"}]}
    fake.replies["/v1/chat/completions"] = completion("Good colours. **Score:** 4.5 / 5")
    fake.reward = ChatReward(fake.url, "qwen", "How good is it for {prompt}? Say Score: N", (1, 5))
    return fake


def test_a_chat_reward_reads_the_number_in_the_reply(chat):
    assert score_images(chat.reward, IMAGES[:3], PROMPTS[:3]).tolist() == [4.5] * 3
    image, text = json.loads(chat.requests[-1].content)["messages"][0]["content"]
    assert "How good is it for an image of" in text["text"]
    assert image["image_url"]["url"].startswith("data:image/png;base64,iVBOR")
    assert chat.url not in str(describe(chat.reward))
    with pytest.raises(ValueError, match="serves qwen, not quen"):
        ChatReward(chat.url, "quen", "?", (1, 5))
    with pytest.raises(ValueError, match="must have one group"):
        ChatReward(chat.url, "qwen", "?", (1, 5), pattern="[0-9]")


@pytest.mark.parametrize(
    "reply, message",
    [
        (completion("I cannot score this"), "has 0 scores: 'I cannot score this'"),
        (completion("Score: 1-5"), "has 0 scores"),
        (completion("Score: 2. No, Score: 3"), "has 2 scores"),
        (completion("Score: 4", "length"), "was cut off"),
        (completion("Score: 11"), r"gave 11 for 'an image of 0', not .*\[1, 5\]"),
        ((200, {}), "the reply of ChatReward .*Field required"),
        ((401, "bad key Sesame"), r"401 bad key \.\.\."),
    ],
)
def test_a_chat_reply_without_one_number_is_an_error(chat, monkeypatch, reply, message):
    monkeypatch.setenv(remote.TOKEN, "Sesame")
    chat.replies["/v1/chat/completions"] = reply
    with pytest.raises(ValueError, match=message):
        score_images(chat.reward, IMAGES[:1], PROMPTS[:1])


# ---- runs


def training(url, folder, benchmark):
    """GRPO on the small benchmark with a remote reward."""
    policy = benchmark.policy(device="cpu")
    policy.add_adapter("student", rank=4, alpha=8)
    rewards = {"Brightness": RemoteReward(url, "Brightness", retries=1, timeout=10.0)}
    config = GRPOConfig(reward_weights={"Brightness": 1.0}, updates=1)
    schedule = Schedule({"pickscore": PROMPTS}, 2, 2)
    grpo = GRPO(schedule, rewards, config, Sampler(2, "sde"))
    return train(policy, grpo, folder, TrainConfig(iterations=3, lr=1e-3, save_every=100))


def test_a_run_whose_reward_stops_resumes_exactly(url, benchmark, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for _ in training(url, whole, benchmark):
        pass
    with started(stop=signal.SIGKILL) as (other, process):
        updates = training(other, cut, benchmark)
        assert [next(updates).iteration, next(updates).iteration] == [0, 1]
        process.kill()
        with pytest.raises(RewardUnavailable, match=".tries: 2.: no connection .*is saved"):
            next(updates)
    assert load_state(cut / "state.safetensors")["iteration"] == 2
    # resumed with a server on another port
    assert [info.iteration for info in training(url, cut, benchmark)] == [2]
    states = [load_state(folder / "state.safetensors") for folder in (whole, cut)]
    for key in ("parameters", "average"):
        assert all(torch.equal(*pair) for pair in zip(*(state[key] for state in states)))
    scores = [
        read_lines(folder / "metrics.jsonl")["Brightness"].tolist() for folder in (whole, cut)
    ]
    assert scores[0] == scores[1] and len(scores[0]) == 3


def test_a_benchmark_names_a_reward_by_its_url_and_never_its_token(url, tmp_path, monkeypatch):
    monkeypatch.setenv("BRIGHTNESS_URL", url)
    shipped = yaml.safe_load((TINY / "benchmark.yaml").read_text()) | {"folder": str(ASSETS)}

    def load_reward(**settings):
        spec = {"class": "RemoteReward", "url": "${BRIGHTNESS_URL}", "reward": "Brightness"}
        rewards = shipped["rewards"] | {"Brightness": spec | settings}
        (tmp_path / "own.yaml").write_text(yaml.safe_dump(shipped | {"rewards": rewards}))
        return load_benchmark(tmp_path / "own.yaml").rewards_named(["Brightness"])["Brightness"]

    assert load_reward(retries=1)(IMAGES, PROMPTS) == CORRECT
    for setting in ({"token": "Sesame"}, {"retries": "many"}):
        with pytest.raises(ValueError, match=[*setting][0]):
            load_reward(**setting)


# ---- the rewards that need an environment of their own


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
        probabilities = torch.softmax(self.levels, 0).expand(len(images), 5)
        return (probabilities.float() @ torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])).half()
"""


def test_deqa_runs_the_code_that_comes_with_its_weights(tmp_path, monkeypatch):
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
    results = results_of(server.DeQA(options), 0, 0)
    assert [r["score"] for r in results] == pytest.approx([5.0] * 2, abs=0.01)
    before = server.describe_model(str(folder), "main")
    (folder / "own.py").write_text(OWN_CODE + "# changed")
    assert before.startswith("deqa sha256:")
    assert server.describe_model(str(folder), "main") != before


def test_geneval_returns_objects_with_colours_by_clip(tmp_path, monkeypatch):
    """Around a detector of the test and another CLIP."""
    boxes, masks = ([empty for _ in server.LABELS] for empty in (np.zeros((0, 5)), []))
    dog = server.LABELS.index("dog")
    boxes[dog] = np.array([[0, 0, 8, 8, 0.5], [4, 4, 16, 16, 0.95], [0, 0, 9, 9, 0.2]], np.float32)
    masks[dog] = [np.ones((16, 16), bool)] * 3
    apis = ModuleType("mmdet.apis")
    apis.init_detector = lambda config, checkpoint, device: torch.nn.Linear(1, 1)
    apis.inference_detector = lambda model, images: [(boxes, masks) for _ in images]
    monkeypatch.setitem(sys.modules, "mmdet", ModuleType("mmdet"))
    monkeypatch.setitem(sys.modules, "mmdet.apis", apis)
    clip, model = str(ASSETS / "pickscore"), str(tmp_path / "detector.safetensors")
    options = Namespace(model=model, config="c.py", device="cpu", clip=clip)
    save_file({"weight": torch.zeros(1, 1)}, model)
    with pytest.raises(ValueError, match="lacks 1 weights, such as bias"):
        server.GenEval(options)
    save_file({"weight": torch.zeros(1, 1), "bias": torch.zeros(1)}, model)
    first, second = results_of(server.GenEval(options), 0, 0)
    assert first == second
    sure, unsure = first["detections"]
    assert (sure["label"], sure["box"]) == ("dog", (4, 4, 16, 16))
    assert (unsure["label"], unsure["box"]) == ("dog", (0, 0, 8, 8))
    assert (sure["score"], unsure["score"]) == pytest.approx((0.95, 0.5))
    assert {sure["color"], unsure["color"]} <= set(server.COLORS)


def test_the_server_stands_alone_and_its_environments_have_what_it_imports():
    tree = ast.parse(FILE.read_text(), feature_version=(3, 10))
    assert not [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level]  # of ours

    def imports(node):
        names = [a.name for n in ast.walk(node) if isinstance(n, ast.Import) for a in n.names]
        names += [n.module for n in ast.walk(node) if isinstance(n, ast.ImportFrom)]
        return {name.split(".")[0] for name in names} - set(sys.stdlib_module_names)

    rewards = {kind.__name__ for kind in server.REWARDS.values()}
    classes = {n.name: n for n in tree.body if getattr(n, "name", "") in rewards}
    shared = set().union(*(imports(n) for n in tree.body if n not in classes.values()))
    names = {"open_clip": "open_clip_torch", "ImageReward": "image-reward", "PIL": "pillow"}
    brought = {"starlette", "torch"}  # by fastapi, and by what a reward needs
    for reward in set(server.REWARDS) - {"brightness"}:
        lines = (FILE.parent / "servers" / f"requirements-{reward}.txt").read_text().splitlines()
        listed = {re.split(r"[=<>#\s]", line)[0] for line in lines}
        needed = shared | imports(classes[server.REWARDS[reward].__name__])
        assert {names.get(name, name) for name in needed} - brought <= listed, reward
