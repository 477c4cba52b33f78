"""What writes: a model behind an OpenAI-compatible endpoint, or a model that runs here."""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

from lightning_rlhf.data.formats import Message
from lightning_rlhf.endpoint import Budget, ChatRequest, Endpoint, Ledger, Reply
from lightning_rlhf.models.loading import Dtype

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lightning_rlhf.models import Policy
    from lightning_rlhf.rollout import Completion

OnReply = Callable[[int, Reply], None]


class Generator(ABC):
    """Base of what writes.

    Attributes:
        name: The model's name, as it stands in requests and in the provenance of rows.
        continues: Whether it can continue an unfinished last turn, be it the assistant's or the user's.
    """

    name: str
    continues: bool

    @abstractmethod
    def generate(
        self,
        requests: Sequence[ChatRequest],
        ledger: Ledger | None = None,
        budget: Budget | None = None,
        on_reply: OnReply | None = None,
    ) -> list[Reply]:
        """Answers requests.

        Args:
            requests: Any number of requests.
            ledger: Answers what it was asked before, and keeps what is new.
            budget: Refuses requests that could pass it.
            on_reply: Called with the number of each request and its reply, in the order of arrival.

        Returns:
            One reply per request, in order.

        Raises:
            BudgetExceeded: A request could pass the budget. What arrived before is in the ledger.
            EndpointError: The endpoint can't be used; the message says what to do.
        """


