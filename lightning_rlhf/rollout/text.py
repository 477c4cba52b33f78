"""Text of a completion while its tokens arrive."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

UNFINISHED = "\ufffd"
"""What a decoder writes for bytes that are no whole character (yet)."""
_LONGEST = 3
"""Bytes of an unfinished character at most."""


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of tokens as the model wrote it: no special tokens, and no blanks tidied away."""
    text: str = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)  # type: ignore[assignment]
    return text


class TextStream:
    """Turns tokens into text one by one, and looks for stop strings.

    Only a window of the last tokens is decoded. It begins a step before the text that is still open, since a decoder
    may treat the first token of a sequence differently. The text is that of decoding all tokens at once, but for broken
    characters of a byte-fallback tokenizer, which then take whole ones beside them along.

    Args:
        tokenizer: The model's.
        stop_strings: Texts that end the completion.

    Attributes:
        text: What is certain so far: without half characters.
        stop: Where in ``text`` a stop string begins, or None.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_strings: Sequence[str] = ()) -> None:
        self.text = ""
        self.stop: int | None = None
        self._tokenizer, self._stops = tokenizer, stop_strings
        self._ids: list[int] = []
        self._start = self._closed = 0  # of the window, and of the tokens whose text is still open
        self._known = ""  # of the window's text
        self._open = ""  # the rest of it
        self._released = 0  # characters of ``text``

    def push(self, token: int, may_stop: bool = True) -> None:
        """Takes a token.

        Args:
            token: Its id.
            may_stop: Whether a stop string that it completes counts.
        """
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
        before = len(self.text)
        self.text += new
        if new and may_stop:
            found = (self.text.find(stop, max(0, before - len(stop) + 1)) for stop in self._stops)
            self.stop = min((i for i in found if i >= 0), default=None)

    def release(self) -> str:
        """What may be shown now: text not handed out yet that is not, and can't become, part of a stop string."""
        end = len(self.text)
        if self.stop is not None:
            end = self.stop
        elif self._stops:
            longest = max(map(len, self._stops)) - 1
            starts = range(max(0, end - longest), end)
            end = next((i for i in starts if any(s.startswith(self.text[i:]) for s in self._stops)), end)
        start, self._released = self._released, max(self._released, end)
        return self.text[start:end]

    def finish(self) -> str:
        """The whole text, after the last token: before a stop string, or with half characters as they are."""
        return self.text + self._open if self.stop is None else self.text[: self.stop]

    def rest(self) -> str:
        """What of :meth:`finish` was not handed out yet."""
        return self.finish()[self._released :]
