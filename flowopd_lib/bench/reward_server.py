"""How many images a second go to the reward server and back: PNG, HTTP and its queue, around the
reward that needs no model, on this machine. A real reward's own time comes on top."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from ..data import Prompt
from ..rewards import RemoteReward, remote

TRIES = 8  # to connect, with growing pauses, while the server starts


@contextlib.contextmanager
def running_server() -> Iterator[str]:
    """The url of a server with the reward Brightness."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = Path(remote.__file__).with_name("server.py")
    command = [sys.executable, str(server), "brightness", "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


def measure_server(
    clients: Sequence[int] = (1, 4, 16), size: int = 512, batch: int = 16, seconds: float = 4.0
) -> list[dict[str, float]]:
    """Requests and images (`size` pixels square, `batch` in a request) per second, for so many
    clients at once that request without a pause for `seconds`."""
    g = torch.Generator().manual_seed(0)
    # smooth with a little noise, so that a PNG is about as long as that of a sample
    smooth = torch.nn.functional.interpolate(
        torch.rand(batch, 3, 8, 8, generator=g), (size, size), mode="bilinear"
    )
    images = (smooth + 0.01 * torch.randn(smooth.shape, generator=g)).clamp(0, 1)
    prompts, rows = [Prompt("a photo", "pickscore")] * batch, []
    with running_server() as url:
        for n in clients:
            rewards = [
                RemoteReward(url, "Brightness", batch=batch, retries=TRIES) for _ in range(n)
            ]
            start = time.perf_counter()

            def request(reward: RemoteReward, end: float = start + seconds) -> int:
                count = 0
                while time.perf_counter() < end:
                    reward(images, prompts)
                    count += 1
                return count

            with ThreadPoolExecutor(n) as pool:
                requests = sum(pool.map(request, rewards))
            rate = requests / (time.perf_counter() - start)
            rates = {"requests_per_second": rate, "images_per_second": rate * batch}
            rows.append({"clients": n, "size": size, "batch": batch, **rates})
    return rows
