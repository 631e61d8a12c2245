"""The gallery's selection, its pictures on disk, and what it shows where there are no widgets."""

import io

import numpy as np
import pandas as pd
import pytest
import torch
from flowopd_lib.looking import gallery
from PIL import Image

from flowopd_lib import Sampler, evaluate
from flowopd_lib.plots.gallery import (
    TEACHER,
    Query,
    Samples,
    code_of,
    contact_sheet,
    disagreements,
    load_samples,
    page_of,
    redraw,
    rows_of,
    select,
    with_splits,
)
from flowopd_lib.thumbnails import read_thumbnail, webp, write_thumbnails

MODELS = ("base", "ocr expert", "student")


def made_up(folder, n=4):
    """`n` GenEval prompts and `n` signs under three models, with scores that say which is which and plain
    pictures."""
    rows = []
    for m, model in enumerate(MODELS):
        places = write_thumbnails(
            folder / "pictures", m, model, [webp(torch.full((3, 8, 8), 0.1 * m + 0.2))] * (2 * n)
        )
        for i in range(2 * n):
            sign = i >= n
            rows.append(
                {
                    "model": model,
                    "task": "ocr" if sign else "geneval",
                    "tag": "ocr" if sign else "counting",
                    "seed": 50 + i,
                    "prompt": f'a sign that says "{chr(65 + i)}"'
                    if sign
                    else f"a photo of {i} red stars",
                    "picture": places[i],
                    "GenEval": np.nan if sign else float((i + m) % 2),
                    "OCR": i / 10 + m * (-1) ** i / 100 if sign else np.nan,
                    "DeQA": 1.0 + m + i / 10,
                }
            )
    return Samples(pd.DataFrame(rows), folder)


def test_select_filters_sorts_and_keeps_the_noise_together(tmp_path):
    s = made_up(tmp_path)
    seeds = lambda grid, c=0: s.table["seed"].iloc[grid[:, c]].tolist()  # noqa: E731
    assert select(s, Query()).shape == (8, 3) and seeds(select(s, Query())) == [
        50,
        54,
        51,
        55,
        52,
        56,
        53,
        57,
    ], "tasks in turn"
    assert seeds(select(s, Query(search="RED 2"))) == [52] and seeds(
        select(s, Query(task="ocr"))
    ) == [54, 55, 56, 57]
    assert seeds(select(s, Query(tag="counting", prompt="a photo of 1 red stars"))) == [51]
    assert len(select(s, Query(search="nothing like it"))) == 0
    by_score = select(s, Query(sort="OCR", of="student"), ["student", "base"])
    # .68 to .42 by the student, the same noise beside it
    assert seeds(by_score)[:4] == [57, 56, 55, 54] and seeds(by_score, 1) == seeds(by_score)
    # no score: last
    assert set(seeds(by_score)[4:]) == {50, 51, 52, 53}
    assert seeds(select(s, Query(sort="OCR", of="student", descending=False)))[4:] == [
        50,
        51,
        52,
        53,
    ]
    low = select(s, Query(ranges={"DeQA": (3.25, 3.45)}, of="student"))
    assert seeds(low) == [54, 53]
    assert seeds(select(s, Query(ranges={"OCR": (0, 1)}))) == [54, 55, 56, 57]


def test_sorting_by_disagreement_asks_the_prompts_own_teacher(tmp_path):
    s = made_up(tmp_path)
    assert s.teacher("ocr") == "ocr expert" and s.teacher("geneval") is None
    grid = select(s, Query(sort="OCR", of="student", against=TEACHER, descending=False))
    assert s.table["seed"].iloc[grid[:2, 0]].tolist() == [55, 57]  # there the student is .01 below
    worst = disagreements(s, "student", "OCR", "ocr expert")
    assert disagreements(s, "student", "DeQA", "base", "ocr").empty
    assert sorted(worst["seed"]) == [55, 57] and worst["difference"].tolist() == pytest.approx(
        [-0.01, -0.01]
    )
    with pytest.raises(
        ValueError, match="no model 'studnt' here; there are base, ocr expert, student"
    ):
        select(s, Query(of="studnt"))
    with pytest.raises(ValueError, match="no reward 'Taste'"):
        select(s, Query(sort="Taste"))


def test_unlocked_every_model_has_its_own_order(tmp_path):
    s = made_up(tmp_path)
    grid = select(s, Query(task="geneval", sort="GenEval", locked=False))
    assert s.table["GenEval"].to_numpy()[grid].tolist() == [[1] * 3, [1] * 3, [0] * 3, [0] * 3]
    assert len({s.table["seed"].iloc[p] for p in grid[0]}) == 2
    few = select(s, Query(ranges={"DeQA": (0, 1.25)}, locked=False))
    assert few.shape == (3, 3) and (few[:, 1:] == -1).all()


def test_pages_pins_and_rows(tmp_path):
    s = made_up(tmp_path)
    grid = select(s, Query())
    assert (
        page_of(grid, 1, 3).tolist() == grid[3:6].tolist()
        and page_of(grid, 99, 3).tolist() == grid[6:].tolist()
    )
    assert len(page_of(grid[:0], 0, 3)) == 0
    assert select(s, Query(pinned=(int(grid[1, 2]),))).tolist() == [grid[1].tolist()]
    rows = rows_of(s, grid[[1, 3]])
    assert rows["row"].tolist() == [0, 0, 0, 1, 1, 1] and rows["model"].tolist() == list(MODELS) * 2
    assert rows["OCR - base"].tolist() == pytest.approx([0, 0.01, 0.02, 0, -0.01, -0.02])
    assert s.scores(int(grid[1, 2])) == [
        ("OCR", pytest.approx(0.42), pytest.approx(0.02)),
        ("DeQA", pytest.approx(3.4), pytest.approx(2.0)),
    ]
    assert s.under(int(grid[1, 2]), "base") == grid[1, 0]
    assert s.alt(int(grid[1, 2])) == 'student, seed 54: a sign that says "E"; OCR 0.42, DeQA 3.40'


