"""The engine: continuous batching over a :class:`~lightning_rlhf.rollout.kv_cache.SlotCache`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_rlhf.models.backbone import Backbone, reason_beyond_trial, vocabulary_size
from lightning_rlhf.rollout.hf_generate import HFGenerateEngine
from lightning_rlhf.rollout.kv_cache import NAME, Decoder, SharedPrompts
from lightning_rlhf.rollout.scheduler import Scheduler
from lightning_rlhf.rollout.sequence import ActiveSequence, make_sequences
from lightning_rlhf.rollout.static import StaticRollout
from lightning_rlhf.rollout.static_step import NoWaits
from lightning_rlhf.rollout.types import Completion, Request, Sampling
from lightning_rlhf.rollout.weights import decoding_weights
from lightning_rlhf.utils.collectives import holds_part

log = logging.getLogger(__name__)

_REASONS: WeakKeyDictionary[PreTrainedModel, str | None] = WeakKeyDictionary()
"""Why a model cannot run with the cache, or None if it can. Each model is tried once."""
_STATIC_REASONS: WeakKeyDictionary[PreTrainedModel, str | None] = WeakKeyDictionary()
"""Why it cannot decode by static steps, or None if it can."""


class CachedEngine:
    """Continuous batching on one device: each distinct prompt runs once, and a finished row makes room for the next.

    If a model's logits with the cache differ from those without it, :class:`~lightning_rlhf.rollout.HFGenerateEngine`
    generates instead. The results are the same, but slower, and a warning tells why.

    Args:
        max_live_tokens: Maximum size of the cache in tokens: rows times the longest row's prompt and
            ``max_new_tokens``, where a prompt with several completions counts once. A larger value decodes more
            completions together and takes more memory. None: no limit.
        max_rows: Maximum number of completions that are decoded together. A larger value is faster while memory lasts.
            None: no limit.
        prefill_tokens: Maximum number of prompt tokens, padding included, in one forward pass; a longer prompt runs
            alone. A larger value takes fewer passes and more memory. Prompts of different lengths run in separate
            passes if their padding would cost more than another pass over the weights.
        prefill_chunk: Run longer prompts in pieces of this many tokens, one per step, so that a new prompt does not
            hold up running completions. A step starts no more prompt tokens than this. A smaller value gives steadier
            streams and later first tokens. None: prompts run at once.
        keep_prefixes: Number of finished completions that a session keeps in the cache. A prompt that begins like one
            of them, such as the next turn of a chat, only runs what is new. A larger value takes more memory.
        reserve: Admit a completion only if its ``max_new_tokens`` fit into ``max_live_tokens``. False: admit it by the
            tokens that it has, and set the newest completion aside when memory runs out; it goes on later, with the
            same tokens, but computes its keys again.
        static: How :meth:`generate` decodes. True: by steps that never wait for the device, which a CUDA device repeats
            as a graph, on copies of the linear layers' weights with adapters merged and in the type that they compute
            in. The samples are the same where the logits agree; to merge into half precision rounds. False: step by
            step, as a session does, which takes no copies. None: True on a CUDA device. Sessions, requests with
            ``alternatives`` or an adapter of their own, ``prefill_chunk``, ``keep_prefixes``, ``reserve=False``, models
            that ranks hold in parts, and models whose forward pass waits for the device, always decode step by step.

    Raises:
        ValueError: A limit is below 1.
    """

    def __init__(
        self,
        max_live_tokens: int | None = None,
        max_rows: int | None = None,
        prefill_tokens: int = 4096,
        prefill_chunk: int | None = None,
        keep_prefixes: int = 0,
        reserve: bool = True,
        static: bool | None = None,
    ) -> None:
        limits = dict(max_live_tokens=max_live_tokens, max_rows=max_rows, prefill_tokens=prefill_tokens)
        for name, limit in (limits | {"prefill_chunk": prefill_chunk}).items():
            if limit is not None and limit < 1:
                raise ValueError(f"{name} must be at least 1, or null for no limit; got {limit}.")
        if keep_prefixes < 0:
            raise ValueError(f"keep_prefixes must be at least 0; got {keep_prefixes}.")
        self.max_live_tokens, self.max_rows, self.prefill_tokens = max_live_tokens, max_rows, prefill_tokens
        self.prefill_chunk, self.keep_prefixes, self.reserve = prefill_chunk, keep_prefixes, reserve
        self.static = static

    def generate(
        self,
        policy: Backbone,
        tokenizer: PreTrainedTokenizerBase,
        requests: Sequence[Request],
        sampling: Sampling,
        stop_token_ids: Sequence[int],
    ) -> list[list[Completion]]:
        """Completes prompts; see :meth:`RolloutEngine.generate`."""
        if reason_against(policy):
            fallback = HFGenerateEngine(self.max_rows)
            return fallback.generate(policy, tokenizer, requests, sampling, stop_token_ids)
        if self._decodes_statically(policy, requests):
            groups = [
                make_sequences(
                    policy.transformer, tokenizer, request, sampling, stop_token_ids, name=f"Rollout request {i}"
                )
                for i, request in enumerate(requests)
            ]
            rows = [row for group in groups for row in group]
            if max((row.columns for row in rows), default=0) <= (self.max_live_tokens or sys.maxsize):
                self._run_statically(policy, rows, sampling)
                return [[row.future.result() for row in group] for group in groups]
        with self.session(policy, tokenizer) as session:
            futures = [
                session.submit(request, sampling, stop_token_ids, name=f"Rollout request {i}")
                for i, request in enumerate(requests)
            ]
            while session.busy:
                session.step()
                if session.error is not None:
                    raise session.error
        return [[future.result() for future in group] for group in futures]

    def _decodes_statically(self, policy: Backbone, requests: Sequence[Request]) -> bool:
        """Returns whether the settings ask for static steps, and the requests and the model allow them."""
        if self.static is False or (self.static is None and device_of(policy).type != "cuda"):
            return False
        if self.prefill_chunk is not None or self.keep_prefixes or not self.reserve or holds_part():
            return False
        if any(request.alternatives or request.adapter is not None for request in requests):
            return False
        return reason_against_static(policy) is None

    def _run_statically(self, policy: Backbone, rows: Sequence[ActiveSequence], sampling: Sampling) -> None:
        device = device_of(policy)
        casts = torch.is_autocast_enabled(device.type)
        # a graph must not keep what autocast would cache
        autocast = torch.autocast(
            device.type, torch.get_autocast_dtype(device.type), enabled=casts, cache_enabled=False
        )
        stops = rows[0].stops if rows else ()
        with (
            policy.native_attention(NAME),
            _without_inference_tensors(policy.transformer),
            autocast,
            decoding_weights(policy.model, device),
        ):
            StaticRollout(Decoder(policy.transformer), rows, sampling, stops, self).run()

    @contextmanager
    def session(self, policy: Backbone, tokenizer: PreTrainedTokenizerBase) -> Iterator[Scheduler]:
        """Accepts requests at any time and streams their tokens, for servers and chats.

        Args:
            policy: A backbone whose model can generate. Within the context it is in eval mode and reserved for the
                session.
            tokenizer: The model's tokenizer.

        Yields:
            A session. It is closed at the end of the context.

        Raises:
            ValueError: The model cannot run with the cache.
        """
        if reason := reason_against(policy):
            raise ValueError(
                f"{type(policy.transformer).__name__} cannot run in a session: {reason}. Use HFGenerateEngine."
            )
        with policy.native_attention(NAME), _without_inference_tensors(policy.transformer):
            adapted = policy.model if hasattr(policy.model, "peft_config") else None
            session = Scheduler(Decoder(policy.transformer, adapted), tokenizer, self)
            try:
                yield session
            finally:
                session.close()


@contextmanager
def _without_inference_tensors(model: PreTrainedModel) -> Iterator[None]:
    """Leaves no inference tensors behind: a backward pass could not use them.

    They are the half-precision copies of weights that autocast caches, and buffers that the model replaced.
    """
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        torch.clear_autocast_cache()
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                if buffer.is_inference():
                    module._buffers[name] = buffer.clone()


# ------------------------------------------------------------------------------------------------- which models


def device_of(policy: Backbone) -> torch.device:
    """Returns where a policy takes its inputs."""
    embeddings: Any = policy.transformer.get_input_embeddings()
    device: torch.device = embeddings.weight.device
    return device


def reason_against(policy: Backbone) -> str | None:
    """Returns why a policy's model cannot run with the cache, or None. Each model is tried once."""
    model = policy.transformer
    if model not in _REASONS:
        _REASONS[model] = reason = _by_config(model) or _by_trying(policy)
        if reason:
            log.warning(
                "%s cannot use the rollout cache (%s). transformers' generate makes the completions instead: the "
                "results are the same, but slower.",
                type(model).__name__,
                reason,
            )
    return _REASONS[model]


