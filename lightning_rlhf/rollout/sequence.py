"""One completion that is being generated."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_rlhf.models.backbone import vocabulary_size
from lightning_rlhf.rollout.detokenizer import Detokenizer, decode, tail
from lightning_rlhf.rollout.kv_cache import Shared
from lightning_rlhf.rollout.token_edits import TokenEdits
from lightning_rlhf.rollout.types import Completion, Request, Sampling, Token
from lightning_rlhf.utils.random import sample_key

OnToken = Callable[[Token], None]
"""Receives each token with the new text that can be shown. Joined, these texts are the completion's text."""


Start = tuple[str | None, tuple[int, ...]]
"""An adapter, and tokens that it runs."""


class ActiveSequence:
    """One completion that is being generated. It holds the stopping rules that all engines share.

    Args:
        prompt: Token ids.
        key: Seed of this sample's noise.
        sampling: Sampling settings.
        stops: Tokens that end the completion.
        tokenizer: The model's tokenizer.
        on_token: Called in the thread that samples the tokens.
        alternatives: Number of likeliest tokens to report beside each token.
        adapter: See :class:`~lightning_rlhf.rollout.Request`.

    Attributes:
        ids: Tokens so far.
        logprobs: Their log-probs.
        arrival: Number of rows that were submitted before.
        filled: Number of tokens, prompt included, whose keys and values the engine's cache has.
        base: Number of first tokens whose keys it shares with other rows, so that its own begin after them.
        shared: The prompt that it then continues.
        done: The completion has finished, failed or been cancelled.
        error: Why it failed.
        future: Gets the completion or an error. Cancelling it ends the row.
    """

    def __init__(
        self,
        prompt: tuple[int, ...],
        key: int,
        sampling: Sampling,
        stops: Collection[int],
        tokenizer: PreTrainedTokenizerBase,
        on_token: OnToken | None = None,
        alternatives: int = 0,
        adapter: str | None = None,
    ) -> None:
        self.prompt, self.key, self.sampling, self.stops = prompt, key, sampling, stops
        self.alternatives, self.adapter = alternatives, adapter
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.arrival = self.filled = self.base = 0
        self.shared: Shared | None = None
        self.error: BaseException | None = None
        self._likeliest: list[Sequence[tuple[int, float]]] = []
        self.future: Future[Completion] = Future()
        self.done = False  # future.done() takes a lock, and each row is asked several times per token
        self.future.add_done_callback(self._end)
        self._edits = TokenEdits(sampling, prompt) if TokenEdits.needed(sampling) else None
        self._tokenizer, self._on_token = tokenizer, on_token
        streams = on_token is not None or sampling.stop_strings
        self._stream = Detokenizer(tokenizer, sampling.stop_strings, tail(tokenizer, prompt)) if streams else None

    @property
    def start(self) -> Start:
        """What rows have in common whose prompts run once for all."""
        return self.adapter, self.prompt

    @property
    def position(self) -> int:
        """Position of the last token."""
        return len(self.prompt) + len(self.ids) - 1

    @property
    def column(self) -> int:
        """Column of the last token among the row's own."""
        return self.position - self.base

    def leave_cache(self) -> None:
        """The row loses its keys: all its tokens run again, into columns of its own."""
        self.filled, self.base, self.shared = 0, 0, None

    @property
    def succeeded(self) -> bool:
        """Whether the completion has finished, with an answer."""
        return self.done and self.error is None and not self.future.cancelled()

    @property
    def ready(self) -> bool:
        """Whether the cache has all tokens but the last, so that the next pass gives the next token's logits."""
        return self.filled >= self.position

    def token(self, position: int) -> int:
        """Returns a token of prompt or completion."""
        first = len(self.prompt)
        return self.ids[position - first] if position >= first else self.prompt[position]

    def tokens(self, start: int, end: int) -> list[int]:
        """Returns a part of prompt and completion."""
        first = len(self.prompt)
        return [*self.prompt[start:end], *self.ids[max(0, start - first) : max(0, end - first)]]

    @property
    def columns(self) -> int:
        """Maximum number of its own columns that the row can fill."""
        return len(self.prompt) + self.sampling.max_new_tokens - self.base

    @property
    def noise_key(self) -> int:
        """Seed of the next token's noise."""
        return sample_key(self.key, len(self.ids))

    @property
    def edits(self) -> TokenEdits | None:
        """What penalties and biases change in the next token's scores, if there are any."""
        if self._edits is not None:
            self._edits.follow(self.ids)
        return self._edits

    @property
    def too_short(self) -> bool:
        """Whether the completion is below its minimum length, so that it cannot stop."""
        return len(self.ids) < self.sampling.min_new_tokens

    def push(self, token: int, logprob: float, alternatives: Sequence[tuple[int, float]] = ()) -> None:
        """Appends the next token. An error in ``on_token``, or a log-prob that is not finite, ends this row only."""
        if not math.isfinite(logprob):
            self.fail(
                FloatingPointError(
                    "Rollout: the policy's logits are not finite. Its weights may have diverged: lower the learning "
                    "rate."
                )
            )
            return
        self.ids.append(token)
        self.logprobs.append(logprob)
        if self.alternatives:
            self._likeliest.append(alternatives)
        try:
            completion = self._finished()
            if self._on_token is not None and self._stream is not None:
                text = self._stream.rest() if completion else self._stream.release()
                self._on_token(Token(token, logprob, alternatives, text))
        except Exception as error:
            self.fail(error)
        else:
            if completion and self.future.set_running_or_notify_cancel():
                self.future.set_result(completion)

    def fail(self, error: BaseException) -> None:
        """Ends the row with an error, which its future raises."""
        if not self.done and self.future.set_running_or_notify_cancel():
            self.error = error
            self.future.set_exception(error)

    def _end(self, future: Future[Completion]) -> None:
        self.done = True

    def _finished(self) -> Completion | None:
        """Returns the completion if the last token ends it."""
        ids, stream = self.ids, self._stream
        stopped = ids[-1] in self.stops
        if stream is not None and not stopped:
            stream.push(ids[-1], may_stop=not self.too_short)
        reason: Literal["stop", "length"] = "stop"
        if not stopped and (stream is None or stream.stop is None):
            if len(ids) < self.sampling.max_new_tokens:
                return None
            reason = "length"
        if stream is not None:
            return Completion(ids, self.logprobs, stream.finish(), reason, self._likeliest)
        shown, after = ids[:-1] if stopped else ids, tail(self._tokenizer, self.prompt)
        return Completion(ids, self.logprobs, decode(self._tokenizer, shown, after), reason, self._likeliest)


