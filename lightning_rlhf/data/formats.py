"""The shapes in which instruction rows come, and the one shape they become.

Each format is a line of :data:`FORMATS`: how a row of it is recognised, and one small function that converts it. What
makes a conversation fit for training is checked once, for all of them, in :func:`check_conversation`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypedDict

from lightning_rlhf.data.sources import read_json

#: What the names of roles in public data sets mean.
ROLES = {
    **dict.fromkeys(["system", "developer"], "system"),
    **dict.fromkeys(["user", "human", "prompter"], "user"),
    **dict.fromkeys(["assistant", "gpt", "chatgpt", "bot", "chatbot", "bing", "bard", "model"], "assistant"),
}


class UnfitRowError(ValueError):
    """A row that can't be learnt from; the data modules raise it with its place, or count it.

    Args:
        kind: A short name of the fault, the same for all rows that have it.
        reason: What is wrong, with the column or turn (from 1), and what to do.
    """

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(kind, reason)
        self.kind = kind
        self.reason = reason

    def __str__(self) -> str:
        return self.reason


class FormatError(UnfitRowError):
    """A row that isn't a conversation or a preference to learn from."""


class Message(TypedDict):
    """One turn. ``role`` is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True)
class Conversation:
    """What a row becomes: messages, or plain text that no chat template touches.

    Attributes:
        messages: The turns in order, or None.
        text: The plain text, or None.
    """

    messages: tuple[Message, ...] | None = None
    text: str | None = None

    def __post_init__(self) -> None:
        if (self.messages is None) == (self.text is None):
            raise ValueError("A conversation holds either messages or text.")

    @property
    def first_user_turn(self) -> str:
        """What rows are split by: the first user turn, the first turn that isn't a system turn, or the text."""
        if self.messages is None:
            return self.text or ""
        turns = [message for message in self.messages if message["role"] != "system"]
        return next((turn["content"] for turn in turns if turn["role"] == "user"), turns[0]["content"])


@dataclass(frozen=True)
class Format:
    """A shape of rows.

    Attributes:
        name: Its name in configurations.
        columns: The columns it needs.
        convert: Makes the conversation of such a row, unchecked and without the ``system`` column.
        also: What a row needs besides the columns to be recognised.
        user_first: Whether the first turn after the system turn must be the user's.
    """

    name: str
    columns: tuple[str, ...]
    convert: Callable[[Mapping[str, Any]], Conversation]
    also: Callable[[Mapping[str, Any]], bool] = lambda row: True
    user_first: bool = True

    def matches(self, row: Mapping[str, Any]) -> bool:
        """Whether a row is of this shape."""
        return has_columns(row, *self.columns) and self.also(row)


def to_conversation(row: Mapping[str, Any], format: str = "auto", system: str | None = None) -> Conversation:
    """Make a row a conversation.

    Columns that are None count as absent, since CSV, Parquet and Arrow fill up with them. A list may be written as
    JSON, as a CSV cell has it. Of the conversation formats a column ``system``, where it holds text, is the system turn
    of a conversation that brings none.

    Args:
        row: The columns of the row.
        format: A name in :data:`FORMATS`, or ``"auto"`` for the first of them that matches.
        system: System turn of conversations whose row has none. Plain text never gets one.

    Returns:
        The conversation, checked.

    Raises:
        FormatError: If the row can't be learnt from.
        ValueError: If ``format`` is no known name: that is no fault of a row.
    """
    chosen = _choose(row, format)
    conversation = chosen.convert(row)
    if conversation.messages is None:
        if not (conversation.text or "").strip():
            raise FormatError("empty text", "the column 'text' is empty. Write the text or remove the row")
        return conversation
    check_conversation(conversation.messages, chosen.user_first)
    own = read_text(row["system"], "the column 'system'") if has_columns(row, "system") else ""
    if conversation.messages[0]["role"] == "system":
        if own.strip() and own != conversation.messages[0]["content"]:
            reason = "the column 'system' and the system turn differ. Remove one of them"
            raise FormatError("two system prompts", reason)
        return conversation
    prompt = own if own.strip() else system
    if prompt is None:
        return conversation
    return Conversation(messages=(Message(role="system", content=prompt), *conversation.messages))


