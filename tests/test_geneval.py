"""GenEval's rule on hand-made detections: each tag, right and wrong."""

import pytest

from flowopd_lib.rewards import Detection, GenEval
from flowopd_lib.rewards.geneval import relations, reward, score


def at(label, x, y, color="red", score=0.95, size=10):
    return Detection(label, color, score, (x - size / 2, y - size / 2, x + size / 2, y + size / 2))


def right(record, *detections):
    return reward(record, detections, threshold=0.3, counting_threshold=0.9)[0]


def record(tag, *include, exclude=()):
    return {"tag": tag, "include": list(include), "exclude": list(exclude), "prompt": "p"}


CIRCLE, STAR = {"class": "circle", "count": 1}, {"class": "star", "count": 1}


def test_single_object():
    assert right(record("single_object", CIRCLE), at("circle", 20, 20))
    # others do not matter
    assert right(record("single_object", CIRCLE), at("circle", 20, 20), at("star", 40, 40))
    assert not right(record("single_object", CIRCLE), at("star", 20, 20))
    assert not right(record("single_object", CIRCLE), at("circle", 20, 20, score=0.2))
    assert not right(record("single_object", CIRCLE))


def test_two_object():
    assert right(record("two_object", CIRCLE, STAR), at("star", 20, 20), at("circle", 40, 40))
    assert not right(record("two_object", CIRCLE, STAR), at("circle", 20, 20), at("circle", 40, 40))


def test_counting_needs_the_exact_number_and_the_higher_confidence():
    three = record(
        "counting", {"class": "circle", "count": 3}, exclude=[{"class": "circle", "count": 4}]
    )
    circles = [at("circle", x, 20) for x in (10, 25, 40, 55)]
    assert right(three, *circles[:3])
    assert not right(three, *circles[:2])
    assert not right(three, *circles)
    assert right(
        three, *circles[:3], at("circle", 10, 50, score=0.85)
    )  # not sure enough to be counted
    assert not right(three, *circles[:2], at("circle", 10, 50, score=0.85))


def test_colors():
    red = record("colors", {**CIRCLE, "color": "red"})
    assert right(red, at("circle", 20, 20, "red"))
    assert not right(red, at("circle", 20, 20, "blue"))
    assert not right(red, at("circle", 20, 20, None))


def test_color_is_asked_of_the_most_certain_object():
    red = record("colors", {**CIRCLE, "color": "red"})
    assert right(red, at("circle", 40, 40, "blue", 0.5), at("circle", 20, 20, "red", 0.9))
    assert not right(red, at("circle", 40, 40, "blue", 0.9), at("circle", 20, 20, "red", 0.5))


@pytest.mark.parametrize(
    "relation, x, y",
    [("left of", 10, 32), ("right of", 54, 32), ("above", 32, 10), ("below", 32, 54)],
)
def test_position(relation, x, y):
    wanted = record("position", CIRCLE, {**STAR, "position": [relation, 0]})
    assert right(wanted, at("circle", 32, 32), at("star", x, y))
    assert not right(wanted, at("circle", 32, 32), at("star", 64 - x, 64 - y))
    assert not right(wanted, at("star", x, y))


def test_the_exact_verdict_forbids_what_nobody_asked_for():
    one, circle, star = record("single_object", CIRCLE), at("circle", 20, 20), at("star", 40, 40)
    assert right(one, circle, star) and right(one, circle, circle)
    for found, told in (
        ([circle], True),
        ([circle, star], False),
        ([circle, at("circle", 40, 40)], False),
    ):
        assert reward(one, found, 0.3, 0.9, exact=True)[0] is told
    # what is too faint to be there is not too many
    assert reward(one, [circle, at("star", 40, 40, score=0.2)], 0.3, 0.9, exact=True)[0]
    assert (
        reward(one, [circle, at("star", 40, 40)], 0.3, 0.9, exact=True)[1]
        == "expected 1 in all, found 2"
    )
    with pytest.raises(
        ValueError, match="unknown rule 'strict' of GenEval: choose one of correct, score"
    ):
        GenEval(None, rule="strict")


def test_position_has_genevals_margin():
    # offset 1.5 < 0.1 * (10 + 10)
    assert relations(at("star", 30.5, 32), at("circle", 32, 32)) == set()
    # (3 - 2) / 3 is not more than a half
    assert relations(at("star", 29, 32), at("circle", 32, 32)) == set()
    assert relations(at("star", 27, 32), at("circle", 32, 32)) == {"left of"}  # (5 - 2) / 5 is
    assert relations(at("star", 12, 12), at("circle", 32, 32)) == {"left of", "above"}


def test_color_attr_binds_each_colour_to_its_object():
    both = record("color_attr", {**CIRCLE, "color": "red"}, {**STAR, "color": "blue"})
    assert right(both, at("circle", 20, 20, "red"), at("star", 40, 40, "blue"))
    assert not right(both, at("circle", 20, 20, "blue"), at("star", 40, 40, "red"))


def test_exclusion():
    alone = record("single_object", CIRCLE, exclude=[{"class": "star", "count": 1}])
    assert right(alone, at("circle", 20, 20))
    assert not right(alone, at("circle", 20, 20), at("star", 40, 40))


def test_the_reason_says_what_is_missing():
    assert reward(
        record("colors", {**CIRCLE, "color": "red"}), [at("circle", 9, 9, "blue")], 0.3, 0.9
    ) == (False, "expected red circle, found blue")


def test_flow_grpos_score_is_two_sided_and_pays_colour_and_position_only_for_an_exact_number():
    """Every value by hand from `evaluate_reward` of yifan123/reward-server."""

    def paid(record, *detections):
        return score(record, detections, threshold=0.3, counting_threshold=0.9)

    three = record(
        "counting", {"class": "circle", "count": 3}, exclude=[{"class": "circle", "count": 4}]
    )
    for n, wanted in ((3, 1.0), (2, 2 / 3), (4, 2 / 3), (0, 0.0), (7, -1 / 3)):
        assert paid(three, *[at("circle", 10 * i, 0) for i in range(n)]) == pytest.approx(wanted)
    # a surplus object is free for GenEval, and costs all of it here; one of another class is free in both
    one, circles = record("single_object", CIRCLE), [at("circle", x, 0) for x in (10, 30)]
    assert right(one, *circles) and paid(one, *circles) == 0.0
    assert paid(one, circles[0], at("star", 40, 40)) == 1.0
    left = record("position", CIRCLE, {"class": "square", "count": 1, "position": ["left of", 0]})
    circle, before, behind = at("circle", 40, 20), at("square", 10, 20), at("square", 70, 20)
    for found, terms in (
        ([circle, before], [1, 1, 1]),
        ([circle, behind], [1, 1, 0, 1]),  # the slip
        ([circle], [1, 0, 0]),
        ([before], [0, 1, 0]),
        ([], [0, 0, 0]),
    ):
        assert paid(left, *found) == pytest.approx(sum(terms) / len(terms))
    both = record("color_attr", {**CIRCLE, "color": "red"}, {**STAR, "color": "blue"})
    red, blue, wrong = at("circle", 20, 20), at("star", 40, 20, "blue"), at("star", 40, 20)
    assert paid(both, red, blue) == 1.0 and paid(both, red, wrong) == 0.75
    assert paid(both, red, blue, at("star", 50, 50, "blue")) == 0.5
