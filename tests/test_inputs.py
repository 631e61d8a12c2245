"""What a user writes is checked before anything long begins: one sentence with the key and why."""

import json
from collections.abc import Mapping
from typing import Literal

import bad_inputs
import pytest
import yaml

from flowopd_lib.config import Config, Count, Plugin, load_plugin, read_yaml, validate
from flowopd_lib.data import quoted_words, read_prompts, write_prompts
from flowopd_lib.rollout import Sampler

pytestmark = pytest.mark.fast


class Section(Config):
    n: Count
    kind: Literal["ode", "sde"] = "ode"
    weights: Mapping[str, float | Mapping[str, float]] = {}
    steps: Count | list[int] | None = None
    loss: Plugin = "pathwise"


def test_values_that_fit_are_taken(tmp_path):
    (tmp_path / "mine.py").write_text("def half(batch):\n    return batch / 2\n")
    mapping = {"n": 3, "weights": {"a": 0.5, "b": {"c": 1}}, "steps": [0, 2]}
    section = validate(Section, {**mapping, "loss": f"{tmp_path / 'mine.py'}:half"})
    assert section.loss(3) == 1.5 and section.steps == [0, 2]
    assert validate(Section, {"n": 1, "loss": "math:sqrt"}).loss(9) == 3
    sampler = validate(Sampler, {"steps": 8, "noise_scale": "math:hypot"})
    assert sampler.noise_scale(3, 4) == 5 and Sampler(8, "sde", 0.5).noise_level == 0.5


def test_a_plugin_is_loaded_anew_when_its_file_changes(tmp_path):
    plugin = tmp_path / "mine.py"
    for n in (1, 2):
        plugin.write_text(f"n = {n}\nclass Mine:\n    n = {n}\n")
        assert load_plugin("mine.py:n", tmp_path) == load_plugin("mine.py:Mine", tmp_path).n == n
    assert load_plugin("mine.py:Mine", tmp_path) is load_plugin("mine.py:Mine", tmp_path)
    for code, name, message in (
        ("1 / 0", "mine.py:n", "division by zero"),
        ("n = (", "mine.py:n", "was never closed"),
        ("", "mine.py:n", "has no attribute 'n'"),
        ("", "none.py:n", "No such file"),
        ("", "no.module:n", "No module named 'no'"),
    ):
        plugin.write_text(code)
        with pytest.raises(ValueError, match=f"{name}' cannot be loaded .*{message}"):
            load_plugin(name, tmp_path)


# ---- prompt files

GOOD = {"tag": "colors", "include": [{"class": "star", "count": 1}], "prompt": "a star"}
LEFT_OF_ITSELF = {"class": "star", "count": 1, "position": ["left of", 0]}


@pytest.mark.parametrize(
    "line, message",
    [
        ("null", "Input should be a valid dictionary or instance of GenEvalRecord, not None"),
        ("[1, 2]", "Input should be a valid dictionary"),
        ("{", "is not JSON"),
        ('{"tag": "colors", "prompt": "x"}', "include: Field required"),
        (json.dumps(GOOD | {"tag": 3}), "tag: Input should be a valid string, not 3"),
        (json.dumps(GOOD | {"prompt": " "}), "prompt: String should match pattern"),
        (json.dumps(GOOD | {"include": []}), "include: List should have at least 1 item"),
        (json.dumps(GOOD | {"include": [{"class": "star"}]}), "include.0.count: Field required"),
        (
            json.dumps(GOOD | {"include": [LEFT_OF_ITSELF]}),
            r"include.0..position names no entry before it",
        ),
    ],
)
def test_a_bad_record_of_a_prompt_file_names_the_line(line, message, tmp_path):
    path = tmp_path / "test_metadata.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=f"{path.name}, line 2.*{message}") as error:
        read_prompts(path, "geneval", "geneval")
    assert "\n" not in str(error.value)


def test_prompt_files_are_read_as_they_were_written(tmp_path, test_prompts):
    for task, kind in (("geneval", "geneval"), ("ocr", "quoted"), ("pickscore", "plain")):
        prompts = test_prompts[task][:5]
        write_prompts(tmp_path / task, prompts)
        again = read_prompts(tmp_path / task, task, kind)
        assert again == prompts and [p.metadata for p in again] == [p.metadata for p in prompts]
    assert quoted_words('a sign that says "CAT" and "DOG"') == "CAT"


@pytest.mark.parametrize(
    "content, message",
    [
        (b'a sign "\xff"\n', "is not UTF-8"),
        (b"a sign\n", "line 1 has no words in double quotes"),
        (b"\n", "holds no prompt"),
        (None, "No such file"),
    ],
)
def test_a_bad_prompt_file_is_named(content, message, tmp_path):
    path = tmp_path / "test.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_prompts(path, "ocr", "quoted")


def test_keys_and_dates_of_yaml_are_as_they_are_written(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("no: {on: 1}\n2024-01-02: 2024-03-04\n3: no\n<<: {a: b}\n[1]: x\n"[:-7])
    read = read_yaml(path)
    assert read == {"no": {"on": 1}, "2024-01-02": "2024-03-04", "3": False, "a": "b"}
    with pytest.raises(ValueError, match=r"mine.yaml: 2024-01-02: no such setting"):
        validate(Section, {"n": 1, "2024-01-02": 3}, "mine.yaml")
    path.write_text("[1]: x\n")
    with pytest.raises(ValueError, match="mine.yaml is not YAML: .* unhashable key .* line 1"):
        read_yaml(path)


# ---- recipes: the table of bad inputs, as the command line reports them

CASES = bad_inputs.cases()


@pytest.mark.parametrize("name", CASES)
def test_a_bad_recipe_is_one_sentence(name, tmp_path):
    content, message = CASES[name]
    code, error = bad_inputs.exit_of(content, tmp_path)
    assert code == 1 and error.startswith("error: ") and message in error, error
    assert len(error.strip().splitlines()) == 1 and not (tmp_path / "training").exists()


def test_the_good_recipe_they_are_made_of_is_good(tmp_path):
    recipe = {**bad_inputs.GOOD, "train": {"iterations": 1}}
    assert bad_inputs.exit_of(yaml.safe_dump(recipe).encode(), tmp_path) == (0, "")
