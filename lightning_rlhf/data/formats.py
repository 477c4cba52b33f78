"""The formats of instruction rows, and the one shape that they are converted to.

Each format is a line of :data:`FORMATS`: how its rows are recognized, and one small function that converts them.
:func:`check_conversation` checks for all of them whether a conversation can be trained on.

Keys to which other trainers give a meaning are obeyed, or refused by name: a key that changes what should be learned is
never ignored. ``unread`` lists all other keys that nothing reads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, NoReturn, TypedDict, TypeVar, cast

from lightning_rlhf.data.sources import Row, read_json
from lightning_rlhf.utils.imports import import_object

#: The role that each name in public data sets stands for.
ROLES = {
    **dict.fromkeys(["system", "developer"], "system"),
    **dict.fromkeys(["user", "human", "prompter"], "user"),
    **dict.fromkeys(["assistant", "gpt", "chatgpt", "bot", "chatbot", "bing", "bard", "model"], "assistant"),
}

#: Columns that hold a conversation's system turn.
SYSTEM = ("system", "system_prompt")
#: Columns that the chat template gets beside the messages.
_OPTIONS = ("tools", "chat_template_kwargs")
#: Keys of a turn that chat templates may write. Those that hold the model's own words are never ignored.
REASONING = ("reasoning_content", "reasoning", "thinking")
_FOR_TEMPLATE = (*REASONING, "name")
#: Keys with which trainers say whether a turn is learned (1, true) or not (0, false).
_WEIGHTS = ("weight", "train", "training", "trainable", "loss")

_MEDIA = dict.fromkeys(
    ("image", "images", "video", "videos", "audio", "audios"), "Training takes text only: remove it, or the row"
)
_TOKENS = "Tokens can't be chosen one by one: remove it, and give turns a 'weight' of 0 or 1"
_MASKS = dict.fromkeys(("mask", "masked", "loss_mask", "train_detail", "training_detail", "loss_weight"), _TOKENS)
#: Other keys to which trainers give a meaning, in a turn and in a row, with what to do.
_REFUSED_IN_TURNS = {
    **_MEDIA,
    **_MASKS,
    **dict.fromkeys(("tool_calls", "function_call"), "It would be lost: make it text, or remove the row"),
}
_REFUSED = {
    **_MEDIA,
    **_MASKS,
    **dict.fromkeys(("completion_mask", "assistant_mask", "assistant_masks"), _TOKENS),
    **dict.fromkeys(("mask_history", "train_on_prompt"), "The setting 'loss_on' says what is learned: remove it"),
    **dict.fromkeys(("functions", "function_call"), "Write the functions as 'tools', or remove it"),
}
#: Keys that a prompt can't have: samples are shown and scored with its messages alone.
REFUSED_IN_PROMPTS = {
    **_MEDIA,
    **dict.fromkeys(("functions", *_OPTIONS), "A prompt is messages alone: write it into a system turn, or remove it"),
}
#: Columns that all formats of conversations and preferences read.
SHARED = (*SYSTEM, *_OPTIONS, "lang", "language")
#: Columns that say whether an answer is good (KTO), or by a number how good; and whether a row is learned.
LABELS, RATINGS, _ROW_WEIGHTS = ("label", "kto_tag"), ("rating", "score"), ("weight", "train")
_TURN = {"role", "from", "content", "value", *_FOR_TEMPLATE, *_WEIGHTS, *_REFUSED_IN_TURNS}


#: Faults that an empty cell of a table may cause.
_FAULTS_OF_EMPTY_CELLS = ("unknown format", "missing column", "no transcript")

Made = TypeVar("Made")


class UnfitRowError(ValueError):
    """A row that can't be trained on. The data modules raise it with its place, or count it.

    Args:
        kind: A short name of the fault, the same for all rows with this fault.
        reason: What is wrong, with the column or turn (from 1), and what to do.
    """

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(kind, reason)
        self.kind = kind
        self.reason = reason

    def __str__(self) -> str:
        return self.reason


class FormatError(UnfitRowError):
    """A row that is no conversation, preference or prompt to train on."""


class _Turn(TypedDict):
    role: str
    content: str


class Message(_Turn, total=False):
    """One turn. ``role`` is system, user or assistant. A turn with ``weight`` 0 is not trained on.

    The other keys are for chat templates that write them.
    """

    weight: int
    reasoning_content: str
    reasoning: str
    thinking: str
    name: str


@dataclass(frozen=True)
class Conversation:
    """A row as messages, or as plain text that no chat template touches.

    Attributes:
        messages: The turns in order, or None.
        text: The plain text, or None.
        options: What the chat template gets beside the messages: ``tools``, and the row's ``chat_template_kwargs``.
        unread: Keys of the row and of its turns that nothing reads.
    """

    messages: tuple[Message, ...] | None = None
    text: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    unread: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        if (self.messages is None) == (self.text is None):
            raise ValueError("A conversation holds either messages or text.")

    @property
    def first_user_turn(self) -> str:
        """The first user turn; if there is none, the first turn that isn't a system turn; of plain text, the text."""
        if self.messages is None:
            return self.text or ""
        turns = [message for message in self.messages if message["role"] != "system"]
        return next((turn["content"] for turn in turns if turn["role"] == "user"), turns[0]["content"])


