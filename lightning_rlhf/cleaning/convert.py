"""Rows of one format as rows of another of the same kind, or not at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from lightning_rlhf.arguments import did_you_mean
from lightning_rlhf.cleaning.example import FORMATS_OF, Example, Kind, Parsed, kind_of, make_example
from lightning_rlhf.data.formats import SYSTEM, Conversation, FormatError, Message, parse_row, to_conversation
from lightning_rlhf.data.preference_formats import Preference
from lightning_rlhf.data.prompt_formats import Prompt
from lightning_rlhf.data.sources import Row
from lightning_rlhf.data.unpaired_formats import Unpaired, to_unpaired

#: The names that a role has in ShareGPT's and in ColossalChat's rows.
_SHAREGPT = {"system": "system", "user": "human", "assistant": "gpt"}
_COLOSSALCHAT = {"system": "system", "user": "human", "assistant": "assistant"}
Turns = Sequence[Message]


def convert(example: Example, target: str) -> dict[str, Any]:
    """Writes an example as a row of another format.

    The columns that its own format does not read are kept. The row is read again and must give the same: nothing is
    cut or joined to make it fit.

    Args:
        example: The example.
        target: Name of a format of its kind. The row of an example that has this format already is returned as it is.

    Returns:
        The row.

    Raises:
        FormatError: The format can't hold the example; the message says what it can't hold.
        ValueError: No format has this name, or it is no format to write.
    """
    check_target(target)
    if (example.kind, target) not in _WRITERS:
        able = ", ".join(sorted(name for kind, name in _WRITERS if kind == example.kind))
        why = f"the format {target!r} holds no {example.kind}, which this row is; these do: {able}"
        if target == "unpaired" and (rated := [name for name in ("rating", "score") if name in example.row]):
            why += f". If the column {rated[0]!r} rates the answer, set --kind unpaired and --threshold"
        raise FormatError("other kind", why)
    if example.kind == "prompt" and _has_answer(example.row):
        raise FormatError("answer", "the row has an answer, which a prompt can't hold. Leave out --kind prompt")
    if example.format == target:
        return dict(example.row)
    row = _written(example, _WRITERS[example.kind, target](example.parsed), target)
    _check(example, row, target)
    return row


def single_answers(example: Example, threshold: float | None = None) -> list[Example]:
    """Takes a preference apart into answers with labels, as ``UnpairedDataModule`` does; a rating becomes a label.

    Args:
        example: The example. One that has labels, or nothing to take apart, is returned as it is.
        threshold: The lowest rating of a good answer. None: pairs decide, and ratings stay.

    Returns:
        The answers, best first, without those in the middle of a ranking: nothing says whether they are good.

    Raises:
        FormatError: The format of single answers can't hold one.
    """
    rated = isinstance(example.parsed, Unpaired) and example.parsed.labels == (None,) and threshold is not None
    if not rated and example.kind != "preference":
        return [example]
    read = partial(to_unpaired, format=example.format, threshold=threshold, take_apart=True)
    made = parse_row(Row(dict(example.row), example.where), read)
    found = []
    for answer in made.apart():
        if answer.labels != (None,):
            row = _written(example, _unpaired(answer), "unpaired")
            found.append(make_example(row, example.where, "unpaired"))
            if lost := _difference(answer, found[-1].parsed):
                raise FormatError(lost, f"the format 'unpaired' can't hold the row's {lost}")
    return found


def _written(example: Example, written: Mapping[str, Any], target: str) -> dict[str, Any]:
    """Columns of a format, beside those of the example that its own format does not read."""
    read = {*FORMATS_OF[example.kind].choose(example.row, example.format).reads, *SYSTEM}
    own = {name: value for name, value in example.row.items() if name not in read}
    if taken := [name for name in own if name in written]:
        raise FormatError(
            "column", f"the format {target!r} has a column {taken[0]!r}, as the row has. Rename the row's"
        )
    return {**own, **written}


def check_target(target: str) -> None:
    """Refuses a name that is no format to write.

    Raises:
        ValueError: The format can't be written.
    """
    names = sorted({name for _, name in _WRITERS})
    if target not in names:
        raise ValueError(f"There is no format {target} to write{did_you_mean(target, names)} All: {', '.join(names)}.")


def holds_labels(target: str) -> bool:
    """Returns whether a format can hold single answers with labels."""
    return ("unpaired", target) in _WRITERS


def _check(example: Example, row: Mapping[str, Any], target: str) -> None:
    """Reads a written row as a data module would, by its name and by its columns."""
    for format in (target, "auto"):
        try:
            again = make_example(row, example.where, example.kind, format)
        except FormatError as error:
            raise FormatError(error.kind, f"as {target!r} the row can't be read: {error}") from error
        if again.format != target:
            raise FormatError("column", f"its other columns make it a row of {again.format!r}. Remove or rename them")
        if lost := _difference(example.parsed, again.parsed):
            raise FormatError(lost, f"the format {target!r} can't hold the row's {lost}")
    found = kind_of(row)
    if found != example.kind and example.kind != "prompt":  # prompts and conversations share columns
        raise FormatError("column", f"its other columns make it a {found}. Remove or rename them")


def _has_answer(row: Mapping[str, Any]) -> bool:
    """Returns whether a row that is read as a prompt has an answer, which would be left out."""
    if kind_of(row) == "preference":
        return True
    try:
        return to_conversation(row).messages is not None
    except FormatError:
        return False


def _difference(one: Parsed, other: Parsed) -> str:
    """The first part in which two differ; empty if they are equal."""
    names = ("prompt",) if isinstance(one, Prompt) else tuple(vars(one))
    return next((name for name in names if name != "unread" and getattr(one, name) != getattr(other, name)), "")


# ------------------------------------------------------------------------------------------------ instructions


def _messages(made: Conversation) -> Turns:
    if made.messages is None:
        raise FormatError("plain text", "the row is plain text without turns")
    return made.messages


def _turns(
    turns: Turns, role: str = "role", content: str = "content", names: Mapping[str, str] | None = None
) -> list[Any]:
    """Turns under other keys and role names; further keys stay."""
    return [
        {role: (names or {}).get(turn["role"], turn["role"]), content: turn["content"]}
        | {key: value for key, value in turn.items() if key not in ("role", "content")}
        for turn in turns
    ]


def _colossalchat(turns: Turns) -> list[Any]:
    return _turns(turns, "from", "content", _COLOSSALCHAT)


def _sharegpt(turns: Turns) -> list[Any]:
    return _turns(turns, "from", "value", _SHAREGPT)


def _system_apart(turns: Turns) -> tuple[dict[str, Any], Turns]:
    """The column of the system turn, and the other turns."""
    if turns and turns[0]["role"] == "system":
        return {"system": turns[0]["content"]}, turns[1:]
    return {}, turns


def _alpaca(made: Conversation) -> dict[str, Any]:
    system, turns = _system_apart(_messages(made))
    if [turn["role"] for turn in turns] != ["user", "assistant"]:
        raise FormatError(
            "several turns", f"the format 'alpaca' holds one question and answer, and the row has {len(turns)} turns"
        )
    return {"instruction": turns[0]["content"], "input": "", "output": turns[1]["content"], **system}


def _prompt_completion(made: Conversation) -> dict[str, Any]:
    turns = _messages(made)
    if [turn.keys() for turn in turns] == [{"role", "content"}] * 2 and turns[0]["role"] == "user":
        return {"prompt": turns[0]["content"], "completion": turns[1]["content"]}
    return {"prompt": _turns(turns[:-1]), "completion": _turns(turns[-1:])}


def _text(made: Conversation) -> dict[str, Any]:
    if made.text is None:
        raise FormatError("turns", "the format 'text' holds plain text, and the row has turns")
    return {"text": made.text}


# ------------------------------------------------------------------------------------------------ preferences


def _two(made: Preference) -> tuple[Turns, Turns]:
    if len(made.answers) != 2:
        raise FormatError("several answers", f"a pair holds two answers, and the row has {len(made.answers)}")
    return made.answers[0], made.answers[1]


def _pair(name: str, write: Callable[[Turns], Any]) -> Callable[[Preference], dict[str, Any]]:
    """Writes the turns before the answers to a column, and the answers to ``chosen`` and ``rejected``."""

    def written(made: Preference) -> dict[str, Any]:
        chosen, rejected = _two(made)
        return {name: write(made.prompt), "chosen": write(chosen), "rejected": write(rejected), **_pair_scores(made)}

    return written


def _pair_scores(made: Preference) -> dict[str, float]:
    return dict(zip(("chosen_score", "rejected_score"), made.scores, strict=True)) if made.scores else {}


def _transcripts(made: Preference) -> dict[str, Any]:
    system, turns = _system_apart(made.prompt)
    chosen, rejected = _two(made)
    texts = {"chosen": _transcript((*turns, *chosen)), "rejected": _transcript((*turns, *rejected))}
    return {**texts, **system, **_pair_scores(made)}


def _transcript(turns: Turns) -> str:
    names = {"user": "Human", "assistant": "Assistant"}
    return "".join(f"\n\n{names.get(turn['role'], turn['role'])}: {turn['content']}" for turn in turns)


def _ranking(made: Preference) -> dict[str, Any]:
    better = [sum(worse == i for _, worse in made.pairs) for i in range(len(made.answers))]
    scores = {"scores": list(made.scores)} if made.scores else {}
    return {
        "prompt": _turns(made.prompt),
        "answers": [_turns(turns) for turns in made.answers],
        "ranks": better,
        **scores,
    }


# ------------------------------------------------------------------------------------------------ single answers


def _unpaired(made: Unpaired) -> dict[str, Any]:
    return {"prompt": _turns(made.prompt), "completion": _turns(made.answers[0]), **_label(made)}


def _whole(write: Callable[[Conversation], dict[str, Any]]) -> Callable[[Unpaired], dict[str, Any]]:
    """Writes prompt and answer as a conversation, with a label."""
    return lambda made: {**write(Conversation((*made.prompt, *made.answers[0]))), **_label(made)}


def _label(made: Unpaired) -> dict[str, Any]:
    if made.labels[0] is None:
        raise FormatError("no threshold", "the row has a rating, and nothing says which are good. Add --threshold")
    return {"label": made.labels[0]}


# ------------------------------------------------------------------------------------------------ prompts


def _prompt_turns(made: Prompt) -> Turns:
    return (Message(role="user", content=made.prompt),) if isinstance(made.prompt, str) else made.prompt


def _prompt_text(column: str) -> Callable[[Prompt], dict[str, Any]]:
    def written(made: Prompt) -> dict[str, Any]:
        system, turns = _system_apart(_prompt_turns(made))
        if len(turns) != 1:
            raise FormatError(
                "several turns", f"a column {column!r} holds one question, and the row has {len(turns)} turns"
            )
        return {column: turns[0]["content"], **system}

    return written


_WRITERS: dict[tuple[Kind, str], Callable[[Any], dict[str, Any]]] = {
    ("instruction", "messages"): lambda made: {"messages": _turns(_messages(made))},
    ("instruction", "colossalchat"): lambda made: {"messages": _colossalchat(_messages(made))},
    ("instruction", "sharegpt"): lambda made: {"conversations": _sharegpt(_messages(made))},
    ("instruction", "alpaca"): _alpaca,
    ("instruction", "prompt_completion"): _prompt_completion,
    ("instruction", "text"): _text,
    ("preference", "pair"): _pair("prompt", _turns),
    ("preference", "colossalchat"): _pair("context", _colossalchat),
    ("preference", "sharegpt_preference"): _pair("conversations", _sharegpt),
    ("preference", "transcripts"): _transcripts,
    ("preference", "ranking"): _ranking,
    ("unpaired", "unpaired"): _unpaired,
    ("unpaired", "messages"): _whole(lambda made: {"messages": _turns(_messages(made))}),
    ("unpaired", "sharegpt"): _whole(lambda made: {"conversations": _sharegpt(_messages(made))}),
    ("unpaired", "alpaca"): _whole(_alpaca),
    ("prompt", "prompt"): lambda made: {"prompt": _turns(_prompt_turns(made))},
    ("prompt", "messages"): lambda made: {"messages": _turns(_prompt_turns(made))},
    ("prompt", "colossalchat"): lambda made: {"messages": _colossalchat(_prompt_turns(made))},
    ("prompt", "sharegpt"): lambda made: {"conversations": _sharegpt(_prompt_turns(made))},
    ("prompt", "alpaca"): _prompt_text("instruction"),
    ("prompt", "question"): _prompt_text("question"),
    ("prompt", "text"): _prompt_text("text"),
}
