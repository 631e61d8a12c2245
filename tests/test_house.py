"""Which part of the library may use which: lower rows use upper ones, never the other way."""

import ast
import subprocess
import sys

import pytest

from flowopd_lib.files import ROOT

LIBRARY = ROOT / "flowopd_lib"
ROWS = (
    {
        "files",
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
    {"worlds"},
    {"export", "jobs"},
    {"studies"},
    {"looking"},
    {"runs"},
    {"bench"},
)
# What is done once, to make the small world, uses what is below it.
BUILDERS = {"worlds.tiny.train_experts"}


def modules():
    return {
        ".".join(p.relative_to(LIBRARY).with_suffix("").parts).removesuffix("__init__").rstrip("."): p
        for p in LIBRARY.rglob("*.py")
    }


def imported(module: str, path, every) -> set[str]:
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            base = ".".join(part for part in base if part)
            found |= {name if (name := f"{base}.{a.name}".lstrip(".")) in every else base for a in node.names}
    return found


EVERY = modules()
ROW = {part: number for number, row in enumerate(ROWS) for part in row}


@pytest.mark.parametrize("module", sorted(set(EVERY) - {""} - BUILDERS))
def test_a_module_uses_its_own_row_and_those_above(module):
    mine = ROW[module.split(".")[0]]
    below = {other for other in imported(module, EVERY[module], EVERY) if ROW[other.split(".")[0]] > mine}
    assert not below


@pytest.mark.parametrize("command", (["check"], ["format", "--check"]), ids=" ".join)
def test_the_code_is_formatted_and_clean(command):
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *command, "--no-cache"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