@dataclass(frozen=True)
class Format(Generic[Made]):
    """A shape of rows.

    Attributes:
        name: Its name in configurations.
        columns: The columns that it needs; of a tuple of names, one suffices.
        convert: Makes the conversation (or preference, or prompt) of such a row, unchecked and without the ``system``
            column.
        further: Columns that it also reads if they are there.
        also: What else makes a row one of this format.
        user_first: Whether the first turn after the system turn must be the user's.
    """

    name: str
    columns: tuple[str | tuple[str, ...], ...]
    convert: Callable[[Mapping[str, Any]], Made]
    further: tuple[str, ...] = ()
    also: Callable[[Mapping[str, Any]], bool] = lambda row: True
    user_first: bool = True

    @property
    def reads(self) -> tuple[str, ...]:
        """All columns that it reads."""
        return (*(name for group in self._groups for name in group), *self.further)

    @property
    def _groups(self) -> list[tuple[str, ...]]:
        return [(group,) if isinstance(group, str) else group for group in self.columns]

    def matches(self, row: Mapping[str, Any]) -> bool:
        """Returns whether a row is of this format."""
        return not self.missing(row) and self.also(row)

    def missing(self, row: Mapping[str, Any]) -> str:
        """The columns that a row lacks, in words; empty if it lacks none."""
        lacking = [group for group in self._groups if first_filled(row, *group) is None]
        return ", ".join(" or ".join(map(repr, group)) for group in lacking)


class FormatTable(Mapping[str, Format[Made]]):
    """Formats by name, in the order in which ``auto`` tries them.

    It can't be changed. A format of one's own is named by its import path.

    Args:
        kind: What a format is called in messages.
        formats: The formats.
    """

    def __init__(self, kind: str, *formats: Format[Made]) -> None:
        self.kind, self._formats = kind, {format.name: format for format in formats}

    def __getitem__(self, name: str) -> Format[Made]:
        return self._formats[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._formats)

    def __len__(self) -> int:
        return len(self._formats)

    def detect(self, row: Mapping[str, Any]) -> Format[Made] | None:
        """The first format that a row matches, if any."""
        return next((format for format in self.values() if format.matches(row)), None)

    def choose(self, row: Mapping[str, Any], name: str) -> Format[Made]:
        """The format of a row.

        Args:
            row: Its columns.
            name: The name of the format, its import path (``package.module.name``), or ``auto``.

        Raises:
            FormatError: The row is of no known format, or lacks a column of the one that is named.
            ImportError: Nothing is at the import path.
            ValueError: No format has this name: that is no fault of a row.
        """
        if name == "auto":
            if (found := self.detect(row)) is not None:
                return found
            known = "; ".join(f"{format.name}: {format.missing({})}" for format in self.values())
            reason = f"no known {self.kind} has the columns of this row: {column_names(row)}. Known are {known}"
            raise FormatError("unknown format", f"{reason}{_turn_advice(row)}")
        found = self.get(name) or import_format(name)
        if found is None:
            raise ValueError(
                f"The {self.kind} {name!r} is not known. Choose 'auto', the import path of your own "
                f"(package.module.name), or one of: {', '.join(self)}."
            )
        if missing := found.missing(row):
            lacks = f"the {self.kind} {name!r} needs the column {missing}, and the row has {column_names(row)}"
            raise FormatError("missing column", f"{lacks}. Rename columns, or choose the format 'auto'")
        return found


