"""OpenAssistant's conversation trees (OASST1, OASST2), converted to rows of other formats.

In such a tree a message has several replies, which people have ranked. Both published forms are read: one tree per row,
and one message per row. A tree becomes rows of the formats ``messages``, ``ranking`` or ``prompt``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from lightning_rlhf.data.formats import ROLES, FormatError, column_names, has_columns, wrong_type
from lightning_rlhf.data.preference_formats import read_number
from lightning_rlhf.data.sources import BadRows, Row

#: The format's name in configurations.
OASST = "oasst"

#: Makes the rows of a tree from its first message; each comes with the message that it ends with or asks.
TreeRows = Callable[[Mapping[str, Any]], Iterable[tuple[Mapping[str, Any], dict[str, Any]]]]


def expand_trees(rows: Iterable[Row], make: TreeRows, bad: BadRows, format: str = "auto") -> Iterator[Row]:
    """Replaces each tree by its rows, and passes other rows on.

    In a file with one message per row, the messages of a tree must be next to each other, as in the published files;
    parents may follow their replies.

    Args:
        rows: The rows as they were read.
        make: One of the functions below.
        bad: Gets trees without rows, and messages that belong to no tree.
        format: The format of the rows: ``auto`` recognizes trees by their columns; with ``oasst`` all rows must belong
            to trees; with any other format none does.

    Yields:
        Rows. For a row of a tree, ``where`` names its line and the message.
    """
    if format not in ("auto", OASST):
        yield from rows
        return
    for tree_id, group in groupby(rows, key=_tree_id):
        if tree_id is not None:
            for where, root in _link(list(group), bad):
                yield from _made(where, root, make, bad)
            continue
        for row in group:
            if _is_tree(row.value):
                yield from _made(row.where, row.value["prompt"], make, bad)
            elif format == OASST:
                needs = "'prompt' with a message and its replies, or 'message_id', 'message_tree_id', 'role' and 'text'"
                lacks = f"the format 'oasst' needs the columns {needs}, and the row has {column_names(row.value)}"
                bad.add(row.where, "missing column", f"{lacks}. Choose the format 'auto'")
            else:
                yield row


def instruction_rows(root: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], dict[str, Any]]]:
    """One row: the conversation along the best reply to every message, up to the assistant's last turn.

    Replies without a rank count as worse than those with one. Of equal replies the first is taken.
    """
    path = [root]
    while replies := _replies(path[-1]):
        path.append(min(replies, key=_rank))  # the first of equals
    while path and _role(path[-1]) != "assistant":
        path.pop()
    if not path:
        reason = "no assistant reply follows the first message, so there is nothing to learn. Remove the tree"
        raise FormatError("no assistant turn", reason)
    yield path[-1], {"messages": _turns(path), **_language(root)}


def preference_rows(root: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], dict[str, Any]]]:
    """A ranking for every message that has two or more ranked replies by the assistant."""
    found = False
    waiting: list[tuple[Mapping[str, Any], ...]] = [(root,)]
    while waiting:
        path = waiting.pop()
        replies = _replies(path[-1])
        waiting += [(*path, reply) for reply in reversed(replies)]
        ranked = [reply for reply in replies if _role(reply) == "assistant" and reply.get("rank") is not None]
        if len(ranked) < 2:
            continue
        found = True
        answers = [_turns([reply]) for reply in ranked]
        ranks = [_rank(reply) for reply in ranked]
        yield path[-1], {"prompt": _turns(path), "answers": answers, "ranks": ranks, **_language(root)}
    if not found:
        reason = "no message has two ranked assistant replies, so there is nothing to compare. Remove the tree"
        raise FormatError("no comparison", reason)


def prompt_rows(root: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], dict[str, Any]]]:
    """One row: the first message."""
    yield root, {"prompt": _turns([root]), "message_id": root.get("message_id"), **_language(root)}


def _made(where: str, root: Mapping[str, Any], make: TreeRows, bad: BadRows) -> Iterator[Row]:
    try:
        if not _stays(root):
            reason = (
                "the first message was deleted or failed its review, and all others follow from it. Remove the tree"
            )
            raise FormatError("deleted", reason)
        for message, row in make(root):
            yield Row(row, f"{where} ({_name(message)})")
    except FormatError as error:
        bad.add(where, error.kind, str(error))


def _is_tree(row: Mapping[str, Any]) -> bool:
    message = row.get("prompt")
    return isinstance(message, Mapping) and "text" in message and ("replies" in message or "message_tree_id" in row)


def _tree_id(row: Row) -> object:
    """The tree's id if the row is one message of a tree; otherwise None."""
    names = [row.value.get(column) for column in ("message_tree_id", "message_id")]
    flat = all(isinstance(name, str) for name in names) and has_columns(row.value, "role", "text")
    return names[0] if flat else None


