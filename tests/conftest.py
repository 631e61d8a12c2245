import pytest

from flowopd_lib import FlowPolicy, load_prompts, tinyworld


@pytest.fixture(scope="session")
def policy():
    return FlowPolicy(tinyworld.BASE)


@pytest.fixture(scope="session")
def judges():
    return tinyworld.judges()


@pytest.fixture(scope="session")
def test_prompts():
    return {task: load_prompts(tinyworld.PROMPTS, task, "test") for task in ("geneval", "ocr", "pickscore")}