@functools.cache
def import_format(path: str) -> Format[Any] | None:
    """Imports a format of one's own.

    Args:
        path: Its import path, ``package.module.name`` or ``package.module:name``.

    Returns:
        The format; None if the text is no import path.

    Raises:
        ImportError: Nothing is there.
        ValueError: What is there is no :class:`Format`.
    """
    if "." not in path and ":" not in path:
        return None
    found = import_object(path, "format")
    if not isinstance(found, Format):
        raise ValueError(
            f"The format {path} is a {type(found).__name__}. Make it a lightning_rlhf.data.formats.Format."
        )
    return found


def parse_row(row: Row, parse: Callable[[Mapping[str, Any]], Made]) -> Made:
    """Converts a row as it was read; an empty cell of a table counts as missing.

    Args:
        row: The row.
        parse: Converts its columns, such as :func:`to_conversation`.

    Raises:
        FormatError: The row can't be used.
    """
    try:
        return parse(row.filled)
    except FormatError as error:
        if len(row.filled) == len(row.value) or error.kind not in _FAULTS_OF_EMPTY_CELLS:
            raise
    return parse(row.value)  # whose error names the empty cell


def to_conversation(row: Mapping[str, Any], format: str = "auto", system: str | None = None) -> Conversation:
    """Convert a row to a conversation.

    Columns that are None count as missing, since CSV, Parquet and Arrow fill gaps with them. A list may be written as
    JSON, as in a CSV cell. The text of a column ``system`` or ``system_prompt`` becomes the system turn of a
    conversation that has none. ``tools`` and ``chat_template_kwargs`` go to the chat template.

    Args:
        row: The columns of the row.
        format: A name in :data:`FORMATS`, the import path of another, or ``"auto"`` for the first that matches.
        system: System turn for rows that have none. Plain text never gets one.

    Returns:
        The conversation, checked.

    Raises:
        FormatError: The row can't be trained on, or asks for something that isn't supported.
        ValueError: No format has this name: that is no fault of a row.
    """
    chosen = FORMATS.choose(row, format)
    check_columns(row)
    for column in LABELS:
        if str(row.get(column)).strip().lower() == "false":
            reason = f"the column {column!r} says that this answer is bad, and it would be learned. Remove the row"
            raise FormatError("bad answer", f"{reason}, or train by KTOModule and UnpairedDataModule")
    conversation = chosen.convert(row)
    if conversation.messages is None:
        if not (conversation.text or "").strip():
            raise FormatError("empty text", "the column 'text' is empty. Write the text or remove the row")
        return replace(conversation, unread=unread_keys(row, ("lang", "language", *chosen.reads)))
    check_conversation(conversation.messages, chosen.user_first)
    unread = unread_keys(row, (*SHARED, *chosen.reads))
    made = replace(conversation, options=_read_options(row), unread=unread)
    own = read_system(row)
    if conversation.messages[0]["role"] == "system":
        if own and own != conversation.messages[0]["content"]:
            reason = "the column 'system' and the system turn differ. Remove one of them"
            raise FormatError("two system prompts", reason)
        return made
    prompt = own or system
    if prompt is None:
        return made
    return replace(made, messages=(Message(role="system", content=prompt), *conversation.messages))


