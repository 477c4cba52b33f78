"""The formats of preferences (pairs, transcripts, rankings), and the one shape that they are converted to.

Each format is a line of :data:`PREFERENCE_FORMATS`: the columns that it needs, and one small function that converts a
row to whole conversations with ranks. Prompt, pairs and all checks follow from those, in one way for all formats.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from numbers import Real
from typing import Any, NoReturn

from lightning_rlhf.data.formats import (
    FORMATS,
    LABELS,
    RATINGS,
    ROLES,
    SHARED,
    Conversation,
    Format,
    FormatError,
    FormatTable,
    Message,
    check_columns,
    first_filled,
    has_columns,
    read_list,
    read_text,
    read_turn,
    to_conversation,
    unread_keys,
    wrong_type,
)

_MARKER = re.compile(r"(?:\A\s*|\r?\n\r?\n)(Human|Assistant):")
#: The same without an empty line before the markers, or with blanks in that line.
_LOOSE_MARKER = re.compile(r"(?:\A\s*|\n)(Human|Assistant):")
#: Tells a transcript from plain text beside a prompt. It is stricter than the marker: any text may begin "Human:".
_TRANSCRIPT = re.compile(r"\s*\nHuman:")
_ANSWERS = ("ranked", "answers", "responses", "completions")


@dataclass(frozen=True)
class Preference:
    """A prompt, its answers, and which of them are better than which.

    Attributes:
        prompt: The messages that all answers share. It ends with a user turn and may begin with a system turn.
        answers: The messages after the prompt, best answer first. Each begins and ends with an assistant turn.
        pairs: Indexes into ``answers`` of the better and the worse of each pair. Ties form no pair.
        margins: By how much the better answer should win, one per pair, or None.
        scores: The graders' scores, one per answer, or None.
        source: Name of the row's source, or empty.
        lang: Its language, or empty.
        options: Further arguments of the chat template.
        unread: Keys of the row and of its turns that nothing reads.
    """

    prompt: tuple[Message, ...]
    answers: tuple[tuple[Message, ...], ...]
    pairs: tuple[tuple[int, int], ...]
    margins: tuple[float, ...] | None = None
    scores: tuple[float, ...] | None = None
    source: str = ""
    lang: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    unread: tuple[str, ...] = field(default=(), compare=False)

    @property
    def first_user_turn(self) -> str:
        """The first user turn, as of an instruction row."""
        return next(message["content"] for message in self.prompt if message["role"] == "user")


@dataclass(frozen=True)
class Candidate:
    """One answer of a row, before it is checked.

    Attributes:
        name: Its name in errors: its column, and its number if the column holds several.
        messages: The whole conversation, prompt included.
        rank: Its place; lower is better.
        score: The graders' score, if the row has it.
    """

    name: str
    messages: tuple[Message, ...]
    rank: float
    score: float | None = None


def to_preference(row: Mapping[str, Any], format: str = "auto", system: str | None = None) -> Preference:
    r"""Convert a row to a preference.

    The prompt is the longest run of messages that all answers begin with, so the answers may repeat the prompt, or be
    the only place that has it. Strings that begin with ``"\n\nHuman:"`` are read as transcripts, whose turns lose the
    white space around them. If no empty line precedes an assistant's marker, every line that begins with a marker
    begins a turn. Columns that are None count as missing. Numbers may be written as strings and lists as JSON, as in
    CSV files.

    The columns ``margin`` (of rows with one pair), ``chosen_score`` and ``rejected_score`` (or ``score_chosen`` and
    ``score_rejected``), ``source``, and ``lang`` or ``language`` are read too. ``system``, ``system_prompt``,
    ``tools`` and ``chat_template_kwargs`` work as in :func:`~lightning_rlhf.data.formats.to_conversation`.

    Args:
        row: The columns of the row.
        format: A name in :data:`PREFERENCE_FORMATS`, the import path of another, or ``"auto"`` for the first that
            matches.
        system: System turn for rows that have none.

    Returns:
        The preference, checked.

    Raises:
        FormatError: The row can't be trained on: its columns, types, texts or numbers are wrong,
            :func:`~lightning_rlhf.data.formats.check_conversation` refuses a conversation, the answers answer
            different turns, or no answer is better than another.
        ValueError: No format has this name: that is no fault of a row.
    """
    chosen = PREFERENCE_FORMATS.choose(row, format)
    check_columns(row)
    candidates = sorted(chosen.convert(row), key=lambda candidate: candidate.rank)
    conversations = [check_candidate(candidate, row, system) for candidate in candidates]
    made = [conversation.messages or () for conversation in conversations]
    shared = _shared(candidates, made)
    answers = tuple(messages[shared:] for messages in made)
    pairs = _pairs(candidates, answers)
    scores = tuple(candidate.score for candidate in candidates if candidate.score is not None)
    return Preference(
        prompt=made[0][:shared],
        answers=answers,
        pairs=pairs,
        margins=_margins(row, len(pairs)),
        scores=scores or None,
        source=read_name(row, "source"),
        lang=read_name(row, "lang", "language"),
        options=conversations[0].options,
        unread=unread_keys(row, (*SHARED, "margin", "source", *chosen.reads)),
    )


def read_name(row: Mapping[str, Any], *columns: str) -> str:
    """The text in the first of these columns that is filled, or an empty text.

    Numbers and lists are written out.
    """
    column = first_filled(row, *columns)
    value = row[column] if column else ""
    if isinstance(value, Mapping):
        wrong_type(f"the column {column!r}", value, "a text")
    texts = value if isinstance(value, (list, tuple)) else [value]
    return read_text(", ".join(map(str, texts)), f"the column {column!r}")


def check_candidate(candidate: Candidate, row: Mapping[str, Any], system: str | None) -> Conversation:
    """The whole conversation with an answer, with its system turn.

    Args:
        candidate: The answer.
        row: The columns of its row.
        system: System turn for rows that have none.

    Raises:
        FormatError: It can't be trained on.
    """
    whole = {**{column: row.get(column) for column in SHARED}, "messages": candidate.messages}
    try:
        return to_conversation(whole, "messages", system)
    except FormatError as error:
        raise FormatError(error.kind, f"in the conversation with {candidate.name}, {error.reason}") from error


def _shared(candidates: Sequence[Candidate], conversations: Sequence[tuple[Message, ...]]) -> int:
    """Number of messages that all conversations begin with; each keeps at least one as its answer."""
    first = conversations[0]
    most = min(map(len, conversations)) - 1
    for n in range(most):
        for candidate, other in zip(candidates, conversations, strict=True):
            if other[n] == first[n]:
                continue
            if first[n]["role"] != "assistant":  # then other's isn't either: roles alternate in both, from the user's
                texts = f"{first[n]['content'][:40]!r} and {other[n]['content'][:40]!r}"
                reason = f"{candidates[0].name} and {candidate.name} differ before the assistant's turn: {texts}"
                raise FormatError("different prompts", f"{reason}. Give answers to the same prompt")
            return n
    return most


def _pairs(candidates: Sequence[Candidate], answers: Sequence[tuple[Message, ...]]) -> tuple[tuple[int, int], ...]:
    pairs = [
        (i, j) for i, j in itertools.combinations(range(len(answers)), 2) if candidates[i].rank < candidates[j].rank
    ]
    if not pairs:
        reason = "all answers are tied, so no answer is better than another. Rank them, or remove the row"
        raise FormatError("no pair", reason)
    for i, j in pairs:
        better, worse = candidates[i], candidates[j]
        if answers[i] == answers[j]:
            reason = f"no difference: {better.name} and {worse.name} are the same. Remove one of them, or the row"
            raise FormatError("no difference", reason)
        if better.score is not None and worse.score is not None and better.score < worse.score:
            scores = f"{better.name} has the score {better.score:g}, and {worse.name}, the worse one, {worse.score:g}"
            raise FormatError("scores out of order", f"{scores}. Swap the answers or correct the scores")
    return tuple(pairs)


def _margins(row: Mapping[str, Any], num_pairs: int) -> tuple[float, ...] | None:
    if not has_columns(row, "margin"):
        return None
    margin = read_number(row["margin"], "the column 'margin'")
    if margin < 0:
        reason = (
            f"the column 'margin' is {margin:g}. Make it 0 or more; swap the answers if the better one is marked worse"
        )
        raise FormatError("negative margin", reason)
    if num_pairs > 1:
        reason = f"the column 'margin' is one number, and the row has {num_pairs} pairs. Give 'scores' instead"
        raise FormatError("ambiguous margin", reason)
    return (margin,)


def read_number(value: object, what: str) -> float:
    """A number, possibly written as a text.

    Raises:
        FormatError: It is not a number, or not finite.
    """
    if isinstance(value, bool) or not isinstance(value, (Real, Decimal, str)):
        wrong_type(what, value, "a number")
    try:
        number = float(value)
    except OverflowError:  # an integer beyond any float
        number = math.inf
    except ValueError as error:
        raise FormatError("wrong type", f"{what} is the text {str(value)[:40]!r}. Make it a number") from error
    if not math.isfinite(number):
        raise FormatError("not finite", f"{what} is {number}. Make it a finite number")
    return number


def _numbers(row: Mapping[str, Any], column: str, count: int) -> list[float]:
    values = read_list(row, column, "a list of numbers, one per answer")
    if len(values) != count:
        reason = f"the column {column!r} has {len(values)} numbers for {count} answers. Give one per answer"
        raise FormatError("wrong length", reason)
    return [read_number(value, f"number {i} of {column!r}") for i, value in enumerate(values, 1)]


def _messages(value: object, what: str, role: str) -> tuple[Message, ...]:
    """Messages, written as a list of turns, one turn, a transcript, or the text of one turn of the given role."""
    if isinstance(value, (Mapping, list, tuple)):
        listed = [(value, what)] if isinstance(value, Mapping) else _numbered(value, what)
        turns = [read_turn(turn, name) for turn, name in listed]
        if turns and turns[-1]["role"] == "assistant" and turns[-1].get("weight") == 0:
            reason = f"the last turn of {what} has the weight 0, but it is the answer that is compared"
            raise FormatError("weight", f"{reason}. Remove the weight, or the row")
        for turn in turns:
            turn.pop("weight", None)  # answers are compared as a whole
        return tuple(turns)
    if not isinstance(value, str):
        wrong_type(what, value, "a string or a list of {role: ..., content: ...}")
    text = read_text(value, what)
    return _transcript(text, what) if _TRANSCRIPT.match(text) else (Message(role=role, content=text),)


def _numbered(turns: Sequence[Any], what: str) -> list[tuple[Any, str]]:
    return [(turn, f"turn {i} of {what}") for i, turn in enumerate(turns, 1)]


def _transcript(text: str, what: str) -> tuple[Message, ...]:
    r"""The turns of ``"\n\nHuman: ...\n\nAssistant: ..."``. A marker stands at the start or after a blank line.

    If no blank line precedes any of the assistant's markers, a marker may begin any line.
    """
    if not _MARKER.match(text):
        form = "does not begin with 'Human:', so it is not a transcript"
        raise FormatError("no transcript", f"{what} {form}. If the prompt has a column of its own, name it 'prompt'")
    _, *parts = _MARKER.split(text)
    if "Assistant" not in parts[::2]:
        _, *parts = _LOOSE_MARKER.split(text)
    return tuple(
        Message(role=ROLES[name.lower()], content=content.strip())
        for name, content in zip(parts[::2], parts[1::2], strict=True)
    )


def read_prompt(row: Mapping[str, Any]) -> tuple[Message, ...]:
    """The messages in a row's column ``prompt``, a text or messages, without an empty last answer.

    Raises:
        FormatError: The column holds something else.
    """
    prompt = _messages(row["prompt"], "the column 'prompt'", "user")
    if isinstance(row["prompt"], str) and prompt[-1] == Message(role="assistant", content=""):
        return prompt[:-1]  # a transcript that stops at 'Assistant:', for the answer to follow
    return prompt


def join_answer(prompt: tuple[Message, ...], answer: tuple[Message, ...]) -> tuple[Message, ...]:
    """Prompt and answer, each once: the answer may repeat the prompt."""
    repeats = len(answer) > len(prompt) and answer[: len(prompt)] == prompt
    return answer if repeats else prompt + answer


def _chosen_rejected(
    row: Mapping[str, Any], read: Callable[[object, str], tuple[Message, ...]], prompt: tuple[Message, ...] = ()
) -> list[Candidate]:
    """The two candidates of a pair, with their scores."""
    columns = {side: first_filled(row, f"{side}_score", f"score_{side}") for side in ("chosen", "rejected")}
    lone = [column for column in columns.values() if column]
    if len(lone) == 1:
        reason = f"the row has only the score {lone[0]!r}. Give both answers a score, or none"
        raise FormatError("missing column", reason)
    return [
        Candidate(
            name=f"the column {side!r}",
            messages=join_answer(prompt, read(row[side], f"the column {side!r}")),
            rank=rank,
            score=read_number(row[column], f"the column {column!r}") if column else None,
        )
        for rank, (side, column) in enumerate(columns.items())
    ]


def read_answer(value: object, what: str) -> tuple[Message, ...]:
    """An answer's messages: a text, a turn or turns, which may repeat the prompt.

    Raises:
        FormatError: It is something else.
    """
    return _messages(value, what, "assistant")


def _transcript_or_answer(value: object, what: str) -> tuple[Message, ...]:
    return _transcript(read_text(value, what), what) if isinstance(value, str) else read_answer(value, what)


def read_prompt_in(row: Mapping[str, Any], column: str) -> tuple[Message, ...]:
    """The messages in a column that must hold a list of turns.

    Raises:
        FormatError: The column holds something else.
    """
    return _messages(read_list(row, column, "a list of {role: ..., content: ...}"), repr(column), "user")


def _from_ranking(row: Mapping[str, Any]) -> list[Candidate]:
    """Any number of answers to a prompt, with ranks, scores or both; those of 'ranked' are in order, best first."""
    column = next(column for column in _ANSWERS if has_columns(row, column))
    answers = read_list(row, column, "a list of answers")
    count = len(answers)
    if count < 2:
        reason = f"the column {column!r} holds {count} of the two or more answers that a comparison needs. Add answers"
        raise FormatError("too few answers", reason)
    scores = _numbers(row, "scores", count) if has_columns(row, "scores") else None
    rank_column = first_filled(row, "ranks", "rank")
    if rank_column:
        ranks = _numbers(row, rank_column, count)
    elif scores:
        ranks = [-score for score in scores]
    elif column == "ranked":
        ranks = [float(i) for i in range(count)]
    else:
        reason = f"nothing says which of {column!r} is better. Add a column 'ranks' (lower is better) or 'scores'"
        raise FormatError("missing column", f"{reason}, or name it 'ranked' if the best answer comes first")
    prompt = read_prompt(row)
    candidates = []
    for i, answer in enumerate(answers):
        name = f"answer {i + 1} of {column!r}"
        messages = join_answer(prompt, read_answer(answer, name))
        candidates.append(Candidate(name, messages, ranks[i], scores[i] if scores else None))
    return candidates


def _from_unpaired(row: Mapping[str, Any]) -> NoReturn:
    column = first_filled(row, *LABELS, *RATINGS)
    reason = (
        f"the column {column!r} rates a single answer: KTO-style training takes such rows, by "
        "KTOModule and UnpairedDataModule; training on pairs doesn't"
    )
    raise FormatError("unpaired", f"{reason}. Group good and bad answers to a prompt into 'chosen' and 'rejected'")


def _is_conversation(row: Mapping[str, Any]) -> bool:
    return FORMATS.detect(row) is not None or has_columns(row, "prompt", "response")


_PAIR_SCORES = ("chosen_score", "rejected_score", "score_chosen", "score_rejected")
#: The known formats of preferences.
PREFERENCE_FORMATS: FormatTable[list[Candidate]] = FormatTable(
    "preference format",
    *(
        Format(name, (*columns, "chosen", "rejected"), convert, _PAIR_SCORES)
        for name, columns, convert in (
            ("pair", ("prompt",), lambda row: _chosen_rejected(row, read_answer, read_prompt(row))),
            (
                "colossalchat",
                ("context",),
                lambda row: _chosen_rejected(row, read_answer, read_prompt_in(row, "context")),
            ),
            (
                "sharegpt_preference",
                ("conversations",),
                lambda row: _chosen_rejected(row, read_answer, read_prompt_in(row, "conversations")),
            ),
            ("transcripts", (), lambda row: _chosen_rejected(row, _transcript_or_answer)),
        )
    ),
    Format("ranking", ("prompt", _ANSWERS), _from_ranking, ("ranks", "rank", "scores")),
    Format("unpaired", ((*LABELS, *RATINGS),), _from_unpaired, also=_is_conversation),
)
