"""Text of a completion while its tokens arrive."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from lightning_rlhf.data.tokens import continued_ids

UNFINISHED = "\ufffd"
"""What a decoder writes for bytes that are no whole character (yet)."""
_LONGEST = 3
"""Bytes of an unfinished character at most."""


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], after: Sequence[int] = ()) -> str:
    """The text of tokens as the model wrote it: no special tokens, and no blanks tidied away.

    Args:
        tokenizer: The model's.
        ids: The tokens.
        after: Tokens before them, which are not shown: some decoders drop the blank that begins a text.
    """
    alone, whole, before = (
        str(tokenizer.decode([*part], skip_special_tokens=True, clean_up_tokenization_spaces=False))
        for part in (ids, [*after, *ids], after)
    )
    return whole[len(before) :] if whole.startswith(before) else alone


def tail(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> Sequence[int]:
    """The last tokens of a prompt, as many as what follows needs to be decoded as it is behind all of them."""
    length = 1
    while length < len(ids) and (not (text := decode(tokenizer, ids[-length:])) or UNFINISHED in text):
        length *= 2
    return ids[-length:]


def tokens_of(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], text: str, after: Sequence[int] = ()
) -> list[int]:
    """The tokens of a text that others begin with, such as a completion up to a stop string.

    Args:
        tokenizer: The model's.
        ids: Tokens that spell the text and more.
        text: The text; a blank before it in the tokens stays there.
        after: Tokens before them.

    Returns:
        The first of ``ids``; where one of them reaches over the text's end, it is spelled anew up to there.
    """
    whole = decode(tokenizer, ids, after)
    if text not in whole:  # an engine of another make, that decodes otherwise
        return continued_ids(tokenizer, text)
    wanted = whole[: whole.index(text) + len(text)]
    kept = [*ids]
    while kept and decode(tokenizer, kept[:-1], after).startswith(wanted):
        kept.pop()
    if decode(tokenizer, kept, after) == wanted:
        return kept
    while not wanted.startswith(spelled := decode(tokenizer, kept, after)):
        kept.pop()
    return kept + continued_ids(tokenizer, wanted[len(spelled) :])


class Detokenizer:
    """Turns tokens into text one by one, and looks for stop strings.

    Only a window of the last tokens is decoded. It begins a step before the text that is still open, since a decoder
    may treat the first token of a sequence differently. The text is that of decoding all tokens at once, but for broken
    characters of a byte-fallback tokenizer, which then take whole ones beside them along.

    Special tokens are no part of the text; stop strings are looked for in the text with them.

    Args:
        tokenizer: The model's.
        stop_strings: Texts that end the completion.
        after: Tokens before the first, which are not shown.

    Attributes:
        text: What is certain so far: without half characters.
        stop: Where in ``text`` a stop string begins, or None.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop_strings: Sequence[str] = (), after: Sequence[int] = ()
    ) -> None:
        self.text = ""
        self.stop: int | None = None
        self._tokenizer, self._stops = tokenizer, stop_strings
        self._special = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._spelled = ""  # the text with special tokens
        self._spans: list[tuple[int, int]] = []  # of those, in it
        self._ids = [*after]  # without special tokens
        self._start, self._closed = 0, len(after)  # of the window, and of the tokens whose text is still open
        self._known = decode(tokenizer, after)  # of the window's text
        self._open = ""  # the rest of it
        self._released = 0  # characters of ``text``

    def push(self, token: int, may_stop: bool = True) -> None:
        """Takes a token.

        Args:
            token: Its id.
            may_stop: Whether a stop string that it completes counts.
        """
        before = len(self._spelled)
        if token in self._special:
            self._spelled += self._special[token]
            self._spans.append((before, len(self._spelled)))
        else:
            self._decode(token)
        if may_stop and len(self._spelled) > before:
            found = (self._spelled.find(stop, max(0, before - len(stop) + 1)) for stop in self._stops)
            first = min((i for i in found if i >= 0), default=None)
            self.stop = None if first is None else self._shown(first)

    def _decode(self, token: int) -> None:
        """Adds the text that has become certain."""
        self._ids.append(token)
        window = decode(self._tokenizer, self._ids[self._start :])
        marks = len(window) - len(window.rstrip(UNFINISHED))
        whole = window[: len(window) - min(marks, _LONGEST)]
        held = len(self._ids) - self._closed
        if not whole.startswith(self._known) and held <= _LONGEST:
            whole = self._known  # byte fallback: while a character is unfinished, those before it are marks too
        new, self._open = whole[len(self._known) :], window[len(whole) :]
        if new:
            self._known = whole
        if not self._open:
            self._start, self._closed = self._closed, len(self._ids)
            self._known = decode(self._tokenizer, self._ids[self._start :])
        self.text += new
        self._spelled += new

    def _shown(self, end: int) -> int:
        """Characters of the text among so many with special tokens."""
        return end - sum(min(b, end) - a for a, b in self._spans if a < end)

    def release(self) -> str:
        """What may be shown now: text not handed out yet that is not, and can't become, part of a stop string."""
        end = len(self.text)
        if self.stop is not None:
            end = self.stop
        elif self._stops:
            longest, whole = max(map(len, self._stops)) - 1, len(self._spelled)
            starts = range(max(0, whole - longest), whole)
            held = (i for i in starts if any(s.startswith(self._spelled[i:]) for s in self._stops))
            end = self._shown(next(held, whole))
        start, self._released = self._released, max(self._released, end)
        return self.text[start:end]

    def finish(self) -> str:
        """The whole text, after the last token: before a stop string, or with half characters as they are."""
        return self.text + self._open if self.stop is None else self.text[: self.stop]

    def rest(self) -> str:
        """What of :meth:`finish` was not handed out yet."""
        return self.finish()[self._released :]
