"""GenEval's rule on constructed detections: each tag, correct and wrong."""

from types import SimpleNamespace

import pytest

from flowopd_lib.rewards import Detection, GenEval
from flowopd_lib.rewards.geneval import counted_objects, relations, score, verdict

DETECTOR = SimpleNamespace(threshold=0.3, counting_threshold=0.9)
CIRCLE, STAR = {"class": "circle", "count": 1}, {"class": "star", "count": 1}


def at(label, x, y, color="red", score=0.95, size=10):
    return Detection(label, color, score, (x - size / 2, y - size / 2, x + size / 2, y + size / 2))


def explain(record, *detections, exact=False):
    return verdict(record, counted_objects(record, detections, DETECTOR), exact)


def correct(record, *detections, exact=False):
    return explain(record, *detections, exact=exact)[0]


def record(tag, *include, exclude=()):
    return {"tag": tag, "include": list(include), "exclude": list(exclude), "prompt": "p"}


ONE = record("single_object", CIRCLE)
RED = record("colors", {**CIRCLE, "color": "red"})
TWO_COLORS = record("color_attr", {**CIRCLE, "color": "red"}, {**STAR, "color": "blue"})
THREE = record(
    "counting", {"class": "circle", "count": 3}, exclude=[{"class": "circle", "count": 4}]
)
CIRCLES = [at("circle", x, 20) for x in (10, 25, 40, 55)]
FAINT = at("circle", 10, 50, score=0.85)


@pytest.mark.parametrize(
    "expected, record, detections",
    [
        (True, ONE, [at("circle", 20, 20)]),
        (True, ONE, [at("circle", 20, 20), at("star", 40, 40)]),  # others do not matter
        (True, ONE, [at("circle", 20, 20), at("circle", 40, 40)]),
        (False, ONE, [at("star", 20, 20)]),
        (False, ONE, [at("circle", 20, 20, score=0.2)]),
        (True, record("two_object", CIRCLE, STAR), [at("star", 20, 20), at("circle", 40, 40)]),
        (False, record("two_object", CIRCLE, STAR), [at("circle", 20, 20), at("circle", 40, 40)]),
        (True, THREE, CIRCLES[:3]),
        (False, THREE, CIRCLES[:2]),
        (False, THREE, CIRCLES),
        (True, THREE, [*CIRCLES[:3], FAINT]),  # not confident enough to be counted
        (False, THREE, [*CIRCLES[:2], FAINT]),
        (True, RED, [at("circle", 20, 20, "red")]),
        (False, RED, [at("circle", 20, 20, "blue")]),
        (False, RED, [at("circle", 20, 20, None)]),
        # the most confident object has the colour
        (True, RED, [at("circle", 40, 40, "blue", 0.5), at("circle", 20, 20, "red", 0.9)]),
        (False, RED, [at("circle", 40, 40, "blue", 0.9), at("circle", 20, 20, "red", 0.5)]),
        (True, TWO_COLORS, [at("circle", 20, 20, "red"), at("star", 40, 40, "blue")]),
        (
            False,
            record("colors", CIRCLE, exclude=[STAR]),
            [at("circle", 20, 20), at("star", 40, 40)],
        ),
    ],
)
def test_verdict(expected, record, detections):
    assert correct(record, *detections) is expected


@pytest.mark.parametrize(
    "relation, x, y",
    [("left of", 10, 32), ("right of", 54, 32), ("above", 32, 10), ("below", 32, 54)],
)
def test_position(relation, x, y):
    wanted = record("position", CIRCLE, {**STAR, "position": [relation, 0]})
    assert correct(wanted, at("circle", 32, 32), at("star", x, y))
    assert not correct(wanted, at("circle", 32, 32), at("star", 64 - x, 64 - y))
    assert not correct(wanted, at("star", x, y))


@pytest.mark.parametrize(
    "x, y, expected",
    [
        (30.5, 32, set()),  # offset 1.5 < 0.1 * (10 + 10)
        (29, 32, set()),  # (3 - 2) / 3 is not more than a half
        (27, 32, {"left of"}),  # (5 - 2) / 5 is
        (12, 12, {"left of", "above"}),
    ],
)
def test_relations_have_genevals_margin(x, y, expected):
    assert relations(at("star", x, y), at("circle", 32, 32)) == expected


@pytest.mark.parametrize(
    "expected, further",
    [
        (True, []),
        (False, [at("star", 40, 40)]),
        (False, [at("circle", 40, 40)]),
        (True, [at("star", 40, 40, score=0.2)]),  # not confident enough to be there
    ],
)
def test_the_exact_verdict_forbids_further_objects(expected, further):
    assert correct(ONE, at("circle", 20, 20), *further)
    assert correct(ONE, at("circle", 20, 20), *further, exact=True) is expected


def test_the_reason_says_what_is_missing():
    assert explain(RED, at("circle", 9, 9, "blue")) == (False, "expected red circle, found blue")
    assert explain(ONE, *CIRCLES[:2], exact=True)[1] == "expected 1 in all, found 2"


def test_an_unknown_rule_is_an_error():
    with pytest.raises(ValueError, match="Input should be 'correct', 'score' or 'exact'"):
        GenEval(print, rule="strict")


LEFT = record("position", CIRCLE, {"class": "square", "count": 1, "position": ["left of", 0]})
MIDDLE, BEFORE, BEHIND = at("circle", 40, 20), at("square", 10, 20), at("square", 70, 20)
BLUE_STAR = at("star", 40, 20, "blue")


@pytest.mark.parametrize(
    "record, detections, terms",
    [
        # two-sided in the number of objects of the class
        (THREE, CIRCLES[:3], [1]),
        (THREE, CIRCLES[:2], [2 / 3]),
        (THREE, CIRCLES, [2 / 3]),
        (THREE, [], [0]),
        (THREE, [at("circle", 10 * i, 0) for i in range(7)], [-1 / 3]),
        (ONE, CIRCLES[:2], [0]),  # GenEval ignores a surplus object
        (ONE, [CIRCLES[0], at("star", 40, 40)], [1]),  # of another class, so does this score
        # position, only for an exact number
        (LEFT, [MIDDLE, BEFORE], [1, 1, 1]),
        (LEFT, [MIDDLE, BEHIND], [1, 1, 0, 1]),  # the bug
        (LEFT, [MIDDLE], [1, 0, 0]),
        (LEFT, [BEFORE], [0, 1, 0]),
        (LEFT, [], [0, 0, 0]),
        # colour, only for an exact number
        (TWO_COLORS, [at("circle", 20, 20), BLUE_STAR], [1, 1, 1, 1]),
        (TWO_COLORS, [at("circle", 20, 20), at("star", 40, 20)], [1, 1, 1, 0]),
        (TWO_COLORS, [at("circle", 20, 20), BLUE_STAR, at("star", 50, 50, "blue")], [1, 1, 0, 0]),
    ],
)
def test_the_training_score_is_flow_grpos(record, detections, terms):
    """By hand from `evaluate_reward` of yifan123/reward-server."""
    found = score(record, counted_objects(record, detections, DETECTOR))
    assert found == pytest.approx(sum(terms) / len(terms))
