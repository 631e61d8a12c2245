"""GenEval's records, which say what a right picture shows: read, and checked so that its rule can reward by
them."""

from __future__ import annotations

import json


def read_record(line: str, where: str) -> dict:
    """A line of a GenEval file. Raises ValueError, naming `where`, for what is not a record."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(
            f"{where} is not a record but {_short(record)}; a GenEval record has tag, include and prompt"
        )
    missing = {"tag", "include", "prompt"} - set(record)
    if missing:
        raise ValueError(
            f"{where} lacks {', '.join(sorted(missing))}; a GenEval record has tag, include and prompt"
        )
    _check_record(record, where)
    return record


def _short(value) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _check_record(record: dict, where: str) -> None:
    """Raises ValueError for a GenEval record that its rule could not reward."""
    for key in ("tag", "prompt"):
        if not isinstance(record[key], str) or not record[key].strip():
            raise ValueError(f"{where}: {key} must be a text, not {_short(record[key])}")
    for key in ("include", "exclude"):
        if not isinstance(record.get(key, []), list):
            raise ValueError(f"{where}: {key} must be a list of objects, not {_short(record[key])}")
        for number, wanted in enumerate(record.get(key, [])):
            if (
                not isinstance(wanted, dict)
                or not isinstance(wanted.get("class"), str)
                or type(wanted.get("count")) is not int
                or wanted["count"] < 1
            ):
                raise ValueError(
                    f"{where}: {key}[{number}] must have a class and a count of at least 1, not be "
                    f"{_short(wanted)}"
                )
            relation = wanted.get("position")
            if relation is not None and not (
                isinstance(relation, list)
                and len(relation) == 2
                and type(relation[1]) is int
                and 0 <= relation[1] < number
            ):
                raise ValueError(
                    f"{where}: {key}[{number}] lies where {_short(relation)} says; that must be a relation "
                    "and the number of an object before it"
                )
    if not record["include"]:
        raise ValueError(f"{where}: include names no object")
