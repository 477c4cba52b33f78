"""The engine that asks a vLLM server."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_rlhf.checks import Range, check_arguments
from lightning_rlhf.models.backbone import Backbone
from lightning_rlhf.rollout.sequence import ActiveSequence, make_sequences
from lightning_rlhf.rollout.types import Completion, Request, Sampling
from lightning_rlhf.rollout.vllm.client import Client, VLLMError
from lightning_rlhf.rollout.vllm.requests import LogProbs, check_sampling, completion_body, read_completion
from lightning_rlhf.rollout.vllm.weights import reason_against_adapter, remove_others, save_adapter, save_merged
from lightning_rlhf.utils.collectives import once_for_all, once_per_copy

log = logging.getLogger(__name__)

_COMPLETIONS, _LOAD, _UNLOAD = "/v1/completions", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
#: An answer of the server to a path that it does not have.
_NO_PATH = '"Not Found"'


class Served(NamedTuple):
    """Weights at the server.

    Attributes:
        name: What the server calls them.
        context: Maximum number of tokens of a sequence there. None: it did not say.
    """

    name: str
    context: int | None


class VLLMEngine:
    """Completions by a vLLM server that is running elsewhere, on GPUs of its own; see ``docs/vllm.md``.

    Before each iteration the stage calls :meth:`hand_over`, which writes the policy's weights to ``directory`` and has
    the server read them. Prompts and completions travel as token ids. It was run against a stand-in that speaks vLLM's
    API, never against vLLM itself.

    Args:
        base_url: URL of the server, such as ``http://127.0.0.1:8000``.
        model: Name of the model on the server (``--served-model-name``), which is the policy's ``pretrained``.
        directory: Folder for weights that the server can read too. It is this run's own: other weights there are
            removed.
        server_directory: Path of the same folder for the server, if it is another one. None: the same path.
        weights: ``adapter`` hands over the LoRA adapter, ``full`` all weights with adapters merged; ``auto`` takes the
            adapter if there is one.
        logprobs: With which ``--logprobs-mode`` the server was started: ``raw`` (its default) for a temperature of 0 or
            1, ``processed`` for any temperature without further settings.
        tolerance: Largest difference between the server's log-probs and the policy's, in nats per token, in the mean
            over the first completion after a hand-over, before the run ends. A larger value accepts servers that
            compute in a coarser precision. None: not checked.
        api_key_env: Name of the environment variable that holds the server's API key. None: no key is sent.
        concurrency: Number of requests at a time. A larger value is faster if the server can handle it.
        timeout: Number of seconds without data after which a request fails. A larger value waits longer for long
            completions.
        retries: Number of further attempts where the server says that it is busy or failed.
        backoff: Number of seconds before the first further attempt. The wait doubles with each attempt.

    Raises:
        ValueError: A setting is invalid; the message says which one.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        directory: str | os.PathLike[str],
        server_directory: str | None = None,
        weights: Literal["auto", "adapter", "full"] = "auto",
        logprobs: LogProbs = "raw",
        tolerance: float | None = 0.2,
        api_key_env: str | None = None,
        concurrency: int = 64,
        timeout: float = 600.0,
        retries: int = 3,
        backoff: float = 1.0,
    ) -> None:
        positive = Range(0, above=True)
        ranges = dict(tolerance=positive, concurrency=Range(1), timeout=positive, retries=Range(0), backoff=Range(0))
        check_arguments(VLLMEngine.__init__, locals(), "engine.", **ranges)
        if not model:
            raise ValueError(f"engine.model is empty. Set it to the name of the model that {base_url} serves.")
        self.client = Client(base_url, api_key_env, concurrency, timeout, retries, backoff)
        self.model, self.directory, self.server_directory = model, Path(directory).absolute(), server_directory
        self.weights, self.logprobs, self.tolerance = weights, logprobs, tolerance
        self._served: Served | None = None
        self._adapter: str | None = None  # what this process has loaded
        self._unchecked = False

    def check(self, sampling: Sampling) -> None:
        """Refuses settings that the server can't follow.

        Raises:
            ValueError: It is one; the message names it.
        """
        check_sampling(sampling, self.logprobs)

    # ------------------------------------------------------------------------------------------------- weights

    def hand_over(
        self,
        policy: Backbone,
        tokenizer: PreTrainedTokenizerBase,
        state_dict: Mapping[str, Tensor] | None = None,
        alone: bool = False,
    ) -> None:
        """Gives the server the policy's weights of now. The first rank does it, and the others wait.

        Args:
            policy: The policy. Its active adapter is handed over.
            tokenizer: The model's tokenizer.
            state_dict: Whole weights by the names of ``policy.model``, if its tensors are shards.
            alone: Only this process calls.

        Raises:
            ValueError: vLLM can't read such adapters.
            VLLMError: The server is not there, has another model, or can't take the weights.
        """
        if alone:
            self._served = self._give(policy, tokenizer, state_dict)
        else:
            self._served = once_for_all(lambda: self._give(policy, tokenizer, state_dict))
        self._unchecked = self.tolerance is not None

    def _give(
        self, policy: Backbone, tokenizer: PreTrainedTokenizerBase, state_dict: Mapping[str, Tensor] | None
    ) -> Served:
        there = self._models()
        if self.model not in there:
            raise VLLMError(
                f"The vLLM server at {self.client.base_url} has no model {self.model!r}, but "
                f"{', '.join(map(repr, there)) or 'none'}. Set engine.model, or start it with the policy's model."
            )
        context = there[self.model]
        has_adapter = hasattr(policy.model, "get_base_model")
        if self.weights == "adapter" or (self.weights == "auto" and has_adapter):
            reason = reason_against_adapter(policy.model) if has_adapter else "a model without adapters"
            if reason is not None:
                raise ValueError(f"VLLMEngine: vLLM can't load {reason} as an adapter. Set engine.weights to full.")
            return Served(self._give_adapter(policy, tokenizer, state_dict, there), context)
        folder = save_merged(policy.model, tokenizer, self.directory, state_dict)
        path = {"weights_path": self._there(folder)}
        self._order_full("/collective_rpc", {"method": "reload_weights", "kwargs": path})
        self._order_full("/reset_prefix_cache")
        remove_others(folder)
        return Served(self.model, context)

    def _models(self) -> dict[str, int | None]:
        """Returns the longest sequence of each model that the server has."""
        answer = self.client.get("/v1/models")
        try:
            return {entry["id"]: entry.get("max_model_len") for entry in answer["data"]}
        except (AttributeError, KeyError, TypeError):
            raise VLLMError(
                f"{self.client.base_url}/v1/models did not list models: is it a vLLM server? {str(answer)[:200]}"
            ) from None

    def _there(self, folder: Path) -> str:
        """Returns the path of a folder for the server."""
        return str(folder if self.server_directory is None else PurePosixPath(self.server_directory) / folder.name)

    def _give_adapter(
        self,
        policy: Backbone,
        tokenizer: PreTrainedTokenizerBase,
        state_dict: Mapping[str, Tensor] | None,
        there: Mapping[str, int | None],
    ) -> str:
        """Loads the adapter under a name of its own, since the server caches prompts by that name."""
        folder = save_adapter(policy.model, tokenizer, self.directory, state_dict)
        name, former = folder.name, self._adapter
        if former in there and former != name:
            try:
                self.client.order(_UNLOAD, {"lora_name": former})  # first: there may be room for one alone
            except VLLMError as error:
                if error.status is None:
                    raise
                log.warning("The adapter %s stays at the server: %s", former, error)
        if name not in there:
            try:
                self.client.order(_LOAD, {"lora_name": name, "lora_path": self._there(folder)})
            except VLLMError as error:
                raise self._explain_load(error, folder) if error.status else error from None
        self._adapter = name
        remove_others(folder)
        return name

    def _explain_load(self, error: VLLMError, folder: Path) -> VLLMError:
        if error.status in (404, 405) and (_NO_PATH in error.body or error.status == 405):
            do = "It was started without adapters: set VLLM_ALLOW_RUNTIME_LORA_UPDATING=True there, and --enable-lora."
        elif error.status == 404:
            do = (
                f"It can't read {self._there(folder)}: engine.directory must be a folder that it sees too "
                "(engine.server_directory says under which path)."
            )
        else:
            do = "It needs --enable-lora, and --max-lora-rank of at least lora.r."
        return VLLMError(f"The adapter was not loaded. {do} {error}", error.status, error.body)

    def _order_full(self, path: str, body: Mapping[str, object] | None = None) -> None:
        try:
            self.client.order(path, body)
        except VLLMError as error:
            if error.status is None:
                raise
            if error.status in (404, 405):
                do = "It was started without VLLM_SERVER_DEV_MODE=1."
            else:
                do = (
                    "It needs a vLLM of 2026, whose reload_weights takes weights_path, the policy's own architecture, "
                    "and engine.directory as a folder that it sees too (engine.server_directory)."
                )
            raise VLLMError(f"The weights were not taken over. {do} {error}", error.status, error.body) from None

    # ------------------------------------------------------------------------------------------------- completions

    def generate(
        self,
        policy: Backbone,
        tokenizer: PreTrainedTokenizerBase,
        requests: Sequence[Request],
        sampling: Sampling,
        stop_token_ids: Sequence[int],
    ) -> list[list[Completion]]:
        """Completes prompts with the weights that were handed over; see :meth:`RolloutEngine.generate`.

        Raises:
            VLLMError: No weights were handed over, the server fails, or its log-probs are not the policy's.
        """
        self.check(sampling)
        if self._served is None:
            raise VLLMError("VLLMEngine has handed no weights over yet: call engine.hand_over(policy, tokenizer).")
        served, groups = self._served, []
        for i, request in enumerate(requests):
            name = f"Rollout request {i}"
            groups.append(make_sequences(policy.transformer, tokenizer, request, sampling, stop_token_ids, name=name))
            self._check_request(request, groups[-1], served, name)
        if not any(groups):
            return [[] for _ in groups]
        found = once_per_copy(lambda: self._complete(groups, served))
        if self._unchecked:
            first = next(i for i, rows in enumerate(groups) if rows)
            self._compare(policy, groups[first][0], found[first][0])
            self._unchecked = False
        return found

    def _check_request(self, request: Request, rows: Sequence[ActiveSequence], served: Served, name: str) -> None:
        if request.adapter is not None:
            raise ValueError(f"{name} names the adapter {request.adapter!r}, but VLLMEngine has the active one alone.")
        longest = len(request.prompt) + max((row.sampling.max_new_tokens for row in rows), default=0)
        if served.context is not None and longest > served.context:
            raise ValueError(
                f"{name}: a prompt of {len(request.prompt)} tokens and its completion may have {longest}, and the vLLM "
                f"server was started for {served.context}. Start it with --max-model-len {longest}, or use shorter "
                "prompts or a smaller sampling.max_new_tokens."
            )

    def _complete(self, groups: Sequence[Sequence[ActiveSequence]], served: Served) -> list[list[Completion]]:
        rows = [row for group in groups for row in group]
        try:
            answers = self.client.post_all(_COMPLETIONS, [completion_body(served.name, row) for row in rows])
        except VLLMError as error:
            raise self._explain_refusal(error, served) if error.status else error from None
        for row, answer in zip(rows, answers, strict=True):
            read_completion(answer, row)
        return [[row.future.result() for row in group] for group in groups]

    def _explain_refusal(self, error: VLLMError, served: Served) -> VLLMError:
        if error.status == 404:
            do = (
                f"It no longer has {served.name!r}: it was restarted, or another run uses it. Resume from the last "
                "checkpoint, with a server of this run's own."
            )
        elif "context length" in error.body or "max_model_len" in error.body:
            do = "A prompt with its completion is longer than its --max-model-len."
        else:
            return error
        return VLLMError(f"{do} {error}", error.status, error.body)

    def _compare(self, policy: Backbone, row: ActiveSequence, completion: Completion) -> None:
        """Compares the server's log-probs of a completion with the policy's."""
        assert self.tolerance is not None
        model = policy.transformer
        embeddings: Any = model.get_input_embeddings()
        ids = torch.tensor([[*row.prompt, *completion.input_ids]], device=embeddings.weight.device)
        with policy.native_attention() as whole, torch.no_grad():
            logits = whole(input_ids=ids, use_cache=False).logits[0, len(row.prompt) - 1 : -1].float()
        logprobs = (logits / (row.sampling.temperature or 1.0)).log_softmax(-1)
        own = logprobs.gather(1, ids[0, len(row.prompt) :, None])[:, 0].cpu()
        difference = (own - torch.tensor(completion.logprobs)).abs().mean().item()
        if not difference <= self.tolerance:
            raise VLLMError(
                f"The vLLM server's log-probs differ from the policy's by {difference:.2g} nats per token in the mean "
                f"over a completion of {len(own)}, and engine.tolerance is {self.tolerance:g}: it serves another "
                "model, did not take the weights over, computes in another precision or quantization, or was started "
                f"with another --logprobs-mode than {self.logprobs}_logprobs (engine.logprobs)."
            )
