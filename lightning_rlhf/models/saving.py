"""Saves Hugging Face directories atomically, in a form that transformers 4.51 and 5 can load."""

from __future__ import annotations

import copy
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from lightning_rlhf.functional.precision import without_subclass
from lightning_rlhf.models.gptq import is_gptq_layer, silence
from lightning_rlhf.models.quantization import dequantized, is_quantized, is_quantized_layer
from lightning_rlhf.utils.filesystem import atomic_directory

log = logging.getLogger(__name__)

ADAPTED = "adapted_config.json"
"""Name of the file beside adapters with the changed values of their base model's config.

It is not ``config.json``, because transformers would then take the directory for a whole model.
"""


def save_pretrained(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    directory: str | os.PathLike[str],
    *,
    stop_token_ids: Sequence[int] = (),
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_only: bool = False,
    keep_quantized: bool = False,
    max_shard_size: str = "5GB",
) -> Path:
    """Writes weights, config, generation config and tokenizer for ``from_pretrained``.

    The model does not change: adapters are merged into a copy. The copy shares tensors with a model on the CPU, so only
    merged layers take extra memory; a model on another device is copied to the CPU. Weights that bitsandbytes holds in
    4 or 8 bits are dequantized to the model's data type, and adapters are merged into them.

    The directory gets its name when it is complete. Until then an older export of that name stays.

    Args:
        model: A transformers model, or a peft model around one, whose active adapters are merged.
        tokenizer: The tokenizer, which is saved with its chat template.
        directory: The directory to write.
        stop_token_ids: Tokens that end a generation, the most important first. Default: the tokenizer's eos token. The
            model's own stop tokens are appended.
        state_dict: Whole weights by the model's names, if the model's tensors are shards.
        adapter_only: Save only the active adapter, for ``PeftModel.from_pretrained`` with the original model. Changed
            values of the config, such as a reward model's ``score_offset``, are written to :data:`ADAPTED`.
        keep_quantized: Save a model without adapters as bitsandbytes holds it, in 4 or 8 bits.
        max_shard_size: Largest size of a weights file.

    Returns:
        The directory.

    Raises:
        FileExistsError: The path is a file, or a directory with other content.
        ValueError: Adapters cannot be merged, there is no single adapter that can be saved, or a weight is not finite;
            the message names it.
    """
    is_peft = hasattr(model, "get_base_model")  # peft leaves peft_config on the inner model too
    adapter = _adapter_alone(model) if adapter_only else None
    base: PreTrainedModel = model.get_base_model() if is_peft else model  # type: ignore[operator,assignment]
    if is_peft and not adapter_only and getattr(base, "is_quantized", False) and not is_quantized(base):
        raise ValueError(
            f"Merging adapters into weights quantized by {base.quantization_method} would round them. Export with "
            "adapter_only=True, and merge them into the model in full precision."
        )
    _check_finite(model, state_dict or {}, directory)
    with no_progress_bars(), atomic_directory(directory) as folder:
        given = stop_token_ids or [tokenizer.eos_token_id]
        every = [*given, tokenizer.eos_token_id, *own_stop_token_ids(base)]
        stops = list(dict.fromkeys(i for i in every if i is not None))
        if base.can_generate():
            generation = _save_generation_config(base, tokenizer, stops, folder)
        if adapter is not None:
            # no embeddings, even with rows for new tokens: the adapter contains the trained rows
            layers = (base.get_input_embeddings(), base.get_output_embeddings())
            options = {} if any(hasattr(layer, "lora_A") for layer in layers) else {"save_embedding_layers": False}
            model.save_pretrained(folder, state_dict=state_dict, selected_adapters=[adapter], **options)  # type: ignore[operator]
            if adapter != "default":  # peft writes other names to a subdirectory
                for file in (folder / adapter).iterdir():
                    file.rename(folder / file.name)
                (folder / adapter).rmdir()
            _rewrite(folder / "adapter_config.json", _portable_adapter_config)
            (folder / "README.md").unlink(missing_ok=True)  # peft's form of a model card, with nothing filled in
            _save_adapted(base, folder)
        else:
            if keep_quantized:
                whole = cast(PreTrainedModel, model)
            else:
                whole = merge_adapters(plain_twin(model, state_dict)) if is_peft else plain_twin(model, state_dict)
            if whole.can_generate():
                whole.generation_config = generation
            _set_stop_token_ids(whole.config, stops)
            whole.save_pretrained(folder, max_shard_size=max_shard_size)
            _rewrite(folder / "config.json", _portable_config)
        tokenizer.save_pretrained(folder)
        _rewrite(folder / "tokenizer_config.json", _portable_tokenizer_config)
    return Path(directory)


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Hides transformers' progress bars: within Lightning's rich bar they would recurse endlessly in Jupyter."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


# ------------------------------------------------------------------------------------------------- weights


