"""Curves of losses and metrics that runs of tests/strategies/run.py have written."""

import json

import torch


def curve(place):
    """What a run logged, a row per step; its errors fail the test."""
    errors = "\n".join(file.read_text() for file in sorted(place.glob("error-*.txt")))
    assert not errors, errors
    rows = json.loads((place / "curve.json").read_text())
    # what a first step logs in on_train_batch_end is there at the second
    return torch.tensor([[float("nan") if v is None else v for v in row] for row in rows], dtype=torch.float64)


def largest_difference(a, b):
    """Between two curves, which lack the same values."""
    assert a.shape == b.shape and len(a), (a.shape, b.shape)
    assert torch.equal(a.isnan(), b.isnan())
    return (a - b).abs().nan_to_num(0).max().item()
