"""A trained adapter as others take it."""

import shutil

import pytest
import yaml

from flowopd_lib import load_benchmark
from flowopd_lib.export import export_training

RECIPE = {"schedule": {"tasks": ["ocr"]}, "grpo": {"reward_weights": {"OCR": 1.0}}}


@pytest.fixture
def training(tmp_path):
    """The folder of a finished training."""
    folder = tmp_path / "training"
    shutil.copytree(load_benchmark().adapter("ocr"), folder / "adapter")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    (folder / "metrics.jsonl").write_text('{"iteration": 0}\n{"iteration": 1}\n')
    return folder


def test_an_export_has_the_trained_weights_and_a_card(training, workspace, tmp_path):
    out = export_training(training, tmp_path / "out", "apache-2.0")
    policy = workspace.policy
    policy.load_adapter("trained", training / "adapter")
    policy.load_adapter("exported", out)
    assert policy.adapter("exported").sha256 == policy.adapter("trained").sha256
    text = (out / "README.md").read_text()
    metadata = yaml.safe_load(text.split("---")[1])
    assert metadata["license"] == "apache-2.0" and "lora" in metadata["tags"]
    assert "GRPO" in text and "2 iterations on\nthe training prompts of ocr" in text
    assert yaml.safe_load(text.split("```yaml\n")[1].split("```")[0]) == RECIPE
    assert load_benchmark().base_name in text and "base_model" not in metadata  # not on the hub


@pytest.mark.parametrize("tasks", [None, ["ocr"]])
def test_the_card_of_a_supervised_training_has_its_tasks_and_no_paths(training, tmp_path, tasks):
    recipe = {
        "benchmark": "tiny",
        "adapters": {"mine": str(tmp_path / "runs" / "mine" / "adapter")},
        "student": {"merge": "svd", "adapters": ["mine", "ocr"]},
        "sft": {"samples": 4, "tasks": tasks},
        "train": {"iterations": 2, "lr": 1e-3},
    }
    (training / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    text = (export_training(training, tmp_path / "out", "mit") / "README.md").read_text()
    assert "by supervised fine-tuning on samples of its teachers: 2 iterations" in text
    names = tasks or load_benchmark().distilled_tasks
    assert f"prompts of {', '.join(names)} of the benchmark tiny" in text
    assert str(tmp_path) not in text and "mine: mine/adapter" in text


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"folder": "."}, "has no adapter/: has the training finished"),
        ({"out": "adapter"}, "is not empty; give a new folder"),
    ],
)
def test_what_cannot_be_exported_is_refused(arguments, message, training, monkeypatch):
    monkeypatch.chdir(training)
    options = {"folder": training, "out": "out", "license": "mit"} | arguments
    if arguments.get("folder"):
        shutil.rmtree("adapter")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        export_training(**options)
    assert not (training / "out").exists()
