import os

import pytest

# the same on every machine, and what bounds on rounding are made for
os.environ.setdefault("FLOWOPD_PRECISION", "float32")
# everything is on this machine; without this, loading a model asks the hub and waits for it
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The cores are shared out among the processes that run tests.
os.environ.setdefault(
    "OMP_NUM_THREADS",
    str(max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1)))),
)
# threads that wait by spinning starve those of the processes that tests start
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch  # noqa: E402

from flowopd_lib import load_benchmark  # noqa: E402
from flowopd_lib.lab.workspace import Workspace  # noqa: E402


def pytest_xdist_auto_num_workers(config):
    """One more than there are cores: tests also wait for a browser, a kernel, a server."""
    return (os.cpu_count() or 1) + 1


@pytest.fixture(scope="session")
def benchmark():
    return load_benchmark()


@pytest.fixture(scope="session")
def policy(benchmark):
    """The shipped model. A test that adds adapters to it takes `workspace`, which removes them."""
    return benchmark.policy(device="cpu")


@pytest.fixture
def workspace(policy):
    """A workspace of the shipped model without adapters, in one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    policy.remove_adapters()
    yield Workspace("tiny", policy=policy)
    policy.remove_adapters()
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def rewards(benchmark):
    return benchmark.rewards("cpu")


@pytest.fixture(scope="session")
def test_prompts(benchmark):
    return {task: benchmark.prompts(task, "test") for task in benchmark.prompt_tasks}
