"""Prompts and their files, in the formats of Flow-GRPO's `dataset/` folder, so that its own files load
unchanged.

    geneval/{split}_metadata.jsonl   one GenEval record a line: tag, include, exclude, prompt
    ocr/{split}.txt                  one prompt a line, the target text in double quotes
    pickscore_sfw/{split}.txt        one prompt a line

A benchmark's file says where its tasks' files lie and of which kind they are.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from .files import write_whole
from .records import read_record

KINDS = ("geneval", "quoted", "plain")  # of prompt files


@dataclass(frozen=True)
class Prompt:
    """A prompt, the task it is routed by, and (for GenEval) the record that says what a right picture
    shows."""

    text: str
    task: str
    metadata: dict = field(default_factory=dict, compare=False)

    @property
    def tag(self) -> str:
        return self.metadata.get("tag", self.task)


def read_prompts(path: str | Path, task: str, kind: str) -> list[Prompt]:
    """Read a file of prompts for a task. `kind`: geneval, GenEval's records; quoted, texts of which each has
    the words to be read in double quotes; plain, texts.

    Raises ValueError, with file and line, for what is not in the format, and FileNotFoundError with the
    files there are.
    """
    path = Path(path)
    if not path.is_file():
        there = sorted(p.name for p in path.parent.glob("*")) if path.parent.is_dir() else []
        raise FileNotFoundError(
            f"no prompts at {path}; {path.parent} holds {', '.join(there) or 'nothing'}"
        )
    prompts = []
    # not splitlines(), which would also split inside a prompt, at U+2028
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from error
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        if kind == "geneval":
            record = read_record(line, where)
            prompts.append(Prompt(record["prompt"], task, record))
            continue
        if kind == "quoted":
            target_text(line, where)
        prompts.append(Prompt(line.strip(), task))
    if not prompts:
        raise ValueError(f"{path} holds no prompt")
    return prompts


def write_prompts(path: str | Path, prompts: list[Prompt]) -> None:
    """Write what `read_prompts` and Flow-GRPO read: GenEval's records where prompts have them, else texts."""
    records = [json.dumps(p.metadata) if p.metadata else p.text for p in prompts]
    write_whole(Path(path), "\n".join(records) + "\n")


def target_text(prompt: str, where: str = "") -> str:
    """What a sign has to say: the text between the first two double quotes (METHOD.md, OCR reward)."""
    parts = prompt.split('"')
    if len(parts) < 3 or not parts[1].strip():
        raise ValueError(
            f"{where or repr(prompt)} has no text in double quotes for the OCR reward to look for"
        )
    return parts[1]
