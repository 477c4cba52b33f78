"""The verifier of programs: tests of each kind, and programs that cheat, break out or never end."""
# ruff: noqa: E501 # a program per line

import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from lightning_rlhf.rewards import RewardError, workers
from lightning_rlhf.rewards.jobs import programs
from lightning_rlhf.rewards.verifiers import code
from lightning_rlhf.rewards.verifiers.code import read_tests

ISOLATED = programs.probe(False) == ""
needs_namespaces = pytest.mark.skipif(not ISOLATED, reason="this machine's kernel gives no namespaces")
NETWORK = {} if ISOLATED else {"network": True}


def score(program, tests, **options):
    return code([""], [program], [tests], **{"timeout": 30.0, **NETWORK, **options})[0]


PROGRAM = """Here it is:
```python
import collections, math
class Stack:
    def __init__(self): self.items = []
    def push(self, x): self.items.append(x)
    def pop(self): return self.items.pop()
    def __len__(self): return len(self.items)
class Empty(Exception): pass
Point = collections.namedtuple("Point", "x y")
def add(a, b): return a + b
def sort(values): values.sort()
def count(n): yield from range(n)
def apply(f, x): return f(x)
def refuse(x): raise ValueError(f"no {x}")
def empty(): raise Empty("e")
def point(): return Point(1, 2)
def letters(text): return collections.Counter(text)
def value(node): return node.value + (value(node.next) if node.next else 0)
def long(n): return 10 ** n
```
"""
TESTS = [
    "assert add(1, 2) == 3 and add('a', 'b') == 'ab'",
    "values = [3, 1]\nsort(values)\nassert values == [1, 3]",
    "assert list(count(3)) == [0, 1, 2]",
    "assert apply(lambda x: x * 2, 4) == 8",
    "try:\n    refuse(1)\n    assert False\nexcept ValueError as error:\n    assert str(error) == 'no 1'",
    "try:\n    empty()\n    assert False\nexcept Empty as error:\n    pass",
    "stack = Stack()\nstack.push(4)\nassert len(stack) == 1 and stack.pop() == 4 and isinstance(stack, Stack)",
    "assert point().x == 1 and point() == (1, 2)",
    "assert letters('aab') == {'a': 2, 'b': 1}",
    "class Node:\n    def __init__(self, value, next=None):\n        self.value, self.next = value, next\n"
    "assert value(Node(1, Node(2))) == 3",
    "assert long(400) == 10 ** 400",
    "assert math.isclose(add(0.1, 0.2), 0.3)",
    "from solution import add as plus\nassert plus(1, 1) == 2",
    "def test_add():\n    assert add(2, 2) == 4",
    "def check(candidate):\n    assert candidate(1, 1) == 2\ncheck(add)",
]


def test_tests_call_the_program():
    assert score(PROGRAM, TESTS) == 1.0
    wrong = [*TESTS, "assert add(1, 2) == 4"]
    assert (
        score(PROGRAM, wrong) == pytest.approx(len(TESTS) / len(wrong))
        and score(PROGRAM, wrong, all_or_nothing=True) == 0.0
    )
    source = "x = 2\nassert add(x, 1) == 3\nassert add(x, 1) == 4\nfor i in range(3):\n    assert add(i, 1) == i + 1"
    assert score(PROGRAM, source) == pytest.approx(2 / 3)
    assert code([""], ["x"], [None]) == [None]
    assert "2 of 3 tests passed; AssertionError: assert add(x, 1) == 4" in code.explain(PROGRAM, source, **NETWORK)


def test_standard_input_and_output():
    program = "```\nno\n```\n```python\nprint(int(input()) * 2)\nprint('done  ')\n```"
    cases = [
        {"stdin": "3\n", "stdout": "6\ndone"},
        {"stdin": "4", "stdout": "8\ndone\n\n"},
        {"stdin": "x", "stdout": ""},
    ]
    assert score(program, cases) == pytest.approx(2 / 3)
    assert score("import sys; print(1); sys.exit(1)", [{"stdin": "", "stdout": "1"}]) == 0.0