def check_conversation(messages: Sequence[Message], user_first: bool = True) -> None:
    """Refuse what can't be learnt from, or what a chat template would silently bend.

    Args:
        messages: The turns, with roles system, user and assistant.
        user_first: Whether the first turn after the system turn must be the user's.

    Raises:
        FormatError: If there are no turns or no assistant turn, a turn is empty (the system turn may be), a system turn
            isn't the first, a role follows itself, the user doesn't begin, or the assistant doesn't end.
    """
    if not messages:
        raise FormatError("no messages", "the conversation has no turns. Add turns or remove the row")
    before: str | None = None
    for number, message in enumerate(messages, 1):
        role = message["role"]
        turn = f"turn {number} ({role})"
        if role == "system":
            if number > 1:
                raise FormatError("roles out of order", f"{turn} comes late. Make it the first turn or remove it")
        elif not message["content"].strip():
            raise FormatError("empty turn", f"{turn} is empty. Write its text or remove the row")
        elif role == before:
            raise FormatError("roles out of order", f"{turn} follows a turn of the same role. Join the two")
        elif role == "assistant" and before != "user" and user_first:
            raise FormatError("roles out of order", f"{turn} answers no user turn. Put the user's turn before it")
        before = role
    if all(message["role"] != "assistant" for message in messages):
        raise FormatError("no assistant turn", "no turn is the assistant's: there is nothing to learn. Add the answer")
    if before != "assistant":
        reason = f"turn {len(messages)} ({before}) is the last and has no answer. Remove it or add the answer"
        raise FormatError("last turn not assistant", reason)


def _choose(row: Mapping[str, Any], name: str) -> Format:
    if name == "auto":
        for candidate in FORMATS.values():
            if candidate.matches(row):
                return candidate
        known = "; ".join(f"{entry.name}: {', '.join(entry.columns)}" for entry in FORMATS.values())
        reason = f"no known format has the columns of this row: {column_names(row)}. Known are {known}"
        raise FormatError("unknown format", reason)
    if name not in FORMATS:
        raise ValueError(f"The format {name!r} is not known. Choose 'auto' or one of: {', '.join(FORMATS)}.")
    missing = [column for column in FORMATS[name].columns if not has_columns(row, column)]
    if missing:
        lacks = f"the format {name!r} needs the column {_quoted(missing)}, and the row has {column_names(row)}"
        raise FormatError("missing column", f"{lacks}. Rename columns, or choose the format 'auto'")
    return FORMATS[name]


def has_columns(row: Mapping[str, Any], *columns: str) -> bool:
    """Whether all these columns are filled; None counts as absent."""
    return all(row.get(column) is not None for column in columns)


def column_names(row: Mapping[str, Any]) -> str:
    """The filled columns, for messages."""
    return _quoted([column for column in row if row[column] is not None]) or "none that is filled"


def _quoted(names: Sequence[object]) -> str:
    return ", ".join(repr(name) for name in names)


def wrong_type(what: str, value: object, wanted: str) -> NoReturn:
    """Raises the error of a value that is of another type than ``wanted``."""
    raise FormatError("wrong type", f"{what} is a {type(value).__name__}. Make it {wanted}")


