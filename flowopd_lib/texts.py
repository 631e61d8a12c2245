"""Prompts as the model sees them: their embeddings, and what of them its tokenizers cannot read."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from .prompts import Prompt


@dataclass(frozen=True)
class TextEmbedding:
    """`tokens` (B, S, D) for the joint attention and `pooled` (B, P) for the modulation."""

    tokens: torch.Tensor
    pooled: torch.Tensor

    def __getitem__(self, rows) -> TextEmbedding:
        return TextEmbedding(self.tokens[rows], self.pooled[rows])


class Reading:
    """Tells of texts that the pipeline's tokenizers cannot read whole, each text once: a character that they
    do not know is lost, and so is what comes after their last token (`limit_t5`: T5's)."""

    def __init__(self, pipeline, limit_t5: int):
        self.pipeline, self.limit_t5 = pipeline, limit_t5
        self.told: set[str] = set()

    def check(self, texts: Sequence[str], whose: str, strict: bool) -> None:
        """Raises ValueError where the model has a closed vocabulary (`strict`); else warns that they are cut
        off."""
        texts = [t for t in texts if t not in self.told]
        if not texts:
            return
        self.told.update(texts)
        for error, message, comes_of_it, mend in self._unread(texts, whose):
            if strict and error:
                self.told.difference_update(texts)
                raise ValueError(message + mend)
            warnings.warn(message + comes_of_it, stacklevel=3)

    def check_prompts(self, prompts: Sequence[Prompt], strict: bool) -> None:
        """The same, once a task."""
        for task in dict.fromkeys(p.task for p in prompts):
            texts = dict.fromkeys(p.text for p in prompts if p.task == task)
            self.check(list(texts), f"the {task} prompts", strict)

    def _unread(self, texts: Sequence[str], whose: str) -> Iterator[tuple[bool, str, str, str]]:
        """What the tokenizers lose of `texts`: whether a model with a closed vocabulary must refuse
        it, what is wrong, what comes of it where it is not refused, and how to mend it."""
        for name, limit in (
            ("tokenizer", self.pipeline.tokenizer_max_length),
            ("tokenizer_3", self.limit_t5),
        ):
            tokenizer = getattr(self.pipeline, name)
            if tokenizer is None:
                continue
            bare = tokenizer(list(texts), add_special_tokens=False, verbose=False).input_ids
            special = len(tokenizer("").input_ids)
            strange = [t for t, ids in zip(texts, bare) if tokenizer.unk_token_id in ids]
            if strange:
                yield (
                    True,
                    f"{len(strange)} of {whose} have characters that the model's {name} does not know, "
                    f"such as {strange[0]!r}",
                    ": they are left out",
                    "; leave such characters out",
                )
            long = [t for t, ids in zip(texts, bare) if len(ids) + special > limit]
            if long:
                yield (
                    name == "tokenizer_3",
                    f"{len(long)} of {whose} are longer than the {limit} tokens of the model's {name}, "
                    f"such as {long[0]!r}",
                    ": it will not see the end",
                    "; shorten them",
                )
