"""Decodes a completion while its tokens arrive."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from lightning_rlhf.data.tokens import continued_ids

UNFINISHED = "\ufffd"
"""What a decoder writes for bytes that do not form a whole character (yet)."""
_LONGEST = 3
"""Largest number of bytes that an unfinished character has."""


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], after: Sequence[int] = ()) -> str:
    """Decodes tokens to the text that the model wrote: without special tokens, and with every space kept.

    Args:
        tokenizer: The model's tokenizer.
        ids: The tokens.
        after: Tokens that come before ``ids``. Their text is not returned, but some decoders drop the space that
            begins a text, so they are decoded too.
    """

    def spell(part: Sequence[int]) -> str:
        return str(tokenizer.decode([*part], skip_special_tokens=True, clean_up_tokenization_spaces=False))

    if after and (whole := spell([*after, *ids])).startswith(before := spell(after)):
        return whole[len(before) :]
    return spell(ids)


def tail(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> Sequence[int]:
    """Returns enough of a prompt's last tokens that what follows decodes as it does after the whole prompt."""
    length = 1
    while length < len(ids) and (not (text := decode(tokenizer, ids[-length:])) or UNFINISHED in text):
        length *= 2
    return ids[-length:]


def tokens_of(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], text: str, after: Sequence[int] = ()
) -> list[int]:
    """Returns the tokens that spell the beginning of a tokenized text, such as a completion up to a stop string.

    Args:
        tokenizer: The model's tokenizer.
        ids: Tokens that spell ``text`` and possibly more after it.
        text: The text to keep. A space that ``ids`` have before it is kept as well.
        after: Tokens that come before ``ids``.

    Returns:
        The first of ``ids``. If one token crosses the end of ``text``, its part within the text is tokenized again.
    """
    whole = decode(tokenizer, ids, after)
    if text not in whole:  # another engine, which decodes differently
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
    """Decodes tokens one by one, and looks for stop strings.

    Only a window of the last tokens is decoded. The window begins one step before the text that is still open, because
    a decoder may treat the first token of a sequence differently. The text equals the text of decoding all tokens at
    once, except for broken characters of a byte-fallback tokenizer: decoding all at once then also replaces whole
    characters beside them.

    The text has no special tokens, but stop strings may contain them.

    Args:
        tokenizer: The model's tokenizer.
        stop_strings: Texts that end the completion.
        after: Tokens that come before the first one. Their text is not shown.

    Attributes:
        text: The text that is certain so far, without unfinished characters.
        stop: The position in ``text`` where a stop string begins, or None.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop_strings: Sequence[str] = (), after: Sequence[int] = ()
    ) -> None:
        self.text = ""
        self.stop: int | None = None
        self._tokenizer, self._stops = tokenizer, stop_strings
        self._special = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._spelled = ""  # the text with special tokens
        self._spans: list[tuple[int, int]] = []  # where in it the special tokens are
        self._ids = [*after]  # without special tokens
        self._start, self._closed = 0, len(after)  # the first token of the window, and of the text that is still open
        self._known = decode(tokenizer, after)  # the certain part of the window's text
        self._open = ""  # the rest of the window's text
        self._released = 0  # characters of ``text`` that were handed out

    def push(self, token: int, may_stop: bool = True) -> None:
        """Appends a token.

        Args:
            token: The token's id.
            may_stop: Look for a stop string that this token completes.
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
        """Appends a token that is not special, and the text that it makes certain."""
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
        """Converts a position in the text with special tokens to one in the text without them."""
        return end - sum(min(b, end) - a for a, b in self._spans if a < end)

    def release(self) -> str:
        """Returns the new text that can be shown: it is not, and cannot become, part of a stop string."""
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
        """Returns the whole text: up to a stop string, or with unfinished characters as the decoder writes them."""
        return self.text + self._open if self.stop is None else self.text[: self.stop]

    def rest(self) -> str:
        """Returns the part of :meth:`finish` that :meth:`release` has not returned yet."""
        return self.finish()[self._released :]
