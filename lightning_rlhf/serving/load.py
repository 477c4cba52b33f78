"""Loads models, each with a worker; adapters of one base share its weights and its worker."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from lightning_rlhf.data.templates import answer_lead, set_chat_template, stop_token_ids
from lightning_rlhf.models import Policy, load_causal_lm, load_tokenizer
from lightning_rlhf.models.adapters import load_adapters, reason_against_sharing
from lightning_rlhf.models.loading import Dtype, load_stop_token_ids
from lightning_rlhf.rollout import CachedEngine
from lightning_rlhf.rollout.engine import reason_against
from lightning_rlhf.rollout.kv_cache import BASE
from lightning_rlhf.serving.models import Served
from lightning_rlhf.serving.one_at_a_time import one_at_a_time
from lightning_rlhf.serving.runs import Backbone
from lightning_rlhf.serving.worker import Worker

log = logging.getLogger(__name__)
_CHUNK = {"cpu": 48}
"""Tokens of a prompt that run in one step: more would hold up running streams, fewer would run long prompts slowly."""
_LARGE_CHUNK = 512
"""The same on other devices, where a step of one token takes hardly less time than one of many."""
_PREFIXES = 8
"""Finished answers whose keys are kept for the next turns of their chats."""


@dataclass(frozen=True)
class ModelOptions:
    """How models are loaded and run.

    Attributes:
        dtype: Data type of the weights.
        device: Device of the weights.
        chat_template: Preset or Jinja file that replaces the models' chat templates.
        max_rows: Answers of a model that are generated together.
        max_live_tokens: See :class:`~lightning_rlhf.rollout.CachedEngine`.
        trust_remote_code: Run code that comes with the models.
    """

    dtype: Dtype = "float32"
    device: str = "cpu"
    chat_template: str | None = None
    max_rows: int | None = 64
    max_live_tokens: int | None = None
    trust_remote_code: bool = False


def load_served(name: str, source: str, options: ModelOptions) -> Served:
    """Loads a model with its worker, which is not started yet.

    Args:
        name: The model's name in requests.
        source: Directory or hub id of a causal LM or of adapters, which are merged.
        options: How it is loaded.

    Raises:
        OSError: The model does not exist or cannot be read.
        ValueError: The chat template does not fit the model.
    """
    tokenizer, stops = _tokenizer(source, source, options)
    model = load_causal_lm(
        source,
        dtype=options.dtype,
        inference=True,
        vocab_size=len(tokenizer),
        trust_remote_code=options.trust_remote_code,
    )
    policy = Policy(model.requires_grad_(False).to(options.device), layout="padded")
    if reason := reason_against(policy):
        log.warning("%s is served one request at a time: %s.", name, reason)
        worker = Worker(lambda: one_at_a_time(policy, tokenizer), name)
    else:
        worker = _worker(name, policy, tokenizer, options)
    engine = "HFGenerateEngine" if reason else "CachedEngine"
    return Served(name, policy, tokenizer, stops, worker, engine, _lead(tokenizer), None if reason else _chunk(options))


def load_shared(base: str, adapters: Mapping[str, str], base_name: str | None, options: ModelOptions) -> list[Served]:
    """Loads a base model and its adapters as models that share the base's weights: one batch has rows of all of them.

    If they cannot share them, each is loaded with its adapters merged, and a warning tells why.

    Args:
        base: Directory or hub id of the base model.
        adapters: Directories or hub ids of adapters, by the names of the models.
        base_name: The base model's own name. None: it is not served.
        options: How they are loaded.

    Raises:
        OSError: A model does not exist or cannot be read.
        ValueError: The chat template does not fit a model, or adapters do not fit the base.
    """
    sources = {**adapters, **({} if base_name is None else {base_name: base})}
    found = {name: _tokenizer(source, base, options) for name, source in sources.items()}
    largest = max((tokenizer for tokenizer, _ in found.values()), key=len)
    inner = {name: f"adapter{i}" for i, name in enumerate(adapters)}  # peft allows no dots
    reason = next((f"{name} has other tokens" for name, (tokenizer, _) in found.items()
                   if not tokenizer.get_vocab().items() <= largest.get_vocab().items()), None)  # fmt: skip
    if reason is None:
        model = load_adapters(
            base,
            {inner[name]: source for name, source in adapters.items()},
            dtype=options.dtype,
            vocab_size=len(largest),
            trust_remote_code=options.trust_remote_code,
        )
        policy = Policy(model.requires_grad_(False).to(options.device), layout="padded")
        reason = reason_against_sharing(policy) or reason_against(policy)
    if reason is not None:
        log.warning("%s do not share weights: %s. Each takes memory of its own.", ", ".join(sources), reason)
        return [load_served(name, source, options) for name, source in sources.items()]
    worker = _worker("+".join(sources), policy, largest, options)
    return [
        Served(
            name,
            policy,
            tokenizer,
            stops,
            worker,
            "CachedEngine",
            _lead(tokenizer),
            _chunk(options),
            inner.get(name, BASE),
        )
        for name, (tokenizer, stops) in found.items()
    ]


def load_all(backbones: Sequence[Backbone], options: ModelOptions) -> dict[str, Served]:
    """Loads the models of some runs, by name.

    Args:
        backbones: What :func:`~lightning_rlhf.serving.runs.find_models` has found.
        options: How they are loaded.
    """
    models = []
    for backbone in backbones:
        for name, source in [*backbone.adapters.items(), (backbone.name, backbone.source)]:
            if name is not None:
                log.info("Loading %s from %s", name, source)
        if backbone.adapters:
            models += load_shared(backbone.source, backbone.adapters, backbone.name, options)
        elif backbone.name is not None:
            models.append(load_served(backbone.name, backbone.source, options))
    return {served.name: served for served in models}


def _worker(name: str, policy: Policy, tokenizer: PreTrainedTokenizerBase, options: ModelOptions) -> Worker:
    engine = CachedEngine(
        options.max_live_tokens, options.max_rows, prefill_chunk=_chunk(options), keep_prefixes=_PREFIXES, reserve=False
    )
    return Worker(lambda: engine.session(policy, tokenizer), name)


def _chunk(options: ModelOptions) -> int:
    return _CHUNK.get(torch.device(options.device).type, _LARGE_CHUNK)


def _tokenizer(source: str, base: str, options: ModelOptions) -> tuple[PreTrainedTokenizerBase, tuple[int, ...]]:
    """Returns a model's tokenizer, which adapters from elsewhere take from their base, and the tokens that stop it."""
    try:
        tokenizer = load_tokenizer(source, options.trust_remote_code)
    except OSError:
        if source == base:
            raise
        tokenizer = load_tokenizer(base, options.trust_remote_code)
    own = tokenizer.eos_token_id  # a template may replace it
    template = options.chat_template
    if template is not None and set_chat_template(tokenizer, template):
        raise ValueError(f"{source} does not know the tokens of the chat template {template!r}.")
    return tokenizer, stop_token_ids(tokenizer, [own, *load_stop_token_ids(source, options.trust_remote_code)])


def _lead(tokenizer: PreTrainedTokenizerBase) -> str:
    return answer_lead(tokenizer) if tokenizer.chat_template else ""
