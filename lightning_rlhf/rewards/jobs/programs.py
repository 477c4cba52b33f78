"""Programs that a model wrote, run on tests, with bounds on what they can do by accident.

Each runs in a folder of its own without environment, under limits. Where the kernel allows it, it also has namespaces
of its own: no network, all files read-only but for that folder, no view of other processes, and all that it started
dies with it. This contains accidents; it is no sandbox against an attacker.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import re
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any

from lightning_rlhf.rewards.jobs.serve import limit

#: Bytes that a program may write to a file, standard output included; open files; processes.
OUTPUT, FILES, PROCESSES = 16 << 20, 64, 32
_LAST_BLOCK = re.compile(r"```[^`\n]*\n(.*?)(?:```|\Z)", re.DOTALL)
_PEER = Path(__file__).with_name("peer.py").read_text(encoding="utf-8")
_MAIN = "import sys; exec(compile(open({fd}, encoding='utf-8').read(), 'main.py', 'exec'), globals())"
# of Linux: <sched.h>, <sys/prctl.h>, <sys/mount.h>, <linux/mount.h>, <linux/capability.h>
_NEWNS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
_PDEATHSIG, _DUMPABLE, _KEEPCAPS, _SUBREAPER, _NO_NEW_PRIVS, _AMBIENT = 1, 4, 8, 36, 38, 47
_READ_ONLY, _NOSUID, _NODEV, _RECURSIVE, _PRIVATE = 1, 2, 4, 0x4000, 0x40000
_MOUNT_SETATTR, _AT_RECURSIVE = 442, 0x8000
_READ_SEARCH = 2  # CAP_DAC_READ_SEARCH
_NOBODY = 65534
_libc = ctypes.CDLL(None, use_errno=True)


class Settings:
    """What a program may do.

    Args:
        seconds: By the clock, for all tests together.
        memory: MiB of address space of each process.
        network: Whether it may use the network.
        isolate: Whether it gets namespaces.
    """

    def __init__(self, seconds: float, memory: int, network: bool, isolate: bool) -> None:
        self.seconds, self.memory, self.network, self.isolate = seconds, memory << 20, network, isolate


def probe(network: bool) -> str:
    """Runs an empty program in namespaces. Returns why that is not possible; nothing if it is."""
    try:
        with _Run([*_python("pass")], None, Settings(20.0, 1024, network, True)) as run:
            return "" if run.wait(20.0) == 0 else f"an empty program ended with {run.status}"
    except OSError as error:
        return str(error)


def judge(
    text: str, tests: dict[str, list[list[Any]]], seconds: float, memory: int, network: bool, isolate: bool
) -> dict[str, Any]:
    """Runs the program in a completion on tests.

    Args:
        text: A completion: the last fenced block in it is the program, or all of it.
        tests: ``cases``: pairs of standard input and output; or ``parts``: sources, and whether each counts as a test.
        seconds: See :class:`Settings`.
        memory: See :class:`Settings`.
        network: See :class:`Settings`.
        isolate: See :class:`Settings`.

    Returns:
        ``passed``, a list of bool; ``why`` the first test failed; ``timeout``, whether the time was over.
    """
    settings, code = Settings(seconds, memory, network, isolate), program_of(text)
    _prctl(_SUBREAPER, 1)  # what a program leaves behind becomes a child of this process
    return _cases(code, tests["cases"], settings) if "cases" in tests else _parts(code, tests["parts"], settings)


def program_of(text: str) -> str:
    """The last fenced block of a text, or all of it."""
    return str((_LAST_BLOCK.findall(text) or [text])[-1])


def _cases(code: str, cases: list[list[Any]], settings: Settings) -> dict[str, Any]:
    """Compares the standard output for each standard input, but for blanks at the ends of lines and of the text."""
    end, passed, why, late = time.monotonic() + settings.seconds, [], "", False
    for given, wanted in cases:
        left = end - time.monotonic()
        if left <= 0 or late:
            passed.append(False)
            continue
        with _file(code) as program, _file(given) as stdin, tempfile.TemporaryFile() as stdout:
            argv = _python(_MAIN.format(fd=program.fileno()))
            with _Run(argv, stdin, settings, stdout, keep=(program.fileno(),)) as run:
                code_of_exit = run.wait(left)
                late = code_of_exit is None
            stdout.seek(0)
            found = stdout.read(OUTPUT).decode("utf-8", "replace")
            passed.append(code_of_exit == 0 and _same(found, wanted))
        if not passed[-1] and not why:
            how = "it took too long" if late else f"exit code {code_of_exit}" if code_of_exit else "wrong output"
            why = f"input {given[:60]!r}: {how}; wrote {found[:60]!r}, wanted {wanted[:60]!r}"
    return {"passed": passed, "why": why, "timeout": late}


def _parts(code: str, parts: list[list[Any]], settings: Settings) -> dict[str, Any]:
    """Runs tests in a process that calls the program's process; see :mod:`lightning_rlhf.rewards.jobs.peer`."""
    import json
    import socket

    count = sum(counts for _, counts in parts)
    here, there = socket.socketpair()
    with here, there, _file(code) as program, _file(json.dumps(parts)) as tests, tempfile.TemporaryFile() as results:
        channels = here.fileno(), there.fileno()
        first = _python(_PEER, "program", str(channels[0]), "-1")
        second = _python(_PEER, "tests", str(channels[1]), str(results.fileno()))
        with (
            _Run(first, program, settings, keep=channels[:1]),
            _Run(second, tests, settings, keep=(channels[1], results.fileno())) as run,
        ):
            here.close()
            there.close()
            late = run.wait(settings.seconds) is None
        results.seek(0)
        lines = [json.loads(line) for line in results.read(OUTPUT).split(b"\n")[:-1]]
    passed = [not line for line in lines[:count]]
    passed += [False] * (count - len(passed))
    why = next(filter(None, lines), "" if all(passed) else "it took too long" if late else "the tests ended early")
    return {"passed": passed, "why": why, "timeout": late}


