"""The numbers of the paper (arXiv 2605.08063)."""

from __future__ import annotations


def _table(columns: str, *rows: tuple) -> dict[str, dict]:
    return {ours: dict(zip(columns.split(", "), numbers)) for ours, *numbers in rows}


# By our model's name.
PAPER_MAIN = _table(
    "paper's name, GenEval, OCR, DeQA, PickScore, Average",
    ("base", "SD-3.5-M", 0.63, 0.59, 4.07, 21.64, 0.72),
    ("geneval expert", "GRPO-GenEval", 0.94, 0.65, 4.01, 21.53, 0.81),
    ("ocr expert", "GRPO-OCR", 0.64, 0.92, 4.06, 21.69, 0.80),
    ("deqa expert", "GRPO-DeQA", 0.64, 0.66, 4.23, 23.02, 0.76),
    ("pickscore expert", "GRPO-PickScore", 0.51, 0.69, 4.22, 23.19, 0.73),
    ("GRPO-Mix", "GRPO-Mix 3:1:1", 0.73, 0.83, 4.33, 21.84, 0.82),
    ("student from sft", "Flow-OPD, SFT init", 0.91, 0.92, 4.29, 21.83, 0.88),
    ("student", "Flow-OPD, merge init", 0.92, 0.94, 4.35, 23.08, 0.90),
)
PAPER_OOD = _table(
    "paper's name, colour, shape, 3D-spatial, numeracy, overall",
    ("GRPO-Mix", "GRPO-Mix", 0.692, 0.611, 0.422, 0.641, 0.587),
    ("merged", "cold start", 0.710, 0.613, 0.425, 0.646, 0.595),
    ("student", "Flow-OPD", 0.719, 0.629, 0.457, 0.684, 0.618),
)
PAPER_MAR = _table(
    "ImageReward, Aesthetic, HPS-v2.1, QwenVL",
    ("base", 1.02, 5.87, 0.298, 3.45),
    ("GRPO-Mix", 1.23, 5.93, 0.310, 3.88),
    ("without MAR", 1.26, 5.89, 0.300, 3.82),
    ("with MAR", 1.36, 6.23, 0.330, 4.05),
)
PAPER_COST = {"nodes": 4, "H800 a node": 8, "hours": 50}