def test_a_sheet_shows_every_sample(tmp_path):
    s = made_up(tmp_path)
    grid = select(s, Query(), ["base", "student"])[:2]
    sheet = contact_sheet(s, grid, ["base", "student"], 64)
    colors = {c for _, c in sheet.getcolors(1 << 20)}
    assert (
        sum(
            sheet.getpixel((x, y)) != (255, 255, 255)
            for x in range(0, sheet.width, 8)
            for y in range(0, sheet.height, 8)
        )
        > 200
    )
    assert {(51, 51, 51), (102, 102, 102)} <= colors  # .2 and .4


def by_itself(policy, rewards, by_split, models, folder, **how):
    """Each split evaluated by itself, with pictures."""
    return {
        split: evaluate(
            policy,
            prompts,
            {"DeQA": rewards["DeQA"]},
            9,
            Sampler(2),
            models,
            progress=False,
            pictures=folder / split / "pictures",
            **how,
        )
        for split, prompts in by_split.items()
    }


def test_evaluate_keeps_thumbnails_and_a_sample_is_drawn_again(
    policy, rewards, test_prompts, tmp_path
):
    prompts = test_prompts["ocr"][:3] + test_prompts["geneval"][:3]
    models = {"base": None, "same": None}
    tables = by_itself(policy, rewards, {"test": prompts[:4], "ood": prompts[4:]}, models, tmp_path)
    s = with_splits(tables, tmp_path)
    for split in tables:
        assert sorted(p.name for p in (tmp_path / split / "pictures").iterdir()) == [
            "00_base.zip",
            "01_same.zip",
            "about.json",
        ]
    assert (
        list(s.prompts) == [("ocr", "test"), ("geneval", "test"), ("geneval", "ood")]
        and len(select(s, Query(split="ood"))) == 2
    )
    # of each split the base's, then the same again
    assert s.picture(8) == s.picture(10) and s.picture(8) != s.picture(9)
    assert s.picture(1) == s.picture(5) and s.picture(1) != s.picture(2)
    assert Image.open(io.BytesIO(s.picture(0))).size == (64, 64)
    image = redraw(policy, s, 8)
    thumbnail = np.asarray(Image.open(io.BytesIO(s.picture(8)))) / 255
    # lossy (two steps leave noise), but the same picture
    assert np.abs(image.permute(1, 2, 0).numpy() - thumbnail).mean() < 0.04
    assert float(rewards["DeQA"](image[None], prompts[4:5])[0]) == pytest.approx(
        s.table["DeQA"][8], abs=1e-5
    )
    code = code_of(s, 8, "policy = ...")
    assert "redraw(policy, samples, 8)" in code and compile(code, "cell", "exec")
    table = evaluate(
        policy, prompts[:1], {"DeQA": rewards["DeQA"]}, sampler=Sampler(1), progress=False
    )
    assert "picture" not in table
    with pytest.raises(ValueError, match="picture; evaluate with pictures="):
        Samples(table, tmp_path)


def test_a_sample_is_drawn_again_as_it_was_drawn_in_its_batch_and_with_its_adapters_guidance(
    benchmark, rewards, test_prompts, tmp_path, monkeypatch
):
    policy, asked = benchmark.policy(device="cpu"), []
    policy.load_adapter("ocr", benchmark.adapter("ocr"))
    prompts = test_prompts["ocr"]
    by_split, models = (
        {"test": prompts[:3], "ood": prompts[3:5]},
        {"base": None, "ocr expert": "ocr"},
    )
    tables = by_itself(policy, rewards, by_split, models, tmp_path, batch=2, guidance={"ocr": 4.0})
    s, draw = with_splits(tables, tmp_path), gallery.sample
    monkeypatch.setattr(
        gallery, "sample", lambda *arguments: (asked.append(arguments), draw(*arguments))[1]
    )
    for position, (prompt, seed, together) in {
        2: (prompts[2], 11, prompts[2:3]),
        5: (prompts[2], 11, prompts[2:3]),
        7: (prompts[4], 10, prompts[3:5]),
        9: (prompts[4], 10, prompts[3:5]),
    }.items():
        image, (_, drawn, seeds, sampler, adapter, _) = redraw(policy, s, position), asked[-1]
        own = {"ocr": 4.0, None: 1.0}[adapter]
        assert (drawn, sampler.guidance) == (together, own) and seeds[drawn.index(prompt)] == seed
        assert adapter == ("ocr" if s.table["model"][position] == "ocr expert" else None)
        assert float(rewards["DeQA"](image[None], [prompt])[0]) == pytest.approx(
            s.table["DeQA"][position], abs=1e-5
        )


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no samples.parquet"):
        load_samples(tmp_path)
    with pytest.raises(FileNotFoundError, match="no picture pictures/00_base.zip/0.webp"):
        read_thumbnail(tmp_path, "pictures/00_base.zip/0.webp")
    with pytest.raises(
        ValueError, match="about.json does not say with which adapter base was drawn"
    ):
        redraw(None, made_up(tmp_path), 0)
