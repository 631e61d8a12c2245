"""A trained adapter as others take it."""

import json
import shutil

import pytest
import yaml

from flowopd_lib import load_benchmark
from flowopd_lib.export import export_training

RECIPE = {"schedule": {"tasks": ["ocr"]}, "grpo": {"reward_weights": {"OCR": 1.0}}}
SCORE = {"model": "student", "reward": "OCR", "mean": 0.8, "low": 0.7, "high": 0.9, "n": 300}


@pytest.fixture
def training(tmp_path):
    """The folder of a finished training, and a notebook's results."""
    folder = tmp_path / "training"
    shutil.copytree(load_benchmark().adapter("ocr"), folder / "adapter")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    (folder / "metrics.jsonl").write_text('{"iteration": 0}\n{"iteration": 1}\n')
    (folder / "results.json").write_text(json.dumps({"scores": [SCORE]}))
    return folder


def test_an_export_has_the_trained_weights_and_a_card(training, workspace, tmp_path):
    scores = training / "results.json"
    out = export_training(training, tmp_path / "out", "apache-2.0", scores)
    policy = workspace.policy
    policy.load_adapter("trained", training / "adapter")
    policy.load_adapter("exported", out)
    assert policy.adapter("exported").sha256 == policy.adapter("trained").sha256
    text = (out / "README.md").read_text()
    metadata = yaml.safe_load(text.split("---")[1])
    assert metadata["license"] == "apache-2.0" and "lora" in metadata["tags"]
    assert "GRPO" in text and "2 iterations on\nthe training prompts of ocr" in text
    assert "| OCR | 0.800 [0.700, 0.900] | 300 |" in text
    assert yaml.safe_load(text.split("```yaml\n")[1].split("```")[0]) == RECIPE


def test_the_card_names_the_benchmarks_base_and_no_scores_by_default(training, tmp_path):
    text = (export_training(training, tmp_path / "out", "mit") / "README.md").read_text()
    assert load_benchmark().base_name in text and "Exported without scores" in text
    assert "base_model" not in yaml.safe_load(text.split("---")[1])  # it is not on the hub


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"license": " "}, "needs a licence"),
        ({"scores": "results.json", "model": "nobody"}, "model with scores in .* 'nobody'"),
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
