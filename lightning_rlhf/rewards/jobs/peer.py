"""Two processes that share objects: tests call what a program defines, and never load the program.

Run as ``python -I -c SOURCE program|tests CHANNEL RESULTS``, with the code as the standard input, on the two ends of a
socket. Values cross it as plain data; other objects stay where they are, and cross as handles. A program can answer
calls, and nothing else: it sees neither tests nor expected values, and an object that claims to equal everything equals
no data, since the comparison happens on the side of the tests.
"""
# mypy: ignore-errors
# It passes objects of any type, and runs where none of this package can be imported.

import ast
import builtins
import collections
import decimal
import fractions
import json
import operator
import os
import sys
import types

LIMIT = 16 << 20  # bytes of a message
COMPARE = [
    "lt",
    "le",
    "gt",
    "ge",
    "add",
    "sub",
    "mul",
    "truediv",
    "floordiv",
    "mod",
    "pow",
    "matmul",
    "and_",
    "or_",
    "xor",
]
BUILTINS = ["len", "iter", "next", "bool", "str", "repr", "int", "float", "abs", "getattr", "setattr", "isinstance"]
#: What only answers yes or no of data: an object of the program could always say yes.
VERDICTS = {n for t in (str, bytes, set, float) for n in dir(t) if n.startswith("is") or n.endswith("with")}
#: Objects of the tests whose attributes lead to their code and variables.
HIDDEN = (
    type,
    types.ModuleType,
    types.FunctionType,
    types.MethodType,
    types.BuiltinFunctionType,
    types.CodeType,
    types.FrameType,
    types.TracebackType,
    types.GeneratorType,
    types.CoroutineType,
    types.AsyncGeneratorType,
)


class Gone(BaseException):
    """The other process ended, or wrote what can't be read."""


class Remote:
    """An object of the other process."""

    def __init__(self, peer, number):
        object.__setattr__(self, "_peer", peer)
        object.__setattr__(self, "_number", number)

    def __call__(self, *args, **kwargs):
        """Calls it."""
        return self._peer.ask("call", [self, args, kwargs])

    def __getattr__(self, name):
        if name.startswith("__") or name in VERDICTS:
            raise AttributeError(f"tests can't ask the program's object for {name}")
        return self._peer.ask("getattr", [self, name])

    def __setattr__(self, name, value):
        self._peer.ask("setattr", [self, name, value])

    def __eq__(self, other):
        return isinstance(other, Remote) and self._peer.ask("eq", [self, other])

    def __ne__(self, other):
        return not self == other

    def __hash__(self):
        return hash(self._number)

    def __instancecheck__(self, other):
        return isinstance(other, Remote) and self._peer.ask("isinstance", [other, self])

    def __contains__(self, item):
        raise TypeError("tests can't ask whether data are in an object of the program: convert it, as by list()")


def _method(name, both):
    def method(self, *args):
        if both and not all(isinstance(arg, Remote) for arg in args):
            return NotImplemented
        return self._peer.ask(name, [self, *args])

    return method


for _name in ("len", "iter", "next", "bool", "str", "repr", "getitem", "setitem", "delitem", "int", "float", "index",
              "neg", "abs", "enter", "exit"):  # fmt: skip
    setattr(Remote, f"__{_name}__", _method(_name, False))
for _name in COMPARE:
    setattr(Remote, f"__{_name.rstrip('_')}__", _method(_name, True))


