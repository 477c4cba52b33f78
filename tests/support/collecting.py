"""Runs of ``collect`` in processes that a test can kill."""

import multiprocessing
import os
import sqlite3
import sys
import time
from contextlib import closing


def _collect(arguments):
    with open(os.devnull, "w") as nowhere:
        sys.stdout = sys.stderr = nowhere
        from lightning_rlhf.collection.command import main

        main(arguments)


class Collecting:
    """Starts runs quickly: a server process that has imported everything forks them."""

    def __init__(self):
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["lightning_rlhf.collection.command", "collecting"])

    def start(self, arguments):
        process = self._context.Process(target=_collect, args=([str(a) for a in arguments],))
        process.start()
        return process

    def finish(self, arguments):
        """Runs to the end; returns the exit status."""
        process = self.start(arguments)
        process.join(300)
        return process.exitcode

    def kill_often(self, arguments, rng, kills, server, total, longest=0.05):
        """Kills runs, spread over nine tenths of their work, and finishes the last.

        Replies must be slow enough that so many kills find work: on average ``kills / 200`` seconds or more.

        Args:
            arguments: Of the command.
            rng: Draws the moments.
            kills: How many runs are killed.
            server: The fake endpoint that they ask.
            total: Different requests that a run of nothing but this work makes.
            longest: Most seconds from a reply to the kill.
        """
        first = len(server.bill)

        def answered():
            return len({line["body"] for line in server.bill[first:]})

        for left in range(kills, 0, -1):
            goal = answered() + rng.uniform(0, 1.5) * max(0, 0.9 * total - answered()) / (left + 1)
            process, sent = self.start(arguments), len(server.requests)
            while process.is_alive() and (len(server.requests) == sent or answered() < goal):
                time.sleep(0.002)
            process.join(rng.uniform(0, longest))
            assert process.is_alive(), f"a run ended with {process.exitcode} before kill {kills - left + 1} of {kills}"
            process.kill()
            process.join()
        assert self.finish(arguments) == 0


def attempts(ledger):
    """(name that was sent along, state, tokens) of each attempt in a ledger."""
    for _ in range(50):
        try:
            with closing(sqlite3.connect(f"file:{ledger}?mode=ro", uri=True)) as db:
                return [
                    (f"{key[:32]}-{number}", state, tokens)
                    for key, number, state, tokens in db.execute("SELECT key, number, state, tokens FROM attempts")
                ]
        except sqlite3.OperationalError:  # a run is about to close it
            time.sleep(0.1)
    raise TimeoutError(ledger)