def _check_finite(model: nn.Module, state_dict: Mapping[str, Tensor], directory: str | os.PathLike[str]) -> None:
    """Checks that weights and active adapters are finite. Buffers may be infinite bounds."""
    is_peft = hasattr(model, "get_base_model")
    idle = {*model.peft_config} - {*model.active_adapters} if is_peft else set()  # type: ignore[misc]
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and idle.isdisjoint(name.split(".")):
            value = without_subclass(state_dict.get(name, parameter).detach())
            if not value.isfinite().all():
                what = "NaN" if value.isnan().any() else "infinite values"
                raise ValueError(
                    f"{directory} was not written, because {name} has {what}: the run has diverged. Resume from an "
                    "earlier checkpoint with a lower learning rate. An earlier export does not change."
                )


def plain_twin(model: nn.Module, state_dict: Mapping[str, Tensor] | None = None) -> Any:
    """Copies the modules and configs of a model, with the same or the given weights on the CPU, dequantized.

    Args:
        model: The model, which may have adapters.
        state_dict: Weights by the model's names, if its own are shards.

    Raises:
        ValueError: GPTQ weights cannot be written as the model's family stores them, or no longer be read.
    """
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    if any(map(is_gptq_layer, model.modules())) and hasattr(sys.modules[type(base).__module__], "Conv1D"):
        raise ValueError(f"{type(base).__name__} stores its weights transposed, so its GPTQ weights cannot be merged.")
    # quantized layers are not trained, so the model's weights are right even if others are given
    memo: dict[int, Any] = {id(m): dequantized(m, base.dtype) for m in model.modules() if is_quantized_layer(m)}
    whole = not memo
    tensors = chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    for name, tensor in tensors:
        if isinstance(tensor, nn.Parameter) and not tensor.is_floating_point():
            continue  # belongs to a quantized layer
        value = tensor if state_dict is None else state_dict.get(name, tensor)  # it may lack buffers
        value = value.detach().cpu()
        memo[id(tensor)] = nn.Parameter(value, requires_grad=False) if isinstance(tensor, nn.Parameter) else value
    twin = copy.deepcopy(model, memo)
    return twin if whole else _without_quantization(twin)


def _without_quantization(model: Any) -> Any:
    """Removes marks of quantization from a model whose layers are plain, as if it were made from plain weights."""
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    for name in (
        "hf_quantizer",
        "quantization_method",
        "is_loaded_in_4bit",
        "is_loaded_in_8bit",
        "quantize_config",
        "hf_device_map",
    ):
        if name in vars(base):
            delattr(base, name)
    base.is_quantized = False
    for name in ("quantization_config", "_pre_quantization_dtype"):  # 4.51 leaves the latter, which cannot be saved
        if hasattr(base.config, name):
            delattr(base.config, name)
    if base is model:
        return model
    from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict

    active, configs = model.active_adapters, model.peft_config
    weights = {n: get_peft_model_state_dict(model, adapter_name=n, save_embedding_layers=False) for n in active}
    plain = model.unload()
    if hasattr(plain, "peft_config"):
        del plain.peft_config
    with torch.random.fork_rng(devices=()), quiet_peft():
        again: Any = PeftModel(plain, configs[active[0]], active[0])
        for name in active[1:]:
            again.add_adapter(name, configs[name])
    for name in active:
        set_peft_model_state_dict(again, weights[name], adapter_name=name)
    again.base_model.set_adapter(active)
    return again


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Within it, peft wraps a model without messages that do not concern the user."""
    silence()
    with warnings.catch_warnings():
        # about tied weights, which merge_adapters separates
        warnings.filterwarnings("ignore", r"Model (has|with) `tie_word_embeddings", UserWarning)
        warnings.filterwarnings(
            "ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning
        )  # peft asks for it
        yield


def merge_adapters(model: Any) -> PreTrainedModel:
    """Merges the active adapters and returns the plain model.

    Args:
        model: A peft model. It cannot be used afterwards, but its tensors do not change.
    """
    seen: set[int] = set()
    for module in model.modules():  # an update of the head must not change embeddings tied to it, nor the reverse
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) in seen:
                parameter = nn.Parameter(parameter.data, requires_grad=False)
                setattr(module, name, parameter)
            seen.add(id(parameter))
    configs = {id(c): c for c in (model.config, model.config.get_text_config())}.values()
    tied = [c.tie_word_embeddings for c in configs]
    for config in configs:  # otherwise peft would notice the separated weights and warn
        config.tie_word_embeddings = False
    plain: PreTrainedModel = model.merge_and_unload(safe_merge=True)  # into new tensors, and with a check for NaN
    if hasattr(plain, "peft_config"):
        del plain.peft_config
    embeddings: Any = plain.get_input_embeddings()
    head: Any = plain.get_output_embeddings()
    if head is None or torch.equal(embeddings.weight, head.weight):
        for config, value in zip(configs, tied, strict=True):
            config.tie_word_embeddings = value
        if head is not None and any(tied):
            head.weight = embeddings.weight
    return plain


def _adapter_alone(model: nn.Module) -> str:
    """Returns the name of the active adapter, which must be usable with the original model."""
    if not hasattr(model, "get_base_model"):
        raise ValueError("adapter_only=True needs a model with adapters. Set the module's lora, or export it whole.")
    active = cast(list[str], model.active_adapters)
    if len(active) != 1:
        raise ValueError(
            f"adapter_only=True saves one adapter, but the active ones are {', '.join(map(repr, active)) or 'none'}. "
            "Activate one, or export merged weights (adapter_only=False)."
        )
    configs: Any = model.peft_config
    init = getattr(configs[active[0]], "init_lora_weights", True)
    if isinstance(init, str) and init.split("_")[0].lower() in ("pissa", "olora", "corda"):
        raise ValueError(
            f"Adapter {active[0]!r} was initialized by {init}, which changes the base model, so it would be wrong with "
            "the original model. Export merged weights (adapter_only=False)."
        )
    return active[0]


# ------------------------------------------------------------------------------------------------- configs


def own_stop_token_ids(model: PreTrainedModel) -> tuple[int, ...]:
    """Returns the tokens that end a generation: those of the model's generation config, then those of its config."""
    return stops_of(getattr(model, "generation_config", None), model.config)  # a classifier has no generation config


