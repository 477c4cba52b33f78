"""A row while it is cleaned: its columns, and the texts in it, whatever its format."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Literal, get_args

from lightning_rlhf.cleaning.text import language_of, request, tokens
from lightning_rlhf.data.formats import (
    FORMATS,
    LABELS,
    SYSTEM,
    Conversation,
    Format,
    FormatError,
    FormatTable,
    first_filled,
    parse_row,
    to_conversation,
)
from lightning_rlhf.data.oasst import OASST, TreeRows, expand_trees, instruction_rows, preference_rows, prompt_rows
from lightning_rlhf.data.preference_formats import PREFERENCE_FORMATS, Preference, read_name, to_preference
from lightning_rlhf.data.prompt_formats import PROMPT_FORMATS, Prompt, to_prompt
from lightning_rlhf.data.sources import BadRows, Row, Source, read_rows
from lightning_rlhf.data.unpaired_formats import UNPAIRED_FORMATS, Unpaired, to_unpaired

Kind = Literal["instruction", "preference", "unpaired", "prompt"]
Parsed = Conversation | Preference | Unpaired | Prompt
KINDS: tuple[Kind, ...] = get_args(Kind)
FORMATS_OF: Mapping[Kind, FormatTable[Any]] = {
    "preference": PREFERENCE_FORMATS,
    "unpaired": UNPAIRED_FORMATS,
    "instruction": FORMATS,
    "prompt": PROMPT_FORMATS,
}
_TREES: Mapping[Kind, TreeRows] = {
    "instruction": instruction_rows,
    "preference": preference_rows,
    "unpaired": preference_rows,
    "prompt": prompt_rows,
}
#: Columns and keys of turns whose strings are no texts.
_NOT_TEXT = {
    *("role", "from", "rank", "ranks", "scores", "margin"),
    *LABELS,
    *("chosen_score", "rejected_score", "score_chosen", "score_rejected"),
}


@dataclass(eq=False)
class Example:
    """A row while it is cleaned.

    Attributes:
        row: Its columns as they were read, or as :meth:`rewrite` changed them.
        where: Its place, as in :class:`~lightning_rlhf.data.sources.Row`.
        kind: ``instruction``, ``preference``, ``unpaired`` or ``prompt``.
        format: Name of its format.
        parsed: The conversation, preference, single answer or prompt that the data modules read from it.
        notes: Values that filters measured, such as ``{"novelty": 0.31}``.
        rewritten: How many times :meth:`rewrite` changed it.
    """

    row: Mapping[str, Any]
    where: str
    kind: Kind
    format: str
    parsed: Parsed
    notes: dict[str, float | str] = field(default_factory=dict)
    rewritten: int = 0

    @cached_property
    def questions(self) -> tuple[str, ...]:
        """The texts of all user turns; of plain text, the text."""
        return tuple(turn["content"] for turn in self._prompt if turn["role"] == "user") or (self._text,)

    @cached_property
    def instruction(self) -> str:
        """The first user turn, with Alpaca's input; of plain text, the text."""
        return self.questions[0]

    @cached_property
    def answers(self) -> tuple[str, ...]:
        """The assistant's texts: every turn of a conversation; of a preference each answer, the best first."""
        if isinstance(self.parsed, (Preference, Unpaired)):
            return tuple("\n\n".join(_said(turns, "assistant")) for turns in self.parsed.answers)
        if isinstance(self.parsed, Conversation):
            return tuple(_said(self.parsed.messages or (), "assistant"))
        return ()

    @property
    def answer(self) -> str:
        """The last answer of a conversation, the best of a preference, nothing of a prompt."""
        if not self.answers:
            return ""
        return self.answers[0 if self.kind == "preference" else -1]

    @cached_property
    def instruction_tokens(self) -> list[str]:
        """The tokens of all user turns."""
        return tokens("\n".join(self.questions))

    @cached_property
    def answer_tokens(self) -> tuple[list[str], ...]:
        """The tokens of each answer."""
        return tuple(map(tokens, self.answers))

    @property
    def distinct_tokens(self) -> list[str]:
        """The tokens that tell rows apart: those of the questions, and of the answer if it is a labeled single one."""
        return [*self.instruction_tokens, *(self.answer_tokens[0] if self.kind == "unpaired" else ())]

    @cached_property
    def language(self) -> str:
        """The language that the instruction is written in, whatever it quotes; empty if it has no letters."""
        return language_of(request(self.instruction))

    @cached_property
    def lang(self) -> str:
        """The language in the column ``lang`` or ``language``, otherwise the one that the instruction is written in."""
        return self.declared or self.language

    @cached_property
    def declared(self) -> str:
        """The language in the column ``lang`` or ``language``, without its region; empty if there is none."""
        return read_name(self.row, "lang", "language").strip().lower().partition("-")[0].partition("_")[0]

    def rewrite(self, change: Callable[[str], str]) -> None:
        """Changes the texts of the row.

        Args:
            change: Gets each text in the columns that the row's format reads; it may be called twice with the same.

        Raises:
            FormatError: The row can't be used any more, for instance since both answers became equal.
        """
        chosen: Format[Any] = FORMATS_OF[self.kind].choose(self.row, self.format)
        row = {
            name: _changed(value, change) if name in (*chosen.reads, *SYSTEM) and name not in _NOT_TEXT else value
            for name, value in self.row.items()
        }
        if row != self.row:
            self.parsed, _ = _parse(row, self.kind, self.format)
            self.row = row
            self.rewritten += 1
            for name in ("questions", "instruction", "answers", "instruction_tokens", "answer_tokens", "language"):
                self.__dict__.pop(name, None)

    @property
    def _prompt(self) -> tuple[Any, ...]:
        if isinstance(self.parsed, Conversation):
            return self.parsed.messages or ()
        return () if isinstance(self.parsed.prompt, str) else self.parsed.prompt

    @property
    def _text(self) -> str:
        text = self.parsed.text if isinstance(self.parsed, Conversation) else self.parsed.prompt
        return text if isinstance(text, str) else ""


