"""Contestants import nothing anew."""

import sys

import pytest
from forked import python


@pytest.fixture(autouse=True)
def forks(monkeypatch):
    """Processes of benchmarks are forked from one that has imported torch."""
    monkeypatch.setattr(sys, "executable", python())
