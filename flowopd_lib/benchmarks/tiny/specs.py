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
from dataclasses import dataclass

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
OPENERS = (
    "a photo of",
    "a picture of",
    "a drawing of",
    "an image of",
    "a painting of",
    "a render of",
)
BACKGROUNDS = ("white", "gray", "black")  # plain: GenEval's detector has an easy time
SCENERIES = ("sunset", "ocean", "meadow", "night")  # gradients: the preference task
FINISHES = ("flat", "glossy", "outlined")
SIZES = ("small", "big")
SIGN_FORMS = (
    'a sign that says "{}"',
    'a board that reads "{}"',
    'a sign with the word "{}"',
    'a label saying "{}"',
)
# what people ask for in a style, and how often
STYLE_KINDS = {"one": 0.25, "two": 0.15, "several": 0.2, "sign": 0.4}
GENEVAL_TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
# DeQA has no prompts of its own: it rewards images of all three
PROMPT_TASKS = ("geneval", "ocr", "pickscore")
MAX_TRAIN_COUNT, MAX_TRAIN_LETTERS = 4, 4


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
        if self.word:
            scenery = f", {self.background} scenery" if self.background else ""
            return self.opener.format(self.word) + scenery
        nouns = [
            " ".join(filter(None, (self.finish, self.size, color, shape)))
            for shape, color in self.objects
        ]
        if self.count > 1:
            body = f"{COUNT_WORDS[self.count]} {nouns[0]}{'es' if nouns[0].endswith('s') else 's'}"
        elif self.tag == "position":
            body = f"a {nouns[0]} {self.relation} a {nouns[1]}"
        else:
            body = " and ".join(f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}" for noun in nouns)
        if self.tag == "style":
            return f"{self.opener} {body}, {self.background} scenery"
        return f"{self.opener} {body}" + (
            f" on a {self.background} background" if self.background else ""
        )

    @property
    def metadata(self) -> dict:
        """GenEval's JSON record: `tag`, `include`, `exclude` (counting only), `prompt`."""
        include = []
        for i, (shape, color) in enumerate(self.objects):
            entry = {"class": shape, "count": self.count if i == 0 else 1}
            if color:
                entry["color"] = color
            if self.relation and i == 0:
                entry = {**entry, "position": [self.relation, 1]}
            include.append(entry)
        if (
            self.relation
        ):  # GenEval lists the reference first, then the object with `position: [relation, 0]`
            include = [include[1], {**include[0], "position": [self.relation, 0]}]
        record = {"tag": self.tag, "include": include}
        if self.tag == "counting":
            record["exclude"] = [{"class": self.objects[0][0], "count": self.count + 1}]
        return {**record, "prompt": self.text}


def heldout_pair(shape: str, color: str | None) -> bool:
    """One colour per shape is never drawn in training, named or not, nor as the image of a wrong
    caption."""
    return color is not None and SHAPES.index(shape) == list(COLORS).index(color)


def heldout_relation(a: str, relation: str, b: str) -> bool:
    """Six ordered shape pairs per axis are never described in training, in neither of the two ways
    to say it."""
    if relation in ("right of", "below"):
        a, b, relation = b, a, {"right of": "left of", "below": "above"}[relation]
    return (SHAPES.index(b) - SHAPES.index(a)) % len(SHAPES) == {"left of": 1, "above": 2}.get(
        relation
    )


def split_of(spec: Spec) -> str:
    """`ood` by content; else `test` (20 %), `val` (10 %) or `train` by a hash of the text (signs:
    of the word).

    So a test sentence is new, but what it describes may stand in other words in a training
    sentence: new content is what the OOD split asks for.
    """
    if (
        any(heldout_pair(*o) for o in spec.objects)
        or spec.count > MAX_TRAIN_COUNT
        or len(spec.word) > MAX_TRAIN_LETTERS
        or (
            spec.relation
            and heldout_relation(spec.objects[0][0], spec.relation, spec.objects[1][0])
        )
    ):
        return "ood"
    # a word seen in another sentence, or on another task's sign, is not held out
    key = f"ocr:{spec.word}" if spec.word else f"{spec.task}:{spec.text}"
    bucket = int(hashlib.sha256(key.encode()).hexdigest(), 16) % 10
    return "test" if bucket < 2 else "val" if bucket == 2 else "train"