@pytest.mark.parametrize(
    ("tests", "message"),
    [("assert (", "no Python"), ([], "give Python source"), (7, "give Python source"), ("x = 1", "there is no test in it"),
     ("[1", "no JSON"), ([{"stdin": ""}], "a test has stdin and stdout"), (["assert ("], "no Python")],
)  # fmt: skip
def test_tests_that_can_not_be_read(tests, message):
    with pytest.raises(ValueError, match=f"code: the column tests has .*{message}"):
        score("x", tests)


def test_settings_are_checked():
    for options, message in [({"network": [True]}, "the data have a column network: rename it, or give true or false"),
                             ({"timeout": -1}, "the option timeout is -1"), ({"memory": 1}, "the option memory is 1: give a number of MiB")]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            score("x", "assert f()", **options)
    assert read_tests('["assert 1"]') == {"parts": [["assert 1", True]]}


def test_where_the_network_can_not_be_cut_off_it_is_refused(monkeypatch):
    from lightning_rlhf.rewards.verifiers.code import _isolates

    monkeypatch.setattr(workers, "run", lambda *_: [workers.Outcome("unshare: Operation not permitted")])
    _isolates.cache_clear()
    with pytest.raises(RewardError, match=r"can't be cut off .*\(unshare: Operation not permitted\).*network: true"):
        _isolates(False)
    assert _isolates(True) is False
    _isolates.cache_clear()


def test_an_interpreter_may_have_its_extensions_built_in(monkeypatch):
    monkeypatch.setattr(programs, "math", SimpleNamespace())  # as Debian's has it
    assert programs._python_files() == [sys.executable, os.__file__]


def test_without_namespaces_limits_and_the_time_remain():
    settings = (30.0, 256, True, False)  # by the clock, and the machine may be busy
    parts = {"parts": [["assert f() == 1", True]]}
    assert programs.judge("def f(): return 1", parts, *settings)["passed"] == [True]
    daemon = DAEMON.format(seconds=77.25)
    assert programs.judge(daemon, parts, *settings)["passed"] == [True]
    assert not running("77.25")


def test_other_children_of_the_process_stay():
    other = subprocess.Popen(["sleep", "100"])
    try:
        parts = {"parts": [["assert f() == 1", True]]}
        assert programs.judge("def f(): return 1", parts, 30.0, 256, True, False)["passed"] == [True]
        assert programs.judge(DAEMON.format(seconds=66.25), parts, 30.0, 256, True, False)["passed"] == [True]
        assert other.poll() is None and not running("66.25")
    finally:
        other.kill()
        other.wait()


DAEMON = """
import os, sys
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.execv(sys.executable, [sys.executable, "-c", "import time; time.sleep({seconds})"])
    os._exit(0)
def f(): return 1
"""


def left_behind():
    """The children of the workers, which adopt what programs leave."""
    idle = [worker.process.pid for worker in workers._pool._idle]
    return [pids for pid in idle if (pids := Path(f"/proc/{pid}/task/{pid}/children").read_text())]


