"""Measures a quantized model: perplexity, distance to the unquantized model, bytes and speed."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

#: Libraries whose layers keep tensors in objects beside their parameters.
_QUANTIZERS = ("bitsandbytes", "gptqmodel")


class Reference(NamedTuple):
    """What remains of the unquantized model: enough for its exact logits on the held-out rows.

    Attributes:
        states: For each row, the (T, D) inputs of the head, on the CPU.
        head: A copy of the head.
    """

    states: list[Tensor]
    head: nn.Module


class Quality(NamedTuple):
    """How good a quantized model is, per predicted token of the held-out rows.

    Attributes:
        perplexity: exp of the mean negative log-prob.
        kl: Mean KL(unquantized || quantized) in nats, over the whole vocabulary.
    """

    perplexity: float
    kl: float


def perplexity(model: PreTrainedModel, rows: Sequence[Tensor]) -> float:
    """Measures the perplexity of all tokens but each row's first.

    Args:
        model: A causal LM in evaluation mode.
        rows: 1-D int64 tensors of token ids. Each is a forward pass of its own, so there is no padding.
    """
    total, count = 0.0, 0
    for row in rows:
        [logits] = _logits(model, row)
        total -= _target_logprobs(logits.log_softmax(-1), row).sum().item()
        count += len(row) - 1
    return math.exp(total / count)


def remember(model: PreTrainedModel, rows: Sequence[Tensor]) -> tuple[Reference, float]:
    """Reads the rows with the unquantized model, and keeps what :func:`quality` needs once the model is gone.

    Args:
        model: The unquantized model in evaluation mode.
        rows: Held-out rows.

    Returns:
        The reference and the model's own perplexity.
    """
    head, states = model.get_output_embeddings(), []
    hook = head.register_forward_pre_hook(lambda module, args: states.append(args[0][0].cpu()))
    try:
        own = perplexity(model, rows)
    finally:
        hook.remove()
    return Reference(states, copy.deepcopy(head)), own


def quality(model: PreTrainedModel, rows: Sequence[Tensor], reference: Reference) -> Quality:
    """Measures a quantized model against the unquantized one, which need not be in memory.

    The unquantized model's head reads its own states, in the same forward pass: what the model does to logits after
    the head (scales, soft caps) is done to both.

    Args:
        model: The quantized model in evaluation mode.
        rows: Held-out rows.
        reference: From :func:`remember`, for the same rows.
    """
    nll, kl, count = 0.0, 0.0, 0
    head = model.get_output_embeddings()
    for row, states in zip(rows, reference.states, strict=True):
        hook = head.register_forward_hook(partial(_append_reference, reference.head, states))
        try:
            own, exact = _logits(model, row).log_softmax(-1)
        finally:
            hook.remove()
        nll -= _target_logprobs(own, row).sum().item()
        kl += (exact.exp() * (exact - own)).sum().item()
        count += len(row) - 1
    return Quality(math.exp(nll / count), kl / count)


def _append_reference(head: nn.Module, states: Tensor, module: nn.Module, args: Any, output: Tensor) -> Tensor:
    inputs = states.to(output.device)[None]
    return torch.cat([output, head.to(output.device)(inputs).to(output.dtype)])


@torch.no_grad()
def _logits(model: PreTrainedModel, row: Tensor) -> Tensor:
    """(B, T - 1, V) logits of the positions that predict a token of the row, in fp32."""
    logits: Tensor = model(input_ids=row[None].to(model.device), use_cache=False).logits
    return logits[:, :-1].float()


def _target_logprobs(logprobs: Tensor, row: Tensor) -> Tensor:
    return logprobs.gather(-1, row[1:, None].to(logprobs.device))


# ------------------------------------------------------------------------------------------------------------- costs


def storage_bytes(model: nn.Module) -> int:
    """Counts the bytes of all storages that a model holds, each once.

    ``get_memory_footprint`` misses tensors that quantized layers keep beside their parameters, such as the scales of
    bitsandbytes.
    """
    storages = [tensor.untyped_storage() for tensor in _tensors(model, set()) if not tensor.is_meta]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """All tensors of a module, in its attributes and in theirs."""
    if id(value) in seen:
        return
    seen.add(id(value))
    inside: Iterable[Any] = ()
    if isinstance(value, Tensor):
        yield value
    if isinstance(value, dict):
        inside = value.values()
    elif isinstance(value, (list, tuple)):
        inside = value
    elif isinstance(value, (Tensor, nn.Module)) or type(value).__module__.partition(".")[0] in _QUANTIZERS:
        inside = getattr(value, "__dict__", {}).values()
    for entry in inside:
        yield from _tensors(entry, seen)


def tokens_per_second(model: PreTrainedModel, prompt: Tensor, tokens: int = 32) -> float:
    """Measures greedy decoding of one sequence with the cache, without the time that the prompt takes.

    Args:
        model: A causal LM in evaluation mode.
        prompt: 1-D int64 tensor of token ids.
        tokens: Number of tokens to time, at least 1. A larger value gives an exacter figure.
    """
    ids, cache, start = prompt[None].to(model.device), None, 0.0
    with torch.no_grad():
        for i in range(tokens + 2):
            if i == 2:  # the prompt, and a first step that may compile or allocate, are not timed
                start = time.perf_counter()
            out = model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
            ids.tolist()  # waits for a GPU
    return tokens / (time.perf_counter() - start)
