"""An HTTP server with OpenAI's interface for what a run has trained. Names load when they are used."""

from typing import TYPE_CHECKING

from lightning_rlhf.utils.lazy import loader

if TYPE_CHECKING:
    from lightning_rlhf.serving.app import make_app
    from lightning_rlhf.serving.guard import Access
    from lightning_rlhf.serving.limits import Limits
    from lightning_rlhf.serving.listen import run
    from lightning_rlhf.serving.models import Served, load_served
    from lightning_rlhf.serving.scoring import Scorer
    from lightning_rlhf.serving.server import Server

_HOMES = {
    "Access": "guard",
    "Limits": "limits",
    "Scorer": "scoring",
    "Served": "models",
    "Server": "server",
    "load_served": "models",
    "make_app": "app",
    "run": "listen",
}
__all__ = ["Access", "Limits", "Scorer", "Served", "Server", "load_served", "make_app", "run"]

__getattr__ = loader(__name__, _HOMES)
