"""Writes GGUF files, which llama.cpp loads, with auto-round."""

from __future__ import annotations

import gc
import importlib.util
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from lightning_rlhf.export.weights import require_space
from lightning_rlhf.models.loading import load_stop_token_ids, load_tokenizer
from lightning_rlhf.models.quantization import DTYPE
from lightning_rlhf.models.saving import no_progress_bars
from lightning_rlhf.utils.logs import errors_only

Quant = Literal["q8_0", "q4_0", "q4_k_m"]
"""``q8_0``: 8.5 bits per weight, in blocks of 32 with one scale. ``q4_0``: 4.5 bits, the same blocks. ``q4_k_m``: about
4.85 bits, in blocks of 256 with scales in 6 bits; llama.cpp keeps some layers in 6 bits."""
QUANTS: tuple[Quant, ...] = get_args(Quant)

#: Inputs of a layer per block; a layer whose inputs do not divide into blocks cannot be packed.
BLOCKS: dict[Quant, int] = {"q8_0": 32, "q4_0": 32, "q4_k_m": 256}
_BITS: dict[Quant, float] = {"q8_0": 8.5, "q4_0": 4.5, "q4_k_m": 4.85}
_NEEDS = ("auto_round", "gguf", "sentencepiece")


def require_auto_round() -> None:
    """Checks that what writes GGUF files is installed.

    Raises:
        ModuleNotFoundError: It is not.
    """
    missing = [name for name in _NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"GGUF files need {' and '.join(missing)} (auto-round needs Python 3.11 or later). Install: pip install "
            "'lightning_rlhf[gguf]'",
            name=missing[0],
        )


def check_convertible(directory: Path) -> None:
    """Checks, before any work, that llama.cpp has a form for a model and its tokenizer.

    Args:
        directory: A whole model with its tokenizer.

    Raises:
        ModuleNotFoundError: auto-round is not installed.
        ValueError: llama.cpp has no form for the architecture, or does not know the tokenizer.
    """
    require_auto_round()
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    architecture = next(iter(config.get("architectures") or ["(none)"]))
    if architecture.endswith("ForSequenceClassification"):
        raise ValueError(
            f"{architecture} is a reward model, and llama.cpp has no form for its score head. Serve it "
            "with --format hf."
        )
    # No public function of auto-round says this before hours of work; tests/export/test_gguf.py fails if it moves.
    from auto_round.export.export_to_gguf.llama_cpp_conversion import get_conversion

    with _quiet():
        try:
            conversion = get_conversion(directory, auto_update=False)  # never runs code from the network
            kind = conversion.get_model_class(architecture)
        except NotImplementedError as error:
            raise ValueError(
                f"auto-round's converter has no form for {architecture}. Serve it with --format hf."
            ) from error
        import gguf

        converter = kind(dir_model=directory, ftype=gguf.LlamaFileType.ALL_F32, fname_out=directory, dry_run=True)
        try:
            converter.set_vocab()
        except (NotImplementedError, FileNotFoundError, AssertionError) as error:
            raise ValueError(
                f"llama.cpp does not know the model's tokenizer ({str(error) or 'its ids exceed the model'}). It "
                "knows those of published models; serve this model with --format hf."
            ) from error


def unpackable(model: nn.Module, quant: Quant) -> dict[str, str]:
    """Finds the layers that a format cannot pack, and what llama.cpp uses instead.

    Args:
        model: A causal LM; its weights are not read.
        quant: The format.

    Returns:
        Sentences by kind of layer, such as ``down_proj``.
    """
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding, Conv1D)):
            weight: Any = module.weight
            inputs = weight.shape[0 if isinstance(module, Conv1D) else 1]
            if inputs % BLOCKS[quant]:
                instead = "16 bits" if inputs % 32 else "5 or 8 bits in blocks of 32"
                found[name.rpartition(".")[2]] = f"{inputs} inputs: {instead}"
    return found


def write_gguf(
    directory: Path, file: Path, quant: Quant = "q8_0", *, report: Callable[[str], None] = print, trust: bool = False
) -> None:
    """Writes a GGUF file of a model: weights rounded to the nearest, without calibration, and the tokenizer.

    The model is held in fp32 in the CPU's memory. auto-round shows progress by layer. Until the end the disk holds the
    file twice.

    Args:
        directory: A whole causal LM that is not quantized, with its tokenizer.
        file: The file to write, in a directory that exists.
        quant: How weights are stored.
        report: Called with a line for what is not stored as ``quant`` says.
        trust: Run code that comes with the model.

    Raises:
        ModuleNotFoundError: auto-round is not installed.
        OSError: The disk has no room.
        ValueError: llama.cpp has no form for the model.
    """
    check_convertible(directory)
    tokenizer = load_tokenizer(directory, trust)
    with no_progress_bars():
        model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=trust, **{DTYPE: torch.float32})
    require_space(file.parent, 2 * _BITS[quant] / 8 * model.num_parameters())
    layers = unpackable(model, quant)
    if layers:
        named = ", ".join(f"{name} ({why})" for name, why in layers.items())
        report(f"{quant} packs blocks of {BLOCKS[quant]} inputs; these layers do not divide into them: {named}.")
    scratch = file.with_name(f".{file.name}.parts")
    try:
        _convert(model, tokenizer, scratch, quant)
        [written] = scratch.rglob("*.gguf")
        # not at the top: gguf is of an extra
        from lightning_rlhf.export.vocabulary import complete_vocabulary

        stops = dict.fromkeys([tokenizer.eos_token_id, *load_stop_token_ids(directory, trust)])
        left = complete_vocabulary(written, file, directory, tuple(stops))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if left:
        names = ", ".join(map(str, tokenizer.convert_ids_to_tokens(list(left))))
        report(f"GGUF has places for three stop tokens; these have none: {names}. Give them with each request (stop).")


def _convert(model: Any, tokenizer: Any, scratch: Path, quant: Quant) -> None:
    """Runs auto-round without calibration (RTN)."""
    with _quiet(), _frozen_heap():
        from auto_round import AutoRound

        rounding = AutoRound(
            model,
            tokenizer,
            scheme=f"gguf:{quant}",
            iters=0,
            disable_opt_rtn=True,  # otherwise it downloads texts for calibration
            amp=False,  # otherwise all weights, also those that stay fp32, are first rounded to bf16 on some CPUs
            device_map="cpu",
            enable_torch_compile=False,
        )
        rounding.quantize_and_save(output_dir=str(scratch), format=f"gguf:{quant}")


@contextmanager
def _frozen_heap() -> Iterator[None]:
    """Has garbage collection pass over all that exists: auto-round collects three times per layer, a second each."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides auto-round's lines per tensor; what concerns users is reported by us."""
    import auto_round  # noqa: F401  sets up its own logger

    try:
        with errors_only("autoround", "hf-to-gguf", "gguf.vocab", "gguf.gguf_writer"):
            yield
    finally:
        torch.set_printoptions(profile="default")  # it changes how tensors are printed


def stored_as(file: Path) -> dict[str, int]:
    """Counts the tensors of a GGUF file by how they are stored.

    Args:
        file: The file.

    Returns:
        Number of tensors by type, such as ``{"Q8_0": 31, "F16": 5}``; vectors, which stay in fp32, are not counted.
    """
    from gguf import GGUFReader

    return dict(Counter(t.tensor_type.name for t in GGUFReader(file).tensors if len(t.shape) > 1))
