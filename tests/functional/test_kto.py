"""KTO's loss is the paper's: values of an independent script, and the limits that the formula has."""

import json
from pathlib import Path

import pytest
import torch

from lightning_rlhf.functional import apo_zero_unpaired_loss, kto_loss, kto_reference_point

CHECKED = json.loads((Path(__file__).parents[1] / "assets" / "kto_losses.json").read_text())
CASES = [case for case in CHECKED["losses"] if case["name"] == "kto"]


def ratios(rows, policy, dtype=torch.float64):
    """(S,) summed log-ratios."""
    reference = torch.tensor([x for row in rows for x in row["reference"]], dtype=dtype)
    sequence = torch.arange(len(rows)).repeat_interleave(torch.tensor([len(row["policy"]) for row in rows]))
    return torch.zeros(len(rows), dtype=dtype).index_add(0, sequence, policy - reference)


def tokens(rows, dtype=torch.float64):
    return torch.tensor([x for row in rows for x in row["policy"]], dtype=dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("case", CHECKED["losses"], ids=lambda c: f"{c['name']}-{c.get('case')}-{c['settings']}")
def test_values_and_gradients_are_those_of_an_independent_script(case, dtype, tolerance):
    policy = tokens(CHECKED["rows"], dtype).requires_grad_()
    ratio = ratios(CHECKED["rows"], policy, dtype)
    desirable = torch.tensor([row["desirable"] for row in CHECKED["rows"]])
    if case["name"] == "kto":
        rows = CHECKED["mismatched" if case["kl_raw"] > 0 else "mismatched_low"]
        mismatched = ratios(rows, tokens(rows, dtype), dtype)
        point = kto_reference_point(mismatched.sum(), len(rows))
        assert point.item() == pytest.approx(case["z0"], abs=tolerance)
        loss = kto_loss(ratio, desirable, point, **case["settings"])
        want = torch.tensor(case["per_row"], dtype=torch.float64)
        torch.testing.assert_close(loss.double(), want, rtol=tolerance, atol=tolerance)
    else:
        loss = apo_zero_unpaired_loss(ratio, desirable, **case["settings"])
    loss.mean().backward()
    gradient = torch.tensor([x for row in case["gradient"] for x in row], dtype=torch.float64)
    torch.testing.assert_close(policy.grad.double(), gradient, rtol=tolerance, atol=tolerance)


def test_the_reference_point_has_no_gradient_and_depends_on_the_split():
    mismatched = ratios(CHECKED["mismatched"], tokens(CHECKED["mismatched"]).requires_grad_())
    assert not kto_reference_point(mismatched.sum(), 5).requires_grad
    parts = [kto_reference_point(mismatched[s].sum(), n).item() for s, n in ((slice(2), 2), (slice(2, 5), 3))]
    assert parts == pytest.approx([CHECKED["split"]["z0_rows_0_1"], CHECKED["split"]["z0_rows_2_4"]], abs=1e-12)
    assert kto_reference_point(torch.zeros(()), 0).item() == 0  # a rank without rows


@pytest.mark.parametrize("ratio", [-1e4, 1e4])
def test_finite_at_any_ratio(ratio):
    r = torch.full((2,), ratio, requires_grad=True)
    loss = kto_loss(r, torch.tensor([True, False]), 0.0)
    loss.sum().backward()
    assert loss.tolist() == [float(ratio < 0), float(ratio > 0)] and r.grad.tolist() == [0, 0]
