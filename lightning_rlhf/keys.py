"""Reads the keys of commands and configs. An error is one line that names the closest key, the file and the line."""

from __future__ import annotations

import ast
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import Strategy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_rlhf.arguments import TOO_MANY, did_you_mean, nearest
from lightning_rlhf.data.sources import not_utf8
from lightning_rlhf.moved import LACKED, MOVED
from lightning_rlhf.utils.imports import import_object

#: Base classes of objects that a config names by their class.
BASES = (LightningModule, LightningDataModule, Callback, Logger, Strategy, Optimizer, LRScheduler)
# jsonargparse reports errors as a text in which deeper keys are indented. These patterns find the parts that we need.
# A test for each pattern fails if a new version changes the text.
_PLACE = re.compile(r'Parser key "([^"]+)":')
_NO_KEY = re.compile(
    r"^(?:Subcommand '[^']+' does not accept option|Option|Group '(?P<group>[^']+)' does not accept option) "
    r"'(?P<key>[^']+)'"
)
_LEFT_OVER = re.compile(r"unrecognized arguments: (?:--?(?P<key>[^ =]+)|(?P<word>\S+))")
_NO_FILE = re.compile(r"^Parser key \"config\": File does not exist: '(.+)'$")
_REQUIRED = re.compile(r"the following arguments are required: (.*)")
_NO_CLASS = re.compile(r"Expected a dot import path string: (\S+)")
_CLASS = re.compile(r"Problem with given class_path '([^']+)':")
_EXPECTED = re.compile(r"Expected an? (.+?)\. Got value: (.*)")
_SUBTYPES = re.compile(r"Subtypes: \[(.*)\]")
_GROUP = re.compile(r'Unable to load config "([^"]*)"')
_GIVEN = re.compile(r"Given value: (.*)")
#: The import path in a value: alone, or as the first class that a mapping or an option names.
_PATH = re.compile(r"^([A-Za-z_]\w*(?:\.\w+)+)$|class_path'(?:, val=|: )'([A-Za-z_]\w*(?:\.\w+)+)'")
#: Words of other libraries for keys, which no letters tell.
SYNONYMS = {"rank": "r", "learning_rate": "lr"}
#: The message by which an inner parser reports an unknown key to the outer one.
_UNKNOWN = re.compile(r"there is no key `([^`]+)`(?:; did you mean `([^`]+)`\?)?")


