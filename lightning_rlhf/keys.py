"""The keys of commands and configs: faults are told in one line that names the nearest key, and the file and line."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, NoReturn

from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import Strategy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_rlhf.arguments import TOO_MANY, meant, nearest

#: What may be named by a class.
BASES = (LightningModule, LightningDataModule, Callback, Logger, Strategy, Optimizer, LRScheduler)
# jsonargparse tells of a fault by a text, in which what lies deeper is indented. These are the parts that we read;
# a test for each fails where a version words it otherwise.
_PLACE = re.compile(r'Parser key "([^"]+)":')
_NO_KEY = re.compile(
    r"^(?:Subcommand '[^']+' does not accept option|Option|Group '(?P<group>[^']+)' does not accept option) "
    r"'(?P<key>[^']+)'"
)
_LEFT_OVER = re.compile(r"unrecognized arguments: (?:--?(?P<key>[^ =]+)|(?P<word>\S+))")
_REQUIRED = re.compile(r"the following arguments are required: (.*)")
_NO_CLASS = re.compile(r"Expected a dot import path string: (\S+)")
_CLASS = re.compile(r"Problem with given class_path '([^']+)':")
_EXPECTED = re.compile(r"Expected an? (.+?)\. Got value: (.*)")
_SUBTYPES = re.compile(r"Subtypes: \[(.*)\]")
_GIVEN = re.compile(r"Given value: (.*)")
#: How an inner parser tells an outer one of a key that it does not have.
_UNKNOWN = re.compile(r"there is no key `([^`]+)`(?:; did you mean `([^`]+)`\?)?")


class KeyParser(LightningArgumentParser):
    """Keys are written in full; a fault is told in one line, with the nearest key.

    jsonargparse makes the parsers of classes that keys name by this class too.

    Attributes:
        files: Config files that were read, as given and in full, the latest first.
        reading: The one that is being read.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})
        self.files: list[tuple[str, str]] = []
        self.reading: tuple[str, str] | None = None

    def parse_path(self, path: Any, *args: Any, **kwargs: Any) -> Any:
        """Notes what is read; jsonargparse comes here for each ``--config``."""
        self.reading = str(path), os.path.abspath(path)
        self.files.insert(0, self.reading)
        found = super().parse_path(path, *args, **kwargs)
        self.reading = None
        return found

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Ends the command with its status for wrong usage, 2; an inner parser's fault is told by the outer one."""
        parser = getattr(ex, "subcommand_parser", None) or self  # whose keys they are
        files = [parser.reading] if parser.reading else []
        if found := _NO_KEY.match(message):
            files = files or parser.files  # top-level keys are compared when all files are read
            message = parser.no_key(".".join(filter(None, (found["group"], found["key"]))))
        elif found := _LEFT_OVER.match(message):
            message = parser.no_key(found["key"]) if found["key"] else f"{found['word']} {TOO_MANY}"
        if not self.exit_on_error:
            super().error(message, ex)
        self.exit(2, f"{parser.prog.replace(' [options]', '')}: {_brief(message, files)}\n")

    def no_key(self, key: str) -> str:
        """Says that there is no such key, and which is near; keys of the classes that keys name are not known here."""
        keys = [a.dest for a in self._actions if a.option_strings and a.dest.rpartition(".")[2] != "help"]
        found = nearest(key, keys)
        return f"there is no key `{key}`" + (f"; did you mean `{found}`?" if found else "")


def _brief(message: str, files: Sequence[tuple[str, str]]) -> str:
    """A fault in one line: the key, what is wrong with it, and the file where it is in one."""
    path: list[tuple[int, str]] = []  # indentation and name of the keys around a line
    deepest: list[str] = []
    body: list[str] = []  # what is said of the deepest one
    named = ""
    for line in message.splitlines():
        text = re.sub(r"^ *(- )?", "", line)
        indent = len(line) - len(text)
        while text and path and path[-1][0] >= indent:
            path.pop()
        keys = [key for _, key in path]
        key = ".".join(keys)
        if found := _CLASS.search(text):
            named = found[1].rpartition(".")[2]
        if found := _UNKNOWN.search(text):
            wrong, right = (".".join([*keys, name]) if name else "" for name in found.groups())
            help = f"--{keys[0]}.help {named}" if named and keys[0] in ("model", "data") else "--help"
            end = f"did you mean {right}?" if right else f"{help} lists all."
            if named in (LightningModule.__name__, LightningDataModule.__name__):  # of which class, isn't said yet
                end = f"say which class it is of, before it: --{keys[0]} CLASS (class_path in a file)."
            return f"{_place(wrong, files)}there is no {wrong}; {end}"
        if found := _REQUIRED.search(text):
            missing = [".".join([*keys, name.partition(".")[2] or name]) for name in found[1].split(", ")]
            return f"give {' and '.join(f'--{name}' for name in missing)}, or a --config that has it"
        if found := _NO_CLASS.search(text):
            where = f"{_place(key, files)}{key}{': ' if key else ''}"
            return f"{where}there is no class {found[1]}{meant(found[1], _classes())}"
        if found := _PLACE.search(text):
            path.append((indent, found[1]))
            text = text[found.end() :].strip()
            if len(path) > len(deepest):
                deepest, body = [key for _, key in path], []
        if text and len(path) >= len(deepest):
            body.append(text)
    key = ".".join(deepest)
    return f"{_place(key, files)}{key}{': ' if key else ''}{_value(body)}"


def _place(key: str, files: Sequence[tuple[str, str]]) -> str:
    """The file and line of a key, where it is in one."""
    name = re.escape(key.rpartition(".")[2])
    for given, path in files:
        with suppress(OSError), open(path, encoding="utf-8") as file:
            at = [i for i, line in enumerate(file, 1) if re.search(rf"(?<![\w.]){name}[\"']?\s*:", line)]
            if name and at:
                return f"{given}, line {at[-1]}: "
    return f"{files[0][0]}: " if len(files) == 1 else ""


def _value(body: list[str]) -> str:
    """What was wrong with a value."""
    subtypes, given = ([found[1] for line in body if (found := what.search(line))] for what in (_SUBTYPES, _GIVEN))
    text = " ".join(body).replace('in "<unicode string>", ', "at ")
    if found := _EXPECTED.search(text):
        given, subtypes = [found[2]], [found[1]]
    if subtypes and given:
        return f"{given[0]} is given where {_types(subtypes[0])} is expected"
    return text


def _types(text: str) -> str:
    """Types in words."""
    text = re.sub(r"(?:typing\.)?Literal\[(.*?)\]", lambda found: found[1].replace("'", ""), text)
    text = re.sub(r"<class '([^']+)'>", r"\1", text).replace("NoneType", "null")
    return re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", text)


def _classes() -> Iterator[str]:
    """Names of the classes that are loaded and that a key may name."""
    left: list[type] = list(BASES)
    while left:
        found = left.pop()
        left += found.__subclasses__()
        yield found.__name__


class StageCLI(LightningCLI):
    """A LightningCLI whose arguments may come from Python too; Lightning warns of them where the process has others."""

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Reads the command line."""
        self.config = parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        """Keeps the settings of the command line, where Lightning would put those of the checkpoint, unsaid.

        Even the module would be the checkpoint's. There is no public switch; a test fails where this one moves.
        """