def stops_of(*configs: Any) -> tuple[int, ...]:
    """Returns the stop tokens of several configs. A config may be None, or have no, one or several stop tokens."""
    found: list[int | None] = []
    for part in chain.from_iterable((c, c.get_text_config() if hasattr(c, "get_text_config") else c) for c in configs):
        ids = getattr(part, "eos_token_id", None)
        found += ids if isinstance(ids, (list, tuple)) else [ids]
    return tuple(dict.fromkeys(i for i in found if i is not None and i >= 0))


def _set_stop_token_ids(config: Any, stops: list[int]) -> None:
    """Writes stop tokens to a config; only the first if the model family does not accept a list."""
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        try:
            part.eos_token_id = _one_or_list(stops)
        except Exception:  # transformers 5 checks types and raises an error of newer huggingface_hub versions
            part.eos_token_id = stops[0]


def _one_or_list(stops: list[int]) -> int | list[int] | None:
    return stops if len(stops) > 1 else next(iter(stops), None)


def _save_generation_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stops: list[int], folder: Path
) -> GenerationConfig:
    """Writes the model's generation config with this tokenizer's tokens.

    Published models have combinations that transformers refuses to save, such as a temperature without ``do_sample``.
    These are saved with ``do_sample``.
    """
    tokens = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": _one_or_list(stops),
        "pad_token_id": next(iter(stops), None) if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    }
    config = copy.deepcopy(model.generation_config or GenerationConfig())
    for name, value in tokens.items():  # without update(), which would validate
        setattr(config, name, value)
    if config.temperature == 0:  # greedy by another name
        config.temperature = GenerationConfig().temperature
    sampling = copy.deepcopy(config)
    sampling.do_sample = True
    for candidate in (config, sampling):
        try:
            candidate.save_pretrained(folder)
        except ValueError as error:
            reason = str(error).strip().splitlines()[-1]
        else:
            return candidate
    log.warning("The model's generation config is invalid (%s). Only its special tokens are saved.", reason)
    plain = GenerationConfig(**tokens)
    plain.save_pretrained(folder)
    return plain


def _save_adapted(base: PreTrainedModel, folder: Path) -> None:
    settings = {
        "vocab_size": base.config.get_text_config().vocab_size,
        "pad_token_id": getattr(base.config, "pad_token_id", None),
    }
    if hasattr(base.config, "score_offset"):
        settings["score_offset"] = base.config.score_offset
    (folder / ADAPTED).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _rewrite(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    change(content)
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _portable_config(config: dict[str, Any]) -> None:
    """Adds old names of rotary settings, because 4.51 does not read ``rope_parameters`` and would use a default."""
    for key in ("_attn_implementation", "_attn_implementation_autoset", "attn_implementation"):
        config.pop(key, None)
    if isinstance(config.get("text_config"), dict):
        _portable_config(config["text_config"])
    rope = config.get("rope_parameters") or {}
    if "sliding_attention" in rope:  # one set per layer type
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope.get("full_attention") or {}
    if "rope_theta" in rope:
        config["rope_theta"] = rope["rope_theta"]
    if "partial_rotary_factor" in rope:
        config["partial_rotary_factor"] = rope["partial_rotary_factor"]
    if rope.get("rope_type", "default") != "default":
        config["rope_scaling"] = {k: v for k, v in rope.items() if k not in ("rope_theta", "partial_rotary_factor")}


def _portable_adapter_config(config: dict[str, Any]) -> None:
    """A base in a directory is named from the root: adapters are loaded from other places than they were trained in."""
    if os.path.isdir(base := config.get("base_model_name_or_path") or ""):
        config["base_model_name_or_path"] = os.path.abspath(base)


def _portable_tokenizer_config(config: dict[str, Any]) -> None:
    """Replaces the class name and the list of special tokens of transformers 5, which 4.51 cannot read."""
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
