"""The benchmarks of cleaning at smoke size; the near duplicates' goals hold there too."""

import re
from pathlib import Path

import pytest

pytest.importorskip("rensa")
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def near(load_benchmark):
    return load_benchmark("near_duplicates")


@pytest.fixture(scope="module")
def cleaning(load_benchmark):
    return load_benchmark("clean")


def test_near_duplicates_reach_their_goals(near, capsys):
    near.main(["--rows", "1500"])
    out = capsys.readouterr().out
    assert re.search(r"^en: recall [\d.]+, precision [\d.]+; \d of 200 tasks", out, re.MULTILINE)
    assert "no goal" in out


def test_a_missed_goal_ends_with_an_error(near, monkeypatch):
    monkeypatch.setattr(near, "dropped", lambda texts: {1, 2, 3, 4})
    with pytest.raises(SystemExit, match=r"recall of please is .*, below 0\.95.*precision is"):
        near.main(["--rows", "300"])


def test_the_set_is_what_it_says(near):
    rows = near.plant(440, seed=3)
    assert rows == near.plant(440, seed=3)
    copies = [row for row in rows if row.of >= 0]
    originals = {row.original: row.text for row in rows if row.of < 0}
    assert len(originals) == 400 and len(copies) == 40
    assert {row.lang for row in copies} == {"en", "zh"}
    assert all(row.text != originals[row.of] for row in copies if row.kind in ("put in", "taken out", "please"))


def test_scores_count_the_later_row_of_a_pair(near):
    rows = [
        near.Planted("b", "en", of=7, kind="case"),
        near.Planted("a", "en", original=7),
        near.Planted("c", "zh", original=8),
    ]
    assert near.score(rows, {1}) == ({("en", "case"): (1, 1)}, {"en": 1.0, "zh": 1.0})
    assert near.score(rows, {0, 1, 2}) == ({("en", "case"): (1, 1)}, {"en": 0.5, "zh": 0.0})


@pytest.mark.slow
def test_speeds(cleaning, capsys):
    cleaning.main(["--rows", "300", "600", "--filters", "reading alone", "NearDuplicate"])
    out = capsys.readouterr().out
    assert re.findall(r"^(reading alone|NearDuplicate) +(300|600)", out, re.MULTILINE) == [
        ("reading alone", "300"),
        ("NearDuplicate", "300"),
        ("reading alone", "600"),
        ("NearDuplicate", "600"),
    ]
    assert "Missed" in out or "All goals" in out


def test_rows_have_the_lengths_that_are_named(cleaning):
    rows = list(cleaning.rows(40, 0))
    assert {row["lang"] for row in rows} == {"en", "zh"}
    assert all(abs(len(cleaning.tokens(row["instruction"])) - 60) <= 6 for row in rows)
