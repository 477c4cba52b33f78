"""A run that is killed at random moments ends with the same replies, pays for little twice, and knows what it lost.

``KILLS=100 pytest tests/endpoint/test_kills.py -s -o timeout=3000`` does it a hundred times and prints the figures.
"""

import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from endpoint import PASSING, FakeEndpoint

from lightning_rlhf.endpoint import Ledger

KILLS = int(os.environ.get("KILLS", "10"))
CONCURRENCY = 8
ASKING = Path(__file__).with_name("asking.py")
NUMBER = 100 + 4 * KILLS  # questions a round: enough that the kills find work
FAULTS = dict.fromkeys(PASSING, 0.01)
# what does not pass is a function of the body alone, or else a kill, which moves attempts, would rightly change replies
ALWAYS = dict.fromkeys(("http_400", "no_usage", "length", "empty"), 0.02)


def start(server, ledger, out, concurrency=CONCURRENCY, number=NUMBER, money=0):
    command = [sys.executable, ASKING, server.url, ledger, out, number, concurrency, money]
    environment = {**os.environ, "PYTHONPATH": str(ASKING.parents[2])}
    return subprocess.Popen([*map(str, command)], env=environment)


def kill(process, server, before, rng, longest):
    """Kills it at a random moment after its first request; returns whether it still ran."""
    while len(server.requests) == before and process.poll() is None:
        time.sleep(0.002)
    time.sleep(rng.uniform(0, longest))
    ran = process.poll() is None
    process.kill()
    process.wait()
    return ran


def run(*args, **settings):
    process = start(*args, **settings)
    process.wait(timeout=250)
    return process.returncode


def charged(lines):
    return sum(
        (line["prompt"] - line["cached"]) * 0.15 + line["cached"] * 0.07 + line["completion"] * 0.60 for line in lines
    ) / 1e6  # fmt: skip


@pytest.mark.slow
@pytest.mark.distributed
def test_no_answer_that_arrived_is_asked_for_again(tmp_path):
    rng = random.Random(0)
    plan = dict(seed=2, faults=FAULTS, always=ALWAYS, delay=(0, 0.06), hang=0.8)
    with FakeEndpoint(**plan) as server:
        assert run(server, tmp_path / "whole.db", tmp_path / "whole.jsonl", concurrency=32) == 0
        undisturbed = len(server.bill)
    killed = 0
    with FakeEndpoint(**plan) as server:
        while killed < KILLS:
            before = len(server.requests)
            process = start(server, tmp_path / "l.db", tmp_path / "out.jsonl")
            killed += kill(process, server, before, rng, 0.4)
            assert not (tmp_path / "out.jsonl").exists(), "the work is done before the last kill: raise NUMBER"
        assert run(server, tmp_path / "l.db", tmp_path / "out.jsonl") == 0
        bill, sent = list(server.bill), len(server.requests)
        # a second run sends nothing
        assert run(server, tmp_path / "l.db", tmp_path / "again.jsonl") == 0
        assert len(server.requests) == sent
    whole = (tmp_path / "whole.jsonl").read_bytes()
    assert whole == (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "again.jsonl").read_bytes()

    with Ledger(tmp_path / "l.db") as ledger:
        totals = ledger.totals()
        rows = ledger._db.execute(
            "SELECT substr(key, 1, 32) || '-' || number, state, attempts.kind, tokens, money, prompt IS NOT NULL FROM "
            " attempts LEFT JOIN replies USING(key) ORDER BY id"
        ).fetchall()
    attempts = {name: row for name, *row in rows}
    by_name = {line["id"]: line for line in bill}
    assert len(by_name) == len(bill) and set(by_name) <= set(attempts)  # nothing is billed that was not written down
    # what was answered was billed once, as the ledger says; what else was billed is among what the ledger calls lost
    answered = {name for name, row in attempts.items() if row[0] == "answered"}
    assert answered <= set(by_name) and max(Counter(name[:32] for name in answered).values()) == 1
    last = {name[:32]: int(name[33:]) for name in attempts}
    assert all(int(name[33:]) == last[name[:32]] for name in answered)  # none is sent after an answer
    for name in answered:
        _, _, tokens, money, stated = attempts[name]
        line = by_name[name]
        if stated:
            assert tokens == line["prompt"] + line["completion"] and money == pytest.approx(charged([line]))
        else:
            assert tokens >= line["prompt"] + line["completion"] and money >= charged([line])
    lost = {name: row for name, row in attempts.items() if row[0] == "lost"}
    paid_and_lost = set(by_name) - answered
    assert paid_and_lost <= set(lost)
    assert all(lost[name][3] >= charged([by_name[name]]) for name in paid_and_lost)
    stated = [name for name in answered if attempts[name][4]]
    sums = sum(attempts[name][3] for name in stated)
    assert sums + charged([by_name[name] for name in set(by_name) - set(stated)]) == pytest.approx(charged(bill))
    assert totals.paid.money + totals.lost_cost.money >= charged(bill)
    assert totals.lost == len(lost)
    # asked again although paid for: what was under way at a kill, no more
    by_kill = [name for name in paid_and_lost if lost[name][1] == "interrupted"]
    assert 0 < len(by_kill) <= KILLS * CONCURRENCY
    assert len([name for name in lost if lost[name][1] == "interrupted"]) <= KILLS * CONCURRENCY
    print(
        f"\n{KILLS} kills at concurrency {CONCURRENCY}: {len(bill)} replies billed ({undisturbed} undisturbed), "
        f"{len(by_kill)} of them lost by kills and asked again (bound {KILLS * CONCURRENCY}); money "
        f"{charged(bill):.6f}, the ledger says paid {totals.paid.money:.6f}, lost at most {totals.lost_cost.money:.6f}"
    )


@pytest.mark.slow
@pytest.mark.distributed
def test_the_bill_never_passes_the_budget_under_kills_at_concurrency_32(tmp_path):
    rng, concurrency = random.Random(1), 32
    money, killed, refused = 0.03, 0, 0
    with FakeEndpoint(seed=3, faults=FAULTS, always=ALWAYS, delay=(0, 0.06), hang=0.8) as server:

        def start_one():
            return start(server, tmp_path / "l.db", tmp_path / "out.jsonl", concurrency, NUMBER, money)

        while killed < KILLS:
            before = len(server.requests)
            process = start_one()
            if kill(process, server, before, rng, 0.1):
                killed += 1
            else:
                assert process.returncode == 3, "the work is done before the last kill: raise NUMBER"
                assert charged(list(server.bill)) <= money
                money, refused = money + 0.005, refused + 1
            assert charged(list(server.bill)) <= money
        assert start_one().wait(timeout=250) == 3, "the work is done before the budget is used up: raise NUMBER"
        time.sleep(1)  # what was under way when it was killed is billed too
        assert 0.003 < charged(server.bill) <= money
        with Ledger(tmp_path / "l.db") as ledger:
            assert ledger.totals().kinds["interrupted"] > 0
            assert charged(server.bill) <= ledger.taken.money <= money
            print(
                f"\n{killed} kills at concurrency {concurrency}, budget used up and raised {refused} times, to "
                f"{money:.3f}: billed {charged(server.bill):.6f}, the ledger says at most {ledger.taken.money:.6f}"
            )
        # more money, and it goes on
        assert run(server, tmp_path / "l.db", tmp_path / "out.jsonl", 32, NUMBER, 0) == 0