class Peer:
    """One end of the channel.

    Args:
        channel: File descriptor of a socket.
        open_: Whether the other side may do more with objects than to call them and read their public attributes.
    """

    def __init__(self, channel, open_):
        self.channel, self.open, self.exported, self.numbers, self.gone = channel, open_, {}, {}, False

    # ---- messages

    def send(self, message):
        """Sends a message."""
        data = json.dumps(message).encode()
        if len(data) > LIMIT:
            raise ValueError("a value is too large to cross")
        data = len(data).to_bytes(4, "big") + data
        try:
            while data:
                data = data[os.write(self.channel, data) :]
        except OSError:
            self.gone = True
            raise Gone from None

    def receive(self):
        """Waits for a message."""
        try:
            size = int.from_bytes(self.exactly(4), "big")
            if size > LIMIT:
                raise ValueError
            message = json.loads(self.exactly(size))
            if not isinstance(message, list) or len(message) != 3 or message[0] not in ("ask", "ok", "raise"):
                raise ValueError
            return message
        except (OSError, ValueError, RecursionError):
            self.gone = True
            raise Gone from None

    def exactly(self, size):
        """Reads so many bytes."""
        data = bytearray()
        while len(data) < size:
            part = os.read(self.channel, min(size - len(data), 1 << 20))
            if not part:
                raise OSError
            data += part
        return bytes(data)

    def ask(self, what, args):
        """Has the other side do something; meanwhile it may call what it was passed."""
        if self.gone:
            raise Gone
        self.send(["ask", what, self.encode(args)])
        while True:
            kind, first, second = self.receive()
            if kind == "ask":
                self.answer(first, second)
                continue
            try:
                if kind == "ok":
                    value, after = self.decode(first), self.decode(second)
                    if what == "call":
                        self.renew([*args[1], *args[2].values()], after)
                    return value
                error = self.error(first, self.decode(second))
            except (TypeError, ValueError, KeyError, AttributeError, IndexError, RecursionError, OverflowError):
                self.gone = True
                raise Gone from None
            if what != "next" and isinstance(error, (StopIteration, StopAsyncIteration, GeneratorExit)):
                error = RuntimeError(f"the program raised {type(error).__name__}")  # it would end a loop of the tests
            raise error

    def renew(self, given, after):
        """Takes over what a call did to lists, dicts and sets that it was passed."""
        for mine, other in zip(given, after, strict=False):
            if type(mine) is list and type(other) is list:
                mine[:] = other
            elif type(mine) in (dict, set) and type(other) is type(mine):
                mine.clear()
                mine.update(other)

    def answer(self, what, args):
        """Does what the other side asks."""
        try:
            if not self.open and (type(args[0]) is not dict or "yours" not in args[0]):
                # such as the text "{0.__globals__}", whose method format reads all
                raise TypeError("the program may use what it was passed, and nothing else")
            args = self.decode(args)
            value = self.do(what, args)
            given = [*args[1], *args[2].values()] if what == "call" else []
            after = [a if type(a) in (list, dict, set) else None for a in given]
            reply = ["ok", self.encode(value), self.encode(after)]
            json.dumps(reply)
        except Gone:
            raise
        except BaseException as error:
            names = [c.__name__ for c in type(error).__mro__]
            try:
                reply = ["raise", names, self.encode([str(a) for a in error.args])]
            except BaseException:
                reply = ["raise", names, self.encode([])]
        try:
            self.send(reply)
        except ValueError as error:
            self.send(["raise", ["ValueError", "Exception", "BaseException", "object"], self.encode([str(error)])])

    def do(self, what, args):
        """Does what was asked, if that is allowed."""
        thing, *rest = args
        if what == "call":
            return thing(*rest[0], **rest[1])
        if not self.open:
            if what not in ("getattr", "setattr", "bool", "len", "iter", "next", "getitem"):
                raise TypeError(f"the program may not {what} here")
            if "attr" in what and (type(rest[0]) is not str or rest[0].startswith("_") or isinstance(thing, HIDDEN)):
                raise TypeError(f"the program may not {what} {rest[0]}")
            if what == "setattr" and callable(getattr(type(thing), rest[0], None)):
                raise TypeError(f"the program may not replace the method {rest[0]}")
        if what == "names":
            return {name: self.namespace[name] for name in rest[0] if name in self.namespace}
        if what in ("enter", "exit"):
            return getattr(thing, f"__{what}__")(*rest)
        if what in BUILTINS:
            return getattr(builtins, what)(thing, *rest)
        return getattr(operator, what)(thing, *rest)

    def error(self, names, args):
        """An exception of the same name, or of the nearest built-in class."""
        for name in names:
            kind = getattr(builtins, name, None)
            if isinstance(kind, type) and issubclass(kind, BaseException):
                break
        else:
            kind = Exception
        if names[0] != kind.__name__:
            kind = self.exception(str(names[0]), kind)
        error = kind.__new__(kind)
        error.args = tuple(args)
        return error

    def exception(self, name, base):
        """A class of exceptions of a name, the same each time."""
        return self.numbers.setdefault(("exception", name), type(name, (base,), {}))

    # ---- values

    def encode(self, value):
        """A value as JSON can hold it; subclasses of plain types become these."""
        kind = type(value)
        if value is None or kind in (bool, str, float):
            return value
        if isinstance(value, Remote) and kind is Remote:
            return {"yours": value._number}
        if kind is int:
            return value if abs(value) < 1 << 1000 else {"int": hex(value)}
        if isinstance(value, tuple) and hasattr(kind, "_fields"):
            return {"named": [kind.__name__, list(kind._fields), [self.encode(v) for v in tuple.__iter__(value)]]}
        if isinstance(value, list):
            return [self.encode(v) for v in list.__iter__(value)]
        for base in (tuple, set, frozenset, collections.deque):
            if isinstance(value, base):
                return {base.__name__: [self.encode(v) for v in base.__iter__(value)]}
        if isinstance(value, dict):
            return {"dict": [[self.encode(k), self.encode(dict.__getitem__(value, k))] for k in dict.__iter__(value)]}
        if isinstance(value, (bytes, bytearray)):
            return {"bytes": bytes(value).hex()}
        if kind is complex:
            return {"complex": [value.real, value.imag]}
        if kind in (decimal.Decimal, fractions.Fraction):
            return {kind.__name__: str(value)}
        if kind is range:
            return {"range": [value.start, value.stop, value.step]}
        for base in (int, float, str):
            if isinstance(value, base):
                return self.encode(base.__add__(value, base()))
        if kind.__module__ == "numpy" and hasattr(value, "tolist"):
            return {"array": [str(value.dtype), value.tolist()]} if getattr(value, "ndim", 0) else value.item()
        if kind is type and issubclass(value, BaseException) and self.open:
            base = next(c for c in value.__mro__ if c.__module__ == "builtins")
            return {"exception": [value.__name__, base.__name__]}
        number = self.numbers.setdefault(id(value), len(self.exported))
        self.exported[number] = value
        return {"mine": number}

    def decode(self, value):
        """The value again."""
        if isinstance(value, list):
            return [self.decode(v) for v in value]
        if not isinstance(value, dict):
            return value
        ((kind, held),) = value.items()
        if kind == "yours":
            return self.exported[held]
        if kind == "mine":
            return Remote(self, int(held))
        if kind == "int":
            return int(held, 16)
        if kind == "dict":
            return {self.decode(k): self.decode(v) for k, v in held}
        if kind == "bytes":
            return bytes.fromhex(held)
        if kind == "complex":
            return complex(*held)
        if kind == "named":
            return collections.namedtuple(held[0], held[1])(*map(self.decode, held[2]))
        if kind == "array":
            import numpy

            return numpy.array(held[1], dtype=held[0] if held[0][0] in "biufc" else None)
        if kind == "exception":
            base = getattr(builtins, held[1])
            if not (isinstance(base, type) and issubclass(base, BaseException)):  # such as exec
                raise ValueError(f"{held[1]} is no exception")
            return base if held[0] == held[1] else self.exception(held[0], base)
        makes = {"tuple": tuple, "set": set, "frozenset": frozenset, "deque": collections.deque}
        if kind in makes:
            return makes[kind](map(self.decode, held))
        if kind == "range":
            return range(*held)
        return {"Decimal": decimal.Decimal, "Fraction": fractions.Fraction}[kind](held)


