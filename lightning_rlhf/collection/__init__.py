"""Growing instructions from seeds by self-instruct, and ranking answers. Names load when they are used."""

from typing import TYPE_CHECKING

from lightning_rlhf.utils.lazy import loader

if TYPE_CHECKING:
    from lightning_rlhf.collection.answers import Writing
    from lightning_rlhf.collection.generators import EndpointGenerator, EngineGenerator, Generator
    from lightning_rlhf.collection.grow import Growth, Plan
    from lightning_rlhf.collection.parse import parse_list, parse_one
    from lightning_rlhf.collection.preferences import Preferences
    from lightning_rlhf.collection.trace import Trace

_HOMES = {
    **dict.fromkeys(("EndpointGenerator", "EngineGenerator", "Generator"), "generators"),
    **dict.fromkeys(("Growth", "Plan"), "grow"),
    **dict.fromkeys(("parse_list", "parse_one"), "parse"),
    "Preferences": "preferences",
    "Trace": "trace",
    "Writing": "answers",
}
__all__ = [
    "EndpointGenerator",
    "EngineGenerator",
    "Generator",
    "Growth",
    "Plan",
    "Preferences",
    "Trace",
    "Writing",
    "parse_list",
    "parse_one",
]

__getattr__ = loader(__name__, _HOMES)