def reason_against_static(policy: Backbone) -> str | None:
    """Returns why a policy's model, which can run with the cache, cannot decode by static steps, or None."""
    model = policy.transformer
    if model not in _STATIC_REASONS:
        _STATIC_REASONS[model] = reason = _by_trying(policy, static=True)
        if reason:
            log.warning(
                "%s cannot decode by static steps (%s). The results are the same, but slower.",
                type(model).__name__,
                reason,
            )
    return _STATIC_REASONS[model]


def _by_config(model: PreTrainedModel) -> str | None:
    """Returns a reason that a short trial would not show, or None."""
    types = " ".join(str(getattr(module, "rope_type", "")) for module in model.modules())  # per layer type in Gemma 3
    if changing := next((name for name in ("dynamic", "longrope") if name in types), None):
        return f"rotary embeddings of type {changing} depend on the longest row of a batch"
    return None


def _by_trying(policy: Backbone, static: bool = False) -> str | None:
    """Runs two rows of different lengths with the cache and without it, and compares their logits.

    Args:
        policy: The policy.
        static: Decode by static steps, in which no operation may wait for the device.
    """
    model = policy.transformer
    device, vocabulary = device_of(policy), vocabulary_size(model)
    config = model.config.get_text_config()
    context = getattr(config, "max_position_embeddings", None) or 16
    lengths, steps = (min(10, context - 3), min(4, context - 3)), 3
    never: Any = NoWaits()  # type: ignore[no-untyped-call]
    tokens = [[(3 + 7 * i + 5 * row) % vocabulary for i in range(length + steps)]
              for row, length in enumerate(lengths)]  # fmt: skip
    prompts = [ids[:length] for ids, length in zip(tokens, lengths, strict=True)]
    try:
        with torch.no_grad():
            with policy.native_attention():
                want = torch.stack([
                    model(input_ids=torch.tensor([ids], device=device), use_cache=False)
                    .logits[0, length - 1 :].float()
                    for ids, length in zip(tokens, lengths, strict=True)
                ])  # fmt: skip
            with policy.native_attention(NAME):
                found = []
                for shared in (None, SharedPrompts(lengths)):
                    decoder = Decoder(model)
                    decoder.cache.arrange([None, None], slots=2, columns=max(map(len, tokens)), width=0)
                    got = [decoder.prefill(prompts, [[0], [1]] if shared is None else [[], []], shared=shared)]
                    places = () if shared is None else [(shared, 0), (shared, 1)]
                    for step in range(steps):
                        positions = [length + step for length in lengths]
                        inputs = [ids[p] for ids, p in zip(tokens, positions, strict=True)]
                        if not static:
                            got.append(decoder.decode(inputs, positions, shared=places))
                            continue
                        at = torch.tensor([inputs, positions], device=decoder.device)
                        own = at[1] - torch.tensor(lengths, device=decoder.device) if places else at[1]
                        columns = decoder.cache.columns
                        with never if step else nullcontext():  # the first step may make what is made once
                            got.append(decoder.step(at[0], at[1], own, columns, columns, places))
                    found.append(torch.stack(got, 1))
        half = found[0].dtype not in (torch.float32, torch.float64)
        difference = max(_difference(got.float(), want) for got in found)
    except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    if not difference < (0.05 if half else 1e-4):
        return f"the relative difference of logits is {difference:.1e}"
    return reason_beyond_trial(model, decoder.cache.windows)


def _difference(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())
