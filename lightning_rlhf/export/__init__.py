"""Exports what a stage trained for other programs: merged weights, adapters alone, or a GGUF file."""

from typing import TYPE_CHECKING

from lightning_rlhf.utils.lazy import loader

if TYPE_CHECKING:
    from lightning_rlhf.export.command import export
    from lightning_rlhf.export.gguf import write_gguf
    from lightning_rlhf.export.sources import Source, find_source

_HOMES = {"export": "command", "write_gguf": "gguf", **dict.fromkeys(("Source", "find_source"), "sources")}
__all__ = ["Source", "export", "find_source", "write_gguf"]

__getattr__ = loader(__name__, _HOMES)
