"""The reward server, as a process with the reward `brightness`, and its clients: correct scores, or
an error that says what to do, and never a score for a failure."""

import ast
import json
import re
import signal
import subprocess
import sys
import threading
import time
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import httpx
import numpy as np
import pytest
import torch
import uvicorn
import yaml
from dummy_rewards import reward_server
from PIL import Image
from safetensors.torch import save_file
from trainings import assert_same_training

from flowopd_lib import Sampler, load_benchmark
from flowopd_lib.benchmarks import tiny
from flowopd_lib.data import Prompt, Schedule
from flowopd_lib.files import load_state
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


@pytest.fixture(scope="module")
def url():
    with reward_server() as (url, _):
        yield url


class Slow(server.Brightness):
    """Needs 0.05 s per image, and counts the requests that it has scored; fails for black."""

    def __init__(self):
        self.requests = 0

    def __call__(self, images, prompts):
        time.sleep(0.05 * len(images))
        self.requests += 1
        scores = super().__call__(images, prompts)
        if prompts[0] == "fail":
            raise RuntimeError("it broke")
        return [score or float("nan") for score in scores]


@pytest.fixture
def slow():
    """A reward and the url of a server with it, in a thread."""
    app = server.create_app(reward := Slow())
    running = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=running.run)
    thread.start()
    while not running.started:
        time.sleep(0.01)
    yield reward, f"http://127.0.0.1:{running.servers[0].sockets[0].getsockname()[1]}"
    running.should_exit = True
    thread.join()


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(remote, "PAUSE", 0.05)
    monkeypatch.delenv(remote.TOKEN, raising=False)


HEALTH = {"reward": "Fake", "version": "1", "model": "none", "range": [0, 1]}


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


def reply(scores, **changes):
    return 200, {"reward": "Fake", "version": "1", "model": "none", "scores": scores, **changes}


HALVES = reply([0.5] * 8)


# ---- scores


@pytest.mark.parametrize("batch", [3, 16])
def test_clients_at_once_get_their_own_scores_in_batches_of_any_size(url, batch):
    reward = RemoteReward(url, "Brightness", batch=batch)
    with ThreadPoolExecutor(4) as pool:
        for n, scores in enumerate(pool.map(lambda n: reward(IMAGES[n:], PROMPTS[n:]), range(8))):
            assert scores == pytest.approx(MEANS[n:], abs=1e-6)
    about = {"name": "Brightness", "range": [0.0, 1.0], "version": "1", "model": "none"}
    assert describe(reward) == {"class": "RemoteReward", **about}  # and not its url


@pytest.mark.parametrize(
    "expected, message",
    [
        ({"reward": "DeQA"}, "has the reward Brightness, not DeQA"),
        ({"url": "127.0.0.1:8100"}, "needs a url like"),
        ({"timeout": 0}, "timeout\n.*greater than 0"),
    ],
)
def test_another_reward_or_wrong_settings_are_an_error_at_the_start(url, expected, message):
    with pytest.raises(ValueError, match=message):
        RemoteReward(**{"url": url, "reward": "Brightness", **expected})
    with pytest.raises(ValueError, match="has the reward Brightness, not GenEval"):
        RemoteDetector(url)


def test_the_token_is_required_and_never_shown(monkeypatch, caplog):
    caplog.set_level("DEBUG")
    with reward_server(token="Sesame1") as (url, _):
        assert httpx.get(url + "/health").status_code == 401
        for wrong in ("", "Sesame2"):
            monkeypatch.setenv(remote.TOKEN, wrong)
            with pytest.raises(ValueError, match="refused: 401 .*FLOWOPD_REWARD_TOKEN") as error:
                RemoteReward(url, "Brightness")
            assert "Sesame" not in str(error.value)
        monkeypatch.setenv(remote.TOKEN, "Sesame1")
        reward = RemoteReward(url, "Brightness")
        assert reward(IMAGES, PROMPTS) == CORRECT
    message = r"ConnectError: .*refused.*The run's state is saved"
    with pytest.raises(RewardUnavailable, match=message) as error:
        reward(IMAGES, PROMPTS)
    assert "Sesame" not in repr(reward) + str(error.value) + caplog.text


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        ("brightness --host 0.0.0.0", 2, "others can reach needs a token"),
        ("deqa --model here --port 0", 1, "error: deqa cannot be loaded: .*--trust-remote-code"),
    ],
)
def test_a_server_that_cannot_start_says_why_in_a_sentence(arguments, code, message):
    command = [sys.executable, FILE, *arguments.split()]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == code and re.search(message, result.stderr)
    assert "Traceback" not in result.stderr