def make_sequences(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    request: Request,
    sampling: Sampling,
    stop_token_ids: Sequence[int],
    on_token: OnToken | None = None,
    name: str = "Rollout request",
) -> list[ActiveSequence]:
    """Makes the rows of a request.

    Args:
        model: The transformers model.
        tokenizer: The model's tokenizer.
        request: A prompt and keys.
        sampling: Sampling settings.
        stop_token_ids: Tokens that end a completion.
        on_token: Receives each token.
        name: The request's name in error messages.

    Returns:
        One row per key.

    Raises:
        ValueError: The model cannot serve the request; the message says why.
    """
    if (most := request.max_new_tokens) is not None:
        sampling = replace(sampling, max_new_tokens=most, min_new_tokens=min(most, sampling.min_new_tokens))
    prompt = tuple(request.prompt)
    if not prompt:
        raise ValueError(f"{name}: the prompt has no tokens.")
    vocabulary = vocabulary_size(model)
    if not 0 <= min(prompt) <= max(prompt) < vocabulary:
        strange = next(t for t in prompt if not 0 <= t < vocabulary)
        raise ValueError(
            f"{name}: the prompt has the token {strange}, but the model's vocabulary has only {vocabulary} entries."
        )
    stops = frozenset(i for i in stop_token_ids if 0 <= i < vocabulary)  # configs may name tokens that do not exist
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and len(prompt) + sampling.max_new_tokens > context:
        raise ValueError(
            f"{name}: a prompt of {len(prompt)} tokens and max_new_tokens {sampling.max_new_tokens} exceed the model's "
            f"context of {context} tokens. Use shorter prompts or a smaller sampling.max_new_tokens."
        )
    if beyond := [i for i in sampling.logit_bias if i >= vocabulary]:
        raise ValueError(
            f"{name}: logit_bias names the token {beyond[0]}, but the vocabulary has only {vocabulary} entries."
        )
    more = (on_token, request.alternatives, request.adapter)
    return [ActiveSequence(prompt, key, sampling, stops, tokenizer, *more) for key in request.keys]
