"""Hugging Face models in: weights, dtype, adapters, tokenizer."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from packaging.version import Version
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils import cached_file, find_adapter_config_file, has_file

from lightning_rlhf.checks import check_arguments
from lightning_rlhf.models.backbone import LayoutChoice, enable_checkpointing
from lightning_rlhf.models.quantization import DTYPE, Quantization, quantization_arguments, quantized
from lightning_rlhf.models.saving import (
    ADAPTED,
    merge_adapters,
    no_progress_bars,
    own_stop_token_ids,
    quiet_peft,
    stops_of,
)
from lightning_rlhf.utils.random import generator

Dtype = Literal["float32", "bfloat16", "float16"]
HEAD = "score.weight"


@dataclass
class LoRA:
    """Low-rank adapters (Hu et al. 2021), by peft.

    Attributes:
        r: Rank.
        alpha: Scale of the update: ``alpha / r`` (``alpha / sqrt(r)`` with ``rslora``).
        dropout: On the adapters' input.
        targets: Names of the layers to adapt, or ``all-linear``.
        modules_to_save: Modules trained in full beside the adapters, such as ``lm_head``.
        rslora: Rank-stabilized scale (Kalajdzievski 2023).
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

    def wrap(self, model: PreTrainedModel, new_tokens: Sequence[int] = ()) -> nn.Module:
        """The model with trainable adapters, in fp32 whatever the model's dtype; everything else is frozen.

        Args:
            model: What is adapted.
            new_tokens: Ids whose rows in embeddings and head nobody has trained yet: they are trained beside the
                adapters, since a frozen row can never be told from the others.

        Raises:
            ValueError: A name in ``targets`` or ``modules_to_save`` that matches no module of the model.
        """
        from peft import LoraConfig, get_peft_model

        if not isinstance(self.targets, str):
            _check_names(model, "targets", self.targets, lambda name, part: f".{name}".endswith(f".{part}"))
        _check_names(model, "modules_to_save", self.modules_to_save, str.endswith)
        rows, whole = _rows_to_train(model, self, sorted(new_tokens))
        config = LoraConfig(
            # of a classifier peft trains the head in full, and saves it with the adapters
            task_type="SEQ_CLS" if type(model).__name__.endswith("ForSequenceClassification") else "CAUSAL_LM",
            r=self.r,
            lora_alpha=self.alpha,  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            target_modules=self.targets if isinstance(self.targets, str) else list(self.targets),
            modules_to_save=[*self.modules_to_save, *whole] or None,  # peft adds to the list that it gets
            trainable_token_indices=rows or None,
            use_rslora=self.rslora,
            use_dora=self.dora,
            init_lora_weights=self.init,
            fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),  # GPT-2's layers
            bias="none",
        )
        with quiet_peft():
            adapted = get_peft_model(model, config)
        _keep_exact(adapted)
        return adapted


# A checkpoint names the adapters it was made with; torch.load reads it without trusting arbitrary classes.


@dataclass(frozen=True)
class Load:
    """How a stage loads and holds the weights of its models.

    Args:
        dtype: Dtype of the weights; heads and adapters are fp32 in any case.
        quantization: QLoRA: hold the frozen linear layers in 4 bits (``nf4``) or 8 bits (``int8``); needs ``lora``.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, about a third more compute.
        layout: ``auto`` computes every prompt once where the model allows it and pads elsewhere; ``tree`` and
            ``padded`` insist on one of them.
        trust_remote_code: Run code that comes with the model.

    Raises:
        ValueError: A value is not one of the choices.
    """

    dtype: Dtype = "float32"
    quantization: Quantization | None = None
    gradient_checkpointing: bool = False
    layout: LayoutChoice = "auto"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        check_arguments(Load, vars(self), "load.")


# checkpoints hold these settings; torch.load reads them without trusting arbitrary classes
torch.serialization.add_safe_globals([LoRA, Load])


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


def load_stop_token_ids(
    pretrained: str | os.PathLike[str] | PreTrainedModel, trust_remote_code: bool = False
) -> tuple[int, ...]:
    """Tokens at which a model's own settings end a generation: those of its generation config, then of its config.

    No weights are read. Of adapters it is what was saved with them, then what their base has.

    Raises:
        OSError: Nothing is there, or adapters without the model that they change.
    """
    if isinstance(pretrained, PreTrainedModel):
        return own_stop_token_ids(pretrained)
    own, adapters = _generation_config(pretrained), _adapters(pretrained)
    if adapters is None:
        return stops_of(own, read_config(pretrained, trust_remote_code))
    return tuple(dict.fromkeys([*stops_of(own), *load_stop_token_ids(adapters[0], trust_remote_code)]))