# ---- what the server refuses


PNG = remote.encode_png(np.zeros((4, 4, 3), np.uint8))


@pytest.mark.parametrize(
    "body, message",
    [
        ("no json", "Invalid JSON"),
        ({"reward": "DeQA", "items": [{"png": PNG}]}, "reward is Brightness, not DeQA"),
        ({"reward": "Brightness", "items": []}, "items List should have at least 1 item"),
        ({"reward": "Brightness", "items": [{"png": "AAAA"}]}, "cannot identify image"),
    ],
)
def test_an_invalid_request_is_refused_with_a_sentence(url, body, message):
    content = body if isinstance(body, str) else json.dumps(body)
    result = httpx.post(url + "/score", content=content)
    assert result.status_code == 422 and message in result.json()["detail"]


def test_a_reward_that_fails_is_an_error_and_never_a_score(slow):
    reward = RemoteReward(slow[1], "Brightness")
    with pytest.raises(ValueError, match="refused: 422 .*RuntimeError: it broke"):
        reward(IMAGES, [Prompt("fail", "pickscore")] * 8)
    with pytest.raises(ValueError, match=r"scores\.0 Input should be a finite number"):
        reward(IMAGES * 0, PROMPTS)


def test_a_slow_server_is_an_error_and_does_not_score_for_clients_that_left(slow):
    def request(_):
        message = r"Brightness at .* .tries: 1.: ReadTimeout.*saved"
        with pytest.raises(RewardUnavailable, match=message):
            RemoteReward(slow[1], "Brightness", timeout=0.2, retries=0)(IMAGES, PROMPTS)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(request, range(3)))
    assert RemoteReward(slow[1], "Brightness")(IMAGES, PROMPTS) == CORRECT
    assert slow[0].requests == 2  # the first of the three, and the last


# ---- what the client refuses


@pytest.mark.parametrize(
    "reply, message",
    [
        (reply([0.5] * 7), "gave 7 scores for 8 images"),
        (reply([float("nan")] * 8), r"scores\.0: Input should be a finite"),
        (reply([1.5] * 8), r"gave 1\.5 for 'an image of 0', not .*range \[0, 1\]"),
        (reply([0.5] * 8, model="other"), "is now .*'model': 'other'.*'model': 'none'"),
        ((200, "<html>"), "the reply of Fake at .*Invalid JSON"),
    ],
)
def test_a_reply_without_valid_scores_is_an_error(fake, reply, message):
    fake.replies["/score"] = reply
    with pytest.raises(ValueError, match=message):
        score_images(RemoteReward(fake.url, "Fake"), IMAGES, PROMPTS)
    assert len(fake.requests) == 2  # another try would not help


def test_temporary_errors_are_tried_again_and_lasting_ones_end_the_tries(fake):
    fake.replies["/score"] = [(503, "busy"), (500, "error"), (429, ""), (408, ""), HALVES]
    assert RemoteReward(fake.url, "Fake")(IMAGES, PROMPTS).tolist() == [0.5] * 8
    fake.replies["/score"] = 503, {"error": "busy"}
    reward = RemoteReward(fake.url, "Fake", retries=2)
    fake.requests.clear()
    with pytest.raises(RewardUnavailable, match=".tries: 3.: 503 .*busy"):
        reward(IMAGES, PROMPTS)
    assert len(fake.requests) == 3
    fake.replies["/score"] = 422, {"detail": "unknown"}
    with pytest.raises(ValueError, match="refused: 422 .*unknown"):
        reward(IMAGES, PROMPTS)
    assert len(fake.requests) == 4


