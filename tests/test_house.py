"""Which part of the library may import which, and how it is written."""

import ast
import re
import subprocess
import sys

import nbformat
import pytest

from flowopd_lib.files import ROOT

LIBRARY = ROOT / "flowopd_lib"
# A module imports from its own row and those above. A name stands for all modules that begin with
# it, the longest one counts.
ROWS = """
config files fingerprint loading plots.style
sde
lora data
policy
rollout
stats
rewards.base rewards
losses
merge
train evaluate
benchmarks
lab
check export benchmarks.tiny.build
experiments
plots
widgets
runs
bench
cli __main__
"""
ROW = {name: number for number, row in enumerate(ROWS.splitlines()) for name in row.split()}


def module_name(path):
    name = ".".join(path.relative_to(LIBRARY).with_suffix("").parts)
    return name.removesuffix("__init__").rstrip(".")


MODULES = {module_name(path): path for path in LIBRARY.rglob("*.py")}


def row_of(module):
    """That of the longest name that the module begins with. Raises ValueError for a module that has
    none."""
    names = [name for name in ROW if f"{module}.".startswith(f"{name}.")]
    if not names:
        raise ValueError(f"{module} has no place in ROWS")
    return ROW[max(names, key=len)]


def imports_of(module):
    """The modules of the library that one imports, at its top or inside a function."""
    path = MODULES[module]
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            parts = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            base = ".".join(part for part in parts if part)
            for alias in node.names:
                name = f"{base}.{alias.name}".lstrip(".")
                yield name if name in MODULES else base


@pytest.mark.fast
@pytest.mark.parametrize("module", sorted({*MODULES} - {""}))
def test_a_module_imports_from_its_own_row_and_those_above(module):
    below = {other for other in imports_of(module) if other and row_of(other) > row_of(module)}
    assert not below


@pytest.mark.parametrize("command", (["check"], ["format", "--check"]), ids=" ".join)
def test_code_and_notebooks_are_formatted_and_have_no_lint(command):
    words = [sys.executable, "-m", "ruff", *command, "--no-cache", "--quiet"]
    words += ["flowopd_lib", "tests", "docs", "notebooks"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[:2000]


# Words for which the field has a standard term, and the expressions in which they are right.
WORDS = {"stands still", "whole number"} | {
    *"""judge judges twin twins walk walks pull pulls arm arms told tells heard asked looks noises
    foretold begun abroad ledger beside nats stand-in upto drill apart nearer picture
    pictures""".split()
}
ALLOWED = ("pull request", "git pull", "ast.walk", "os.walk", "llm-as-a-judge")


def words_in(text):
    """Those of WORDS that a text has, whole; names are split at underscores and capitals."""
    text = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", text).replace("_", " ").lower()
    for allowed in ALLOWED:
        text = text.replace(allowed, "")
    return {word for word in WORDS if re.search(rf"(?<![\w-]){word}(?![\w-])", text)}


def public_names(path):
    """Of modules, classes, functions, their arguments and constants."""
    yield path.stem
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        if isinstance(node, ast.arg):
            yield node.arg
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id.isupper():
            yield node.id


def texts():
    """By path: what readers read."""
    found = {path: path.read_text() for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]}
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        found[path] = "\n\n".join(cell.source for cell in nbformat.read(path, 4).cells)
    for path in (ROOT / "papermill_runs").glob("*/*.yaml"):
        found[path] = path.read_text()
    names = {path: "\n".join(public_names(path)) for path in MODULES.values()}
    return {path.relative_to(ROOT).as_posix(): text for path, text in (found | names).items()}


def test_words_are_found_in_texts_and_names():
    assert words_in("A pull request: make_pictures(upto=3) stands still, told.") == {
        "pictures", "upto", "stands still", "told"
    }  # fmt: skip
    assert words_in("GoldTwin, walking, standalone, drill-down") == {"twin"}


def test_readers_meet_standard_words():
    assert not {path: sorted(words) for path, text in texts().items() if (words := words_in(text))}
