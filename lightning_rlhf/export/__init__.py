"""Exports what a stage trained for other programs: merged weights, adapters alone, or a GGUF file."""

from typing import TYPE_CHECKING

from lightning_rlhf.utils.lazy import loader

if TYPE_CHECKING:
    from lightning_rlhf.export.command import export
    from lightning_rlhf.export.gguf import write_gguf

_HOMES = {"export": "command", "write_gguf": "gguf"}
__all__ = ["export", "write_gguf"]

__getattr__ = loader(__name__, _HOMES)
