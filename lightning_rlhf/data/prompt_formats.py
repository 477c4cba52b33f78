"""The formats of prompts, and the one shape that they are converted to.

Rows of instructions and preferences also serve as prompts: a last answer is left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from lightning_rlhf.data.formats import (
    FORMATS,
    REFUSED_IN_PROMPTS,
    SYSTEM,
    Format,
    FormatError,
    FormatTable,
    Message,
    check_columns,
    read_system,
    read_text,
    read_turns,
    to_conversation,
    unread_keys,
)
from lightning_rlhf.data.preference_formats import read_prompt, to_preference
from lightning_rlhf.data.sources import read_json

#: Stands for the answer, since rows are checked as whole conversations.
_ANSWER = Message(role="assistant", content="...")


@dataclass(frozen=True)
class Prompt:
    """A row as a prompt.

    Attributes:
        prompt: The messages, the last of which is the user's; or a plain text that no template touches.
        columns: The row's other columns, for reward functions.
        unread: Keys of its turns that nothing reads.
    """

    prompt: tuple[Message, ...] | str
    columns: Mapping[str, Any]
    unread: tuple[str, ...] = field(default=(), compare=False)


def _column(row: Mapping[str, Any], *, name: str) -> str:
    return read_text(row[name], f"the column {name!r}")


def _from_prompt(row: Mapping[str, Any]) -> tuple[Message, ...] | str:
    return row["prompt"] if isinstance(row["prompt"], str) else read_prompt(row)


def _conversations(name: str) -> Format[tuple[Message, ...] | str]:
    """The prompts of a format of conversations."""
    known = FORMATS[name]
    return Format(name, known.columns, lambda row: known.convert(row).messages or (), also=known.also)


def _from_alpaca(row: Mapping[str, Any]) -> tuple[Message, ...] | str:
    messages = FORMATS["alpaca"].convert({**row, "output": _ANSWER["content"]}).messages or ()
    return messages if len(messages) > 2 else messages[0]["content"]


def _from_preference(row: Mapping[str, Any]) -> tuple[Message, ...]:
    return to_preference({"chosen": row["chosen"], "rejected": row["rejected"]}, "transcripts").prompt


def _holds_turns(row: Mapping[str, Any]) -> bool:
    return not isinstance(row["context"], str) or isinstance(read_json(row["context"]), list)


#: The known formats of prompts: those of instructions and preferences, whose answers may be missing, and a column
#: ``question``. They make messages, with or without a last answer; or the text of a user turn.
PROMPT_FORMATS: FormatTable[tuple[Message, ...] | str] = FormatTable(
    "prompt format",
    Format("prompt", ("prompt",), _from_prompt),
    _conversations("colossalchat"),
    _conversations("messages"),
    Format("colossalchat_preference", ("context",), partial(read_turns, column="context"), also=_holds_turns),
    _conversations("sharegpt"),
    Format("alpaca", ("instruction",), _from_alpaca, FORMATS["alpaca"].further),
    Format("question", ("question",), partial(_column, name="question")),
    Format("transcripts", ("chosen", "rejected"), _from_preference),
    Format("text", ("text",), partial(_column, name="text")),
)


def to_prompt(row: Mapping[str, Any], format: str = "auto", system: str | None = None, as_text: bool = False) -> Prompt:
    """Convert a row to a prompt.

    The last answer of a conversation is left out. Columns that are None count as missing. The text of a column
    ``system`` or ``system_prompt`` becomes the system turn of a prompt that has none. All other columns are kept.

    Args:
        row: The columns of the row.
        format: A name in :data:`PROMPT_FORMATS`, the import path of another, or ``"auto"`` for the first that matches.
        system: System turn for rows that have none.
        as_text: Take a text as it is, not as a user turn.

    Returns:
        The prompt, checked.

    Raises:
        FormatError: The row has no prompt, or another column holds a value that JSON can't.
        ValueError: No format has this name: that is no fault of a row.
    """
    chosen = PROMPT_FORMATS.choose(row, format)
    check_columns(row, REFUSED_IN_PROMPTS)
    made = chosen.convert(row)
    if as_text:
        prompt: tuple[Message, ...] | str = _text(made, row)
    else:
        turns = _turns(made)
        whole = {"messages": (*turns, _ANSWER), **{column: row.get(column) for column in SYSTEM}}
        prompt = (to_conversation(whole, "messages", system).messages or ())[:-1]
    used = {*chosen.reads, *SYSTEM}
    columns = {str(name): value for name, value in row.items() if name not in used}
    for name, value in columns.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError, RecursionError) as error:
            reason = f"the column {name!r} is kept for reward functions, and can't be written as JSON: {error}"
            raise FormatError("no JSON", f"{reason}. Make it text or numbers, or remove it") from error
    return Prompt(prompt, columns, unread_keys({name: row[name] for name in row if name in used}, used))


def _turns(made: tuple[Message, ...] | str) -> tuple[Message, ...]:
    """The messages up to a last user turn."""
    if isinstance(made, str):
        made = read_prompt({"prompt": made})  # a transcript, or the text of one turn
    turns = made[:-1] if made and made[-1]["role"] == "assistant" else made
    for turn in turns:
        turn.pop("weight", None)  # no turn of a prompt is trained on
    if not turns or turns[-1]["role"] != "user":
        reason = "the prompt doesn't end with a user turn to answer. Add one or remove the row"
        raise FormatError("no user turn", reason)
    return turns


def _text(made: tuple[Message, ...] | str, row: Mapping[str, Any]) -> str:
    if isinstance(made, tuple) or read_system(row):
        reason = "with as_text the prompt is plain text, but the row has messages or a system prompt"
        raise FormatError("no plain text", f"{reason}. Give it a text in the column 'prompt', or set as_text: false")
    text = read_text(made, "the prompt")
    if not text.strip():
        raise FormatError("empty text", "the prompt is empty. Write its text or remove the row")
    return text
