"""Fetches whole models and adapters from the hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError

from lightning_rlhf.models.pretrained import obtain
from lightning_rlhf.models.runs import Source, source_at


def fetch(name: str) -> Source:
    """Fetches what is at a hub id, as a directory.

    Args:
        name: The hub id, or ``smollm2-135m-instruct``.

    Raises:
        OSError: It cannot be fetched, or it is neither a model nor adapters.
    """
    folder = obtain(name)
    if isinstance(folder, str):
        try:
            # the same weights in other forms are not wanted
            folder = Path(snapshot_download(name, ignore_patterns=["*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.pth"]))
        except (OSError, HFValidationError) as error:
            reason = " ".join(str(error).split())
            raise OSError(f"{name} is no file or directory in {Path.cwd()}; as a hub id: {reason}") from error
    if (found := source_at(folder)) is None:
        raise OSError(f"{name} has neither config.json nor adapter_config.json.")
    return Source(found.path, found.kind, name.rpartition("/")[2])