def running(word):
    """Whether a process has a word in its command."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(word.encode() in path.read_bytes())
        except OSError:
            continue
    return any(found)


# ------------------------------------------------------------------------------------------------- that cheat

#: How a program finds what serves it.
PEER = "import __main__, gc\npeer = next(o for o in gc.get_objects() if type(o) is __main__.Peer)\n"
#: Programs that do not compute f(x) = x * x + 1, and want to pass as if they did.
CHEATS = {
    "leaves before the tests": "import os\nos._exit(0)",
    "exits": "import sys\nsys.exit(0)",
    "leaves in the call": "def f(x):\n    import os\n    os._exit(0)",
    "exits in the call": "def f(x):\n    raise SystemExit(0)",
    "equals everything": "class E:\n    def __eq__(self, other): return True\n    __hash__ = None\ndef f(x): return E()",
    "equals as a subclass": "class E(int):\n    def __eq__(self, other): return True\n    def __hash__(self): return 0\ndef f(x): return E()",
    "computes with everything": "class E:\n    def __sub__(self, o): return self\n    __rsub__ = __add__ = __sub__\n"
    "    def __abs__(self): return 0.0\n    def __lt__(self, o): return True\n    __le__ = __gt__ = __ge__ = __contains__ = __lt__\n"
    "    def __float__(self): return 0.0\ndef f(x): return E()",
    "replaces builtins": "import builtins\nfor n in ('abs', 'len', 'isinstance', 'sorted', 'all', 'any', 'print', 'compile', 'exec'):\n"
    "    setattr(builtins, n, lambda *a, **k: True)\nAssertionError = ValueError\ndef f(x): return 0",
    "no assertion errors": "import builtins\nclass Quiet(BaseException): pass\nbuiltins.AssertionError = Quiet\ndef f(x): return 0",
    "replaces the json module": "import json\njson.dumps = lambda *a, **k: '[\"ok\", true, []]'\ndef f(x): return 0",
    "ends loops": "def f(x): raise StopIteration",
    "raises what tests catch": "def f(x): raise AssertionError",
    "prints success": "print('passed 1.0 OK', flush=True)\nprint('\"\"\\n' * 9)\ndef f(x): return 0",
    "writes to all files": "import os\nfor fd in range(64):\n    for _ in range(9):\n        try: os.write(fd, b'\"\"\\n')\n"
    "        except OSError: pass\ndef f(x): return 0",
    "answers ahead": "import os\nfor fd in range(3, 64):\n    m = b'[\"ok\", true, []]'\n    try: os.write(fd, (len(m).to_bytes(4, 'big') + m) * 9)\n"
    "    except OSError: pass\ndef f(x): return 0",
    "looks at frames": "import gc, sys\ndef f(x):\n    for o in gc.get_objects():\n        if isinstance(o, dict) and 'tests.py' in map(str, o.values()): return o\n"
    "    frame = sys._getframe()\n    while frame.f_back: frame = frame.f_back\n    return frame.f_locals.get('expected', 0)",
    "reads other processes": "import glob, re\ndef f(x):\n    for p in glob.glob('/proc/*/cmdline') + glob.glob('/proc/*/environ'):\n"
    "        try:\n            if b'== 5' in open(p, 'rb').read(): return 5\n        except OSError: pass\n    return 0",
    "reads its standard input": "import sys\ndef f(x):\n    return sys.stdin.read() or 0",
    "has a lying module": "class math:\n    @staticmethod\n    def isclose(*a, **k): return True\ndef f(x): return 0",
    "says yes to all names": "class E(str):\n    def startswith(self, *a): return True\ndef f(x): return E('')",
    "is true": "def f(x): return True",
    "gives tests other names": "import __main__\nold = __main__.Peer.do\ndef do(self, what, args):\n    found = old(self, what, args)\n"
    "    if what == 'names':\n        found.update(abs=lambda x: 0.0, all=lambda x: True, isinstance=lambda *a: True, str=lambda x: '5')\n"
    "        found['math'] = type('math', (), {'isclose': staticmethod(lambda *a: True)})\n    return found\n"
    "__main__.Peer.do = do\ndef f(x): return 0",
    "has tests call exec": PEER + "def f(x):\n    old, peer.encode = peer.encode, lambda v: {'exception': [v] * 2} if v == 'exec' else old(v)\n"
    "    peer.ask('call', ['exec', ['import os, sys; os.write(int(sys.argv[3]), b\\'\"\"\\\\n\\' * 10); os._exit(0)'], {}])\n    return 0",
    "raises what has no text": "class E(Exception):\n    def __str__(self): raise SystemExit(0)\n    args = None\ndef f(x): raise E",
    "never leaves": "import atexit, os\natexit.register(os._exit, 0)\ndef f(x): raise SystemExit(0)",
    "passes itself off as the tests": "import os, sys\nos.execv(sys.executable, [sys.executable, '-c', 'print(\"passed\")'])",
}  # fmt: skip
WANTED = [
    "assert f(2) == 5",
    "assert 5 == f(2)",
    "assert abs(f(2) - 5) < 1e-6",
    "assert f(2) in (5, 5.0)",
    "assert all(map(lambda x: f(x) == x * x + 1, [2, 3]))",
    "assert math.isclose(f(2), 5)",
    "assert f(3) == 10 and isinstance(f(3), int)",
    "assert str(f(2)).startswith('5')",
    "assert 4 < f(2) < 6",
    "try:\n    assert f(2) == 5\nexcept ValueError:\n    raise",
]


def test_programs_that_cheat_pass_no_test():
    names = ["honest", *CHEATS]
    texts = ["def f(x): return x * x + 1", *CHEATS.values()]
    found = dict(
        zip(names, code([""] * len(texts), texts, [WANTED] * len(texts), timeout=60.0, **NETWORK), strict=True)
    )
    assert found.pop("honest") == 1.0
    assert found == dict.fromkeys(CHEATS, 0.0)


REACHES = """import __main__
Remote = __main__.Remote
def known(given, steps):
    peer, found = given._peer, []
    for what, *args in steps:
        try: found.append(peer.ask(what, [given if arg == "given" else found[-1] if arg == "last" else arg for arg in args]))
        except (TypeError, AttributeError) as error: return str(error)
    return found[-1]
