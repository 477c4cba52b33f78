"""What ranks exchange in a step of the Trainer is what formulas say, to the byte."""

import sys
from pathlib import Path

import pytest
from forked import python
from runs import load_script

ROOT = Path(__file__).resolve().parents[3]
pytestmark = [pytest.mark.slow, pytest.mark.distributed]


@pytest.fixture(scope="module")
def parallel():
    before = list(sys.path)
    module = load_script(ROOT / "benchmarks" / "parallel.py")
    yield module
    sys.path[:] = before


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Ranks find the package, and are forked from a process that has imported torch."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(sys, "executable", python())


def exchanged(parallel, mesh, *more):
    """Bytes of the rank with the most, and those by formula, by kind."""
    options = parallel.parse(["--bytes", "--width", "32", "--vocab-size", "64", "--rows", "4", "--length", "12", *more])
    found = parallel.launch(options, mesh)
    most = {kind: max(rank[kind][1] for rank in found if kind in rank) for rank in found for kind in rank}
    small = most.pop(parallel.OTHERS, 0)
    # losses, log-probs and what is right of the scored tokens, and their shapes and types
    assert small <= 9 * options.rows * options.length + 2048
    return most, parallel.by_formula(options, parallel.Grid.read(mesh))


@pytest.mark.parametrize("mesh", ["dp2", "tp2", "sp2", "pp2"])
def test_bytes_of_a_step(parallel, mesh):
    found, formula = exchanged(parallel, mesh, "--layers", "2")
    assert found == formula


@pytest.mark.exhaustive
@pytest.mark.parametrize("mesh", ["tp2_dp2", "tp2_sp2", "pp2_dp2", "pp3"])
def test_bytes_of_a_step_of_more_ranks(parallel, mesh):
    found, formula = exchanged(parallel, mesh, "--layers", "3")
    assert found == formula


@pytest.mark.exhaustive
def test_bytes_of_slices_in_stages(parallel):
    """The first stage sums embeddings, and the last one what its head reads."""
    found, formula = exchanged(parallel, "tp2_pp2", "--layers", "2")
    assert found == formula
