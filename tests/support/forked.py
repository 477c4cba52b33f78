"""Starts Python programs by forking a process that has imported torch, transformers, peft and Lightning already.

Their import, and the first loading of a model, take as long as most programs of the tests run. :func:`python` takes the
place of ``sys.executable`` in a command; within what is started it is ``sys.executable``, so that Lightning's launcher
starts its ranks alike:

    subprocess.run([python(), script, ...], env=env)

It is a small process that stands for the program: it hands arguments, environment, folder and standard streams to a
server, passes signals on, and ends as the program ends. If it is killed, the server kills the program. If the server
is gone, it says so and becomes the program itself. The server starts when it is first needed, once for each process of
pytest, and ends with it. What a test says of imports, of a terminal or of a bare interpreter needs ``sys.executable``.
"""

import array
import contextlib
import json
import os
import selectors
import signal
import socket
import sys
from functools import cache

PRELOADED = ("torch", "transformers", "lightning.pytorch.cli", "lightning_rlhf.cli")
#: Signals that are passed on.
PASSED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


@cache
def python():
    """Path of a program that takes the arguments of ``python``; starts the server."""
    import atexit
    import shutil
    import subprocess
    import tempfile
    from pathlib import Path

    folder = Path(tempfile.mkdtemp(prefix="forked-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    here = Path(__file__).resolve()
    program = folder / "python"
    program.write_text(
        f"#!{sys.executable} -S\nimport sys\nsys.path.insert(0, {str(here.parent)!r})\n"
        f"import forked\nforked.stand_in({str(folder / 'socket')!r}, {sys.executable!r})\n"
    )
    program.chmod(0o755)
    env = {**os.environ, "PYTHONPATH": str(here.parents[2])}
    command = [sys.executable, str(here), str(folder / "socket"), str(program)]
    server = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert server.stdout.readline() == b"ready\n", "the fork server did not start"
    atexit.register(server.kill)
    return str(program)


def stand_in(path, executable):
    """Stands for a program that the server runs."""
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(path)
    except OSError as error:
        print(f"forked.py: the server is gone ({error})", file=sys.stderr, flush=True)
        os.execv(executable, [executable, *sys.argv[1:]])
    request = json.dumps({"argv": sys.argv[1:], "env": dict(os.environ), "cwd": os.getcwd()}).encode()
    streams = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))]
    connection.sendmsg([len(request).to_bytes(4, "big")], streams)
    connection.sendall(request)
    for number in PASSED:
        signal.signal(number, lambda number, _: connection.sendall(bytes([number])))
    for number in (0, 1, 2):
        os.close(number)  # only the program holds them now
    status = connection.recv(2)
    code = os.waitstatus_to_exitcode(int.from_bytes(status, "big")) if status else 1
    if code < 0:
        if -code not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def receive(connection):
    """A request, and the file descriptors of its standard streams."""
    data, ancillary, *_ = connection.recvmsg(4, socket.CMSG_SPACE(12))
    streams = array.array("i")
    for *_, given in ancillary:
        streams.frombytes(given[:12])
    size, data = int.from_bytes(data, "big"), b""
    while len(data) < size and (more := connection.recv(size - len(data))):
        data += more
    return json.loads(data), list(streams)


