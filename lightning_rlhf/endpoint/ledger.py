"""A file of what models were asked, what they replied and what it cost."""

from __future__ import annotations

import json
import os
import sqlite3
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lightning_rlhf.endpoint.budget import Amount, Budget
from lightning_rlhf.endpoint.requests import ChatRequest, Reply, Usage, canonical

#: Marks the file as ours: "LRLH" in ASCII.
_APPLICATION = 0x4C524C48
_VERSION = 1
_SCHEMA = """
CREATE TABLE requests(
    key TEXT PRIMARY KEY, source TEXT NOT NULL, body TEXT NOT NULL, sample INTEGER NOT NULL, asked REAL NOT NULL
) WITHOUT ROWID;
CREATE TABLE attempts(
    id INTEGER PRIMARY KEY, key TEXT NOT NULL REFERENCES requests, number INTEGER NOT NULL, state TEXT NOT NULL,
    kind TEXT, sent REAL NOT NULL, seconds REAL, tokens INTEGER NOT NULL, money REAL NOT NULL, UNIQUE(key, number)
);
CREATE TABLE replies(
    key TEXT PRIMARY KEY REFERENCES requests, text TEXT, finish_reason TEXT, prompt INTEGER, cached INTEGER,
    completion INTEGER, problem TEXT, kind TEXT, notes TEXT NOT NULL, arrived REAL NOT NULL
) WITHOUT ROWID;
"""


class LedgerError(ValueError):
    """A file is no ledger, or not one that can be used."""


class Attempt(NamedTuple):
    """A request that is about to be sent.

    Attributes:
        id: Its number in the ledger.
        name: Name that is sent along, by which the server's own records can be compared with the ledger.
        set_aside: The most that it can cost.
    """

    id: int
    name: str
    set_aside: Amount


@dataclass(frozen=True)
class Totals:
    """Sums over a ledger.

    Attributes:
        requests: Number of distinct requests.
        answered: Number of those with a text.
        problems: Number of those that ended without one.
        sent: Number of attempts that were sent over HTTP.
        usage: Tokens of replies, as servers counted them, local models included.
        paid: Tokens and money of replies; where a server gave no credible usage, the most that it can have been.
        lost: Number of attempts whose reply never arrived, or not readably. The server may have billed them.
        lost_cost: The most that these can have cost.
        kinds: How often each kind of problem and each oddity of a reply occurred.
    """

    requests: int
    answered: int
    problems: int
    sent: int
    usage: Usage
    paid: Amount
    lost: int
    lost_cost: Amount
    kinds: Counter[str]


