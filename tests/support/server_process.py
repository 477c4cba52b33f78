"""``lightning-rlhf serve`` in a process of its own."""

import os
import subprocess
import time
from contextlib import contextmanager

from forked import python


class Process:
    """A running ``lightning-rlhf serve``."""

    def __init__(self, process, log):
        self.process, self.log = process, log
        self.url = log.read_text().split("Listening on ")[1].split()[0]

    def text(self):
        return self.log.read_text()


@contextmanager
def serving(log, *arguments):
    """Starts a server on a free port, and stops it."""
    with log.open("w") as out:
        command = [python(), "-m", "lightning_rlhf", "serve", *map(str, arguments), "--port", "0"]
        process = subprocess.Popen(command, stdout=out, stderr=out, env=os.environ)
        try:
            while "Listening on" not in log.read_text():
                assert process.poll() is None, log.read_text()
                time.sleep(0.05)
            yield Process(process, log)
        finally:
            process.kill()
            process.wait()
