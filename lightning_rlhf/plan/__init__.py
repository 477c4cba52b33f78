"""Plans a run before it starts: bytes per rank by part, tokens per second, and which layouts fit.

Names are imported when they are used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_rlhf.plan.layout import Layout
    from lightning_rlhf.plan.planner import Answer, Planner, Settings
    from lightning_rlhf.plan.speed import Device
    from lightning_rlhf.plan.text import as_text

_HOMES = {
    "Answer": "planner",
    "Device": "speed",
    "Layout": "layout",
    "Planner": "planner",
    "Settings": "planner",
    "as_text": "text",
}
__all__ = ["Answer", "Device", "Layout", "Planner", "Settings", "as_text"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
