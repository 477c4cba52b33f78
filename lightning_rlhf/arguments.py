"""Faults of a command line, told in one line that names the nearest word that is known."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Iterable
from typing import NoReturn


def nearest(word: str, words: Iterable[str]) -> str | None:
    """The one of several words that a misspelt word most likely means; None where none is like it.

    Args:
        word: What was written.
        words: What is known; keys may have parts, such as ``trainer.max_steps``.

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
        # the first part is wrong; what is behind it may be, and perhaps only a class that isn't known yet can tell
        found = nearest(head, heads)
        whole = found and f"{found}.{rest}"
        below = [known for known in words if known.startswith(f"{found}.")]
        return whole if not below or whole in below else nearest(str(whole), below) or found
    return next(iter(difflib.get_close_matches(word, words, 1, 0.6)), None)


def meant(word: str, words: Iterable[str]) -> str:
    """The end of a sentence: ``; did you mean --steps?``, or a full stop where nothing is near."""
    found = nearest(word, words)
    return f"; did you mean {found}?" if found else "."


#: What is said of a word that belongs to no option: most often the shell made several of a pattern.
TOO_MANY = "belongs to no option; quote a pattern ('*.jsonl'), and write several files as '[a.jsonl, b.jsonl]'"


class Parser(argparse.ArgumentParser):
    """Of a tool: options are written in full, and faults are told in one line.

    Args:
        name: The command.
        about: What its help begins with: of a docstring, what stands before the arguments.
    """

    def __init__(self, name: str, about: str | None) -> None:
        text = (about or "").partition("Args:")[0]
        super().__init__(prog=f"lightning-rlhf {name}", description=text, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Ends the command with its status for wrong usage, 2."""
        if found := re.match(r"unrecognized arguments: ([^\s=]+)", message):
            options = [name for action in self._actions for name in action.option_strings]
            message = f"there is no option {found[1]}{meant(found[1], options)}"
            if not found[1].startswith("-"):
                message = f"{found[1]} {TOO_MANY}"
        self.exit(2, f"{self.prog}: {message}\n")
