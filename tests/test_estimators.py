"""The comparison of estimators finds the bias and the noise that were put in."""

import pytest
import torch

from flowopd_lib.studies.estimators import compare_estimators


def test_bias_and_noise_are_found():
    g = torch.Generator().manual_seed(0)
    mean = torch.randn(400, generator=g)

    def made(size, noise, n=24):
        return size * mean + noise * torch.randn(n, 400, generator=g)

    rows = compare_estimators(
        {"pathwise": made(1.0, 0.5), "half": made(0.5, 2.0), "nothing": made(0.0, 3.0)}
    ).set_index("estimator")
    for name, size, noise in (("pathwise", 1.0, 0.5), ("half", 0.5, 2.0), ("nothing", 0.0, 3.0)):
        row = rows.loc[name]
        assert abs(row["mean along pathwise"] - size) < 4 * row["se"] + 1e-9, name
        assert row["noise"] == pytest.approx(noise**2 * 400 / float(mean @ mean), rel=0.2), name
    assert (
        rows.loc["pathwise", "mean along pathwise"] == 1
        and 0 < rows.loc["half", "se"] < rows.loc["nothing", "se"] < 0.1
    )
    with pytest.raises(ValueError, match="at least 3"):
        compare_estimators({"pathwise": torch.ones(2, 4)})
