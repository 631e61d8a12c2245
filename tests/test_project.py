"""The project keeps its promises: one list of dependencies, assets that match their manifests."""

import ast
import hashlib
import json
import re
import sys
import tomllib

import pytest
import yaml
from packaging.requirements import Requirement

from flowopd_lib.benchmarks.tiny import ASSETS, BASE, EXPERTS
from flowopd_lib.files import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIREMENTS = {r.name: r for r in map(Requirement, PROJECT["dependencies"])}
IMPORTED_AS = {
    "cv2": "opencv-python-headless",
    "PIL": "pillow",
    "yaml": "pyyaml",
    "IPython": "ipykernel",
    "huggingface_hub": "huggingface-hub",
    "jupyter_client": "jupyter-client",
}


def test_environment_and_pyproject_have_the_same_dependencies():
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    pip = next(d for d in conda if isinstance(d, dict))["pip"]
    assert sorted(d for d in pip if d != "-e .") == sorted(PROJECT["dependencies"])
    assert f"python{PROJECT['requires-python']}" in conda


def test_constraints_have_one_allowed_version_of_every_dependency():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert pinned.keys() == REQUIREMENTS.keys()
    for name, exact in pinned.items():
        assert exact in REQUIREMENTS[name].specifier, name


def test_every_import_is_a_declared_dependency():
    for path in (ROOT / "flowopd_lib").rglob("*.py"):
        if path.name == "server.py" and path.parent.name == "rewards":
            continue  # a reward's own environment has what it imports, see test_reward_server
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            for name in {name.split(".")[0] for name in names} - sys.stdlib_module_names:
                assert IMPORTED_AS.get(name, name) in REQUIREMENTS, f"{path}: {name}"


def hashes(folder, records):
    """Those of files that a manifest lists, which are its hashes or have them."""
    for name, record in records.items():
        digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        assert digest == record["sha256"], f"{folder / name}"


def test_assets_are_what_the_manifest_says_and_at_most_45_mb():
    manifest = json.loads((ASSETS / "manifest.json").read_text())
    files = {p.relative_to(ASSETS).as_posix(): p for p in ASSETS.rglob("*") if p.is_file()}
    own = {name for name in files if not name.startswith("experts/")}
    assert own == {*manifest["files"], "manifest.json"}
    hashes(ASSETS, manifest["files"])
    assert sum(p.stat().st_size for p in files.values()) <= 45e6
    assert {p.suffix for p in files.values()} <= {".safetensors", ".json", ".jsonl", ".txt", ".csv"}
    for path in ASSETS.rglob("*.json"):  # no folder of the machine that built it
        assert "_name_or_path" not in json.loads(path.read_text()), path


@pytest.mark.parametrize("folder", sorted(EXPERTS.iterdir()), ids=lambda path: path.name)
def test_experts_are_what_their_manifests_say_and_belong_to_the_base(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert files == {*manifest["files"], "manifest.json"}
    hashes(folder, manifest["files"])
    base = (BASE / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()
    assert hashlib.sha256(base).hexdigest() == manifest["base_transformer_sha256"]


def test_make_and_the_command_line_agree():
    from flowopd_lib.cli import COMMANDS

    texts = [(ROOT / "Makefile").read_text()]
    for folder in ("profiles", "launchers", "slurm", "recipes"):
        texts += [path.read_text() for path in (ROOT / "papermill_runs" / folder).iterdir()]
    called = {c for text in texts for c in re.findall(r"-m flowopd_lib (\w+)", text)}
    assert {"run", "cache", "publish", "job"} <= called <= {*COMMANDS}
