"""One completion in the making."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from typing import Any, Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_rlhf.rollout.detokenizer import Detokenizer, decode, tail
from lightning_rlhf.rollout.types import Completion, Request, Sampling
from lightning_rlhf.utils.random import sample_key

OnToken = Callable[[int, str], None]
"""Receives each token, and the text that can be shown since the last; the texts add up to the completion's."""


class ActiveSequence:
    """One completion in the making: the same rules in every engine.

    Args:
        prompt: Token ids.
        key: Of the sample.
        sampling: How it is drawn.
        stops: Tokens that end it.
        tokenizer: The model's.
        on_token: Called in the thread that makes the tokens.

    Attributes:
        ids: Tokens so far.
        logprobs: Of those.
        done: Finished, failed or cancelled.
        future: Gets the completion, or what went wrong; cancelling it ends the row.
    """

    def __init__(
        self,
        prompt: tuple[int, ...],
        key: int,
        sampling: Sampling,
        stops: Collection[int],
        tokenizer: PreTrainedTokenizerBase,
        on_token: OnToken | None = None,
    ) -> None:
        self.prompt, self.key, self.sampling, self.stops = prompt, key, sampling, stops
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.future: Future[Completion] = Future()
        self.done = False  # asking the future takes its lock, and every row is asked several times a token
        self.future.add_done_callback(self._end)
        self._tokenizer, self._on_token = tokenizer, on_token
        streams = on_token is not None or sampling.stop_strings
        self._stream = Detokenizer(tokenizer, sampling.stop_strings, tail(tokenizer, prompt)) if streams else None

    @property
    def position(self) -> int:
        """Of the last token."""
        return len(self.prompt) + len(self.ids) - 1

    @property
    def columns(self) -> int:
        """Positions that the row can come to have."""
        return len(self.prompt) + self.sampling.max_new_tokens

    @property
    def noise_key(self) -> int:
        """Of the next token."""
        return sample_key(self.key, len(self.ids))

    @property
    def too_short(self) -> bool:
        """Whether stop tokens are impossible yet."""
        return len(self.ids) < self.sampling.min_new_tokens

    def push(self, token: int, logprob: float) -> None:
        """Takes the next token. What the caller's ``on_token`` raises ends this row alone."""
        self.ids.append(token)
        self.logprobs.append(logprob)
        try:
            completion = self._finished()
            if self._on_token is not None and self._stream is not None:
                self._on_token(token, self._stream.rest() if completion else self._stream.release())
        except Exception as error:
            self.fail(error)
        else:
            if completion and self.future.set_running_or_notify_cancel():
                self.future.set_result(completion)

    def fail(self, error: BaseException) -> None:
        """Ends the row with an error for whoever waits."""
        if not self.done and self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)

    def _end(self, future: Future[Completion]) -> None:
        self.done = True

    def _finished(self) -> Completion | None:
        """The completion, if the last token ends it."""
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
            return Completion(ids, self.logprobs, stream.finish(), reason)
        shown, after = ids[:-1] if stopped else ids, tail(self._tokenizer, self.prompt)
        return Completion(ids, self.logprobs, decode(self._tokenizer, shown, after), reason)


def make_sequences(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    request: Request,
    sampling: Sampling,
    stop_token_ids: Sequence[int],
    on_token: OnToken | None = None,
    name: str = "Rollout request",
) -> list[ActiveSequence]:
    """Rows of a request, if the model can serve it.

    Args:
        model: The transformers model.
        tokenizer: The model's.
        request: What is asked.
        sampling: How to draw.
        stop_token_ids: Tokens that end a completion.
        on_token: Receives tokens as they come.
        name: Of the request, in errors.

    Returns:
        A row for each key.

    Raises:
        ValueError: It can't; the message says why.
    """
    prompt = tuple(request.prompt)
    if not prompt:
        raise ValueError(f"{name}: the prompt has no tokens.")
    embeddings: Any = model.get_input_embeddings()
    vocabulary: int = embeddings.weight.shape[0]
    if not 0 <= min(prompt) <= max(prompt) < vocabulary:
        strange = next(t for t in prompt if not 0 <= t < vocabulary)
        raise ValueError(f"{name}: the prompt has token {strange}, and the model's vocabulary {vocabulary} entries.")
    stops = frozenset(i for i in stop_token_ids if 0 <= i < vocabulary)  # configs may name more than there are
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and len(prompt) + sampling.max_new_tokens > context:
        raise ValueError(
            f"{name}: a prompt of {len(prompt)} tokens and max_new_tokens {sampling.max_new_tokens} are more than the "
            f"model's context of {context}. Use shorter prompts or a smaller sampling.max_new_tokens."
        )
    return [ActiveSequence(prompt, key, sampling, stops, tokenizer, on_token) for key in request.keys]
