"""Ranks that run one copy of a model together, against one process."""

import json

import pytest
import torch
from curves import curve, largest_difference
from processes import run_ranks


def run_cases(script, out, *arguments, ranks=2):
    """What each rank of a script found, by case; the script writes ``rankN.pt`` to the folder ``out``."""
    run_ranks(script, out, *arguments, ranks=ranks, logs=out)
    return [torch.load(out / f"rank{rank}.pt", weights_only=False) for rank in range(ranks)]


def values(found, name):
    """A case's values on all ranks; an error of a case is the test's."""
    for side in found:
        assert "Traceback" not in str(side[name]), side[name]
    return [side[name] for side in found]


def assert_same_run(meshed, plain):
    """Two folders of runs have the same curve, and weights that differ by rounding."""
    assert largest_difference(curve(meshed), curve(plain)) < 1e-5
    a, b = (torch.load(place / "weights.pt") for place in (meshed, plain))
    assert a.keys() == b.keys()
    assert max((a[k] - b[k]).abs().max().item() for k in a) < 2e-3  # Adam makes whole steps of rounding


def assert_same_scores(meshed, plain):
    """Validation before and after training said the same in two folders of runs."""
    both = (json.loads((place / "scores.json").read_text()) for place in (meshed, plain))
    for before, after in zip(*both, strict=True):
        assert before[0] == pytest.approx(after[0], rel=1e-5, abs=1e-5)