def _same(found: str, wanted: str) -> bool:
    lines = ([line.rstrip() for line in text.rstrip().splitlines()] for text in (found, wanted))
    return next(lines) == next(lines)


def _python(source: str, *arguments: str) -> list[str]:
    return [sys.executable, "-I", "-X", "utf8", "-c", source, *arguments]


def _file(text: str) -> IO[bytes]:
    """An open file without a name that holds a text."""
    file = tempfile.TemporaryFile()  # noqa: SIM115 # who asked closes it
    file.write(text.encode("utf-8", "surrogatepass"))
    file.seek(0)
    return file


class _Run:
    """A program while it runs; at the end of the block it and all that it started are dead.

    Args:
        argv: Command.
        stdin: Its standard input; None for an empty one.
        settings: What it may do.
        stdout: Its standard output; None throws it away.
        keep: Further files that it inherits.

    Raises:
        OSError: It can't start so.
    """

    def __init__(
        self,
        argv: list[str],
        stdin: IO[bytes] | None,
        settings: Settings,
        stdout: IO[bytes] | None = None,
        keep: tuple[int, ...] = (),
    ) -> None:
        self.status: int | None = None
        self._others = set(_children())
        self.folder = tempfile.mkdtemp()
        os.chmod(self.folder, 0o711 if settings.isolate else 0o777)
        nothing = os.open(os.devnull, os.O_RDWR)
        streams = [nothing if file is None else file.fileno() for file in (stdin, stdout)] + [nothing]
        (self._done, done), (failed, fail) = os.pipe(), os.pipe()
        parent = os.getpid()
        self.pid = os.fork()
        if not self.pid:
            try:
                _supervise(argv, streams, keep, self.folder, settings, parent, done, fail)
            except BaseException as error:
                os.write(fail, str(error).encode("utf-8", "replace")[:500])
            finally:
                os._exit(1)
        for end in (done, fail, nothing):
            os.close(end)
        with os.fdopen(failed, "rb") as pipe:
            why = pipe.read().decode()  # it closes where the program begins
        if why:
            self.__exit__()
            raise OSError(why)

    def __enter__(self) -> _Run:
        return self

    def wait(self, seconds: float) -> int | None:
        """Waits for its end; returns its exit code, minus the signal that ended it, or None when the time is over."""
        if select.select([self._done], [], [], seconds)[0]:
            self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            self.pid = 0
        return self.status

    def __exit__(self, *_: object) -> None:
        _end_children(self._others)
        os.close(self._done)
        # no rmtree, which can't remove folders within folders a thousand times
        subprocess.run(["rm", "-rf", self.folder], stderr=subprocess.DEVNULL, check=False)


def _end_children(others: set[int]) -> None:
    """Kills a program and what it left to this process, which adopts it; this process's other children stay."""
    while left := set(_children()) - others:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pid in left:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)


def _children() -> list[int]:
    try:
        return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]
    except OSError:
        return []


# ---------------------------------------------------------------------------------------------- within the new process