class Ledger:
    """A record of requests, attempts and replies in one SQLite file.

    A request is written down before it is sent and its reply before it is used, so a run that was killed continues
    where it was, and a second run sends nothing. An attempt is ``sent`` until it is ``answered``, ``refused`` (the
    server said so and bills nothing) or ``lost``. What a killed run had sent is lost. One process uses a ledger at a
    time. API keys are not written. The methods may be called from several threads.

    Args:
        path: The file; it is made if it does not exist. None: in memory.

    Raises:
        LedgerError: The file is not a ledger, is damaged, is of another version, or another process uses it.
        OSError: The file's folder does not exist or cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.path = None if path is None else Path(path)
        self._lock, self._process = threading.RLock(), os.getpid()
        if self.path is not None and not self.path.parent.is_dir():
            raise FileNotFoundError(f"{self.path}: there is no folder {self.path.parent} for the ledger.")
        try:
            self._open()
        except sqlite3.Error as error:
            self.close()
            raise self._unusable(error) from error
        except LedgerError:
            self.close()
            raise

    def _open(self) -> None:
        if self.path is not None and not self.path.exists():
            _create(self.path)
        # isolation_level None: transactions are where we write BEGIN, and nowhere else
        self._db = sqlite3.connect(self.path or ":memory:", timeout=1.0, isolation_level=None, check_same_thread=False)
        if self.path is None:
            self._db.executescript(_SCHEMA)
        else:
            self._db.execute("PRAGMA locking_mode=EXCLUSIVE")
            self._check()
            # every commit reaches the disk: what was paid for outlives a power cut too
            self._db.execute("PRAGMA synchronous=FULL")
        self._db.execute("UPDATE attempts SET state='lost', kind='interrupted' WHERE state='sent'")
        row = self._db.execute(
            "SELECT coalesce(sum(tokens), 0), coalesce(sum(money), 0) FROM attempts WHERE state != 'local'"
        ).fetchone()
        self._taken = Amount(*row)

    def _check(self) -> None:
        application, version = (
            self._db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")
        )
        if application != _APPLICATION:
            raise LedgerError(f"{self.path} is empty or of another program, not a ledger. Name another file.")
        if version != _VERSION:
            raise LedgerError(
                f"{self.path} is a ledger of version {version}, but this package reads version {_VERSION}. Use the "
                "version of lightning_rlhf that wrote it, or name another file."
            )
        if (state := self._db.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
            raise LedgerError(f"{self.path} is damaged: {state}. Take it from a backup, or name another file.")

    def _unusable(self, error: sqlite3.Error) -> LedgerError:
        if "locked" in str(error):
            return LedgerError(f"{self.path} is in use by another process. Wait for it, or name another file.")
        if self.path is not None and not all(os.access(place, os.W_OK) for place in (self.path, self.path.parent)):
            return LedgerError(
                f"{self.path} can't be written: it or its folder is read-only. Mend access, or name another file."
            )
        if "not a database" in str(error) or "malformed" in str(error) or "disk I/O" in str(error):
            return LedgerError(
                f"{self.path} is not a ledger, or is damaged: {error}. Name another file; if it was a ledger, take it "
                "from a backup."
            )
        return LedgerError(f"{self.path} cannot be used as a ledger: {error}.")

    def close(self) -> None:
        """Closes the file. In a fork it does nothing: it would take the log from under its parent."""
        if hasattr(self, "_db") and os.getpid() == self._process:
            self._db.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------------------------------------------- reading

    def find(self, key: str) -> Reply | None:
        """Returns what came of a request, or None if that is not known yet.

        Args:
            key: The request's key.
        """
        self._check_process()
        with self._lock:
            row = self._db.execute(
                "SELECT text, finish_reason, prompt, cached, completion, problem, kind, notes FROM replies WHERE key=?",
                (key,),
            ).fetchone()
        if row is None:
            return None
        text, finish_reason, prompt, cached, completion, problem, kind, notes = row
        usage = None if prompt is None else Usage(prompt, cached, completion)
        return Reply(key, text, finish_reason, usage, problem, kind, tuple(json.loads(notes)))

    def bodies(self) -> Iterator[tuple[str, dict[str, object]]]:
        """Yields the key and the body of each request, in the order in which they were first asked."""
        self._check_process()
        with self._lock:
            rows = self._db.execute("SELECT key, body FROM requests ORDER BY asked, key").fetchall()
        for key, body in rows:
            yield key, json.loads(body)

    @property
    def taken(self) -> Amount:
        """What was paid, lost and is set aside: what a budget's limit is compared with."""
        return self._taken

    def totals(self) -> Totals:
        """Returns the sums over the whole ledger."""
        self._check_process()
        with self._lock:
            one = self._db.execute
            requests = one("SELECT count(*) FROM requests").fetchone()[0]
            answered, problems = one("SELECT count(text), count(*) - count(text) FROM replies").fetchone()
            usage = one("SELECT sum(prompt), sum(cached), sum(completion) FROM replies").fetchone()
            states = {
                state: (count, Amount(tokens, money))
                for state, count, tokens, money in one(
                    "SELECT state, count(*), sum(tokens), sum(money) FROM attempts GROUP BY state"
                )
            }
            kinds = Counter(
                dict(one("SELECT kind, count(*) FROM attempts WHERE kind IS NOT NULL GROUP BY kind").fetchall())
            )
            for (notes,) in one("SELECT notes FROM replies WHERE notes != '[]'"):
                kinds.update(json.loads(notes))
        lost, lost_cost = states.get("lost", (0, Amount()))
        return Totals(
            requests=requests,
            answered=answered,
            problems=problems,
            sent=sum(count for state, (count, _) in states.items() if state != "local"),
            usage=Usage(*(value or 0 for value in usage)),
            paid=states.get("answered", (0, Amount()))[1],
            lost=lost,
            lost_cost=lost_cost,
            kinds=kinds,
        )

    # ------------------------------------------------------------------------------------------------- writing

    def begin(self, request: ChatRequest, model: str, source: str, budget: Budget | None = None) -> Attempt:
        """Writes down that a request is about to be sent, and sets aside what it can cost.

        Args:
            request: The request.
            model: Name of the model on the server.
            source: URL of the server.
            budget: Its limits and prices. None: nothing is set aside.

        Raises:
            BudgetExceeded: The request could pass the budget. Nothing is written.
            ValueError: There is a budget, but the request has no limit of tokens.
        """
        body, key = request.body(model), request.key(model)
        most = budget.most(body) if budget is not None else Amount()
        with self._transaction():
            if budget is not None:
                budget.check(self._taken, most)
            self._write_request(key, request, model, source)
            number = self._db.execute("SELECT count(*) FROM attempts WHERE key=?", (key,)).fetchone()[0] + 1
            cursor = self._db.execute(
                "INSERT INTO attempts(key, number, state, sent, tokens, money) VALUES(?, ?, 'sent', ?, ?, ?)",
                (key, number, time.time(), *most),
            )
            assert cursor.lastrowid is not None
            self._take(most)
        return Attempt(cursor.lastrowid, f"{key[:32]}-{number}", most)

    def answer(self, attempt: Attempt, reply: Reply, budget: Budget | None = None) -> None:
        """Writes down the reply to an attempt. Its usage takes the place of what was set aside.

        Args:
            attempt: The attempt.
            reply: What came. Without usage, what was set aside counts as paid.
            budget: The prices.
        """
        cost = attempt.set_aside
        if reply.usage is not None:
            stated = (budget or Budget()).cost(reply.usage)
            # a server that made more than it was allowed to is believed where that costs more
            cost = max(stated, cost) if "usage_high" in reply.notes else stated
        self._end(attempt, "answered", reply.kind, cost, reply)

    def refuse(self, attempt: Attempt, kind: str) -> None:
        """Writes down that an attempt was not served, so that it costs nothing.

        Args:
            attempt: The attempt.
            kind: Kind of the problem.
        """
        self._end(attempt, "refused", kind, Amount())

    def lose(self, attempt: Attempt, kind: str) -> None:
        """Writes down that the reply to an attempt is lost. What was set aside for it stays so.

        Args:
            attempt: The attempt.
            kind: Kind of the problem.
        """
        self._end(attempt, "lost", kind, attempt.set_aside)

    def settle(self, replies: Iterable[Reply]) -> None:
        """Writes down how requests ended that gave up, so that no later run asks them again.

        Args:
            replies: Replies with a problem.
        """
        with self._transaction():
            for reply in replies:
                self._write_reply(reply)

    def reopen(self) -> int:
        """Forgets all requests that ended with a problem, so that the next run asks them again.

        Returns:
            Their number. What they cost stays in the sums.
        """
        with self._transaction():
            return self._db.execute("DELETE FROM replies WHERE text IS NULL").rowcount

    def record(self, request: ChatRequest, model: str, reply: Reply, seconds: float, source: str = "local") -> None:
        """Writes down a request to a model in this process, with its reply. It costs nothing.

        Args:
            request: The request.
            model: The model's name.
            reply: The reply, with the request's key.
            seconds: How long it took.
            source: Where the model is.
        """
        key = request.key(model)
        tokens = 0 if reply.usage is None else reply.usage.prompt + reply.usage.completion
        with self._transaction():
            self._write_request(key, request, model, source)
            number = self._db.execute("SELECT count(*) FROM attempts WHERE key=?", (key,)).fetchone()[0] + 1
            self._db.execute(
                "INSERT INTO attempts(key, number, state, kind, sent, seconds, tokens, money) "
                "VALUES(?, ?, 'local', ?, ?, ?, ?, 0)",
                (key, number, reply.kind, time.time() - seconds, seconds, tokens),
            )
            self._write_reply(reply)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """Within it, all is written or nothing."""
        self._check_process()
        with self._lock:
            try:
                with self._db:
                    self._db.execute("BEGIN IMMEDIATE")
                    yield
            except sqlite3.Error as error:
                raise LedgerError(
                    f"{self.path} could not be written: {error}. Free space or mend access, then run the same command "
                    "again."
                ) from error

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            raise LedgerError(
                f"{self.path} was opened by another process, of which this one is a fork. Ask in the process that "
                "opened it, or open a ledger of another file here."
            )

    def _end(self, attempt: Attempt, state: str, kind: str | None, cost: Amount, reply: Reply | None = None) -> None:
        with self._transaction():
            if reply is not None:
                self._write_reply(reply)
            self._db.execute(
                "UPDATE attempts SET state=?, kind=?, seconds=? - sent, tokens=?, money=? WHERE id=?",
                (state, kind, time.time(), *cost, attempt.id),
            )
            self._take(Amount(cost.tokens - attempt.set_aside.tokens, cost.money - attempt.set_aside.money))

    def _take(self, amount: Amount) -> None:
        self._taken = Amount(self._taken.tokens + amount.tokens, self._taken.money + amount.money)

    def _write_request(self, key: str, request: ChatRequest, model: str, source: str) -> None:
        self._db.execute(
            "INSERT OR IGNORE INTO requests VALUES(?, ?, ?, ?, ?)",
            (key, source, canonical(request.body(model)), request.sample, time.time()),
        )

    def _write_reply(self, reply: Reply) -> None:
        usage = (None,) * 3 if reply.usage is None else (reply.usage.prompt, reply.usage.cached, reply.usage.completion)
        rest = (reply.problem, reply.kind, json.dumps(reply.notes), time.time())
        self._db.execute(
            "INSERT OR REPLACE INTO replies VALUES(?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (reply.key, reply.text, reply.finish_reason, *usage, *rest),
        )


def _create(path: Path) -> None:
    """Makes an empty ledger beside its place and moves it there, so that no kill leaves half of one."""
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        file = Path(folder, path.name)
        with closing(sqlite3.connect(file)) as db:
            db.execute("PRAGMA journal_mode=WAL")
            db.executescript(_SCHEMA)
            db.execute(f"PRAGMA application_id={_APPLICATION}")
            db.execute(f"PRAGMA user_version={_VERSION}")
        with suppress(FileExistsError):  # another process was faster
            os.link(file, path)
