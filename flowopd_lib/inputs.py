"""What a user may give, checked before anything long begins: types and ranges by pydantic, every
fault one sentence that says how to mend it.

A notebook's first cell calls `begin` with what each of its parameters may be; the runner finds that
call in the notebook and checks a whole profile by it before the first notebook starts, and so does
papermill or nbconvert alone, for the cell comes before any sampling.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import difflib
import inspect
import tempfile
import typing
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

# What settings may be: `check_fields` reads it off the fields of a dataclass, `check_options` off
# arguments.
Count = Annotated[int, Field(ge=1)]
Whole = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
SHARES = dict[str, Count]  # whole numbers above 0 by name
SEED = Annotated[int, Field(ge=0, lt=1 << 31)]
INJECTED = "# Parameters\n"  # how the cell begins that papermill puts behind the parameters


def within(low: float, high: float) -> Any:
    """A number in [low, high]: a whole one, where `low` is."""
    return Annotated[int if isinstance(low, int) else float, Field(ge=low, le=high)]


def one_of(*choices: str) -> Any:
    return Literal[choices]


def some_of(*choices: str) -> Any:
    """A list of some of the choices, or of none."""
    return list[Literal[choices]]


def list_of(kind: Any) -> Any:
    """A list of at least one."""
    return Annotated[list[kind], Field(min_length=1)]


KINDS = {
    "within": within,
    "one_of": one_of,
    "some_of": some_of,
    "list_of": list_of,
    "list": list,
    "SHARES": SHARES,
    "SEED": SEED,
    "str": str,
    "bool": bool,
}


def nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), 1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def check_keys(where: str, given: Any, known: Iterable[str]) -> None:
    """Raises ValueError that names the nearest known key."""
    if not isinstance(given, Mapping):
        raise ValueError(f"{where} must be a mapping of names to values, not {given!r}")
    for key in given:
        if key not in known:
            raise ValueError(
                f"{where} has no {key!r}{nearest(str(key), known)}; it has {', '.join(known)}"
            )


def check_mapping(
    where: str, given: Any, kinds: Mapping[str, Any], prefix: str = "", needed: Iterable[str] = ()
) -> dict[str, Any]:
    """`given`, each of its keys of the kind that `kinds` says and those `needed` there; a fault
    names the key behind `prefix`. Raises ValueError."""
    check_keys(where, given, kinds)
    for key, value in given.items():
        check_value(prefix + key, value, kinds[key])
    for key in needed:
        if key not in given:
            raise ValueError(f"{where} lacks {key}")
    return dict(given)


@cache
def _adapter(kind: Any) -> TypeAdapter:
    return TypeAdapter(kind, config=ConfigDict(strict=True, arbitrary_types_allowed=True))


def check_value(name: str, value: Any, kind: Any) -> Any:
    """`value`, if it is of a kind (a type, with ranges as pydantic's `Field` has them). No text is
    taken for a number, and no 1.5 for a 1.

    Raises ValueError: one sentence with the name, what it must be and what it is.
    """
    try:
        return _adapter(kind).validate_python(value, strict=True)
    except ValidationError as error:
        # of a union, the alternative that came furthest
        faults = sorted(error.errors(include_url=False), key=lambda e: -len(e["loc"]))
        fault = faults[0]
    place = name + "".join(
        f"[{part!r}]"
        for part in fault["loc"]
        if not (isinstance(part, str) and _is_kind(part, fault, value))
    )
    given, wanted = fault["input"], _wanted(fault)
    hint = ""
    if isinstance(given, str) and fault["type"] in ("int_type", "float_type", "int_from_float"):
        with contextlib.suppress(ValueError):
            float(given)
            hint = "; that is a text: write it without quotes"
            if "e" in given.lower():
                hint += ", and with a point, such as 3.0e-4, or YAML takes it for a text"
    if fault["type"] == "literal_error" and isinstance(given, str):
        hint = nearest(
            given,
            [c.strip("' ") for c in fault["ctx"]["expected"].replace(" or ", ", ").split(",")],
        )
    raise ValueError(f"{place} must be {wanted}, not {given!r}{hint}")


def _is_kind(part: str, fault: Mapping, value: Any) -> bool:
    """Whether a part of a fault's place is the name of an alternative rather than a key of the
    value."""
    node = value
    for p in fault["loc"]:
        if p == part:
            return not (isinstance(node, Mapping) and p in node)
        if (
            isinstance(node, Mapping)
            and p in node
            or isinstance(node, (list, tuple))
            and isinstance(p, int)
            and p < len(node)
        ):
            node = node[p]
    return True


def _wanted(fault: Mapping) -> str:
    kind, context = fault["type"], fault.get("ctx", {})
    names = {
        "int_type": "a whole number",
        "int_from_float": "a whole number",
        "float_type": "a number",
        "string_type": "a text",
        "bool_type": "true or false",
        "list_type": "a list",
        "tuple_type": "a list",
        "dict_type": "a mapping of names to values",
        "mapping_type": "a mapping of names to values",
        "none_required": "nothing (null)",
        "too_short": "more than nothing",
        "finite_number": "a finite number",
    }
    if kind == "literal_error":
        return "one of " + context["expected"].replace("'", "").replace(" or ", ", ")
    for limit, words in (
        ("ge", "at least"),
        ("gt", "more than"),
        ("le", "at most"),
        ("lt", "less than"),
    ):
        if limit in context:
            return (
                f"{words} {context[limit]:g}"
                if isinstance(context[limit], float)
                else f"{words} {context[limit]}"
            )
    return names.get(kind) or fault["msg"][0].lower() + fault["msg"][1:]


def check_options(
    where: str, given: Any, kind: Any, left_out: Iterable[str] = ()
) -> dict[str, Any]:
    """`given`, checked against the arguments of `kind` and their types; lists become tuples where
    the argument takes one."""
    hints = typing.get_type_hints(
        kind.__init__ if inspect.isclass(kind) else kind, include_extras=True
    )
    known = [n for n in inspect.signature(kind).parameters if n not in left_out]
    check_keys(where, given, known)
    checked = {}
    for name, value in given.items():
        if isinstance(value, list) and "tuple" in str(hints.get(name, "")):
            value = tuple(value)
        checked[name] = (
            check_value(f"{where}.{name}", value, hints[name]) if name in hints else value
        )
    return checked


@cache
def _limited(kind: type) -> dict[str, Any]:
    """The fields of a dataclass that say a range or choices, and what they say."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return {
        field.name: hint
        for field in dataclasses.fields(kind)
        for hint in [hints[field.name]]
        if any(typing.get_origin(h) in (Annotated, Literal) for h in (hint, *typing.get_args(hint)))
    }


