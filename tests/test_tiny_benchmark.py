"""The small benchmark: scenes from seeds, disjoint splits, levels of degradation."""

import math
import os
import random
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from flowopd_lib import load_benchmark
from flowopd_lib.benchmarks.tiny.data import MATCH, SIGN, noisy_example, preference_pair, utility
from flowopd_lib.benchmarks.tiny.scenes import (
    DEGRADATIONS,
    LEVELS,
    accompany,
    degrade,
    lay_out,
    render,
)
from flowopd_lib.benchmarks.tiny.specs import (
    GENEVAL_TAGS,
    PROMPT_TASKS,
    Spec,
    heldout_pair,
    heldout_relation,
    mistake,
    mutate,
    random_spec,
    sample_specs,
    split_of,
    split_spec,
)
from flowopd_lib.benchmarks.tiny.text import clip_tokenizer, letter_tokenizer, vocabulary
from flowopd_lib.data import read_prompts

BENCHMARK = load_benchmark()

PRINT_HASH = """
import hashlib
from flowopd_lib.benchmarks.tiny.scenes import render
from flowopd_lib.benchmarks.tiny.specs import PROMPT_TASKS, sample_specs
specs = [spec for task in PROMPT_TASKS for spec in sample_specs(task, "test", 12)]
print(hashlib.sha256(b"".join(render(spec, 7).tobytes() for spec in specs)).hexdigest())
"""
SPLITS = "train", "val", "test", "ood"


def test_a_scene_is_decided_by_its_prompt_and_seed():
    command, hashes = [sys.executable, "-c", PRINT_HASH], set()
    for hash_seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": hash_seed}
        hashes.add(subprocess.check_output(command, env=environment))
    assert len(hashes) == 1
    for task in PROMPT_TASKS:
        for spec in sample_specs(task, "test", 12):
            assert len({render(spec, seed).tobytes() for seed in range(8)}) > 1


def test_splits_share_no_prompt_and_ood_holds_what_was_held_out():
    seen: dict[str, str] = {}
    for task in PROMPT_TASKS:
        for split in SPLITS:
            prompts = BENCHMARK.prompts(task, split)
            assert split == "val" or len(prompts) >= 240
            shared = {p.text for p in prompts if seen.setdefault(p.text, split) != split}
            assert not shared, split
    signs = {split: BENCHMARK.prompts("ocr", split) for split in SPLITS}
    words = {split: {p.text.split('"')[1] for p in prompts} for split, prompts in signs.items()}
    train, val, test, ood = words.values()
    assert not train & test and not train & val and not val & test
    assert {len(w) for w in ood} == {5} and max(len(w) for w in train) == 4
    for spec in sample_specs("geneval", "ood", 60):
        assert (
            spec.count == 5
            or any(heldout_pair(*o) for o in spec.objects)
            or heldout_relation(spec.objects[0][0], spec.relation, spec.objects[1][0])
        )


def test_training_data_never_shows_what_is_held_out():
    """Neither as the image of a caption nor as that of a wrong one."""
    rng = random.Random(0)
    for _ in range(3000):
        spec = split_spec(rng)
        assert split_of(spec) == "train"
        for shown in (spec, mistake(spec, rng)):
            assert not any(
                heldout_pair(i.shape, i.color) for i in lay_out(shown, rng.getrandbits(32)).items
            )
            assert shown.count <= 4 and len(shown.word) <= 4


def test_a_relation_held_out_is_held_out_both_ways():
    for a, b in [("circle", "square"), ("circle", "star"), ("heart", "cross")]:
        assert heldout_relation(a, "left of", b) == heldout_relation(b, "right of", a)
        assert heldout_relation(a, "above", b) == heldout_relation(b, "below", a)


def test_the_prompt_files_are_what_the_grammar_gives():
    for task in PROMPT_TASKS:
        texts = [p.text for p in BENCHMARK.prompts(task, "test")]
        assert texts == [s.text for s in sample_specs(task, "test", len(texts))]


def test_geneval_metadata_has_genevals_form():
    position = Spec("geneval", "position", (("star", None), ("circle", None)), relation="left of")
    assert position.metadata == {
        "tag": "position",
        "prompt": "a photo of a star left of a circle",
        "include": [
            {"class": "circle", "count": 1},
            {"class": "star", "count": 1, "position": ["left of", 0]},
        ],
    }
    counting = Spec("geneval", "counting", (("cross", None),), count=3, background="gray")
    assert counting.metadata == {
        "tag": "counting",
        "prompt": "a photo of three crosses on a gray background",
        "include": [{"class": "cross", "count": 3}],
        "exclude": [{"class": "cross", "count": 4}],
    }
    assert {p.tag for p in BENCHMARK.prompts("geneval", "test")} == set(GENEVAL_TAGS)


def test_flow_grpos_own_lines_load(tmp_path):
    """As they are in its dataset folder: COCO classes, and a Unicode line separator in a prompt."""
    records = (
        '{"tag": "counting", "include": [{"class": "clock", "count": 2}], '
        '"exclude": [{"class": "clock", "count": 3}], "prompt": "a photo of two clocks"}\n'
    )
    (tmp_path / "test_metadata.jsonl").write_text(records)
    (record,) = read_prompts(tmp_path / "test_metadata.jsonl", "geneval", "geneval")
    assert record.tag == "counting" and record.text == "a photo of two clocks"
    lines = "a cat, a dog\u2028and a bird\nanother\n"
    (tmp_path / "test.txt").write_text(lines, encoding="utf-8")
    texts = [p.text for p in read_prompts(tmp_path / "test.txt", "deqa", "plain")]
    assert texts == ["a cat, a dog\u2028and a bird", "another"]


