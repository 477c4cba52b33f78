"""Keeps a fork that other people's code left from going on as a second run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


def end_if_forked(process: int) -> None:
    """Ends this process at once if it is a fork of the one that is meant; nothing is flushed or closed twice.

    Args:
        process: The id of the process that is to go on.
    """
    if os.getpid() != process:
        os._exit(1)


@contextmanager
def one_process() -> Iterator[None]:
    """Runs other people's code. A fork that returns from it, or raises in it, ends here, and only its parent goes on.

    Processes of ``multiprocessing`` end by themselves and never come here.
    """
    process = os.getpid()
    try:
        yield
    finally:
        end_if_forked(process)
