"""Processes that judge single completions by a deadline.

A completion can make a judge hang (``9^{9^{9}}``, an expression of repeats within repeats), eat memory or crash. Here
it costs one process, which is killed and replaced, and not the run. A worker imports no torch, has limits of its own,
and never outlives the process that started it.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

#: Address space of a worker, in bytes.
MEMORY = 2 << 30
#: Largest answer of a worker, in bytes.
ANSWER = 16 << 20
#: Seconds that a worker may take to start and to import what it needs.
START = 120.0
#: What a worker runs; its path is that of this process, which may have found the package in a folder.
_MAIN = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); import lightning_rlhf.rewards.jobs.serve as s; s.main()"
)


class Outcome(NamedTuple):
    """What became of a task.

    Attributes:
        value: What the job returned; None where there is a fault.
        fault: ``timeout``: it took too long; ``error``: it raised, or its process died. None: it returned.
        why: The fault, for people.
    """

    value: Any = None
    fault: Literal["timeout", "error"] | None = None
    why: str = ""


class Workers:
    """A pool of processes; they start when they are needed and stay until :meth:`close` or the end of this process.

    Threads may share it: they take turns.

    Args:
        count: Most processes. None: one per core that this process may use, from 2 to 8.
        memory: Address space of each, in bytes.
    """

    def __init__(self, count: int | None = None, memory: int = MEMORY) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.count, self.memory = count or min(8, max(2, cores)), memory
        self._idle: list[_Worker] = []
        self._lock = threading.Lock()

    def run(self, job: str, tasks: Sequence[Sequence[Any]], seconds: float, wall: float | None = None) -> list[Outcome]:
        """Runs a job for each task.

        Args:
            job: ``package.module:function``; a worker imports it. The function gets and returns what JSON can hold.
            tasks: Arguments of each.
            seconds: CPU seconds that a task may take, so that a busy machine changes no score. Imports do not count.
            wall: Seconds by the clock that it may take. None: ten times as many, for a job that waits for something.

        Returns:
            An outcome per task.

        Raises:
            RuntimeError: Workers can't start, or can't import the job.
            TypeError: Arguments that JSON can't hold.
        """
        wall = 10 * seconds if wall is None else wall
        requests = [json.dumps({"job": job, "args": list(task), "seconds": seconds}).encode() for task in tasks]
        outcomes = [Outcome()] * len(tasks)
        waiting, starts = deque(range(len(tasks))), [0] * len(tasks)
        with self._lock, selectors.DefaultSelector() as selector:
            busy: dict[_Worker, int] = {}
            try:
                while waiting or busy:
                    while waiting and len(busy) < self.count:
                        worker = self._idle.pop() if self._idle else _Worker(self.memory)
                        busy[worker] = number = waiting.popleft()
                        worker.begin(requests[number], selector)
                    soonest = min(worker.deadline for worker in busy)
                    for key, events in selector.select(max(0.0, soonest - time.monotonic())):
                        key.data.move(events, wall, selector)
                    for worker in list(busy):
                        found = worker.outcome()
                        if found is None:
                            continue
                        number = busy.pop(worker)
                        worker.leave(selector)
                        if worker.answered:
                            self._idle.append(worker)
                        else:
                            worker.kill()
                        outcomes[number] = found
                        if worker.ready:
                            continue
                        starts[number] += 1  # it never began the task: something killed it before, or its start failed
                        if worker.answered or starts[number] == 3:
                            raise RuntimeError(f"Workers that judge completions can't start {job}: {found.why}.")
                        waiting.appendleft(number)
            finally:
                for worker in busy:
                    worker.kill()
        return outcomes

    def close(self) -> None:
        """Ends all processes; a later :meth:`run` starts new ones."""
        with self._lock:
            while self._idle:
                self._idle.pop().kill()

    def forget(self) -> None:
        """Lets go of the processes, in a fork: they are those of its parent."""
        self._lock = threading.Lock()
        while self._idle:
            self._idle.pop().close()


class _Worker:
    """A process, and what is written to it and read from it."""

    def __init__(self, memory: int) -> None:
        lifeline, self.lifeline = os.pipe()
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _MAIN, json.dumps(sys.path), str(lifeline), str(memory)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                pass_fds=(lifeline,),
                start_new_session=True,
            )
        except BaseException:
            os.close(self.lifeline)
            raise
        finally:
            os.close(lifeline)
        assert self.process.stdin is not None and self.process.stdout is not None
        self.requests, self.answers = self.process.stdin.fileno(), self.process.stdout.fileno()
        os.set_blocking(self.requests, False)

    def begin(self, request: bytes, selector: selectors.BaseSelector) -> None:
        """Hands it a task."""
        self.out, self.into = memoryview(len(request).to_bytes(4, "big") + request), bytearray()
        self.ready = self.answered = False
        self.found: Outcome | None = None
        self.deadline = time.monotonic() + START
        selector.register(self.requests, selectors.EVENT_WRITE, self)
        selector.register(self.answers, selectors.EVENT_READ, self)

    def leave(self, selector: selectors.BaseSelector) -> None:
        """Stops listening to it."""
        for end in (self.requests, self.answers):
            with contextlib.suppress(KeyError):
                selector.unregister(end)

    def move(self, events: int, wall: float, selector: selectors.BaseSelector) -> None:
        """Writes or reads what can be, once."""
        if self.found is not None:
            return
        try:
            if events & selectors.EVENT_WRITE:
                self.out = self.out[os.write(self.requests, self.out) :]
                if not self.out:
                    selector.unregister(self.requests)
                return
            part = os.read(self.answers, 1 << 20)
        except BlockingIOError:
            return
        except BrokenPipeError:
            part = b""
        self.into += part
        if not part:
            self.found = self._died()
        while self.found is None and len(self.into) >= 4:
            size = int.from_bytes(self.into[:4], "big")
            if size > ANSWER:
                self.found = Outcome(None, "error", f"it returned more than {ANSWER >> 20} MiB")
            if len(self.into) < 4 + size:
                break
            self._take(bytes(self.into[4 : 4 + size]), wall)
            del self.into[: 4 + size]

    def _take(self, frame: bytes, wall: float) -> None:
        """Reads an answer: that the job begins, or what came of it."""
        try:
            answer = json.loads(frame)
            if "ready" in answer:
                self.ready, self.deadline = True, time.monotonic() + wall
            elif "value" in answer:
                self.found, self.answered = Outcome(answer["value"]), True
            else:
                self.found, self.answered = Outcome(None, "error", str(answer["error"])), True
        except (ValueError, KeyError, TypeError, RecursionError):
            self.found = Outcome(None, "error", "it returned what can't be read")

    def outcome(self) -> Outcome | None:
        """What became of the task; None as long as it runs."""
        if self.found is None and time.monotonic() >= self.deadline:
            self.found = Outcome(None, "timeout", "it took too long")
        return self.found

    def kill(self) -> None:
        """Ends it and its process group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.close()

    def close(self) -> None:
        """Closes the pipes."""
        os.close(self.lifeline)
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()

    def _died(self) -> Outcome:
        """The outcome where its process ended."""
        code: int | None = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self.process.wait(1)
        if code == -signal.SIGPROF:  # the timer of CPU seconds
            return Outcome(None, "timeout", "it took too long")
        how = "" if code is None else f" by {signal.Signals(-code).name}" if code < 0 else f" with exit code {code}"
        return Outcome(None, "error", f"its process died{how}")


_pool = Workers()
atexit.register(_pool.close)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _pool.forget())


def run(job: str, tasks: Sequence[Sequence[Any]], seconds: float, wall: float | None = None) -> list[Outcome]:
    """Runs a job for each task in the workers of this process; see :meth:`Workers.run`."""
    return _pool.run(job, tasks, seconds, wall)