def check_fields(given: Any) -> None:
    """Raises ValueError for a field of a dataclass that is not what its annotation says, where that
    is a range or choices."""
    for name, kind in _limited(type(given)).items():
        value = getattr(given, name)
        if isinstance(value, list) and "tuple" in str(kind):
            value = tuple(value)
        check_value(name, value.item() if hasattr(value, "item") else value, kind)


def check_tracker(name: str | None) -> None:
    """Raises ValueError for one that accelerate does not know or find: it would leave it out, and
    say nothing."""
    if name is None:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    if name not in map(str, LOGGER_TYPE_TO_CLASS):
        raise ValueError(
            f"log_with names no tracker of accelerate's: {name!r}; there are "
            f"{', '.join(map(str, LOGGER_TYPE_TO_CLASS))}"
        )
    if name not in map(str, get_available_trackers()):
        raise ValueError(
            f"the tracker {name} is not installed; pip install {name}, or leave log_with out"
        )


def read_yaml(path: str | Path) -> Any:
    """A YAML file. Raises ValueError with file and line for what is not YAML, FileNotFoundError
    where there is none."""
    path = Path(path)
    if not path.is_file():
        there = sorted(p.stem for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise FileNotFoundError(f"there is no {path}{nearest(path.stem, there)}")
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        said = " ".join(str(getattr(error, "problem", None) or error).split())
        hint = "; indent with spaces, not with a tab" if "\\t" in said else ""
        raise ValueError(f"{path}{where} is not YAML: {said}{hint}") from error


def begin(names: Mapping[str, Any], **kinds: Any) -> Path:
    """For a notebook's first cell, `begin(globals(), n_test=within(12, 300), ...)`: every parameter
    with what it may be; the folder for results, made here: `out_dir`, or a temporary one where that
    is "".

    Raises ValueError for a value of another kind, for a name that papermill was given and the
    notebook does not have, and for an `out_dir` that is no folder.
    """
    cells = [
        cell for cell in names.get("In", []) if isinstance(cell, str) and cell.startswith(INJECTED)
    ]
    check_keys("this notebook", {name: None for cell in cells for name in _assigned(cell)}, kinds)
    check_kinds({name: names[name] for name in kinds}, kinds)
    out = Path(names.get("out_dir") or tempfile.mkdtemp())
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"out_dir {str(out)!r} cannot be a folder for results: {error.strerror}"
        ) from error
    return out


def check_kinds(parameters: Mapping[str, Any], kinds: Mapping[str, Any]) -> None:
    for name, value in parameters.items():
        check_value(name, value, kinds[name])


def _assigned(source: str) -> list[str]:
    return [
        target.id
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    ]


def kinds_of(sources: Iterable[str]) -> dict[str, Any]:
    """What the `begin` in a notebook's cells says of its parameters; nothing where there is
    none."""
    for source in sources:
        if "begin(globals()" not in source:
            continue
        for node in ast.walk(ast.parse(source)):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id == "begin"
            ):
                # our own notebooks
                return {
                    k.arg: eval(
                        compile(ast.Expression(k.value), "begin", "eval"),
                        {"__builtins__": {}},
                        KINDS,
                    )
                    for k in node.keywords
                    if k.arg
                }
    return {}
