"""The main loop of a worker: takes a task, says that it begins, returns a value or an error."""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import json
import os
import resource
import select
import signal
import sys
from collections.abc import Callable
from typing import Any


def main() -> None:
    """Serves until the pipe of tasks ends. Its arguments are a path, a pipe to watch and a limit in bytes."""
    lifeline, memory = int(sys.argv[2]), int(sys.argv[3])
    die_with(lifeline)
    os.set_inheritable(lifeline, False)
    process = os.getpid()
    requests, answers = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):  # what a job prints goes nowhere
        os.dup2(nothing, stream)
    limit(resource.RLIMIT_CORE, 0)
    limit(resource.RLIMIT_AS, memory)
    jobs: dict[str, Callable[..., Any]] = {}
    while (frame := _read(requests)) is not None:
        task = json.loads(frame)
        name = task["job"]
        try:
            if name not in jobs:
                module, _, function = name.partition(":")
                jobs[name] = getattr(importlib.import_module(module), function)
            _write(answers, {"ready": True})
            signal.setitimer(signal.ITIMER_PROF, task["seconds"])  # CPU time; the signal kills it, whatever it does
            answer = json.dumps({"value": jobs[name](*task["args"])}).encode()
        except Exception as error:
            answer = json.dumps({"error": f"{type(error).__name__}: {error}"[:500]}).encode()
        finally:
            if os.getpid() != process:  # a fork that a job left must not answer for it, nor take tasks
                os._exit(1)
        signal.setitimer(signal.ITIMER_PROF, 0)
        _write(answers, answer)


def die_with(pipe: int) -> None:
    """Has the kernel end this process when the other end of a pipe closes, even within a computation in C.

    The signal that tells of the end kills, since nothing handles it. (PR_SET_PDEATHSIG would fire when the *thread*
    ends that started this process.)
    """
    for name in (signal.SIGIO, signal.SIGPROF):
        signal.signal(name, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGIO, signal.SIGPROF])
    fcntl.fcntl(pipe, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(pipe, fcntl.F_SETFL, fcntl.fcntl(pipe, fcntl.F_GETFL) | os.O_ASYNC)
    if select.select([pipe], [], [], 0)[0]:  # it closed before
        os._exit(1)


def limit(which: int, value: int) -> None:
    """Lowers a limit of this process, where the system has it."""
    with contextlib.suppress(ValueError, OSError):
        hard = resource.getrlimit(which)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(which, (value, value))


def _read(pipe: int) -> bytes | None:
    """A frame; None at the end."""
    size = _exactly(pipe, 4)
    return None if size is None else _exactly(pipe, int.from_bytes(size, "big"))


def _exactly(pipe: int, size: int) -> bytes | None:
    data = bytearray()
    while len(data) < size:
        part = os.read(pipe, min(size - len(data), 1 << 20))
        if not part:
            return None
        data += part
    return bytes(data)


def _write(pipe: int, answer: bytes | dict[str, Any]) -> None:
    data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
    data = len(data).to_bytes(4, "big") + data
    while data:
        data = data[os.write(pipe, data) :]
