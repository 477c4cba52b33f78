"""Rows as the model will see them: their tokens, which tokens the loss reads, and statistics of all rows.

Names are imported when they are used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_rlhf.inspection.page import write_page
    from lightning_rlhf.inspection.rows import Inspection, inspect_data
    from lightning_rlhf.inspection.terminal import as_text

_HOMES = {"Inspection": "rows", "as_text": "terminal", "inspect_data": "rows", "write_page": "page"}
__all__ = ["Inspection", "as_text", "inspect_data", "write_page"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
