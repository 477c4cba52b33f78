"""Hugging Face models in: weights, dtype, adapters, tokenizer."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file, find_adapter_config_file, has_file

from lightning_rlhf.data.planner import generator
from lightning_rlhf.models.backbone import enable_checkpointing
from lightning_rlhf.models.quantization import DTYPE, Quantization, quantised, quantization_arguments
from lightning_rlhf.models.saving import ADAPTED, merge_adapters

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass
class LoRA:
    """Low-rank adapters (Hu et al. 2021), by peft.

    Attributes:
        r: Rank.
        alpha: Scale of the update: ``alpha / r`` (``alpha / sqrt(r)`` with ``rslora``).
        dropout: On the adapters' input.
        targets: Names of the layers to adapt, or ``all-linear``.
        modules_to_save: Modules trained in full beside the adapters, such as ``lm_head``.
        rslora: Rank-stabilised scale (Kalajdzievski 2023).
        dora: Decompose into magnitude and direction (Liu et al. 2024).
        init: peft's ``init_lora_weights``: True is the paper's, or ``gaussian``, ``pissa``, ``olora``.
    """

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: list[str] | Literal["all-linear"] = "all-linear"
    modules_to_save: list[str] = field(default_factory=list)
    rslora: bool = False
    dora: bool = False
    init: bool | Literal["gaussian", "pissa", "olora"] = True

    def wrap(self, model: PreTrainedModel) -> nn.Module:
        """The model with trainable adapters; everything else is frozen.

        Raises:
            ValueError: A target that names no layer of the model.
        """
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            # of a classifier peft trains the head in full, and saves it with the adapters
            task_type="SEQ_CLS" if type(model).__name__.endswith("ForSequenceClassification") else "CAUSAL_LM",
            r=self.r,
            lora_alpha=self.alpha,  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            target_modules=self.targets,
            modules_to_save=self.modules_to_save or None,
            use_rslora=self.rslora,
            use_dora=self.dora,
            init_lora_weights=self.init,
            bias="none",
        )
        return get_peft_model(model, config)


# A checkpoint names the adapters it was made with; torch.load reads it without trusting arbitrary classes.
torch.serialization.add_safe_globals([LoRA])


def load_tokenizer(name_or_path: str | os.PathLike[str], trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face directory or hub id, with a pad token.

    The pad token only fills rectangles: masks come from lengths, so eos may serve.

    Raises:
        OSError: Nothing is there.
    """
    with _naming(name_or_path):
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"The tokenizer of {name_or_path} has no eos token: nothing could end an answer.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def read_config(name_or_path: str | os.PathLike[str], trust_remote_code: bool = False) -> Any:
    """The config of a whole model's Hugging Face directory or hub id.

    Raises:
        OSError: Nothing is there.
    """
    with _naming(name_or_path):
        return AutoConfig.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)


def load_config(name_or_path: str | os.PathLike[str], trust_remote_code: bool = False) -> Any:
    """The config of a Hugging Face directory or hub id; of adapters, that of the model they change.

    Raises:
        OSError: Nothing is there, or adapters without the model that they change.
    """
    adapters = _adapters(name_or_path)
    if adapters is None:
        return read_config(name_or_path, trust_remote_code)
    base, settings = adapters
    config = load_config(base, trust_remote_code)
    for name, value in settings.items():
        setattr(config.get_text_config() if name == "vocab_size" else config, name, value)
    return config


