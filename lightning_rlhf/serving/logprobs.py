"""Log-probs in OpenAI's forms, and those of a prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_rlhf.models import Policy
from lightning_rlhf.models.tree_attention import attention_of, set_attention
from lightning_rlhf.rollout.kv_cache import NAME, Decoder
from lightning_rlhf.rollout.types import Token
from lightning_rlhf.serving.pieces import special_ids, token_bytes, token_text

#: Stands for a log-prob of minus infinity, which JSON cannot write.
_LEAST = -9999.0


def chat_logprobs(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[Token]) -> list[dict[str, Any]]:
    """Writes log-probs as a chat has them: an entry per token, with its alternatives."""
    return [
        {
            **_entry(tokenizer, token.id, token.logprob),
            "top_logprobs": [_entry(tokenizer, *other) for other in token.alternatives],
        }
        for token in tokens
    ]


def _entry(tokenizer: PreTrainedTokenizerBase, token: int, logprob: float) -> dict[str, Any]:
    raw = token_bytes(tokenizer, token)
    return {"token": token_text(tokenizer, token), "logprob": max(logprob, _LEAST), "bytes": list(raw)}


def completion_logprobs(
    tokenizer: PreTrainedTokenizerBase, tokens: Sequence[Token], alternatives: int, text: str, offset: int = 0
) -> dict[str, Any]:
    """Writes log-probs as a completion has them: lists with an entry per token.

    Args:
        tokenizer: The model's tokenizer.
        tokens: The tokens. The log-prob of a text's first token is NaN, because nothing predicts it; it becomes null.
        alternatives: Number of alternatives that were asked for. The token itself is reported beside them.
        text: Their text, which has no special tokens, and may lack the blank that begins it.
        offset: Number of characters before the first token.
    """
    texts = [token_text(tokenizer, token.id) for token in tokens]
    whole = b""
    starts = []
    for token in tokens:
        starts.append(len(whole.decode(errors="ignore")))
        whole += b"" if token.id in special_ids(tokenizer) else token_bytes(tokenizer, token.id)
    blank = whole.startswith(b" ") and not text.startswith(" ")
    known = [token.logprob == token.logprob for token in tokens]
    tops = [
        {
            token_text(tokenizer, i): max(p, _LEAST)
            for i, p in reversed([*token.alternatives, (token.id, token.logprob)])
        }
        for token in tokens
    ]
    return {
        "tokens": texts,
        "token_logprobs": [max(t.logprob, _LEAST) if k else None for t, k in zip(tokens, known, strict=True)],
        "top_logprobs": [top if k else None for top, k in zip(tops, known, strict=True)] if alternatives else None,
        "text_offset": [offset + max(0, start - blank) for start in starts],
    }


@torch.no_grad()
def prompt_logprobs(
    policy: Policy,
    adapter: str | None,
    prompt: Sequence[int],
    temperature: float,
    alternatives: int,
    piece: int | None = None,
) -> Iterator[list[Token]]:
    """Computes the log-probs of a prompt's tokens. The session that owns the model may be open, and may go on between.

    Args:
        policy: The model.
        adapter: peft's name of the adapter to use. None: the model as it is set.
        prompt: Token ids, L of them.
        temperature: The logits are divided by it; 0 (greedy) counts as 1.
        alternatives: Number of likeliest tokens to report.
        piece: Number of tokens to run at once. None: all, without the rollout cache.

    Yields:
        The tokens of each piece, L in all. The log-prob of the first is NaN, because nothing predicts it.
    """
    known = prompt[:-1]  # nothing follows the last one
    tokens = [Token(prompt[0], float("nan"))]
    if not known:
        yield tokens
        return
    start = 0
    for logits in _whole(policy, adapter, known) if piece is None else _in_pieces(policy, adapter, known, piece):
        scaled = logits.to(torch.promote_types(logits.dtype, torch.float32)) / (temperature or 1.0)
        found = scaled.log_softmax(-1)
        ids = prompt[start + 1 : start + 1 + len(found)]
        own = found.gather(1, torch.tensor(ids, device=found.device)[:, None])[:, 0].tolist()
        likeliest = (side.tolist() for side in reversed(found.topk(min(alternatives, found.shape[1]))))
        tokens += [
            Token(token, logprob, tuple(zip(*others, strict=True)))
            for token, logprob, *others in zip(ids, own, *likeliest, strict=True)
        ]
        yield tokens
        tokens, start = [], start + len(found)


def _whole(policy: Policy, adapter: str | None, prompt: Sequence[int]) -> Iterator[Tensor]:
    """Yields (L, V) logits of the tokens that follow those of a prompt."""
    embeddings: Any = policy.transformer.get_input_embeddings()
    ids = torch.tensor([list(prompt)], device=embeddings.weight.device)
    named: dict[str, Any] = {} if adapter is None else {"adapter_names": [adapter]}
    with _attention(policy, None):
        logits: Tensor = policy.model(input_ids=ids, use_cache=False, **named).logits[0]
    yield logits


def _in_pieces(policy: Policy, adapter: str | None, prompt: Sequence[int], piece: int) -> Iterator[Tensor]:
    """Yields the same, ``piece`` tokens at a time."""
    decoder = Decoder(policy.transformer, None if adapter is None else policy.model)
    decoder.cache.arrange([None], 1, len(prompt), 0)
    adapters = None if adapter is None else [adapter]
    for start in range(0, len(prompt), piece):
        with _attention(policy, NAME):
            logits = decoder.extend(prompt[start : start + piece], 0, start, adapters, every=True)
        yield logits


@contextmanager
def _attention(policy: Policy, name: str | None) -> Iterator[None]:
    """Sets an attention function, and then the one that an open session has set."""
    before = attention_of(policy.transformer)
    try:
        with policy.native_attention(name):
            yield
    finally:
        set_attention(policy.transformer, before)
