"""Tells texts that are far too long before they are tokenized: 10 MB would take seconds and a gigabyte."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate

from transformers import PreTrainedTokenizerBase

from lightning_rlhf.data.tokens import TokenizeError, encode_prompt

#: A text of fewer characters per token of the context is simply tokenized.
_CHARACTERS = 16


def far_over(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], context: int) -> bool:
    """Returns whether texts have more than twice as many tokens as a context, judged by how they begin.

    A longer text has no fewer tokens, but for some at the border. A text that begins with few tokens, such as a long
    run of spaces, is not judged: it has to be tokenized.

    Args:
        tokenizer: The tokenizer.
        texts: The texts of a request, in their order.
        context: Number of tokens that the model reads.
    """
    texts = list(texts)
    most = _CHARACTERS * context
    if sum(map(len, texts)) <= most:
        return False
    starts = accumulate(map(len, texts), initial=0)
    first = "\n".join(text[: most - start] for text, start in zip(texts, starts, strict=False) if start < most)
    try:
        return len(encode_prompt(tokenizer, first)) > 2 * context
    except TokenizeError:  # no tokens
        return False