def check_columns(row: Mapping[str, Any], refused: Mapping[str, str] = _REFUSED) -> None:
    """Refuse a row that asks for something that isn't supported.

    Args:
        row: Its columns.
        refused: Columns that must be empty, with what to do.

    Raises:
        FormatError: The row has such a column.
    """
    _refuse(row, refused, "the row")
    if refused is not _REFUSED:
        return
    for column in _ROW_WEIGHTS:
        value = row.get(column)
        if value is not None and _weight(value) != 1 and (column == "weight" or _weight(value) == 0):
            reason = (
                f"the column {column!r} is {value!r}, and every row weighs 1. Remove it, or a row not to be learned"
            )
            raise FormatError("weight", f"{reason}; a source as a whole has a weight in 'train'")


def _refuse(found: Mapping[str, Any], refused: Mapping[str, str], what: str) -> None:
    for key in found.keys() & refused.keys():
        if not _is_empty(found[key]):
            raise FormatError("tool call" if "call" in key else f"'{key}'", f"{what} has {key!r}. {refused[key]}")


def _is_empty(value: object) -> bool:
    """Returns whether a column asks for nothing, possibly written as JSON."""
    nothing = value is None or (isinstance(value, (str, list, tuple, Mapping, int, float)) and not value)
    return nothing or str(value).strip().lower() in ("", "[]", "{}", "null", "false")


def _weight(value: object) -> int | None:
    """1 or 0, however it is written; None if it is anything else."""
    text = str(value).strip().lower()
    return {"1": 1, "1.0": 1, "true": 1, "0": 0, "0.0": 0, "false": 0}.get(text)


def read_system(row: Mapping[str, Any]) -> str:
    """The system prompt in a row's columns, or an empty text.

    Raises:
        FormatError: It is not a text, or two columns differ.
    """
    texts = [read_text(row[column], f"the column {column!r}") for column in SYSTEM if has_columns(row, column)]
    found = list(dict.fromkeys(text for text in texts if text.strip()))
    if len(found) > 1:
        reason = f"the columns {_quoted(SYSTEM)} differ. Remove one of them"
        raise FormatError("two system prompts", reason)
    return found[0] if found else ""


def _read_options(row: Mapping[str, Any]) -> dict[str, Any]:
    """Reads what the chat template gets besides the messages, as JSON values."""
    options: dict[str, Any] = {}
    if not _is_empty(row.get("chat_template_kwargs")):
        asked = _plain(read_written(row["chat_template_kwargs"], dict), "the column 'chat_template_kwargs'")
        if not isinstance(asked, dict):
            wrong_type("the column 'chat_template_kwargs'", asked, "an object")
        options |= asked
    if not _is_empty(row.get("tools")):
        tools = _plain(read_list(row, "tools", "a list of JSON schemas"), "the column 'tools'")
        for number, tool in enumerate(tools, 1):
            if not isinstance(tool, dict):
                wrong_type(f"tool {number}", tool, "a JSON schema")
        if tools:
            options["tools"] = tools
    return options


