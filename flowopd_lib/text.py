"""Prompts as the model sees them: their embeddings, and what its tokenizers cannot read of them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from .data import Prompt


@dataclass(frozen=True)
class TextEmbedding:
    """`tokens` (B, S, D) for the joint attention and `pooled` (B, P) for the modulation."""

    tokens: torch.Tensor
    pooled: torch.Tensor

    def __getitem__(self, rows) -> TextEmbedding:
        return TextEmbedding(self.tokens[rows], self.pooled[rows])


class TokenizerCheck:
    """Warns, once a prompt, of what the pipeline's tokenizers cannot read whole: a character that
    they do not know is lost, and so is what comes after their last token (`t5_length`: T5's). With
    `strict`, for a model with a closed vocabulary, it raises ValueError instead."""

    def __init__(self, pipeline, t5_length: int, strict: bool):
        self.pipeline, self.t5_length, self.strict = pipeline, t5_length, strict
        self._checked: set[str] = set()

    def check(self, texts: Sequence[str], what: str = "the prompts") -> None:
        texts = [t for t in dict.fromkeys(texts) if t not in self._checked]
        for must_refuse, fault, consequence, remedy in self._faults(texts, what) if texts else ():
            if self.strict and must_refuse:
                raise ValueError(f"{fault}; {remedy}")
            warnings.warn(f"{fault}: {consequence}", stacklevel=3)
        self._checked.update(texts)

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        for task in dict.fromkeys(p.task for p in prompts):
            self.check([p.text for p in prompts if p.task == task], f"the {task} prompts")

    def _faults(self, texts: Sequence[str], what: str) -> Iterator[tuple[bool, str, str, str]]:
        limits = {"tokenizer": self.pipeline.tokenizer_max_length, "tokenizer_3": self.t5_length}
        for name, limit in limits.items():
            tokenizer = getattr(self.pipeline, name)
            if tokenizer is None:
                continue
            ids = tokenizer(list(texts), add_special_tokens=False, verbose=False).input_ids
            special = len(tokenizer("").input_ids)
            for faulty, fault, consequence, remedy, refuse in (
                (
                    [t for t, row in zip(texts, ids) if tokenizer.unk_token_id in row],
                    f"have characters that the model's {name} does not know",
                    "they are left out",
                    "leave such characters out",
                    True,
                ),
                (
                    [t for t, row in zip(texts, ids) if len(row) + special > limit],
                    f"are longer than the {limit} tokens of the model's {name}",
                    "it will not see the end",
                    "shorten them",
                    name == "tokenizer_3",
                ),
            ):
                if faulty:
                    about = f"{len(faulty)} of {what} {fault}, such as {faulty[0]!r}"
                    yield refuse, about, consequence, remedy
