"""What was asked, answered and paid outlives a kill; a file that is no ledger is refused by name."""

import os
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from unittest.mock import Mock

import pytest

from lightning_rlhf.endpoint import Budget, BudgetExceeded, ChatRequest, Ledger, LedgerError, Reply, Usage

PRICES = {"in": 1.0, "out": 2.0}
BUDGET = Budget(prices=PRICES)


def request(text="Hi", **settings):
    return ChatRequest([{"role": "user", "content": text}], max_tokens=10, **settings)


def reply(asked, **settings):
    return Reply(asked.key("m"), **{"text": "你好", "finish_reason": "stop", "usage": Usage(5, 2, 3), **settings})


def begin(ledger, asked, budget=BUDGET):
    return ledger.begin(asked, "m", "http://here/v1", budget)


def test_a_reply_is_read_back_as_it_was(tmp_path):
    asked = [request(), request(sample=1), request("Ho")]
    replies = [
        reply(asked[0], notes=("length", "other_model")),
        reply(asked[1], usage=None),
        reply(asked[2], text=None, problem="HTTP 400: no", kind="http_400"),
    ]
    with Ledger(tmp_path / "l.db") as ledger:
        for one, came in zip(asked[:2], replies[:2], strict=True):
            ledger.answer(begin(ledger, one), came, BUDGET)
        ledger.refuse(begin(ledger, asked[2]), "http_400")
        assert ledger.find(asked[2].key("m")) is None
        ledger.settle(replies[2:])
    with Ledger(tmp_path / "l.db") as ledger:
        assert [ledger.find(one.key("m")) for one in asked] == replies
        assert ledger.find(request().key("other")) is None
        assert [body for _, body in ledger.bodies()] == [one.body("m") for one in asked]
        totals = ledger.totals()
        assert (totals.requests, totals.answered, totals.problems, totals.sent) == (3, 2, 1, 3)
        assert totals.kinds == {"length": 1, "other_model": 1, "http_400": 1}
        assert ledger.reopen() == 1 and ledger.find(asked[2].key("m")) is None
        assert ledger.totals().paid == totals.paid and ledger.find(asked[0].key("m")) == replies[0]


def test_keys_differ_in_all_that_is_asked():
    settings = [
        {}, {"sample": 1}, {"temperature": 0.5}, {"top_p": 0.5}, {"seed": 0}, {"stop": ["a"]}, {"extra": {"x": 1}}
    ]  # fmt: skip
    keys = [request(**one).key("m") for one in settings] + [request("Ho").key("m"), request().key("n")]
    assert len(set(keys)) == len(keys)
    assert request(extra={"a": 1, "b": 2}).key("m") == request(extra={"b": 2, "a": 1}).key("m")


def test_the_sums_are_those_of_what_was_paid_lost_and_set_aside(tmp_path):
    with Ledger(tmp_path / "l.db") as ledger:
        attempts = [begin(ledger, request(str(i))) for i in range(5)]
        most = attempts[0].set_aside
        assert ledger.taken == (5 * most.tokens, pytest.approx(5 * most.money))
        ledger.answer(attempts[0], reply(request("0")), BUDGET)
        ledger.answer(attempts[1], reply(request("1"), usage=None), BUDGET)
        ledger.lose(attempts[2], "timeout")
        ledger.refuse(attempts[3], "http_500")  # the fifth is under way when the process ends
        money = (5 * 1 + 3 * 2) / 1e6 + 3 * most.money
        assert ledger.taken == (8 + 3 * most.tokens, pytest.approx(money))
    with Ledger(tmp_path / "l.db") as ledger:
        assert ledger.taken == (8 + 3 * most.tokens, pytest.approx(money))
        totals = ledger.totals()
        assert totals.paid == (8 + most.tokens, pytest.approx(11e-6 + most.money))
        assert (totals.lost, totals.lost_cost) == (2, (2 * most.tokens, pytest.approx(2 * most.money)))
        assert totals.usage == Usage(5, 2, 3) and totals.sent == 5
        assert totals.kinds == {"timeout": 1, "http_500": 1, "interrupted": 1}


