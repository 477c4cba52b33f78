"""Which weights a model has: hashes of its files, so that a vote says what it was about."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from huggingface_hub import try_to_load_from_cache


class WeightHashes:
    """SHA-256 of the weight files of models, computed in a thread of its own because large files take a while.

    Args:
        sources: Directory or hub id of each model, by the model's name.
    """

    def __init__(self, sources: Mapping[str, str] = {}) -> None:
        self._thread = ThreadPoolExecutor(1, "hashes")
        self._hashes: dict[str, Future[dict[str, str]]] = {
            name: self._thread.submit(weight_hashes, source) for name, source in sources.items()
        }

    def of(self, name: str) -> dict[str, str] | None:
        """Returns the hashes of a model's files, by file name; None if the server has no such model.

        Raises:
            OSError: A file cannot be read.
        """
        found = self._hashes.get(name)
        return None if found is None else found.result()

    def close(self) -> None:
        """Ends the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)


def weight_hashes(source: str) -> dict[str, str]:
    """Returns the SHA-256 of each weight file, as ``sha256sum`` prints it.

    Args:
        source: Directory or hub id of a model, or of adapters, whose base is not hashed.
    """
    folder = Path(source)
    if not folder.is_dir():
        cached = (try_to_load_from_cache(source, name) for name in ("config.json", "adapter_config.json"))
        folder = next((Path(path).parent for path in cached if isinstance(path, str)), folder)
    files = sorted(folder.glob("adapter_model.safetensors")) or sorted(folder.glob("*.safetensors"))
    return {path.name: _sha256(path) for path in files}


def _sha256(path: Path) -> str:
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            found.update(block)
    return found.hexdigest()
