"""What a prompt of the small benchmark says: its grammar, its metadata and the split it belongs to.

A `Spec` is the meaning of one prompt. Everything else follows from it: the text, GenEval's JSON
metadata, the split (a hash of the text, so the splits are disjoint by construction) and, in
`scenes.py`, the images that are right for it.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import string
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from ...data import Prompt

SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")
# name -> RGB; about 60 degrees of hue apart, so that a colour is a fact and not a matter of taste
COLORS = {
    "red": (226, 28, 36),
    "yellow": (250, 210, 0),
    "green": (20, 165, 50),
    "cyan": (0, 200, 215),
    "blue": (30, 60, 225),
    "purple": (175, 35, 205),
}
COUNT_WORDS = {2: "two", 3: "three", 4: "four", 5: "five"}
RELATIONS = ("left of", "right of", "above", "below")
OPENERS = ("a photo of", "a picture of", "a drawing of")
OPENERS += ("an image of", "a painting of", "a render of")
BACKGROUNDS = ("white", "gray", "black")  # plain: GenEval's detector has an easy time
SCENERIES = ("sunset", "ocean", "meadow", "night")  # gradients: the preference task
FINISHES = ("flat", "glossy", "outlined")
SIZES = ("small", "big")
SIGN_FORMS = ('a sign that says "{}"', 'a board that reads "{}"')
SIGN_FORMS += ('a sign with the word "{}"', 'a label saying "{}"')
# what people ask for in a style, and how often
STYLE_KINDS = {"one": 0.25, "two": 0.15, "several": 0.2, "sign": 0.4}
GENEVAL_TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
# DeQA has no prompts of its own: it rewards images of all three
PROMPT_TASKS = ("geneval", "ocr", "pickscore")
MAX_TRAIN_COUNT, MAX_TRAIN_LETTERS = 4, 4
# of the prompts that are shipped: their seed, and how many each task has of each split
SEED = 0
PROMPT_COUNTS = {"train": 1200, "val": 120, "test": 300, "ood": 240}


@dataclass(frozen=True)
class Spec:
    """The meaning of one prompt. `color is None` and `background == ""` mean "not said", and any
    will do."""

    task: str  # geneval | ocr | pickscore
    tag: str  # one of GENEVAL_TAGS, or "ocr", "style"
    objects: tuple[tuple[str, str | None], ...] = ()  # (shape, color) in the order of the text
    count: int = 1  # of objects[0], in the counting tag
    relation: str = ""  # objects[0] RELATION objects[1]
    word: str = ""
    background: str = ""
    finish: str = ""
    size: str = ""
    opener: str = OPENERS[0]

    @property
    def text(self) -> str:
        where = f", {self.background} scenery" if self.background else ""
        if self.word:
            return self.opener.format(self.word) + where
        if where and self.tag != "style":
            where = f" on a {self.background} background"
        nouns = [
            " ".join(filter(None, (self.finish, self.size, color, shape)))
            for shape, color in self.objects
        ]
        if self.count > 1:
            body = f"{COUNT_WORDS[self.count]} {nouns[0]}{'es' if nouns[0].endswith('s') else 's'}"
        else:
            joint = f" {self.relation or 'and'} "
            body = joint.join(f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}" for noun in nouns)
        return f"{self.opener} {body}{where}"

    @property
    def metadata(self) -> dict:
        """GenEval's JSON record: `tag`, `include`, `exclude` (counting only), `prompt`."""
        include = [
            {"class": shape, "count": 1 if i else self.count} | ({"color": color} if color else {})
            for i, (shape, color) in enumerate(self.objects)
        ]
        if self.relation:  # GenEval lists the reference first
            include = [include[1], {**include[0], "position": [self.relation, 0]}]
        record = {"tag": self.tag, "include": include}
        if self.tag == "counting":
            record["exclude"] = [{"class": self.objects[0][0], "count": self.count + 1}]
        return {**record, "prompt": self.text}

    @property
    def prompt(self) -> Prompt:
        return Prompt(self.text, self.task, self.metadata if self.task == "geneval" else {})


def heldout_pair(shape: str, color: str | None) -> bool:
    """One colour per shape is never drawn in training, named or not, nor as the image of a wrong
    caption."""
    return color is not None and SHAPES.index(shape) == list(COLORS).index(color)


def heldout_relation(a: str, relation: str, b: str) -> bool:
    """Six ordered shape pairs per axis are never described in training, in neither of the two ways
    to say it."""
    if relation in ("right of", "below"):
        a, b = b, a
    distance = 1 if relation in ("left of", "right of") else 2
    return (SHAPES.index(b) - SHAPES.index(a)) % len(SHAPES) == distance


def split_of(spec: Spec) -> str:
    """`ood` by content; else `test` (20 %), `val` (10 %) or `train` by a hash of the text (signs:
    of the word).

    So a test sentence is new, but what it describes may stand in other words in a training
    sentence: new content is what the OOD split asks for.
    """
    shapes = [shape for shape, _ in spec.objects]
    if (
        any(heldout_pair(*o) for o in spec.objects)
        or spec.count > MAX_TRAIN_COUNT
        or len(spec.word) > MAX_TRAIN_LETTERS
        or (spec.relation and heldout_relation(shapes[0], spec.relation, shapes[1]))
    ):
        return "ood"
    # a word seen in another sentence, or on another task's sign, is not held out
    key = f"ocr:{spec.word}" if spec.word else f"{spec.task}:{spec.text}"
    bucket = int(hashlib.sha256(key.encode()).hexdigest(), 16) % 10
    return "test" if bucket < 2 else "val" if bucket == 2 else "train"