def _plain(value: Any, what: str) -> Any:
    """A value as JSON holds it, without keys that are None: Arrow fills structs with them."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry, what) for key, entry in value.items() if entry is not None}
    if isinstance(value, (list, tuple)):
        return [_plain(entry, what) for entry in value]
    if not isinstance(value, (str, int, float, bool)):
        wrong_type(f"a value in {what}", value, "what JSON can hold")
    return value


def unread_keys(row: Mapping[str, Any], read: Iterable[str]) -> tuple[str, ...]:
    """The filled keys of a row and of its turns that nothing reads.

    Args:
        row: Its columns.
        read: The columns that are read.
    """
    read = {name for name in (*read, *_REFUSED) if name in row}
    unread = [
        str(name) for name, value in row.items() if value is not None and not (name in read or _agrees(name, value))
    ]
    turns = (turn for name in read for turn in _turns_in(row[name]))
    within = {f"{key} of a turn": None for turn in turns for key in turn if key not in _TURN and turn[key] is not None}
    return (*unread, *within)


def _agrees(name: object, value: object) -> bool:
    """Returns whether a column only says that its row should be trained on, as every row is."""
    return name in (*_ROW_WEIGHTS, *LABELS) and (
        _weight(value) == 1 if name in _ROW_WEIGHTS else str(value).lower() == "true"
    )


def _turns_in(value: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        value = read_json(value)
    for item in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(item, (list, tuple)):
            yield from _turns_in(item)
        elif isinstance(item, Mapping) and {"role", "from"} & item.keys():
            yield item


def check_conversation(messages: Sequence[Message], user_first: bool = True) -> None:
    """Refuse a conversation that can't be trained on, or that a chat template would silently change.

    Args:
        messages: The turns, with roles system, user and assistant.
        user_first: Whether the first turn after the system turn must be the user's.

    Raises:
        FormatError: There are no turns, or no assistant turn; a turn other than the system turn is empty; a system turn
            is not the first; two turns of one role follow each other; the user doesn't begin; the assistant doesn't
            end.
    """
    if not messages:
        raise FormatError("no messages", "the conversation has no turns. Add turns or remove the row")
    before: str | None = None
    for number, message in enumerate(messages, 1):
        role = message["role"]
        turn = f"turn {number} ({role})"
        if role == "system":
            if number > 1:
                raise FormatError("roles out of order", f"{turn} is not the first. Make it the first turn or remove it")
        elif not message["content"].strip():
            raise FormatError("empty turn", f"{turn} is empty. Write its text or remove the row")
        elif role == before:
            raise FormatError("roles out of order", f"{turn} follows a turn of the same role. Join the two")
        elif role == "assistant" and before != "user" and user_first:
            raise FormatError("roles out of order", f"{turn} answers no user turn. Put the user's turn before it")
        before = role
    if all(message["role"] != "assistant" for message in messages):
        raise FormatError(
            "no assistant turn", "no turn is the assistant's, so there is nothing to learn. Add the answer"
        )
    if before != "assistant":
        reason = f"turn {len(messages)} ({before}) is the last and has no answer. Remove it or add the answer"
        raise FormatError("last turn not assistant", reason)


def _turn_advice(row: Mapping[str, Any]) -> str:
    """Advice for a row that is a single turn."""
    turn = row.keys() & {"role", "from"} and row.keys() & {"content", "value"}
    return ". A row is not one turn: put all turns of a conversation into a list 'messages'" if turn else ""


def has_columns(row: Mapping[str, Any], *columns: str) -> bool:
    """Returns whether all these columns are filled; None counts as missing."""
    return all(row.get(column) is not None for column in columns)


def first_filled(row: Mapping[str, Any], *columns: str) -> str | None:
    """The first of these columns that is filled."""
    return next((column for column in columns if has_columns(row, column)), None)


def column_names(row: Mapping[str, Any]) -> str:
    """The filled columns, for messages."""
    return _quoted([column for column in row if row[column] is not None]) or "none that is filled"


def _quoted(names: Sequence[object]) -> str:
    return ", ".join(repr(name) for name in names)


def wrong_type(what: str, value: object, wanted: str) -> NoReturn:
    """Raise the error for a value of another type than ``wanted``."""
    raise FormatError("wrong type", f"{what} is a {type(value).__name__}. Make it {wanted}")


def read_text(value: object, what: str) -> str:
    """A string, or the joined text parts of a multi-modal content list."""
    if isinstance(value, (list, tuple)):
        for number, part in enumerate(value, 1):
            if not (isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)):
                reason = f"part {number} of {what} is not {{type: 'text', text: ...}}. Training takes text only"
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


def read_written(value: object, kind: type) -> object:
    """The value that a text spells as JSON, if that is of this kind and not empty; otherwise the value itself."""
    written = read_json(value) if isinstance(value, str) else None
    return written if isinstance(written, kind) and written else value


def read_list(row: Mapping[str, Any], column: str, wanted: str) -> Sequence[Any]:
    """The list in a column, possibly written as JSON.

    Raises:
        FormatError: The column holds something else.
    """
    value = read_written(row[column], list)
    if not isinstance(value, (list, tuple)):
        wrong_type(f"the column {column!r}", value, wanted)
    return value


def read_turns(row: Mapping[str, Any], column: str) -> tuple[Message, ...]:
    """The turns in a column.

    Raises:
        FormatError: The column holds something else.
    """
    turns = read_list(row, column, "a list of {role: ..., content: ...}")
    return tuple(read_turn(turn, f"turn {number} of {column!r}") for number, turn in enumerate(turns, 1))


def read_turn(turn: object, what: str) -> Message:
    """One turn, of ``role`` or ``from`` and ``content`` or ``value``; its role gets its usual name.

    Raises:
        FormatError: It is not a turn, its role is unknown, or it asks for something that isn't supported, such as a
            tool call.
    """
    if not isinstance(turn, Mapping):
        wrong_type(what, turn, "{role: ..., content: ...}")
    _refuse(turn, _REFUSED_IN_TURNS, what)
    role_key = next((key for key in ("role", "from") if turn.get(key) is not None), None)
    content_key = next((key for key in ("content", "value") if turn.get(key) is not None), None)
    if role_key is None or content_key is None:
        lacks = (
            {"role": "content", "from": "value"}[role_key] if role_key else "from" if content_key == "value" else "role"
        )
        raise FormatError("wrong type", f"{what} lacks {lacks!r}, it has {column_names(turn)}. Add it")
    name = read_text(turn[role_key], f"{role_key!r} in {what}")
    role = ROLES.get(name.strip().lower())
    if role is None:
        reason = f"{what} has the role {name[:40]!r}. Known roles are {', '.join(ROLES)}"
        raise FormatError("unknown role", reason)
    message = Message(role=role, content=read_text(turn[content_key], f"{content_key!r} in {what}"))
    weights = {key: turn[key] for key in _WEIGHTS if turn.get(key) is not None}
    for key, value in weights.items():
        if _weight(value) is None:
            reason = f"{what} has the {key} {str(value)[:40]}, and a turn is either learned or not. Make it 1 or 0"
            raise FormatError("weight", reason)
        message["weight"] = cast(int, _weight(value))
    if len({_weight(value) for value in weights.values()}) > 1:
        raise FormatError("weight", f"{what} has {_quoted(list(weights))}, which differ. Keep one of them")
    further = {key: read_text(turn[key], f"{key!r} in {what}") for key in _FOR_TEMPLATE if turn.get(key) is not None}
    message.update(cast(Message, {key: text for key, text in further.items() if text.strip()}))
    return message


def _from_alpaca(row: Mapping[str, Any]) -> Conversation:
    """Earlier exchanges; the instruction, with its input or context after a blank line; the output."""
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
        for column in ("instruction", "input", "context")
        if has_columns(row, column)
    ]
    texts.append("\n\n".join(text for text in asked if text.strip()))
    output = "output" if has_columns(row, "output") else "response"
    texts.append(read_text(row[output], f"the column {output!r}"))
    return Conversation(
        tuple(Message(role="assistant" if i % 2 else "user", content=text) for i, text in enumerate(texts))
    )


def _from_prompt_completion(row: Mapping[str, Any]) -> Conversation:
    return Conversation(_side(row, "prompt", "user") + _side(row, "completion", "assistant"))


def _side(row: Mapping[str, Any], column: str, role: str) -> tuple[Message, ...]:
    if isinstance(row[column], (list, tuple)):
        return read_turns(row, column)
    if isinstance(row[column], Mapping):
        return (read_turn(row[column], f"the column {column!r}"),)
    return (Message(role=role, content=read_text(row[column], f"the column {column!r}")),)


def _says_from(row: Mapping[str, Any]) -> bool:
    return any("from" in turn for turn in _turns_in(row.get("messages")))


#: The known formats of conversations and texts.
FORMATS: FormatTable[Conversation] = FormatTable(
    "format",
    Format("colossalchat", ("messages",), lambda row: Conversation(read_turns(row, "messages")), also=_says_from),
    Format("messages", ("messages",), lambda row: Conversation(read_turns(row, "messages"))),
    Format("sharegpt", ("conversations",), lambda row: Conversation(read_turns(row, "conversations"))),
    Format("alpaca", ("instruction", ("output", "response")), _from_alpaca, further=("input", "context", "history")),
    Format("prompt_completion", ("prompt", "completion"), _from_prompt_completion, user_first=False),
    Format("text", ("text",), lambda row: Conversation(text=read_text(row["text"], "the column 'text'"))),
)
