"""Tokenizers and text encoders of the small pipeline, in the roles they have in SD3.

Two CLIP encoders read the words; a T5 encoder, whose tokens are letters, reads what stands in
double quotes: spelling is what T5 does in SD3. All three are built by their own transformers
classes and load with nothing of ours imported.
"""

from __future__ import annotations

import string
from collections import Counter

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from . import specs

CLIP_TOKENS, WIDTH = 20, 256  # WIDTH: joint_attention_dim, two CLIPs side by side, and T5's d_model
T5_TOKENS = 8  # `max_sequence_length` of every call: five letters, </s>, and room to spare


def vocabulary() -> list[str]:
    """Every word a caption or prompt of the benchmark can contain, besides the words on the
    signs."""
    text = [
        *specs.SHAPES,
        *(s + "s" for s in specs.SHAPES),
        "crosses",
        *specs.COLORS,
        *specs.COUNT_WORDS.values(),
        *specs.RELATIONS,
        *specs.OPENERS,
        *specs.BACKGROUNDS,
        *specs.SCENERIES,
        *specs.FINISHES,
        *specs.SIZES,
        *specs.SIGN_FORMS,
        "background",
        "scenery",
        "and",
        "on",
        "a",
        "an",
    ]
    return sorted({w for phrase in text for w in phrase.replace('"{}"', "").split()})


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


def clip_tokenizer() -> CLIPTokenizer:
    """CLIP's BPE, with merges that make each word of the benchmark one token; anything else falls
    apart into letters."""
    start, end = "<|startoftext|>", "<|endoftext|>"
    merges, characters = (
        bpe_merges(vocabulary()),
        string.ascii_lowercase + string.digits + "\",.'-!?",
    )
    tokens = [
        start,
        end,
        *characters,
        *(c + "</w>" for c in characters),
        *("".join(m) for m in merges),
    ]
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate(dict.fromkeys(tokens))},
        merges=merges,
        model_max_length=CLIP_TOKENS,
        bos_token=start,
        eos_token=end,
        unk_token=end,
        pad_token=end,
    )


def letter_tokenizer(length: int = T5_TOKENS) -> PreTrainedTokenizerFast:
    """T5's vocabulary layout (<pad> 0, </s> 1, <unk> 2), then A to Z; a normalizer keeps what
    stands in quotes."""
    vocab = {
        token: i for i, token in enumerate(("<pad>", "</s>", "<unk>", *string.ascii_uppercase))
    }
    letters = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    letters.normalizer = normalizers.Sequence(
        [
            normalizers.Replace(Regex(r'^[^"]*"?'), ""),
            normalizers.Replace(Regex(r'".*$'), ""),
            normalizers.Replace(Regex(r"\s"), ""),
            *(normalizers.Replace(c.lower(), c) for c in string.ascii_uppercase),
        ]
    )
    letters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    letters.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=letters,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        # for `FlowPolicy`: it can spell nothing else
        model_max_length=length,
        strict=True,
    )


def new_text_modules() -> dict:
    """The six text components of a `StableDiffusion3Pipeline`, untrained."""
    tokenizer = clip_tokenizer()
    clip = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH // 2,
        intermediate_size=WIDTH * 2,
        projection_dim=WIDTH // 2,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=CLIP_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    letters = letter_tokenizer()
    t5 = T5Config(
        vocab_size=len(letters),
        d_model=WIDTH,
        d_kv=64,
        d_ff=WIDTH * 2,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        relative_attention_num_buckets=32,
        relative_attention_max_distance=16,
    )
    speller = T5EncoderModel(t5)
    # Only this bias tells the transformer the order of the letters, and it starts near 0: let the
    # heads look apart at once.
    torch.nn.init.normal_(
        speller.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    )
    return dict(
        text_encoder=CLIPTextModelWithProjection(clip),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(clip),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=speller,
        tokenizer_3=letters,
    )


def tokenize(modules: dict, texts: list[str]) -> dict[str, torch.Tensor]:
    """{"clip": (B, 20), "t5": (B, 8)} token ids."""

    def ids(name, length):
        return torch.tensor(
            modules[name](
                texts, padding=("max_length"), max_length=length, truncation=True
            ).input_ids
        )

    return {"clip": ids("tokenizer", CLIP_TOKENS), "t5": ids("tokenizer_3", T5_TOKENS)}


def encode_clip(
    clip: CLIPTextModelWithProjection, ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What SD3 takes of a CLIP: (B, 20, 128), the last but one hidden states, and (B, 128),
    pooled."""
    out = clip(ids, output_hidden_states=True)
    return out.hidden_states[-2], out.text_embeds


def encode(
    modules: dict, clip_ids: torch.Tensor, t5_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `StableDiffusion3Pipeline.encode_prompt` does, with gradient: (B, 20 + 8, 256) and (B,
    256)."""
    words, pooled = zip(
        *(encode_clip(modules[name], clip_ids) for name in ("text_encoder", "text_encoder_2"))
    )
    letters = modules["text_encoder_3"](t5_ids)[0]
    return torch.cat([torch.cat(words, -1), letters.to(words[0].dtype)], 1), torch.cat(pooled, -1)
