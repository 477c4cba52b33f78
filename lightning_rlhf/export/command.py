"""``lightning-rlhf export RUN --format FORMAT``: hands a trained model on to other programs."""

from __future__ import annotations

import errno
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_rlhf.arguments import Parser, add_model_options

if TYPE_CHECKING:
    from lightning_rlhf.export.gguf import Quant
    from lightning_rlhf.export.serving import Serving
    from lightning_rlhf.models.runs import Source

_FORMATS = ("hf", "adapter", "gguf")
_QUANTS = ("q8_0", "q4_0", "q4_k_m")
_ABOUT = """\
Exports a trained model, and prints the command that serves it. hf: whole weights, adapters merged, for transformers and
vLLM. adapter: LoRA alone, for peft and vLLM. gguf: one file for llama.cpp, written by auto-round. What has the form
already is not copied, unless --out is given."""


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command.

    Args:
        args: Arguments after ``export``.
    """
    parser = Parser("export", _ABOUT)
    parser.add_argument("run", metavar="RUN", help="a run's folder, a directory of a model or of adapters, a hub id")
    parser.add_argument("--format", required=True, choices=_FORMATS, help="what to make")
    parser.add_argument(
        "--quant", choices=_QUANTS, help="how gguf stores weights; fewer bits take less memory. Default: q8_0"
    )
    parser.add_argument("--out", type=Path, help="new directory; default: NAME-FORMAT or NAME-QUANT beside RUN")
    add_model_options(parser, "--trust-remote-code")
    options = parser.parse_args(args)
    if options.quant and options.format != "gguf":
        parser.error(f"--quant is for --format gguf, not {options.format}.")
    if options.out is not None and options.out.suffix == ".gguf":
        parser.error(f"--out is a directory; the file in it gets its name. Give --out {options.out.with_suffix('')}.")
    try:
        export(options.run, options.format, options.quant or "q8_0", options.out, options.trust_remote_code)
    except (ImportError, OSError, TypeError, ValueError) as error:
        sys.exit(f"lightning-rlhf export: {_said(error)}")


def export(run: str, form: str, quant: Quant = "q8_0", out: Path | None = None, trust: bool = False) -> Path:
    """Exports a model, and prints what was taken, what was written and how to serve it.

    Args:
        run: A run's folder, a directory of a model or of adapters, a checkpoint, or a hub id.
        form: ``hf``, ``adapter`` or ``gguf``.
        quant: How ``gguf`` stores weights; see :data:`~lightning_rlhf.export.gguf.Quant`.
        out: New directory. Default: ``NAME-FORMAT``, for GGUF ``NAME-QUANT``, beside ``run``.
        trust: Run code that comes with the model.

    Returns:
        The directory, or the GGUF file.

    Raises:
        ImportError: A package that the format needs is missing.
        OSError: There is nothing to export, or the output exists, or the disk is full.
        ValueError: The model has no such form.
    """
    from lightning_rlhf.export.hub import fetch
    from lightning_rlhf.export.serving import serve_directory, serve_gguf
    from lightning_rlhf.models.runs import find_source

    if Path(run).is_file() and run.endswith(".gguf"):
        raise ValueError(f"{run} is a GGUF file already. Give the model that it was made from.")
    source = find_source(run, adapters=form == "adapter") or fetch(run)
    print(f"{source.path}: {_NOUNS[source.kind]}{source.why and f' ({source.why})'}")
    _check(source, form)
    if out is None and source.kind == {"hf": "model", "adapter": "adapters"}.get(form):
        print("It has this form already, so nothing was written. Give --out to copy it.")
        _show(serve_directory(source))
        return source.path
    target = out or _beside(run, source, quant if form == "gguf" else form)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise FileExistsError(f"{target} exists. Remove it, or choose another directory by --out.")
    if form == "gguf":
        file = _write_gguf(source, target, quant, trust)
        _show(serve_gguf(file))
        return file
    made = _write_directory(source, target, form == "adapter", trust)
    _show(serve_directory(made))
    return target


def _write_directory(source: Source, target: Path, adapter: bool, trust: bool) -> Source:
    """Writes whole weights or adapters to a directory of their own."""
    from lightning_rlhf.models.runs import Source
    from lightning_rlhf.utils.filesystem import atomic_directory

    with atomic_directory(target) as folder:
        _write(source, folder, adapter, trust)
    print(f"Written: {target} ({_size(target)})")
    return Source(target, "adapters" if adapter else "model", source.name)


def _write_gguf(source: Source, target: Path, quant: Quant, trust: bool) -> Path:
    """Writes a GGUF file in a directory of its own; adapters are merged first."""
    from lightning_rlhf.export.gguf import check_convertible, require_auto_round, stored_as, write_gguf
    from lightning_rlhf.utils.filesystem import atomic_directory

    require_auto_round()
    if source.kind == "model":
        check_convertible(source.path)
    name = f"{source.name}-{quant}.gguf"
    with atomic_directory(target) as folder, tempfile.TemporaryDirectory(dir=folder, prefix=".merged-") as scratch:
        whole = source.path
        if source.kind != "model":
            whole = Path(scratch) / source.name
            whole.mkdir()
            _write(source, whole, False, trust)
        write_gguf(whole, folder / name, quant, trust=trust)
    file = target / name
    kinds = ", ".join(f"{count} in {kind}" for kind, count in stored_as(file).items())
    print(f"Written: {file} ({_size(file)}; matrices: {kinds})")
    return file


_NOUNS = {"model": "whole weights", "adapters": "adapters", "checkpoint": "a checkpoint"}


def _check(source: Source, form: str) -> None:
    """Refuses, before any work, what has no such form.

    Raises:
        ValueError: It is so.
    """
    if source.kind == "checkpoint":
        return
    if form == "adapter" and source.kind == "model":
        raise ValueError(
            f"{source.path} has whole weights, from which adapters cannot be taken out again. Export them in training "
            "(HFExport with adapter_only: true), or give a checkpoint of a run with lora."
        )
    if form == "gguf" and source.is_reward_model:
        raise ValueError(
            f"{source.path} is a reward model, and llama.cpp has no form for its score head. Use --format hf, which "
            "vLLM serves."
        )
    method = source.quantized_by if source.kind == "model" else None
    if source.kind == "adapters" and form != "adapter":
        from lightning_rlhf.models.gptq import method_of
        from lightning_rlhf.models.loading import load_config

        method = method_of(load_config(source.base))
        if method:
            raise ValueError(
                f"{source.path} has adapters of {source.base}, which is quantized ({method}): merged weights would be "
                "rounded. Use --format adapter, or set base_model_name_or_path to the model in full precision."
            )
    if method and form == "gguf":
        raise ValueError(
            f"{source.path} is quantized ({method}), and would be rounded twice. Give the model that it was made from."
        )


def _write(source: Source, folder: Path, adapter: bool, trust: bool) -> None:
    """Writes whole weights or adapters."""
    from lightning_rlhf.export.weights import copy_directory, save_checkpoint, save_merged

    if source.kind == "checkpoint":
        save_checkpoint(source.path, folder, adapter)
    elif source.kind == "adapters" and not adapter:
        save_merged(source, folder, trust)
    else:
        copy_directory(source.path, folder, lambda line: print(line, file=sys.stderr, flush=True))


def _beside(run: str, source: Source, suffix: str) -> Path:
    path = Path(run)
    parent = path.parent if path.exists() else Path()
    return parent / f"{source.name}-{suffix}"


def _show(serving: Serving) -> None:
    print(f"Serve it: {serving.command}")
    for note in serving.notes:
        print(f"  {note}")


def _size(path: Path) -> str:
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    size = float(sum(file.stat().st_size for file in files))
    for unit in ("bytes", "KB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.2f} GB"


def _said(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"{text}. Nothing was left half-written. Make room, or give --out on another disk."
    return text
