r"""T2I-CompBench (Huang et al. 2023): attributes bound to the right objects, asked of BLIP object by object.

Its prompt files (`color_val.txt`, `shape_val.txt`, `texture_val.txt`) hold one prompt a line. The benchmark
asks about the noun chunks spaCy finds in a prompt. Four fifths of these prompts (720 of the 900) are lists
like "a green bench and a blue bowl", whose chunks `chunks_of` finds without spaCy. For whole sentences it
finds none and says so: write the chunks beside the prompts once, wherever spaCy is installed, and load that:

    python -c "import json, spacy, sys; nlp = spacy.load('en_core_web_sm')
    for p in filter(None, map(str.strip, sys.stdin)):
        print(json.dumps({'prompt': p, 'chunks': [c.text for c in nlp(p).noun_chunks]}))" \
        < color_val.txt > color_val.jsonl
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ..prompts import Prompt
from ..quiet import quiet
from .base import as_uint8, finite, load_frozen

TASK = "compbench"
MAX_CHUNKS = 8  # T2I-CompBench's np_num: what it asks about a picture at most
NO_THINGS = {"top", "the side", "the left", "the right"}  # chunks T2I-CompBench does not ask about
# Words that no name of a thing holds after its first word: where one stands, the prompt is a sentence.
SENTENCE = set(
    "a an the and or in on at by with for from to near next beside under above behind between while which "
    "that one other is are was were has have sit sits".split()
)


def chunks_of(prompt: str) -> list[str] | None:
    """The noun chunks of a list of things ("a slice of pie and a dish": a slice, pie, a dish), as spaCy finds
    them; None for any other prompt."""
    chunks = re.split(r",\s*(?:and\s+)?|\s+(?:and|of)\s+", prompt.strip().rstrip("."))
    for chunk in chunks:
        words = chunk.lower().split()
        if not 1 <= len(words) <= 5 or SENTENCE & set(words[1:]):
            return None
    return chunks


def load_compbench(path: str | Path) -> list[Prompt]:
    """Prompts, tagged by the first word of the file's name, with their noun chunks as metadata: from a .txt
    of lists of things, or a .jsonl of records with prompt and chunks (see above).

    Raises FileNotFoundError, and ValueError, with file and line, for a prompt without chunks.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no T2I-CompBench prompts at {path}; give a .txt or .jsonl file")
    prompts, tag = [], path.stem.split("_")[0]
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        where, record = f"{path}, line {number}", {"prompt": line.strip()}
        if path.suffix == ".jsonl":
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where} is not JSON: {error}") from error
            if not isinstance(record, dict) or not {"prompt", "chunks"} <= set(record):
                raise ValueError(f"{where} is no record with prompt and chunks")
        text = record["prompt"]
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{where}: prompt must be a text, not {text!r}")
        prompts.append(Prompt(text, TASK, {"tag": tag, "chunks": _chunks(text, record, where)}))
    if not prompts:
        raise ValueError(f"{path} holds no prompt")
    return prompts


def _chunks(text: str, metadata: dict, where: str) -> list[str]:
    """What to ask about a prompt; ValueError if that cannot be told."""
    chunks = metadata["chunks"] if "chunks" in metadata else chunks_of(text)
    if chunks is None:
        raise ValueError(
            f"{where}: {text!r} is no list of things like 'a green bench and a blue bowl'; give its noun "
            "chunks in a .jsonl of prompt and chunks (flowopd_lib/rewards/compbench.py says how to make it)"
        )
    if not isinstance(chunks, list) or not all(isinstance(c, str) and c.strip() for c in chunks):
        raise ValueError(f"{where}: chunks must be a list of texts, not {chunks!r}")
    asked = [chunk for chunk in chunks if chunk not in NO_THINGS][:MAX_CHUNKS]
    if not asked:
        raise ValueError(f"{where}: {text!r} has no noun chunk to ask about; leave the prompt out")
    return asked


