import os

import pytest

# the same on every machine, and what bounds on rounding are made for
os.environ.setdefault("FLOWOPD_PRECISION", "float32")
# The cores are shared out among the processes that run tests.
os.environ.setdefault(
    "OMP_NUM_THREADS",
    str(max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1)))),
)
# threads that wait by spinning starve those of the processes that tests start
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from flowopd_lib import load_benchmark  # noqa: E402


def pytest_xdist_auto_num_workers(config):
    """One more than there are cores: tests wait, too, for a browser, a kernel, a server, a process."""
    return (os.cpu_count() or 1) + 1


@pytest.fixture(scope="session")
def benchmark():
    return load_benchmark()


@pytest.fixture(scope="session")
def policy(benchmark):
    return benchmark.policy(device="cpu")


@pytest.fixture(scope="session")
def rewards(benchmark):
    return benchmark.rewards("cpu")


@pytest.fixture(scope="session")
def test_prompts(benchmark):
    return {task: benchmark.prompts(task, "test") for task in benchmark.own}