def random_spec(rng: random.Random, task: str, tag: str | None = None) -> Spec:
    """A draw from the grammar, whatever its split."""
    spec = Spec(task, "ocr")
    if task == "pickscore":
        spec = replace(spec, tag="style", background=rng.choice(SCENERIES))
        kind = rng.choices(list(STYLE_KINDS), STYLE_KINDS.values())[0]
    if task == "ocr" or (task == "pickscore" and kind == "sign"):
        n = rng.choice((2, 3, 3, 4, 4, 4, 5))
        if task == "pickscore" and rng.random() < 0.5:
            spec = replace(spec, background="")  # a sign is asked for as it comes
        word = "".join(rng.choices(string.ascii_uppercase, k=n))
        return replace(spec, word=word, opener=rng.choice(SIGN_FORMS))
    opener, colors = rng.choice(OPENERS), list(COLORS)
    shape, other = rng.sample(SHAPES, 2)
    if task == "pickscore":
        first, second = rng.sample(colors, 2)
        objects = ((shape, first), (other, second)) if kind == "two" else ((shape, first),)
        count = rng.choice(tuple(COUNT_WORDS)) if kind == "several" else 1
        finish = rng.choice(FINISHES)
        return replace(spec, objects=objects, count=count, finish=finish, opener=opener)
    tag = tag or rng.choice(GENEVAL_TAGS)
    background, one, two = rng.choice(("",) + BACKGROUNDS), ((shape, None),), ((other, None),)
    spec = Spec(task, tag, one, opener=opener, background=background)
    if tag == "single_object":
        return replace(spec, size=rng.choice(("",) + SIZES))
    if tag == "two_object":
        return replace(spec, objects=one + two)
    if tag == "counting":
        return replace(spec, count=rng.choice(tuple(COUNT_WORDS)))
    if tag == "colors":
        return replace(spec, objects=((shape, rng.choice(colors)),))
    if tag == "position":
        return replace(spec, objects=one + two, relation=rng.choice(RELATIONS))
    first, second = rng.sample(colors, 2)  # color_attr
    return replace(spec, objects=((shape, first), (other, second)))


TASK_WEIGHTS = {"geneval": 0.5, "ocr": 0.3, "pickscore": 0.2}


def split_spec(rng: random.Random, split: str = "train", task_weights: dict = TASK_WEIGHTS) -> Spec:
    """A draw from one split: whoever trains on "train" never sees a val, test or OOD prompt."""
    weights = [task_weights[t] for t in PROMPT_TASKS]
    while True:
        spec = random_spec(rng, rng.choices(PROMPT_TASKS, weights)[0])
        if split_of(spec) == split:
            return spec


def mutate(spec: Spec, rng: random.Random) -> Spec:
    """The same prompt got wrong in one respect (a sign: mostly all of its word): what a wrong
    caption describes, and what a reward must notice."""

    def other(values: Iterable, *taken: Any) -> Any:
        return rng.choice([v for v in values if v not in taken])

    if spec.word:
        if rng.random() < 0.7:
            word = "".join(rng.choices(string.ascii_uppercase, k=len(spec.word)))
            return replace(spec, word=word)
        i = rng.randrange(len(spec.word))
        letter = other(string.ascii_uppercase, spec.word[i])
        return replace(spec, word=spec.word[:i] + letter + spec.word[i + 1 :])
    respects = ["shape"]
    if spec.count > 1:
        respects += ["count"] * 3
    if spec.relation:
        respects += ["relation"] * 3
    if any(color for _, color in spec.objects):
        respects += ["color"] * 2
    if spec.tag == "style":
        respects += ["background", "finish"]
    respect = rng.choice(respects)
    values = dict(count=(2, 3, 4), relation=RELATIONS, background=SCENERIES, finish=FINISHES)
    if respect in values:
        return replace(spec, **{respect: other(values[respect], getattr(spec, respect))})
    i = rng.randrange(len(spec.objects))
    objects, (shapes, colors) = list(spec.objects), zip(*spec.objects)
    if respect == "shape":
        objects[i] = other(SHAPES, *shapes), colors[i]
    else:
        objects[i] = shapes[i], other(COLORS, *colors)
    return replace(spec, objects=tuple(objects))


def mistake(spec: Spec, rng: random.Random) -> Spec:
    """`mutate`, but never into what is held out for the OOD split, not even as the image of a
    wrong caption."""
    other = mutate(spec, rng)
    return spec if split_of(other) == "ood" else other


def sample_specs(task: str, split: str, n: int, seed: int = SEED) -> list[Spec]:
    """`n` different specs of one task and split, GenEval's tags in equal numbers, the same for the
    same seed.

    The OOD split has only the tags that something was held out of. Raises ValueError for more than
    the grammar has.
    """
    rng, found = random.Random(f"{task}/{split}/{seed}"), {}
    tags = (None,) if task != "geneval" else GENEVAL_TAGS[2:] if split == "ood" else GENEVAL_TAGS
    for tag in itertools.cycle(tags):
        for _ in range(2000):
            spec = random_spec(rng, task, tag)
            if split_of(spec) == split and spec.text not in found:
                break
        else:
            raise ValueError(f"there are fewer than {n} {split} prompts for {task}; take fewer")
        found[spec.text] = spec
        if len(found) == n:
            return list(found.values())