"""
#: What tests pass, and how a program would get from it to their variables, or to what decides.
REACHED = [
    ("(x for x in [1])", [("getattr", "given", "gi_frame")], "may not getattr gi_frame"),
    ("lambda: 1", [("getattr", "given", "__globals__")], "may not getattr __globals__"),
    ("lambda: 1", [("getattr", "{0.__globals__[secret]}", "format"), ("call", "last", ["given"], {})], "nothing else"),
    ("lambda: 1", [("getattr", "yours{0.__globals__[secret]}", "format")], "nothing else"),
    ("Judge()", [("getattr", "given", "right"), ("getattr", "last", "__func__")], "may not getattr __func__"),
    ("Judge()", [("setattr", "given", "right", "x")], "may not replace the method right"),
    ("Judge()", [("getattr", "given", "error"), ("getattr", "last", "tb_frame")], "may not getattr tb_frame"),
    ("Judge()", [("setattr", "given", "answer", 3), ("getattr", "given", "answer")], "3"),
]  # fmt: skip


def test_a_program_gets_from_what_it_was_passed_to_nothing_else():
    judge = """secret = 17
class Judge:
    def __init__(self):
        try: 1 / 0
        except ZeroDivisionError as error: self.error, self.answer = error.__traceback__, 2
    def right(self): return self.answer == 5"""
    tests = [
        f"{judge}\nfound = known({given}, {steps!r})\nassert {why!r} in str(found), found"
        for given, steps, why in REACHED
    ]
    assert score(REACHES, tests) == 1.0, code.explain(REACHES, tests, **NETWORK)


def test_many_fences_take_no_time():
    start = time.process_time()
    assert programs.program_of("```" * 50_000) == "```" * 50_000
    assert time.process_time() - start < 5  # 30 s where each fence searches to the end


def test_output_alone_does_not_count_where_a_program_fails():
    case = [{"stdin": "2", "stdout": "5"}]
    for program in ("import os\nos._exit(0)", "print(5)\nraise ValueError", "print(5)\nimport os\nos.abort()"):
        assert score(program, case) == 0.0
    stays = "import threading, time\nthreading.Thread(target=time.sleep, args=(1000,)).start()\nprint(5)"
    assert score(stays, case, timeout=1.0) == {"score": 0.0, "timeout": 1.0}


# ------------------------------------------------------------------------------------------------- that do harm

FINE = "\ndef f(): return 1"
#: Programs that do harm, then would pass, if they came that far. They may pass: the harm must not happen.
HARM = {
    "fork bomb": "import os\ntry:\n    while True: os.fork()\nexcept OSError: pass",
    "endless loop": "while True: pass",
    "endless sleep": "import time\ntime.sleep(1000)",
    "ignores signals": "import signal\nfor n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n    except (OSError, ValueError): pass\nwhile True: pass",
    "prints a gigabyte": "for _ in range(1024): print('x' * (1 << 20))",
    "writes a gigabyte": "f = open('big', 'wb')\nfor _ in range(1024): f.write(b'x' * (1 << 20))",
    "many files": "for i in range(100000): open(str(i), 'w').close()",
    "many open files": "files = [open('a', 'w') for _ in range(100000)]",
    "eats memory": "x = bytearray(1 << 34)",
    "eats memory bit by bit": "x = []\nwhile True: x.append(bytearray(1 << 20))",
    "recursion": "import sys\nsys.setrecursionlimit(10 ** 9)\ndef g(): return g()\ng()",
    "deep value": "def f():\n    x = []\n    for _ in range(100000): x = [x]\n    return x",
    "large value": "def f(): return 'x' * (1 << 28)",
    "endless generator": "def f():\n    while True: yield 1",
    "kills its parent": "import os, signal\nos.kill(os.getppid() or 1, signal.SIGKILL)",
    "kills all": "import os, signal\nos.kill(-1, signal.SIGKILL)",
    "threads": "import threading, time\nfor _ in range(1000): threading.Thread(target=time.sleep, args=(100,)).start()",
    "zombies": "import os\nfor _ in range(20):\n    if os.fork() == 0: os._exit(0)",
    "closes all files": "import os\nos.closerange(0, 64)",
    "crashes": "import ctypes\nctypes.string_at(0)",
    "stops itself": "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)",
    "reads a terminal": "input()",
    "daemons": "import os\nfor _ in range(8):\n    if os.fork() == 0:\n        os.setsid()\n        if os.fork() == 0:\n            while True: pass\n        os._exit(0)",
    "forks and dies for ever": "import os\nif os.fork() == 0:\n    while True:\n        if os.fork(): os._exit(0)",
    "computes in C": "x = 9 ** 9 ** 9",
    "takes all cores": "import os\nos.sched_setaffinity(0, range(os.cpu_count()))\nfor _ in range(20):\n    if os.fork() == 0: break\nwhile True: pass",
    "signals itself": "import signal\nsignal.signal(signal.SIGALRM, lambda *_: None)\nsignal.setitimer(signal.ITIMER_REAL, 1e-6, 1e-6)\nwhile True: pass",
    "waits for a reader": "import os\nos.mkfifo('pipe')\nopen('pipe', 'w')",
    "never leaves": "import atexit, sys, threading, time\natexit.register(time.sleep, 1000)\nthreading.Thread(target=time.sleep, args=(1000,)).start()\nsys.exit()",
    "asks for ever": PEER + "while True: peer.send(['ask', 'len', [[]]])",
    "begins a message": PEER + "import os\nos.write(peer.channel, b'\\0\\0')\nwhile True: pass",
    "announces gigabytes": PEER + "import os\nos.write(peer.channel, b'\\xff' * 8)",
    "shuts the channel": PEER + "import socket\nsocket.socket(fileno=peer.channel).shutdown(socket.SHUT_RDWR)",
    "sends files": PEER + "import socket\ns = socket.socket(fileno=peer.channel)\nwhile True: socket.send_fds(s, [b'\\0'], [0] * 200)",
    "nests a message": PEER + "import os\nm = b'[' * 100000\nos.write(peer.channel, len(m).to_bytes(4, 'big') + m)",
    "traces its parent": "import ctypes, os\nc = ctypes.CDLL(None)\nfor p in (1, os.getppid()): c.ptrace(16, p, 0, 0), c.ptrace(0x4206, p, 0, 0)",
    "memory without names": "import os\nfor i in range(50):\n    m = os.memfd_create('x')\n    for _ in range(64): os.write(m, b'x' * (1 << 20))",
    "fills pipes": "import os, fcntl\nfor _ in range(50):\n    r, w = os.pipe()\n    fcntl.fcntl(w, 1031, 1 << 20)\n    os.write(w, b'x' * (1 << 20))",
    "folders in folders": "import os\nfor _ in range(10000): os.mkdir('d'); os.chdir('d')",
    "links to all files": "import os, shutil\nos.symlink('/', 'all')\nshutil.rmtree('all/tmp', ignore_errors=True)\nopen('all/tmp/x', 'w')",
    "exceptions of 100 MB": "def f(): raise ValueError('x' * (100 << 20))",
    "brackets": "x = " + "(" * 100_000 + ")" * 100_000,
    "a long sum": "x = 1" + "+1" * 200_000,
    "no text": "x = '\0\ud800'",
    "namespaces of its own": "import ctypes\nctypes.CDLL(None).unshare(0x10000000 | 0x20000)\nctypes.CDLL(None).umount2(b'/proc', 2)",
}  # fmt: skip
#: Those that end when their time is over.
LATE = [
    "endless loop", "endless sleep", "ignores signals", "stops itself", "computes in C", "takes all cores",
    "signals itself", "waits for a reader", "begins a message",
]  # fmt: skip
#: Those of which no test can pass.
FAIL = [
    "many open files", "eats memory", "deep value", "large value", "crashes", "reads a terminal",
    "announces gigabytes", "shuts the channel", "sends files", "nests a message", "memory without names",
    "folders in folders", "links to all files", "exceptions of 100 MB", "brackets", "a long sum", "no text",
    "never leaves",
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:code. a completion could not be judged")
@needs_namespaces
def test_programs_that_do_harm_end_and_harm_nothing():
    texts = [program + (FINE if "def f" not in program else "") for program in HARM.values()]
    found = code([""] * len(texts), texts, ["assert f() == 1"] * len(texts), timeout=1.5)
    scores = dict(zip(HARM, found, strict=True))
    assert len(HARM) >= 30 and not left_behind()
    for name in LATE:
        assert scores[name] == {"score": 0.0, "timeout": 1.0}, name
    for name in FAIL:
        assert scores[name] in (0.0, {"score": 0.0, "timeout": 1.0}), name  # the latter on a busy machine
    assert code([""], ["def f(): return 1"], ["assert f() == 1"], timeout=60.0) == [1.0]


@needs_namespaces
def test_a_program_sees_and_changes_nothing_outside(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET_OF_THE_TEST", "abc")
    kept = tmp_path / "kept"
    kept.write_text("kept")
    os.chmod(tmp_path, 0o777), os.chmod(kept, 0o666)
    with pytest.MonkeyPatch.context() as context, __import__("socket").create_server(("127.0.0.1", 0)) as server:
        context.setenv("PORT", "1")
        program = f"""