def read_text(value: object, what: str) -> str:
    """A string, or the joined text parts of a multi-modal content list."""
    if isinstance(value, (list, tuple)):
        for number, part in enumerate(value, 1):
            if not (isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)):
                reason = f"part {number} of {what} is not {{type: 'text', text: ...}}. Only text can be learnt from"
                raise FormatError("wrong type", reason)
        value = "".join(part["text"] for part in value)
    if not isinstance(value, str):
        wrong_type(what, value, "a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can spell and no tokenizer can take
        reason = f"character {error.start + 1} of {what} is half a surrogate pair. Remove it"
        raise FormatError("broken character", reason) from error
    return value


def read_list(row: Mapping[str, Any], column: str, wanted: str) -> Sequence[Any]:
    """The list of a column, which may be written as JSON.

    Raises:
        FormatError: It holds something else.
    """
    value = row[column]
    if isinstance(value, str) and isinstance(written := read_json(value), list) and written:
        value = written
    if not isinstance(value, (list, tuple)):
        wrong_type(f"the column {column!r}", value, wanted)
    return value


def read_turns(row: Mapping[str, Any], column: str, role_key: str, content_key: str) -> tuple[Message, ...]:
    """The turns of a column.

    Raises:
        FormatError: It holds something else.
    """
    turns = read_list(row, column, f"a list of {{{role_key}: ..., {content_key}: ...}}")
    return tuple(
        read_turn(turn, f"turn {number} of {column!r}", role_key, content_key) for number, turn in enumerate(turns, 1)
    )


def read_turn(turn: object, what: str, role_key: str, content_key: str) -> Message:
    """One turn, its role by its common name.

    Raises:
        FormatError: It is none, its role is unknown, or it calls a tool.
    """
    if not isinstance(turn, Mapping):
        wrong_type(what, turn, f"{{{role_key}: ..., {content_key}: ...}}")
    for key in ("tool_calls", "function_call"):
        if turn.get(key):
            raise FormatError("tool call", f"{what} has {key!r}, which would be lost. Make it text or remove the row")
    for key in (role_key, content_key):
        if turn.get(key) is None:
            raise FormatError("wrong type", f"{what} lacks {key!r}, it has {column_names(turn)}. Add it")
    name = read_text(turn[role_key], f"{role_key!r} in {what}")
    role = ROLES.get(name.strip().lower())
    if role is None:
        reason = f"{what} has the role {name[:40]!r}. Known roles are {', '.join(ROLES)}"
        raise FormatError("unknown role", reason)
    return Message(role=role, content=read_text(turn[content_key], f"{content_key!r} in {what}"))


def _from_messages(row: Mapping[str, Any]) -> Conversation:
    return Conversation(read_turns(row, "messages", "role", "content"))


def _from_colossalchat(row: Mapping[str, Any]) -> Conversation:
    return Conversation(read_turns(row, "messages", "from", "content"))


def _from_sharegpt(row: Mapping[str, Any]) -> Conversation:
    return Conversation(read_turns(row, "conversations", "from", "value"))


def _from_alpaca(row: Mapping[str, Any]) -> Conversation:
    """Earlier exchanges, then the instruction, with its input after a blank line, and the output."""
    wanted = "a list of [instruction, output] pairs"
    history = read_list(row, "history", wanted) if has_columns(row, "history") else []
    texts: list[str] = []
    for number, pair in enumerate(history, 1):
        if not (isinstance(pair, (list, tuple)) and len(pair) == 2):
            reason = f"entry {number} of 'history' is not a pair. Make it [instruction, output]"
            raise FormatError("wrong type", reason)
        texts += [read_text(text, f"entry {number} of 'history'") for text in pair]
    asked = [
        read_text(row[column], f"the column {column!r}")
        for column in ("instruction", "input")
        if has_columns(row, column)
    ]
    texts.append("\n\n".join(text for text in asked if text.strip()))
    texts.append(read_text(row["output"], "the column 'output'"))
    return Conversation(
        tuple(Message(role="assistant" if i % 2 else "user", content=text) for i, text in enumerate(texts))
    )


def _from_prompt_completion(row: Mapping[str, Any]) -> Conversation:
    return Conversation(_side(row, "prompt", "user") + _side(row, "completion", "assistant"))


def _side(row: Mapping[str, Any], column: str, role: str) -> tuple[Message, ...]:
    if isinstance(row[column], (list, tuple)):
        return read_turns(row, column, "role", "content")
    return (Message(role=role, content=read_text(row[column], f"the column {column!r}")),)


def _from_text(row: Mapping[str, Any]) -> Conversation:
    return Conversation(text=read_text(row["text"], "the column 'text'"))


def _says_from(row: Mapping[str, Any]) -> bool:
    turns = row.get("messages")
    turns = read_json(turns) if isinstance(turns, str) else turns
    return isinstance(turns, (list, tuple)) and any(
        isinstance(turn, Mapping) and has_columns(turn, "from") for turn in turns
    )


#: The known formats, in the order in which they are tried.
FORMATS: dict[str, Format] = {
    entry.name: entry
    for entry in (
        Format("colossalchat", ("messages",), _from_colossalchat, also=_says_from),
        Format("messages", ("messages",), _from_messages),
        Format("sharegpt", ("conversations",), _from_sharegpt),
        Format("alpaca", ("instruction", "output"), _from_alpaca),
        Format("prompt_completion", ("prompt", "completion"), _from_prompt_completion, user_first=False),
        Format("text", ("text",), _from_text),
    )
}