class Server:
    """Forks a child for each connection."""

    def __init__(self, path):
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(path)
        self.listener.listen(64)
        self.children = {}  # connection by process

    def serve(self):
        """Returns in a child, with its request; never in the server, which ends with its standard input."""
        # a child that ends wakes the loop
        read, write = os.pipe()
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for number in PASSED:  # of a terminal, or of a program for who started it
            signal.signal(number, signal.SIG_IGN)
        with selectors.DefaultSelector() as selector:
            for file in (self.listener, read, sys.stdin):
                selector.register(file, selectors.EVENT_READ)
            while True:
                ready = [key.fileobj for key, _ in selector.select()]
                if sys.stdin in ready:
                    for pid in self.children:
                        os.kill(pid, signal.SIGKILL)
                    os._exit(0)
                if read in ready:
                    os.read(read, 4096)
                self.reap(selector)
                for connection in set(self.children.values()) & set(ready):
                    self.pass_on(connection)
                self.reap(selector)
                if self.listener in ready:
                    connection, _ = self.listener.accept()
                    try:
                        request, streams = receive(connection)
                    except (ConnectionResetError, ValueError):  # it was killed before it had sent all
                        connection.close()
                        continue
                    pid = os.fork()
                    if not pid:
                        signal.set_wakeup_fd(-1)
                        for number in (signal.SIGCHLD, *PASSED):
                            signal.signal(number, signal.SIG_DFL)
                        signal.signal(signal.SIGINT, signal.default_int_handler)
                        selector.close()
                        for other in (self.listener, connection, *self.children.values()):
                            other.close()
                        os.close(read), os.close(write)
                        return request, streams
                    for stream in streams:
                        os.close(stream)
                    self.children[pid] = connection
                    selector.register(connection, selectors.EVENT_READ)

    def pass_on(self, connection):
        """Sends a child the signals that its process got, or kills it if that process is gone."""
        [pid] = [pid for pid, its in self.children.items() if its is connection]
        try:
            signals = connection.recv(64)
        except ConnectionResetError:
            signals = b""
        for number in signals or [signal.SIGKILL]:
            os.kill(pid, number)
        if not signals:
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)

    def reap(self, selector):
        """Tells of children that have ended."""
        for pid, connection in list(self.children.items()):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                del self.children[pid]
                selector.unregister(connection)
                with contextlib.suppress(OSError):  # whoever waited is gone
                    connection.sendall((status & 0xFFFF).to_bytes(2, "big"))
                connection.close()


def run(request, streams, program):
    """Runs a request, as a new interpreter would."""
    import random
    import runpy

    import numpy as np

    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(i, mode, closefd=False) for i, mode in enumerate("rww"))
    sys.stderr.reconfigure(line_buffering=True)
    random.seed()
    np.random.seed()
    sys.executable = program
    sys.path[:0] = [path for path in request["env"].get("PYTHONPATH", "").split(os.pathsep) if path]
    first, *rest = [arg for i, arg in enumerate(request["argv"]) if i or arg != "-u"]
    if first == "-c":
        code, *rest = rest
        sys.argv = ["-c", *rest]
        exec(compile(code, "<string>", "exec"), vars(sys.modules["__main__"]))
    elif first == "-m":
        name, *rest = rest
        sys.argv = ["-m", *rest]
        sys.path.insert(0, request["cwd"])
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    else:
        sys.argv = [first, *rest]
        sys.path.insert(0, os.path.dirname(os.path.abspath(first)))
        runpy.run_path(first, run_name="__main__")


def end(status):
    """Ends this process as an interpreter ends, but for taking apart all that was imported, which takes a second."""
    import atexit
    import threading

    if isinstance(status, str):
        sys.stdout.flush()
        print(status, file=sys.stderr)
    threading._shutdown()  # waits for threads that are no daemons
    atexit._run_exitfuncs()
    sys.stdout.flush(), sys.stderr.flush()
    if status is KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(1 if isinstance(status, str) else int(status or 0))


if __name__ == "__main__":
    import gc
    import importlib
    import threading
    from pathlib import Path

    for name in PRELOADED:
        importlib.import_module(name)
    import torch

    import lightning_rlhf

    for name in lightning_rlhf.__all__:  # which load late
        getattr(lightning_rlhf, name)
    if not torch.cuda.device_count():  # bitsandbytes, which peft imports, would start CUDA, which no fork can use
        from transformers.utils import logging

        from lightning_rlhf.models import load_causal_lm

        # What is made when a model is first loaded is there then. No adapters: gptqmodel would start threads. No
        # tokenizer: transformers 4 cannot read that one.
        small = Path(__file__).parents[1] / "assets" / "stories260K"
        logging.disable_progress_bar()  # it has a thread
        with torch.random.fork_rng(devices=()):
            import peft  # noqa: F401

            load_causal_lm(small)
        logging.enable_progress_bar()
    assert threading.active_count() == 1, f"a fork has one thread, not {threading.enumerate()}"
    gc.freeze()  # collections need not touch, and so copy, what was imported
    server = Server(sys.argv[1])
    sys.stdout.buffer.write(b"ready\n")
    sys.stdout.flush()
    request, streams = server.serve()
    try:
        run(request, streams, sys.argv[2])
    except SystemExit as stop:
        end(stop.code)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        end(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else 1)
    end(0)
