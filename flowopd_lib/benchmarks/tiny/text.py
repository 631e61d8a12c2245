"""Tokenizers and text encoders of the small pipeline, in the roles they have in SD3, and their
training.

Two CLIP encoders read the words; a T5 encoder, whose tokens are letters, reads what stands in
double quotes: spelling is what T5 does in SD3. All three are built by their own transformers
classes and load with nothing of ours imported.

Real text-to-image models start from pretrained encoders; trained from nothing with the denoiser,
ours took most of its updates. So they are pretrained on text alone and then frozen. Linear probes
must read off what a caption says: each CLIP's token of a shape its colour, number, size, finish,
place in the sentence and relation so far, its pooled vector everything; T5's token of a letter
which letter it is, at which place, in a word of which length.
"""

from __future__ import annotations

import random
import string
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn

from ...files import load_state, save_state
from . import specs
from .loop import Descent, say
from .specs import SEED, Spec, random_spec, split_of

CLIP_TOKENS, WIDTH = 20, 256  # WIDTH: joint_attention_dim, two CLIPs side by side, and T5's d_model
T5_TOKENS = 8  # `max_sequence_length` of every call: five letters, </s>, and room to spare
CLIPS, T5 = ("text_encoder", "text_encoder_2"), "text_encoder_3"
NOUNS = [*specs.SHAPES, *(s + "s" for s in specs.SHAPES), "crosses"]


def vocabulary() -> list[str]:
    """Every word a caption or prompt of the benchmark can contain, besides the words on the
    signs."""
    phrases = [*NOUNS, *specs.COLORS, *specs.COUNT_WORDS.values(), *specs.RELATIONS, *specs.SIZES]
    phrases += [*specs.BACKGROUNDS, *specs.SCENERIES, *specs.FINISHES, "background", "scenery"]
    phrases += [*specs.OPENERS, *specs.SIGN_FORMS, "and", "on", "a", "an"]
    return sorted({w for phrase in phrases for w in phrase.replace('"{}"', "").split()})


