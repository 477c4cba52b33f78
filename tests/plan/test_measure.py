"""What is foretold of one process, beside real runs: rows of the docs' table."""

import pytest

from .table import ALONE, FURTHER, compare, faults, size_of

SLOW = [row for row in FURTHER if row.devices == 1]


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "row", [*ALONE, *(pytest.param(row, marks=pytest.mark.slow) for row in SLOW)], ids=lambda row: row.title
)
def test_a_process(row, small_models, tmp_path):
    assert faults(row, compare(row, small_models[size_of(row)], tmp_path)) == []
