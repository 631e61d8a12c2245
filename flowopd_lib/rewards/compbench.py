r"""T2I-CompBench (Huang et al. 2023): attributes bound to the right objects, by questions to BLIP
about each object.

Its prompt files (`color_val.txt`, `shape_val.txt`, `texture_val.txt`) hold one prompt a line. The
benchmark asks about the noun chunks that spaCy finds in a prompt. Four fifths of these prompts (720
of the 900) are lists like "a green bench and a blue bowl", whose chunks `chunks_of` finds without
spaCy. For whole sentences, write the chunks to a file once, wherever spaCy is installed, and load
that:

    python -c "import json, spacy, sys; nlp = spacy.load('en_core_web_sm')
    for p in filter(None, map(str.strip, sys.stdin)):
        print(json.dumps({'prompt': p, 'chunks': [c.text for c in nlp(p).noun_chunks]}))" \
        < color_val.txt > color_val.jsonl
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from pydantic import BaseModel, Field, ValidationError

from ..config import sentence
from ..data import Prompt
from .base import as_uint8, batches, load_frozen, loading

TASK = "compbench"
MAX_CHUNKS = 8  # T2I-CompBench's np_num: questions about an image, at most
NO_OBJECTS = {"top", "the side", "the left", "the right"}  # chunks that it asks nothing about
# Words that no name of an object has after its first word: a prompt with one is a sentence
SENTENCE_WORDS = set(
    "a an the and or in on at by with for from to near next beside under above behind between "
    "while which that one other is are was were has have sit sits".split()
)
Phrase = Annotated[str, Field(pattern=r"\S")]


class Record(BaseModel):
    """A line of a .jsonl file of prompts."""

    prompt: Phrase
    chunks: list[Phrase]


def chunks_of(prompt: str) -> list[str] | None:
    """The noun chunks of a list of objects ("a slice of pie and a dish": a slice, pie, a dish), as
    spaCy finds them; None for any other prompt."""
    chunks = re.split(r",\s*(?:and\s+)?|\s+(?:and|of)\s+", prompt.strip().rstrip("."))
    for chunk in chunks:
        words = chunk.lower().split()
        if not 1 <= len(words) <= 5 or SENTENCE_WORDS & set(words[1:]):
            return None
    return chunks


def load_compbench(path: str | Path) -> list[Prompt]:
    """Prompts, tagged by the first word of the file's name, with their noun chunks as metadata:
    from a .txt of lists of objects, or a .jsonl of records with prompt and chunks (see above).

    Raises FileNotFoundError, and ValueError, with file and line, for a prompt without chunks.
    """
    path, prompts = Path(path), []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        where, text, chunks = f"{path}, line {number}", line.strip(), None
        if not text:
            continue
        if path.suffix == ".jsonl":
            try:
                record = Record.model_validate_json(line)
            except ValidationError as error:
                raise ValueError(sentence(error, where)) from None
            text, chunks = record.prompt, record.chunks
        metadata = {"tag": path.stem.split("_")[0], "chunks": _questions(text, chunks, where)}
        prompts.append(Prompt(text, TASK, metadata))
    if not prompts:
        raise ValueError(f"{path} holds no prompt")
    return prompts


def _questions(prompt: str, chunks: list[str] | None, where: str) -> list[str]:
    """The chunks that BLIP is asked about: those given, or else those of the prompt."""
    chunks = chunks_of(prompt) if chunks is None else chunks
    if chunks is None:
        raise ValueError(
            f"{where}: {prompt!r} is not a list of objects like 'a green bench and a blue bowl'; "
            "give its noun chunks in a .jsonl file, as flowopd_lib/rewards/compbench.py says"
        )
    chunks = [chunk for chunk in chunks if chunk not in NO_OBJECTS][:MAX_CHUNKS]
    if not chunks:
        raise ValueError(f"{where}: {prompt!r} has no noun chunk to ask about; leave it out")
    return chunks


class BLIPVQA:
    """The product, over the noun chunks of a prompt, of BLIP's probability that the image shows
    them. Held out.

    For each chunk the question is "{chunk}?", and the answer p(yes) / (p(yes) + p(no)) of the
    decoder's first word. Chunks come from the prompt's metadata (`load_compbench`), else from
    `chunks_of`.

    `model_id`: a folder or hub id of a transformers `BlipForQuestionAnswering`; T2I-CompBench's
    weights are `Salesforce/blip-vqa-capfilt-large`. It shows BLIP images of 480 pixels;
    transformers' copy, whose position embeddings are resampled, takes 384: compare scores of this
    reward with one another.
    """

    name, range, held_out = "BLIPVQA", (0.0, 1.0), True

    def __init__(self, model_id: str | Path, device: str = "cpu", batch: int = 16):
        from transformers import AutoTokenizer, BlipForQuestionAnswering, BlipImageProcessorPil

        self.batch = batch
        self.model = load_frozen(BlipForQuestionAnswering, model_id, self.name, device)
        with loading(f"processor of {self.name}", model_id):
            self.processor = BlipImageProcessorPil.from_pretrained(model_id)
            self.tokenizer = AutoTokenizer.from_pretrained(model_id)
        self.yes_no = self.tokenizer.convert_tokens_to_ids(["yes", "no"])
        if {None, self.tokenizer.unk_token_id} & set(self.yes_no):
            raise ValueError(f"the tokenizer at {model_id} lacks yes and no; give BLIP's own")

    @torch.no_grad()
    def probabilities(self, images: torch.Tensor, prompts: Sequence[Prompt]) -> list[list[float]]:
        """For each image, the probability of yes for each chunk of its prompt."""
        pixels = as_uint8(images, prompts, self.name)
        chunks = [
            _questions(p.text, p.metadata.get("chunks"), f"{self.name} cannot score a prompt")
            for p in prompts
        ]
        probabilities = []
        for some, questions in batches(self.batch, pixels, chunks):
            inputs = self.processor(list(some), return_tensors="pt").to(self.model.device)
            states = self.model.vision_model(**inputs).last_hidden_state
            counts = [len(one) for one in questions]
            rows = torch.repeat_interleave(torch.tensor(counts, device=states.device))
            yes = self._answer(states[rows], [chunk for one in questions for chunk in one])
            probabilities += [one.tolist() for one in yes.split(counts)]
        return probabilities

    def _answer(self, states: torch.Tensor, chunks: Sequence[str]) -> torch.Tensor:
        """(N,) p(yes) against no, from N images' embeddings (N, tokens, D) and as many chunks."""
        questions = [re.sub(r'[.!"()*#:;~]', "", f"{chunk}?".lower()) for chunk in chunks]
        ids = self.tokenizer(questions, truncation=True, max_length=35).input_ids
        # BLIP's decoder starts with [DEC] and its questions with [ENC], the token after it, where
        # transformers' own processor leaves [CLS].
        start, yes = self.model.config.text_config.bos_token_id, states.new_zeros(len(ids))
        # Questions of one length at a time, without padding: the cross-attention of transformers'
        # BLIP ignores its mask (seen in 5.24), and padding would change the answers.
        for length in {len(one) for one in ids}:
            rows = [i for i, one in enumerate(ids) if len(one) == length]
            question = torch.tensor([[start + 1, *ids[i][1:]] for i in rows], device=yes.device)
            encoded = self.model.text_encoder(question, encoder_hidden_states=states[rows])
            logits = self.model.text_decoder(
                torch.full((len(rows), 1), start, device=yes.device),
                encoder_hidden_states=encoded.last_hidden_state,
            ).logits[:, 0]
            yes[rows] = logits[:, self.yes_no].softmax(-1)[:, 0]
        return yes

    def __call__(self, images: torch.Tensor, prompts: Sequence[Prompt]) -> np.ndarray:
        return np.array([np.prod(p) for p in self.probabilities(images, prompts)], np.float32)