def load_causal_lm(
    pretrained: str | os.PathLike[str] | PreTrainedModel,
    *,
    dtype: Dtype = "float32",
    lora: LoRA | None = None,
    quantization: Quantization | None = None,
    gradient_checkpointing: bool = False,
    vocab_size: int | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """A causal LM ready to train.

    Args:
        pretrained: A Hugging Face directory, a hub id, or a model. Adapters found there are merged into their base.
        dtype: Of the weights. fp32 with the Trainer's ``bf16-mixed`` is the safe choice for full fine-tuning.
        lora: Adapters; None trains everything.
        quantization: Hold the linear layers in 4 (``nf4``) or 8 (``int8``) bits, but for the head and adapters. What is
            quantised can't be trained.
        gradient_checkpointing: Recompute activations in the backward pass.
        vocab_size: Tokens the tokenizer knows; embeddings grow to it where they are fewer.
        trust_remote_code: Run model code that comes with the checkpoint.

    Returns:
        The model, or a peft model around it, in training mode.

    Raises:
        ModuleNotFoundError: ``quantization`` without bitsandbytes.
        OSError: Nothing is there.
        ValueError: A dtype that the hardware can't train in.
    """
    if isinstance(pretrained, PreTrainedModel):
        model = pretrained
    else:
        model, _ = _load(AutoModelForCausalLM, pretrained, _arguments(dtype, trust_remote_code), quantization)
    return _prepared(quantised(model, quantization), lora, gradient_checkpointing, vocab_size)


def load_reward_model(
    pretrained: str | os.PathLike[str] | PreTrainedModel,
    *,
    dtype: Dtype = "float32",
    lora: LoRA | None = None,
    quantization: Quantization | None = None,
    gradient_checkpointing: bool = False,
    vocab_size: int | None = None,
    pad_token_id: int | None = None,
    seed: int = 0,
    needs_head: bool = False,
    trust_remote_code: bool = False,
) -> nn.Module:
    """A transformers classifier with one label.

    From a causal LM the head is new: no bias, normal with standard deviation ``1 / sqrt(D + 1)`` (Stiennon et al.
    2020). From a classifier it is the classifier's own.

    Args:
        pretrained: A directory or hub id of a causal LM or of a one-label classifier, or such a classifier. Adapters
            found there are merged into their base, and the ``score_offset`` saved with them comes back.
        dtype: Of the weights; the head is fp32.
        lora: Adapters; the head is trained beside them.
        quantization: See :func:`load_causal_lm`; the head stays whole.
        gradient_checkpointing: Recompute activations in the backward pass.
        vocab_size: Tokens the tokenizer knows; embeddings grow to it where they are fewer.
        pad_token_id: What plain transformers skips at the end of a row: never a token that ends answers.
        seed: Of a new head.
        needs_head: Refuse what has no trained head, for who wants to score and not to train.
        trust_remote_code: Run model code that comes with the checkpoint.

    Returns:
        The model, or a peft model around it, in training mode.

    Raises:
        ModuleNotFoundError: ``quantization`` without bitsandbytes.
        OSError: Nothing is there, or adapters without the model that they change.
        ValueError: A classifier with several labels, no head where one is needed, or a dtype that the hardware can't
            train in.
    """
    if isinstance(pretrained, PreTrainedModel):
        if not type(pretrained).__name__.endswith("ForSequenceClassification"):
            raise ValueError(
                f"{type(pretrained).__name__} is no classifier: give the directory or hub id of the model."
            )
        _check_labels(pretrained.config, type(pretrained).__name__)
        model = pretrained
    else:
        with torch.random.fork_rng(devices=()):  # transformers draws a head of its own first
            arguments = _arguments(dtype, trust_remote_code)
            model, missing = _load(AutoModelForSequenceClassification, pretrained, arguments, quantization)
        if needs_head and missing:
            raise ValueError(
                f"{pretrained} is no reward model: it has no weights for {', '.join(sorted(missing))}. Give the "
                "directory that training a reward model left (hf/best or hf/last)."
            )
        if "score.weight" in missing:
            weight = model.score.weight
            drawn = torch.empty(weight.shape).normal_(0, (weight.shape[1] + 1) ** -0.5, generator=generator(seed))
            weight.data.copy_(drawn)
    model = quantised(model, quantization)
    if pad_token_id is not None:
        model.config.pad_token_id = model.config.get_text_config().pad_token_id = pad_token_id
    if isinstance(score := getattr(model, "score", None), nn.Module):
        score.float()
    return _prepared(model, lora, gradient_checkpointing, vocab_size)


def _load(
    auto: Any, pretrained: str | os.PathLike[str], arguments: dict[str, Any], quantization: Quantization | None = None
) -> tuple[Any, set[str]]:
    """The model in one piece, adapters merged, and the names of weights that were nowhere to be found.

    It is quantised, but where there were adapters: merged into quantised weights they would be rounded.
    """
    adapters = _adapters(pretrained)
    if adapters is not None:
        base, settings = adapters
        try:
            model, missing = _load(auto, base, arguments)
        except OSError as error:
            raise OSError(
                f"{pretrained} holds adapters of {base!r}, which can't be loaded: {error} Put it there, or correct "
                "base_model_name_or_path in adapter_config.json."
            ) from error
        return _adapt(model, os.fspath(pretrained), settings, missing)
    config = read_config(pretrained, arguments["trust_remote_code"])
    if auto is AutoModelForSequenceClassification:
        if not any(name.endswith("ForSequenceClassification") for name in config.architectures or []):
            config.num_labels = 1  # a language model's config says 2, and means nothing by it
        _check_labels(config, pretrained)
    if quantization is not None:
        arguments = {**arguments, **quantization_arguments(quantization, arguments[DTYPE])}
    model, found = auto.from_pretrained(pretrained, config=config, output_loading_info=True, **arguments)
    return model, set(found["missing_keys"])


@contextmanager
def _naming(source: str | os.PathLike[str]) -> Iterator[None]:
    """Says what could not be loaded: transformers' own message may be about the network, or kinds of tokenizers."""
    place = Path(source)
    if place.is_dir() and not any(place.glob("*config.json")):
        inside = sorted({str(p.parent) for depth in ("*", "*/*") for p in place.glob(f"{depth}/*config.json")})
        hint = f"; perhaps {' or '.join(inside)} is meant" if inside else ""
        raise OSError(f"{source} holds no model: there is no config.json in it{hint}.")
    try:
        yield
    except OSError as error:
        where = f"{source}" if place.is_dir() else f"{source} is no directory here ({Path.cwd()}); as a hub id"
        raise OSError(f"{where}: {error}") from error


def _adapters(pretrained: str | os.PathLike[str]) -> tuple[str, dict[str, Any]] | None:
    """Of adapters, the model that they change and what our export wrote beside them; None of a whole model."""
    name = os.fspath(pretrained)
    try:
        found = find_adapter_config_file(name)
        if found is None or has_file(name, "config.json"):
            return None
    except ValueError:  # neither a directory nor a hub id: what loads it says so
        return None
    base = json.loads(Path(found).read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise OSError(
            f"The adapter_config.json of {name} doesn't say which model the adapters change. Write its directory or "
            "hub id as base_model_name_or_path."
        )
    if not has_file(name, ADAPTED):  # adapters from elsewhere
        return base, {}
    return base, json.loads(Path(str(cached_file(name, ADAPTED))).read_text(encoding="utf-8"))


def _adapt(model: Any, name: str, settings: dict[str, Any], missing: set[str]) -> tuple[Any, set[str]]:
    """Merges adapters into their base."""
    from peft import PeftConfig, PeftModel

    with torch.random.fork_rng(devices=()):
        if settings.get("vocab_size", 0) > model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(settings["vocab_size"])
        config = PeftConfig.from_pretrained(name)
        config.task_type = None  # the plain wrapper: a language model's adapters fit under a score head too
        model = merge_adapters(PeftModel.from_pretrained(model, name, config=config))
    model.requires_grad_(True)
    model.name_or_path = name  # what further adapters are adapters of
    for key in settings.keys() - {"vocab_size"}:
        setattr(model.config, key, settings[key])
    whole = set(config.modules_to_save or ())
    return model, {key for key in missing if whole.isdisjoint(key.split("."))}


def _check_labels(config: Any, name: object) -> None:
    if config.num_labels != 1:
        raise ValueError(f"{name} is a classifier of {config.num_labels} labels; a reward model has one.")


def _arguments(dtype: Dtype, trust_remote_code: bool) -> dict[str, Any]:
    """Of ``from_pretrained``."""
    if dtype == "float16" and not torch.cuda.is_available():
        raise ValueError("dtype: float16 needs a GPU; use float32 (or bfloat16) on a CPU.")
    return {DTYPE: getattr(torch, dtype), "trust_remote_code": trust_remote_code}


def _prepared(
    model: PreTrainedModel, lora: LoRA | None, gradient_checkpointing: bool, vocab_size: int | None
) -> nn.Module:
    """In training mode, with embeddings for every token and adapters."""
    embeddings: Any = model.get_input_embeddings()
    if vocab_size is not None and vocab_size > embeddings.weight.shape[0]:
        model.resize_token_embeddings(vocab_size)
    if gradient_checkpointing:
        enable_checkpointing(model)
    model.train()
    return model if lora is None else lora.wrap(model)
