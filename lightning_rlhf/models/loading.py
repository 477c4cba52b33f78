"""Loads Hugging Face models: weights, data type, adapters, tokenizer."""

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
from typing import TYPE_CHECKING, Any, Literal, TypedDict, cast

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
from lightning_rlhf.models.gptq import gptq_names, kernel_arguments, method_of
from lightning_rlhf.models.quantization import (
    DTYPE,
    Quantization,
    is_quantized,
    quantization_arguments,
    quantized,
    refuse_again,
)
from lightning_rlhf.models.runs import check_name, exports_of
from lightning_rlhf.models.saving import (
    ADAPTED,
    merge_adapters,
    no_progress_bars,
    own_stop_token_ids,
    plain_twin,
    quiet_peft,
    stops_of,
)
from lightning_rlhf.utils.random import generator

if TYPE_CHECKING:
    from typing_extensions import Unpack

Dtype = Literal["float32", "bfloat16", "float16"]
HEAD = "score.weight"


@dataclass
class LoRA:
    """Low-rank adapters (Hu et al. 2021), with peft.

    Attributes:
        r: Rank. A larger value has more parameters and can change the model more.
        alpha: The adapters' output is multiplied by ``alpha / r`` (``alpha / sqrt(r)`` with ``rslora``). A larger value
            makes larger updates.
        dropout: Dropout probability on the adapters' input. A larger value regularizes more.
        targets: Names of the layers to adapt, or ``all-linear``.
        modules_to_save: Modules that are trained in full beside the adapters, such as ``lm_head``.
        rslora: Use the rank-stabilized scale (Kalajdzievski 2023).
        dora: Decompose weights into magnitude and direction (Liu et al. 2024).
        init: peft's ``init_lora_weights``: True for the paper's initialization, or ``gaussian``, ``pissa``, ``olora``.
    """

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: list[str] | Literal["all-linear"] = "all-linear"
    modules_to_save: list[str] = field(default_factory=list)
    rslora: bool = False
    dora: bool = False
    init: bool | Literal["gaussian", "pissa", "olora"] = True

    def check_fits_quantized(self) -> None:
        """Checks that the initialization leaves the weights as they are.

        Raises:
            ValueError: It does not.
        """
        if self.init not in (True, "gaussian"):
            raise ValueError(
                f"lora.init={self.init!r} moves a part of the weights into the adapters, and quantized weights "
                "can't be changed: use true or gaussian."
            )

    def wrap(self, model: PreTrainedModel, new_tokens: Sequence[int] = ()) -> nn.Module:
        """Adds trainable adapters to a model and freezes everything else. Adapters are always fp32.

        Args:
            model: The model to adapt.
            new_tokens: Ids whose rows in embeddings and head are not trained yet. These rows are trained beside the
                adapters, because the model could not distinguish frozen new rows.

        Raises:
            ValueError: A name in ``targets`` or ``modules_to_save`` matches no module of the model.
        """
        from peft import LoraConfig, get_peft_model

        if not isinstance(self.targets, str):
            _check_names(model, "targets", self.targets, lambda name, part: f".{name}".endswith(f".{part}"))
        _check_names(model, "modules_to_save", self.modules_to_save, str.endswith)
        targets = self.targets if isinstance(self.targets, str) else list(self.targets)
        if targets == "all-linear":  # peft does not count GPTQ's layers among them
            targets = gptq_names(model) or targets
        rows, whole = _rows_to_train(model, self, sorted(new_tokens))
        config = LoraConfig(
            # peft trains a classifier's head in full, and saves it with the adapters
            task_type="SEQ_CLS" if type(model).__name__.endswith("ForSequenceClassification") else "CAUSAL_LM",
            r=self.r,
            lora_alpha=self.alpha,  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            target_modules=targets,
            modules_to_save=[*self.modules_to_save, *whole] or None,  # a copy, because peft appends to the list
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


@dataclass(frozen=True)
class Load:
    """How a stage loads and holds the weights of its models.

    Args:
        dtype: Data type of the weights. Heads and adapters are always fp32. For full fine-tuning use fp32 with the
            Trainer's ``bf16-mixed``.
        quantization: QLoRA: keep the frozen linear layers in 4 bits (``nf4``) or 8 bits (``int8``). It needs ``lora``.
        gradient_checkpointing: Compute activations again in the backward pass. This saves memory and takes about a
            third more compute.
        layout: ``auto`` computes each prompt once if the model allows it, and pads otherwise. ``tree`` and ``padded``
            always use this layout.
        trust_remote_code: Run code that comes with the model.
        tf32: On a CUDA device, multiply fp32 matrices in TF32 while ``fit`` runs: factors are rounded to 10 bits, sums
            are not, and cards since the A100 are up to 8 times as fast. False: in full. It changes no other type and no
            other device, and nothing where ``torch.set_float32_matmul_precision`` was called before.

    Raises:
        ValueError: A value is not one of the choices.
    """

    dtype: Dtype = "float32"
    quantization: Quantization | None = None
    gradient_checkpointing: bool = False
    layout: LayoutChoice = "auto"
    trust_remote_code: bool = False
    tf32: bool = True

    def __post_init__(self) -> None:
        check_arguments(Load, vars(self), "load.")

    def options(
        self, lora: LoRA | None, tokenizer: PreTrainedTokenizerBase, new_tokens: Sequence[int]
    ) -> LoaderOptions:
        """Returns these settings as the functions take them that load a model to train.

        Args:
            lora: Adapters to train; None: all weights are trained.
            tokenizer: Its size is that of the embeddings.
            new_tokens: Ids of tokens that the chat template brought.
        """
        return LoaderOptions(
            dtype=self.dtype,
            lora=lora,
            quantization=self.quantization,
            gradient_checkpointing=self.gradient_checkpointing,
            vocab_size=len(tokenizer),
            new_tokens=new_tokens,
            trust_remote_code=self.trust_remote_code,
        )


# checkpoints hold these settings; torch.load reads them without trusting arbitrary classes
torch.serialization.add_safe_globals([LoRA, Load])


class LoaderOptions(TypedDict, total=False):
    """Options of all functions that load a model; see :class:`Load` for those not listed here.

    Attributes:
        lora: Adapters to train. None: all weights are trained.
        vocab_size: Number of the tokenizer's tokens. Smaller embeddings grow to this size.
        inference: The weights are only read: quantized layers may use kernels that have no backward pass.
        new_tokens: Ids of tokens that are new, although the embeddings have rows for them. With ``lora``, their rows
            and the rows that were added are trained beside the adapters.
    """

    dtype: Dtype
    lora: LoRA | None
    quantization: Quantization | None
    gradient_checkpointing: bool
    inference: bool
    vocab_size: int | None
    new_tokens: Sequence[int]
    trust_remote_code: bool


def load_tokenizer(name_or_path: str | os.PathLike[str], trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a Hugging Face directory or hub id, and sets a pad token if there is none.

    Padding is masked by lengths, so the eos token can be the pad token.

    Raises:
        OSError: The tokenizer does not exist or cannot be read.
        ValueError: The tokenizer has no eos token.
    """
    with _explain_os_errors(name_or_path):
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"The tokenizer of {name_or_path} has no eos token, so answers could not end. Set one in its "
            "tokenizer_config.json."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def read_config(name_or_path: str | os.PathLike[str], trust_remote_code: bool = False) -> Any:
    """Reads the config of a whole model in a Hugging Face directory or at a hub id.

    Raises:
        OSError: The config does not exist or cannot be read.
    """
    with _explain_os_errors(name_or_path):
        return AutoConfig.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)


def load_config(name_or_path: str | os.PathLike[str], trust_remote_code: bool = False) -> Any:
    """Reads the config of a model. For adapters, it is the config of their base model with the adapters' changes.

    Raises:
        OSError: The config does not exist or cannot be read, or the adapters' base model does not exist.
    """
    adapters = adapters_of(name_or_path)
    if adapters is None:
        return read_config(name_or_path, trust_remote_code)
    base, settings = adapters
    config = load_config(base, trust_remote_code)
    for name, value in settings.items():
        setattr(config.get_text_config() if name == "vocab_size" else config, name, value)
    return config


def quantization_of(
    pretrained: str | os.PathLike[str] | PreTrainedModel, trust_remote_code: bool = False
) -> str | None:
    """Returns the method that quantized a model's weights, such as ``gptq``; None if they are in full precision.

    Adapters are merged into their base, whose weights are dequantized for it.

    Raises:
        OSError: The model does not exist or cannot be read.
    """
    if isinstance(pretrained, PreTrainedModel):
        return method_of(pretrained.config)
    return None if adapters_of(pretrained) is not None else method_of(read_config(pretrained, trust_remote_code))


def refuse_full_training(
    pretrained: str | os.PathLike[str] | PreTrainedModel, lora: LoRA | None, trust_remote_code: bool = False
) -> None:
    """Refuses to train weights that are quantized, or to move a part of them into adapters.

    Raises:
        OSError: The model does not exist or cannot be read.
        ValueError: It is one of these.
    """
    if (method := quantization_of(pretrained, trust_remote_code)) is None:
        return
    name = pretrained.name_or_path if isinstance(pretrained, PreTrainedModel) else pretrained
    if lora is None:
        raise ValueError(f"The weights of {name} are quantized ({method}) and can't be trained. Give lora.")
    lora.check_fits_quantized()
    if method == "gptq" and lora.dora:
        raise ValueError(f"lora.dora changes the weights of {name}, which are quantized (gptq). Set it to false.")


def load_stop_token_ids(
    pretrained: str | os.PathLike[str] | PreTrainedModel, trust_remote_code: bool = False
) -> tuple[int, ...]:
    """Returns the tokens that end a generation: those of the model's generation config, then those of its config.

    It reads no weights. For adapters, their own settings come before their base model's.

    Raises:
        OSError: The model does not exist, or the adapters' base model does not exist.
    """
    if isinstance(pretrained, PreTrainedModel):
        return own_stop_token_ids(pretrained)
    own, adapters = _generation_config(pretrained), adapters_of(pretrained)
    if adapters is None:
        return stops_of(own, read_config(pretrained, trust_remote_code))
    return tuple(dict.fromkeys([*stops_of(own), *load_stop_token_ids(adapters[0], trust_remote_code)]))


def _generation_config(name_or_path: str | os.PathLike[str]) -> GenerationConfig | None:
    """Reads a generation config. Returns None if it does not exist or cannot be read, as transformers does."""
    try:
        file = Path(str(cached_file(os.fspath(name_or_path), "generation_config.json")))
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    config = GenerationConfig()
    for name, value in settings.items():  # from_dict would warn of settings without do_sample
        setattr(config, name, value)
    return config


def load_causal_lm(pretrained: str | os.PathLike[str] | PreTrainedModel, **options: Unpack[LoaderOptions]) -> nn.Module:
    """Loads a causal LM for training.

    Args:
        pretrained: A Hugging Face directory, a hub id, or a model. Adapters in a directory are merged into their base.
        options: See :class:`LoaderOptions`.

    Returns:
        The model, or a peft model around it, in training mode.

    Raises:
        ModuleNotFoundError: ``quantization`` needs bitsandbytes, which is not installed.
        OSError: The model does not exist or cannot be read.
        ValueError: The hardware does not support ``dtype``.
    """
    if isinstance(pretrained, PreTrainedModel):
        model = pretrained
    else:
        model, _ = _load(AutoModelForCausalLM, pretrained, _arguments(options), **_holding(options))
    return _prepare(quantized(model, **_holding(options)), options)


def load_reward_model(
    pretrained: str | os.PathLike[str] | PreTrainedModel,
    *,
    pad_token_id: int | None = None,
    seed: int = 0,
    needs_head: bool = False,
    **options: Unpack[LoaderOptions],
) -> nn.Module:
    """Loads a reward model: a transformers classifier with one label.

    A causal LM gets a new head without bias and with normal weights of standard deviation ``1 / sqrt(D + 1)`` (Stiennon
    et al. 2020). A classifier keeps its head. With ``lora`` the head is trained beside the adapters.

    Args:
        pretrained: A directory or hub id of a causal LM or of a one-label classifier, or such a classifier. Adapters in
            a directory are merged into their base, with the ``score_offset`` that was saved with them.
        pad_token_id: The token that plain transformers skips at the end of a row. It must not end answers.
        seed: Seed of a new head.
        needs_head: Refuse a model without a trained head, because it cannot score.
        options: See :class:`LoaderOptions`.

    Returns:
        The model, or a peft model around it, in training mode.

    Raises:
        ModuleNotFoundError: ``quantization`` needs bitsandbytes, which is not installed.
        OSError: The model or its base does not exist or cannot be read.
        ValueError: The classifier has several labels, a needed head is missing, or the hardware does not support
            ``dtype``.
    """
    if isinstance(pretrained, PreTrainedModel):
        if not type(pretrained).__name__.endswith("ForSequenceClassification"):
            raise ValueError(
                f"{type(pretrained).__name__} is not a classifier. Give the model's directory or hub id instead."
            )
        _check_labels(pretrained.config, type(pretrained).__name__)
        model = pretrained
    else:
        with torch.random.fork_rng(devices=()):  # transformers initializes a head first
            model, missing = _load(
                AutoModelForSequenceClassification, pretrained, _arguments(options), **_holding(options)
            )
        if needs_head and missing:
            raise ValueError(
                f"{pretrained} is not a reward model: it has no weights for {', '.join(sorted(missing))}. Give the "
                "directory of a trained reward model (hf/best or hf/last of its run)."
            )
        if HEAD in missing:
            weight = model.score.float().weight
            drawn = torch.empty(weight.shape, dtype=torch.float32, device="cpu")
            weight.data.copy_(drawn.normal_(0, (weight.shape[1] + 1) ** -0.5, generator=generator(seed)))
    model = quantized(model, **_holding(options))
    if pad_token_id is not None:
        model.config.pad_token_id = model.config.get_text_config().pad_token_id = pad_token_id
    if isinstance(score := getattr(model, "score", None), nn.Module):
        score.float()
    return _prepare(model, options)


def load_exported(
    pretrained: str | os.PathLike[str], dtype: Dtype | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Loads what a stage exported, a causal LM or a reward model, to read it and not to train it.

    Args:
        pretrained: A directory or hub id. Adapters are merged into their base.
        dtype: Data type of the weights. Default: the one that they were saved in. A reward model's head is always fp32.
        trust_remote_code: Run code that comes with the model.

    Returns:
        The model in evaluation mode on the CPU.

    Raises:
        OSError: The model does not exist or cannot be read.
        ValueError: The model is a classifier without a trained head, or with several labels.
    """
    arguments = {DTYPE: getattr(torch, dtype) if dtype else "auto", "trust_remote_code": trust_remote_code}
    scores = _scores(pretrained, trust_remote_code)
    auto = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    model, missing = _load(auto, pretrained, arguments, inference=True)
    if HEAD in missing:
        raise ValueError(f"{pretrained} is a reward model without weights for {HEAD}. Export it again.")
    if scores:
        model.score.float()
    return cast(PreTrainedModel, quantized(model, None, inference=True).eval().requires_grad_(False))


def _scores(pretrained: str | os.PathLike[str], trust_remote_code: bool) -> bool:
    """Whether a directory or hub id is a reward model, whole or as adapters."""
    if adapters_of(pretrained) is not None:
        adapters = json.loads(Path(str(find_adapter_config_file(os.fspath(pretrained)))).read_text(encoding="utf-8"))
        return bool(adapters.get("task_type") == "SEQ_CLS")
    names = read_config(pretrained, trust_remote_code).architectures or []
    return any(name.endswith("ForSequenceClassification") for name in names)


def _load(
    auto: Any,
    pretrained: str | os.PathLike[str],
    arguments: dict[str, Any],
    quantization: Quantization | None = None,
    inference: bool = False,
) -> tuple[Any, set[str]]:
    """Loads a whole model with merged adapters, and returns it with the names of missing weights.

    The model is quantized unless it has adapters: merging into quantized weights would round them.
    """
    adapters = adapters_of(pretrained)
    if adapters is not None:
        base, settings = adapters
        try:
            model, missing = _load(auto, base, arguments)
        except OSError as error:
            raise OSError(
                f"{pretrained} has adapters of {base!r}, which cannot be loaded: {error} Move the base model there, or "
                "correct base_model_name_or_path in adapter_config.json."
            ) from error
        return _adapt(model, os.fspath(pretrained), settings, missing)
    config = read_config(pretrained, arguments["trust_remote_code"])
    if auto is AutoModelForSequenceClassification:
        if not any(name.endswith("ForSequenceClassification") for name in config.architectures or []):
            config.num_labels = 1  # a language model's config says 2, which has no meaning
        _check_labels(config, pretrained)
    if quantization is not None:
        if (method := method_of(config)) is not None:
            refuse_again(pretrained, method, quantization)
        arguments = {**arguments, **quantization_arguments(quantization, arguments[DTYPE])}
    packed = method_of(config) == "gptq"  # optimum reads all attributes, also those that warn
    quiet = _no_loading_report() if packed or auto is AutoModelForSequenceClassification else nullcontext()
    bars = nullcontext() if sys.stderr.isatty() else no_progress_bars()  # in a file a bar is a line per step
    with quiet, bars, kernel_arguments(config, arguments[DTYPE], inference) as kernel:
        model, found = auto.from_pretrained(pretrained, config=config, output_loading_info=True, **arguments, **kernel)
    missing = set(found["missing_keys"])
    if packed and missing - {HEAD}:
        raise ValueError(f"{pretrained} lacks weights: {', '.join(sorted(missing))}.")
    if auto is AutoModelForSequenceClassification:
        others = {name for name in found["unexpected_keys"] if not name.startswith("lm_head.")} | missing - {HEAD}
        if others:
            rank_zero_warn(f"{pretrained}: these weights are missing or not used: {', '.join(sorted(others))}.")
    return model, missing


@contextmanager
def _no_loading_report() -> Iterator[None]:
    """Hides transformers' report of a missing new head and of an unused language-model head, which are intended."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)


@contextmanager
def _explain_os_errors(source: str | os.PathLike[str]) -> Iterator[None]:
    """Names the model in errors: transformers' message may only be about the network or about tokenizers."""
    path = Path(source)
    check_name(source)
    if path.is_dir() and not any(path.glob("*config.json")):
        inside = [str(found[0].path) for folder in (path, *sorted(path.iterdir())) if (found := exports_of(folder))]
        hint = f"; did you mean {' or '.join(inside)}?" if inside else "."
        raise OSError(f"{source} is not a model: it has no config.json{hint}")
    try:
        yield
    except OSError as error:
        where = f"{source}" if path.is_dir() else f"{source} is not a directory in {Path.cwd()}; as a hub id"
        raise OSError(f"{where}: {error}") from error


def adapters_of(pretrained: str | os.PathLike[str]) -> tuple[str, dict[str, Any]] | None:
    """Returns the adapters' base model and the changed config values that our export saved; None for a whole model."""
    name = os.fspath(pretrained)
    try:
        found = find_adapter_config_file(name)
        if found is None or has_file(name, "config.json"):
            return None
    except (OSError, ValueError):  # neither a directory nor a hub id; loading it raises a better error
        return None
    base = json.loads(Path(found).read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise OSError(
            f"The adapter_config.json of {name} does not name the adapters' base model. Set base_model_name_or_path to "
            "its directory or hub id."
        )
    if not has_file(name, ADAPTED):  # adapters from elsewhere
        return base, {}
    return base, json.loads(Path(str(cached_file(name, ADAPTED))).read_text(encoding="utf-8"))


def _adapt(model: Any, name: str, settings: dict[str, Any], missing: set[str]) -> tuple[Any, set[str]]:
    """Merges adapters into their base, which is dequantized for it."""
    from peft import PeftConfig, PeftModel

    if is_quantized(model):
        rank_zero_info(f"{name}: the adapters' base is quantized. It is dequantized to merge them.")
        model = plain_twin(model)
    grow_embeddings(model, settings.get("vocab_size", 0))
    with torch.random.fork_rng(devices=()), quiet_peft():
        config = PeftConfig.from_pretrained(name)
        config.task_type = None  # the plain wrapper, so that adapters of a language model also fit a classifier
        model = merge_adapters(PeftModel.from_pretrained(model, name, config=config))
    model.requires_grad_(True)
    model.name_or_path = name  # the base of further adapters
    if model.can_generate():
        model.generation_config = _generation_config(name) or model.generation_config
    for key in settings.keys() - {"vocab_size"}:
        setattr(model.config, key, settings[key])
    whole = set(config.modules_to_save or ())
    return model, {key for key in missing if whole.isdisjoint(key.split("."))}


def _check_labels(config: Any, name: object) -> None:
    if config.num_labels != 1:
        raise ValueError(f"{name} is a classifier with {config.num_labels} labels, but a reward model must have one.")


def _holding(options: LoaderOptions) -> dict[str, Any]:
    """Returns how the weights are held."""
    return {"quantization": options.get("quantization"), "inference": options.get("inference", False)}


def _arguments(options: LoaderOptions) -> dict[str, Any]:
    """Returns the arguments of ``from_pretrained``."""
    dtype = options.get("dtype", "float32")
    if dtype == "float16" and not torch.cuda.is_available():
        raise ValueError("dtype: float16 needs a GPU. Use float32 or bfloat16 on a CPU.")
    return {DTYPE: getattr(torch, dtype), "trust_remote_code": options.get("trust_remote_code", False)}


def _prepare(model: PreTrainedModel, options: LoaderOptions) -> nn.Module:
    """Grows a model's embeddings, adds adapters, and sets training mode."""
    if unknown := options.keys() - LoaderOptions.__annotations__.keys():
        known = ", ".join(LoaderOptions.__annotations__)
        raise TypeError(f"{', '.join(sorted(unknown))}: unknown options. Use {known}.")
    grown = grow_embeddings(model, options.get("vocab_size") or 0)
    if options.get("gradient_checkpointing"):
        enable_checkpointing(model)
    model.train()
    if (lora := options.get("lora")) is None:
        return model
    # a classifier's own pad token is never read
    unread = model.config.get_text_config().pad_token_id
    return lora.wrap(model, sorted({*grown, *options.get("new_tokens", ())} - {unread}))


def grow_embeddings(model: PreTrainedModel, vocab_size: int) -> range:
    """Adds rows for new tokens to a model's embeddings and head: the mean of the other rows with a little noise.

    The same model always gets the same rows, because a reference must start like its policy, and a resumed run like the
    original one.

    Args:
        model: The model.
        vocab_size: Number of rows to have. A model with more rows does not change.

    Returns:
        The ids of the new tokens.
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
    """Checks that each name matches a module, because peft ignores a wrong name if another one matches."""
    modules = [name for name, _ in model.named_modules()]
    for part in names:
        if not any(matches(name, part) for name in modules):
            ends = sorted({name.rpartition(".")[2] for name in modules if name} - {""})
            near = get_close_matches(
                part.rpartition(".")[2], [end for end in ends if not end.isdigit()], n=3, cutoff=0.4
            )
            raise ValueError(
                f"lora.{setting}: {part!r} matches no layer of {type(model).__name__}"
                f"{'; did you mean ' + ', '.join(near) + '?' if near else '.'}"
            )


def _rows_to_train(model: PreTrainedModel, lora: LoRA, new_tokens: list[int]) -> tuple[dict[str, list[int]], list[str]]:
    """Chooses how rows of new tokens are trained: rows by layer, and names of layers that peft can only train whole."""
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
        if isinstance(layer, nn.Linear):  # peft ignores its bias
            return layer.bias is None and (newer or tied)
        return newer or type(layer) is nn.Embedding

    targets = [] if isinstance(lora.targets, str) else lora.targets
    own = [*lora.modules_to_save, *(f".{target}" for target in targets)]  # their rows are trained anyway
    left = [layer for layer in layers if not f".{names[layer]}".endswith(tuple(own))]
    if tied:  # peft ties the head's rows to the embeddings' rows if possible
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
    """Casts layers that are trained in full to fp32, like adapters. Their inputs and outputs keep the old type."""
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