def _supervise(
    argv: list[str],
    streams: list[int],
    keep: tuple[int, ...],
    folder: str,
    settings: Settings,
    parent: int,
    done: int,
    fail: int,
) -> None:
    """Makes namespaces, starts the program in them, and ends as it ends."""
    _prctl(_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    here = os.getpid()  # in the new namespace, each program's process has the same
    mapped = _unshare(settings.network) if settings.isolate else False
    if settings.isolate:
        with contextlib.suppress(OSError):  # shared memory of System V counts in no limit; root can forbid it
            Path("/proc/sys/kernel/shmall").write_text("0")
    alive, life = os.pipe()
    pid = os.fork()
    if pid:
        _close_all_but(done, life)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        os._exit(status if status >= 0 else 128 - status)
    os.close(life)
    os.close(done)
    _prctl(_PDEATHSIG, signal.SIGKILL)
    if select.select([alive], [], [], 0)[0]:  # the supervisor is dead already
        return
    os.close(alive)
    if settings.isolate:  # this is the first process of its namespace: when it ends, all others die
        _mount(folder)
        _prctl(_DUMPABLE, 0)
        pid = os.fork()
        if pid:
            _close_all_but()
            while True:
                ended, status = os.wait()
                if ended == pid:
                    code = os.waitstatus_to_exitcode(status)
                    os._exit(code if code >= 0 else 128 - code)
    os.setsid()
    os.chdir(folder)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    for kept in keep:
        os.set_inheritable(kept, True)
    for name in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGIO, signal.SIGPROF):
        signal.signal(name, signal.SIG_DFL)
    if os.getuid() == 0 and not mapped:
        _become_nobody(here)
    if not settings.isolate:
        _prctl(_PDEATHSIG, signal.SIGKILL)  # another user forgets it
    _prctl(_NO_NEW_PRIVS, 1)
    cpu = math.ceil(settings.seconds) + 1
    for which, value in (
        (resource.RLIMIT_CPU, cpu),
        (resource.RLIMIT_AS, settings.memory),
        (resource.RLIMIT_FSIZE, OUTPUT),
        (resource.RLIMIT_NOFILE, FILES),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, PROCESSES),
    ):
        limit(which, value)
    # libraries that start a thread per core would not fit into the limits
    os.execve(argv[0], argv, {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"})


def _close_all_but(*kept: int) -> None:
    """Closes files, so that nobody holds the ends of others' pipes."""
    start = 0
    for file in (*sorted(kept), resource.getrlimit(resource.RLIMIT_NOFILE)[0]):
        os.closerange(start, file)
        start = file + 1


def _unshare(network: bool) -> bool:
    """Enters new namespaces. Returns whether the user's are among them, which give the right to make the others."""
    flags = _NEWNS | _NEWPID | _NEWIPC | (0 if network else _NEWNET)
    if os.getuid() == 0:
        try:
            _call("unshare", flags)
            return False
        except OSError:
            pass
    user, group = os.getuid(), os.getgid()
    _call("unshare", flags | _NEWUSER)
    inside = user or _NOBODY  # root there would keep the right to undo what is mounted
    for name, text in (("setgroups", "deny"), ("uid_map", f"{inside} {user} 1"), ("gid_map", f"{group} {group} 1")):
        Path(f"/proc/self/{name}").write_text(text)
    return True


def _mount(folder: str) -> None:
    """Makes all files read-only, hides other processes, and mounts a small folder in memory to work in."""
    _call("mount", b"none", b"/", None, ctypes.c_ulong(_RECURSIVE | _PRIVATE), None)
    attributes = (ctypes.c_uint64 * 4)(_READ_ONLY | _NOSUID, 0, 0, 0)
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    _call("syscall", _MOUNT_SETATTR, -1, b"/", _AT_RECURSIVE, ctypes.byref(attributes), size)
    for path, flags, options in (
        (os.fsencode(folder), _NOSUID | _NODEV, b"size=64m,nr_inodes=1024,mode=777"),
        (b"/proc", _NOSUID | _NODEV | _READ_ONLY, b"size=4k,mode=555"),
    ):
        _call("mount", b"tmpfs", path, b"tmpfs", ctypes.c_ulong(flags), options)


def _become_nobody(number: int) -> None:
    """Becomes a user that owns nothing, and that no other program runs as: its limit on processes counts them all."""
    nobody = 1_000_000_000 + number % 1_000_000
    readable = all(map(_others_read, _python_files()))
    if not readable:
        _prctl(_KEEPCAPS, 1)
    os.setgroups([])
    try:
        os.setresgid(nobody, nobody, nobody)
        os.setresuid(nobody, nobody, nobody)
    except OSError:  # a container without that many users
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    if not readable:  # Python lies in a folder of the superuser's: it keeps the right to read
        header, mask = (ctypes.c_uint32 * 2)(0x20080522, 0), 1 << _READ_SEARCH
        _call("capset", ctypes.byref(header), ctypes.byref((ctypes.c_uint32 * 6)(mask, mask, mask, 0, 0, 0)))
        _prctl(_AMBIENT, 2, _READ_SEARCH)


def _python_files() -> list[str]:
    """One file of each folder that a program's interpreter reads."""
    extension = getattr(math, "__file__", None)  # Debian's Python has it built in
    return [sys.executable, os.__file__, *([extension] if extension else [])]


def _others_read(path: str) -> bool:
    """Whether any user can read a file, by the bits of it and of its folders."""
    real = Path(path).resolve()
    folders = {*Path(path).absolute().parents, *real.parents}
    return real.stat().st_mode & 0o004 > 0 and all(folder.stat().st_mode & 0o001 for folder in folders)


def _prctl(option: int, *values: int) -> None:
    if sys.platform == "linux":
        _call("prctl", option, *(ctypes.c_ulong(value) for value in (*values, 0, 0, 0)[:4]))


def _call(name: str, *arguments: Any) -> None:
    """Calls a function of the C library.

    Raises:
        OSError: It failed, or this system has none.
    """
    try:
        function = getattr(_libc, name)
    except AttributeError:
        raise OSError(f"this system has no {name}") from None
    if function(*arguments) == -1:
        raise OSError(f"{name}: {os.strerror(ctypes.get_errno())}")