def _generation_config(name_or_path: str | os.PathLike[str]) -> GenerationConfig | None:
    """None where there is none, or none that can be read, as transformers has it."""
    try:
        file = Path(str(cached_file(os.fspath(name_or_path), "generation_config.json")))
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    config = GenerationConfig()
    for name, value in settings.items():  # transformers' own way warns of combinations that were meant to be sampled
        setattr(config, name, value)
    return config


def load_causal_lm(
    pretrained: str | os.PathLike[str] | PreTrainedModel,
    *,
    dtype: Dtype = "float32",
    lora: LoRA | None = None,
    quantization: Quantization | None = None,
    gradient_checkpointing: bool = False,
    vocab_size: int | None = None,
    new_tokens: Sequence[int] = (),
    trust_remote_code: bool = False,
) -> nn.Module:
    """A causal LM ready to train.

    Args:
        pretrained: A Hugging Face directory, a hub id, or a model. Adapters found there are merged into their base.
        dtype: Of the weights. fp32 with the Trainer's ``bf16-mixed`` is the safe choice for full fine-tuning.
        lora: Adapters; None trains everything.
        quantization: Hold the linear layers in 4 (``nf4``) or 8 (``int8``) bits, but for the head and adapters. What is
            quantized can't be trained.
        gradient_checkpointing: Recompute activations in the backward pass.
        vocab_size: Tokens the tokenizer knows; embeddings grow to it where they are fewer.
        new_tokens: Ids that are new though embeddings have rows for them. With ``lora`` the rows of these and of those
            that embeddings grew by are trained beside the adapters.
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
    return _prepared(quantized(model, quantization), lora, gradient_checkpointing, vocab_size, new_tokens)


def load_reward_model(
    pretrained: str | os.PathLike[str] | PreTrainedModel,
    *,
    dtype: Dtype = "float32",
    lora: LoRA | None = None,
    quantization: Quantization | None = None,
    gradient_checkpointing: bool = False,
    vocab_size: int | None = None,
    new_tokens: Sequence[int] = (),
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
        new_tokens: See :func:`load_causal_lm`.
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
        if HEAD in missing:
            weight = model.score.float().weight
            drawn = torch.empty(weight.shape, dtype=torch.float32, device="cpu")
            weight.data.copy_(drawn.normal_(0, (weight.shape[1] + 1) ** -0.5, generator=generator(seed)))
    model = quantized(model, quantization)
    if pad_token_id is not None:
        model.config.pad_token_id = model.config.get_text_config().pad_token_id = pad_token_id
    if isinstance(score := getattr(model, "score", None), nn.Module):
        score.float()
    return _prepared(model, lora, gradient_checkpointing, vocab_size, new_tokens)


def _load(
    auto: Any, pretrained: str | os.PathLike[str], arguments: dict[str, Any], quantization: Quantization | None = None
) -> tuple[Any, set[str]]:
    """The model in one piece, adapters merged, and the names of weights that were nowhere to be found.

    It is quantized, but where there were adapters: merged into quantized weights they would be rounded.
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
    unsaid = _unsaid() if auto is AutoModelForSequenceClassification else nullcontext()
    with unsaid, nullcontext() if sys.stderr.isatty() else no_progress_bars():  # in a file a bar is a line per step
        model, found = auto.from_pretrained(pretrained, config=config, output_loading_info=True, **arguments)
    missing = set(found["missing_keys"])
    if auto is AutoModelForSequenceClassification:
        others = {name for name in found["unexpected_keys"] if not name.startswith("lm_head.")} | missing - {HEAD}
        if others:
            rank_zero_warn(f"{pretrained}: weights that are missing, or not used: {', '.join(sorted(others))}.")
    return model, missing


