"""The formats of single answers that are good or bad, and the one shape that they are converted to.

A row is a prompt with one answer, or a conversation whose last turn is the answer, and a label or a rating. Preferences
can be taken apart into such answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lightning_rlhf.data.formats import (
    FORMATS,
    LABELS,
    RATINGS,
    SHARED,
    Format,
    FormatError,
    FormatTable,
    Message,
    check_columns,
    first_filled,
    has_columns,
    to_conversation,
    unread_keys,
)
from lightning_rlhf.data.preference_formats import (
    PREFERENCE_FORMATS,
    Candidate,
    Preference,
    check_candidate,
    join_answer,
    read_answer,
    read_name,
    read_number,
    read_prompt,
    read_prompt_in,
    to_preference,
)

_JUDGED = (*LABELS, *RATINGS)


@dataclass(frozen=True)
class Unpaired:
    """A prompt with answers, each of which is good or bad by itself.

    Attributes:
        prompt: The messages that all answers share. It ends with a user turn and may begin with a system turn.
        answers: The messages after the prompt. Each answer begins and ends with an assistant turn.
        labels: For each answer, whether it is good; None if nobody says.
        source: Name of the row's source, or empty.
        lang: Its language, or empty.
        options: Further arguments of the chat template.
        unread: Keys of the row and of its turns that nothing reads.
    """

    prompt: tuple[Message, ...]
    answers: tuple[tuple[Message, ...], ...]
    labels: tuple[bool | None, ...]
    source: str = ""
    lang: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    unread: tuple[str, ...] = field(default=(), compare=False)

    @property
    def first_user_turn(self) -> str:
        """The first user turn, as of an instruction row."""
        return next(message["content"] for message in self.prompt if message["role"] == "user")

    def apart(self) -> Iterator[Unpaired]:
        """Each answer alone; the first has the keys that nothing reads."""
        for i, (answer, label) in enumerate(zip(self.answers, self.labels, strict=True)):
            yield replace(self, answers=(answer,), labels=(label,), unread=() if i else self.unread)


Turns = tuple[Message, ...]


def _from_completion(row: Mapping[str, Any]) -> tuple[Turns, Turns]:
    column = "completion" if has_columns(row, "completion") else "response"
    prompt = read_prompt(row)
    whole = join_answer(prompt, read_answer(row[column], f"the column {column!r}"))
    return prompt, whole[len(prompt) :]


def _last_turn(turns: Turns) -> tuple[Turns, Turns]:
    return turns[:-1], turns[-1:]


#: The known formats of single answers; they make the messages of the prompt and of the answer.
UNPAIRED_FORMATS: FormatTable[tuple[Turns, Turns]] = FormatTable(
    "format of single answers",
    Format("unpaired", ("prompt", ("completion", "response"), _JUDGED), _from_completion),
    Format("messages", ("messages", _JUDGED), lambda row: _last_turn(read_prompt_in(row, "messages"))),
    Format("sharegpt", ("conversations", _JUDGED), lambda row: _last_turn(read_prompt_in(row, "conversations"))),
    Format(
        "alpaca",
        (*FORMATS["alpaca"].columns, _JUDGED),
        lambda row: _last_turn(FORMATS["alpaca"].convert(row).messages or ()),
        FORMATS["alpaca"].further,
    ),
)


def to_unpaired(
    row: Mapping[str, Any],
    format: str = "auto",
    system: str | None = None,
    threshold: float | None = None,
    take_apart: bool = False,
    labeled: bool = True,
) -> Unpaired:
    """Convert a row to answers that are good or bad.

    The label is in a column ``label`` or ``kto_tag``: true or false. A column ``rating`` or ``score`` is a number, and
    ``threshold`` says which are good. A row of pairs, or a ranking, is taken apart if that is asked for. With scores
    and a threshold they decide; otherwise an answer is good if it wins more pairs than it loses, and bad if it loses
    more. One in the middle of a ranking gets no label.

    Args:
        row: The columns of the row.
        format: A name in :data:`UNPAIRED_FORMATS`, with ``take_apart`` also in
            :data:`~lightning_rlhf.data.preference_formats.PREFERENCE_FORMATS`, the import path of another, or
            ``"auto"`` for the first that matches.
        system: System turn for rows that have none.
        threshold: The lowest rating of a good answer.
        take_apart: Read preferences too.
        labeled: Require labels. Otherwise read all conversations and preferences, without labels.

    Returns:
        The answers, checked.

    Raises:
        FormatError: The row can't be used: it is a preference, its label is neither true nor false, a rating has no
            threshold, or its columns, types or texts are wrong.
        ValueError: No format has this name: that is no fault of a row.
    """
    known = UNPAIRED_FORMATS if format == "auto" else {format: UNPAIRED_FORMATS.get(format)}
    single = any(found is not None and found.matches(row) for found in known.values())
    pairs = PREFERENCE_FORMATS.detect(row) if format == "auto" else PREFERENCE_FORMATS.get(format)
    if not single and pairs is not None and pairs.name != "unpaired" and not pairs.missing(row):
        if not take_apart and labeled:
            reason = (
                "the row compares answers, and KTO learns from single ones with a label. DPOModule and RewardModule "
                "train on such rows, by PreferenceDataModule"
            )
            raise FormatError("pairs", f"{reason}. Or set take_apart: true: better answers are good, worse ones bad")
        return _taken_apart(to_preference(row, format, system), threshold, labeled)
    if not single and not labeled and format == "auto":
        return _unlabeled(row, system)
    empty = next((name for name in _JUDGED if name in row and row[name] is None), None)
    if labeled and not single and empty and UNPAIRED_FORMATS.detect({**row, empty: True}):
        raise FormatError("no label", f"the column {empty!r} is empty. Make it true or false, or remove the row")
    chosen = UNPAIRED_FORMATS.choose(row, format)
    check_columns(row)
    prompt, answer = chosen.convert(row)
    judged = first_filled(row, *_JUDGED)
    label = _label(row, judged, threshold) if labeled else None
    conversation = check_candidate(Candidate("the answer", (*prompt, *answer), 0.0), row, system)
    made = conversation.messages or ()
    if made[-len(answer) - 1]["role"] != "user":
        reason = "the answer doesn't follow a user turn. Move turns so that the prompt ends with the user's"
        raise FormatError("no user turn", reason)
    read = [name for name in chosen.reads if name not in RATINGS or name == judged]
    return Unpaired(
        prompt=made[: -len(answer)],
        answers=(made[-len(answer) :],),
        labels=(label,),
        source=read_name(row, "source"),
        lang=read_name(row, "lang", "language"),
        options=conversation.options,
        unread=unread_keys(row, (*SHARED, *LABELS, "source", *read)),
    )


def _label(row: Mapping[str, Any], column: str | None, threshold: float | None) -> bool:
    if column is None:  # a format of one's own, which does not ask for it
        raise FormatError("no label", f"the row has no label. Give it a column {' or '.join(map(repr, _JUDGED))}")
    if column in RATINGS:
        rating = read_number(row[column], f"the column {column!r}")
        if threshold is None:
            reason = f"the column {column!r} is a number, and nothing says which answers are good. Set threshold"
            raise FormatError("no threshold", f"{reason}, or give a column 'label' of true and false")
        return rating >= threshold
    said = {}
    for name in LABELS:
        word = str(row.get(name)).strip().lower()
        if has_columns(row, name) and (not isinstance(row[name], (bool, str)) or word not in ("true", "false")):
            reason = f"the column {name!r} is {repr(row[name])[:40]}. Make it true or false"
            raise FormatError("label", f"{reason}; a number goes into a column 'rating', with a threshold")
        if has_columns(row, name):
            said[name] = word == "true"
    if len({*said.values()}) > 1:
        raise FormatError("two labels", "the columns 'label' and 'kto_tag' differ. Remove one of them")
    return said[column]


def _taken_apart(made: Preference, threshold: float | None, labeled: bool) -> Unpaired:
    """The answers of a preference, best first."""
    labels: list[bool | None]
    if not labeled:
        labels = [None] * len(made.answers)
    elif threshold is not None and made.scores is not None:
        labels = [score >= threshold for score in made.scores]
    else:
        won = [0] * len(made.answers)
        for better, worse in made.pairs:
            won[better] += 1
            won[worse] -= 1
        labels = [n > 0 if n else None for n in won]
    return Unpaired(made.prompt, made.answers, tuple(labels), made.source, made.lang, made.options, made.unread)


def _unlabeled(row: Mapping[str, Any], system: str | None) -> Unpaired:
    """A conversation of any instruction format, whose last turn is the answer."""
    found = to_conversation(row, system=system)
    if found.messages is None:
        raise FormatError("plain text", "the row is plain text without an answer. Give a prompt and a completion")
    prompt, answer = _last_turn(found.messages)
    return Unpaired(prompt, (answer,), (None,), options=found.options, unread=found.unread)
