"""Prompts as the model sees them: their embeddings, and what of them its tokenizers cannot read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TextEmbedding:
    """`tokens` (B, S, D) for the joint attention and `pooled` (B, P) for the modulation."""

    tokens: torch.Tensor
    pooled: torch.Tensor

    def __getitem__(self, rows) -> TextEmbedding:
        return TextEmbedding(self.tokens[rows], self.pooled[rows])


def unread(pipeline, limit_t5: int, texts: Sequence[str], whose: str) -> Iterator[tuple[bool, str, str, str]]:
    """What the pipeline's tokenizers lose of `texts`: whether a model with a closed vocabulary must refuse
    it, what is wrong, what comes of it where it is not refused, and how to mend it."""
    for name, limit in (("tokenizer", pipeline.tokenizer_max_length), ("tokenizer_3", limit_t5)):
        tokenizer = getattr(pipeline, name)
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
