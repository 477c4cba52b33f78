"""What tests of the benchmarks share: their scripts, their printed tables, and processes that import nothing anew."""

import sys
from pathlib import Path

import pytest
from forked import python
from runs import load_script

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def forks(monkeypatch):
    """Processes of benchmarks are forked from one that has imported torch."""
    monkeypatch.setattr(sys, "executable", python())


@pytest.fixture(scope="module")
def load_benchmark():
    """Loads a script of ``benchmarks/`` by its name. The scripts put their folder on ``sys.path``, which is undone."""
    before = list(sys.path)
    yield lambda name: load_script(BENCHMARKS / f"{name}.py")
    sys.path[:] = before
