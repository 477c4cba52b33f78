"""Tokens as text that can be read: whole characters, special tokens by name, nothing invisible."""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from lightning_rlhf.data.tokens import spell
from lightning_rlhf.rollout.detokenizer import UNFINISHED

_MOST = 8
"""Tokens that are tried together for one whole character; where tokens reach over characters, several are open."""


class TokenPiece(NamedTuple):
    """What is shown as one: a token, or the tokens that only together are a character.

    Attributes:
        text: As decoded.
        ids: Of its tokens.
        position: Of the first of them in its sequence (prompt and answer).
        scored: Whether the loss reads them.
        special: Whether it is a special token.
    """

    text: str
    ids: tuple[int, ...]
    position: int
    scored: bool
    special: bool


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The ids of all special tokens."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def pieces(
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[int],
    scored: Sequence[bool],
    specials: Collection[int],
    before: Sequence[TokenPiece] = (),
) -> Iterator[TokenPiece]:
    """Cuts tokens into pieces.

    Args:
        tokenizer: The tokenizer.
        ids: The tokens.
        scored: For each of them, whether the loss reads it.
        specials: Ids of special tokens.
        before: The pieces before them, if any; positions count on from these.

    Yields:
        The pieces. Tokens that make no whole character even together, or of which the loss reads only some, are shown
        one by one.
    """
    first = before[-1].position + len(before[-1].ids) if before else 0
    last = before[-1] if before else None
    at = 0
    while at < len(ids):
        # decoders treat the first token of a text differently: the piece before is decoded too
        context = [] if last is None or last.text.endswith(UNFINISHED) else list(last.ids)
        known = spell(tokenizer, context)
        end, text = at + 1, spell(tokenizer, list(ids[at : at + 1]))
        for stop in range(at + 1, min(at + _MOST, len(ids)) + 1):
            if any(flag != scored[at] for flag in scored[at:stop]):
                break
            whole = spell(tokenizer, [*context, *ids[at:stop]])
            # with byte fallback, an unfinished character takes those before it along
            if whole.startswith(known) and UNFINISHED not in whole[len(known) :]:
                end, text = stop, whole[len(known) :]
                break
        last = TokenPiece(text, tuple(ids[at:end]), first + at, scored[at], ids[at] in specials)
        yield last
        at = end


def visible(text: str) -> Iterator[tuple[str, int]]:
    """What a text is shown as.

    Line breaks are shown, then made; tabs and what else can't be seen (control characters, zero-width ones, what turns
    the direction of writing) are shown by sign or number.

    Args:
        text: Any text.

    Yields:
        Characters, with the marks that combine with them, and the columns they take in a terminal; a line break is
        made behind ``⏎``.
    """
    pending, width = "", 0
    for character in text:
        if unicodedata.category(character) in ("Mn", "Me"):
            if not 0xFE00 <= ord(character) <= 0xFE0F:  # these choose a glyph's width, and terminals differ
                pending = (pending or "◌") + character
                width = width or 1
            elif not pending:
                pending, width = "◌", 1
            continue
        if pending:
            yield pending, width
        pending, width = _shown(character)
    if pending:
        yield pending, width


def _shown(character: str) -> tuple[str, int]:
    named = {"\n": "⏎", "\t": "⇥", "\r": "␍"}
    if character in named:
        return named[character], 1
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"):
        number = ord(character)
        escape = f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}" if number < 65536 else f"\\U{number:08x}"
        return escape, len(escape)
    return character, 2 if unicodedata.east_asian_width(character) in ("W", "F") else 1
