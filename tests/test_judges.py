"""The judges' held-out figures, on small samples; the notebook measures them on large ones."""

import pytest

from flowopd_lib import load_world
from flowopd_lib.stats import GOLD
from flowopd_lib.worlds.tiny.judging import judge_judges

WORLD = load_world()


JUDGES = [name + twin for name in ("GenEval", "OCR", "PickScore", "DeQA") for twin in ("", GOLD)]


@pytest.fixture(scope="module")
def tests(judges):
    return judge_judges(judges | WORLD.unseen_judges("cpu"), n=120, seed=1)[0]


@pytest.mark.parametrize("judge", JUDGES)
def test_no_judge_is_below_its_aim(tests, judge):
    """A judge fails if chance does not explain it: if its aim lies above the whole 95 % interval."""
    for _, row in tests[tests["judge"] == judge].iterrows():
        assert row["high"] >= row["aim"], (
            f"{row['judge']} {row['test']}: {row['value']:.3f}, aim {row['aim']}"
        )


def test_every_judge_is_judged(tests):
    assert list(tests["judge"].unique()) == JUDGES
    assert (
        (tests["n"] == 120).all()
        and (tests["low"] <= tests["value"]).all()
        and (tests["value"] <= tests["high"]).all()
    )


def test_a_blind_judge_would_be_found_out(judges):
    """The same tests reject judges that always say the same."""

    class Blind:
        def __init__(self, judge):
            self.judge = judge

        def __call__(self, images, prompts):
            return self.judge(images, prompts) * 0 + 1

        def read(self, images, prompts):
            return ["AB"] * len(images)

    rows = judge_judges(
        {name: Blind(judge) for name, judge in judges.items() if name != "DeQA"} | {"DeQA": judges["DeQA"]},
        n=60,
    )[0].set_index("test")
    assert rows.loc["rejects renders of a wrong caption", "high"] < 0.5
    assert rows.loc["reads clean signs exactly", "high"] < 0.5
    assert rows[rows["judge"] == "PickScore"]["value"].item() == 0


def test_clean_renders_are_right_for_the_prompts_of_the_files(judges, test_prompts):
    for task, judge in (("geneval", "GenEval"), ("ocr", "OCR")):
        pictures = WORLD.truth.clean_renders(task, "test", 24)
        assert judges[judge](pictures, test_prompts[task][:24]).mean() > 0.9
    with pytest.raises(ValueError, match="300 prompts a task, not 301"):
        WORLD.truth.clean_renders("ocr", "test", 301)
