"""Reports errors of a command line in one line that names the closest known word."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Iterable
from typing import Any, NoReturn


def nearest(word: str, words: Iterable[str]) -> str | None:
    """Finds the known word that is closest to a misspelt one; None if none is close.

    Args:
        word: The misspelt word.
        words: Known words. They may be dotted keys, such as ``trainer.max_steps``.

    Example:
        >>> nearest("trainer.max_step", ["trainer.max_steps", "trainer.min_steps", "model"])
        'trainer.max_steps'
        >>> nearest("modle.lora.r", ["model", "data"])
        'model.lora.r'
    """
    words = list(words)
    head, dot, rest = word.partition(".")
    heads = {known.partition(".")[0] for known in words}
    if dot and head not in heads:
        # the first part is wrong; the rest may be wrong too, or belong to a class that is not known yet
        found = nearest(head, heads)
        whole = found and f"{found}.{rest}"
        below = [known for known in words if known.startswith(f"{found}.")]
        return whole if not below or whole in below else nearest(str(whole), below) or found
    return next(iter(difflib.get_close_matches(word, words, 1, 0.6)), None)


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """Returns the end of a sentence: ``; did you mean --steps?``, or a period if no known word is close."""
    found = nearest(word, words)
    return f"; did you mean {found}?" if found else "."


_MODEL_OPTIONS: dict[str, dict[str, Any]] = {
    "--chat-template": dict(help="preset or Jinja file that replaces the models' chat templates"),
    "--dtype": dict(choices=("float32", "bfloat16", "float16"), help="default: bfloat16 on a GPU, otherwise float32"),
    "--trust-remote-code": dict(action="store_true", help="run code that comes with the models"),
}


def add_model_options(group: Any, *names: str, **help: str) -> None:
    """Adds the options of all commands that load models.

    Args:
        group: A parser or a group of its options.
        names: The options to add, out of ``--chat-template``, ``--dtype`` and ``--trust-remote-code``.
        help: Another help for one, such as ``dtype="..."``.
    """
    for name in names:
        settings = _MODEL_OPTIONS[name]
        changed = help.get(name.removeprefix("--").replace("-", "_"), settings["help"])
        group.add_argument(name, **settings | {"help": changed})


#: Message for an argument without an option. The usual cause is a pattern that the shell has expanded.
TOO_MANY = "does not belong to an option; quote patterns ('*.jsonl'), and write several files as '[a.jsonl, b.jsonl]'"


class Parser(argparse.ArgumentParser):
    """A tool's parser, which accepts only full options and reports an error in one line.

    Args:
        name: Name of the command.
        about: Text at the beginning of its help. A docstring is cut before its arguments.
    """

    def __init__(self, name: str, about: str | None) -> None:
        text = (about or "").partition("Args:")[0]
        super().__init__(prog=f"lightning-rlhf {name}", description=text, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Exits with status 2 for wrong usage."""
        if found := re.match(r"unrecognized arguments: ([^\s=]+)", message):
            options = [name for action in self._actions for name in action.option_strings]
            message = f"there is no option {found[1]}{did_you_mean(found[1], options)}"
            if not found[1].startswith("-"):
                message = f"{found[1]} {TOO_MANY}"
        self.exit(2, f"{self.prog}: {message}\n")
