"""Log-probs in OpenAI's forms, and those of a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from lightning_rlhf.models import Policy
from lightning_rlhf.models.tree_attention import attention_of, set_attention
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
    policy: Policy, adapter: str | None, prompt: Sequence[int], temperature: float, alternatives: int
) -> list[Token]:
    """Computes the log-probs of a prompt's tokens. The session that owns the model may be open.

    Args:
        policy: The model.
        adapter: peft's name of the adapter to use. None: the model as it is set.
        prompt: Token ids, L of them.
        temperature: The logits are divided by it; 0 (greedy) counts as 1.
        alternatives: Number of likeliest tokens to report.

    Returns:
        L tokens. The log-prob of the first is NaN, because nothing predicts it.
    """
    model = policy.transformer
    attention = attention_of(model)
    embeddings: Any = model.get_input_embeddings()
    ids = torch.tensor([list(prompt)], device=embeddings.weight.device)
    named: dict[str, Any] = {} if adapter is None else {"adapter_names": [adapter]}
    try:
        with policy.native_attention():
            logits = policy.model(input_ids=ids, use_cache=False, **named).logits[0]
    finally:
        set_attention(model, attention)
    tokens = [Token(prompt[0], float("nan"))]
    for i, token in enumerate(prompt[1:]):
        scaled = logits[i].to(torch.promote_types(logits.dtype, torch.float32)) / (temperature or 1.0)
        found = scaled.log_softmax(-1)
        values, others = found.topk(min(alternatives, len(found)))
        likeliest = tuple(zip(others.tolist(), values.tolist(), strict=True))
        tokens.append(Token(token, found[token].item(), likeliest))
    return tokens