def test_a_server_that_made_too_much_is_believed():
    with Ledger() as ledger:
        attempt = begin(ledger, request())
        ledger.answer(attempt, reply(request(), usage=Usage(5, 0, 9000), notes=("usage_high",)), BUDGET)
        assert ledger.taken.tokens == 9005


def test_a_budget_counts_earlier_runs_and_writes_nothing_that_it_refuses(tmp_path):
    most = BUDGET.most(request().body("m"))
    budget = Budget(tokens=3 * most.tokens)
    for run in range(3):
        with Ledger(tmp_path / "l.db") as ledger:
            begin(ledger, request(f"{run:02d}"), budget)
    with Ledger(tmp_path / "l.db") as ledger:
        with pytest.raises(BudgetExceeded, match=f"of {3 * most.tokens} tokens, {3 * most.tokens} "):
            begin(ledger, request("99"), budget)
        assert ledger.totals().requests == ledger.totals().sent == 3


def test_threads_never_pass_a_budget():
    most = BUDGET.most(request().body("m"))
    with Ledger() as ledger, ThreadPoolExecutor(8) as pool:

        def try_one(i):
            try:
                begin(ledger, request(f"{i:02d}"), Budget(tokens=10 * most.tokens + 9))
            except BudgetExceeded:
                return 0
            return 1

        assert sum(pool.map(try_one, range(40))) == 10
        assert ledger.totals().sent == 10


def test_a_model_in_this_process_is_written_down_and_costs_nothing():
    with Ledger() as ledger:
        ledger.record(request(), "m", reply(request()), 1.5, "local model")
        assert ledger.find(request().key("m")) == reply(request())
        totals = ledger.totals()
        assert (totals.answered, totals.sent, totals.paid, ledger.taken) == (1, 0, (0, 0), (0, 0))
        assert totals.usage == Usage(5, 2, 3)


