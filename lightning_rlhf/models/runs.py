"""Finds the models in what a user names: a run's folder, the directory of a model, a checkpoint, a hub id."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lightning_rlhf.arguments import nearest
from lightning_rlhf.models.gptq import method_of
from lightning_rlhf.models.pretrained import obtain

Kind = Literal["model", "adapters", "checkpoint"]
_HUB_ID = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*")


@dataclass(frozen=True)
class Source:
    """A model that a run left, or that a user named.

    Attributes:
        path: A directory, or a checkpoint's file.
        kind: ``model``: whole weights. ``adapters``: peft's directory. ``checkpoint``: a Trainer's file.
        name: Name for what is made of it: the run's, or that of the directory or file.
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
        """The adapters' base model.

        Raises:
            ValueError: The adapters do not name it.
        """
        if not (found := self.config.get("base_model_name_or_path")):
            raise ValueError(
                f"The adapter_config.json of {self.path} does not name a base. Set base_model_name_or_path."
            )
        return str(found)

    @property
    def is_reward_model(self) -> bool:
        """Whether a directory scores instead of writing texts."""
        if self.kind == "adapters":
            return self.config.get("task_type") == "SEQ_CLS"
        return any(name.endswith("ForSequenceClassification") for name in self.config.get("architectures") or ())

    @property
    def quantized_by(self) -> str | None:
        """Name of the method by which a whole model's weights are quantized; None if they are not."""
        return method_of(self.config)


def source_at(folder: Path) -> Source | None:
    """Returns the model or the adapters in a directory itself; None if it has neither."""
    kind: Kind = "model" if (folder / "config.json").is_file() else "adapters"
    if kind == "adapters" and not (folder / "adapter_config.json").is_file():
        return None
    place = folder.resolve()
    named = place.parents[1] if place.parent.name == "hf" else place  # an export has the name of its run
    return Source(folder, kind, named.name)


def exports_of(folder: Path) -> list[Source]:
    """Returns the models of a run's folder, ``hf/best`` and ``hf/last`` first; of a model's directory, itself."""
    if itself := source_at(folder):
        return [itself]
    name = folder.resolve().name
    found = [(path, source_at(path)) for end in ("best", "last") for path in folder.glob(f"*/{end}")]
    exports = [Source(path, source.kind, name) for path, source in found if source]
    return sorted(exports, key=lambda s: (s.path.parent.name != "hf", s.path.name, s.path))


def find_source(run: str, adapters: bool = False) -> Source | None:
    """Finds the model that a user names, on this disk.

    Of a run's folder the first of :func:`exports_of` is taken, or else the newest checkpoint.

    Args:
        run: A run's folder, the directory of a model or of adapters, a checkpoint, or a hub id.
        adapters: Prefer adapters to whole weights, and a checkpoint, which may have them, to whole weights too.

    Returns:
        The model; None for a hub id.

    Raises:
        OSError: There is nothing by that name, or nothing in it.
    """
    path = Path(run)
    if path.is_file():
        return Source(path, "checkpoint", path.stem.replace("=", ""))
    if not path.is_dir():
        check_name(run)
        return None
    exports, name = exports_of(path), path.resolve().name
    checkpoints = [] if exports and exports[0].path == path else sorted(path.glob("**/*.ckpt"), key=os.path.getmtime)
    wanted = [export for export in exports if export.kind == "adapters" or not adapters]
    if checkpoints and not wanted:
        newest = checkpoints[-1]
        return Source(newest, "checkpoint", name, f"the newest checkpoint{_others(newest, path, checkpoints)}")
    if not exports:
        raise FileNotFoundError(
            f"{run} has neither an export (hf/best, hf/last) nor a checkpoint (*.ckpt). Train with the callback "
            "HFExport, or give the directory of a model."
        )
    best = (wanted or exports)[0]
    if best.path == path:
        return best
    others = _others(best.path, path, [export.path for export in exports])
    return Source(best.path, best.kind, name, f"the export '{best.path.name}'{others}")


def _others(taken: Path, run: Path, found: Iterable[Path]) -> str:
    others = [str(path.relative_to(run)) for path in found if path != taken]
    return f"; {run} also has {', '.join(others[:3])}{' ...' if len(others) > 3 else ''}" if others else ""


def find_model(run: str) -> Path | str:
    """Finds the model that a user names, as ``from_pretrained`` reads it.

    Args:
        run: A run's folder, the directory of a model or of adapters, a hub id, or ``smollm2-135m-instruct``.

    Returns:
        A directory, or the hub id.

    Raises:
        OSError: There is nothing by that name, nothing in it, or a checkpoint alone.
    """
    name = obtain(run)
    if (found := find_source(os.fspath(name))) is None:
        return name
    if found.kind == "checkpoint":
        raise OSError(
            f"{found.path} is a checkpoint. Make a model of it first: lightning-rlhf export {found.path} --format hf."
        )
    return found.path


def check_name(name: str | os.PathLike[str]) -> None:
    """Checks that a name is a directory, or can be a hub id. A path is never looked for on the hub.

    Raises:
        FileNotFoundError: It is a path at which there is nothing. The message names the nearest that exists.
        NotADirectoryError: It is a file.
    """
    path, name = Path(name), os.fspath(name)
    if path.is_dir() or (_HUB_ID.fullmatch(name) and not (path.parent != Path() and path.parent.is_dir())):
        return
    if path.is_file():
        raise NotADirectoryError(f"{name} is a file. Give the directory of a model.")
    gone = next((p for p in (path, *path.parents) if p.parent.is_dir()), path)  # the first part that is missing
    near = nearest(gone.name, [p.name for p in gone.parent.glob("*")]) if gone.parent.is_dir() else None
    if gone.name == "best" and (gone.parent / "last").is_dir():
        near = "last"  # of a run that ended before its first validation
    end = f"; did you mean {gone.parent / near}?" if near else "."
    if gone.name == "hf" and not near:
        end = f": the run in {gone.parent} has exported no model. HFExport writes hf/best and hf/last."
    raise FileNotFoundError(f"There is no directory {name}{end}")
