"""What the reward server takes and how it fails: `python -m flowopd_lib.bench.reward_server [--size 512]`.

A server around the reward that needs no model, on this machine's loopback: what is measured is the way there
and back (PNG, HTTP, the queue), which a real reward's seconds come on top of. Then what a run sees of a full
queue and of a server that is killed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pandas as pd
import torch

from ..prompts import Prompt
from ..rewards import RemoteReward, RewardUnavailable
from ..rewards import remote as clients

SERVER = Path(clients.__file__).with_name("reward_server.py")


@contextlib.contextmanager
def served(*options: str) -> Iterator[tuple[str, subprocess.Popen]]:
    """A server's url and its process."""
    command = [sys.executable, str(SERVER), "brightness", "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            url = process.stdout.readline().split()[-1]
            process.stdout.readline()
            yield url, process
        finally:
            process.send_signal(signal.SIGTERM)


def pictures(n: int, size: int) -> torch.Tensor:
    """(n, 3, size, size) in [0, 1]: smooth with a little noise, so that a PNG of one is about as long as one
    of a sample."""
    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.random((n, 3, 8, 8), np.float32))
    smooth = torch.nn.functional.interpolate(coarse, (size, size), mode="bilinear")
    return (smooth + 0.01 * torch.from_numpy(rng.standard_normal(smooth.shape, np.float32))).clamp(
        0, 1
    )


def load(clients_at_once: int, size: int, batch: int, seconds: float) -> dict[str, float]:
    """Requests and pictures a second with so many clients asking without a pause: bodies made before (what
    the server takes), and as a run asks (PNGs made on the way)."""
    images = pictures(batch, size)
    prompts = [Prompt("a picture", "pickscore")] * batch
    pixels = (images * 255).round().byte().permute(0, 2, 3, 1).numpy()
    items = [{"png": clients.png(p), "prompt": "a picture", "metadata": {}} for p in pixels]
    body = json.dumps({"reward": "Brightness", "items": items}).encode()
    rates, waits = {}, []
    with served("--queue", "100000") as (url, _):
        rewards = [RemoteReward(url, "Brightness", batch=batch) for _ in range(clients_at_once)]
        lines = [httpx.Client(trust_env=False, timeout=60) for _ in range(clients_at_once)]

        def plain(i: int) -> None:
            began = time.perf_counter()
            lines[i].post(url + "/score", content=body).raise_for_status()
            waits.append(time.perf_counter() - began)

        for name, ask in (("server", plain), ("run", lambda i: rewards[i](images, prompts))):
            counts, until = [0] * clients_at_once, time.perf_counter() + seconds

            def keep_asking(i: int, ask=ask, counts=counts, until=until) -> None:
                while time.perf_counter() < until:
                    ask(i)
                    counts[i] += 1

            began = time.perf_counter()
            with ThreadPoolExecutor(clients_at_once) as pool:
                list(pool.map(keep_asking, range(clients_at_once)))
            rates[name] = sum(counts) / (time.perf_counter() - began)
        for line in lines:
            line.close()
    return {
        "clients": clients_at_once,
        "requests/s": rates["server"],
        "pictures/s": rates["server"] * batch,
        "median ms": 1e3 * float(np.median(waits)),
        "slowest ms": 1e3 * max(waits),
        "pictures/s as a run asks": rates["run"] * batch,
    }


def full_queue(clients_at_once: int = 8) -> str:
    """Many clients at a queue that holds one request: how often they were sent away, and whether all came
    through with the right scores."""
    images, refusals = pictures(8, 32), []
    right = [float((i * 255).round().byte().double().mean() / 255) for i in images]
    with served("--queue", "8", "--delay", "0.01") as (url, _):
        rewards = [
            RemoteReward(url, "Brightness", batch=8, retries=10) for _ in range(clients_at_once)
        ]
        for reward in rewards:
            reward._line._client().event_hooks["response"] = [
                lambda r: refusals.append(r.status_code == 503)
            ]
        began = time.perf_counter()
        with ThreadPoolExecutor(clients_at_once) as pool:
            prompts = [Prompt("a picture", "pickscore")] * 8
            scores = list(pool.map(lambda reward: reward(images, prompts), rewards))
        seconds = time.perf_counter() - began
    came = sum(np.allclose(s, right, atol=1e-6) for s in scores)
    return (
        f"full queue: {came} of {clients_at_once} clients got the right scores within {seconds:.1f} s "
        f"({sum(refusals)} answers were 503; without a queue it would take {0.08 * clients_at_once:.1f} s)"
    )


def killed() -> str:
    """A server killed with a request under way, with the settings a run has: what is raised, and when."""
    images, prompts = pictures(8, 32), [Prompt("a picture", "pickscore")] * 8
    with served("--delay", "1") as (url, process):
        reward = RemoteReward(url, "Brightness")
        threading.Timer(0.5, process.kill).start()
        began = time.perf_counter()
        try:
            reward(images, prompts)
        except RewardUnavailable as error:
            return f"killed server: {time.perf_counter() - began - 0.5:.1f} s later: {error}"
    raise RuntimeError("a killed server gave scores")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, nargs="+", default=[64, 512], help="pixels a side")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--batch", type=int, default=16, help="pictures in a request")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    args = parser.parse_args()
    if min(*args.size, *args.clients, args.batch) < 1 or not args.seconds > 0:
        parser.error("--size, --clients and --batch must be at least 1, and --seconds positive")
    for size in args.size:
        rows = pd.DataFrame([load(n, size, args.batch, args.seconds) for n in args.clients])
        print(f"{size} x {size} pixels, {args.batch} pictures a request")
        print(rows.round(1).to_string(index=False))
    print(full_queue())
    print(killed())
    cpus = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    named = [
        line.split(":")[1].strip() for line in cpus.splitlines() if line.startswith("model name")
    ]
    print(
        f"on {(named or [platform.machine()])[0]}, {os.cpu_count()} cores for server and clients together"
    )


if __name__ == "__main__":
    main()