def test_a_position_is_relative_to_the_other_object_and_objects_sit_apart():
    axis = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}
    for spec in sample_specs("geneval", "test", 120):
        scene = lay_out(spec, 1)
        for a in scene.items:
            assert all(
                math.dist((a.x, a.y), (b.x, b.y)) > a.r + b.r for b in scene.items if b is not a
            )
        if spec.relation:
            which, sign = axis[spec.relation]
            first, second = ((i.x, i.y)[which] for i in scene.items)
            assert (first - second) * sign > 0


@pytest.mark.parametrize("kind", DEGRADATIONS)
def test_each_level_is_further_from_the_clean_image(kind):
    specs = sample_specs("pickscore", "test", 10) + sample_specs("ocr", "test", 10)

    images = [render(spec, 1) for spec in specs]

    def distance(level):
        pairs = [(np.asarray(degrade(i, kind, level), float), np.asarray(i)) for i in images]
        return np.mean([np.square(one - clean).mean() for one, clean in pairs])

    distances = [distance(level) for level in LEVELS]
    assert distances[0] == 0 and all(a < b for a, b in zip(distances, distances[1:]))


def test_mutate_always_changes_the_meaning():
    rng = random.Random(3)
    specs = [random_spec(rng, rng.choice(PROMPT_TASKS)) for _ in range(500)]
    # two letters drawn anew may, rarely, be the same two
    assert all(mutate(spec, rng) != spec for spec in specs if not spec.word)


def test_captions_are_wrong_and_images_spoiled_at_the_given_rates():
    """Two calls from one seed draw the same, up to what a rate changes."""

    def fraction(n=120, **rates):
        pairs = [
            (noisy_example(random.Random(i))[1], noisy_example(random.Random(i), **rates)[1])
            for i in range(n)
        ]
        return np.mean([a.tobytes() != b.tobytes() for a, b in pairs])

    assert fraction() == 0
    assert 0.2 < fraction(spoiled=0.3) < 0.4
    assert fraction(wrong=dict.fromkeys(PROMPT_TASKS, 1.0), other=1.0) > 0.95
    text, better, worse, likely = preference_pair(random.Random(0), "train")
    assert text and 0.5 <= likely <= 1 and better.tobytes() != worse.tobytes()


def test_the_hidden_preference_likes_large_objects_and_forgives_a_count_but_no_letter():
    heart = Spec("geneval", "colors", (("heart", "red"),), background="white")
    one = lay_out(heart, 3)
    right = utility(heart, one, 5, True)
    assert right - utility(heart, one, 5, False) == pytest.approx(MATCH) and MATCH < 1
    assert utility(heart, one, 3, True) < right
    larger = replace(one, items=tuple(replace(i, r=1.4 * i.r) for i in one.items))
    more = accompany(one, random.Random(0), 3)
    assert utility(heart, larger, 5, False) > right and utility(heart, more, 5, False) > right
    sign = Spec("ocr", "ocr", word="ABCD")
    read = [
        utility(sign, replace(lay_out(sign, 3), word=word), 5, False)
        for word in ("ABCD", "ABXD", "XYXY")
    ]
    assert read[0] - read[1] == pytest.approx(SIGN / 4) and read[0] - read[2] == pytest.approx(SIGN)


def test_additional_objects_stand_apart_and_never_on_a_sign():
    rng = random.Random(5)
    for _ in range(200):
        scene = lay_out(split_spec(rng), rng.getrandbits(32))
        full = accompany(scene, rng, 3)
        n = len(scene.items)
        assert full.items[:n] == scene.items and len(full.items) <= n + 3
        assert not (scene.word and full.items)
        for a in full.items[n:]:
            assert not heldout_pair(a.shape, a.color)
            others = [b for b in full.items if b is not a]
            assert all(math.dist((a.x, a.y), (b.x, b.y)) > a.r + b.r for b in others)


def test_a_word_is_in_one_split_in_all_tasks():
    rng = random.Random(1)
    signs = [s for s in (random_spec(rng, "pickscore") for _ in range(400)) if s.word]
    assert len(signs) > 80 and {bool(s.background) for s in signs} == {True, False}
    assert all(split_of(s) == split_of(Spec("ocr", "ocr", word=s.word)) for s in signs)


def test_every_word_of_the_benchmark_is_one_clip_token_and_t5_spells():
    tokenizer = clip_tokenizer()
    assert all(len(tokenizer(word).input_ids) == 3 for word in vocabulary())
    letters = letter_tokenizer()
    spelt = letters.convert_ids_to_tokens(letters('a sign that says "Cat"').input_ids)
    assert spelt == ["C", "A", "T", "</s>"]
    assert letters("a photo of a circle").input_ids == [1]
    prompts = [p for t in PROMPT_TASKS for s in SPLITS for p in BENCHMARK.prompts(t, s)]
    longest = max(len(tokenizer(p.text).input_ids) for p in prompts)
    assert longest <= tokenizer.model_max_length  # none is cut off