KILLED = """
import os, signal, sys
from lightning_rlhf.endpoint import Budget, ChatRequest, Ledger, Reply
ledger = Ledger(sys.argv[1])
requests = [ChatRequest([{"role": "user", "content": str(i)}], max_tokens=10) for i in range(2)]
attempts = [ledger.begin(r, "m", "http://here/v1", Budget()) for r in requests]
ledger.answer(attempts[0], Reply(requests[0].key("m"), "yes"), Budget())
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.distributed
def test_a_kill_loses_no_reply_and_is_told_as_a_loss(tmp_path):
    file = tmp_path / "l.db"
    assert subprocess.run([sys.executable, "-c", KILLED, file]).returncode == -9
    with Ledger(file) as ledger:
        assert ledger.find(request("0").key("m")).text == "yes" and ledger.find(request("1").key("m")) is None
        assert ledger.totals().lost == 1 and ledger.totals().kinds == {"interrupted": 1}
        assert begin(ledger, request("1")).name.endswith("-2")


# ------------------------------------------------------------------------------------------------- bad files


def big(file):
    with Ledger(file) as ledger:
        for i in range(200):
            ledger.answer(begin(ledger, request(f"{i} " + "long " * 50)), reply(request(str(i))), BUDGET)


@pytest.mark.parametrize("part", [0, 0.1, 0.5, 0.99], ids=str)
def test_a_truncated_ledger_is_refused_by_name(tmp_path, part):
    file = tmp_path / "mine.db"
    big(file)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * part)])
    with pytest.raises(LedgerError, match=r"mine\.db is (damaged|not a ledger|empty)"):
        Ledger(file)
    assert file.read_bytes() == whole[: int(len(whole) * part)]


@pytest.mark.parametrize("content", [b"{}\n" * 400, bytes(range(256)) * 30], ids=["jsonl", "bytes"])
def test_another_file_is_refused_and_left_alone(tmp_path, content):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(content)
    with pytest.raises(LedgerError, match=r"rows\.jsonl is not a ledger"):
        Ledger(file)
    assert file.read_bytes() == content and list(tmp_path.iterdir()) == [file]


def test_a_database_of_another_program_and_another_version_are_refused(tmp_path):
    other, older = tmp_path / "other.db", tmp_path / "older.db"
    with closing(sqlite3.connect(other)) as db:
        db.execute("CREATE TABLE t(x)")
    with pytest.raises(LedgerError, match=r"other\.db .* another program"):
        Ledger(other)
    Ledger(older).close()
    with closing(sqlite3.connect(older)) as db:
        db.execute("PRAGMA user_version=99")
    with pytest.raises(LedgerError, match=r"older\.db is a ledger of version 99, .* reads version 1"):
        Ledger(older)


def test_two_at_once_are_refused(tmp_path):
    with Ledger(tmp_path / "l.db"), pytest.raises(LedgerError, match=r"l\.db is in use by another"):
        Ledger(tmp_path / "l.db")
    Ledger(tmp_path / "l.db").close()


def test_a_full_disk_is_told_and_what_was_written_stays(tmp_path):
    with Ledger(tmp_path / "l.db") as ledger:
        ledger.answer(begin(ledger, request()), reply(request()), BUDGET)
        ledger._db.execute("PRAGMA max_page_count=1")  # the least that it has
        with pytest.raises(LedgerError, match=r"l\.db could not be written: database or disk is full\. Free space"):
            for i in range(100):
                begin(ledger, request("long " * 500 + str(i)))
        assert ledger.find(request().key("m")) == reply(request())
        ledger._db.execute("PRAGMA query_only=1")  # as where there is no space for a change of what is there
        with pytest.raises(LedgerError, match=r"l\.db could not be written"):
            ledger.reopen()
    with Ledger(tmp_path / "l.db") as ledger:
        assert ledger.find(request().key("m")) == reply(request())


def test_a_ledger_that_is_read_only_is_told(tmp_path, monkeypatch):
    Ledger(tmp_path / "l.db").close()
    # SQLite's words on a read-only file system, which a test can't make
    monkeypatch.setattr(Ledger, "_check", Mock(side_effect=sqlite3.OperationalError("disk I/O error")))
    with pytest.raises(LedgerError, match="is not a ledger, or is damaged: disk I/O error"):
        Ledger(tmp_path / "l.db")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).suffix != ".db")
    with pytest.raises(LedgerError, match=r"l\.db can't be written: it or its folder is read-only"):
        Ledger(tmp_path / "l.db")


def test_a_folder_that_is_not_there_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere"):
        Ledger(tmp_path / "nowhere" / "l.db")


# ------------------------------------------------------------------------------------------------- requests


def test_half_a_surrogate_pair_is_told_before_it_is_sent():
    with pytest.raises(ValueError, match=r"U\+D83D.*replace_surrogates"):
        request("a\ud83db")


@pytest.mark.parametrize("name", ["messages", "model", "n", "stream"])
def test_extra_fields_that_change_what_a_request_is_are_refused(name):
    with pytest.raises(ValueError, match=repr(name)):
        request(extra={name: 2})


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_fork_neither_reads_nor_writes_nor_closes_the_ledger_of_its_parent(tmp_path):
    with Ledger(tmp_path / "l.db") as ledger:
        attempt = begin(ledger, request())
        if not (child := os.fork()):
            refused = 0
            for use in (ledger.totals, ledger.bodies().__next__, lambda: begin(ledger, request("Ho")),
                        lambda: ledger.find("k"), ledger.reopen):  # fmt: skip
                try:
                    use()
                except LedgerError as error:
                    refused += "was opened by another process, of which this one is a fork" in str(error)
            ledger.close()
            os._exit(refused)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 5
        ledger.answer(attempt, reply(request()), BUDGET)
    with Ledger(tmp_path / "l.db") as ledger:
        assert ledger.find(request().key("m")) == reply(request()) and ledger.totals().sent == 1