class EndpointGenerator(Generator):
    """Asks an OpenAI-compatible endpoint: vLLM, llama.cpp, LiteLLM, OpenAI and others.

    Args:
        base_url: URL of the API, such as ``http://127.0.0.1:8000/v1``.
        model: Name of the model on the server.
        api_key_env: Name of the environment variable that holds the API key. None: no key is sent.
        concurrency: Number of requests at a time. A larger value is faster if the server can handle it.
        requests_per_minute: Most requests per minute. None: no limit.
        timeout: Seconds without data after which an attempt fails.
        retries: Number of further attempts per request.
        backoff: Seconds before the first further attempt. The wait doubles with each attempt.
        patience: Number of consecutive requests without a reply after which all end.
        continues: Whether the server continues an unfinished last turn if ``continue_final_message`` asks for it, as
            vLLM does. Lists are then begun for the model, and the style ``opening`` can be used.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        api_key_env: str | None = None,
        concurrency: int = 8,
        requests_per_minute: float | None = None,
        timeout: float = 60.0,
        retries: int = 5,
        backoff: float = 1.0,
        patience: int = 5,
        continues: bool = False,
    ) -> None:
        self.name, self.continues = model, continues
        self.endpoint = Endpoint(
            base_url,
            model,
            api_key_env=api_key_env,
            concurrency=concurrency,
            requests_per_minute=requests_per_minute,
            timeout=timeout,
            retries=retries,
            backoff=backoff,
            patience=patience,
        )

    def generate(
        self,
        requests: Sequence[ChatRequest],
        ledger: Ledger | None = None,
        budget: Budget | None = None,
        on_reply: OnReply | None = None,
    ) -> list[Reply]:
        """Sends requests; see :meth:`Generator.generate`."""
        return self.endpoint.ask(requests, ledger, budget, on_reply)


class EngineGenerator(Generator):
    """Runs a model on this machine, by the rollout engine. It needs no network.

    Its requests stand in the ledger too, and cost nothing: a budget does not concern them.

    Args:
        pretrained: A run's folder, a directory or hub id of a causal LM or of adapters; or ``smollm2-135m-instruct``,
            which needs no hub.
        dtype: Data type of the weights.
        device: Device on which it runs. None: the GPU if there is one, otherwise the CPU.
        batch_size: Number of replies that are generated together. A larger value is faster and takes more memory.
        chat_template: Preset name or path of a Jinja file that replaces the model's chat template.
        trust_remote_code: Run code that comes with the model.
    """

    continues = True

    def __init__(
        self,
        pretrained: str,
        dtype: Dtype = "float32",
        device: str | None = None,
        batch_size: int = 32,
        chat_template: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"EngineGenerator: batch_size must be at least 1; got {batch_size}.")
        self.name, self.dtype, self.device, self.batch_size = os.fspath(pretrained), dtype, device, batch_size
        self.chat_template, self.trust_remote_code = chat_template, trust_remote_code

    def generate(
        self,
        requests: Sequence[ChatRequest],
        ledger: Ledger | None = None,
        budget: Budget | None = None,
        on_reply: OnReply | None = None,
    ) -> list[Reply]:
        """Generates replies, batch by batch; see :meth:`Generator.generate`.

        Raises:
            OSError: The model does not exist or cannot be read.
            ValueError: The model has no chat template, or the template refuses a request.
        """
        found: dict[int, Reply] = {}
        for part in self._batches(requests):
            known = [ledger.find(requests[i].key(self.name)) if ledger else None for i in part]
            made, start = known, time.perf_counter()
            if None in known:  # the whole batch: in the last digit, numbers depend on who shares a batch
                made = list(self._loaded.reply([requests[i] for i in part], self.name))
            seconds = (time.perf_counter() - start) / len(part)
            for i, before, reply in zip(part, known, made, strict=True):
                found[i] = before or cast(Reply, reply)
                if ledger is not None and before is None:
                    ledger.record(requests[i], self.name, found[i], seconds)
                if on_reply is not None:
                    on_reply(i, found[i])
        return [found[i] for i in range(len(requests))]

    def _batches(self, requests: Sequence[ChatRequest]) -> Iterator[list[int]]:
        """Numbers of the requests that run together: those with equal settings, in order."""
        alike: dict[Any, list[int]] = {}
        for i, request in enumerate(requests):
            alike.setdefault(_settings(request), []).append(i)
        for numbers in alike.values():
            yield from (numbers[start : start + self.batch_size] for start in range(0, len(numbers), self.batch_size))

    @cached_property
    def _loaded(self) -> _Model:
        return _Model.load(self)


@dataclass(frozen=True)
class _Model:
    """A loaded model with its tokenizer."""

    tokenizer: PreTrainedTokenizerBase
    policy: Policy
    stops: Sequence[int]

    @classmethod
    def load(cls, settings: EngineGenerator) -> _Model:
        import torch

        from lightning_rlhf.data.templates import set_chat_template, stop_token_ids
        from lightning_rlhf.models import Policy, load_causal_lm, load_tokenizer
        from lightning_rlhf.models.loading import load_stop_token_ids
        from lightning_rlhf.models.runs import find_model

        source, remote = find_model(settings.name), settings.trust_remote_code
        tokenizer = load_tokenizer(source, remote)
        own = tokenizer.eos_token_id  # a template may replace it
        if set_chat_template(tokenizer, settings.chat_template):
            raise ValueError(f"{source} does not know the tokens of chat_template={settings.chat_template!r}.")
        model = load_causal_lm(
            source, dtype=settings.dtype, inference=True, vocab_size=len(tokenizer), trust_remote_code=remote
        )
        device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
        stops = stop_token_ids(tokenizer, [own, *load_stop_token_ids(source, remote)])
        return cls(tokenizer, Policy(model.requires_grad_(False).to(device), layout="padded"), stops)

    def reply(self, requests: Sequence[ChatRequest], name: str) -> list[Reply]:
        """Replies to requests with equal settings. A request that fills the context gets none."""
        import torch

        from lightning_rlhf.rollout import CachedEngine, Sampling, complete, room

        first = requests[0]
        sampling = Sampling(
            max_new_tokens=first.max_tokens or Sampling.max_new_tokens,
            temperature=1.0 if first.temperature is None else first.temperature,
            top_p=1.0 if first.top_p is None else first.top_p,
            stop_strings=tuple(first.stop or ()),
        )
        prompts = [self._encode(request) for request in requests]
        fitting = [i for i, ids in enumerate(prompts) if room(self.policy, ids, 1) >= 1]
        keys = [int(requests[i].key(name)[:8], 16) for i in fitting]
        with torch.no_grad():
            made = complete(
                CachedEngine(), self.policy, self.tokenizer, [prompts[i] for i in fitting], keys, sampling, self.stops
            )
        done = dict(zip(fitting, made, strict=True))
        return [
            self._reply(request.key(name), prompts[i], done.get(i), bool(request.extra))
            for i, request in enumerate(requests)
        ]

    def _reply(self, key: str, prompt: list[int], made: Completion | None, continued: bool) -> Reply:
        from lightning_rlhf.data.templates import answer_lead
        from lightning_rlhf.endpoint.requests import Usage
        from lightning_rlhf.utils.text import replace_surrogates

        if made is None:
            problem = f"the prompt has {len(prompt)} tokens and fills the model's context"
            return Reply(key, problem=problem, kind="too long")
        text = made.text if continued else made.text.removeprefix(answer_lead(self.tokenizer))
        usage = Usage(len(prompt), completion=len(made.input_ids))
        if not text.strip():
            return Reply(key, None, made.finish_reason, usage, "the reply has no text", "empty")
        return Reply(key, replace_surrogates(text), made.finish_reason, usage)

    def _encode(self, request: ChatRequest) -> list[int]:
        from lightning_rlhf.data.tokens import encode_prompt

        messages: list[Message] = [dict(message) for message in request.messages]  # type: ignore[misc]
        if not request.extra.get("continue_final_message"):
            return encode_prompt(self.tokenizer, messages)
        return unfinished(self.tokenizer, messages)


def unfinished(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """The tokens of a conversation up to the end of its last turn's text, which the model shall continue.

    Args:
        tokenizer: The tokenizer, with a chat template.
        messages: The turns; the last may be anybody's, and empty.
    """
    *before, last = messages
    end = "\ue000end of text\ue000"
    turns: list[Any] = [*before, {**last, "content": last["content"] + end}]
    text = str(tokenizer.apply_chat_template(turns, tokenize=False)).partition(end)[0]
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _settings(request: ChatRequest) -> Any:
    return request.temperature, request.top_p, request.max_tokens, tuple(request.stop or ())
