# ruff: noqa: F401 (some types are only passed on to notebooks)
"""A notebook's parameters, once: as annotations in its cell tagged `parameters`.

    from flowopd_lib.lab.notebook import Folder, Int, Rate, String, open_lab

    benchmark: String = "tiny"
    iterations: Int[1, 5000] = 200  # OPD updates
    lr: Rate = 3e-4
    out_dir: Folder = ""

The next cell calls `lab = open_lab(globals())`, which checks the values. The runner reads the same
annotations from the notebook's file, so that all notebooks of a profile are checked before the
first one starts. papermill shows an annotation that is a name with numbers or names in brackets:
everything else has a name here.
"""

from __future__ import annotations

import ast
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, create_model

from ..benchmarks import DEFAULT
from ..benchmarks.benchmark import Split
from ..config import Count, Fraction, Index, NonNegative, Positive, Seed, choose, validate
from ..losses.base import find_loss
from ..losses.opd import LOSSES
from ..merge import Method as MergeMethod
from ..sde import WEIGHTINGS
from .lab import Lab

INJECTED = "# Parameters\n"  # how the cell begins that papermill puts behind the tagged one
STRICT = ConfigDict(extra="forbid", strict=True, validate_default=True, protected_namespaces=())


class Int:
    """`Int[1, 100]`: an integer from 1 to 100."""

    def __class_getitem__(cls, limits: tuple[int, int]) -> Any:
        return Annotated[int, Field(ge=limits[0], le=limits[1])]


class Float:
    """`Float[0, 1]`: a number from 0 to 1."""

    def __class_getitem__(cls, limits: tuple[float, float]) -> Any:
        return Annotated[float, Field(ge=limits[0], le=limits[1])]


class List:
    """`List[Rate]`: a list of at least one."""

    def __class_getitem__(cls, kind: Any) -> Any:
        return Annotated[list[kind], Field(min_length=1)]


def _check_loss(name: str) -> str:
    if ":" not in name:  # a user's own: file.py:name
        find_loss(LOSSES, name)
    return name


def _check_weighting(name: str) -> str:
    return name if ":" in name else choose("weighting", name, WEIGHTINGS)


Flag, Folder, Number, String = bool, str, float, str
Rate = Annotated[float, Field(gt=0, le=1)]  # a learning rate
Steps = Int[1, 1000]  # denoising steps
Loss = Annotated[str, AfterValidator(_check_loss)]  # of OPD, as in a recipe
Weighting = Annotated[str, AfterValidator(_check_weighting)]
Names = list[str]
Counts = TaskCounts = dict[str, Count]  # positive integers by name, by task

# What an annotation may name, besides list[...] and dict[..., ...] of these.
NAMES = """Count Counts Flag Float Folder Fraction Index Int List Loss MergeMethod Names NonNegative
Number Positive Rate Seed Split Steps String TaskCounts Weighting""".split()
TYPES = {name: globals()[name] for name in NAMES} | {"list": list, "dict": dict}


def open_lab(names: Mapping[str, Any]) -> Lab:
    """For a notebook: `lab = open_lab(globals())`. The lab of the parameters `benchmark` and
    `launcher`, whose results go to `out_dir`, or to a temporary folder where that is empty. Sets
    the style of figures.

    Raises ValueError for a value that its annotation does not allow, and for a name that papermill
    was given and the notebook does not have.
    """
    kinds = {n: kind for n, kind in names.get("__annotations__", {}).items() if n in names}
    cells = [cell for cell in names.get("In", ()) if str(cell).startswith(INJECTED)]
    injected = [name for cell in cells for name in _assigned(cell)]
    values = {name: names[name] for name in (*kinds, *injected) if name in names}
    validate(_model({n: (kind, ...) for n, kind in kinds.items()}), values, "this notebook")
    out = Path(values.get("out_dir") or tempfile.mkdtemp(prefix="flowopd_"))
    out.mkdir(parents=True, exist_ok=True)

    from ..plots.style import use_style  # seaborn, which nothing before needs

    use_style()
    return Lab(values.get("benchmark", DEFAULT), values.get("launcher", ""), out)


def read_parameters(notebook: str | Path) -> type[BaseModel]:
    """The parameters of a notebook's file, with their defaults, as a pydantic model. Nothing of the
    notebook is executed.

    Raises ValueError for an annotation that `TYPES` does not have.
    """
    cells = json.loads(Path(notebook).read_text(encoding="utf-8"))["cells"]
    tagged = (c["source"] for c in cells if "parameters" in c["metadata"].get("tags", ()))
    nodes = ast.parse("".join(next(tagged, ""))).body
    return _model(
        {
            node.target.id: (read_type(node.annotation), ast.literal_eval(node.value))
            for node in nodes
            if isinstance(node, ast.AnnAssign)
        }
    )


def read_type(annotation: ast.expr) -> Any:
    """The type that an annotation names. Raises ValueError for one that is none of `TYPES`."""
    if isinstance(annotation, ast.Subscript):
        inside = annotation.slice
        inside = inside.elts if isinstance(inside, ast.Tuple) else [inside]
        arguments = tuple(
            ast.literal_eval(i) if isinstance(i, (ast.Constant, ast.UnaryOp)) else read_type(i)
            for i in inside
        )
        kind = read_type(annotation.value)
        return kind[arguments if len(arguments) > 1 else arguments[0]]
    return TYPES[choose("type of a parameter", ast.unparse(annotation), TYPES)]


def _model(fields: Mapping[str, tuple[Any, Any]]) -> type[BaseModel]:
    return create_model("Parameters", __config__=STRICT, **fields)


def _assigned(source: str) -> list[str]:
    nodes = [node for node in ast.parse(source).body if isinstance(node, ast.Assign)]
    return [target.id for node in nodes for target in node.targets if isinstance(target, ast.Name)]
