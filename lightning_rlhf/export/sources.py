"""Finds what to export in what a user names: a run, a directory, a checkpoint, a hub id."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Kind = Literal["model", "adapters", "checkpoint"]


@dataclass(frozen=True)
class Source:
    """Something that can be exported.

    Attributes:
        path: A directory, or a checkpoint's file.
        kind: ``model``: whole weights. ``adapters``: peft's directory. ``checkpoint``: a Trainer's file.
        name: Name for what is made of it.
        why: Why this was taken of several; empty if the user named it.
    """

    path: Path
    kind: Kind
    name: str
    why: str = ""

    @property
    def config(self) -> dict[str, Any]:
        """The config of a directory: the model's, or the adapters'."""
        file = "config.json" if self.kind == "model" else "adapter_config.json"
        content: dict[str, Any] = json.loads((self.path / file).read_text(encoding="utf-8"))
        return content

    @property
    def base(self) -> str:
        """The adapters' base model."""
        return str(self.config["base_model_name_or_path"])

    @property
    def is_reward_model(self) -> bool:
        """Whether a directory scores instead of writing texts."""
        if self.kind == "adapters":
            return self.config.get("task_type") == "SEQ_CLS"
        return any(name.endswith("ForSequenceClassification") for name in self.config.get("architectures") or ())

    @property
    def quantized_by(self) -> str | None:
        """Name of the method by which a whole model's weights are quantized; None if they are not."""
        return quantization_of(self.config)


def quantization_of(config: dict[str, Any]) -> str | None:
    """Returns the quantization method that a model's config names; None if it names none."""
    found = config.get("quantization_config")
    if not found:
        return None
    if found.get("load_in_4bit"):
        return str(found.get("bnb_4bit_quant_type", "4 bits"))
    return "int8" if found.get("load_in_8bit") else str(found.get("quant_method"))


def find_source(run: str, adapters: bool = False) -> Source:
    """Finds what to export.

    Of a run's folder the export ``best`` is taken, or else ``last``, or else the newest checkpoint. Adapters are first
    sought as such, then in checkpoints.

    Args:
        run: A run's folder, the directory of a model or of adapters, a checkpoint, or a hub id.
        adapters: Prefer adapters to whole weights.

    Raises:
        OSError: There is nothing by that name, or nothing in it that can be exported.
    """
    path = Path(run)
    if path.is_file():
        if path.suffix == ".gguf":
            raise OSError(f"{run} is a GGUF file already. Give the model that it was made from.")
        return Source(path, "checkpoint", path.stem.replace("=", ""))
    if not path.is_dir():
        return _from_hub(run)
    name = path.resolve().name
    if kind := _kind(path):
        return Source(path, kind, name)
    exports = _exports(path)
    wanted: Kind = "adapters" if adapters else "model"
    best = next((found for found in exports if _kind(found) == wanted), None)
    checkpoints = sorted(path.glob("**/*.ckpt"), key=os.path.getmtime)
    if best is None and adapters and checkpoints:
        return Source(checkpoints[-1], "checkpoint", name, _why(checkpoints[-1], path, checkpoints))
    best = best or next(iter(exports), None)
    if best is not None:
        return Source(best, _kind(best) or "model", name, _why(best, path, exports))
    if checkpoints:
        return Source(checkpoints[-1], "checkpoint", name, _why(checkpoints[-1], path, checkpoints))
    raise OSError(
        f"{run} has neither an export (hf/best, hf/last) nor a checkpoint (*.ckpt). Train with the callback HFExport, "
        "or give the directory of a model."
    )


def _kind(path: Path) -> Kind | None:
    if (path / "config.json").is_file():
        return "model"
    return "adapters" if (path / "adapter_config.json").is_file() else None


def _exports(run: Path) -> list[Path]:
    """A run's exports, the best first: those in ``hf``, then those that other HFExports wrote."""
    parents = sorted({path.parent for path in run.glob("*/*/*config.json")}, key=lambda p: (p.parent.name != "hf", p))
    return sorted((p for p in parents if _kind(p)), key=lambda p: (p.parent.name != "hf", p.name != "best"))


def _why(taken: Path, run: Path, found: list[Path]) -> str:
    others = [str(path.relative_to(run)) for path in found if path != taken]
    rest = f"; {run} also has {', '.join(others[:3])}{' ...' if len(others) > 3 else ''}" if others else ""
    reason = "the newest checkpoint" if taken.suffix == ".ckpt" else f"the export '{taken.name}'"
    return f"{reason}{rest}"


def _from_hub(name: str) -> Source:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    from lightning_rlhf.models.pretrained import obtain

    found = obtain(name)
    if isinstance(found, str):
        try:
            # the same weights in other forms are not wanted
            found = Path(snapshot_download(name, ignore_patterns=["*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.pth"]))
        except (OSError, HFValidationError) as error:
            reason = " ".join(str(error).split())
            raise OSError(f"{name} is no file or directory in {Path.cwd()}; as a hub id: {reason}") from error
    kind = _kind(found)
    if kind is None:
        raise OSError(f"{name} has neither config.json nor adapter_config.json.")
    return Source(found, kind, name.rpartition("/")[2])
