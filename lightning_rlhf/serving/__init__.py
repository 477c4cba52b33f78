"""An HTTP server with OpenAI's interface for what a run has trained. Names load when they are used."""

from typing import TYPE_CHECKING

from lightning_rlhf.utils.lazy import loader

if TYPE_CHECKING:
    from lightning_rlhf.serving.app import make_app
    from lightning_rlhf.serving.guard import Access
    from lightning_rlhf.serving.limits import Limits
    from lightning_rlhf.serving.listen import run
    from lightning_rlhf.serving.load import ModelOptions, load_served, load_shared
    from lightning_rlhf.serving.models import Served
    from lightning_rlhf.serving.scoring import Scorer
    from lightning_rlhf.serving.server import Server

_HOMES = {
    "Access": "guard",
    "Limits": "limits",
    "Scorer": "scoring",
    "Served": "models",
    "Server": "server",
    "ModelOptions": "load",
    "load_served": "load",
    "load_shared": "load",
    "make_app": "app",
    "run": "listen",
}
__all__ = [
    "Access",
    "Limits",
    "ModelOptions",
    "Scorer",
    "Served",
    "Server",
    "load_served",
    "load_shared",
    "make_app",
    "run",
]

__getattr__ = loader(__name__, _HOMES)
