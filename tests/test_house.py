"""Which part of the library may use which: lower rows use upper ones, never the other way. And how long the
method may be."""

import ast
import io
import subprocess
import sys
import tokenize

import pytest

from flowopd_lib.files import ROOT

LIBRARY = ROOT / "flowopd_lib"
ROWS = (
    {
        "files",
        "hub",
        "inputs",
        "identity",
        "precision",
        "progress",
        "prompts",
        "quiet",
        "parts",
        "records",
        "thumbnails",
    },
    {"sde", "adapters", "pipelines", "texts", "policy", "rollout", "schedule"},
    {"rewards"},
    {"objectives"},
    {"train", "checkpoint", "fit", "merge"},
    {"evaluate", "stats"},
    {"benchmarks"},
    {"export", "jobs", "studies"},  # studies have jobs of their own, and jobs know them
    {"check"},
    {"plots"},
    {"runs"},
    {"bench"},
)
# What is done once, to make the small benchmark, uses what is below it.
BUILDERS = {"benchmarks.tiny.train_experts"}
# What a stranger reads in one sitting.
METHOD = [
    LIBRARY / f"{name}.py" for name in ("sde", "policy", "rollout", "prompts", "schedule", "train")
]
METHOD += sorted((LIBRARY / "objectives").glob("*.py"))


def modules():
    return {
        ".".join(p.relative_to(LIBRARY).with_suffix("").parts)
        .removesuffix("__init__")
        .rstrip("."): p
        for p in LIBRARY.rglob("*.py")
    }


def imported(module: str, path, every) -> set[str]:
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            base = ".".join(part for part in base if part)
            found |= {
                name if (name := f"{base}.{a.name}".lstrip(".")) in every else base
                for a in node.names
            }
    return found


EVERY = modules()
ROW = {part: number for number, row in enumerate(ROWS) for part in row}


@pytest.mark.parametrize("module", sorted(set(EVERY) - {""} - BUILDERS))
def test_a_module_uses_its_own_row_and_those_above(module):
    mine = ROW[module.split(".")[0]]
    below = {
        other for other in imported(module, EVERY[module], EVERY) if ROW[other.split(".")[0]] > mine
    }
    assert not below


def lines_of_code(source: str) -> int:
    """How many lines hold code: blanks, comments and docstrings do not."""
    lines = {
        line
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type != tokenize.COMMENT and token.string.strip()
        for line in range(token.start[0], token.end[0] + 1)
    }
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            if ast.get_docstring(node) is not None:
                lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


def test_lines_of_code_are_those_that_hold_any():
    source = '"""Two\nlines."""\n\n# none\ndef f():\n    "What."\n    return """\n# a text\n"""  # said\n'
    assert lines_of_code(source) == 4


def test_the_method_is_read_in_one_sitting():
    lengths = {str(path.relative_to(LIBRARY)): lines_of_code(path.read_text()) for path in METHOD}
    assert len(lengths) > 9 and sum(lengths.values()) <= 1600, lengths


@pytest.mark.parametrize("command", (["check"], ["format", "--check"]), ids=" ".join)
def test_the_code_is_formatted_and_clean(command):
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *command, "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