def bpe_merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges until each word is one token. (The trainer of `tokenizers` breaks ties
    differently in each run.)"""
    parts, merges = {w: [*w[:-1], w[-1] + "</w>"] for w in words}, []
    while pairs := Counter(pair for p in parts.values() for pair in zip(p, p[1:])):
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        for p in parts.values():
            i = 0
            while i < len(p) - 1:
                if (p[i], p[i + 1]) == best:
                    p[i : i + 2] = ["".join(best)]
                i += 1
    return merges


def clip_tokenizer() -> transformers.CLIPTokenizer:
    """CLIP's BPE, with merges that make each word of the benchmark one token; anything else falls
    apart into letters."""
    start, end, merges = "<|startoftext|>", "<|endoftext|>", bpe_merges(vocabulary())
    characters = string.ascii_lowercase + string.digits + "\",.'-!?"
    tokens = [start, end, *characters, *(c + "</w>" for c in characters), *map("".join, merges)]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return transformers.CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=CLIP_TOKENS)


def letter_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """T5's vocabulary layout (<pad> 0, </s> 1, <unk> 2), then A to Z; a normalizer keeps what
    stands in quotes."""
    tokens = ("<pad>", "</s>", "<unk>", *string.ascii_uppercase)
    vocab = {token: i for i, token in enumerate(tokens)}
    letters = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    steps = [(Regex(r'^[^"]*"?'), ""), (Regex(r'".*$'), ""), (Regex(r"\s"), "")]
    steps += zip(string.ascii_lowercase, string.ascii_uppercase)
    letters.normalizer = normalizers.Sequence([normalizers.Replace(*step) for step in steps])
    letters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    letters.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=letters,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=T5_TOKENS,
        strict=True,  # for `FlowPolicy`: it can spell nothing else
    )


def new_text_modules() -> dict:
    """The six text components of a `StableDiffusion3Pipeline`, untrained."""
    tokenizer, letters = clip_tokenizer(), letter_tokenizer()
    clip = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH // 2,
        intermediate_size=WIDTH * 2,
        projection_dim=WIDTH // 2,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=CLIP_TOKENS,
        **special_tokens(tokenizer),
    )
    t5 = transformers.T5Config(
        vocab_size=len(letters),
        d_model=WIDTH,
        d_kv=64,
        d_ff=WIDTH * 2,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        relative_attention_max_distance=16,
    )
    speller = transformers.T5EncoderModel(t5)
    # Only this bias tells the transformer the order of the letters, and it starts near 0: let the
    # heads look apart at once.
    order = speller.encoder.block[0].layer[0].SelfAttention.relative_attention_bias
    nn.init.normal_(order.weight)
    return dict(
        text_encoder=transformers.CLIPTextModelWithProjection(clip),
        tokenizer=tokenizer,
        text_encoder_2=transformers.CLIPTextModelWithProjection(clip),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=speller,
        tokenizer_3=letters,
    )


def special_tokens(tokenizer) -> dict[str, int]:
    return {f"{k}_token_id": getattr(tokenizer, f"{k}_token_id") for k in ("bos", "eos", "pad")}


def token_ids(tokenizer, texts: list[str]) -> torch.Tensor:
    """(B, the tokenizer's length)."""
    return tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids


def tokenize(modules: dict, texts: list[str]) -> dict[str, torch.Tensor]:
    """{"clip": (B, 20), "t5": (B, 8)} token ids."""
    return {
        "clip": token_ids(modules["tokenizer"], texts),
        "t5": token_ids(modules["tokenizer_3"], texts),
    }


def encode_clip(clip: nn.Module, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What SD3 takes of a CLIP: (B, 20, 128), the last but one hidden states, and (B, 128),
    pooled."""
    out = clip(ids, output_hidden_states=True)
    return out.hidden_states[-2], out.text_embeds


def encode(modules: dict, clip_ids: torch.Tensor, t5_ids: torch.Tensor) -> tuple:
    """What `StableDiffusion3Pipeline.encode_prompt` does, with gradient: (B, 20 + 8, 256) and (B,
    256)."""
    words, pooled = zip(*(encode_clip(modules[name], clip_ids) for name in CLIPS))
    letters = modules[T5](t5_ids)[0]
    return torch.cat([torch.cat(words, -1), letters.to(words[0].dtype)], 1), torch.cat(pooled, -1)


# --- pretraining

STEPS, BATCH, RATE = 600, 128, 1e-3
# What the probes name: the fields of an object, of a caption and of a letter, with their values; ""
# where the caption leaves it open.
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
    "letters": range(6),
}
LETTER = {"letter": string.ascii_uppercase, "index": range(5), "length": range(6)}


def object_labels(spec: Spec) -> list[dict]:
    """What the words up to each object's noun say of it."""
    labels = []
    for place, (shape, color) in enumerate(spec.objects):
        said = {"shape": shape, "color": color or "", "size": spec.size, "finish": spec.finish}
        said["count"] = 1 if place else spec.count
        said["relation"] = spec.relation if place else ""
        labels.append({**said, "place": place})
    return labels


def caption_labels(spec: Spec) -> dict:
    (shape, color), (second, second_color) = (*spec.objects, ("", ""), ("", ""))[:2]
    labels = {name: getattr(spec, name) for name in "count size finish relation background".split()}
    labels |= {"shape": shape, "color": color or "", "letters": len(spec.word)}
    return labels | {"second shape": second, "second color": second_color or ""}


class Probe(nn.Module):
    """One linear layer that names the value of each field of `fields`."""

    def __init__(self, width: int, fields: dict):
        super().__init__()
        self.fields = fields
        self.linear = nn.Linear(width, sum(map(len, fields.values())))

    def loss(self, z: torch.Tensor, labels: list[dict]) -> torch.Tensor:
        parts = self.linear(z).split([len(values) for values in self.fields.values()], -1)
        return sum(
            F.cross_entropy(part, torch.tensor([values.index(of[name]) for of in labels]))
            for part, (name, values) in zip(parts, self.fields.items())
        )


def caption(rng: random.Random) -> Spec:
    """Any caption but those of val and test: as real encoders, ours have read of what the denoiser
    never saw."""
    while True:
        spec = random_spec(rng, rng.choice(specs.PROMPT_TASKS))
        if split_of(spec) in ("train", "ood"):
            return spec


def pretrain_text(out: Path) -> None:
    """Train the three encoders, in some minutes on one thread: not worth a checkpoint. Writes what
    `load_text` reads."""
    torch.manual_seed(SEED)
    modules, probes = new_text_modules(), nn.ModuleDict()
    for name in CLIPS:
        probes[name] = Probe(WIDTH // 2, OBJECT)
        probes[name + "_pooled"] = Probe(WIDTH // 2, CAPTION)
    probes[T5] = Probe(WIDTH, LETTER)
    encoders = {name: modules[name].train() for name in (*CLIPS, T5)}
    parameters = [p for m in (*encoders.values(), probes) for p in m.parameters()]
    descent = Descent(parameters, RATE, STEPS, warmup=0.05, weight_decay=0.01)
    nouns = torch.tensor([modules["tokenizer"](word).input_ids[1] for word in NOUNS])
    rng = random.Random(f"text/{SEED}")

    def loss_of(captions: list[Spec]) -> torch.Tensor:
        ids, loss = tokenize(modules, [s.text for s in captions]), 0.0
        objects = [o for s in captions for o in object_labels(s)]
        for name in CLIPS:
            words, pooled = encode_clip(encoders[name], ids["clip"])
            loss = loss + probes[name].loss(words[torch.isin(ids["clip"], nouns)], objects)
            loss = loss + probes[name + "_pooled"].loss(pooled, list(map(caption_labels, captions)))
        letters = [
            {"letter": letter, "index": i, "length": len(s.word)}
            for s in captions
            for i, letter in enumerate(s.word)
        ]
        tokens = encoders[T5](ids["t5"])[0][ids["t5"] > 2]
        return loss + probes[T5].loss(tokens, letters)

    for i in range(STEPS):
        loss = descent.step(loss_of([caption(rng) for _ in range(BATCH)]))
        if (i + 1) % 100 == 0:
            say(f"text {i + 1}/{STEPS} loss {loss:.4f}")
    state = {name: encoder.state_dict() for name, encoder in encoders.items()}
    save_state(out / "encoders.safetensors", state)


def load_text(folder: Path) -> dict:
    """The six text components of a `StableDiffusion3Pipeline`, frozen."""
    modules = new_text_modules()
    for name, state in load_state(folder / "encoders.safetensors").items():
        modules[name].load_state_dict(state)
        modules[name].eval().requires_grad_(False)
    return modules