DOG = {"label": "dog", "color": "red", "score": 0.8, "box": [0, 0, 9, 9]}


def test_geneval_scores_with_a_remote_detector(fake):
    about = {"reward": "GenEval", "labels": ["dog"], "colors": ["red"]}
    fake.replies["/health"] = 200, HEALTH | about
    found = [[[DOG | change], []] for change in ({}, {"score": 2})]
    fake.replies["/score"] = [reply([], reward="GenEval", detections=d) for d in found]
    record = {"tag": "single_object", "include": [{"class": "dog", "count": 1}]}
    prompts = [Prompt("a photo of a dog", "geneval", record)] * 2
    reward = GenEval(RemoteDetector(fake.url))
    assert score_images(reward, IMAGES[:2], prompts).tolist() == [1, 0]
    with pytest.raises(ValueError, match="score: Input should be less than or equal to 1"):
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


@pytest.mark.parametrize(
    "reply, message",
    [
        (completion("I cannot score this"), "has 0 scores: 'I cannot score this'"),
        (completion("Score: 1-5"), "has 0 scores"),
        (completion("Score: 2. No, Score: 3"), "has 2 scores"),
        (completion("Score: 4", "length"), "was cut off"),
        (completion("Score: 11"), r"gave 11 for 'an image of 0', not .*\[1, 5\]"),
        ((200, {}), "the reply of ChatReward .*Field required"),
        (completion(None), "choices.*Input should be a valid string"),
    ],
)
def test_a_chat_reply_without_one_number_is_an_error(chat, reply, message):
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
    with reward_server(stop=signal.SIGKILL) as (other, process):
        updates = training(other, cut, benchmark)
        assert [next(updates).iteration, next(updates).iteration] == [0, 1]
        process.kill()
        with pytest.raises(RewardUnavailable, match=".tries: 2.: .*is saved"):
            next(updates)
    assert load_state(cut / "state.safetensors")["iteration"] == 2
    # resumed with a server on another port
    assert [info.iteration for info in training(url, cut, benchmark)] == [2]
    assert_same_training(whole, cut, 3)


def test_a_benchmark_names_a_reward_by_its_url_and_never_its_token(url, tmp_path, monkeypatch):
    monkeypatch.setenv("BRIGHTNESS_URL", url)
    shipped = yaml.safe_load((TINY / "benchmark.yaml").read_text()) | {"folder": str(ASSETS)}

    def load_reward(**settings):
        spec = {"class": "RemoteReward", "url": "${BRIGHTNESS_URL}", "reward": "Brightness"}
        rewards = shipped["rewards"] | {"Brightness": spec | settings}
        (tmp_path / "own.yaml").write_text(yaml.safe_dump(shipped | {"rewards": rewards}))
        return load_benchmark(tmp_path / "own.yaml").rewards_named(["Brightness"])["Brightness"]

    assert load_reward(retries=1)(IMAGES, PROMPTS) == CORRECT
    with pytest.raises(ValueError, match="rewards.Brightness: token: no such setting") as error:
        load_reward(token="Sesame")
    assert "Sesame" not in str(error.value)


# ---- the rewards that need an environment of their own


BLACK = Image.new("RGB", (16, 16))
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
        expectation = torch.softmax(self.levels, 0).float() @ torch.arange(5.0, 0.0, -1.0)
        return expectation.half().expand(len(images))
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
    assert server.DeQA(options)([BLACK] * 2, [""] * 2) == pytest.approx([5.0] * 2, abs=0.01)
    before = server.describe_model(str(folder), "main")
    (folder / "own.py").write_text(OWN_CODE + "# changed")
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
    first, second = server.GenEval(options)([BLACK] * 2, [""] * 2)
    assert first == second
    unsure, sure = first
    assert (sure["label"], sure["box"]) == ("dog", [4, 4, 16, 16])
    assert (unsure["label"], unsure["box"]) == ("dog", [0, 0, 8, 8])
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