@contextmanager
def _unsaid() -> Iterator[None]:
    """Without transformers' report that a new head is missing and a language model's is not used: both are meant."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)


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

    grow_embeddings(model, settings.get("vocab_size", 0))
    with torch.random.fork_rng(devices=()), quiet_peft():
        config = PeftConfig.from_pretrained(name)
        config.task_type = None  # the plain wrapper: a language model's adapters fit under a score head too
        model = merge_adapters(PeftModel.from_pretrained(model, name, config=config))
    model.requires_grad_(True)
    model.name_or_path = name  # what further adapters are adapters of
    if model.can_generate():
        model.generation_config = _generation_config(name) or model.generation_config
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
    model: PreTrainedModel,
    lora: LoRA | None,
    gradient_checkpointing: bool,
    vocab_size: int | None,
    new_tokens: Sequence[int],
) -> nn.Module:
    """In training mode, with embeddings for every token and adapters."""
    grown = grow_embeddings(model, vocab_size or 0)
    if gradient_checkpointing:
        enable_checkpointing(model)
    model.train()
    if lora is None:
        return model
    # nobody reads the row of a classifier's own pad token
    return lora.wrap(model, sorted({*grown, *new_tokens} - {model.config.get_text_config().pad_token_id}))


def grow_embeddings(model: PreTrainedModel, vocab_size: int) -> range:
    """Gives a model's embeddings and head rows for new tokens: the mean of the others, and a little noise.

    They are the same wherever the same model grows: a reference must begin as the policy does, and a run that is
    resumed as it began.

    Args:
        model: What may lack rows.
        vocab_size: Rows to have; a model with more keeps them.

    Returns:
        The new tokens' ids.
    """
    embeddings: Any = model.get_input_embeddings()
    known = embeddings.weight.shape[0]
    if vocab_size <= known:
        return range(0)
    with torch.random.fork_rng(devices=()):
        model.resize_token_embeddings(vocab_size, mean_resizing=False)
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    layers: list[Any] = [embeddings]
    if head is not None and head.weight is not embeddings.weight:
        layers.append(head)
    with torch.no_grad():
        for i, layer in enumerate(layers):
            old, new = layer.weight[:known].float(), layer.weight[known:]
            noise = torch.empty(new.shape, dtype=torch.float32, device="cpu").normal_(generator=generator(i))
            new.copy_(old.mean(0) + 0.01 * old.std(0) * noise.to(old.device))
        if (bias := getattr(head, "bias", None)) is not None:
            bias[known:] = bias[:known].mean()
    return range(known, vocab_size)


def _check_names(model: nn.Module, setting: str, names: Sequence[str], matches: Callable[[str, str], bool]) -> None:
    """Refuses names of no module: peft passes them over where another name matches."""
    modules = [name for name, _ in model.named_modules()]
    for part in names:
        if not any(matches(name, part) for name in modules):
            ends = sorted({name.rpartition(".")[2] for name in modules if name} - {""})
            near = get_close_matches(
                part.rpartition(".")[2], [end for end in ends if not end.isdigit()], n=3, cutoff=0.4
            )
            raise ValueError(
                f"lora.{setting}: {part!r} matches no layer of {type(model).__name__}"
                f"{'; near it are ' + ', '.join(near) if near else ''}."
            )


def _rows_to_train(model: PreTrainedModel, lora: LoRA, new_tokens: list[int]) -> tuple[dict[str, list[int]], list[str]]:
    """How new tokens' rows are trained: by layer the rows alone, and names of layers that peft can only train whole."""
    if not new_tokens:
        return {}, []
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {module: name for name, module in model.named_modules()}
    layers: list[Any] = [embeddings, *([] if head is None else [head])]
    tied = head is not None and head.weight is embeddings.weight
    newer = Version(version("peft")) >= Version(
        "0.18"
    )  # else it knows neither heads of their own nor embeddings' scales

    def alone(layer: Any) -> bool:
        if isinstance(layer, nn.Linear):  # peft leaves its bias out
            return layer.bias is None and (newer or tied)
        return newer or type(layer) is nn.Embedding

    targets = [] if isinstance(lora.targets, str) else lora.targets
    own = [*lora.modules_to_save, *(f".{target}" for target in targets)]  # these have rows of their own
    left = [layer for layer in layers if not f".{names[layer]}".endswith(tuple(own))]
    if tied:  # peft ties the head's rows to the embeddings', where it may
        whole = [] if left == layers and all(map(alone, layers)) else left
        rows = [] if whole or not left else [embeddings]
    else:
        whole = [layer for layer in left if not alone(layer)]
        rows = [layer for layer in left if alone(layer)]
    ways = {"their rows of": rows, "all of": whole}
    said = " and ".join(f"{way} {', '.join(names[x] for x in found)}" for way, found in ways.items() if found)
    if said:
        rank_zero_info(f"{len(new_tokens)} new tokens: {said} are trained beside the adapters.")
    return {names[layer]: new_tokens for layer in rows}, [names[layer] for layer in whole]


def _keep_exact(model: nn.Module) -> None:
    """Copies of layers that are trained in full become fp32, as adapters are, and take and give what they did."""
    for module in model.modules():
        copies = getattr(module, "modules_to_save", None)
        for layer in copies.values() if isinstance(copies, nn.ModuleDict) else ():
            dtype = next(layer.parameters()).dtype
            if dtype in (torch.float16, torch.bfloat16):
                layer.float()
                layer.register_forward_pre_hook(partial(_cast_floating, dtype=torch.float32))
                layer.register_forward_hook(partial(_cast_output, dtype=dtype))


def _cast_floating(module: nn.Module, inputs: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    return tuple(x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)


def _cast_output(module: nn.Module, inputs: Any, output: Tensor, dtype: torch.dtype) -> Tensor:
    return output.to(dtype)
