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

    def kill_often(self, arguments, rng, kills, pause):
        """Kills runs at random moments, up to ``pause`` seconds after their first sign of work, and finishes the last.

        Returns:
            How many were killed before they were done.
        """
        killed = 0
        for _ in range(kills):
            process = self.start(arguments)
            process.join(rng.uniform(0, pause))
            if process.is_alive():
                process.kill()
                process.join()
                killed += 1
            else:
                assert process.exitcode == 0
        assert self.finish(arguments) == 0
        return killed


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
