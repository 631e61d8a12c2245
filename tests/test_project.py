"""The project's own promises: one list of dependencies, assets that are what their manifest says."""

import hashlib
import json
import tomllib

import pytest
import yaml

from flowopd_lib.benchmarks.tiny import ASSETS, BASE
from flowopd_lib.benchmarks.tiny import EXPERTS as EXPERT_FOLDERS
from flowopd_lib.benchmarks.tiny.train_experts import EXPERTS, recipes_of
from flowopd_lib.files import ROOT


def test_environment_and_pyproject_say_the_same():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    pip = next(d for d in conda if isinstance(d, dict))["pip"]
    assert sorted(d for d in pip if d != "-e .") == sorted(project["dependencies"])
    assert f"python{project['requires-python']}" in conda


def test_every_import_is_a_declared_dependency():
    names = {
        "cv2": "opencv-python-headless",
        "PIL": "pillow",
        "yaml": "pyyaml",
        "IPython": "ipykernel",
        "huggingface_hub": "huggingface-hub",
        "jupyter_client": "jupyter-client",
    }
    declared = {
        d.split(">")[0]
        for d in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    }
    import ast
    import sys

    for path in (ROOT / "flowopd_lib").rglob("*.py"):
        if path.name == "reward_server.py" and path.parent.name == "rewards":
            continue  # what its rewards import is in the files of their environments, see test_reward_server
        for node in ast.walk(ast.parse(path.read_text())):
            modules = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module]
                if isinstance(node, ast.ImportFrom) and node.level == 0
                else []
            )
            for module in (m.split(".")[0] for m in modules):
                assert module in sys.stdlib_module_names or names.get(module, module) in declared, (
                    f"{path}: {module}"
                )


def test_assets_are_what_the_manifest_says_and_at_most_45_mb():
    manifest = json.loads((ASSETS / "manifest.json").read_text())
    there = {str(p.relative_to(ASSETS)) for p in ASSETS.rglob("*") if p.is_file()}
    assert {p for p in there if not p.startswith("experts/")} == set(manifest["files"]) | {
        "manifest.json"
    }
    for name, record in manifest["files"].items():
        assert hashlib.sha256((ASSETS / name).read_bytes()).hexdigest() == record["sha256"], name
    assert sum((ASSETS / name).stat().st_size for name in there) <= 45e6
    assert {"command", "seed", "date", "versions", "seconds"} <= set(manifest)


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_are_what_their_manifests_say_and_belong_to_the_base(name):
    folder = EXPERT_FOLDERS / name
    manifest = json.loads((folder / "manifest.json").read_text())
    assert {p.name for p in folder.iterdir()} == set(manifest["files"]) | {"manifest.json"}
    for file, record in manifest["files"].items():
        assert hashlib.sha256((folder / file).read_bytes()).hexdigest() == record["sha256"], file
    base = (BASE / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()
    assert hashlib.sha256(base).hexdigest() == manifest["base_transformer_sha256"]
    recipes = manifest["recipes"]  # as they were trained, which the files of today need not be
    assert {recipe["schedule"]["tasks"][0] for recipe in recipes} == {
        "geneval" if name == "deqa" else name
    } and recipes_of(name)
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == sum(
        r["train"]["iterations"] for r in recipes
    )


def test_weights_are_safetensors_only():
    suffixes = {p.suffix for p in ASSETS.rglob("*") if p.is_file()}
    assert suffixes <= {".safetensors", ".json", ".jsonl", ".txt"}


def test_no_config_names_a_folder_of_the_machine_that_built_it():
    for path in ASSETS.rglob("*.json"):
        assert "_name_or_path" not in json.loads(path.read_text()), path


def test_library_files_stay_small():
    for path in (ROOT / "flowopd_lib").rglob("*.py"):
        # the reward server is one file, for it is copied where nothing of ours is
        most = 510 if path.parent.name == "rewards" and path.name == "reward_server.py" else 420
        assert len(path.read_text().splitlines()) <= most, path