def _said(turns: tuple[Any, ...], role: str) -> Iterator[str]:
    return (turn["content"] for turn in turns if turn["role"] == role)


def _changed(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, (list, tuple)):
        return [_changed(item, change) for item in value]
    if isinstance(value, Mapping):
        return {name: item if name in _NOT_TEXT else _changed(item, change) for name, item in value.items()}
    return value


def kind_of(row: Mapping[str, Any]) -> Kind:
    """Tells the kind of a row by its columns.

    A row that fits several kinds is the first of these: a preference, a single answer with a label, an instruction, a
    prompt. A row of no known format counts as an instruction, whose error lists the formats. A label must be true or
    false, because numbers and names may mean something else. A rating makes a single answer only if the kind is given.
    """
    for kind, table in FORMATS_OF.items():
        found = table.detect(row)
        if found is None or (kind == "preference" and found.name == "unpaired"):
            continue
        if kind != "unpaired" or any(str(row.get(name)).strip().lower() in ("true", "false") for name in LABELS):
            return kind
    return "instruction"


def make_example(
    row: Mapping[str, Any] | Row, where: str = "", kind: Kind | Literal["auto"] = "auto", format: str = "auto"
) -> Example:
    """Makes an example of a row.

    Args:
        row: Its columns, or the row as it was read.
        where: Its place; a row that was read has its own.
        kind: Its kind. ``auto``: :func:`kind_of` tells it by the columns.
        format: Name of its format, or the import path of another. ``auto``: the first that matches.

    Raises:
        FormatError: The row can't be used.
        ValueError: No format has this name.
    """
    read = row if isinstance(row, Row) else Row(dict(row), where)
    chosen = kind_of(read.filled) if kind == "auto" else kind
    parsed, name = parse_row(read, partial(_parse, kind=chosen, format=format))
    return Example(read.value, read.where, chosen, name, parsed)


def _parse(row: Mapping[str, Any], kind: Kind, format: str) -> tuple[Parsed, str]:
    if kind == "unpaired" and format == "auto" and kind_of(row) == "preference":
        reason = "the row compares answers. Leave out --kind unpaired; convert --to unpaired takes it apart"
        raise FormatError("pairs", reason)
    name = FORMATS_OF[kind].choose(row, format).name if format == "auto" else format
    if kind == "preference":
        return to_preference(row, name), name
    if kind == "unpaired":  # a rating is no label yet
        return to_unpaired(row, name, labeled=first_filled(row, *LABELS) is not None), name
    return (to_conversation(row, name) if kind == "instruction" else to_prompt(row, name)), name


def read_examples(
    source: Source, bad: BadRows, kind: Kind | Literal["auto"] = "auto", format: str = "auto"
) -> Iterator[Example]:
    """Reads examples one after the other, without holding them.

    Args:
        source: As in :func:`~lightning_rlhf.data.sources.read_rows`.
        bad: Gets the rows that can't be used.
        kind: What the rows are. ``auto``: each by its columns; OpenAssistant's trees are instructions.
        format: Their format. ``auto``: each by its columns.

    Yields:
        The examples, in order.

    Raises:
        FileNotFoundError: A file isn't found.
        BadRowError: A row is bad and the policy of ``bad`` is ``"raise"``, or the rest of a file can't be read.
        ValueError: A file is of an unknown kind, or no format has this name.
    """
    trees = _TREES["instruction" if kind == "auto" else kind]
    for row in expand_trees(read_rows(source, bad), trees, bad, format):
        try:
            yield make_example(row, kind=kind, format="auto" if format == OASST else format)
        except FormatError as error:
            bad.add(row.where, error.kind, str(error))
