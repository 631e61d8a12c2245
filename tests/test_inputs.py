"""What a user gives is checked before anything long: types, ranges, names; one sentence each."""

import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Mapping

import bad_inputs
import nbformat
import numpy as np
import papermill
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from flowopd_lib.inputs import (
    SEED,
    SHARES,
    BelowOne,
    Count,
    NotNegative,
    Positive,
    begin,
    check_fields,
    check_value,
    kinds_of,
    list_of,
    one_of,
    read_yaml,
    some_of,
    within,
)
from flowopd_lib.prompts import read_prompts
from flowopd_lib.runs.profiles import NOTEBOOKS, parameters_of


@pytest.mark.parametrize(
    "value, kind, message",
    [
        (
            "3e-4",
            float,
            r"x must be a number, not '3e-4'; that is a text: write it without quotes, and with a point, "
            r"such as 3.0e-4",
        ),
        ("1", int, "x must be a whole number, not '1'; that is a text: write it without quotes$"),
        (1.5, int, "x must be a whole number, not 1.5"),
        (True, int, "x must be a whole number, not True"),
        (["a"], Mapping[str, str | None], r"x must be a mapping of names to values, not \['a'\]"),
        ({"a": 3}, Mapping[str, str | None], r"x\['a'\] must be a text, not 3"),
        ({"a": {"b": "c"}}, Mapping[str, float | Mapping[str, float]], r"x\['a'\]\['b'\]"),
        ((1, "a"), int | tuple[int, ...] | None, r"x\[1\] must be a whole number"),
        (3, within(12, 300), "x must be at least 12, not 3"),
        (301, within(12, 300), "x must be at most 300, not 301"),
        (
            "gneval",
            one_of("geneval", "ocr"),
            r"one of geneval, ocr, not 'gneval' \(did you mean 'geneval'\?\)",
        ),
        (["x"], some_of("a", "b"), r"x\[0\] must be one of a, b"),
        ([], list_of(str), "x must be more than nothing"),
        ({"a": 0}, SHARES, r"x\['a'\] must be at least 1"),
        ({"a": 1.5}, SHARES, r"x\['a'\] must be a whole number, not 1.5"),
        ({1: 1}, SHARES, "x"),
        (-5, SEED, "x must be at least 0, not -5"),
        (None, str, "x must be a text, not None"),
    ],
)
def test_a_value_of_another_kind_is_told_in_one_sentence(value, kind, message):
    with pytest.raises(ValueError, match=message) as error:
        check_value("x", value, kind)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "value, kind",
    [
        (1, float),
        (None, int | tuple[int, ...] | None),
        ((1, 2), int | tuple[int, ...] | None),
        ({"a": None}, Mapping[str, str | None]),
        ({"a": 0.5, "b": 1}, Mapping[str, float | Mapping[str, float]]),
        (12, within(12, 300)),
        ([], some_of("a")),
        (1, within(0.0, 2.0)),
    ],
)
def test_a_value_of_its_kind_is_taken_as_it_is(value, kind):
    assert check_value("x", value, kind) == value


@dataclasses.dataclass
class Settings:
    n: Count = 1
    rate: Positive | None = None
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.99)
    kind: one_of("ode", "sde") = "ode"
    names: Mapping[str | None, NotNegative] = dataclasses.field(default_factory=dict)
    free: object = None


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(n=0), "n must be at least 1, not 0"),
        (dict(n=1.0), "n must be a whole number, not 1.0"),
        (dict(rate=math.nan), "rate must be more than 0, not nan"),
        (dict(betas=(0.9, 1.0)), r"betas\[1\] must be less than 1, not 1.0"),
        (dict(kind="sdee"), r"kind must be one of ode, sde, not 'sdee' \(did you mean 'sde'\?\)"),
        (dict(names={"a": -1}), r"names\['a'\] must be at least 0, not -1"),
    ],
)
def test_a_field_that_is_not_what_its_annotation_says_is_told(given, message):
    with pytest.raises(ValueError, match=message):
        check_fields(Settings(**given))


def test_fields_as_their_annotations_say_are_taken_also_as_lists_and_numpys():
    check_fields(Settings())
    check_fields(Settings(np.int64(3), np.float32(0.5), [0.0, 0.5], "sde", {None: 0, "a": 1.5}, -1))
    check_fields(Settings(rate=math.inf))


def test_yaml_that_is_none_names_the_line(tmp_path):
    (tmp_path / "a.yaml").write_text("train:\n\titerations: 3\n")
    with pytest.raises(
        ValueError,
        match=r"a.yaml, line 2, column 1 is not YAML: .*indent with spaces, not with a tab",
    ):
        read_yaml(tmp_path / "a.yaml")
    with pytest.raises(FileNotFoundError, match=r"there is no .*b.yaml"):
        read_yaml(tmp_path / "b.yaml")


