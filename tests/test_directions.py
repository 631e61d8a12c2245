"""What a step along an expert does."""

import pandas as pd
import pytest
import torch

from flowopd_lib.jobs.site import Site
from flowopd_lib.studies.directions import adapter_of, along, changes


def delta(policy, adapter):
    lora = policy.adapter(adapter)
    return {place: lora.alpha[place] / len(a) * lora.b[place] @ a for place, a in lora.a.items()}


def test_a_step_along_an_expert_is_so_much_of_its_change(world):
    site = Site(world, "float32")
    for name in ("ocr", "deqa"):
        site.adapter(name)
    ocr, deqa = delta(site.policy, "ocr"), delta(site.policy, "deqa")
    for model, source in along(["ocr"], [-0.5, 0.25]).items():
        site.adapter(adapter_of(model), source)
    for model, source in along(["ocr"], [0.5], "merged", ["ocr", "deqa"]).items():
        site.adapter(adapter_of(model), source)
    back, forth = delta(site.policy, "ocr_-0_5"), delta(site.policy, "ocr_+0_25")
    from_mean = delta(site.policy, "merged_ocr_+0_5")
    for place, change in ocr.items():
        torch.testing.assert_close(back[place], -0.5 * change)
        torch.testing.assert_close(forth[place], 0.25 * change)
        torch.testing.assert_close(from_mean[place], change + 0.5 * deqa[place])
    with pytest.raises(ValueError, match="size 0 goes nowhere"):
        along(["ocr"], [0.5, 0.0])


def test_changes_are_paired_and_in_shares_of_the_full_scale():
    home = (("OCR", "ocr", 1.0), ("DeQA", "pickscore", 5.0))
    rows = [
        {"model": model, "task": task, "prompt": f"{task} {i}", judge: i + gain * full}
        for model, gain in (("base", 0.0), ("ocr +0.5", 0.1), ("ocr -1", -0.3), ("merged ocr +0.5", 9.0))
        for judge, task, full in home
        for i in range(5)
    ]
    found = changes(pd.DataFrame(rows), home, ["ocr"], [0.5, -1.0]).set_index(["along", "size", "judge"])
    assert len(found) == 4 and set(found["n"]) == {5}
    for size, gain in ((0.5, 0.1), (-1.0, -0.3)):
        for judge in ("OCR", "DeQA"):
            row = found.loc[("ocr", size, judge)]
            assert list(row[["mean", "low", "high"]]) == pytest.approx([gain] * 3)