def program(channel, code):
    """Runs a program, says how that went, and answers calls."""
    peer = Peer(channel, True)
    peer.namespace = {"__name__": "solution", "__builtins__": builtins}
    try:
        exec(compile(code, "solution.py", "exec"), peer.namespace)
        said = ["ok", None, None]
    except BaseException as error:
        said = ["raise", [c.__name__ for c in type(error).__mro__], [str(error)[:300]]]
    peer.send(said)
    while True:
        _, what, args = peer.receive()
        peer.answer(what, args)


def tests(channel, code, results):
    """Runs tests, and writes a line about each: empty if it passed, otherwise why it did not."""
    parts = json.loads(code)
    peer = Peer(channel, False)

    def say(why):
        os.write(results, (json.dumps(why[:300]) + "\n").encode())

    try:
        kind, names, args = peer.receive()
    except Gone:
        kind, names, args = "raise", ["SystemExit"], ["its process ended"]
    if kind != "ok":
        return say(f"the program failed: {names[0]}: {args[0]}")
    trees = [ast.parse(source) for source, _ in parts]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    wanted = {n.id for n in nodes if isinstance(n, ast.Name)} - set(dir(builtins))
    calls = {n.func.id for n in nodes if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
    owned = {n.value.id for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)}
    modules = (wanted & owned & set(sys.stdlib_module_names)) - calls  # the program's own could lie
    space = {"__name__": "tests"}

    def names(of):  # and no others, such as an abs or a math of the program's
        found = peer.ask("names", [None, sorted(of)])
        return {name: found[name] for name in of if name in found}

    try:
        space.update(names(wanted - modules))
        module = types.ModuleType("solution")
        module.__dict__.update(names(imported(trees)))
        sys.modules["solution"] = module
    except BaseException:
        return say("the program's process ended")
    for name in modules:
        space.setdefault(name, __import__(name))
    for (source, counts), tree in zip(parts, trees, strict=True):
        why = ""
        try:
            exec(compile(tree, "tests.py", "exec"), space)
            for node in tree.body:
                if counts and isinstance(node, ast.FunctionDef) and node.name.startswith("test"):
                    space[node.name]()
        except Gone:
            pass
        except BaseException as error:
            why = f"{type(error).__name__}: {error}" if str(error) else f"{type(error).__name__}: {source.strip()}"
        if peer.gone:  # also where a test caught it
            return say("the program's process ended, or it took too much")
        if counts:
            say(why)


def imported(trees):
    """Names that tests import from ``solution``."""
    lines = [n for t in trees for n in ast.walk(t) if isinstance(n, ast.ImportFrom) and n.module == "solution"]
    return {alias.name for n in lines for alias in n.names}


if __name__ == "__main__":
    _role, _channel, _results = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    _code = sys.stdin.buffer.read().decode("utf-8", "surrogatepass")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.setrecursionlimit(5000)
    program(_channel, _code) if _role == "program" else tests(_channel, _code, _results)
