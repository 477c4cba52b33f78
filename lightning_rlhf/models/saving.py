"""Hugging Face models out: directories that plain transformers 4.51 and 5 load, complete or not there at all."""

from __future__ import annotations

import copy
import json
import logging
import os
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
from lightning_rlhf.models.quantization import dequantized, is_quantized, is_quantized_layer
from lightning_rlhf.utils.filesystem import atomic_directory

log = logging.getLogger(__name__)

ADAPTED = "adapted_config.json"
"""Name of the file beside adapters that says what in their base's config is another value now.

Not ``config.json``: transformers would take the directory for a whole model.
"""


def save_pretrained(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    directory: str | os.PathLike[str],
    *,
    stop_token_ids: Sequence[int] = (),
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_only: bool = False,
    max_shard_size: str = "5GB",
) -> Path:
    """Writes weights, config, generation config and tokenizer for ``from_pretrained``.

    The model is left as it is, to the bit: adapters are merged into a copy. The copy shares its tensors with the
    model where those lie on the CPU, so that extra memory is needed for the merged layers alone; a model on another
    device is copied to the CPU as a whole. Weights that bitsandbytes holds in 4 or 8 bits are written as what they
    stand for, in the model's dtype, with the adapters merged into that.

    The directory appears when it is complete. One that was written here before is replaced, and stays whole until
    then.

    Args:
        model: A transformers model, or a peft model around one, whose active adapters are merged.
        tokenizer: Saved with its chat template.
        directory: Where to.
        stop_token_ids: What ends a generation, the first of them first; none: the tokenizer's eos token. Those that the
            model has of its own come behind.
        state_dict: Full weights by the model's own names, where the model's tensors are shards.
        adapter_only: Save the active adapter alone, for ``PeftModel.from_pretrained`` over the original model; what
            changed in the config, such as a reward model's ``score_offset``, is written to :data:`ADAPTED`.
        max_shard_size: Of a weight file.

    Returns:
        The directory.

    Raises:
        FileExistsError: There is a file, or a directory that holds something else.
        ValueError: Nothing to save alone, or adapters that can't be merged or can't be saved alone; or values that are
            not finite, which the message names.
    """
    is_peft = hasattr(model, "get_base_model")  # peft leaves peft_config on the inner model too
    adapter = _adapter_alone(model) if adapter_only else None
    base: PreTrainedModel = model.get_base_model() if is_peft else model  # type: ignore[operator,assignment]
    if is_peft and not adapter_only and getattr(base, "is_quantized", False) and not is_quantized(base):
        raise ValueError(
            f"Adapters can't be merged into weights quantized by {base.quantization_method} without rounding them: "
            "export with adapter_only=True, and merge them into the model in full precision."
        )
    _check_finite(model, state_dict or {}, directory)
    with no_progress_bars(), atomic_directory(directory) as folder:
        given = stop_token_ids or [tokenizer.eos_token_id]
        every = [*given, tokenizer.eos_token_id, *own_stop_token_ids(base)]
        stops = list(dict.fromkeys(i for i in every if i is not None))
        if base.can_generate():
            generation = _save_generation_config(base, tokenizer, stops, folder)
        if adapter is not None:
            # not the embeddings where they have rows for new tokens: what is trained of them is the adapter's already
            layers = (base.get_input_embeddings(), base.get_output_embeddings())
            options = {} if any(hasattr(layer, "lora_A") for layer in layers) else {"save_embedding_layers": False}
            model.save_pretrained(folder, state_dict=state_dict, selected_adapters=[adapter], **options)  # type: ignore[operator]
            if adapter != "default":  # peft gives others a directory of their own
                for file in (folder / adapter).iterdir():
                    file.rename(folder / file.name)
                (folder / adapter).rmdir()
            _rewrite(folder / "adapter_config.json", _portable_adapter_config)
            (folder / "README.md").unlink(missing_ok=True)  # peft's form of a model card, with nothing filled in
            _save_adapted(base, folder)
        else:
            whole = merge_adapters(_twin(model, state_dict)) if is_peft else _twin(model, state_dict)
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
    """Inside rich's bar, which Lightning shows, those of transformers recurse without end in Jupyter."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


# ------------------------------------------------------------------------------------------------- weights


def _check_finite(model: nn.Module, state_dict: Mapping[str, Tensor], directory: str | os.PathLike[str]) -> None:
    """Refuses weights that a diverged run left; of adapters the active ones count. Buffers may be infinite bounds."""
    is_peft = hasattr(model, "get_base_model")
    idle = {*model.peft_config} - {*model.active_adapters} if is_peft else set()  # type: ignore[misc]
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and idle.isdisjoint(name.split(".")):
            value = without_subclass(state_dict.get(name, parameter).detach())
            if not value.isfinite().all():
                what = "NaN" if value.isnan().any() else "infinite values"
                raise ValueError(
                    f"{directory} was not written: {name} holds {what}. The run diverged: go back to a checkpoint "
                    "before it, with a lower learning rate. What was exported before is left as it was."
                )


def _twin(model: nn.Module, state_dict: Mapping[str, Tensor] | None) -> Any:
    """The model's modules and configs once more, over the same weights, or those given, on the CPU; none quantized."""
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    # layers that no training changes, so that those given are the model's own
    memo: dict[int, Any] = {id(m): dequantized(m, base.dtype) for m in model.modules() if is_quantized_layer(m)}
    whole = not memo
    tensors = chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    for name, tensor in tensors:
        if isinstance(tensor, nn.Parameter) and not tensor.is_floating_point():
            continue  # a quantized layer's
        value = tensor if state_dict is None else state_dict.get(name, tensor)  # buffers need not be in it
        value = value.detach().cpu()
        memo[id(tensor)] = nn.Parameter(value, requires_grad=False) if isinstance(tensor, nn.Parameter) else value
    twin = copy.deepcopy(model, memo)
    return twin if whole else _without_quantization(twin)