def random_spec(rng: random.Random, task: str, tag: str | None = None) -> Spec:
    """A draw from the grammar, whatever its split."""
    style = dict(background=rng.choice(SCENERIES)) if task == "pickscore" else {}
    kind = rng.choices(list(STYLE_KINDS), STYLE_KINDS.values())[0] if style else ""
    if task == "ocr" or kind == "sign":
        n = rng.choice((2, 3, 3, 4, 4, 4, 5))
        if style and rng.random() < 0.5:
            style = dict(background="")  # a sign is asked for as it comes
        return Spec(
            task,
            "style" if style else "ocr",
            word="".join(rng.choices(string.ascii_uppercase, k=n)),
            opener=rng.choice(SIGN_FORMS),
            **style,
        )
    opener, colors = rng.choice(OPENERS), list(COLORS)
    shape, other = rng.sample(SHAPES, 2)
    if task == "pickscore":
        first, second = rng.sample(colors, 2)
        return Spec(
            "pickscore",
            "style",
            ((shape, first), (other, second)) if kind == "two" else ((shape, first),),
            count=rng.choice(tuple(COUNT_WORDS)) if kind == "several" else 1,
            finish=rng.choice(FINISHES),
            opener=opener,
            **style,
        )
    if task != "geneval":
        raise ValueError(f"unknown task {task!r}: choose one of {', '.join(PROMPT_TASKS)}")
    tag = tag or rng.choice(GENEVAL_TAGS)
    base = dict(task="geneval", tag=tag, opener=opener, background=rng.choice(("",) + BACKGROUNDS))
    if tag == "single_object":
        return Spec(objects=((shape, None),), size=rng.choice(("",) + SIZES), **base)
    if tag == "two_object":
        return Spec(objects=((shape, None), (other, None)), **base)
    if tag == "counting":
        return Spec(objects=((shape, None),), count=rng.choice(tuple(COUNT_WORDS)), **base)
    if tag == "colors":
        return Spec(objects=((shape, rng.choice(colors)),), **base)
    if tag == "position":
        return Spec(objects=((shape, None), (other, None)), relation=rng.choice(RELATIONS), **base)
    if tag == "color_attr":
        c1, c2 = rng.sample(colors, 2)
        return Spec(objects=((shape, c1), (other, c2)), **base)
    raise ValueError(f"unknown GenEval tag {tag!r}: choose one of {', '.join(GENEVAL_TAGS)}")


def sample_specs(task: str, split: str, n: int, seed: int = 0) -> list[Spec]:
    """`n` different specs of one task and split, GenEval's tags in equal numbers, the same for the
    same seed.

    The OOD split has only the tags that something was held out of.
    """
    if split not in ("train", "val", "test", "ood"):
        raise ValueError(f"unknown split {split!r}: choose train, val, test or ood")
    rng = random.Random(f"{task}/{split}/{seed}")
    tags = {"geneval": GENEVAL_TAGS if split != "ood" else GENEVAL_TAGS[2:]}.get(task, (None,))
    found: dict[str, Spec] = {}
    for tag in itertools.cycle(tags):
        for _ in range(2000):
            spec = random_spec(rng, task, tag)
            if split_of(spec) == split and spec.text not in found:
                found[spec.text] = spec
                break
        else:
            raise ValueError(
                f"the benchmark has fewer than {n} different {split} prompts for {task} ({tag}); "
                "ask for fewer"
            )
        if len(found) >= n:
            break
    return list(found.values())
