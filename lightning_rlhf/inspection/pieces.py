"""Tokens as readable text: whole characters, special tokens by name, nothing invisible."""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from lightning_rlhf.data.tokens import spell
from lightning_rlhf.rollout.detokenizer import UNFINISHED

_MOST = 8
"""Maximum number of tokens to try together for whole characters: tokens may end in the middle of a character."""


class TokenPiece(NamedTuple):
    """A token, or several tokens that make whole characters only together.

    Attributes:
        text: The decoded text.
        ids: The tokens' ids.
        position: Position of the first token in its sequence (prompt and answer).
        scored: Whether the loss reads the tokens.
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
        scored: For each token, whether the loss reads it.
        specials: Ids of special tokens.
        before: The pieces before these tokens, if any; positions continue theirs.

    Yields:
        The pieces. Tokens that make no whole character even together, or that the loss reads only in part, are
        separate pieces.
    """
    first = before[-1].position + len(before[-1].ids) if before else 0
    last = before[-1] if before else None
    at = 0
    while at < len(ids):
        # decoders treat the first token of a text differently, so decode the piece before it too
        context = [] if last is None or last.text.endswith(UNFINISHED) else list(last.ids)
        known = spell(tokenizer, context)
        end, text = at + 1, spell(tokenizer, list(ids[at : at + 1]))
        for stop in range(at + 1, min(at + _MOST, len(ids)) + 1):
            if any(flag != scored[at] for flag in scored[at:stop]):
                break
            whole = spell(tokenizer, [*context, *ids[at:stop]])
            # with byte fallback, an unfinished character changes those before it
            if whole.startswith(known) and UNFINISHED not in whole[len(known) :]:
                end, text = stop, whole[len(known) :]
                break
        last = TokenPiece(text, tuple(ids[at:end]), first + at, scored[at], ids[at] in specials)
        yield last
        at = end


def visible(text: str) -> Iterator[tuple[str, int]]:
    """The visible form of a text.

    A line break becomes ``⏎``. Tabs and other invisible characters (control characters, characters of no width or that
    change the direction of writing) become signs or numbers.

    Args:
        text: Any text.

    Yields:
        Characters, with the marks that combine with them, and the number of columns that they take in a terminal.
    """
    pending, width = "", 0
    for character in text:
        if unicodedata.category(character) in ("Mn", "Me"):
            if not 0xFE00 <= ord(character) <= 0xFE0F:  # these select a glyph's width, and terminals differ
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