class KeyParser(LightningArgumentParser):
    """A parser that accepts only full keys, and reports an error in one line with the closest key.

    jsonargparse also uses this class for the parsers of classes that keys name.

    Attributes:
        files: Config files that were read, as given and as absolute paths, the latest first.
        reading: The config file that is being read.
        bases: Base classes of objects that keys name by their class; those that are loaded are suggested.
    """

    bases: Sequence[type] = BASES

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})
        self.files: list[tuple[str, str]] = []
        self.reading: tuple[str, str] | None = None

    def parse_args(self, args: Any = None, *rest: Any, **kwargs: Any) -> Any:
        r"""Parses arguments. Of a class's parser it first undoes what jsonargparse does to a value.

        jsonargparse reads the value of ``--model.kl.target null``, and hands it to the inner parser as Python writes
        it: ``--kl.target=None``. Read again, that is the text "None", and the line break in ``["\n"]`` is two letters.
        """
        if self.exit_on_error or not isinstance(args, list) or len(args) != 1:
            return super().parse_args(args, *rest, **kwargs)
        key, _, value = _as_json(args[0]).partition("=")
        found = super().parse_args([f"{key}={value}"], *rest, **kwargs)
        if value == "null" and found.get(key[2:]) == "None":  # where a path may stand, jsonargparse makes null a text
            found[key[2:]] = None
        return found

    def parse_path(self, path: Any, *args: Any, **kwargs: Any) -> Any:
        """Notes the file; jsonargparse calls this for each ``--config``."""
        self.reading = str(path), os.path.abspath(path)
        self.files.insert(0, self.reading)
        try:
            Path(path).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            self.exit(
                2, f"{self.prog.replace(' [options]', '')}: {path}: {not_utf8(error.object, error.start, str(path))}\n"
            )
        except OSError:
            pass  # jsonargparse says what is wrong
        found = super().parse_path(path, *args, **kwargs)
        self.reading = None
        return found

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Exits with status 2 for wrong usage. The outer parser reports errors of inner parsers."""
        parser = getattr(ex, "subcommand_parser", None) or self  # the parser of the keys
        files = [parser.reading] if parser.reading else []
        if found := _NO_KEY.match(message):
            files = files or parser.files  # top-level keys are checked after all files are read
            message = parser.no_key(".".join(filter(None, (found["group"], found["key"]))))
        elif found := _LEFT_OVER.match(message):
            message = parser.no_key(found["key"]) if found["key"] else _left_over(found["word"])
        elif found := _NO_FILE.search(message):
            name = nearest(Path(found[1]).name, [file.name for file in Path(found[1]).parent.glob("*.y*ml")])
            end = f"did you mean {name}?" if name else "`lightning-rlhf configs` lists those that are shipped"
            message = f"config: there is no file {found[1]}; {end}"
        if not self.exit_on_error:
            super().error(message, ex)
        self.exit(2, f"{parser.prog.replace(' [options]', '')}: {_shorten(message, files, self.bases)}\n")

    def no_key(self, key: str) -> str:
        """Returns the message for an unknown key, with the closest key. It does not know the keys of inner parsers."""
        keys = [a.dest for a in self._actions if a.option_strings and a.dest.rpartition(".")[2] != "help"]
        found = SYNONYMS.get(key) if SYNONYMS.get(key) in keys else nearest(key, keys)
        return f"there is no key `{key}`" + (f"; did you mean `{found}`?" if found else "")


def _left_over(word: str) -> str:
    """Describes an argument without an option."""
    if Path(word).suffix in (".yaml", ".yml"):
        return f"{word} does not belong to an option; write --config {word}"
    return f"{word} {TOO_MANY}"


def _as_json(argument: str) -> str:
    """Returns ``--key=value`` with a value of Python (None, a list, a dict) as JSON, and any other unchanged."""
    key, _, value = argument.partition("=")
    if value != "None" and value[:1] not in ("[", "{"):
        return argument
    try:
        return f"{key}={json.dumps(ast.literal_eval(value), ensure_ascii=False)}"
    except (ValueError, SyntaxError, TypeError):
        return argument


def _shorten(message: str, files: Sequence[tuple[str, str]], bases: Sequence[type]) -> str:
    """Reduces an error to one line: the file, the key, and what is wrong with it."""
    path: list[tuple[int, str]] = []  # indentation and name of the keys around a line
    deepest: list[str] = []
    body: list[str] = []  # the text about the deepest key
    opened = False  # whether the line before is a key alone: what follows is about it, however it is indented
    named = outer = ""  # the innermost and the outermost class around a line
    for line in message.splitlines():
        text = re.sub(r"^ *(- )?", "", line)
        indent = len(line) - len(text)
        while text and path and path[-1][0] >= indent and (not opened or _PLACE.search(text)):
            path.pop()
        keys = [key for _, key in path]
        key = ".".join(keys)
        if found := _CLASS.search(text):
            named = found[1].rpartition(".")[2]
            outer = outer or named
        if found := _UNKNOWN.search(text):
            wrong, right = (".".join([*keys, name]) if name else "" for name in found.groups())
            if moved := _moved(wrong, named):
                return f"{_file_and_line(wrong, files)}{wrong} is {moved} now (docs/moving.md)"
            start, name = [*wrong.split("."), ""][:2]
            if start == "model" and (lacked := LACKED.get(named, {}).get(name)):
                return f"{_file_and_line(f'{start}.{name}', files)}there is no {start}.{name}: {lacked}"
            help = f"--{keys[0]}.help {outer}" if outer and keys[0] in ("model", "data") else "--help"
            help += f" --{'.'.join(keys)}.help" if named != outer else ""
            end = f"did you mean {right}?" if right else f"{help} lists all."
            if named in (LightningModule.__name__, LightningDataModule.__name__):  # the class was not given yet
                end = f"give its class first: --{keys[0]} CLASS (class_path in a file)."
            return f"{_file_and_line(wrong, files)}there is no {wrong}; {end}"
        if found := _REQUIRED.search(text):
            missing = [".".join([*keys, name.partition(".")[2] or name]) for name in found[1].split(", ")]
            return f"give {' and '.join(f'--{name}' for name in missing)}, or a --config that has it"
        if found := _NO_CLASS.search(text):
            where = f"{_file_and_line(key, files)}{key}{': ' if key else ''}"
            return f"{where}there is no class {found[1]}{did_you_mean(found[1], _classes(bases))}"
        if found := _PLACE.search(text):
            if not keys or found[1] != keys[-1]:  # a value that is no file is told of twice
                path.append((indent, found[1].removeprefix(f"{key}.")))
            text = text[found.end() :].strip()
            opened = not text
            if len(path) > len(deepest):
                deepest, body = [key for _, key in path], []
        elif text:
            opened = False
        if text and len(path) >= len(deepest):
            body.append(text)
    key = ".".join(deepest)
    if found := _GROUP.search(" ".join(body)):
        where = _file_and_line(key, files)
        help = f"--{key.partition('.')[0]}.help{' ' if outer else ''}{outer}"
        return f"{where}{key} is a group of settings, got {found[1]}: set {key}.NAME, see {help}"
    return f"{_file_and_line(key, files)}{key}{': ' if key else ''}{_describe_value(body)}"


def _moved(key: str, named: str) -> str | None:
    """Returns the present name of a former key of a stage or data module."""
    start, _, name = key.rpartition(".")
    tables = [MOVED[named]] if named in MOVED else MOVED.values()
    place = next((table[name] for table in tables if name in table), None) if start in ("model", "data") else None
    return None if place is None else f"{start}.{place}"


def _file_and_line(key: str, files: Sequence[tuple[str, str]]) -> str:
    """Returns the file and the line of a key, or nothing if no file has it."""
    name = re.escape(key.rpartition(".")[2])
    for given, path in files:
        with suppress(OSError), open(path, encoding="utf-8") as file:
            at = [i for i, line in enumerate(file, 1) if re.search(rf"(?<![\w.]){name}[\"']?\s*:", line)]
            if name and at:
                return f"{given}, line {at[-1]}: "
    return f"{files[0][0]}: " if len(files) == 1 else ""


def _describe_value(body: list[str]) -> str:
    """Describes what is wrong with a value."""
    subtypes, given = ([found[1] for line in body if (found := what.search(line))] for what in (_SUBTYPES, _GIVEN))
    text = " ".join(body).replace('in "<unicode string>", ', "at ")
    if found := _EXPECTED.search(text):
        given, subtypes = [found[2]], [found[1]]
    if subtypes and given:
        if fault := _class_fault(given[0]):
            return fault
        found = re.match(r"NestedArg\(key='class_path', val='(.*)'\)", given[0])
        return f"expected {_types(subtypes[0])}, got {found[1] if found else given[0]}"
    return text


def _class_fault(given: str) -> str | None:
    """Says why a class that a value names can't be imported. jsonargparse has failed to import it before.

    The module is the user's own, so importing it can raise anything.
    """
    if (found := _PATH.search(given)) is None:
        return None
    path = found[1] or found[2]
    try:
        import_object(path, "class")
    except ImportError as error:
        return str(error) if error.name is None else f"can't import {path}: {type(error).__name__}: {error}"
    except Exception as error:
        return f"can't import {path}: {type(error).__name__}: {error}"
    return None


def _types(text: str) -> str:
    """Formats types for people."""
    text = re.sub(r"(?:typing\.)?Literal\[(.*?)\]", lambda found: found[1].replace("'", ""), text)
    text = re.sub(r"<class '([^']+)'>", r"\1", text).replace("NoneType", "null")
    return re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", text)


def _classes(bases: Sequence[type]) -> Iterator[str]:
    """Yields the names of loaded subclasses."""
    left = list(bases)
    while left:
        found = left.pop()
        left += found.__subclasses__()
        yield found.__name__


class StageCLI(LightningCLI):
    """A LightningCLI that takes arguments from Python without Lightning's warning about ``sys.argv``."""

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Reads the command line."""
        self.config = parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        """Keeps the settings of the command line, which Lightning would replace by the checkpoint's without a message.

        Lightning would even replace the module. There is no public switch; a test fails if this method is renamed.
        """
