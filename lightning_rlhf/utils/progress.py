"""Shows the progress of commands."""

import sys


class ProgressLine:
    """Shows progress on standard error: one line that is updated in a terminal, otherwise a line per quarter.

    Args:
        name: What is counted.
        total: The number at the end.
    """

    def __init__(self, name: str, total: int) -> None:
        self.name, self.total, self.quarter = name, total, 0

    def __call__(self, done: int) -> None:
        """Shows how many are done."""
        line = f"{self.name}  {done}/{self.total}"
        if sys.stderr.isatty():
            print(f"\r{line}", end="\n" if done == self.total else "", file=sys.stderr, flush=True)
        elif 4 * done // self.total > self.quarter:
            print(line, file=sys.stderr, flush=True)
            self.quarter = 4 * done // self.total
