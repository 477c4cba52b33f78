"""Runs steps one after another within a time, each in a process of its own, and writes each result as it comes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

MARK = "RESULT "
"""Begins the line in which a step's process says its figures, as JSON."""
SHORTEST = 5.0
"""Seconds below which no step is begun."""


class Step(NamedTuple):
    """A process that says one line of figures.

    Attributes:
        name: Its name in the results.
        command: What is run, the program first.
        seconds: How long it may take at most.
    """

    name: str
    command: Sequence[str]
    seconds: float = 120.0


def say(figures: dict[str, Any]) -> None:
    """Says the figures of this process."""
    print(MARK + json.dumps(figures), flush=True)


def run_steps(steps: Iterable[Step], minutes: float, out: Path) -> list[dict[str, Any]]:
    """Runs steps in their order until the time is over; a fault in one costs that one alone.

    Args:
        steps: The steps, the most valuable first.
        minutes: Time for all.
        out: File to which a line of JSON is added for each step: ``step``, ``status`` (``ok``, ``failed``, ``timeout``,
            ``no time``), ``seconds``, and its figures, or the end of what it wrote.

    Returns:
        The lines.
    """
    end, found = time.monotonic() + 60 * minutes, []
    out.parent.mkdir(parents=True, exist_ok=True)
    for step in steps:
        left = min(step.seconds, end - time.monotonic())
        line = {"step": step.name, **(_run(step, left) if left >= SHORTEST else {"status": "no time", "seconds": 0.0})}
        found.append(line)
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        print(json.dumps(line), flush=True)
    return found


def _run(step: Step, seconds: float) -> dict[str, Any]:
    start = time.monotonic()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
        # a group of its own, so that what it has started ends with it
        process = subprocess.Popen(step.command, stdout=said, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            process.wait(seconds)
            status = "failed" if process.returncode else "ok"
        except subprocess.TimeoutExpired:
            status = "timeout"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        said.seek(0)
        lines = said.read().splitlines()
    marked = [line for line in lines if line.startswith(MARK)]
    figures = json.loads(marked[-1].removeprefix(MARK)) if marked else {}
    if status == "ok" and not marked:
        status = "failed"
    if status != "ok":
        figures["end"] = "\n".join(line for line in lines if line not in marked)[-1500:]
    return {"status": status, "seconds": round(time.monotonic() - start, 1), **figures}


def python(script: str | Path, *arguments: str) -> list[str]:
    """The command of a Python script."""
    return [sys.executable, str(script), *arguments]