class BLIPVQA:
    """The product, over the noun chunks of a prompt, of how sure BLIP is that the picture shows them. Never
    trained on.

    For each chunk the question is "{chunk}?", and the answer p(yes) / (p(yes) + p(no)), of the first word the
    decoder would say. Chunks come from the prompt's metadata (`load_compbench`), else from `chunks_of`.

    `model_id`: a folder or hub id of a transformers `BlipForQuestionAnswering`; T2I-CompBench's weights are
    `Salesforce/blip-vqa-capfilt-large`. It shows BLIP pictures of 480 pixels; transformers' copy, whose
    position embeddings are resampled, takes 384: compare scores of this reward with one another.
    """

    name, range, held_out = "BLIPVQA", (0.0, 1.0), True

    def __init__(self, model_id: str | Path, device: str = "cpu", batch: int = 16):
        from transformers import AutoTokenizer, BlipForQuestionAnswering, BlipImageProcessorPil

        self.device, self.batch = device, batch
        self.model = load_frozen(BlipForQuestionAnswering, model_id, self.name, device)
        with quiet():
            self.processor = BlipImageProcessorPil.from_pretrained(model_id)
            self.tokenizer = AutoTokenizer.from_pretrained(model_id)
        self.yes_no = self.tokenizer.convert_tokens_to_ids(["yes", "no"])
        if None in self.yes_no or self.tokenizer.unk_token_id in self.yes_no:
            raise ValueError(
                f"the tokenizer at {model_id} has no tokens for yes and no; give BLIP's own"
            )

    @torch.no_grad()
    def yes(self, images: torch.Tensor, prompts: Sequence[Prompt]) -> list[list[float]]:
        """The sureness of each chunk of each picture's prompt."""
        pixels = as_uint8(images, prompts, self.name)
        chunks = [
            _chunks(p.text, p.metadata, f"{self.name} cannot reward a prompt") for p in prompts
        ]
        found: list[list[float]] = []
        for i in range(0, len(pixels), self.batch):
            some = chunks[i : i + self.batch]
            owners = torch.tensor(
                [k for k, one in enumerate(some) for _ in one], device=self.device
            )
            inputs = self.processor(list(pixels[i : i + self.batch]), return_tensors="pt").to(
                self.device
            )
            seen = self.model.vision_model(**inputs).last_hidden_state
            sure = iter(
                finite(self._sure(seen[owners], [c for one in some for c in one]), self.name)
            )
            found += [[float(next(sure)) for _ in one] for one in some]
        return found

    def _sure(self, seen: torch.Tensor, chunks: Sequence[str]) -> torch.Tensor:
        """(N,) p(yes) against no, from N pictures' embeddings (N, tokens, D) and as many chunks."""
        questions = [re.sub(r'[.!"()*#:;~]', "", f"{chunk}?".lower()) for chunk in chunks]
        asked = self.tokenizer(questions, truncation=True, max_length=35).input_ids
        # BLIP's decoder starts with [DEC] and its questions with [ENC], the token after it, which
        # transformers' own processor forgets (it leaves [CLS])
        start, sure = self.model.config.text_config.bos_token_id, seen.new_zeros(len(asked))
        # Questions of one length at a time, without padding: the cross-attention of transformers' BLIP
        # ignores its mask (seen in 5.24), and padding would change the answers.
        for length in {len(ids) for ids in asked}:
            rows = [i for i, ids in enumerate(asked) if len(ids) == length]
            ids = torch.tensor([[start + 1, *asked[i][1:]] for i in rows], device=seen.device)
            states = self.model.text_encoder(
                input_ids=ids, encoder_hidden_states=seen[rows]
            ).last_hidden_state
            logits = self.model.text_decoder(
                input_ids=torch.full((len(rows), 1), start, device=seen.device),
                encoder_hidden_states=states,
            ).logits[:, 0]
            sure[rows] = logits[:, self.yes_no].softmax(-1)[:, 0]
        return sure

    def __call__(self, images: torch.Tensor, prompts: Sequence[Prompt]) -> np.ndarray:
        return np.array([np.prod(one) for one in self.yes(images, prompts)], np.float32)