def _link(rows: Sequence[Row], bad: BadRows) -> Iterator[tuple[str, dict[str, Any]]]:
    """The place and first message of the tree that these messages form, each with its replies."""
    messages: dict[str, dict[str, Any]] = {}
    places = []
    for row in rows:
        name, parent = row.value["message_id"], row.value.get("parent_id")
        if parent is not None and not isinstance(parent, str):
            kind = type(parent).__name__
            bad.add(row.where, "wrong type", f"the column 'parent_id' is a {kind}. Make it the id of a message")
            continue
        if name in messages:
            bad.add(row.where, "repeated message", f"the file has the message {name!r} twice. Remove one of them")
            continue
        messages[name] = {**row.value, "replies": []}
        places.append((name, row.where))
    roots = [name for name, _ in places if messages[name].get("parent_id") is None]
    for name, where in places:
        parent = messages[name].get("parent_id")
        if parent is None and name != roots[0]:
            reason = f"the messages {roots[0]!r} and {name!r} both begin the tree. Give one of them a 'parent_id'"
            bad.add(where, "second root", reason)
        elif parent is not None and (parent not in messages or not _leads_to(messages, name, roots)):
            reason = f"the message answers {parent!r}, which is not among the neighboring messages of its tree"
            bad.add(where, "no parent", f"{reason}. Sort the file by 'message_tree_id', and add what is missing")
        elif parent is not None:
            messages[parent]["replies"].append(messages[name])
    yield from ((where, messages[name]) for name, where in places if name in roots[:1])


def _leads_to(messages: Mapping[str, Mapping[str, Any]], name: str, roots: Sequence[str]) -> bool:
    """Returns whether the messages above lead to the root, and not in a circle."""
    seen = set()
    while name in messages and name not in seen:
        seen.add(name)
        if name in roots[:1]:
            return True
        name = messages[name].get("parent_id", "")
    return False


def _stays(message: Mapping[str, Any]) -> bool:
    return not message.get("deleted") and message.get("review_result") is not False


def _replies(message: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The replies, without those that were deleted or failed their review."""
    replies = message.get("replies")
    if replies is None:
        return []
    what = f"'replies' of the {_name(message)}"
    if not isinstance(replies, (list, tuple)):
        wrong_type(what, replies, "a list of messages")
    for number, reply in enumerate(replies, 1):
        if not isinstance(reply, Mapping):
            wrong_type(f"reply {number} in {what}", reply, "a message")
    return [reply for reply in replies if _stays(reply)]


def _rank(message: Mapping[str, Any]) -> float:
    """Lower is better."""
    if message.get("rank") is None:
        return float("inf")
    return read_number(message["rank"], f"the rank of the {_name(message)}")


def _role(message: Mapping[str, Any]) -> str | None:
    role = message.get("role")
    return ROLES.get(role.strip().lower()) if isinstance(role, str) else None


def _name(message: Mapping[str, Any]) -> str:
    name = message.get("message_id")
    return f"message {name}" if isinstance(name, str) else "message without an id"


def _turns(path: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{"role": message.get("role"), "content": message.get("text")} for message in path]


def _language(root: Mapping[str, Any]) -> dict[str, Any]:
    return {"lang": root["lang"]} if has_columns(root, "lang") else {}