@pytest.mark.parametrize(
    "line, message",
    [
        ("null", "line 2 is not a record but null"),
        ("[1, 2]", r"line 2 is not a record but \[1, 2\]"),
        ('"x"', "line 2 is not a record"),
        ("{", "line 2 is not JSON"),
        ('{"tag": "colors"}', "line 2 lacks include, prompt"),
        ('{"tag": 3, "include": [], "prompt": "x"}', "tag must be a text, not 3"),
        ('{"tag": "t", "include": {}, "prompt": "x"}', "include must be a list"),
        ('{"tag": "t", "include": [], "prompt": "x"}', "include names no object"),
        (
            '{"tag": "t", "include": [{"class": "star"}], "prompt": "x"}',
            r"include\[0\] must have a class and a count",
        ),
        (
            '{"tag": "t", "include": [{"class": "star", "count": 1, "position": ["left of", 0]}], '
            '"prompt": "x"}',
            "the number of an object before it",
        ),
    ],
)
def test_a_prompt_file_names_the_line(line, message, tmp_path):
    good = {"tag": "colors", "include": [{"class": "star", "count": 1}], "prompt": "a star"}
    (tmp_path / "test_metadata.jsonl").write_text(json.dumps(good) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / "test_metadata.jsonl", "geneval", "geneval")


def test_a_file_that_is_no_text_is_named(tmp_path):
    (tmp_path / "test.txt").write_bytes(b'a sign "\xff"\n')
    with pytest.raises(ValueError, match="test.txt is not UTF-8"):
        read_prompts(tmp_path / "test.txt", "ocr", "quoted")


# ---- notebooks


def test_begin_makes_the_folder_and_refuses_what_the_notebook_does_not_have(tmp_path):
    names = {
        "In": ["", "n = 3", "# Parameters\nn = 5\nm = 2\n"],
        "n": 5,
        "out_dir": str(tmp_path / "new" / "deep"),
    }
    with pytest.raises(ValueError, match="this notebook has no 'm'.*; it has n, out_dir"):
        begin(names, n=within(1, 9), out_dir=str)
    names["In"].pop()
    assert (
        begin(names, n=within(1, 9), out_dir=str) == tmp_path / "new" / "deep"
        and (tmp_path / "new" / "deep").is_dir()
    )
    assert begin({"out_dir": ""}, out_dir=str).is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be a folder for results: "):
        begin({"out_dir": str(tmp_path / "file")}, out_dir=str)
    with pytest.raises(ValueError, match="n must be at least 1, not 0"):
        begin({"n": 0}, n=within(1, 9))


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda p: p.stem)
def test_every_parameter_of_a_notebook_says_what_it_may_be_and_its_default_is_that(path):
    code = [c.source for c in nbformat.read(path, 4).cells if c.cell_type == "code"]
    defaults, kinds = parameters_of(path), kinds_of(code)
    assert set(kinds) == set(defaults) and "begin(globals()" in code[1], (
        "in the first cell after the parameters"
    )
    for name, value in defaults.items():
        check_value(name, value, kinds[name])
    first = code[1].split("begin(")[0]
    assert not any(
        word in first
        for word in ("sample(", "evaluate(", "fit(", "FlowPolicy(", "merged_policy(", "rewards()")
    ), "before anything is loaded"


def test_papermill_alone_is_checked_too(tmp_path):
    cells = [
        new_code_cell("n = 3\nout_dir = ''", metadata={"tags": ["parameters"]}),
        new_code_cell(
            "import sys\nsys.path.insert(0, %r)\nimport inputs\nout = inputs.begin(globals(), "
            "n=inputs.within(1, 9), out_dir=str)" % str(NOTEBOOKS.parent / "flowopd_lib")
        ),
        new_code_cell("(out / 'x').write_text('done')"),
    ]
    source = tmp_path / "n.ipynb"
    nbformat.write(
        new_notebook(
            cells=cells,
            metadata={
                "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}
            },
        ),
        source,
    )

    def run(**parameters):
        papermill.execute_notebook(source, tmp_path / "out.ipynb", parameters, progress_bar=False)

    run(n=5, out_dir=str(tmp_path / "new"))
    assert (tmp_path / "new" / "x").read_text() == "done"
    for parameters, message in (
        ({"n": 10}, "n must be at most 9, not 10"),
        ({"n": "3"}, "n must be a whole number, not '3'"),
        ({"m": 3}, "this notebook has no 'm'"),
    ):
        with pytest.raises(papermill.PapermillExecutionError, match=message):
            run(**parameters)


# ---- recipes: the table of bad inputs (`make drill` tries it in processes of their own)

CASES = bad_inputs.cases()


@pytest.mark.parametrize("name", CASES)
def test_a_bad_recipe_is_one_sentence(name, tmp_path):
    content, message = CASES[name]
    code, said = bad_inputs.said_of(content, tmp_path)
    assert code not in (0, None) and message in said and "Traceback" not in said, said
    assert len(said.strip().splitlines()) == 1 and not (tmp_path / "training").exists()


def test_the_good_recipe_they_are_made_of_is_good(tmp_path):
    assert bad_inputs.said_of(
        bad_inputs.yaml.safe_dump({**bad_inputs.GOOD, "train": {"iterations": 1}}).encode(),
        tmp_path,
    ) == (0, "")


def test_a_bad_recipe_in_a_process_of_its_own(tmp_path):
    content, message = CASES["lr as YAML's text"]
    (tmp_path / "recipe.yaml").write_bytes(content)
    command = [
        sys.executable,
        "-m",
        "flowopd_lib.jobs",
        str(tmp_path / "recipe.yaml"),
        "--folder",
        str(tmp_path / "x"),
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1 and message in result.stderr and "Traceback" not in result.stderr