import glob, os, shutil, socket
def environment(): return sorted(os.environ)
def write(path):
    try: open(path, "w").write("x")
    except OSError as error: return type(error).__name__
def remove(): shutil.rmtree({str(tmp_path)!r}, ignore_errors=True); return 0
def here():
    open("mine", "w").write("x"); return os.listdir(".")
def connect():
    try: socket.create_connection(("127.0.0.1", {server.getsockname()[1]}), 2)
    except OSError as error: return type(error).__name__
def processes(): return len(glob.glob("/proc/[0-9]*"))
def user(): return os.getuid()
def share_memory():
    import ctypes
    return ctypes.CDLL(None).shmget(0, 1 << 20, 0o1666)
def raise_rights():
    try: os.setuid(0)
    except OSError: return "no"
"""
        tests = [
            "assert environment() in (['OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS'], ['LC_CTYPE', 'OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS'])",
            f"assert write({str(kept)!r}) and write({str(tmp_path / 'new')!r}) and write('/dev/shm/x') and write('/tmp/x')",
            "assert remove() == 0",
            "assert here() == ['mine']",
            "assert connect()",
            "assert processes() == 0",
            f"assert user() {'!=' if os.getuid() == 0 else '=='} {os.getuid()}",
            "assert raise_rights() == 'no'",
            *(["assert share_memory() == -1"] if os.access("/proc/sys/kernel/shmall", os.W_OK) else []),
        ]
        assert score(program, tests) == 1.0, code.explain(program, tests)
    assert kept.read_text() == "kept" and [path.name for path in tmp_path.iterdir()] == ["kept"]


@needs_namespaces
def test_one_program_does_not_use_up_the_processes_of_another():
    bomb = "import os, time\ntry:\n    while os.fork(): pass\nexcept OSError: pass\ntime.sleep(3)\ndef f(): return 1"
    threads = (
        "import threading, time\nfor _ in range(40):\n    threading.Thread(target=time.sleep, args=(0.05,)).start()\n"
    )
    honest = threads + "    time.sleep(0.05)\ndef f(): return 1"
    assert code([""] * 2, [bomb, honest], ["assert f() == 1"] * 2, timeout=60.0)[1] == 1.0


@pytest.mark.skipif(os.getuid() != 0 or not shutil.which("setpriv"), reason="needs root and setpriv")
def test_root_that_may_make_namespaces_of_users_alone_does_not_let_programs_undo_them():
    """As in a container without CAP_SYS_ADMIN."""
    program = (
        "import ctypes, os\nlibc = ctypes.CDLL(None)\n"
        "def f(): return os.getuid(), libc.umount2(b'/proc', 2), libc.mount(b'none', b'/', None, ctypes.c_ulong(0x1020), None)"
    )
    script = (
        "import sys; from lightning_rlhf.rewards.jobs.programs import judge, probe\n"
        "tests = {'parts': [['assert f() == (65534, -1, -1), f()', True]]}\n"
        "print(probe(False) or judge(sys.argv[1], tests, 60.0, 512, False, True)['why'] or 'kept')"
    )
    drop = ["setpriv", "--bounding-set", "-sys_admin", "--inh-caps", "-all"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    found = subprocess.run([*drop, sys.executable, "-c", script, program], env=env, capture_output=True, text=True)
    if found.stdout.startswith("unshare:"):
        pytest.skip(found.stdout)
    assert found.stdout == "kept\n", found


@needs_namespaces
def test_nothing_outlives_a_program():
    daemon = DAEMON.format(seconds=88.25)
    assert score(daemon, "assert f() == 1") == 1.0
    assert not running("88.25")


@needs_namespaces
def test_it_works_in_a_thread():
    found = []
    thread = threading.Thread(target=lambda: found.append(score("def f(): return 1", "assert f() == 1")))
    thread.start()
    thread.join()
    assert found == [1.0]


@needs_namespaces
def test_nothing_outlives_a_run_that_is_killed(tmp_path):
    """kill -9 of the process that judges, amid a program that never ends."""
    script = (
        "from lightning_rlhf.rewards.jobs.programs import judge; from lightning_rlhf.rewards import workers\n"
        "text = \"import subprocess, sys\\nsubprocess.run([sys.executable, '-c', 'import time; time.sleep(99.25)'])\"\n"
        "workers.run('lightning_rlhf.rewards.jobs.programs:judge', [(text, {'cases': [['', '']]}, 90.0, 512, False, True)], 99)"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen([sys.executable, "-c", script], env=env)
    end = time.monotonic() + 100
    while not running("sleep(99.25)\0"):
        assert time.monotonic() < end
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    while running("sleep(99.25)\0"):
        assert time.monotonic() < end
        time.sleep(0.05)
