r"""BLIP-VQA of T2I-CompBench (Huang et al. 2023): whether the right objects have the attributes, by
a question to BLIP about each object.

The objects are the noun chunks of a prompt. Most prompts of T2I-CompBench (colour, shape, texture)
are lists like "a green bench and a blue bowl", whose chunks `chunks_of` finds. For whole sentences,
write the chunks to a file once, wherever spaCy is installed:

    python -c "import json, spacy, sys; nlp = spacy.load('en_core_web_sm')
    prompts = [line.strip() for line in sys.stdin]
    json.dump({p: [c.text for c in nlp(p).noun_chunks] for p in prompts}, sys.stdout)" \
        < color_val.txt > chunks.json
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ..config import read_yaml, validate
from ..data import Prompt
from .base import as_uint8, batches, load_frozen, loading

MAX_CHUNKS = 8  # T2I-CompBench's np_num: questions about an image, at most
NO_OBJECTS = {"top", "the side", "the left", "the right"}  # chunks that it asks nothing about
# Words that no name of an object has after its first word: a prompt with one is a sentence
SENTENCE_WORDS = set(
    "a an the and or in on at by with for from to near next beside under above behind between "
    "while which that one other is are was were has have sit sits".split()
)


def chunks_of(prompt: str) -> list[str]:
    """The noun chunks of a list of objects ("a slice of pie and a dish": a slice, pie, a dish), as
    spaCy finds them; none for any other prompt."""
    chunks = re.split(r",\s*(?:and\s+)?|\s+(?:and|of)\s+", prompt.strip().rstrip("."))
    words = [chunk.lower().split() for chunk in chunks]
    is_list = all(1 <= len(some) <= 5 and not SENTENCE_WORDS & set(some[1:]) for some in words)
    return chunks if is_list else []


class BLIPVQA:
    """The product, over the noun chunks of a prompt, of BLIP's probability that the image shows
    them: asked "{chunk}?", p(yes) / (p(yes) + p(no)) of the first word of its answer. Held out.

    `model_id`: a folder or hub id of a transformers `BlipForQuestionAnswering`; T2I-CompBench's
    weights are `Salesforce/blip-vqa-capfilt-large`. It shows BLIP images of 480 pixels;
    transformers' copy, whose position embeddings are resampled, takes 384: compare scores of this
    reward with one another. `chunks`: a JSON file with the noun chunks of prompts (see above), for
    those that are no lists of objects.
    """

    name, range, held_out = "BLIPVQA", (0.0, 1.0), True

    def __init__(
        self, model_id: str | Path, chunks: str | Path = "", device: str = "cpu", batch: int = 16
    ):
        from transformers import AutoTokenizer, BlipForQuestionAnswering, BlipImageProcessorPil

        self.batch = batch
        self.chunks = (
            validate(dict[str, list[str]], read_yaml(chunks), str(chunks)) if chunks else {}
        )
        self.model = load_frozen(BlipForQuestionAnswering, model_id, self.name, device)
        with loading(f"processor of {self.name}", model_id):
            self.processor = BlipImageProcessorPil.from_pretrained(model_id)
            self.tokenizer = AutoTokenizer.from_pretrained(model_id)
        self.yes_no = self.tokenizer.convert_tokens_to_ids(["yes", "no"])

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, prompts: Sequence[Prompt]) -> np.ndarray:
        pixels, scores = as_uint8(images, prompts, self.name), []
        for some, chunks in batches(self.batch, pixels, [self._chunks(p.text) for p in prompts]):
            inputs = self.processor(list(some), return_tensors="pt").to(self.model.device)
            states = self.model.vision_model(**inputs).last_hidden_state
            counts = [len(one) for one in chunks]
            rows = states.repeat_interleave(torch.tensor(counts, device=states.device), dim=0)
            yes = self._probability_of_yes(rows, [chunk for one in chunks for chunk in one])
            scores += [one.prod().item() for one in yes.split(counts)]
        return np.array(scores, np.float32)

    def _chunks(self, prompt: str) -> list[str]:
        chunks = self.chunks.get(prompt) or chunks_of(prompt)
        if chunks := [chunk for chunk in chunks if chunk not in NO_OBJECTS][:MAX_CHUNKS]:
            return chunks
        raise ValueError(
            f"{self.name} knows no objects of {prompt!r}, which is not a list like 'a green bench "
            "and a blue bowl'; give its noun chunks in a file, as rewards/compbench.py says"
        )

    def _probability_of_yes(self, states: torch.Tensor, chunks: Sequence[str]) -> torch.Tensor:
        """(N,): p(yes) against no, from N images' embeddings (N, tokens, D) and as many chunks."""
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
