"""The text encoders of the small benchmark, pretrained on text alone and then frozen.

Real text-to-image models start from pretrained encoders; trained from nothing with the denoiser,
ours took most of its updates. Linear probes must read off what a caption says: each CLIP's token of
a shape its colour, number, size, finish, place in the sentence and relation so far, its pooled
vector everything; T5's token of a letter which letter it is, at which place, in a word of which
length.
"""

from __future__ import annotations

import random
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from ...checkpoint import load_state, save_state
from . import specs
from .specs import Spec, random_spec, split_of
from .text import WIDTH, encode_clip, new_text_modules, tokenize

CLIPS = ("text_encoder", "text_encoder_2")
STEPS, BATCH, RATE = 600, 128, 1e-3
# the values of each field of an object and of a caption; "" where the caption leaves it open
OBJECT = {
    "shape": specs.SHAPES,
    "color": ("", *specs.COLORS),
    "count": (1, *specs.COUNT_WORDS),
    "size": ("", *specs.SIZES),
    "finish": ("", *specs.FINISHES),
    "relation": ("", *specs.RELATIONS),
    "place": (0, 1),
}
CAPTION = {
    **{name: values for name, values in OBJECT.items() if name != "place"},
    "shape": ("", *specs.SHAPES),
    "second shape": ("", *specs.SHAPES),
    "second color": OBJECT["color"],
    "background": ("", *specs.BACKGROUNDS, *specs.SCENERIES),
    "letters": tuple(range(6)),
}
LETTER = {"letter": tuple(range(26)), "index": tuple(range(5)), "length": tuple(range(6))}


def object_labels(spec: Spec) -> list[dict]:
    """What the words up to each object's noun say of it."""
    return [
        {
            "shape": shape,
            "color": color or "",
            "count": spec.count if place == 0 else 1,
            "size": spec.size,
            "finish": spec.finish,
            "relation": spec.relation if place == 1 else "",
            "place": place,
        }
        for place, (shape, color) in enumerate(spec.objects)
    ]


def caption_labels(spec: Spec) -> dict:
    first, second = (*spec.objects, ("", None), ("", None))[:2]
    return {
        "shape": first[0],
        "color": first[1] or "",
        "second shape": second[0],
        "second color": second[1] or "",
        "count": spec.count,
        "size": spec.size,
        "finish": spec.finish,
        "relation": spec.relation,
        "background": spec.background,
        "letters": len(spec.word),
    }


class Probe(nn.Module):
    """One linear layer that names the value of each field of `fields`."""

    def __init__(self, width: int, fields: dict):
        super().__init__()
        self.fields = fields
        self.linear = nn.Linear(width, sum(map(len, fields.values())))

    def loss(self, z: torch.Tensor, labels: list[dict]) -> torch.Tensor:
        parts = self.linear(z).split([len(values) for values in self.fields.values()], -1)
        targets = (
            torch.tensor([values.index(of[name]) for of in labels])
            for name, values in self.fields.items()
        )
        return sum(F.cross_entropy(part, target) for part, target in zip(parts, targets))


def caption(rng: random.Random) -> Spec:
    """Any caption but those of val and test: as real encoders, ours have read of what the denoiser
    never saw."""
    while True:
        spec = random_spec(rng, rng.choice(specs.PROMPT_TASKS))
        if split_of(spec) in ("train", "ood"):
            return spec


def pretrain_text(out: Path, steps: int = STEPS, seed: int = 0, log=print) -> None:
    """Train the three encoders, in some minutes on one thread, and write what `load_text` reads."""
    torch.manual_seed(seed)
    modules, probes = new_text_modules(), nn.ModuleDict()
    for name in CLIPS:
        probes[name] = Probe(WIDTH // 2, OBJECT)
        probes[name + "_pooled"] = Probe(WIDTH // 2, CAPTION)
    probes["text_encoder_3"] = Probe(WIDTH, LETTER)
    encoders = [modules[name] for name in (*CLIPS, "text_encoder_3")]
    parameters = [p for m in (*encoders, probes) for p in m.parameters()]
    optimizer = torch.optim.AdamW(parameters, RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, RATE, steps, pct_start=0.05, cycle_momentum=False
    )
    nouns = noun_ids(modules["tokenizer"])
    for module in encoders:
        module.train()
    rng = random.Random(f"text/{seed}")

    def step(i: int) -> float:
        specs_ = [caption(rng) for _ in range(BATCH)]
        ids = tokenize(modules, [s.text for s in specs_])
        of_nouns, loss = torch.isin(ids["clip"], nouns), 0.0
        objects = [o for s in specs_ for o in object_labels(s)]
        for name in CLIPS:
            words, pooled = encode_clip(modules[name], ids["clip"])
            loss = loss + probes[name].loss(words[of_nouns], objects)
            loss = loss + probes[name + ("_pooled")].loss(
                pooled, [caption_labels(s) for s in specs_]
            )
        letters = [
            {"letter": ord(c) - ord("A"), "index": i, "length": len(s.word)}
            for s in specs_
            for i, c in enumerate(s.word)
        ]
        tokens = modules["text_encoder_3"](ids["t5"])[0][ids["t5"] > 2]
        loss = loss + probes["text_encoder_3"].loss(tokens, letters)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        return loss.item()

    for i in range(steps):  # some minutes: not worth a checkpoint
        loss = step(i)
        if (i + 1) % 100 == 0:
            log(f"text {i + 1}/{steps} loss {loss:.4f}")
    state = {name: modules[name].state_dict() for name in (*CLIPS, "text_encoder_3")}
    save_state(out / "encoders.safetensors", state)


def load_text(folder: Path) -> dict:
    """The six text components of a `StableDiffusion3Pipeline`, frozen."""
    modules = new_text_modules()
    for name, state in load_state(folder / "encoders.safetensors").items():
        modules[name].load_state_dict(state)
        modules[name].eval().requires_grad_(False)
    return modules


def noun_ids(tokenizer) -> torch.Tensor:
    words = [*specs.SHAPES, *(s + "s" for s in specs.SHAPES), "crosses"]
    return torch.tensor([tokenizer(word).input_ids[1] for word in words])