def _without_quantization(model: Any) -> Any:
    """A model whose layers are plain already, as transformers and peft would have made it from plain weights."""
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    for name in ("hf_quantizer", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        if name in vars(base):
            delattr(base, name)
    base.is_quantized = False
    for name in ("quantization_config", "_pre_quantization_dtype"):  # the latter is left by 4.51, and can't be saved
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
    """Within it peft wraps a model without warnings of what is its own affair, or taken care of here."""
    with warnings.catch_warnings():
        # of tied weights that part: merge_adapters parts them
        warnings.filterwarnings("ignore", r"Model (has|with) `tie_word_embeddings", UserWarning)
        warnings.filterwarnings(
            "ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning
        )  # peft asks for it
        yield


def merge_adapters(model: Any) -> PreTrainedModel:
    """The plain model with the active adapters merged into it.

    Args:
        model: A peft model, whose modules are used up; its tensors stay as they are.
    """
    seen: set[int] = set()
    for module in model.modules():  # a delta on the head must not reach the embeddings tied to it, nor the reverse
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) in seen:
                parameter = nn.Parameter(parameter.data, requires_grad=False)
                setattr(module, name, parameter)
            seen.add(id(parameter))
    configs = {id(c): c for c in (model.config, model.config.get_text_config())}.values()
    tied = [c.tie_word_embeddings for c in configs]
    for config in configs:  # else peft reads off the parted weights that they are tied no more, and warns
        config.tie_word_embeddings = False
    plain: PreTrainedModel = model.merge_and_unload(safe_merge=True)  # safe: into new tensors, and refuses NaN
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
    """Name of the active adapter, which must be right over the original model."""
    if not hasattr(model, "get_base_model"):
        raise ValueError("adapter_only=True needs a model with adapters: give the module lora=..., or export it whole.")
    active = cast(list[str], model.active_adapters)
    if len(active) != 1:
        raise ValueError(
            f"adapter_only=True saves one adapter, and {', '.join(map(repr, active)) or 'none'} are active: activate "
            "one, or export merged (adapter_only=False)."
        )
    configs: Any = model.peft_config
    init = getattr(configs[active[0]], "init_lora_weights", True)
    if isinstance(init, str) and init.split("_")[0].lower() in ("pissa", "olora", "corda"):
        raise ValueError(
            f"Adapter {active[0]!r} was initialized by {init}, which takes its first weights out of the base model: "
            "over the original model it would be wrong. Export merged (adapter_only=False)."
        )
    return active[0]


# ------------------------------------------------------------------------------------------------- configs


def own_stop_token_ids(model: PreTrainedModel) -> tuple[int, ...]:
    """Tokens at which a model's own settings end a generation: its generation config's, then its config's."""
    return stops_of(getattr(model, "generation_config", None), model.config)  # a classifier has no generation config


def stops_of(*configs: Any) -> tuple[int, ...]:
    """The same, of configs, or None; each may have one token, several or none."""
    found: list[int | None] = []
    for part in chain.from_iterable((c, c.get_text_config() if hasattr(c, "get_text_config") else c) for c in configs):
        ids = getattr(part, "eos_token_id", None)
        found += ids if isinstance(ids, (list, tuple)) else [ids]
    return tuple(dict.fromkeys(i for i in found if i is not None and i >= 0))


def _set_stop_token_ids(config: Any, stops: list[int]) -> None:
    """Writes into a config what ends a generation; the first alone where its family takes no list."""
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        try:
            part.eos_token_id = _one_or_list(stops)
        except Exception:  # transformers 5 checks types, by an error of huggingface_hub's newer versions
            part.eos_token_id = stops[0]


def _one_or_list(stops: list[int]) -> int | list[int] | None:
    return stops if len(stops) > 1 else next(iter(stops), None)


def _save_generation_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stops: list[int], folder: Path
) -> GenerationConfig:
    """Writes the model's generation config with this tokenizer's tokens.

    Published models carry combinations that transformers refuses to save, such as a temperature without
    ``do_sample``: they were meant to be sampled from.
    """
    tokens = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": _one_or_list(stops),
        "pad_token_id": next(iter(stops), None) if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    }
    config = copy.deepcopy(model.generation_config or GenerationConfig())
    for name, value in tokens.items():  # update() would validate
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
    log.warning("The model's generation config is invalid (%s): saved with the stop tokens alone.", reason)
    plain = GenerationConfig(**tokens)
    plain.save_pretrained(folder)
    return plain


def _save_adapted(base: PreTrainedModel, folder: Path) -> None:
    embeddings: Any = base.get_input_embeddings()
    settings = {"vocab_size": embeddings.weight.shape[0], "pad_token_id": getattr(base.config, "pad_token_id", None)}
    if hasattr(base.config, "score_offset"):
        settings["score_offset"] = base.config.score_offset
    (folder / ADAPTED).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _rewrite(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    change(content)
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _portable_config(config: dict[str, Any]) -> None:
    """Adds the rotary settings' old names: 4.51 does not read ``rope_parameters`` and would take its default theta."""
    for key in ("_attn_implementation", "_attn_implementation_autoset", "attn_implementation"):
        config.pop(key, None)
    if isinstance(config.get("text_config"), dict):
        _portable_config(config["text_config"])
    rope = config.get("rope_parameters") or {}
    if "sliding_attention" in rope:  # one set for each kind of layer
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
    """4.51 doesn't know the class that 5 names, and takes its list of further special tokens for a dict."""
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
