"""The serving benchmark at smoke size: the same work for all, and honest tables. No time is asserted."""

import asyncio
from pathlib import Path

import pytest
from tables import cells

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SMALL = ["--rounds", "1", "--count", "4", "--new", "6", "--width", "32", "--layers", "1"]


@pytest.fixture(scope="module")
def serving(load_benchmark):
    pytest.importorskip("psutil")
    return load_benchmark("serving")


def test_both_ways_make_as_many_tokens(serving, monkeypatch):
    monkeypatch.undo()  # a server that is forked takes its CPU time elsewhere
    monkeypatch.setenv("PYTHONPATH", str(BENCHMARKS.parent))
    with serving.our_server(serving.STORIES) as server:
        load = asyncio.run(serving.ask_all(server, 3, 4, 6))
    assert load.tokens == serving.run_session(3, 4, 6, warmup=0).tokens == 24
    assert len(load.first) == len(load.whole) == 4 and 0 < len(load.gaps) <= 20
    assert load.seconds > 0 and max(load.first) <= max(load.whole)


def test_a_table_says_what_falls_short(serving):
    load = serving.Load
    found = {(serving.HTTP, 1): [load(100, 1.0)], (serving.HTTP, 16): [load(300, 1.0)],
             (serving.TRANSFORMERS, 16): [load(150, 1.0)]}  # fmt: skip
    one, many, theirs = serving.load_table(found)
    assert (one[4], one[-1]) == ("1.00x", "")
    assert (many[4], many[-1]) == ("3.00x", "4x short by 1.00x")
    assert (theirs[4], theirs[-1]) == ("ours is 2.00x", "1.5x met")


def test_long_prompts_and_second_turns_print_a_table(serving, capsys, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(BENCHMARKS.parent))
    serving.main([*SMALL, "--case", "join", "--streams", "2", "--length", "300"])
    *_, joins, scored, in_process = cells(capsys.readouterr().out)
    assert joins[0] == "a prompt of 300 tokens joins, over HTTP" and "log-probs" in scored[0]
    assert in_process[0].endswith("CPU time")
    for line in (joins, scored, in_process):
        assert float(line[2]) <= float(line[3]) and line[-1].startswith("at most 4x")
    serving.main([*SMALL, "--case", "turns"])
    *_, [whole, new, ran, ratio, _goal] = cells(capsys.readouterr().out)
    assert int(new) <= int(ran) < int(whole) and float(ratio) == pytest.approx(int(ran) / int(new), abs=0.01)
