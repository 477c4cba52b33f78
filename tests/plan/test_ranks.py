"""What is foretold of a rank of several, beside real runs of two and four processes: rows of the docs' table."""

from pathlib import Path

import pytest
import torch.distributed as dist
from forked import python

from lightning_rlhf.plan.ranks import one_rank

from .table import FURTHER, LAYOUTS, ROWS, compare, faults, name_of, size_of

#: Rows that CI runs: a way of sharing each, and a stage that samples.
CHOSEN = {
    "sft, Gemini, bf16-mixed",
    "sft, `tp=2`",
    "sft, `pp=2` in 2 parts",
    "sft, ZeRO-1, `sp=2`; two processes",
    "ppo, ZeRO-2, bf16-mixed",
}
SEVERAL = [row for row in ROWS if row.devices > 1]


def test_a_rank_makes_no_second_group():
    with one_rank(2, 2) as mesh:
        assert mesh.tensor.members == (2, 3) and mesh.sequence.members == (0, 2) and mesh.sequence.place == 1
        with pytest.raises(ValueError, match=r"planning sp=2 .* this process has one already"), one_rank(1, 2):
            pass
    assert not dist.is_initialized()


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    "row",
    [pytest.param(row, marks=() if row.title in CHOSEN else pytest.mark.exhaustive) for row in SEVERAL],
    ids=lambda row: row.title,
)
def test_a_rank_of_several(row, small_models, tmp_path):
    if row.strategy["plugin"] != "ddp":
        pytest.importorskip("colossalai")
    assert faults(row, compare(row, small_models[size_of(row)], tmp_path, python())) == []


def test_rows_are_those_of_the_docs():
    text = (Path(__file__).resolve().parents[2] / "docs" / "plan.md").read_text(encoding="utf-8")
    assert {row.title for row in SEVERAL} >= CHOSEN
    for name in (*LAYOUTS, *map(name_of, FURTHER)):
        assert any(f"\n| {name}{end} |" in text for end in ("", ", the first stage", "; the first stage")), name
